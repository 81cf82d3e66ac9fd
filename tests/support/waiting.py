"""Waiting in tests: poll a predicate up to a limit; a test never sleeps for a guessed time.

The limit is only how long a broken system is watched before the test gives up. It is generous, since it costs
nothing when all is well, and scaled by one variable (``TEST_TIME_SCALE``) for slow machines.
"""

from __future__ import annotations

import asyncio
import inspect
import os
import time
from collections.abc import Awaitable, Callable
from typing import Final, TypeVar, cast

T = TypeVar("T")

TIME_SCALE: Final = float(os.environ.get("TEST_TIME_SCALE", "1"))
_FIRST_PAUSE: Final = 0.005
_LONGEST_PAUSE: Final = 0.1


class NotInTimeError(AssertionError):
    """The predicate did not become true within the limit."""


def _failure(what: str, limit: float, last: object, error: Exception | None) -> NotInTimeError:
    seen = f"its last attempt raised {error!r}" if error is not None else f"its last value was {last!r}"
    return NotInTimeError(f"waited {limit:g} s in vain until {what}; {seen}")


async def wait_until(
    predicate: Callable[[], T | Awaitable[T]],
    what: str,
    limit: float = 20,
    *,
    retry_on: type[Exception] | tuple[type[Exception], ...] = (),
) -> T:
    """Poll `predicate`, a plain or an async callable, until its value is true; return that value.

    Args:
        predicate: called again and again; one call that hangs is cut off at the limit too.
        what: the condition in words, for the message: ``"node-2 owns c1"``.
        limit: seconds, before scaling.
        retry_on: exceptions that mean "not yet" (a refused connection); every other one ends the wait.

    Raises:
        NotInTimeError: not true within `limit`; tells the last value or exception.
    """
    limit *= TIME_SCALE
    deadline = time.monotonic() + limit
    pause = _FIRST_PAUSE
    last: object = None
    error: Exception | None = None
    while True:
        try:
            async with asyncio.timeout_at(asyncio.get_running_loop().time() + deadline - time.monotonic()):
                outcome = predicate()
                value = cast("T", await outcome if inspect.isawaitable(outcome) else outcome)
            if value:
                return value
            last, error = value, None
        except retry_on as raised:
            error = raised
        except TimeoutError as raised:
            if time.monotonic() < deadline:
                raise
            error = raised
        if time.monotonic() >= deadline:
            raise _failure(what, limit, last, error)
        await asyncio.sleep(pause)
        pause = min(pause * 1.5, _LONGEST_PAUSE)


def wait_until_sync(
    predicate: Callable[[], T],
    what: str,
    limit: float = 20,
    *,
    retry_on: type[Exception] | tuple[type[Exception], ...] = (),
) -> T:
    """As `wait_until`, for tests of processes that run no event loop."""
    limit *= TIME_SCALE
    deadline = time.monotonic() + limit
    pause = _FIRST_PAUSE
    last: object = None
    error: Exception | None = None
    while True:
        try:
            value = predicate()
            if value:
                return value
            last, error = value, None
        except retry_on as raised:
            error = raised
        if time.monotonic() >= deadline:
            raise _failure(what, limit, last, error)
        time.sleep(pause)
        pause = min(pause * 1.5, _LONGEST_PAUSE)
