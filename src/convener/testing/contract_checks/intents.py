"""Questions and answers, pieces of what is being written, kept interrupts, conversations that wait for `resume`."""

from __future__ import annotations

import asyncio
import json
from typing import Any, Literal

from convener.core.cursor import Cursor
from convener.core.model import (
    MAX_UNREAD,
    AppendRequest,
    ClaimRequest,
    Closing,
    InboxEntry,
    InterruptReply,
    NewMessage,
    SendReply,
)
from convener.core.wire import event
from convener.store.base import Store
from convener.testing.contract_checks.tools import (
    REPLY,
    answer,
    append,
    ask,
    claim,
    head,
    made,
    owned,
    reply,
    send,
    take_in,
    unread,
    waiting,
)
from convener.testing.harness import Harness

# -- questions and answers -------------------------------------------------------------------------------------


async def check_an_answer_closes_its_question(h: Harness) -> None:
    """One step: the entry in the inbox, its id remembered, the question gone, the head's count."""
    a, b = await h.connect(), await h.connect()
    assert dict(await a.asks("c")) == {}
    assert await reply(a, "t1.1", "r1") == SendReply("NOT_FOUND")
    m = await waiting(a, "t1.1", "t1.2")
    assert m.asks == 2
    assert dict(await b.asks("c")) == {"t1.1": '{"prompt":"é t1.1"}', "t1.2": '{"prompt":"é t1.2"}'}
    assert await reply(b, "t1.1", "r1", data='{"text":"é 😀"}') == SendReply("OK", 2, "a~1", m.epoch)
    after = await head(a)
    assert (after.position, after.asks, after.cursor, after.done, after.owner) == (2, 1, 1, 0, "a~1")
    assert set(await a.asks("c")) == {"t1.2"}
    data = '{"ask_id":"t1.1","data":{"text":"é 😀"}}'
    assert await unread(a) == [InboxEntry(2, "r1", "answer", "u", after.updated, data)]
    assert dict(await a.all_seen("c")) == {"m1": 1, "r1": 2}
    assert await reply(a, "t1.1", "r1") == await reply(b, "t1.2", "r1") == SendReply("DUP", 2, "a~1", m.epoch)
    assert await reply(a, "t1.1", "r2") == await reply(a, "t9.9", "r2") == SendReply("ASK_CLOSED")
    assert (await head(a)).position == 2
    assert list(await a.seen("c", ["r2"])) == [None]


async def check_of_many_answers_one_counts(h: Harness) -> None:
    """However many nodes take answers at once; each id gets its own answer however often it is asked again."""
    stores = [await h.connect() for _ in range(3)]
    m = await waiting(stores[0], "t1.1")
    replies = await asyncio.gather(*(reply(stores[i % 3], "t1.1", f"r{i}") for i in range(30)))
    assert sorted(r.outcome for r in replies) == ["ASK_CLOSED"] * 29 + ["OK"]
    winner = next(i for i, r in enumerate(replies) if r.outcome == "OK")
    again = await asyncio.gather(*(reply(stores[(i + 1) % 3], "t1.1", f"r{i}") for i in range(30)))
    assert again[winner] == SendReply("DUP", 2, "a~1", m.epoch)
    assert [r.outcome for i, r in enumerate(again) if i != winner] == ["ASK_CLOSED"] * 29
    assert [e.message_id for e in await unread(stores[1])] == [f"r{winner}"]
    assert (await head(stores[2])).asks == 0


async def check_one_answer_that_many_repeat_is_taken_once(h: Harness) -> None:
    """A client may send it to several nodes under one id."""
    stores = [await h.connect() for _ in range(3)]
    await waiting(stores[0], "t1.1")
    replies = await asyncio.gather(*(reply(stores[i % 3], "t1.1", "r") for i in range(15)))
    assert sorted(r.outcome for r in replies) == ["DUP"] * 14 + ["OK"]
    assert {r.position for r in replies} == {2}
    assert len(await unread(stores[1])) == 1


