"""Plain functions of the application, each in a thread that does not keep the process from ending.

The event loop's own threads are waited for at its end, however long they take: a node whose agent hangs in one would
not end, long after it has given everything up. Nobody can cut a thread off; but it may be left behind.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import threading
from collections.abc import Callable
from typing import Final, ParamSpec, TypeVar, cast
from weakref import WeakKeyDictionary

P = ParamSpec("P")
T = TypeVar("T")

AT_ONCE: Final = 256
"""Threads of one event loop at a time; further functions wait for one."""

rooms: WeakKeyDictionary[asyncio.AbstractEventLoop, asyncio.Semaphore] = WeakKeyDictionary()


async def run_in_thread(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Call a function in a thread of its own, in the caller's context, and return or raise what it does.

    If the caller is cancelled the thread goes on, and nobody hears of its end.
    """
    loop = asyncio.get_running_loop()
    room = rooms.setdefault(loop, asyncio.Semaphore(AT_ONCE))
    await room.acquire()
    outcome: asyncio.Future[T] = loop.create_future()
    context = contextvars.copy_context()

    def settle(result: T | None, error: BaseException | None) -> None:
        room.release()
        if outcome.done():
            return
        if error is None:
            outcome.set_result(cast("T", result))
        elif isinstance(error, StopIteration):
            # A coroutine cannot raise it.
            outcome.set_exception(RuntimeError(f"{function!r} raised StopIteration"))
        else:
            outcome.set_exception(error)

    def run() -> None:
        result: T | None = None
        failure: BaseException | None = None
        try:
            result = context.run(function, *args, **kwargs)
        except BaseException as error:  # it is raised where it was asked for
            failure = error
        # Nobody waits any more when the loop is closed.
        with contextlib.suppress(RuntimeError):
            loop.call_soon_threadsafe(settle, result, failure)

    try:
        threading.Thread(target=run, name=f"convener {getattr(function, '__name__', 'function')}", daemon=True).start()
    except BaseException:
        room.release()
        raise
    return await outcome
