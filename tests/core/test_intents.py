"""Each guard and each effect of questions and answers, alarms, pieces, interrupts that are kept, and conversations
that wait for `resume`.

Plain functions without arguments: `test_guards` runs them again, against transitions with a guard cut out.
"""

from __future__ import annotations

import json
from typing import Literal

from convener.core import conversation, intents
from convener.core.model import (
    MAX_UNREAD,
    Closing,
    Conversation,
    InboxEntry,
    InterruptReply,
    NewMessage,
    SendReply,
)
from convener.core.wire import event
from tests.core.world import World, owned

NOBODY = Conversation()


def waiting(*ask_ids: str) -> World:
    """A turn that waits for the answers to questions; `a~1` owns it."""
    world = owned("a~1", messages=1)
    world.ask(*(ask_ids or ("t1.1",)))
    return world


def parked(closing: Closing) -> World:
    """Nobody owns it until somebody says `resume`: one message open, one unread."""
    world = owned("a~1", messages=1)
    world.send("m2")
    assert world.park(closing).outcome == "OK"
    return world


def kinds(world: World) -> list[str]:
    return [json.loads(e.event)["kind"] for e in world.log]


# -- questions ---------------------------------------------------------------------------------------------------


def test_an_answer_is_a_numbered_entry_that_closes_its_question() -> None:
    world = waiting("t1.1", "t1.2")
    assert (world.head.asks, world.asks) == (2, {"t1.1": '{"of":"t1.1"}', "t1.2": '{"of":"t1.2"}'})
    world.now = 3_000
    assert world.reply("t1.1", "r1") == SendReply("OK", 2, "a~1", world.head.epoch)
    assert world.inbox == [InboxEntry(2, "r1", "answer", "u", 3_000, '{"ask_id":"t1.1","data":"yes"}')]
    assert (world.head.position, world.head.asks, world.head.updated) == (2, 1, 3_000)
    assert (set(world.asks), world.seen["r1"]) == ({"t1.2"}, 2)
    published = json.loads(world.published[-1])
    assert (published["kind"], published["data"]) == ("answer", {"ask_id": "t1.1", "data": "yes"})
    world.take_in()
    assert world.violations() == []


def test_the_first_answer_counts() -> None:
    world = waiting()
    assert world.reply("t1.1", "r1").outcome == "OK"
    assert world.reply("t1.1", "r2") == SendReply("ASK_CLOSED")
    assert world.reply("t9.1", "r3") == SendReply("ASK_CLOSED")
    assert (len(world.inbox), "r2" in world.seen) == (1, False)


def test_an_answer_again_gives_the_same_position() -> None:
    world = waiting("t1.1", "t1.2")
    world.reply("t1.1", "r1")
    # Also under another question: it is the id that was accepted.
    for ask_id in ("t1.1", "t1.2"):
        assert world.reply(ask_id, "r1") == SendReply("DUP", 2, "a~1", world.head.epoch)
    assert (world.head.asks, len(world.inbox)) == (1, 1)


def test_an_answer_to_nothing() -> None:
    message = NewMessage("r1", "u", "1", "answer")
    assert intents.answer(NOBODY, "t1.1", message, 1) == (SendReply("NOT_FOUND"), ())
    world = waiting()
    world.stop()
    assert world.reply("t1.1") == SendReply("CLOSED")
    world.stop(buried="a~1")
    assert world.reply("t1.1") == SendReply("CLOSED")


def test_a_full_queue_does_not_keep_a_question_from_being_answered() -> None:
    world = waiting()
    for i in range(2, 12):
        world.send(f"m{i}", max_pending=11)
    assert world.send("m99", max_pending=11).outcome == "FULL"
    assert world.reply("t1.1").outcome == "OK"


def test_unread_answers_are_bounded_like_other_intents() -> None:
    world = waiting()
    for i in range(MAX_UNREAD):
        world.send(f"n{i}", max_pending=2 * MAX_UNREAD)
    assert world.reply("t1.1") == SendReply("FULL")
    assert (world.head.asks, set(world.asks)) == (1, {"t1.1"})
    world.append(cursor=2)
    assert world.reply("t1.1").outcome == "OK"