async def check_answers_are_bounded_but_not_by_the_queue(h: Harness) -> None:
    """Exempt from the limit on messages; a bound of their own keeps the inbox finite."""
    s = await h.connect()
    await waiting(s, "t1.1")
    messages = [NewMessage(f"n{i}", "u", "1") for i in range(MAX_UNREAD)]
    await asyncio.gather(*(s.send("c", m, max_pending=2 * MAX_UNREAD) for m in messages))
    assert (await send(s, "more", max_pending=9)).outcome == "FULL"
    assert await reply(s, "t1.1", "r1") == SendReply("FULL")
    assert (await head(s)).asks == 1
    await append(s, cursor=2)
    assert (await reply(s, "t1.1", "r1")).outcome == "OK"


async def check_questions_close_with_their_turn(h: Harness) -> None:
    """The batch that ends the turn closes them; one may open those of the next. A new attempt keeps them."""
    s = await h.connect()
    await waiting(s, "t1.1", "t1.2")
    await append(s, event("turn_started", "t1", 1, "{}"), begins_turn=True)
    assert (await head(s)).asks == len(await s.asks("c")) == 2
    await ask(s, "t1.2", "t1.3")
    assert (await head(s)).asks == len(await s.asks("c")) == 3
    await send(s, "m2")
    await take_in(s)
    ended = event("turn_done", "t1", 1, "{}")
    await append(s, ended, done=1, ends_turn=True, asks=(("t2.1", "{}"),))
    assert ((await head(s)).asks, dict(await s.asks("c"))) == (1, {"t2.1": "{}"})
    assert await reply(s, "t1.1", "r1") == SendReply("ASK_CLOSED")
    assert (await reply(s, "t2.1", "r1")).outcome == "OK"
    await answer(s, 2)
    assert ((await head(s)).asks, dict(await s.asks("c"))) == (0, {})


async def check_a_refused_batch_opens_and_closes_nothing(h: Harness) -> None:
    """Fenced, too early, too late, or not to be closed."""
    s = await h.connect()
    m = await waiting(s, "t1.1")
    wrong: list[dict[str, Any]] = [{"epoch": m.epoch - 1}, {"expected": m.seq - 1}, {"closing": "stopped"}]
    for changes in wrong:
        refused = await append(s, REPLY, asks=(("t1.2", "{}"),), ends_turn=True, halted=9, **changes)
        assert refused.outcome in ("FENCED", "GAP", "PENDING")
    assert (await head(s), set(await s.asks("c"))) == (m, {"t1.1"})


async def check_many_questions_in_one_batch(h: Harness) -> None:
    """All or nothing, however many."""
    s = await h.connect()
    m = await waiting(s, "t1.1")
    many = tuple((f"t1.{i}", f'{{"n":{i}}}') for i in range(2, 6_000))
    assert (await append(s, REPLY, asks=many)).outcome == "OK"
    assert dict(await s.asks("c")) == {"t1.1": '{"prompt":"é t1.1"}', **dict(many)}
    after = await head(s)
    assert (after.asks, after.seq) == (5_999, m.seq + 1)


async def check_who_waits_for_a_person_may_leave(h: Harness) -> None:
    """When everything is taken in; also what disowns a buried owner. An answer is taken without an owner, too."""
    s = await h.connect()
    m = await waiting(s, "t1.1", "t1.2")
    await send(s, "m2")
    assert await s.release("c", "a~1", m.epoch, m.seq) == await s.disown("c", "a~1", m.epoch) == "PENDING"
    await take_in(s)
    await reply(s, "t1.1", "r1")
    m = await head(s)
    assert await s.release("c", "a~1", m.epoch, m.seq) == await s.disown("c", "a~1", m.epoch) == "PENDING"
    await take_in(s)
    m = await head(s)
    assert await s.release("c", "a~1", m.epoch, m.seq - 1) == "PENDING"
    assert await s.release("c", "a~1", m.epoch, m.seq) == "OK"
    after = await head(s)
    assert (after.owner, after.nonce, after.asks, after.done, after.position) == ("", "", 1, 0, 3)
    assert await reply(s, "t1.2", "r2") == SendReply("OK", 4, "", m.epoch)
    assert (await claim(s, "b~1", reason="answer")).outcome == "OK"
    await take_in(s)
    m = await head(s)
    assert await s.release("c", "b~1", m.epoch, m.seq) == "PENDING"
    await answer(s, 4)
    await ask(s, "t9.1")
    m = await head(s)
    assert await s.disown("c", "b~1", m.epoch) == "OK"
    assert ((await head(s)).owner, (await head(s)).asks) == ("", 1)


