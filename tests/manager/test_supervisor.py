"""Background work: what is cancelled before it began leaves nothing behind."""

from __future__ import annotations

import asyncio
import inspect

from convener.manager.supervisor import Supervisor, cancel_and_wait


async def test_work_that_is_cancelled_before_its_first_step_is_closed() -> None:
    supervisor = Supervisor()
    work = asyncio.sleep(0)
    task = supervisor.spawn("never begun", work)
    await cancel_and_wait(task)
    assert inspect.getcoroutinestate(work) == inspect.CORO_CLOSED
    await supervisor.aclose()
