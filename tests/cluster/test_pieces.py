"""What puts answers together for other tests finds every way in which pieces can go wrong."""

from __future__ import annotations

from typing import Any

import pytest

from tests.cluster.pieces import Answers, check_deltas


def _delta(data: str, offset: int, attempt: int = 1, turn: str = "t1") -> tuple[str, dict[str, Any]]:
    return "delta", {
        "turn": turn,
        "attempt": attempt,
        "part": "text",
        "type": "text",
        "offset": offset,
        "data": data,
    }


def _event(kind: str, data: Any = None, turn: str = "t1") -> tuple[str, dict[str, Any]]:
    return "event", {"kind": kind, "turn": turn, "data": data}


JOINED = ("joined", dict[str, Any]())
REPLY = _event("reply", {"text": "one two"})


@pytest.mark.parametrize(
    ("shown", "whole"),
    [
        ([JOINED, _delta("one ", 0), _delta("two", 4), REPLY, _event("turn_done")], 1),
        ([JOINED, _delta("one ", 0), REPLY], 0),
        ([JOINED, _delta("one ", 0), JOINED, _delta("one two", 0), REPLY], 1),
        ([JOINED, _delta("else", 0), _delta("one two", 0, attempt=2), REPLY], 1),
        ([JOINED, REPLY], 0),
    ],
    ids=["all", "the beginning", "after coming back", "of the second attempt", "nothing"],
)
def test_pieces_that_make_an_answer(shown: list[tuple[str, dict[str, Any]]], whole: int) -> None:
    assert check_deltas(shown) == whole


@pytest.mark.parametrize(
    "shown",
    [
        [_delta("one ", 0), _delta("two", 5)],
        [_delta("one ", 0), _delta("one ", 0)],
        [_delta("o", 0, attempt=2), _delta("n", 1, attempt=1)],
        [_delta("one", 0), _delta("else", 0, attempt=2), REPLY],
        [_delta("one ", 0), REPLY, _event("turn_done"), _delta("two", 4)],
    ],
    ids=["a gap", "a repeat", "an attempt that is over", "another text than the reply", "after the end"],
)
def test_pieces_that_do_not(shown: list[tuple[str, dict[str, Any]]]) -> None:
    with pytest.raises(AssertionError):
        check_deltas([JOINED, *shown])


def test_in_the_store_a_piece_may_come_twice_but_not_be_missing() -> None:
    answers = Answers(repeats=True)
    for data, offset in (("one ", 0), ("one ", 0), ("two", 4)):
        answers.take(_delta(data, offset)[1])
    assert answers.texts == {"t1": "one two"}
    with pytest.raises(AssertionError):
        answers.take(_delta("!", 8)[1])
