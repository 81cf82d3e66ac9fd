"""Heads, inboxes and ownership of conversations."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace

from convener.core.model import SEEN_WINDOW, ClaimRequest, InterruptReply, Meta, NewMessage, SendReply, StopReply
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

# -- create, erase, metadata -----------------------------------------------------------------------------------


async def check_create_makes_one_head(h: Harness) -> None:
    """The first creator's user and generation stay."""
    s = await h.connect()
    await s.index("u", "c")
    first = await s.create("c", "u", '{"a":"é"}', GENERATION)
    assert first.created
    m = first.meta
    assert m == Meta("u", GENERATION, m.created, m.created, '{"a":"é"}')
    again = await s.create("c", "other", "{}", "other")
    assert (again.created, again.meta) == (False, m)
    assert await s.head("c") == m


async def check_of_many_creators_one_creates(h: Harness) -> None:
    """Also when they come through several connections."""
    stores = [await h.connect() for _ in range(3)]
    await stores[0].index("u0", "c")
    made_by = await asyncio.gather(*(stores[i % 3].create("c", f"u{i}", "{}", f"g{i}") for i in range(30)))
    assert sum(c.created for c in made_by) == 1
    assert len({c.meta for c in made_by}) == 1


async def check_heads_come_in_order(h: Harness) -> None:
    """None for what does not exist."""
    s = await h.connect()
    for cid in ("c1", "c2"):
        await made(s, cid)
    found = await s.heads(["c2", "none", "c1", "c2"])
    assert list(found) == [await s.head("c2"), None, await s.head("c1"), await s.head("c2")]
    assert list(await s.heads([])) == []


async def check_metadata(h: Harness) -> None:
    """Replaced as a whole; nothing is made by it."""
    s = await h.connect()
    assert await s.set_metadata("c", "{}") is None
    before = await owned(s)
    after = await s.set_metadata("c", '{"k":[1,"😀"]}')
    assert after == replace(before, metadata='{"k":[1,"😀"]}', updated=after.updated if after else 0)
    assert await s.head("c") == after


async def check_erase(h: Harness) -> None:
    """Only what was stopped, or never started and never written to; then nothing of it is left."""
    s = await h.connect()
    await made(s)
    assert await s.erase("c") == "OK"
    assert await s.head("c") is None
    await owned(s)
    await send(s, "m1")
    await append(s, REPLY, state=b"x")
    assert await s.erase("c") == "REFUSED"
    assert (await s.stop("c", "b~1", "why", "a~1")).outcome == "STOPPED"
    assert await s.erase("c") == "OK"
    assert not {key for key in await h.keys() if key.startswith("c:")}
    assert (await s.head("c"), await s.state("c"), await s.inbox("c")) == (None, None, None)
    assert dict(await s.all_seen("c")) == {}
    assert await s.erase("c") == "OK"
    await made(s)
    await send(s, "m1")
    assert await s.erase("c") == "REFUSED"


# -- send, unsend ----------------------------------------------------------------------------------------------


async def check_send_numbers_and_remembers(h: Harness) -> None:
    """Positions are dense; an id is accepted once; both connections see the same."""
    a, b = await h.connect(), await h.connect()
    assert await send(a, "m1") == SendReply("NOT_FOUND")
    await made(a)
    assert await send(a, "m1") == SendReply("OK", 1, "", 0)
    epoch = (await claim(a, "a~1")).meta
    assert epoch is not None
    assert await send(b, "m2", data='{"text":"é 😀"}') == SendReply("OK", 2, "a~1", epoch.epoch)
    assert await send(b, "m1") == SendReply("DUP", 1, "a~1", epoch.epoch)
    read = await b.inbox("c")
    assert read is not None
    meta, entries = read
    assert meta == await head(a)
    assert [(e.position, e.message_id, e.kind, e.user, e.data) for e in entries] == [
        (1, "m1", "message", "u", '"hi"'),
        (2, "m2", "message", "u", '{"text":"é 😀"}'),
    ]
    assert list(await a.seen("c", ["m2", "none", "m1"])) == [2, None, 1]
    assert dict(await b.all_seen("c")) == {"m1": 1, "m2": 2}
    assert list(await a.seen("c", [])) == []


async def check_many_senders(h: Harness) -> None:
    """Every position once, and every id once, however many send at the same time."""
    stores = [await h.connect() for _ in range(3)]
    await made(stores[0])
    names = [f"m{i % 20}" for i in range(60)]
    replies = await asyncio.gather(*(send(stores[i % 3], name) for i, name in enumerate(names)))
    accepted = {name: r.position for name, r in zip(names, replies, strict=True) if r.outcome == "OK"}
    assert sorted(accepted.values()) == list(range(1, 21))
    assert all(r.outcome in {"OK", "DUP"} and r.position == accepted[n] for n, r in zip(names, replies, strict=True))


