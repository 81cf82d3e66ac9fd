"""What a Socket.IO client says when it connects."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast
from urllib.parse import parse_qs

from convener.errors import InvalidRequest


@dataclass(frozen=True, slots=True)
class Hello:
    """What a client asks for. Without `conversation_id` it follows the list of the user's conversations."""

    conversation_id: str | None
    user_id: str | None
    token: str | None
    after: Any
    tail: int | None


def headers_of(environ: Mapping[str, Any]) -> dict[str, str]:
    """The request's headers, with lower-case names."""
    return {
        name.removeprefix("HTTP_").replace("_", "-").lower(): str(value)
        for name, value in environ.items()
        if name.startswith("HTTP_")
    }


def read_hello(environ: Mapping[str, Any], auth: object) -> Hello:
    """What the client asks for: the auth object goes before the query string.

    Raises:
        InvalidRequest: a value of the wrong type, a token where logs would keep it, or a place in no conversation.
    """
    if auth is None:
        given: dict[str, Any] = {}
    elif isinstance(auth, dict):
        given = {key: value for key, value in cast("dict[str, Any]", auth).items() if value is not None}
    else:
        raise InvalidRequest("the auth payload must be an object")
    query = {key: values[-1] for key, values in parse_qs(str(environ.get("QUERY_STRING", ""))).items()}
    if "token" in query:
        raise InvalidRequest("token belongs into the auth object: addresses end up in logs")
    said: dict[str, Any] = {**query, **given}
    for name in ("conversation_id", "user_id", "token"):
        if not isinstance(said.get(name, ""), str):
            raise InvalidRequest(f"{name} must be a string")
    cid, after, tail = said.get("conversation_id"), said.get("after"), _tail(said.get("tail"))
    if cid is None and (after not in (None, "") or tail is not None):
        raise InvalidRequest("after and tail are places in a conversation: conversation_id is missing")
    return Hello(cid, said.get("user_id"), said.get("token"), after, tail)


def _tail(value: object) -> int | None:
    if value is None or value == "":
        return None
    if isinstance(value, str) and value.isascii() and value.isdigit() and len(value) <= 15:
        return int(value)
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 10**15:
        return value
    raise InvalidRequest("tail must be a number of entries")