def test_questions_end_with_their_turn() -> None:
    world = waiting("t1.1", "t1.2")
    world.reply("t1.1", "r1")
    world.take_in()
    world.answer(1)
    assert (world.head.asks, world.asks) == (0, {})
    assert world.reply("t1.2", "r2") == SendReply("ASK_CLOSED")
    assert world.violations() == []


def test_one_batch_may_end_a_turn_and_open_questions_of_the_next() -> None:
    world = waiting()
    world.append(asks=(("t2.1", "{}"), ("t2.2", "{}")), ends_turn=True)
    assert (world.head.asks, set(world.asks)) == (2, {"t2.1", "t2.2"})


def test_a_question_that_is_opened_again_counts_once() -> None:
    world = waiting()
    world.append(asks=(("t1.1", "{}"), ("t1.2", "{}")))
    assert (world.head.asks, set(world.asks)) == (2, {"t1.1", "t1.2"})


def test_a_new_attempt_keeps_its_questions() -> None:
    world = waiting()
    world.append(event("turn_started", "t1", 1, "{}"), begins_turn=True)
    assert (world.head.asks, set(world.asks)) == (1, {"t1.1"})


def test_who_waits_for_a_person_may_leave() -> None:
    world = waiting()
    epoch = world.head.epoch
    assert world.release() == "OK"
    assert (world.head.owner, world.head.asks, world.head.done, world.head.cursor) == ("", 1, 0, 1)
    assert json.loads(world.published[-1]) == {"t": "status", "epoch": epoch, "status": "waiting"}
    assert world.violations() == []
    assert world.reply("t1.1") == SendReply("OK", 2, "", epoch)
    assert world.violations(queued=True) == []
    assert world.claim("b~1", reason="answer").outcome == "OK"
    world.take_in()
    world.answer(1)
    world.append(done=2)
    assert world.release() == "OK"
    assert world.violations() == []


def test_who_waits_for_a_person_may_not_leave_before_all_is_taken_in() -> None:
    world = waiting("t1.1", "t1.2")
    world.reply("t1.1")
    assert world.release() == "PENDING"
    world.take_in()
    assert world.release() == "OK"
    world = waiting()
    world.send("m2")
    assert world.release() == "PENDING"
    world.take_in()
    assert world.release() == "OK"
    assert world.violations() == []


def test_nobody_leaves_when_the_last_answer_has_come() -> None:
    world = waiting()
    world.reply("t1.1")
    world.take_in()
    assert world.release() == "PENDING"


def test_nobody_leaves_a_stop_behind_to_wait_for_a_person() -> None:
    world = waiting()
    world.stop()
    world.append(cursor=2)  # a careless owner
    assert world.release() == disown(world, "a~1") == "PENDING"
    assert world.head.owner == "a~1"


def disown(world: World, owner: str) -> str:
    return world.apply(conversation.disown(world.read(), owner, world.head.epoch))


def test_disown_of_an_owner_that_waited() -> None:
    world = waiting()
    world.send("m2")
    assert disown(world, "a~1") == "PENDING"
    world.take_in()
    epoch = world.head.epoch
    assert disown(world, "a~1") == "OK"
    assert json.loads(world.published[-1]) == {"t": "status", "epoch": epoch, "status": "waiting"}
    said = len(world.published)
    assert disown(world, "") == "OK"
    assert (world.head.asks, len(world.published)) == (1, said)


def test_a_takeover_while_a_person_is_waited_for_is_no_strike() -> None:
    world = waiting()
    world.claim("b~1", "n2", reason="takeover")
    assert (world.head.strikes, world.head.struck) == (0, 0)
    # Nor while the answer is unread: whoever went down meanwhile did not go on with the turn.
    world.reply("t1.1")
    world.claim("c~1", "n3", reason="takeover")
    assert (world.head.strikes, world.head.struck) == (0, 0)
    world.take_in()
    world.claim("d~1", "n4", reason="takeover")
    assert (world.head.strikes, world.head.struck) == (1, 1)


