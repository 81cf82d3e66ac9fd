"""The auditor: a clean conversation passes, and each fault, planted by hand, is found where it is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from convener.core.audit import (
    ConversationFacts,
    Violation,
    parse_event,
)
from convener.core.model import SEEN_WINDOW, InboxEntry, LogEntry
from convener.core.wire import event, input_event, open_event
from tests.core.audited import (
    appended,
    asking,
    expired,
    findings,
    fresh,
    held,
    hibernated,
    interrupted,
    living,
    message,
    place,
    resumed,
    started_again,
    stopped,
    stopping,
    waiting,
    with_entry,
)
from tests.core.world import World, owned

# -- clean -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "made",
    [
        *(fresh, living, stopped, hibernated, resumed, started_again, stopping, interrupted),
        *(asking, waiting, expired, held),
    ],
    ids=lambda f: f.__name__,
)
def test_what_the_transitions_make_is_clean(made: Callable[[], World]) -> None:
    assert made().violations() == []


def test_an_id_may_come_again_when_it_was_forgotten() -> None:
    world = owned()
    for i in range(SEEN_WINDOW + 1):
        world.send("again" if i == 0 else f"m{i}", max_pending=10_000)
        world.take_in()
        world.answer(i + 1)
    assert world.send("again").outcome == "OK"
    world.take_in()
    assert world.violations() == []


def test_an_id_that_came_again_too_soon() -> None:
    """The window is exact, also far from the beginning."""
    for distance, wrong in ((SEEN_WINDOW, True), (SEEN_WINDOW + 1, False)):
        world = owned()
        for i in range(SEEN_WINDOW + 10):
            world.send("again" if i == 4 else f"m{i}", max_pending=10_000)
            world.take_in()
            world.answer(i + 1)
        facts = appended(world.facts(), input_event(message(5 + distance, "again")))
        assert (
            ("I8", f"message again is in the log twice, at seq 10 and at seq {facts.meta.seq}") in findings(facts)
        ) is wrong


def test_a_repaired_id_has_no_position_to_check() -> None:
    facts = living().facts()
    assert findings(replace(facts, seen={**facts.seen, "old": 0})) == []


def test_a_finding_reads_as_a_sentence() -> None:
    assert str(Violation("I1", "conversation c", "wrong")) == "I1 conversation c: wrong"


# -- order, fence, writers -------------------------------------------------------------------------------------


def test_a_missing_entry() -> None:
    facts = living().facts()
    index = place(facts, "reply")
    log = [e for i, e in enumerate(facts.log) if i != index]
    assert findings(replace(facts, log=log)) == [("I1", f"after seq 4 comes entry ({log[4].epoch}, 6)")]


def test_a_log_that_begins_late() -> None:
    facts = living().facts()
    assert ("I1", f"after seq 0 comes entry ({facts.log[1].epoch}, 2)") in findings(replace(facts, log=facts.log[1:]))


def test_a_repeated_seq() -> None:
    facts = living().facts()
    at = facts.log[4]
    log = [*facts.log[:5], replace(at, event=event("reply", "t1", 1, "2")), *facts.log[5:]]
    assert findings(replace(facts, log=log)) == [("I1", f"after seq 5 comes entry ({at.epoch}, 5)")]


def test_an_old_writer() -> None:
    facts = living().facts()
    first, last = facts.log[0].epoch, facts.log[-1]
    log = [*facts.log, LogEntry(first, last.seq + 1, event("reply", "t4", 1, "1"))]
    meta = replace(facts.meta, seq=last.seq + 1)
    assert findings(replace(facts, log=log, meta=meta)) == [
        ("I3", f"entry ({first}, {last.seq + 1}) was added after epoch {last.epoch} had begun")
    ]


def test_a_second_open_of_an_epoch() -> None:
    facts = living().facts()
    last = facts.log[-1]
    text = open_event("z~1", "start", (last.epoch, last.seq), 1)
    log = [*facts.log, LogEntry(last.epoch, last.seq + 1, text)]
    opened_at = place(facts, "open", 1) + 1
    found = findings(replace(facts, log=log, meta=replace(facts.meta, seq=last.seq + 1)))
    assert found == [("I2", f"epoch {last.epoch} is opened twice, at seq {opened_at} and at seq {last.seq + 1}")]


def test_an_epoch_without_open() -> None:
    facts = living().facts()
    index = place(facts, "open", 1)
    changed = with_entry(facts, index, event("reply", "t3", 1, "1"))
    assert findings(changed) == [
        ("I2", f"epoch {facts.log[index].epoch} begins with reply at seq {index + 1}, not with open")
    ]


def test_an_open_that_follows_another_history() -> None:
    facts = living().facts()
    index = place(facts, "open", 1)
    before, here = facts.log[index - 1], facts.log[index]
    changed = with_entry(facts, index, open_event("b~1", "takeover", (before.epoch, 99), 1))
    follows = f"says that it follows [{before.epoch}, 99], but it follows [{before.epoch}, {before.seq}]"
    assert findings(changed) == [("I1", f"the open entry ({here.epoch}, {here.seq}) {follows}")]
    assert len(findings(with_entry(facts, index, event("open", "", 1, "7")))) == 1
    assert len(findings(with_entry(facts, 0, open_event("a~1", "start", (1, 1), 1)))) == 1


def test_what_is_no_event() -> None:
    facts = living().facts()
    index = place(facts, "reply")
    at = facts.log[index]
    for text in ("", "{", "7", "[]", "{}", '{"kind":1,"turn":"","data":1}', '{"kind":"x","turn":1,"data":1}'):
        assert parse_event(LogEntry(1, 1, text)) is None
        found = findings(with_entry(facts, index, text))
        assert found == [("format", f"entry ({at.epoch}, {at.seq}) is not an event")]


def test_an_input_that_nobody_can_place() -> None:
    facts = living().facts()
    index = place(facts, "input", 3)
    at = f"({facts.log[index].epoch}, {facts.log[index].seq})"
    for turn, data in (("", '{"message_id":"m4"}'), ("t4", "{}"), ("t4", '{"message_id":4}')):
        found = findings(with_entry(facts, index, event("input", turn, 1, data)))
        assert ("format", f"the input {at} has no turn or no message id") in found
        assert ("I8", "message m4 was accepted at position 4, but is nowhere") in found


# -- head ------------------------------------------------------------------------------------------------------


def test_a_head_that_disagrees_with_the_log() -> None:
    facts = living().facts()
    seq, epoch = facts.meta.seq, facts.meta.epoch
    assert findings(replace(facts, meta=replace(facts.meta, seq=seq + 1))) == [
        ("I1", f"the head says that the last seq is {seq + 1}, the log ends at {seq}")
    ]
    assert findings(replace(facts, meta=replace(facts.meta, epoch=epoch - 1))) == [
        ("I3", f"the head is at epoch {epoch - 1}, the log already at {epoch}")
    ]
    # Raised above the log by RESOLVE or DISOWN: as it should be.
    assert findings(replace(facts, meta=replace(facts.meta, epoch=epoch + 1))) == []


def test_numbers_out_of_order() -> None:
    facts = living().facts()
    found = findings(replace(facts, meta=replace(facts.meta, done=5)))
    assert found == [
        ("I8", "done 5, cursor 4, position 6 are not in order"),
        ("I8", f"message m4 at position 4 (seq {facts.log[-1].seq}) counts as done, but no entry settles it"),
    ]
    assert ("I8", "done 3, cursor 7, position 6 are not in order") in findings(
        replace(facts, meta=replace(facts.meta, cursor=7))
    )


# -- once ------------------------------------------------------------------------------------------------------


def test_a_message_that_was_taken_in_twice() -> None:
    facts = appended(living().facts(), input_event(message(4, "m4")))
    seq = facts.meta.seq
    assert findings(facts) == [
        ("I8", f"position 4 is in the log twice, at seq {seq - 1} and at seq {seq}"),
        ("I8", f"message m4 is in the log twice, at seq {seq - 1} and at seq {seq}"),
    ]


def test_an_id_that_was_accepted_twice() -> None:
    world = living()
    world.inbox[0] = replace(world.inbox[0], message_id="m4")
    del world.seen["m5"]
    world.seen["m4"] = 5
    world.take_in()
    seq = world.head.seq
    assert findings(world.facts()) == [("I8", f"message m4 is in the log twice, at seq {seq - 2} and at seq {seq - 1}")]


def test_messages_in_the_wrong_order() -> None:
    world = living()
    world.inbox.reverse()
    world.take_in()
    assert findings(world.facts()) == [("I8", f"position 5 comes after position 6, at seq {world.head.seq}")]


def test_an_accepted_message_that_is_gone() -> None:
    facts = living().facts()
    lost = replace(facts, inbox=facts.inbox[1:])
    assert findings(lost) == [("I8", "message m5 was accepted at position 5, but is nowhere")]
    lost = replace(facts, inbox=facts.inbox[:1])
    assert findings(lost) == [
        ("I8", "the last accepted entry, at position 6, is not in the inbox"),
        ("I8", "message m6 was accepted at position 6, but is nowhere"),
    ]
    # With its mark gone too, the last one is still missed.
    forgotten = replace(lost, seen={m: p for m, p in facts.seen.items() if p != 6})
    assert findings(forgotten) == [("I8", "the last accepted entry, at position 6, is not in the inbox")]


def test_a_message_that_the_owner_skipped() -> None:
    world = living()
    world.append(input_event(world.inbox[1]), cursor=6)
    assert findings(world.facts()) == [("I8", "message m5 was accepted at position 5, but is nowhere")]


def test_another_message_in_its_place() -> None:
    facts = living().facts()
    index = place(facts, "input", 3)
    changed = with_entry(facts, index, input_event(message(4, "other")))
    assert findings(changed) == [("I8", "message m4 was accepted at position 4, but is nowhere")]


def test_a_message_that_may_be_taken_in_again() -> None:
    facts = living().facts()
    again = replace(facts, inbox=[message(4, "m4"), *facts.inbox])
    seq = facts.meta.seq
    assert findings(again) == [
        ("I8", "inbox entry 4 (message m4) is out of place: after 0, with cursor 4, position 6"),
        ("I8", f"inbox entry 4 (message m4) is in the log already, at seq {seq}"),
    ]


def test_an_inbox_in_disorder() -> None:
    facts = living().facts()
    found = findings(replace(facts, inbox=list(reversed(facts.inbox))))
    name = "inbox entry 5 (message m5)"
    assert found == [
        ("I8", f"{name} is out of place: after 6, with cursor 4, position 6"),
        ("I8", "the last accepted entry, at position 6, is not in the inbox"),
    ]
    beyond = replace(facts, inbox=[*facts.inbox, InboxEntry(7, "stop.7", "stop", "", 1, '"x"')])
    assert findings(beyond) == [
        ("I8", "inbox entry 7 (stop stop.7) is out of place: after 6, with cursor 4, position 6")
    ]


def test_a_message_that_would_be_accepted_again() -> None:
    facts = living().facts()
    seen = {m: p for m, p in facts.seen.items() if m != "m5"}
    assert findings(replace(facts, seen=seen)) == [
        ("I8", "inbox entry 5 (message m5) is remembered at None, not at its position")
    ]
    assert findings(replace(facts, seen={**facts.seen, "m5": 4})) == [
        ("I8", "inbox entry 5 (message m5) is remembered at 4, not at its position"),
        ("I8", "message m5 was accepted at position 4, but is nowhere"),
    ]


def test_an_id_that_is_remembered_ahead_of_time() -> None:
    facts = living().facts()
    assert findings(replace(facts, seen={**facts.seen, "m9": 9})) == [
        ("I8", "message m9 is remembered at position 9, beyond the last one")
    ]


def test_a_message_that_was_answered_twice() -> None:
    facts = appended(living().facts(), event("turn_failed", "t2", 1, "{}"))
    first = place(facts, "turn_done", 1) + 1
    assert findings(facts) == [("I8", f"position 2 is settled twice, at seq {first} and at seq {facts.meta.seq}")]


def test_a_message_that_counts_as_done_without_an_answer() -> None:
    facts = living().facts()
    index = place(facts, "turn_done", 1)
    changed = with_entry(facts, index, event("reply", "t2", 1, "1"))
    seq = place(facts, "input", 1) + 1
    assert findings(changed) == [
        ("I8", f"message m2 at position 2 (seq {seq}) counts as done, but no entry settles it")
    ]
    changed = with_entry(facts, place(facts, "turn_done", 2), event("reply", "t3", 1, "1"))
    assert [detail[:22] for _, detail in findings(changed)] == ["message m3 at position"]


def test_an_answer_that_does_not_count() -> None:
    facts = appended(living().facts(), event("turn_done", "t4", 1, "{}"))
    assert findings(facts) == [("I8", f"position 4 is settled at seq {facts.meta.seq}, but done is 3")]


def test_an_answer_to_nothing() -> None:
    facts = appended(living().facts(), event("turn_done", "t3", 1, '{"settles":[7, "x"]}'))
    at = f"({facts.log[-1].epoch}, {facts.log[-1].seq})"
    assert ("I8", f"turn_done {at} settles position 7, which is not in the log") in findings(facts)


def test_an_answer_before_the_question() -> None:
    world = owned()
    world.send("m1")
    world.append(event("turn_done", "t1", 1, "{}"), input_event(world.inbox[0]), cursor=1, done=1)
    at = f"({world.log[1].epoch}, 2)"
    assert findings(world.facts()) == [("I8", f"turn_done {at} settles position 1 before it was taken in")]


def test_turns_of_another_kind_settle_nothing() -> None:
    assert findings(appended(living().facts(), event("turn_done", "loop", 1, "{}"))) == []


# -- unowned, stopped ------------------------------------------------------------------------------------------


def test_an_open_turn_that_nobody_owns() -> None:
    world = living()
    world.inbox.clear()
    del world.seen["m5"], world.seen["m6"]
    unowned = replace(world.head, owner="", nonce="", position=4)
    facts = replace(world.facts(), meta=unowned)
    assert findings(facts) == [("I13", "nobody owns it, but positions 4 to 4 are unanswered")]
    # A `resume` may have to wait for a slot.
    assert findings(replace(facts, queued=True)) == []


def test_unread_messages_that_nobody_owns() -> None:
    world = hibernated()
    world.send("m2")
    world.send("m3")
    unread = ("I11", "nobody owns it and no start is queued, but positions 2 to 3 are unread")
    assert findings(world.facts()) == [unread]
    assert findings(world.facts(queued=True)) == []


def test_a_stop_that_is_not_the_last_word() -> None:
    facts = appended(stopped().facts(), event("reply", "t4", 1, "1"))
    at = f"({facts.log[-1].epoch}, {facts.meta.seq})"
    assert findings(facts) == [
        ("I15", f"reply {at} follows the stopped entry of its own epoch"),
        ("I15", f"it is stopped, but its last entry is reply {at}"),
    ]


def test_a_stopped_conversation_without_log() -> None:
    meta = replace(World().head, status="stopped")
    assert findings(ConversationFacts("c", meta)) == [("I15", "it is stopped, but its last entry is missing")]


def test_a_stopped_conversation_that_somebody_owns() -> None:
    facts = stopped().facts()
    at = f"({facts.log[-1].epoch}, {facts.meta.seq})"
    assert findings(replace(facts, meta=replace(facts.meta, owner="z~1"))) == [
        ("I15", f"z~1 owns it, but its last entry is stopped {at}"),
        ("I15", "it is stopped, but z~1 owns it"),
    ]


def test_a_stop_that_nobody_finishes() -> None:
    facts = stopping().facts()
    assert findings(replace(facts, meta=replace(facts.meta, owner=""))) == [
        ("I15", "it is stopping and nobody owns it, so nobody finishes the stop")
    ]
