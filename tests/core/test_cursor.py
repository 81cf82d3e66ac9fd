"""Cursors: what clients keep."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from convener.core.cursor import Cursor, at, parse
from convener.core.view import START, Place

numbers = st.integers(0, 10**15 - 1)
generations = st.text("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789_-", min_size=1, max_size=32)


@given(generations, numbers, numbers)
def test_what_was_given_out_comes_back(generation: str, epoch: int, seq: int) -> None:
    cursor = Cursor(generation, Place(epoch, seq))
    assert parse(cursor.encode()) == cursor
    assert at(generation, epoch, seq) == cursor.encode()
    assert cursor.is_exact


@given(numbers)
def test_a_bare_number(seq: int) -> None:
    assert parse(seq) == parse(str(seq)) == Cursor("", Place(0, seq))
    assert not Cursor("", Place(0, seq)).is_exact


def test_the_beginning() -> None:
    assert Cursor().place == START == Place(0, 0)
    assert parse(0) == parse("0") == Cursor()


def test_everything_else_is_refused() -> None:
    bad: list[object] = [
        None, True, False, -1, 10**15, 1.0, "", "-1", "1.2", "g.1", "g.1.2.3", "g.1.x", "g..2", ".1.2", "g.1.2 ",
        "g.1.2\n", "1\n", " 1", "g/h.1.2", "g" * 33 + ".1.2", "9" * 16, "g.1." + "9" * 16, "٣", [], {}, b"1",
    ]  # fmt: skip
    for value in bad:
        assert parse(value) is None, value


@given(st.text())
def test_no_text_raises(text: str) -> None:
    cursor = parse(text)
    assert cursor is None or parse(cursor.encode() if cursor.is_exact else text) == cursor