async def check_nobody_leaves_a_stop_behind(h: Harness) -> None:
    """I15: it is finished first, whoever was waited for."""
    s = await h.connect()
    m = await waiting(s, "t1.1")
    await s.stop("c", "b~1", "why", "")
    await append(s, cursor=2)
    assert await s.release("c", "a~1", m.epoch, m.seq) == await s.disown("c", "a~1", m.epoch) == "PENDING"
    assert (await s.stop("c", "b~1", "why", "a~1")).outcome == "STOPPED"


async def check_waiting_for_a_person_is_no_strike(h: Harness) -> None:
    """Of a turn that does nothing, no takeover is counted."""
    s = await h.connect()
    await waiting(s, "t1.1")
    for i in (1, 2, 3):
        await claim(s, f"n{i}~1", f"s{i}", reason="takeover")
    assert ((await head(s)).strikes, (await head(s)).struck) == (0, 0)
    await reply(s, "t1.1", "r1")
    await claim(s, "n4~1", "s4", reason="takeover")
    assert ((await head(s)).strikes, (await head(s)).struck) == (0, 0), "nobody has taken the answer in"
    await take_in(s)
    await claim(s, "n5~1", "s5", reason="takeover")
    assert ((await head(s)).strikes, (await head(s)).struck) == (1, 1)


async def check_a_turn_that_does_more_than_wait_is_struck(h: Harness) -> None:
    """What it does besides may be what takes nodes down."""
    s = await h.connect()
    await waiting(s, "t1.1")
    await claim(s, "n1~1", "s1", reason="takeover", acted=True)
    assert ((await head(s)).strikes, (await head(s)).struck) == (1, 1)
    await reply(s, "t1.1", "r1")
    await claim(s, "n2~1", "s2", reason="takeover", acted=True)
    await claim(s, "n3~1", "s3", reason="restart", acted=True)
    assert (await head(s)).strikes == 2


async def check_a_stop_closes_questions_and_keeps_answers(h: Harness) -> None:
    """Whoever finishes it: what was acknowledged is in the log (I8), nothing can be answered any more."""
    s = await h.connect()
    await waiting(s, "t1.1", "t1.2", "x.1")
    for ask_id, data in (("t1.1", '{"text":"é \\"x\\" 😀"}'), ("x.1", "1.50")):
        assert (await reply(s, ask_id, f"r.{ask_id}", data=data)).outcome == "OK"
    await s.interrupt("c", "")
    assert (await s.answer("c", "t1.2", NewMessage("r3", "u", '"plain"', "answer"))).outcome == "OK"
    await ask(s, "t1.4")
    assert (await s.stop("c", "b~1", "why", "a~1")).outcome == "STOPPED"
    m = await head(s)
    assert (m.asks, dict(await s.asks("c")), m.cursor, m.done, m.position) == (0, {}, 5, 5, 5)
    page = await s.read("c", Cursor(), 100)
    assert page is not None
    answers = [json.loads(e.event) for e in page.entries if '"kind":"answer"' in e.event]
    assert [(e["turn"], e["data"]) for e in answers] == [
        ("t1", {"message_id": "r.t1.1", "user_id": "u", "ask_id": "t1.1", "data": {"text": 'é "x" 😀'}}),
        ("", {"message_id": "r.x.1", "user_id": "u", "ask_id": "x.1", "data": 1.5}),
        ("", {"message_id": "r3", "user_id": "u", "data": "plain"}),
    ]
    assert '"data":1.50}' in page.entries[-3].event
    assert await reply(s, "t1.4", "r4") == SendReply("CLOSED")
    await s.resume("c")
    assert await reply(s, "t1.4", "r4") == SendReply("ASK_CLOSED")


