"""Appending to logs and reading them."""

from __future__ import annotations

import asyncio
import json

from convener.core.cursor import Cursor
from convener.core.model import AppendReply, AppendRequest, LogEntry
from convener.core.view import START, Place
from convener.core.wire import event
from convener.testing.contract_checks.tools import (
    GENERATION,
    REPLY,
    answer,
    append,
    claim,
    head,
    made,
    owned,
    send,
    take_in,
)
from convener.testing.harness import Harness


async def check_append(h: Harness) -> None:
    """Entries, cursor, done, base, batch and state in one step; the state stays where none is given."""
    s = await h.connect()
    m = await owned(s)
    for name in ("m1", "m2", "m3"):
        await send(s, name)
    assert await s.state("c") is None
    first = await append(s, REPLY, REPLY, batch="b1", cursor=2, done=1, base=1, state=b"\x00\xff")
    assert first == AppendReply("OK", 3, "b1")
    after = await head(s)
    assert (after.seq, after.batch, after.cursor, after.done, after.base) == (3, "b1", 2, 1, 1)
    read = await s.inbox("c")
    assert read is not None
    assert [e.position for e in read[1]] == [3]
    assert await s.state("c") == b"\x00\xff"
    await append(s, REPLY, cursor=0, done=0, base=0)
    after = await head(s)
    assert (after.cursor, after.done, after.base, await s.state("c")) == (2, 1, 1, b"\x00\xff")
    await append(s, state=b"")
    assert (await s.state("c"), (await head(s)).seq) == (b"", 4)
    page = await s.read("c", Cursor(), 10)
    assert page is not None
    assert list(page.entries[1:]) == [LogEntry(m.epoch, seq, REPLY) for seq in (2, 3, 4)]


async def check_append_is_fenced(h: Harness) -> None:
    """I3: by epoch and by owner; what is refused leaves nothing behind."""
    s = await h.connect()
    request = AppendRequest("a~1", 1, 0, "b", 0, 0, 0, (REPLY,), b"x")
    assert (await s.append("c", request)).outcome == "FENCED"
    old = await owned(s, "a~1")
    assert await s.release("c", "a~1", old.epoch, 1) == "OK"
    late = AppendRequest("a~1", old.epoch, 1, "b", 0, 0, 0, (REPLY,), b"x")
    assert (await s.append("c", late)).outcome == "FENCED"
    new = (await claim(s, "a~1", "n2")).meta
    assert new is not None
    reply = await s.append("c", AppendRequest("a~1", old.epoch, 2, "b", 0, 0, 0, (REPLY,), b"x"))
    assert reply == AppendReply("FENCED", 2, "", "a~1", new.epoch)
    reply = await s.append("c", AppendRequest("b~1", new.epoch, 2, "b", 0, 0, 0, (REPLY,), b"x"))
    assert reply == AppendReply("FENCED", 2, "", "a~1", new.epoch)
    assert ((await head(s)).seq, await s.state("c")) == (2, None)


async def check_append_expects_its_place(h: Harness) -> None:
    """A repeated batch meets a gap that names it; nothing is written twice."""
    s = await h.connect()
    await owned(s)
    await append(s, REPLY, batch="b1")
    for expected in (0, 1, 3):
        reply = await append(s, REPLY, expected=expected, batch="again", state=b"x", cursor=9, done=9)
        assert reply == AppendReply("GAP", 2, "b1")
    after = await head(s)
    assert (after.seq, after.cursor, after.done, await s.state("c")) == (2, 0, 0, None)


async def check_appends_may_be_chained(h: Harness) -> None:
    """Calls of one caller take effect in order: each expects the end of the one before, none waits for it."""
    s = await h.connect()
    m = await owned(s)
    requests = [
        AppendRequest("a~1", m.epoch, 1 + 2 * i, f"b{i}", 0, 0, 0, (event("reply", f"t{i}", 1, "1"), REPLY))
        for i in range(50)
    ]
    replies = await asyncio.gather(*(s.append("c", r) for r in requests))
    assert [r.outcome for r in replies] == ["OK"] * 50
    assert [r.seq for r in replies] == [3 + 2 * i for i in range(50)]
    page = await s.read("c", Cursor(), 200)
    assert page is not None
    assert [e.seq for e in page.entries] == list(range(1, 102))
    assert [e.event for e in page.entries[1::2]] == [r.events[0] for r in requests]