async def check_send_refuses_when_full_or_busy(h: Harness) -> None:
    """What counts is what is unanswered; refusals leave no trace."""
    s = await h.connect()
    await owned(s)
    assert (await send(s, "m1", max_pending=2, reject_busy=True)).outcome == "OK"
    assert (await send(s, "m2", reject_busy=True)).outcome == "BUSY"
    assert (await send(s, "m2", max_pending=2)).outcome == "OK"
    assert (await send(s, "m3", max_pending=2)).outcome == "FULL"
    assert (await send(s, "m2", max_pending=2, reject_busy=True)).outcome == "DUP"
    await take_in(s)
    assert (await send(s, "m3", max_pending=2)).outcome == "FULL"
    assert list(await s.seen("c", ["m3"])) == [None]
    await answer(s, 2)
    assert (await send(s, "m3", max_pending=2, reject_busy=True)).position == 3


async def check_the_window_of_remembered_ids(h: Harness) -> None:
    """The last 256 and everything unanswered."""
    s = await h.connect()
    await owned(s)
    count = SEEN_WINDOW + 40
    message = [NewMessage(f"m{i}", "u", "1") for i in range(1, count + 1)]
    await asyncio.gather(*(s.send("c", m, max_pending=1000) for m in message))
    await take_in(s)
    await answer(s, 10)
    assert sorted((await s.all_seen("c")).values()) == list(range(11, count + 1))
    await answer(s, count)
    assert sorted((await s.all_seen("c")).values()) == list(range(41, count + 1))


async def check_unsend(h: Harness) -> None:
    """Takes back what nobody read of what nobody owns, and leaves no position that nobody can settle."""
    s = await h.connect()
    assert await s.unsend("c", "m1", 1) == "REFUSED"
    await made(s)
    for name in ("m1", "m2", "m3", "m4"):
        await send(s, name)
    assert await s.unsend("c", "m1", 2) == "REFUSED"
    assert await s.unsend("c", "m3", 3) == "OK"
    assert await s.unsend("c", "m3", 3) == "REFUSED"
    assert await s.unsend("c", "m4", 4) == "OK"
    assert (await head(s)).position == 2
    assert dict(await s.all_seen("c")) == {"m1": 1, "m2": 2}
    assert await send(s, "m4") == SendReply("OK", 3, "", 0)
    read = await s.inbox("c")
    assert read is not None
    assert [(e.position, e.message_id) for e in read[1]] == [(1, "m1"), (2, "m2"), (3, "m4")]
    await claim(s, "a~1")
    assert await s.unsend("c", "m4", 3) == "REFUSED"
    await take_in(s)
    await answer(s, 3)
    m = await head(s)
    assert await s.release("c", "a~1", m.epoch, m.seq) == "OK"
    assert await s.unsend("c", "m4", 3) == "REFUSED"


# -- claim, resolve --------------------------------------------------------------------------------------------


async def check_claim(h: Harness) -> None:
    """A new epoch, an open entry that names the place before it, the unread entries."""
    s = await h.connect()
    assert (await claim(s, "a~1")).outcome == "NOT_FOUND"
    await made(s)
    await send(s, "m1")
    reply = await claim(s, "a~1", "n1", reason="wake")
    m = await head(s)
    read = await s.inbox("c")
    assert read is not None
    assert (reply.outcome, reply.meta, list(reply.inbox)) == ("OK", m, list(read[1]))
    assert (m.owner, m.nonce, m.seq, m.cursor, m.position) == ("a~1", "n1", 1, 0, 1)
    opened = reply.opened
    assert opened is not None
    assert (opened.epoch, opened.seq) == (m.epoch, 1)
    data = json.loads(opened.event)
    assert data["kind"] == "open"
    assert data["data"] == {"node": "a~1", "reason": "wake", "prev": [0, 0]}
    again = await claim(s, "a~1", "n1", owner="", epoch=0)
    assert (again.outcome, again.meta, again.opened) == ("OK", m, None)
    assert list(again.inbox) == list(read[1])
    moved = await claim(s, "b~1", owner="", epoch=0)
    assert (moved.outcome, moved.meta) == ("CONFLICT", m)
    second = await claim(s, "b~1", "n2", floor=m.epoch + 1_000_000)
    assert second.opened is not None
    assert second.opened.epoch == m.epoch + 1_000_001
    assert json.loads(second.opened.event)["data"]["prev"] == [m.epoch, 1]


