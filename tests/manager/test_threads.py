"""Plain functions in threads that are not waited for."""

from __future__ import annotations

import asyncio
import contextvars
import subprocess
import sys
import threading

import pytest

from convener.manager import threads
from convener.manager.threads import run_in_thread
from tests.support.waiting import wait_until

pytestmark = pytest.mark.anyio

_who: contextvars.ContextVar[str] = contextvars.ContextVar("who")


def _fail(error: BaseException) -> None:
    raise error


async def test_what_it_returns_and_raises_comes_back_in_the_callers_context() -> None:
    _who.set("caller")
    assert await run_in_thread(lambda: (_who.get(), threading.current_thread() is threading.main_thread())) == (
        "caller",
        False,
    )
    assert await run_in_thread(int, "ff", base=16) == 255
    with pytest.raises(KeyError, match="lost"):
        await run_in_thread(_fail, KeyError("lost"))
    with pytest.raises(RuntimeError, match="StopIteration"):
        await run_in_thread(_fail, StopIteration())


async def test_a_caller_that_is_cancelled_leaves_the_thread_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "AT_ONCE", 1)
    threads.rooms.pop(asyncio.get_running_loop(), None)
    begun, gate = threading.Event(), threading.Event()

    def hang() -> None:
        begun.set()
        gate.wait(60)

    try:
        hanging = asyncio.create_task(run_in_thread(hang))
        await wait_until(begun.is_set, "it runs")
        hanging.cancel()
        with pytest.raises(asyncio.CancelledError):
            await hanging
        # Its place is taken as long as it runs.
        late = asyncio.create_task(run_in_thread(int, "1"))
        for _ in range(10):
            await asyncio.sleep(0)
        assert not late.done()
        gate.set()
        assert await late == 1
    finally:
        gate.set()
        threads.rooms.pop(asyncio.get_running_loop(), None)


HANGS = """
import asyncio, contextlib, threading
from convener.manager.threads import run_in_thread

async def main():
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(run_in_thread(threading.Event().wait), 0.1)

asyncio.run(main())
print("over")
"""


def test_a_thread_that_hangs_does_not_keep_the_process_from_ending() -> None:
    ended = subprocess.run([sys.executable, "-c", HANGS], capture_output=True, text=True, timeout=60, check=True)
    assert ended.stdout == "over\n"