def test_a_takeover_of_a_turn_that_did_more_than_wait_is_a_strike() -> None:
    world = waiting("t1.1", "t1.2")
    world.claim("b~1", "n2", reason="takeover", acted=True)
    assert (world.head.strikes, world.head.struck) == (1, 1)
    world.reply("t1.1")
    world.claim("c~1", "n3", reason="takeover", acted=True)
    assert world.head.strikes == 2
    world.claim("d~1", "n4", reason="restart", acted=True)
    assert world.head.strikes == 2
    world.reply("t1.2")
    world.take_in()
    world.answer(world.head.position)
    world.claim("e~1", "n5", reason="takeover", acted=True)
    assert world.head.strikes == 2, "no turn is open"


def test_a_stop_closes_questions_and_keeps_the_answers() -> None:
    world = waiting("t1.1", "t1.2")
    world.append(event("x", "t1", 1, "1"))
    world.stream("p")
    world.reply("t1.1", "r1")
    world.press()
    world.stop(buried="a~1")
    assert (world.head.asks, world.asks, world.pieces, world.inbox) == (0, {}, [], [])
    assert kinds(world)[-3:] == ["open", "answer", "stopped"]
    answered = json.loads(world.log[-2].event)
    assert answered["turn"] == "t1"
    assert answered["data"] == {"message_id": "r1", "user_id": "u", "ask_id": "t1.1", "data": "yes"}
    assert world.violations() == []


def test_an_owner_that_closes_leaves_no_question_and_no_piece() -> None:
    world = waiting()
    world.stream("p")
    world.stop()
    assert world.append(event("stopped", "", 1, "{}"), closing="stopped", cursor=2).outcome == "OK"
    assert (world.head.asks, world.asks, world.pieces) == (0, {}, [])
    world.resume()
    assert world.reply("t1.1") == SendReply("ASK_CLOSED")


def test_a_lost_head_is_rebuilt_with_its_questions() -> None:
    world = waiting("t1.1", "t1.2")
    world.meta = None
    assert world.claim("b~1", user="u", generation="g").outcome == "OK"
    assert world.head.asks == 2


# -- unsend ------------------------------------------------------------------------------------------------------


def test_only_messages_are_taken_back() -> None:
    """With an answer its question is closed already, with an alarm it is gone: nothing would bring them again."""
    world = waiting()
    world.set_alarm("a1")
    world.release()
    world.reply("t1.1", "r1")
    world.fire("a1")
    for kind, message_id in (("message", "m2"), ("interrupting", "m3")):
        message = NewMessage(message_id, "u", "1", kind)  # type: ignore[arg-type]
        world.apply(conversation.send(world.read(), message, 9, False, 1))
    assert [e.kind for e in world.inbox] == ["answer", "alarm", "message", "interrupting"]
    outcomes = [
        world.apply(conversation.unsend(world.read(e.message_id), e.message_id, e.position)) for e in list(world.inbox)
    ]
    assert outcomes == ["REFUSED", "REFUSED", "OK", "OK"]
    assert [e.kind for e in world.inbox] == ["answer", "alarm"]
    assert world.violations(queued=True) == []


# -- interrupts that are kept ------------------------------------------------------------------------------------


def test_what_is_to_be_interrupted_is_kept_in_the_head() -> None:
    world = owned("a~1", messages=2)
    world.append(halted=1)
    assert world.head.halted == 1
    world.append(halted=0)
    assert world.head.halted == 1
    world.claim("b~1", "n2", reason="takeover")
    assert world.head.halted == 1
    world.append(halted=2)
    assert world.head.halted == 2


# -- failed, held ------------------------------------------------------------------------------------------------


