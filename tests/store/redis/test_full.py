"""A store without memory: new work is refused as a whole, what gives something back or ends something is not."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from typing import cast

import pytest

from convener.core.admission import Slot
from convener.core.cursor import Cursor
from convener.core.directory import Record
from convener.core.membership import Member
from convener.core.model import AppendReply, AppendRequest, ClaimRequest, Closing, NewMessage
from convener.errors import StoreFull
from convener.store.redis import RedisStore
from convener.store.tables import timer_shard
from tests.support.servers import FLAVOURS, Flavour, Server

MESSAGE = NewMessage("m1", "u", "{}")


@pytest.fixture(params=FLAVOURS, scope="module")
def own(request: pytest.FixtureRequest) -> Iterator[Server]:
    with Server(cast("Flavour", request.param)) as server:
        yield server


@pytest.fixture
async def filled(own: Server) -> AsyncIterator[tuple[RedisStore, int]]:
    """A store that is full, with conversation `c` of owner n~1, one message taken in, two questions open; its epoch."""
    own.ask("CONFIG", "SET", "maxmemory", "0")
    own.ask("FLUSHALL")
    async with RedisStore(own.url) as store:
        for cid in ("c", "free", "fresh"):
            await store.create(cid, "u", "{}", "g")
        reply = await store.claim("c", ClaimRequest("n~1", "x", "", 0, "start"))
        assert reply.meta
        await store.send("c", MESSAGE, max_pending=5)
        await store.send("free", MESSAGE, max_pending=5)
        await store.join("n~1", Member(0, 100_000, 500))
        await store.join("n~2", Member(0, 100_000, 500))
        await store.reserve("u", "c", Slot("x", "n~1"), raised_limit=0, read=None)
        await store.enqueue("u", "d", "n~1", "start")
        await store.put_record("n~1", Record("c", "u", "running", 1, "x", 1))
        await store.index("u", "c")
        await store.set_alarm("c", "alarm", "1")
        await store.set_timer("c", "alarm", 1)
        asks = (("t1.1", "{}"), ("t1.2", "{}"))
        await store.append("c", replace(_batch(reply.meta.epoch, '{"kind":"ask"}'), asks=asks))
        await store.add_pieces("c", "n~1", reply.meta.epoch, 1, ["1"])
        own.ask("CONFIG", "SET", "maxmemory", "1")
        yield store, reply.meta.epoch
        own.ask("CONFIG", "SET", "maxmemory", "0")


def _batch(epoch: int, event: str, *, done: int = 0, closing: Closing = "", expected: int = 1) -> AppendRequest:
    return AppendRequest("n~1", epoch, expected, "b", 1, done, 0, (event,), b"state", closing)


def _later(epoch: int, kind: str, *, done: int = 0, closing: Closing = "") -> AppendRequest:
    """A batch for the conversation as it is when the store is full."""
    return _batch(epoch, f'{{"kind":"{kind}"}}', done=done, closing=closing, expected=2)


async def _everything(store: RedisStore) -> list[object]:
    """All that the store says about conversation `c`."""
    found = [await store.head("c"), await store.inbox("c"), await store.read("c", Cursor(), 10)]
    timers = [await store.due_timers(timer_shard("c"), 9), await store.alarms("c")]
    return [*found, await store.asks("c"), await store.pieces("c"), *timers]


async def test_new_work_is_refused_and_leaves_nothing(filled: tuple[RedisStore, int]) -> None:
    store, epoch = filled
    before = await _everything(store)
    steps = [
        store.create("new", "u", "{}", "g"),
        store.send("c", NewMessage("m2", "u", "{}"), max_pending=5),
        store.claim("free", ClaimRequest("n~1", "y", "", 0, "start")),
        store.append("c", _later(epoch, "reply")),
        store.append("c", replace(_later(epoch, "ask"), asks=(("t1.3", "{}"),))),
        store.append("c", replace(_later(epoch, "turn_started"), begins_turn=True)),
        store.add_pieces("c", "n~1", epoch, 1, ["2"]),
        store.answer("c", "t1.1", NewMessage("r1", "u", "1", "answer")),
        store.interrupt("c", ""),
        store.set_alarm("c", "other", "1"),
        store.fire("c", "alarm", max_pending=9),
        store.set_timer("c", "other", 1),
        store.set_metadata("c", '{"a":1}'),
        store.resume("c"),
        store.join("n~3", Member(0, 1000, 500)),
        store.reserve("u", "e", Slot("y", "n~1"), raised_limit=0, read=None),
        store.enqueue("u", "f", "n~1", "start"),
        store.put_record("n~1", Record("d", "u", "starting", 0, "y", 1)),
        store.flush("n~1", 2, [], {"k": "c"}, []),
        store.index("u", "d"),
    ]
    for step in steps:
        with pytest.raises(StoreFull):
            await step
    assert before == await _everything(store)
    assert await store.head("new") is None
    assert await store.record("n~1", "d") is None


@pytest.mark.parametrize("kind", ["turn_done", "turn_failed", "turn_interrupted"])
async def test_a_turn_can_end(filled: tuple[RedisStore, int], kind: str) -> None:
    store, epoch = filled
    request = replace(_later(epoch, kind, done=1), ends_turn=True)
    assert await store.append("c", request) == AppendReply("OK", 3, "b")
    assert await store.state("c") == b"state"
    assert (await store.asks("c"), await store.pieces("c")) == ({}, [])
    assert await store.release("c", "n~1", epoch, 3) == "OK"


async def test_a_turn_can_end_while_the_next_one_begins_and_asks(filled: tuple[RedisStore, int]) -> None:
    """Both are one batch: what was begun must be able to end."""
    store, epoch = filled
    asks = (("t2.1", "{}"),)
    request = replace(_later(epoch, "turn_done", done=1), ends_turn=True, begins_turn=True, asks=asks)
    assert (await store.append("c", request)).outcome == "OK"
    assert (await store.asks("c"), await store.pieces("c")) == ({"t2.1": "{}"}, [])


@pytest.mark.parametrize("closing", ["failed", "held"])
async def test_a_turn_can_be_given_up(filled: tuple[RedisStore, int], closing: Closing) -> None:
    store, epoch = filled
    assert (await store.append("c", _later(epoch, "turn_failed", closing=closing))).outcome == "OK"
    head = await store.head("c")
    assert head is not None
    assert (head.status, head.owner) == (closing, "")
    assert (await store.stop("c", "n~2", "enough", "")).outcome == "STOPPED"
    assert await store.erase("c") == "OK"


async def test_who_waits_for_a_person_can_leave(filled: tuple[RedisStore, int]) -> None:
    store, epoch = filled
    assert await store.release("c", "n~1", epoch, 2) == "OK"


async def test_what_was_to_happen_can_be_forgotten(filled: tuple[RedisStore, int]) -> None:
    store, _ = filled
    assert await store.drop_alarm("c", "alarm")
    assert await store.clear_timer("c", "alarm")
    assert await store.due_timers(timer_shard("c"), 9) == []


async def test_a_conversation_can_be_stopped_and_erased(filled: tuple[RedisStore, int]) -> None:
    store, epoch = filled
    assert (await store.stop("c", "n~2", "enough", "")).outcome == "STOPPING"
    request = replace(_later(epoch, "stopped", done=2, closing="stopped"), cursor=2)
    assert await store.append("c", request) == AppendReply("OK", 3, "b")
    assert (await store.asks("c"), await store.pieces("c")) == ({}, [])
    assert await store.erase("c") == "OK"
    assert (await store.stop("free", "n~2", "enough", "")).outcome == "STOPPED"
    assert await store.erase("fresh") == "OK"


async def test_everything_can_be_given_back(filled: tuple[RedisStore, int]) -> None:
    store, epoch = filled
    assert await store.unsend("free", "m1", 1) == "OK"
    assert await store.disown("free", "", 0) == "OK"
    assert (await store.resolve("free", "n~9", "z", 1)).outcome == "CANCELLED"
    assert await store.disown("c", "n~1", epoch) == "OK"
    waiting = await store.unreserve("u", "c", "x")
    assert waiting is not None
    assert await store.slots("u") == {}
    assert await store.dequeue("u", "d")
    assert await store.drop_record("n~1", "c", "x")
    assert await store.drop_node("n~1")
    await store.unindex("u", "c")
    assert await store.list_user("u", None, 5) == []


async def test_members_stay_and_go(filled: tuple[RedisStore, int]) -> None:
    store, _ = filled
    link = store.heartbeat_link()
    assert link.renew("n~1", '{"load":1}').outcome == "OK"
    link.close()
    assert (await store.renew("n~2")).outcome == "OK"
    assert await store.reap(1000) == ()
    assert await store.bury("n~2", 1000) == "FRESH"
    await store.leave("n~2")
    assert await store.is_buried("n~2")
    await store.forget("n~2", 0)
    assert set((await store.membership()).members) == {"n~1"}


async def test_a_node_can_start_next_to_a_full_store(filled: tuple[RedisStore, int], own: Server) -> None:
    async with RedisStore(own.url) as store:
        assert await store.head("c") is not None
        info = await store.info()
        assert info.memory_ratio is not None
        assert info.memory_ratio > 1
