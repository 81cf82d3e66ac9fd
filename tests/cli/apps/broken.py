"""Applications that cannot start, each in its own way."""

from __future__ import annotations

from typing import Any

from convener.errors import StoreUnavailable
from tests.cli.apps.plain import Message, Receive, Send

not_an_application = 42


class Factory:
    """Needs to be called first."""


async def without_lifespan(scope: Message, receive: Receive, send: Send) -> None:
    """As many small applications are."""
    assert scope["type"] == "http", "only HTTP here"


async def store_is_away(scope: Message, receive: Receive, send: Send) -> None:
    """Raises as a node whose store does not answer."""
    raise StoreUnavailable("cannot reach redis.example:6379: connection refused")


async def reports_failure(scope: Message, receive: Receive, send: Send) -> None:
    """Answers with a traceback, as Starlette does, and does not raise."""
    await receive()
    message: dict[str, Any] = {"type": "lifespan.startup.failed"}
    await send(message | {"message": "Traceback (most recent call last):\n  File …\nKeyError: 'database'"})
