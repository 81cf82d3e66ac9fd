"""What a new owner finds in the log."""

from __future__ import annotations

import json
from typing import Any

import pytest

from convener.core import wire
from convener.core.ledger import Answer, Asked, Record
from convener.core.model import InboxEntry, LogEntry
from convener.core.replay import Replay


def folded(*events: str, done: int = 0) -> Replay:
    replay = Replay(done)
    for seq, event in enumerate(events, start=1):
        replay.take(LogEntry(1, seq, event))
    return replay


def given(position: int) -> str:
    return wire.input_event(InboxEntry(position, f"m{position}", "message", "u", 7, '{"text":"x"}'))


def kind(name: str, position: int, data: str = "{}") -> str:
    return wire.event(name, wire.turn_id(position), 7, data)


def test_unanswered_messages_in_order_with_what_they_say() -> None:
    begun = folded(wire.open_event("n", "start", (0, 0), 1), given(1), given(2)).unanswered()
    assert [(b.position, b.seq, b.message_id, b.user_id, b.data, b.ts, b.attempts) for b in begun] == [
        (1, 2, "m1", "u", {"text": "x"}, 7, 0),
        (2, 3, "m2", "u", {"text": "x"}, 7, 0),
    ]


def test_every_start_of_a_turn_counts() -> None:
    replay = folded(given(1), kind("turn_started", 1), given(2), kind("turn_started", 1), kind("turn_started", 9))
    assert [(b.position, b.attempts) for b in replay.unanswered()] == [(1, 2), (2, 0)]


@pytest.mark.parametrize("name", ["turn_done", "turn_failed", "turn_interrupted"])
def test_an_ended_turn_settles_its_message(name: str) -> None:
    replay = folded(given(1), given(2), kind("turn_started", 1), kind("reply", 1), kind(name, 1))
    assert [b.position for b in replay.unanswered()] == [2]
    assert replay.done == 1


def test_a_stop_gives_up_what_came_before_it() -> None:
    replay = folded(given(3), given(4), wire.stopped_event("r", 1), given(6), done=2)
    assert [b.position for b in replay.unanswered()] == [6]
    assert replay.done == 4
    assert folded(wire.stopped_event("r", 1), done=5).done == 5


def test_what_the_head_knows_as_done_is_not_begun_again() -> None:
    assert folded(given(1), given(2), done=1).unanswered()[0].position == 2


DAMAGED: list[Any] = [
    *("", "{", "[]", "5", "null"),
    {"kind": "input"},
    {"kind": "input", "turn": "t1", "data": 5},
    {"kind": "input", "turn": 7, "data": {}},
    {"turn": "t1", "data": {}},
]


@pytest.mark.parametrize("event", DAMAGED, ids=str)
def test_a_damaged_entry_is_passed_over(event: Any) -> None:
    text = event if isinstance(event, str) else json.dumps(event)
    replay = folded(given(1), text, given(2))
    assert [b.position for b in replay.unanswered()] == [1, 2]


def test_what_a_turn_has_recorded_comes_with_its_message() -> None:
    step = '{"name":"a","number":1,"result":5}'
    replay = folded(given(1), given(2), kind("turn_started", 1), kind("reply", 1), kind("step", 1, step))
    first, second = replay.unanswered()
    assert first.record.outputs == ["reply"]
    assert [(s.name, s.number, s.result) for s in first.record.steps] == [("a", 1, 5)]
    assert second.record.outputs == []


def test_questions_and_answers_come_with_their_turn() -> None:
    ask = '{"ask_id":"t1.1","prompt":"p","schema":null,"deadline":null}'
    said = wire.answer_event(InboxEntry(3, "m3", "answer", "u", 7, '{"ask_id":"t1.1","data":[1]}'))
    expired = wire.answer_event(InboxEntry(4, "ask/t1.1", "answer", "", 7, '{"ask_id":"t1.1","expired":true}'))
    replay = folded(given(1), given(2), kind("turn_started", 1), kind("ask", 1, ask), said, expired)
    first, second = replay.unanswered()
    assert first.record.asked == [Asked("t1.1", "p")]
    assert first.record.answers == {"t1.1": Answer([1])}, "the first one counts"
    assert second.record == Record()


def test_an_answer_to_a_turn_that_has_ended_is_nobodys() -> None:
    said = wire.answer_event(InboxEntry(3, "m3", "answer", "u", 7, '{"ask_id":"t1.1","data":1}'))
    strange = wire.answer_event(InboxEntry(4, "m4", "answer", "u", 7, '{"data":1}'))
    replay = folded(given(1), given(2), kind("turn_started", 1), kind("turn_interrupted", 1), said, strange)
    (left,) = replay.unanswered()
    assert (left.position, left.record) == (2, Record())


def test_a_message_that_an_alarm_has_sent_says_so() -> None:
    alarm = wire.input_event(InboxEntry(1, "alarm/t9.1", "alarm", "u", 7, "null"))
    assert [b.alarm for b in folded(alarm, given(2)).unanswered()] == [True, False]
