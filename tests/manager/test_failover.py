"""Fail-overs to a replica that lacks the primary's last writes, under nodes that go on."""

from __future__ import annotations

import asyncio
import json
import secrets
from collections.abc import AsyncGenerator, Iterator
from contextlib import asynccontextmanager
from typing import Any, cast

import pytest

from convener.core.cursor import Cursor
from convener.manager.ops import FallbackReport
from convener.store.redis.keys import Keys
from convener.store.redis.wire import slot_of
from convener.testing.cluster import InProcessCluster, RecordingSink
from tests.manager.conftest import audit, join
from tests.manager.test_fallbacks import answer, answers, runner, send, shown
from tests.support.servers import FLAVOURS, Flavour, Server, binary
from tests.support.topologies import RedisCluster, SentinelGroup, caught_up, tell
from tests.support.waiting import wait_until

pytestmark = [pytest.mark.anyio, pytest.mark.xdist_group("falling stores")]

MESSAGES = ("m2", "m3", "m4")


@asynccontextmanager
async def talking(url: str, namespace: str, *cids: str) -> AsyncGenerator[tuple[InProcessCluster, list[RecordingSink]]]:
    """Two nodes, and in each conversation one message that was answered; all clients are at the second node."""
    async with InProcessCluster(answer, url=url, namespace=namespace, nodes=2, limit=100) as cluster:
        sinks: list[RecordingSink] = []
        for cid in cids:
            await join(cluster, 0, cid, f"{cid}.0")
            sinks.append(await join(cluster, 1, cid, f"{cid}.1"))
            await send(cluster, cid, "m1")
        await wait_until(lambda: all(answers(sink) == ["m1"] for sink in sinks), "all are answered")
        yield cluster, sinks
        await audit(cluster)


def cut_off(primary: Server, replica: Server) -> None:
    """Let the replica have nothing more, as if the network between them were gone; it does not notice."""
    replica.freeze()
    # What was on its way is in the socket's buffer, so the primary must not write there either.
    tell(primary, "CLIENT", "KILL", "TYPE", "replica")


def lose(primary: Server, replica: Server) -> None:
    """Kill the primary, and let go of the replica, which takes over."""
    primary.kill()
    replica.resume()


async def lose_the_last_messages(
    cluster: InProcessCluster, sinks: list[RecordingSink], cids: tuple[str, ...], primary: Server, replica: Server
) -> list[list[str]]:
    """Answer messages that the replica does not get, then let it take over. Returns the logs as they were."""
    await asyncio.to_thread(cut_off, primary, replica)
    for message_id in MESSAGES:
        for cid in cids:
            await send(cluster, cid, message_id)
    await wait_until(lambda: all(answers(sink) == ["m1", *MESSAGES] for sink in sinks), "all are answered")
    before = [await texts(cluster, cid) for cid in cids]
    for manager in cluster:
        # Each node does that by itself, twice a second; how much is missing is told by what was seen last.
        await manager.engine.node.store.progress()
    await asyncio.to_thread(lose, primary, replica)
    return before


async def texts(cluster: InProcessCluster, cid: str, node: int = 0) -> list[str]:
    """The log: places and contents."""
    page = await cluster[node].engine.node.store.read(cid, Cursor(), 1000)
    assert page is not None
    return [f"{entry.epoch}-{entry.seq} {entry.event}" for entry in page.entries]


async def verified(cluster: InProcessCluster, node: int) -> FallbackReport:
    """What the node that owns everything has found."""

    def last() -> FallbackReport | None:
        found = cluster[node].readiness().fallbacks
        return found[-1] if found and found[-1].verified else None

    return cast("FallbackReport", await wait_until(last, "everything is verified", 60))


async def all_is_there(
    cluster: InProcessCluster, sinks: list[RecordingSink], cids: tuple[str, ...], before: list[list[str]]
) -> None:
    """The log has what it had, under the same ids and once (I4, I8), and goes on; clients see the log (I9)."""
    for cid, sink, old in zip(cids, sinks, before, strict=True):
        await send(cluster, cid, "m9", 1)
        await wait_until(lambda s=sink: answers(s) == ["m1", *MESSAGES, "m9"], "the last message is answered", 60)
        after = await texts(cluster, cid)
        assert after[: len(old)] == old
        assert [entry["seq"] for entry in shown(sink)] == list(range(1, len(after) + 1))
        inputs = [json.loads(text.partition(" ")[2]) for text in after if '"kind":"input"' in text]
        assert [entry["data"]["message_id"] for entry in inputs] == ["m1", *MESSAGES, "m9"]
        assert len({entry["turn"] for entry in inputs}) == len(inputs)


@pytest.fixture(params=FLAVOURS)
def sentinels(request: pytest.FixtureRequest) -> Iterator[SentinelGroup]:
    flavour = cast("Flavour", request.param)
    if binary(flavour) is None:
        pytest.skip(f"no {flavour} server is installed on this machine")
    with SentinelGroup(flavour) as servers:
        yield servers