async def check_an_owner_that_closes_leaves_no_question(h: Harness) -> None:
    """Also if it does not say that a turn ends."""
    s = await h.connect()
    m = await waiting(s, "t1.1")
    await s.add_pieces("c", "a~1", m.epoch, 1, ["1"])
    await s.stop("c", "b~1", "why", "")
    assert (await append(s, event("stopped", "", 1, "{}"), closing="stopped", cursor=2)).outcome == "OK"
    assert ((await head(s)).asks, dict(await s.asks("c")), list(await s.pieces("c"))) == (0, {}, [])


async def check_only_messages_are_taken_back(h: Harness) -> None:
    """With an answer its question is closed already, with an alarm it is gone."""
    s = await h.connect()
    m = await waiting(s, "t1.1")
    await s.set_alarm("c", "alarm", "1")
    assert await s.release("c", "a~1", m.epoch, m.seq) == "OK"
    assert (await reply(s, "t1.1", "r1")).position == 2
    assert (await s.fire("c", "alarm", max_pending=9)).position == 3
    assert (await send(s, "m4")).position == 4
    assert (await s.send("c", NewMessage("m5", "u", "1", "interrupting"), max_pending=9)).position == 5
    for name, position in (("r1", 2), ("alarm", 3)):
        assert await s.unsend("c", name, position) == "REFUSED"
    for name, position in (("m5", 5), ("m4", 4)):
        assert await s.unsend("c", name, position) == "OK"
    assert [(e.position, e.kind) for e in await unread(s)] == [(2, "answer"), (3, "alarm")]
    assert (await head(s)).position == 3


# -- pieces ----------------------------------------------------------------------------------------------------


async def check_pieces_come_from_the_owner_of_an_open_turn(h: Harness) -> None:
    """Fenced by owner and epoch; stale when the turn has ended; in the order in which they were written."""
    a, b = await h.connect(), await h.connect()
    assert list(await a.pieces("c")) == []
    assert await a.add_pieces("c", "", 0, 1, ["1"]) == "FENCED"
    m = await owned(a)
    for name in ("m1", "m2"):
        await send(a, name)
    await take_in(a)
    before = await head(a)
    assert await a.add_pieces("c", "a~1", m.epoch, 1, ['{"data":"é 😀"}', "2"]) == "OK"
    assert await a.add_pieces("c", "a~1", m.epoch, 1, ["3"]) == "OK"
    assert await a.add_pieces("c", "a~1", m.epoch, 1, []) == "OK"
    assert await b.add_pieces("c", "b~1", m.epoch, 1, ["x"]) == "FENCED"
    assert await b.add_pieces("c", "a~1", m.epoch - 1, 1, ["x"]) == "FENCED"
    assert list(await b.pieces("c")) == ['{"data":"é 😀"}', "2", "3"]
    assert await head(a) == before
    await answer(a, 1)
    assert await a.add_pieces("c", "a~1", m.epoch, 1, ["late"]) == "STALE"
    assert await a.add_pieces("c", "a~1", m.epoch, 2, ["next"]) == "OK"
    assert list(await b.pieces("c")) == ["next"]
    await answer(a, 2)
    m = await head(a)
    await a.release("c", "a~1", m.epoch, m.seq)
    assert await a.add_pieces("c", "a~1", m.epoch, 3, ["late"]) == "FENCED"
    assert not [key for key in await h.keys() if key.endswith(":tail")]