def test_a_parked_conversation_has_no_owner_and_takes_nothing() -> None:
    refusals: list[tuple[Closing, Literal["FAILED", "HELD"]]] = [("failed", "FAILED"), ("held", "HELD")]
    for closing, refused in refusals:
        world = parked(closing)
        m = world.head
        assert (m.owner, m.nonce, m.status, m.done, m.cursor, m.position) == ("", "", closing, 0, 1, 2)
        assert len(world.inbox) == 1
        assert world.send("m3") == world.send("m1") == SendReply(refused)
        assert world.reply("t1.1") == SendReply(refused)
        assert world.press() == InterruptReply(refused)
        assert world.set_alarm("a1") == "OK"
        assert world.fire("a1") == SendReply(refused)
        assert world.alarms == {"a1": "1"}
        assert world.claim("b~1").outcome == "CLOSED"
        assert world.apply(conversation.erase(world.read())) == "REFUSED"
        assert world.violations() == []


def test_resume_opens_a_parked_conversation() -> None:
    for closing in ("failed", "held"):
        world = parked(closing)
        world.now = 9_000
        epoch = world.head.epoch
        assert world.resume() == "OK"
        assert (world.head.status, world.head.updated, world.head.position) == ("running", 9_000, 2)
        assert json.loads(world.published[-1]) == {"t": "status", "epoch": epoch, "status": "hibernated"}
        assert world.violations(queued=True) == []
        assert world.claim("b~1", reason="resume").outcome == "OK"
        world.take_in()
        world.answer(1)
        world.answer(2)
        assert world.release() == "OK"
        assert world.violations() == []


def test_a_claim_that_was_refused_does_not_come_true_after_resume() -> None:
    """Who made it has given up; a copy of it may still be on its way."""
    for closing in ("failed", "held", "stopped"):
        world = owned("a~1", messages=1)
        if closing == "stopped":
            world.stop()
            world.append(event("stopped", "", 1, "{}"), closing="stopped", cursor=2)
        else:
            world.park(closing)
        epoch = world.head.epoch
        assert world.claim("b~1", epoch=epoch).outcome == "CLOSED"
        assert world.resume() == "OK"
        assert world.head.epoch == epoch + 1
        assert world.claim("b~1", epoch=epoch).outcome == "CONFLICT"


def test_resume_counts_takeovers_anew() -> None:
    world = owned("a~1", messages=1)
    for node in ("b~1", "c~1", "d~1"):
        world.claim(node, reason="takeover")
    assert world.head.strikes == 3
    world.park("failed")
    world.resume()
    assert world.head.strikes == 0
    world.claim("e~1")
    world.claim("f~1", reason="takeover")
    assert world.head.strikes == 1


def test_a_resumed_conversation_may_wait_for_a_person() -> None:
    world = waiting()
    world.park("held")
    assert (world.head.asks, set(world.asks)) == (1, {"t1.1"})
    world.resume()
    assert json.loads(world.published[-1])["status"] == "waiting"
    assert world.reply("t1.1").outcome == "OK"


def test_a_turn_is_given_up_with_its_questions() -> None:
    world = waiting()
    world.stream("p")
    failed = event("turn_failed", "t1", 1, "{}")
    assert world.append(failed, done=1, closing="failed", ends_turn=True).outcome == "OK"
    assert (world.head.done, world.head.asks, world.asks, world.pieces) == (1, 0, {}, [])
    assert world.violations() == []


def test_a_stop_is_not_undone_by_giving_up() -> None:
    for closing in ("failed", "held"):
        world = owned("a~1", messages=1)
        world.stop()
        said, entries = len(world.published), len(world.log)
        assert world.append(event("x", "t1", 1, "1"), closing=closing).outcome == "PENDING"
        assert (world.head.status, world.head.owner, len(world.log)) == ("stopping", "a~1", entries)
        assert len(world.published) == said


def test_a_parked_conversation_is_stopped_at_once() -> None:
    for closing in ("failed", "held"):
        world = parked(closing)
        assert world.stop().outcome == "STOPPED"
        assert kinds(world)[-3:] == ["open", "input", "stopped"]
        assert (world.head.status, world.head.done, world.inbox) == ("stopped", 2, [])
        assert world.violations() == []
        assert world.apply(conversation.erase(world.read())) == "OK"
        assert (world.asks, world.pieces, world.alarms) == ({}, [], {})
