"""Options and arguments that several commands share."""

from __future__ import annotations

from typing import Annotated
from urllib.parse import urlsplit

import typer

from convener.ids import is_id

DEFAULT_URL = "http://127.0.0.1:8000"


def _check_url(value: str) -> str:
    parts = urlsplit(value)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise typer.BadParameter(f"{value!r} is no http:// or https:// address")
    return value.rstrip("/")


def _check_id(value: str) -> str:
    if not is_id(value):
        raise typer.BadParameter(f"{value!r} is no id: 1 to 128 of A-Z a-z 0-9 . _ ~ : @ -")
    return value


def optional_id(value: str | None) -> str | None:
    """An id, or nothing. Raises `BadParameter` for anything else."""
    return None if value is None else _check_id(value)


def _check_ids(values: list[str] | None) -> list[str]:
    return [_check_id(value) for value in values or []]


Url = Annotated[
    str,
    typer.Option("--url", envvar="CONVENER_URL", callback=_check_url, help="Address of any node.", metavar="URL"),
]
Token = Annotated[
    str | None,
    typer.Option(
        "--token",
        envvar="CONVENER_TOKEN",
        show_envvar=True,
        help="Who you are: an admin, service or user token.",
        metavar="TOKEN",
    ),
]
Timeout = Annotated[float, typer.Option("--timeout", min=0.1, help="Seconds to wait for an answer.", metavar="SECONDS")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]
Conversation = Annotated[str, typer.Argument(help="Id of the conversation.", metavar="CID", callback=_check_id)]
Question = Annotated[str, typer.Argument(help="Id of the question.", metavar="ASK_ID", callback=_check_id)]
Conversations = Annotated[
    list[str] | None, typer.Argument(help="Ids of conversations.", metavar="[CID]...", callback=_check_ids)
]
User = Annotated[
    str | None,
    typer.Option("--user", help="Id of a user.", metavar="USER", callback=optional_id),
]
MessageId = Annotated[
    str | None,
    typer.Option(
        "--message-id",
        help="Id of the message: sent twice under one id, it is accepted once. Default: a fresh one.",
        metavar="ID",
        callback=optional_id,
    ),
]