async def _streamed(s: Store, cid: str) -> None:
    """A turn that has written a piece."""
    m = await owned(s, cid=cid)
    await send(s, "m1", cid)
    await take_in(s, cid)
    assert await s.add_pieces(cid, "a~1", m.epoch, 1, ["1"]) == "OK"


async def check_pieces_end_with_their_attempt(h: Harness) -> None:
    """What begins a turn, what ends it, a stop and the erasure clear them; nothing else does."""
    s = await h.connect()
    for cid in ("begins", "ends", "stopped", "erased"):
        await _streamed(s, cid)
        await append(s, REPLY, cid=cid, state=b"x")
        await send(s, "m2", cid)
        await claim(s, "b~1", "n2", cid=cid, reason="takeover")
        assert list(await s.pieces(cid)) == ["1"]
    await append(s, event("turn_started", "t1", 1, "{}"), cid="begins", begins_turn=True)
    await answer(s, 1, "ends")
    await s.stop("stopped", "c~1", "why", "b~1")
    await s.stop("erased", "c~1", "why", "b~1")
    await s.erase("erased")
    for cid in ("begins", "ends", "stopped", "erased"):
        assert list(await s.pieces(cid)) == []


async def check_many_and_large_pieces(h: Harness) -> None:
    """Whole, and in order."""
    s = await h.connect()
    await _streamed(s, "c")
    epoch = (await head(s)).epoch
    many = [f'{{"offset":{i}}}' for i in range(3_000)]
    large = json.dumps("é😀" * 50_000, ensure_ascii=False)
    assert await s.add_pieces("c", "a~1", epoch, 1, many) == "OK"
    assert await s.add_pieces("c", "a~1", epoch, 1, [large]) == "OK"
    assert list(await s.pieces("c")) == ["1", *many, large]
    await answer(s, 1)


# -- interrupts, failed, held ----------------------------------------------------------------------------------


async def check_what_is_to_be_interrupted_is_kept(h: Harness) -> None:
    """In the head, until a later one takes its place: whoever takes over obeys."""
    s = await h.connect()
    await owned(s)
    assert (await head(s)).halted == 0
    await append(s, halted=7)
    await append(s, REPLY, halted=3)
    await claim(s, "b~1", "n2", reason="takeover")
    assert (await head(s)).halted == 7
    await append(s, halted=8)
    assert (await head(s)).halted == 8


async def check_an_interrupting_message_keeps_its_kind(h: Harness) -> None:
    """The owner has to see that it ends the turns before it; for the rest it is a message."""
    s = await h.connect()
    await made(s)
    message = NewMessage("m1", "u", "1", "interrupting")
    assert (await s.send("c", message, max_pending=9)).outcome == "OK"
    assert (await s.send("c", message, max_pending=9)).outcome == "DUP"
    assert [(e.kind, e.message_id) for e in await unread(s)] == [("interrupting", "m1")]
    await s.stop("c", "b~1", "why", "")
    page = await s.read("c", Cursor(), 10)
    assert page is not None
    assert [json.loads(e.event)["kind"] for e in page.entries] == ["open", "input", "stopped"]


async def _parked(s: Store, cid: str, closing: Closing) -> None:
    """One question open, one message unread, one alarm set."""
    await waiting(s, "t1.1", cid=cid)
    await send(s, "m2", cid)
    await s.set_alarm(cid, "alarm", "1")
    reply_ = await append(s, event("x", "t1", 1, "1"), cid=cid, closing=closing)
    assert reply_.outcome == "OK"