async def test_owners_repair_what_a_fail_over_has_lost(sentinels: SentinelGroup) -> None:
    cids = ("c0", "c1")
    async with talking(sentinels.url, "t", *cids) as (cluster, sinks):
        await asyncio.to_thread(sentinels.caught_up)
        primary = sentinels.primary()
        (replica,) = (server for server in sentinels.servers if server is not primary)
        epochs = [runner(cluster, cid).epoch for cid in cids]
        before = await lose_the_last_messages(cluster, sinks, cids, primary, replica)
        report = await verified(cluster, 0)
        await all_is_there(cluster, sinks, cids, before)
        assert report.way == "fail-over"
        assert report.missing_bytes
        assert report.lost == report.repaired > 0
        assert report.unrepaired == 0
        assert [runner(cluster, cid).epoch for cid in cids] == epochs


async def test_owners_forget_what_a_replica_has(sentinels: SentinelGroup) -> None:
    async with talking(sentinels.url, "t", "c0", "c1") as (cluster, _):
        tails = [runner(cluster, cid).appender.tail for cid in ("c0", "c1")]
        await wait_until(lambda: not any(len(tail) for tail in tails), "replicas have everything")
        (replica,) = (server for server in sentinels.servers if server is not sentinels.primary())
        await asyncio.to_thread(cut_off, sentinels.primary(), replica)
        await send(cluster, "c0", "m2")
        await wait_until(lambda: len(tails[0]) > 0, "the owner remembers")
        replica.resume()
        await wait_until(lambda: not len(tails[0]), "the replica has caught up", 60)


class Sender:
    """Sends one message after the other, each repeated under its id until it is accepted."""

    def __init__(self, cluster: InProcessCluster, cid: str) -> None:
        self.cluster = cluster
        self.cid = cid
        self.accepted: list[str] = []
        self.stop = asyncio.Event()

    async def run(self) -> None:
        while not self.stop.is_set():
            ident = f"{self.cid}.{len(self.accepted)}"
            await send(self.cluster, self.cid, ident, 1 + len(self.accepted) % 2)
            self.accepted.append(ident)

    async def gets_on(self) -> None:
        goal = len(self.accepted) + 10
        await wait_until(lambda: len(self.accepted) >= goal, f"{goal} messages are accepted", 60)


async def test_nothing_that_was_acknowledged_is_lost_if_it_is_replicated() -> None:
    """Primary and owner go at the same moment, with whatever they had in memory."""
    if binary("redis") is None:
        pytest.skip("no redis server is installed on this machine")
    cids = ("c0", "c1", "c2")
    with SentinelGroup("redis", replicas=2) as servers:
        options = {"url": servers.url, "nodes": 3, "limit": 100, "durability": "replicated"}
        async with InProcessCluster(answer, **cast("Any", options)) as cluster:
            for cid in cids:
                await cluster[0].maybe_start_agent_loop(cid, user_id="u")
                assert cluster.owner_of(cid) == 0
            sinks = [await join(cluster, 2, cid, cid) for cid in cids]
            senders = [Sender(cluster, cid) for cid in cids]
            tasks = [asyncio.create_task(sender.run()) for sender in senders]
            await asyncio.gather(*(sender.gets_on() for sender in senders))
            await asyncio.gather(asyncio.to_thread(servers.primary().kill), cluster.kill(0))
            await asyncio.gather(*(sender.gets_on() for sender in senders))
            for sender in senders:
                sender.stop.set()
            await asyncio.gather(*tasks)
            for sender, sink in zip(senders, sinks, strict=True):
                await wait_until(lambda a=sender, b=sink: answers(b)[-1:] == a.accepted[-1:], "all is answered", 60)
                events = [json.loads(text.partition(" ")[2]) for text in await texts(cluster, sender.cid, 1)]
                inputs = [e["data"]["message_id"] for e in events if e["kind"] == "input"]
                assert inputs == sender.accepted
                assert [e["data"]["to"] for e in events if e["kind"] == "reply"] == sender.accepted
            await audit(cluster)


@pytest.fixture(scope="module")
def sharded() -> Iterator[RedisCluster]:
    if binary("valkey") is None:
        pytest.skip("no valkey server is installed on this machine")
    with RedisCluster("valkey", replicas=1) as servers:
        yield servers


@pytest.mark.parametrize("which", ["conversation", "membership", "user", "node"])
async def test_owners_repair_what_a_part_of_a_cluster_has_lost(sharded: RedisCluster, which: str) -> None:
    """Every group of keys has a primary of its own: each may fall back while the others do not."""
    namespace, cids = f"t{secrets.token_hex(4)}", ("c0", "c1", "c2")
    keys = Keys(namespace)
    async with talking(sharded.url, namespace, *cids) as (cluster, sinks):
        key = {
            "conversation": keys.meta("c0"),
            "membership": keys.lease,
            "user": keys.slots("u"),
            "node": keys.records(cluster[0].engine.node.incarnation),
        }[which]
        primary = sharded.owner(slot_of(key))
        replica = sharded.replica_of(primary)
        await asyncio.to_thread(caught_up, replica, primary)
        before = await lose_the_last_messages(cluster, sinks, cids, primary, replica)
        report = await verified(cluster, 0)
        await all_is_there(cluster, sinks, cids, before)
        assert report.way == "fail-over"
        assert report.lost == report.repaired
        if which == "conversation":
            assert report.lost > 0
    await asyncio.to_thread(primary.start)
    await wait_until(sharded.complete, "the cluster is complete", 60)
