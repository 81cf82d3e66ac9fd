"""Texts: every one is JSON and says what went in."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from convener.core import wire
from convener.core.model import PUBLISH_LIMIT, InboxEntry

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(values)
def test_json_text(value: object) -> None:
    text = wire.json_text(value)
    assert json.loads(text) == value
    assert "\n" not in text


def test_json_text_keeps_letters_and_escapes_what_utf_8_cannot_hold() -> None:
    assert wire.json_text({"a": "grüße"}) == '{"a":"grüße"}'
    half = json.loads('"a\\ud800"')
    assert wire.json_text(half) == '"a\\ud800"'


def test_json_text_refuses_what_json_cannot_say() -> None:
    for value in (math.nan, math.inf, -math.inf):
        with pytest.raises(ValueError, match="JSON"):
            wire.json_text(value)


@given(st.integers(1, 10**12))
def test_turn_ids(position: int) -> None:
    assert wire.turn_position(wire.turn_id(position)) == position


def test_what_is_no_turn_id() -> None:
    for turn in ("", "t", "x7", "t-7", "t7a", "t ", "7", "t٣", "t7.0"):
        assert wire.turn_position(turn) == 0, turn


def entry(data: str) -> InboxEntry:
    return InboxEntry(7, "m-1", "message", "u~1", 99, data)


@given(values)
def test_input_event(value: object) -> None:
    event = json.loads(wire.input_event(entry(wire.json_text(value))))
    assert event == {
        "kind": "input",
        "turn": "t7",
        "ts": 99,
        "data": {"message_id": "m-1", "user_id": "u~1", "data": value},
    }


@pytest.mark.parametrize(
    ("data", "turn"),
    [
        ('{"ask_id":"t5.1","data":1.50}', "t5"),
        ('{"ask_id":"t5.1","expired":true}', "t5"),
        ('{"ask_id":"t50.12","data":{"ask_id":"t9.9"}}', "t50"),
        ('{"ask_id":"t5","data":1}', ""),
        ('{"ask_id":"tx.1"}', ""),
        ('{"ask_id":"t\u0665.1"}', ""),
    ],
)
def test_answer_event(data: str, turn: str) -> None:
    text = wire.answer_event(entry(data))
    event = json.loads(text)
    assert (event["kind"], event["turn"], event["ts"]) == ("answer", turn, 99)
    assert event["data"] == {"message_id": "m-1", "user_id": "u~1", **json.loads(data)}
    # To the letter: numbers stay as somebody wrote them.
    assert text.endswith(data[1:] + "}")


@pytest.mark.parametrize("data", ['"yes"', "[1]", "{}", '{"data":1,"ask_id":"t5.1"}'])
def test_answer_event_of_another_form(data: str) -> None:
    event = json.loads(wire.answer_event(entry(data)))
    assert (event["turn"], event["data"]) == (
        "",
        {"message_id": "m-1", "user_id": "u~1", "data": json.loads(data)},
    )


@given(st.text())
def test_stopped_event(reason: str) -> None:
    event = json.loads(wire.stopped_event(reason, 5))
    assert event == {"kind": "stopped", "turn": "", "ts": 5, "data": {"reason": reason}}


def test_open_event() -> None:
    event = json.loads(wire.open_event("a~1", "takeover", (5, 6), 7))
    assert event["data"] == {"node": "a~1", "reason": "takeover", "prev": [5, 6]}
    assert (event["kind"], event["turn"], event["ts"]) == ("open", "", 7)


def test_publications_of_inbox_entries_carry_data_up_to_the_limit_in_bytes() -> None:
    full = '"' + "é" * ((PUBLISH_LIMIT - 2) // 2) + '"'
    assert len(full.encode()) == PUBLISH_LIMIT
    heard = json.loads(wire.publish_inbox(entry(full)))
    head = {"t": "in", "pos": 7, "id": "m-1", "kind": "message", "user": "u~1", "ts": 99}
    assert heard == {**head, "data": json.loads(full)}
    assert json.loads(wire.publish_inbox(entry(full[:-1] + ' "'))) == head


def test_publications_of_log_entries_carry_them_up_to_the_limit_in_bytes() -> None:
    half = '"' + "é" * ((PUBLISH_LIMIT // 2 - 2) // 2) + '"'
    heard = json.loads(wire.publish_log(5, 9, (half, half)))
    assert heard == {"t": "log", "epoch": 5, "seq": 9, "events": [json.loads(half)] * 2}
    assert json.loads(wire.publish_log(5, 9, (half, half, "1"))) == {"t": "log", "epoch": 5, "seq": 9, "n": 3}


def test_publications_of_pieces_carry_them_up_to_the_limit_in_bytes() -> None:
    half = '"' + "é" * ((PUBLISH_LIMIT // 2 - 2) // 2) + '"'
    heard = json.loads(wire.publish_pieces(5, (half, half)))
    assert heard == {"t": "piece", "epoch": 5, "pieces": [json.loads(half)] * 2}
    assert json.loads(wire.publish_pieces(5, (half, half, "1"))) == {"t": "piece", "epoch": 5, "n": 3}


def test_publications_of_a_status() -> None:
    assert json.loads(wire.publish_status(5, "hibernated")) == {"t": "status", "epoch": 5, "status": "hibernated"}
