"""What managed stores ask for: scripts with keys, few arguments, and credentials that change while nodes work."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Iterator
from typing import Any, cast

import pytest

from convener.core.directory import Record
from convener.core.model import AppendRequest, ClaimRequest
from convener.errors import StoreUnavailable
from convener.manager.turn import MAX_ENTRIES, Turn
from convener.store.base import Store
from convener.store.redis import RedisStore
from convener.testing.cluster import InProcessCluster
from tests.manager.conftest import audit, join
from tests.support.proxy import Proxy, packed
from tests.support.servers import FLAVOURS, Flavour, Server
from tests.support.topologies import tell
from tests.support.waiting import wait_until

MOST = 3000
MANY = 5000


class Meter:
    """Looks at every command that passes."""

    def __init__(self) -> None:
        self.most = 0
        self.without_keys: list[bytes] = []

    def __call__(self, words: list[bytes]) -> bytes:
        self.most = max(self.most, len(words))
        if words[0].upper() in (b"EVAL", b"EVALSHA") and int(words[2]) < 1:
            self.without_keys.append(words[1])
        return packed(*words)


@pytest.fixture(params=FLAVOURS, scope="module")
def own(request: pytest.FixtureRequest) -> Iterator[Server]:
    with Server(cast("Flavour", request.param), password="first") as server:
        yield server


@pytest.fixture
async def metered(own: Server) -> AsyncIterator[tuple[str, Meter]]:
    """A URL at which every command is looked at."""
    tell(own, "FLUSHALL")
    meter = Meter()
    async with Proxy(own.port, rewrite=meter) as proxy:
        yield proxy.url.replace("://", f"://:{own.password}@"), meter


async def test_large_steps_are_cut_into_commands_of_few_arguments(metered: tuple[str, Meter]) -> None:
    url, meter = metered
    many = [f"c{number}" for number in range(MANY)]
    async with RedisStore(url) as store:
        await store.touch("u", many)
        assert await store.heads(many) == [None] * MANY
        await store.create("c", "u", "{}", "g")
        claim = await store.claim("c", ClaimRequest("n~1", "x", "", 0, "start"))
        assert claim.meta is not None
        assert await store.seen("c", many) == [None] * MANY
        await store.put_record("n~1", Record("c0", "u", "starting", 1, "x", 1))
        await store.flush("n~1", 1, [Record(cid, "u", "idle", 1, "x", 1) for cid in many], dict.fromkeys(many, "c"), [])
        await store.flush("n~1", 2, [], {}, many)
        version, records, connections = await store.node_records("n~1")
        assert (version, [record.status for record in records], connections) == (2, ["idle"], {})
        epoch = claim.meta.epoch
        assert await store.add_pieces("c", "n~1", epoch, 1, [f'"{number}"' for number in range(MANY)]) == "OK"
        assert len(await store.pieces("c")) == MANY
        events = tuple('{"kind":"note"}' for _ in range(MAX_ENTRIES + 5))
        reply = await store.append("c", AppendRequest("n~1", epoch, 1, "b", 0, 0, 0, events))
        assert reply.outcome == "OK"
    assert 1000 < meter.most < MOST
    assert meter.without_keys == []


async def test_a_turn_that_writes_more_than_one_command_takes_fails(metered: tuple[str, Meter]) -> None:
    url, meter = metered

    async def chatty(turn: Turn[Any]) -> None:
        for number in range(int(turn.text)):
            await turn.emit("note", number)

    async with InProcessCluster(chatty, nodes=2, url=url) as cluster:
        sink = await join(cluster, 1, "c", "s")
        await cluster[0].send_event_to_conversation("c", {"text": str(MAX_ENTRIES)})
        await wait_until(lambda: any(e["kind"] == "turn_done" for e in sink.events), "the turn is done")
        await cluster[0].send_event_to_conversation("c", {"text": str(MAX_ENTRIES + 1)})
        await wait_until(lambda: any(e["kind"] == "turn_failed" for e in sink.events), "the turn has failed")
        assert len([e for e in sink.events if e["kind"] == "note"]) == MAX_ENTRIES
        assert next(e for e in sink.events if e["kind"] == "turn_failed")["data"]["code"] == "payload_too_large"
        await audit(cluster)
    assert meter.most < MOST
    assert meter.without_keys == []


async def test_nodes_go_on_when_their_password_changes(own: Server) -> None:
    """The provider makes a new password and cuts every connection; the callable knows the new one."""
    tell(own, "FLUSHALL")
    current, askers = ["first"], set[str]()

    def credentials() -> tuple[str, str]:
        askers.add(threading.current_thread().name.split(" ")[0])
        return "default", current[0]

    def make(index: int, store: Store) -> Store:
        return RedisStore(f"redis://127.0.0.1:{own.port}/0", namespace="rotated", credentials=credentials, deadline=2)

    async def echo(turn: Turn[Any]) -> None:
        await turn.reply({"text": turn.text})

    async with InProcessCluster(echo, nodes=2, url=own.url, wrap=make) as cluster:
        sink = await join(cluster, 1, "c", "s")
        lives = [cluster[index].engine.node.incarnation for index in range(2)]
        for number, password in enumerate(("second", "third")):
            # First the one who asks must have the new one, as with every rotation.
            current[0] = password
            tell(own, "CONFIG", "SET", "requirepass", password)
            own.password = password
            for kind in ("normal", "pubsub"):
                tell(own, "CLIENT", "KILL", "TYPE", kind)

            async def said(text: str = password) -> bool:
                return bool(await cluster[0].send_event_to_conversation("c", {"text": text}, message_id=text))

            await wait_until(said, "the message is taken", retry_on=StoreUnavailable)
            await wait_until(lambda n=number: len(sink.replies()) == n + 1, "the message is answered")
        assert [reply["text"] for reply in sink.replies()] == ["second", "third"]
        renewing = [cluster[index].engine.node.lease for index in range(2)]
        await wait_until(lambda: all(lease.valid() for lease in renewing), "leases are renewed")
        assert [cluster[index].engine.node.incarnation for index in range(2)] == lives
        assert askers == {"MainThread", "heartbeat"}
        await audit(cluster)
    current[0] = own.password = "first"
    await asyncio.to_thread(_reset, own)


def _reset(own: Server) -> None:
    own.password = "third"
    tell(own, "CONFIG", "SET", "requirepass", "first")
    own.password = "first"
