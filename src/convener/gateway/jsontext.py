"""JSON as it comes in from outside: strict, bounded, and such that everybody later can read it again.

What one parser lets through and a later one chokes on is refused at the door: ``NaN``, numbers beyond a
double, halves of surrogate pairs, and nesting so deep that a recursive encoder would give up.
"""

from __future__ import annotations

from typing import Any, Final, cast

import msgspec

from convener.errors import InvalidRequest

MAX_DEPTH: Final = 100
"""Levels of arrays and objects; recursive encoders in Python and in the store end well above this."""


def parse(text: str | bytes) -> Any:
    """The value of a JSON text.

    Raises:
        InvalidRequest: it is malformed, cannot be represented, or nests deeper than `MAX_DEPTH`.
    """
    try:
        value = msgspec.json.decode(text)
    except (ValueError, RecursionError) as error:
        reason = "nests too deep" if isinstance(error, RecursionError) else str(error)
        raise InvalidRequest(f"not valid JSON: {reason}") from None
    brackets = (b"[", b"{") if isinstance(text, bytes) else ("[", "{")
    # Fewer opening brackets than levels is the usual case and needs no walk; those in strings do no harm.
    if sum(cast("Any", text).count(bracket) for bracket in brackets) > MAX_DEPTH:
        check_depth(value)
    return value


def check_depth(value: Any) -> None:
    """Refuse a value that nests deeper than `MAX_DEPTH`.

    Raises:
        InvalidRequest: it does.
    """
    level: list[Any] = [value]
    for _ in range(MAX_DEPTH):
        level = [child for parent in level for child in _children(parent) if isinstance(child, (dict, list))]
        if not level:
            return
    raise InvalidRequest(f"not valid JSON: arrays and objects may nest {MAX_DEPTH} deep")


def _children(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return list(cast("dict[str, Any]", value).values())
    return cast("list[Any]", value) if isinstance(value, list) else []


def dumps(value: Any) -> bytes:
    """Compact JSON of an answer."""
    return msgspec.json.encode(value)