async def check_of_two_writers_one_writes(h: Harness) -> None:
    """I1: the same place is given once."""
    stores = [await h.connect() for _ in range(3)]
    m = await owned(stores[0])
    texts = [event("reply", f"t{i}", 1, "1") for i in range(30)]
    requests = [AppendRequest("a~1", m.epoch, 1, f"b{i}", 0, 0, 0, (t,)) for i, t in enumerate(texts)]
    replies = await asyncio.gather(*(stores[i % 3].append("c", r) for i, r in enumerate(requests)))
    assert sorted(r.outcome for r in replies) == ["GAP"] * 29 + ["OK"]
    winner = next(i for i, r in enumerate(replies) if r.outcome == "OK")
    page = await stores[1].read("c", Cursor(), 10)
    assert page is not None
    assert list(page.entries)[1:] == [LogEntry(m.epoch, 2, texts[winner])]


async def check_large_entries_stay_whole(h: Harness) -> None:
    """Any JSON text, up to the largest payload."""
    s = await h.connect()
    await owned(s)
    text = json.dumps({"text": "é😀\u2028\x00/" * 20_000}, ensure_ascii=False)
    await send(s, "m1", data=text)
    read = await s.inbox("c")
    assert read is not None
    assert read[1][0].data == text
    await take_in(s)
    await append(s, event("reply", "t1", 1, text), state=text.encode() * 3)
    page = await s.read("c", Cursor(), 10)
    assert page is not None
    assert json.loads(page.entries[1].event)["data"]["data"] == json.loads(text)
    assert json.loads(page.entries[2].event)["data"] == json.loads(text)
    assert await s.state("c") == text.encode() * 3


async def check_read(h: Harness) -> None:
    """Pages after a place, with the generation and the last place that there is."""
    s = await h.connect()
    assert await s.read("c", Cursor(), 10) is None
    await made(s)
    empty = await s.read("c", Cursor(), 10)
    assert empty is not None
    assert (empty.generation, empty.tip, list(empty.entries), empty.resync) == (GENERATION, (0, 0), [], False)
    first = await claim(s, "a~1", "n1")
    await append(s, REPLY, REPLY)
    second = await claim(s, "b~1", "n2")
    await append(s, REPLY)
    assert first.meta is not None
    assert second.meta is not None
    e1, e2 = first.meta.epoch, second.meta.epoch
    places = [(e1, 1), (e1, 2), (e1, 3), (e2, 4), (e2, 5)]

    async def read(after: Cursor, limit: int = 10) -> tuple[list[tuple[int, int]], bool]:
        page = await s.read("c", after, limit)
        assert page is not None
        assert (page.generation, page.tip) == (GENERATION, (e2, 5))
        return [(e.epoch, e.seq) for e in page.entries], page.resync

    assert await read(Cursor()) == await read(Cursor(GENERATION, START)) == (places, False)
    assert await read(Cursor(), 2) == (places[:2], False)
    assert await read(Cursor(), 0) == ([], False)
    for count, (epoch, seq) in enumerate(places, start=1):
        assert await read(Cursor(GENERATION, Place(epoch, seq))) == (places[count:], False)
        assert await read(Cursor(place=Place(0, seq))) == (places[count:], False)
        assert await read(Cursor(place=Place(0, seq)), 1) == (places[count : count + 1], False)
    assert await read(Cursor(place=Place(0, 99))) == ([], False)
    for gone in (Place(e2, 3), Place(e1, 4), Place(e2, 6), Place(e1 - 1, 1), Place(e1, 0)):
        assert await read(Cursor(GENERATION, gone), 2) == (places[:2], True)
    assert await read(Cursor("other", Place(e1, 2))) == (places, True)
    assert await read(Cursor("other", START)) == (places, True)


async def check_read_finds_numbers_across_many_epochs(h: Harness) -> None:
    """A bare number names no epoch; every one of them is found."""
    s = await h.connect()
    await made(s)
    for i in range(12):
        await claim(s, f"n{i}~1", f"k{i}")
        await append(s, *[REPLY] * (i % 4))
    tip = (await head(s)).seq
    for seq in range(tip + 1):
        page = await s.read("c", Cursor(place=Place(0, seq)), 3)
        assert page is not None
        assert [e.seq for e in page.entries] == [n for n in range(seq + 1, seq + 4) if n <= tip]


async def check_inbox_goes_by_the_cursor(h: Harness) -> None:
    """Head and unread entries in one step."""
    s = await h.connect()
    assert await s.inbox("c") is None
    await owned(s)
    for name in ("m1", "m2"):
        await send(s, name)
    await take_in(s)
    await send(s, "m3")
    read = await s.inbox("c")
    assert read is not None
    assert read[0] == await head(s)
    assert [e.message_id for e in read[1]] == ["m3"]
    await answer(s, 2)
    assert (await head(s)).done == 2
