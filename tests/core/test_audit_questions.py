"""The auditor on questions and answers, and on conversations that wait: each fault, planted by hand, is found."""

from __future__ import annotations

from dataclasses import replace

from convener.core.wire import event, input_event
from tests.core.audited import appended, asking, findings, held, living, place, waiting
from tests.core.world import owned


def test_a_question_without_an_id() -> None:
    facts = living().facts()
    for kind in ("ask", "answer"):
        for data in ("1", "{}", '{"ask_id":7}'):
            found = findings(appended(facts, event(kind, "t4", 1, data)))
            at = f"({facts.log[-1].epoch}, {facts.meta.seq + 1})"
            assert found == [("format", f"the {kind} {at} names no question")]


def test_a_question_that_was_asked_or_answered_twice() -> None:
    facts = asking().facts()
    again = appended(facts, event("ask", "t1", 1, '{"ask_id":"t1.3"}'))
    seqs = f"at seq {place(facts, 'ask', 2) + 1} and at seq {again.meta.seq}"
    assert findings(again) == [("I8", f"question t1.3 is asked twice, {seqs}")]
    again = appended(facts, event("answer", "t1", 1, '{"ask_id":"t1.1","message_id":"r9"}'))
    seqs = f"at seq {place(facts, 'answer') + 1} and at seq {again.meta.seq}"
    assert findings(again) == [("I8", f"question t1.1 is answered twice, {seqs}")]


def test_an_answer_to_what_was_never_asked() -> None:
    facts = appended(living().facts(), event("answer", "t4", 1, '{"ask_id":"t4.1","expired":true}'))
    at = f"({facts.log[-1].epoch}, {facts.meta.seq})"
    assert findings(facts) == [("I8", f"the answer {at} is to question t4.1, which was not asked")]


def test_an_accepted_answer_that_is_gone() -> None:
    facts = asking().facts()
    lost = replace(facts, inbox=[e for e in facts.inbox if e.kind != "answer"])
    assert findings(lost) == [
        ("I8", "message r2 was accepted at position 3, but is nowhere"),
        ("I8", "question t1.2 of turn t1 is closed, but its answer is nowhere"),
    ]
    # What cannot be read is not an answer to anything.
    for data in ("{", "7", "{}", '{"ask_id":["t1.2"]}'):
        damaged = [replace(e, data=data) if e.kind == "answer" else e for e in facts.inbox]
        assert findings(replace(facts, inbox=damaged)) == [
            ("I8", "question t1.2 of turn t1 is closed, but its answer is nowhere")
        ]


def test_an_answer_that_may_be_taken_in_again() -> None:
    facts = asking().facts()
    answer = next(e for e in facts.inbox if e.kind == "answer")
    again = replace(answer, message_id="r1")
    inbox = [again if e is answer else e for e in facts.inbox]
    assert findings(replace(facts, inbox=inbox)) == [
        ("I8", "inbox entry 3 (answer r1) is in the log already"),
        ("I8", "inbox entry 3 (answer r1) is remembered at 2, not at its position"),
        ("I8", "message r2 was accepted at position 3, but is nowhere"),
    ]


def test_an_alarm_or_an_answer_that_is_not_remembered() -> None:
    facts = asking().facts()
    assert findings(replace(facts, seen={"m1": 1, "r1": 2})) == [
        ("I8", "inbox entry 3 (answer r2) is remembered at None, not at its position"),
        ("I8", "inbox entry 4 (alarm alarm/1) is remembered at None, not at its position"),
    ]


def test_an_alarm_that_is_in_the_log_already() -> None:
    facts = asking().facts()
    alarm = facts.inbox[-1]
    again = appended(facts, input_event(alarm))
    assert ("I8", f"inbox entry 4 (alarm alarm/1) is in the log already, at seq {again.meta.seq}") in findings(again)


def test_a_head_that_counts_questions_wrong() -> None:
    facts = asking().facts()
    for count in (0, 2):
        found = findings(replace(facts, meta=replace(facts.meta, asks=count)))
        assert found == [("I13", f"the head says that {count} questions are open, but there are ['t1.3']")]


def test_an_open_question_that_should_not_be() -> None:
    facts = asking().facts()
    meta = replace(facts.meta, asks=2)
    seq = place(facts, "answer") + 1
    assert findings(replace(facts, meta=meta, asks=["t1.1", "t1.3"])) == [
        ("I8", f"question t1.1 is open, but was answered at seq {seq}")
    ]
    assert findings(replace(facts, meta=meta, asks=["t1.3", "t9.1"])) == [
        ("I13", "question t9.1 is open, but the log does not have it")
    ]
    world = owned(messages=1)
    world.ask("t1.1")
    world.append(event("turn_done", "t1", 1, "{}"), done=1)
    assert findings(world.facts()) == [("I13", "question t1.1 is open, but turn t1 has ended")]


def test_an_open_turn_that_waits_for_nobody() -> None:
    facts = waiting().facts()
    assert findings(replace(facts, meta=replace(facts.meta, asks=0), asks=())) == [
        ("I13", "nobody owns it, but positions 1 to 1 are unanswered"),
        ("I8", "question t1.1 of turn t1 is closed, but its answer is nowhere"),
    ]


def test_an_unread_answer_that_nobody_owns() -> None:
    """Whoever took it wakes the conversation before acknowledging."""
    world = waiting()
    world.reply("t1.1")
    unread = ("I11", "nobody owns it and no start is queued, but positions 2 to 2 are unread")
    assert findings(world.facts()) == [unread]
    assert findings(world.facts(queued=True)) == []


def test_a_parked_conversation_that_somebody_owns() -> None:
    facts = held().facts()
    assert findings(replace(facts, meta=replace(facts.meta, owner="z~1"))) == [("I15", "it is held, but z~1 owns it")]
    failed = replace(facts.meta, owner="z~1", status="failed")
    assert findings(replace(facts, meta=failed)) == [("I15", "it is failed, but z~1 owns it")]


def test_what_was_not_read_is_not_judged() -> None:
    assert findings(replace(asking().facts(), asks=None)) == []