async def check_of_many_claims_one_wins(h: Harness) -> None:
    """I2, I5: one owner, whatever the number of those who read the same head."""
    stores = [await h.connect() for _ in range(3)]
    await made(stores[0])
    requests = [ClaimRequest(f"n{i}~1", f"k{i}", "", 0, "start") for i in range(30)]
    replies = await asyncio.gather(*(stores[i % 3].claim("c", r) for i, r in enumerate(requests)))
    winners = [r for r in replies if r.outcome == "OK"]
    assert len(winners) == 1
    assert all(r.outcome == "CONFLICT" and r.meta == winners[0].meta for r in replies if r not in winners)
    assert (await head(stores[0])).seq == 1


async def check_a_late_claim_finds_another_conversation(h: Harness) -> None:
    """Deleted and made again, it has the owner and the epoch that it had at first, but another log."""
    s = await h.connect()
    before = await made(s)
    assert await s.erase("c") == "OK"
    after = (await s.create("c", "u", "{}", "another")).meta
    assert (after.owner, after.epoch) == (before.owner, before.epoch)
    late = await claim(s, "a~1", epoch=0, generation=before.generation)
    assert (late.outcome, late.meta) == ("CONFLICT", after)
    assert (await claim(s, "a~1", epoch=0, generation=after.generation)).outcome == "OK"


async def check_takeovers_count_strikes(h: Harness) -> None:
    """Of one open turn."""
    s = await h.connect()
    await owned(s)
    await send(s, "m1")
    await send(s, "m2")
    assert (await claim(s, "b~1", "n1", reason="takeover")).outcome == "OK"
    assert (await head(s)).strikes == 0
    await take_in(s)
    for i in (1, 2):
        await claim(s, f"n{i}~1", f"s{i}", reason="takeover")
        m = await head(s)
        assert (m.strikes, m.struck) == (i, 1)
    await claim(s, "n3~1", "s3", reason="handoff")
    assert (await head(s)).strikes == 2
    await answer(s, 1)
    await claim(s, "n4~1", "s4", reason="takeover")
    m = await head(s)
    assert (m.strikes, m.struck) == (1, 2)


async def check_resolve(h: Harness) -> None:
    """Settles a claim for good."""
    s = await h.connect()
    assert (await s.resolve("c", "a~1", "n1", 0)).outcome == "NOT_FOUND"
    await made(s)
    cancelled = await s.resolve("c", "a~1", "n1", 0)
    assert (cancelled.outcome, cancelled.meta) == ("CANCELLED", await head(s))
    assert (await claim(s, "a~1", "n1", epoch=0)).outcome == "CONFLICT"
    await send(s, "m1")
    await claim(s, "a~1", "n2")
    landed = await s.resolve("c", "a~1", "n2", 1)
    assert (landed.outcome, landed.meta, len(landed.inbox)) == ("OWNED", await head(s), 1)
    moved = await s.resolve("c", "b~1", "n3", 1)
    assert (moved.outcome, moved.meta) == ("MOVED", await head(s))


# -- release, disown, stop -------------------------------------------------------------------------------------


async def check_release(h: Harness) -> None:
    """Only by the owner, at the seq that it knows, with nothing unanswered (I13)."""
    s = await h.connect()
    assert await s.release("c", "a~1", 1, 1) == "FENCED"
    m = await owned(s)
    assert await s.release("c", "b~1", m.epoch, 1) == await s.release("c", "a~1", m.epoch - 1, 1) == "FENCED"
    await send(s, "m1")
    assert await s.release("c", "a~1", m.epoch, 1) == "PENDING"
    await take_in(s)
    await answer(s, 1)
    assert await s.release("c", "a~1", m.epoch, 1) == "PENDING"
    assert await s.release("c", "a~1", m.epoch, 3) == "OK"
    after = await head(s)
    assert (after.owner, after.nonce, after.epoch, after.seq) == ("", "", m.epoch, 3)
    assert await s.release("c", "a~1", m.epoch, 3) == "FENCED"


async def check_disown(h: Harness) -> None:
    """Clears a buried owner with nothing unanswered; of what nobody owns it raises the epoch."""
    s = await h.connect()
    assert await s.disown("c", "", 0) == "NOT_FOUND"
    await made(s)
    await send(s, "m1")
    assert await s.disown("c", "", 0) == "OK"
    assert (await head(s)).epoch == 1
    assert await s.disown("c", "", 0) == "CONFLICT"
    await claim(s, "a~1")
    m = await head(s)
    assert await s.disown("c", "b~1", m.epoch) == "CONFLICT"
    assert await s.disown("c", "a~1", m.epoch) == "PENDING"
    await take_in(s)
    await answer(s, 1)
    assert await s.disown("c", "a~1", m.epoch) == "OK"
    after = await head(s)
    assert (after.owner, after.nonce, after.epoch) == ("", "", m.epoch + 1)