async def check_parked_conversations(h: Harness) -> None:
    """`failed` and `held`: no owner, nothing accepted, nothing started, nothing lost, until `resume`."""
    s = await h.connect()
    parked: list[tuple[Closing, Literal["FAILED", "HELD"]]] = [("failed", "FAILED"), ("held", "HELD")]
    for closing, refused in parked:
        await _parked(s, closing, closing)
        m = await head(s, closing)
        assert (m.owner, m.nonce, m.status, m.cursor, m.done, m.position, m.asks) == ("", "", closing, 1, 0, 2, 1)
        assert await send(s, "m3", closing) == await send(s, "m1", closing) == SendReply(refused)
        assert await reply(s, "t1.1", "r1", closing) == SendReply(refused)
        assert await s.fire(closing, "alarm", max_pending=9) == SendReply(refused)
        assert (await s.interrupt(closing, "")) == InterruptReply(refused)
        assert await s.set_alarm(closing, "second", "2") == "OK"
        assert (await claim(s, "b~1", cid=closing, reason="takeover")).outcome == "CLOSED"
        assert await s.add_pieces(closing, "a~1", m.epoch, 1, ["1"]) == "FENCED"
        assert await s.erase(closing) == "REFUSED"
        late = AppendRequest("a~1", m.epoch, m.seq, "b", 1, 0, 0, (REPLY,))
        assert (await s.append(closing, late)).outcome == "FENCED"
        assert await head(s, closing) == m
        assert await s.resume(closing) == "OK"
        # What was refused does not come true, though its sender read this very epoch.
        assert (await claim(s, "b~1", cid=closing, epoch=m.epoch)).outcome == "CONFLICT"
        assert await s.resume(closing) == "RUNNING"
        assert (await reply(s, "t1.1", "r1", closing)).outcome == "OK"
        assert (await s.fire(closing, "alarm", max_pending=9)).outcome == "OK"
        opened = await claim(s, "b~1", "n2", closing, reason="resume")
        assert [(e.position, e.kind) for e in opened.inbox] == [(2, "message"), (3, "answer"), (4, "alarm")]


async def check_resume_counts_takeovers_anew(h: Harness) -> None:
    """Three times in a row was too often; after `resume` the count begins again."""
    s = await h.connect()
    await owned(s)
    await send(s, "m1")
    await take_in(s)
    for i in (1, 2, 3):
        await claim(s, f"n{i}~1", f"s{i}", reason="takeover")
    assert (await head(s)).strikes == 3
    await append(s, closing="failed")
    assert (await s.resume("c"), (await head(s)).strikes) == ("OK", 0)
    await claim(s, "n4~1", "s4", reason="resume")
    await claim(s, "n5~1", "s5", reason="takeover")
    assert (await head(s)).strikes == 1


async def check_a_parked_conversation_is_stopped_at_once(h: Harness) -> None:
    """Nobody owns it: what was accepted enters the log, and it can be erased."""
    s = await h.connect()
    for closing in ("failed", "held"):
        await _parked(s, closing, closing)
        assert (await s.stop(closing, "b~1", "why", "")).outcome == "STOPPED"
        m = await head(s, closing)
        assert (m.status, m.asks, m.done, m.position) == ("stopped", 0, 2, 2)
        assert await send(s, "m3", closing) == SendReply("CLOSED")
        assert await s.erase(closing) == "OK"
        assert (dict(await s.asks(closing)), dict(await s.alarms(closing))) == ({}, {})
    assert not [key for key in await h.keys() if key.startswith("c:")]


async def check_giving_up_does_not_undo_a_stop(h: Harness) -> None:
    """I15: whoever asked for the stop comes first, and of two that close one does."""
    s = await h.connect()
    await owned(s)
    await send(s, "m1")
    await take_in(s)
    await s.stop("c", "b~1", "why", "")
    before = await head(s)
    for closing in ("failed", "held"):
        refused = await append(s, REPLY, closing=closing, ends_turn=True, done=1, state=b"x")
        assert refused.outcome == "PENDING"
    assert (await head(s), await s.state("c")) == (before, None)
    end = event("stopped", "", 1, "{}")
    assert (await append(s, end, closing="stopped", cursor=2)).outcome == "OK"
    assert (await s.claim("c", ClaimRequest("b~1", "n2", "", before.epoch, "takeover"))).outcome == "CLOSED"
