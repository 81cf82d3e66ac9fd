"""Alarms, and what is to happen when."""

from __future__ import annotations

import asyncio
from typing import Final

from convener.core.model import MAX_ALARMS, SEEN_WINDOW, InboxEntry, NewMessage, SendReply
from convener.store.tables import TIMER_SHARDS, timer_shard
from convener.testing.contract_checks.tools import answer, head, made, owned, send, take_in, unread
from convener.testing.harness import Harness

FAR: Final = 10**14
"""A time in ms that does not come."""


async def check_an_alarm_becomes_a_message(h: Harness) -> None:
    """In one step: the entry of the conversation's user, its id remembered, the alarm gone."""
    a, b = await h.connect(), await h.connect()
    assert dict(await a.alarms("c")) == {}
    assert await a.set_alarm("c", "alarm/1", "1") == "NOT_FOUND"
    assert await a.fire("c", "alarm/1", max_pending=9) == SendReply("NOT_FOUND")
    m = await owned(a)
    assert await a.set_alarm("c", "alarm/1", "1") == "OK"
    assert await b.set_alarm("c", "alarm/1", '{"text":"é 😀"}') == "OK"
    assert await b.set_alarm("c", "alarm/2", "2") == "OK"
    assert await head(a) == m
    assert dict(await a.alarms("c")) == {"alarm/1": '{"text":"é 😀"}', "alarm/2": "2"}
    assert await b.fire("c", "alarm/1", max_pending=9) == SendReply("OK", 1, "a~1", m.epoch)
    after = await head(a)
    assert (after.position, after.done) == (1, 0)
    assert await unread(a) == [InboxEntry(1, "alarm/1", "alarm", "u", after.updated, '{"text":"é 😀"}')]
    assert dict(await a.all_seen("c")) == {"alarm/1": 1}
    assert dict(await a.alarms("c")) == {"alarm/2": "2"}
    assert await a.fire("c", "alarm/1", max_pending=9) == SendReply("DUP", 1, "a~1", m.epoch)
    assert await a.fire("c", "none", max_pending=9) == SendReply("DUP", 0, "a~1", m.epoch)
    assert await a.set_alarm("c", "alarm/1", "again") == "DUP"
    assert await a.drop_alarm("c", "alarm/2")
    assert not await b.drop_alarm("c", "alarm/2")
    assert not await b.drop_alarm("none", "alarm/2")
    assert not [key for key in await h.keys() if key.endswith(":alarms")]


async def check_an_alarm_fires_once(h: Harness) -> None:
    """However many nodes find it due at once, and however often they try again."""
    stores = [await h.connect() for _ in range(3)]
    m = await owned(stores[0])
    for i in range(10):
        await stores[i % 3].set_alarm("c", f"a{i}", f"{i}")
    tries = [(stores[i % 3], f"a{i // 6}") for i in range(60)]
    replies = await asyncio.gather(*(store.fire("c", name, max_pending=99) for store, name in tries))
    fired = {name: r.position for (_, name), r in zip(tries, replies, strict=True) if r.outcome == "OK"}
    assert sorted(fired.values()) == list(range(1, 11))
    assert sum(r.outcome == "OK" for r in replies) == 10
    expected = [SendReply(r.outcome, fired[name], "a~1", m.epoch) for (_, name), r in zip(tries, replies, strict=True)]
    assert list(replies) == expected
    assert {r.outcome for r in replies} == {"OK", "DUP"}
    assert sorted((e.message_id, e.data) for e in await unread(stores[1])) == [(f"a{i}", f"{i}") for i in range(10)]


async def check_a_repeated_turn_sets_no_alarm_twice(h: Harness) -> None:
    """Its setting may be repeated with an unknown outcome for as long as the turn is open, however much has come since:
    what is unanswered is remembered.
    """
    s = await h.connect()
    await owned(s)
    await send(s, "m1")
    await take_in(s)
    assert await s.set_alarm("c", "alarm/t1.1", "1") == "OK"
    assert (await s.fire("c", "alarm/t1.1", max_pending=9)).position == 2
    messages = [NewMessage(f"n{i}", "u", "1") for i in range(SEEN_WINDOW + 20)]
    await asyncio.gather(*(s.send("c", m, max_pending=1000) for m in messages))
    await take_in(s)
    assert await s.set_alarm("c", "alarm/t1.1", "1") == "DUP"
    await answer(s, 1)
    assert await s.set_alarm("c", "alarm/t1.1", "1") == "DUP"


async def check_alarms_are_bounded(h: Harness) -> None:
    """At `MAX_ALARMS`; one that is set may be set again."""
    s = await h.connect()
    await made(s)
    outcomes = await asyncio.gather(*(s.set_alarm("c", f"a{i}", "1") for i in range(MAX_ALARMS + 5)))
    assert sorted(outcomes) == ["FULL"] * 5 + ["OK"] * MAX_ALARMS
    name = next(iter(await s.alarms("c")))
    assert await s.set_alarm("c", name, "2") == "OK"
    assert await s.set_alarm("c", "one-more", "1") == "FULL"
    assert (await s.fire("c", name, max_pending=9)).outcome == "OK"
    assert await s.set_alarm("c", "one-more", "1") == "OK"
    assert len(await s.alarms("c")) == MAX_ALARMS


