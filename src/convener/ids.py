"""Identifiers: what is allowed, and how fresh ones are made."""

from __future__ import annotations

import re
import secrets
from typing import Final

from convener.errors import InvalidRequest

# One alphabet for every id that a caller may choose. It holds no character with a meaning in a key ({}), a slot
# (|), a JSON string (" and \) or a URL path (/), so ids are embedded without escaping in all four.
_ID: Final = re.compile(r"[A-Za-z0-9._~:@-]{1,128}\Z")
_PLAIN: Final = str.maketrans("_-", "..")
_NODE: Final = re.compile(r"[A-Za-z0-9._:@-]{1,64}\Z")


def is_id(value: object) -> bool:
    """Whether `value` is a well-formed id: 1 to 128 of ``A-Z a-z 0-9 . _ ~ : @ -``."""
    return isinstance(value, str) and _ID.match(value) is not None


def check_id(value: object, name: str) -> str:
    """Return `value` if it is a well-formed id.

    Raises:
        InvalidRequest: it is not; the message names the field `name`.
    """
    if isinstance(value, str) and _ID.match(value) is not None:
        return value
    raise InvalidRequest(f"{name} must be 1 to 128 characters of A-Z a-z 0-9 . _ ~ : @ -", code="invalid_id")


def is_node_name(value: str) -> bool:
    """Whether `value` may name a node (an id without ``~``, at most 64 characters)."""
    return _NODE.match(value) is not None


def new_id() -> str:
    """A fresh id of 127 random bits, 22 characters; without ``-``, which a command line takes for an option."""
    return secrets.token_urlsafe(16).translate(_PLAIN)


def new_nonce() -> str:
    """A fresh slot nonce of 72 random bits, 12 characters."""
    return secrets.token_urlsafe(9)


def new_incarnation(node_name: str) -> str:
    """The identity of one start of the node: its name and 48 random bits."""
    return f"{node_name}~{secrets.token_hex(6)}"


def node_of(incarnation: str) -> str:
    """The node's name, out of an incarnation."""
    return incarnation.rpartition("~")[0]
