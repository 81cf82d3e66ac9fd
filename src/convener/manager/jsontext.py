"""JSON texts of what users and agents hand in: checked once, at the door."""

from __future__ import annotations

import re
from itertools import accumulate
from typing import Any, Final

import msgspec

from convener.errors import InvalidRequest, PayloadTooLarge

MAX_DEPTH: Final = 200
"""Levels of a value: far below what any JSON decoder on its way takes, whatever is wrapped around it."""

_NO_BRACKET: Final = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"|[^][{}"]+')
_STEPS: Final = [1 if chr(byte) in "[{" else -1 for byte in range(256)]


def to_json(value: Any, limit: int, what: str) -> str:
    """JSON text of a value.

    Raises:
        InvalidRequest: it is not a JSON value, or nests too deep.
        PayloadTooLarge: the text is longer than `limit` bytes.
    """
    try:
        text = msgspec.json.encode(value)
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidRequest(f"{what} is not a JSON value: {error}") from error
    if len(text) > limit:
        raise PayloadTooLarge(f"{what} is {len(text)} bytes, the limit is {limit}")
    if text.count(b"[") + text.count(b"{") > MAX_DEPTH and _depth(text) > MAX_DEPTH:
        raise InvalidRequest(f"{what} nests deeper than {MAX_DEPTH} levels")
    return text.decode()


def _depth(text: bytes) -> int:
    """How deep JSON text nests. Strings are cut out first: they may hold brackets."""
    return max(accumulate(map(_STEPS.__getitem__, _NO_BRACKET.sub(b"", text))), default=0)
