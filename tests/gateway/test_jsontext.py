"""JSON from outside."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from convener.errors import InvalidRequest
from convener.gateway.jsontext import MAX_DEPTH, dumps, parse


def nested(depth: int, opening: str = "[", closing: str = "]") -> str:
    return opening * depth + closing * depth


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "nul",
        "NaN",
        "Infinity",
        "-Infinity",
        "1e400",
        '{"a":1}x',
        "'a'",
        '"\\ud800"',
        '"\\udc00 alone"',
        '"tab\tinside"',
        nested(MAX_DEPTH + 1),
        nested(MAX_DEPTH + 1, '{"a":', "}").replace(":}", ":0}"),
        nested(200_000),
        '{"a":' * 200_000,
    ],
    ids=lambda text: text[:20] or "empty",
)
def test_what_others_would_choke_on_is_refused(text: str) -> None:
    with pytest.raises(InvalidRequest, match="not valid JSON"):
        parse(text)
    with pytest.raises(InvalidRequest, match="not valid JSON"):
        parse(text.encode())


def test_broken_utf8_is_refused() -> None:
    with pytest.raises(InvalidRequest):
        parse(b'"\xff"')


def test_a_lone_surrogate_in_a_text_is_refused() -> None:
    with pytest.raises(InvalidRequest):
        parse('"\ud800"')


def test_depth_up_to_the_limit_is_fine() -> None:
    assert parse(nested(MAX_DEPTH)) == json.loads(nested(MAX_DEPTH))


def test_many_brackets_are_fine_if_they_do_not_nest() -> None:
    wide = "[" + ",".join(["[]"] * 500) + "]"
    assert parse(wide) == [[] for _ in range(500)]
    assert parse('"' + "[" * 500 + '"') == "[" * 500


@given(
    st.recursive(
        st.none()
        | st.booleans()
        | st.integers(-(2**53), 2**53)
        | st.floats(allow_nan=False, allow_infinity=False)
        # Surrogates are no characters; everything else must pass.
        | st.text(st.characters(exclude_categories=["Cs"])),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(st.characters(exclude_categories=["Cs"])), inner),
        max_leaves=20,
    )
)
def test_every_value_passes_unchanged(value: object) -> None:
    assert parse(json.dumps(value)) == value
    assert parse(dumps(value)) == value