async def check_an_alarm_waits_behind_a_full_queue(h: Harness) -> None:
    """It stays set."""
    s = await h.connect()
    await owned(s)
    await s.set_alarm("c", "a1", "1")
    await send(s, "m1")
    await take_in(s)
    assert await s.fire("c", "a1", max_pending=1) == SendReply("FULL")
    assert (dict(await s.alarms("c")), (await head(s)).position) == ({"a1": "1"}, 1)
    await answer(s, 1)
    assert (await s.fire("c", "a1", max_pending=1)).position == 2


async def check_alarms_of_a_stopped_conversation(h: Harness) -> None:
    """Nothing is set any more; what is due while it is stopped is gone, the rest is there when it is resumed."""
    s = await h.connect()
    await owned(s)
    for name in ("a1", "a2", "a3"):
        await s.set_alarm("c", name, "1")
    await s.stop("c", "b~1", "why", "")
    assert (await head(s)).status == "stopping"
    assert await s.set_alarm("c", "a4", "1") == "CLOSED"
    assert await s.fire("c", "a1", max_pending=9) == SendReply("CLOSED")
    await s.stop("c", "b~1", "why", "a~1")
    assert await s.set_alarm("c", "a4", "1") == "CLOSED"
    assert await s.fire("c", "a2", max_pending=9) == SendReply("CLOSED")
    assert dict(await s.alarms("c")) == {"a3": "1"}
    await s.resume("c")
    assert await s.fire("c", "a1", max_pending=9) == SendReply("DUP", 0, "", (await head(s)).epoch)
    assert (await s.fire("c", "a3", max_pending=9)).outcome == "OK"


async def check_an_alarm_never_takes_the_place_of_a_message(h: Harness) -> None:
    """An id is remembered at one position: a second entry under it would make the owner pass the first one over."""
    s = await h.connect()
    m = await owned(s)
    await s.set_alarm("c", "same", "1")
    assert (await send(s, "same")).position == 1
    assert await s.fire("c", "same", max_pending=9) == SendReply("DUP", 1, "a~1", m.epoch)
    assert [(e.position, e.kind) for e in await unread(s)] == [(1, "message")]
    assert (dict(await s.all_seen("c")), dict(await s.alarms("c"))) == ({"same": 1}, {})


# -- timers ----------------------------------------------------------------------------------------------------


async def check_timers(h: Harness) -> None:
    """Due by the store's clock, longest overdue first, ties in a fixed order; moved by setting them again."""
    a, b = await h.connect(), await h.connect()
    shard = timer_shard("c")
    assert list(await a.due_timers(shard, 10)) == []
    for timer_id, due in (("later", FAR), ("third", 30), ("first", 10), ("b", 20), ("a", 20), ("a/x", 20)):
        await a.set_timer("c", timer_id, due)
    await b.set_timer("c", "first", 11)
    found = [("c", "first", 11), ("c", "a", 20), ("c", "a/x", 20), ("c", "b", 20), ("c", "third", 30)]
    assert list(await b.due_timers(shard, 10)) == found
    assert list(await b.due_timers(shard, 2)) == found[:2]
    assert list(await b.due_timers(shard, 0)) == []
    await b.set_timer("c", "first", FAR)
    await a.set_timer("c", "later", 5)
    assert list(await a.due_timers(shard, 2)) == [("c", "later", 5), ("c", "a", 20)]
    assert await b.clear_timer("c", "later")
    assert not await a.clear_timer("c", "later")
    assert not await a.clear_timer("none", "later")
    assert list(await a.due_timers(shard, 1)) == [("c", "a", 20)]
    # An id that begins like another one, in the same part.
    other = next(cid for cid in (f"c.{i}" for i in range(1000)) if timer_shard(cid) == shard)
    await a.set_timer(other, "a", 20)
    assert [cid for cid, _, _ in await a.due_timers(shard, 3)] == [other, "c", "c"]


async def check_a_timer_comes_due(h: Harness) -> None:
    """At the time that the store's own clock says, to the millisecond: not before."""
    s = await h.connect()
    now = (await made(s)).created
    await s.set_timer("c", "past", now)
    await s.set_timer("c", "soon", now + 60_000)
    assert list(await s.due_timers(timer_shard("c"), 10)) == [("c", "past", now)]


async def check_each_timer_is_in_one_part(h: Harness) -> None:
    """That of its conversation."""
    s = await h.connect()
    names = [f"c{i}" for i in range(100)]
    await asyncio.gather(*(s.set_timer(cid, "t", i) for i, cid in enumerate(names)))
    found = [await s.due_timers(shard, 1000) for shard in range(TIMER_SHARDS)]
    assert sorted(cid for part in found for cid, _, _ in part) == sorted(names)
    assert all(timer_shard(cid) == shard for shard, part in enumerate(found) for cid, _, _ in part)
    assert all([due for _, _, due in part] == sorted(due for _, _, due in part) for part in found)
    assert {key for key in await h.keys() if key.startswith("t:")} == {f"t:{timer_shard(cid)}:due" for cid in names}
