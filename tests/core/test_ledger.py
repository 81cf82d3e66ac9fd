"""Matching a repeated turn with what its earlier attempts have recorded."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from convener.core.ledger import Answer, Asked, Ledger, Mismatch, Record, Step


def test_a_first_attempt_runs_and_writes_everything() -> None:
    ledger = Ledger()
    assert not ledger.is_durable
    assert ledger.ask("search") == (1, None)
    assert ledger.ask("search") == (2, None)
    assert ledger.ask("read") == (1, None)
    assert ledger.write("reply")
    ledger.finish()


def test_recorded_steps_are_given_back_by_name_and_number() -> None:
    first, second = Step("a", 1, result=1), Step("a", 2, error={"type": "ValueError", "message": "no"})
    ledger = Ledger(Record([second, first]))
    assert ledger.is_durable
    assert ledger.ask("a") == (1, first)
    assert ledger.ask("b") == (1, None)
    assert ledger.ask("a") == (2, second)
    assert ledger.ask("a") == (3, None)
    ledger.finish()


def test_outputs_in_the_log_are_not_written_again() -> None:
    ledger = Ledger(Record(outputs=["reply", "note"]))
    assert ledger.is_durable
    assert [ledger.write("reply"), ledger.write("note"), ledger.write("reply")] == [False, False, True]
    ledger.finish()


def test_another_kind_of_output_is_a_mismatch() -> None:
    with pytest.raises(Mismatch, match="output 1 of the turn was note in an earlier attempt and is reply now"):
        Ledger(Record(outputs=["note"])).write("reply")


def test_a_step_that_is_not_run_any_more_is_a_mismatch() -> None:
    ledger = Ledger(Record([Step("a", 1), Step("a", 2)]))
    ledger.ask("a")
    with pytest.raises(Mismatch, match="step a number 2"):
        ledger.finish()


def test_fewer_outputs_are_a_mismatch() -> None:
    ledger = Ledger(Record(outputs=["reply", "reply"]))
    ledger.write("reply")
    with pytest.raises(Mismatch, match="2 outputs, this one 1"):
        ledger.finish()


@given(st.lists(st.sampled_from(["a", "b", "c"])), st.data())
def test_any_prefix_of_a_turn_is_matched_whatever_order_steps_end_in(names: list[str], data: st.DataObject) -> None:
    """The agent's code is the list of names; a crash leaves any subset of its steps recorded."""
    ledger, whole = Ledger(), list[Step]()
    for name in names:
        number, _ = ledger.ask(name)
        whole.append(Step(name, number, result=f"{name}{number}"))
    recorded = data.draw(st.lists(st.sampled_from(whole), unique=True)) if whole else []
    again = Ledger(Record(recorded))
    for name, step in zip(names, whole, strict=True):
        number, found = again.ask(name)
        assert number == step.number
        assert found == (step if step in recorded else None)
    again.finish()


def test_a_record_grows_with_the_entries_of_the_turn() -> None:
    record = Record()
    record.note("reply", {"text": "x"})
    record.note("step", {"name": "a", "number": 1, "result": [1]})
    record.note("step", {"name": "b", "number": 1, "error": {"type": "E", "message": "m"}})
    record.note("step", {"name": "damaged"})
    record.note("step", 5)
    record.note("mine", None)
    assert record.steps == [Step("a", 1, [1]), Step("b", 1, None, {"type": "E", "message": "m"})]
    assert record.outputs == ["reply", "mine"]


# -- questions


APPROVE = Asked("t5.1", "approve?", {"type": "boolean"})
NAME = Asked("t5.2", "name?")


def test_a_first_attempt_numbers_its_questions() -> None:
    ledger = Ledger()
    assert ledger.question("approve?", None) is None
    assert [ledger.next_question(), ledger.next_question()] == [1, 2]
    ledger.finish()


def test_recorded_questions_are_matched_by_what_they_ask() -> None:
    ledger = Ledger(Record(asked=[APPROVE, NAME]))
    assert ledger.is_durable
    assert ledger.question("name?", None) == NAME
    assert ledger.question("approve?", None) is None, "another schema is another question"
    assert ledger.question("approve?", {"type": "boolean"}) == APPROVE
    assert ledger.question("approve?", {"type": "boolean"}) is None, "each is given back once"
    assert ledger.next_question() == 3
    ledger.finish()


def test_equal_questions_are_given_back_in_the_order_in_which_they_were_recorded() -> None:
    first, second = Asked("t5.1", "and?"), Asked("t5.2", "and?")
    ledger = Ledger(Record(asked=[first, second]))
    assert [ledger.question("and?", None) for _ in range(3)] == [first, second, None]


def test_a_question_that_is_not_asked_any_more_is_a_mismatch() -> None:
    ledger = Ledger(Record(asked=[APPROVE]))
    assert ledger.question("approved?", {"type": "boolean"}) is None
    with pytest.raises(Mismatch, match=r"question t5\.1 was asked by an earlier attempt and is not asked now"):
        ledger.finish()


@pytest.mark.parametrize(
    ("recorded", "number"),
    [(["t5.2"], 3), (["t5.3", "t5.1"], 4), (["t5.10", "t5.9"], 11), (["damaged"], 2), (["t5.²"], 2), ([], 1)],
)
def test_no_two_questions_of_a_turn_have_the_same_number(recorded: list[str], number: int) -> None:
    """Of two that were asked at the same time the second may be the only one that was recorded."""
    ledger = Ledger(Record(asked=[Asked(ask_id, ask_id) for ask_id in recorded]))
    assert ledger.next_question() == number


def test_a_record_keeps_questions_and_the_first_answer_to_each() -> None:
    record = Record()
    record.note("ask", {"ask_id": "t5.1", "prompt": "approve?", "schema": {"type": "boolean"}, "deadline": 7})
    record.note("answer", {"ask_id": "t5.1", "message_id": "m", "user_id": "u", "data": True})
    record.note("answer", {"ask_id": "t5.1", "expired": True})
    record.note("answer", {"ask_id": "t5.2", "expired": True})
    for damaged in ({"prompt": "p"}, {"ask_id": 5}, None):
        record.note("ask", damaged)
        record.note("answer", damaged)
    assert record.asked == [APPROVE]
    assert record.answers == {"t5.1": Answer(True), "t5.2": Answer(expired=True)}
    assert record.outputs == []
