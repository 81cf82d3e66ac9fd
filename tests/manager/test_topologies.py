"""Clusters of managers over Sentinels and over a Redis Cluster, whose servers go while conversations run."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from typing import Final

import pytest

from convener.errors import ConvenerError
from convener.manager.turn import Turn
from convener.store.redis.keys import Keys
from convener.store.redis.wire import slot_of
from convener.testing.cluster import InProcessCluster, RecordingSink
from tests.manager.conftest import audit, join
from tests.support.servers import Server, binary
from tests.support.topologies import RedisCluster, SentinelGroup, role
from tests.support.waiting import wait_until

pytestmark = [pytest.mark.anyio, pytest.mark.xdist_group("falling stores")]

CONVERSATIONS: Final = 6


async def answer(turn: Turn) -> None:
    turn.state["answered"] = turn.state.get("answered", 0) + 1
    await turn.reply({"to": turn.input.message_id, "n": turn.state["answered"]})


class Talk:
    """One user's conversation: messages from any node, each repeated under its id until it is accepted."""

    def __init__(self, cluster: InProcessCluster, number: int) -> None:
        self.cluster = cluster
        self.cid = f"c{number}"
        self.user = f"u{number}"
        self.accepted: list[str] = []
        self.sinks: list[RecordingSink] = []

    async def begin(self) -> None:
        for node in range(3):
            self.sinks.append(await join(self.cluster, node, self.cid, f"{self.cid}.{node}", user_id=self.user))

    async def send(self, stop: asyncio.Event) -> None:
        while not stop.is_set():
            ident = secrets.token_hex(6)

            async def is_accepted(ident: str = ident) -> bool:
                manager = self.cluster[len(self.accepted) % 3]
                await manager.send_event_to_conversation(self.cid, {"text": ident}, user_id=self.user, message_id=ident)
                return True

            await wait_until(is_accepted, f"a message to {self.cid} is accepted", 60, retry_on=ConvenerError)
            self.accepted.append(ident)

    def answered(self) -> bool:
        """Whether every client has the answer to every message, and all have the same."""
        events = [sink.events for sink in self.sinks]
        answers = [reply["to"] for reply in self.sinks[0].replies()]
        return sorted(answers) == sorted(self.accepted) and all(other == events[0] for other in events)


@asynccontextmanager
async def talking(url: str, namespace: str) -> AsyncGenerator[list[Talk]]:
    """Three nodes and some conversations under way; at the end everything is answered, and the auditor content."""
    async with InProcessCluster(answer, url=url, namespace=namespace, limit=100) as cluster:
        talks = [Talk(cluster, number) for number in range(CONVERSATIONS)]
        await asyncio.gather(*(talk.begin() for talk in talks))
        stop = asyncio.Event()
        tasks = [asyncio.create_task(talk.send(stop)) for talk in talks]
        try:
            yield talks
        finally:
            stop.set()
            await asyncio.gather(*tasks)
        for talk in talks:
            await wait_until(talk.answered, f"everything in {talk.cid} is answered", 60)
            numbers = [reply["n"] for reply in talk.sinks[0].replies()]
            assert numbers == list(range(1, len(numbers) + 1))
            assert [e["seq"] for e in talk.sinks[0].events] == list(range(1, len(talk.sinks[0].events) + 1))
        await audit(cluster)


async def progress(talks: Sequence[Talk]) -> None:
    """Wait until every conversation has got further."""
    before = [len(talk.accepted) for talk in talks]
    await wait_until(
        lambda: all(len(talk.accepted) >= n + 5 for talk, n in zip(talks, before, strict=True)),
        "every conversation gets on",
        60,
    )


@pytest.fixture(scope="module")
def sharded() -> Iterator[RedisCluster]:
    if binary("valkey") is None:
        pytest.skip("no valkey server is installed on this machine")
    with RedisCluster("valkey", replicas=1) as servers:
        yield servers


def other(servers: RedisCluster, than: Server) -> Server:
    return next(s for s in servers.servers if s.running and s is not than and role(s) == "master")


async def test_conversations_go_on_while_slots_move_and_servers_take_over(sharded: RedisCluster) -> None:
    namespace = f"t{secrets.token_hex(4)}"
    keys = Keys(namespace)
    membership, conversation = slot_of(keys.lease), slot_of(keys.meta("c0"))

    def move(slot: int) -> Callable[[], object]:
        return lambda: sharded.move(slot, other(sharded, sharded.owner(slot)))

    async with talking(sharded.url, namespace) as talks:
        await progress(talks)
        for change in (
            move(conversation),
            move(membership),
            lambda: sharded.fail_over(sharded.owner(conversation)),
            lambda: sharded.fail_over(sharded.owner(membership)),
        ):
            await asyncio.to_thread(change)
            await progress(talks)


@pytest.mark.parametrize("which", ["membership", "conversation"])
async def test_conversations_survive_the_death_of_a_primary(sharded: RedisCluster, which: str) -> None:
    namespace = f"t{secrets.token_hex(4)}"
    keys = Keys(namespace)
    killed = sharded.owner(slot_of(keys.lease if which == "membership" else keys.meta("c0")))
    async with talking(sharded.url, namespace) as talks:
        await progress(talks)
        await asyncio.to_thread(killed.kill)
        await progress(talks)
    await asyncio.to_thread(killed.start)
    await wait_until(sharded.complete, "the cluster is complete", 60)


async def test_conversations_survive_a_fail_over_by_sentinels() -> None:
    if binary("redis") is None:
        pytest.skip("no redis server is installed on this machine")
    with SentinelGroup("redis") as servers:
        async with talking(servers.url, "t") as talks:
            await progress(talks)
            await asyncio.to_thread(servers.caught_up)
            await asyncio.to_thread(servers.primary().kill)
            await progress(talks)