async def check_stop_of_an_owned_conversation(h: Harness) -> None:
    """Asks the owner once; closes the door at once; nobody may claim; the owner finishes."""
    s = await h.connect()
    assert await s.stop("c", "b~1", "why", "") == StopReply("NOT_FOUND")
    m = await owned(s)
    await send(s, "m1")
    asked = StopReply("STOPPING", "a~1", "n", "u", 'a "reason" / é')
    assert await s.stop("c", "b~1", 'a "reason" / é', "") == asked
    assert await s.stop("c", "b~1", 'a "reason" / é', "") == asked
    assert await send(s, "m2") == SendReply("CLOSED")
    assert (await claim(s, "b~1")).outcome == "CLOSED"
    assert await s.resume("c") == "BUSY"
    read = await s.inbox("c")
    assert read is not None
    assert [(e.position, e.kind, json.loads(e.data)) for e in read[1]] == [
        (1, "message", "hi"),
        (2, "stop", 'a "reason" / é'),
    ]
    assert dict(await s.all_seen("c")) == {"m1": 1}
    end = event("stopped", "", 1, "{}")
    assert (await append(s, end, closing="stopped", cursor=1)).outcome == "PENDING"
    assert (await append(s, REPLY, end, closing="stopped", cursor=2)).outcome == "OK"
    after = await head(s)
    assert (after.status, after.owner, after.nonce, after.done, after.cursor) == ("stopped", "", "", 2, 2)
    assert (await s.stop("c", "b~1", "why", "")).outcome == "ALREADY"
    assert after.epoch == m.epoch


async def check_interrupts_are_numbered_intents(h: Harness) -> None:
    """Recorded while something is unanswered; for the turn that is meant; not a message, and remembered by nobody."""
    s = await h.connect()
    assert await s.interrupt("c", "") == InterruptReply("NOT_FOUND")
    m = await owned(s)
    assert await s.interrupt("c", "") == InterruptReply("IDLE")
    await send(s, "m1")
    assert await s.interrupt("c", "t1") == InterruptReply("OK", 2, "a~1", m.epoch)
    assert await s.interrupt("c", "") == InterruptReply("OK", 3, "a~1", m.epoch)
    read = await s.inbox("c")
    assert read is not None
    assert [(e.position, e.message_id, e.kind, json.loads(e.data)) for e in read[1]] == [
        (1, "m1", "message", "hi"),
        (2, "interrupt.2", "interrupt", "t1"),
        (3, "interrupt.3", "interrupt", ""),
    ]
    assert dict(await s.all_seen("c")) == {"m1": 1}
    assert (await append(s, REPLY, cursor=3, done=1)).outcome == "OK"
    assert await s.interrupt("c", "t1") == InterruptReply("STALE")
    assert (await s.interrupt("c", "")).outcome == "OK"
    await s.stop("c", "b~1", "why", "")
    assert await s.interrupt("c", "") == InterruptReply("CLOSED")


async def check_stop_of_what_nobody_owns(h: Harness) -> None:
    """Finished in one step: what was accepted enters the log, then `stopped`; only `resume` opens it again."""
    s = await h.connect()
    await made(s)
    await send(s, "m1", data='{"text":"é"}')
    reply = await s.stop("c", "b~1", 'a "reason" / é', "")
    assert reply == StopReply("STOPPED", "", "", "u", 'a "reason" / é')
    m = await head(s)
    assert (m.status, m.owner, m.seq, m.cursor, m.done, m.position) == ("stopped", "", 3, 1, 1, 1)
    assert (await claim(s, "a~1")).outcome == "CLOSED"
    assert await send(s, "m1") == SendReply("CLOSED")
    assert await s.resume("none") == "NOT_FOUND"
    assert await s.resume("c") == "OK"
    assert await s.resume("c") == "RUNNING"
    assert (await claim(s, "a~1")).outcome == "OK"
    assert (await head(s)).seq == 4


async def check_stop_of_a_buried_owner(h: Harness) -> None:
    """Takes the ownership away and finishes, also a stop that the owner was asked for; nobody else's."""
    s = await h.connect()
    m = await owned(s)
    await send(s, "m1")
    assert (await s.stop("c", "b~1", "one", "other~1")).outcome == "STOPPING"
    assert (await s.stop("c", "b~1", "two", "a~1")) == StopReply("STOPPED", "a~1", "n", "u", "two")
    after = await head(s)
    assert (after.status, after.owner, after.done, after.position) == ("stopped", "", 2, 2)
    assert after.epoch > m.epoch
    assert (await append(s, REPLY, owner="a~1", epoch=m.epoch)).outcome == "FENCED"
