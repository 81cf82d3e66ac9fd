"""Background work: every task has a name, a supervisor, and an end that somebody awaits."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, Final

import structlog

log = structlog.get_logger(__name__)

FIRST_PAUSE_S: Final = 0.05
LONGEST_PAUSE_S: Final = 5.0
CLOSE_S: Final = 10.0


class Supervisor:
    """Owns the background tasks of one node.

    `keep` runs a task for ever: a crash is logged, counted, shown in readiness (`failing`) and followed by a restart
    with back-off. `spawn` runs one once. `aclose` cancels all and awaits their end.
    """

    def __init__(self, on_restart: Callable[[str], None] = lambda name: None) -> None:
        self._tasks: set[asyncio.Task[None]] = set()
        self._on_restart = on_restart
        self._closed = False
        self.restarts: Counter[str] = Counter()
        self.failing: dict[str, str] = {}

    def keep(self, name: str, run: Callable[[], Awaitable[None]]) -> asyncio.Task[None]:
        """Run `run()` until cancelled, again and again. Returning is a crash too, unless cancelled."""
        return self._start(name, self._kept(name, run))

    def spawn(self, name: str, work: Coroutine[Any, Any, Any]) -> asyncio.Task[None]:
        """Run `work` once; an exception is logged and counted, never lost."""
        task = self._start(name, self._once(name, work))
        # A task that is cancelled before its first step has not touched `work`; Python would complain of that.
        task.add_done_callback(lambda _: work.close())
        return task

    def _start(self, name: str, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        if self._closed:
            task.cancel()
        return task

    async def _kept(self, name: str, run: Callable[[], Awaitable[None]]) -> None:
        pause = FIRST_PAUSE_S
        while True:
            began = asyncio.get_running_loop().time()
            try:
                await run()
                problem = "it returned"
            except Exception as error:
                problem = f"{type(error).__name__}: {error}"
                log.exception("background task crashed", task=name)
            self.restarts[name] += 1
            self.failing[name] = problem
            self._on_restart(name)
            # A task that ran well for a while starts its back-off anew.
            if asyncio.get_running_loop().time() - began > LONGEST_PAUSE_S:
                pause = FIRST_PAUSE_S
            await asyncio.sleep(pause * random.uniform(0.5, 1.0))
            pause = min(pause * 2, LONGEST_PAUSE_S)
            self.failing.pop(name, None)

    async def _once(self, name: str, work: Coroutine[Any, Any, Any]) -> None:
        try:
            await work
        except Exception:
            self._on_restart(name)
            log.exception("background work failed", task=name)

    async def aclose(self, grace: float = CLOSE_S) -> None:
        """Cancel everything and await its end. Later tasks are cancelled at once.

        Args:
            grace: seconds after which what does not end is abandoned; an agent may swallow every cancellation.
        """
        self._closed = True
        loop, current = asyncio.get_running_loop(), asyncio.current_task()
        deadline = loop.time() + grace
        while tasks := [t for t in self._tasks if t is not current]:
            for task in tasks:
                task.cancel()
            _, left = await asyncio.wait(tasks, timeout=max(deadline - loop.time(), 0.0))
            if left and loop.time() >= deadline:
                log.error("tasks do not end; abandoned", tasks=sorted(t.get_name() for t in left))
                return


async def cancel_and_wait(task: asyncio.Task[Any] | None, grace: float | None = None) -> None:
    """Cancel a task and await its end, whatever that is, for at most `grace` seconds."""
    if task is None or task is asyncio.current_task():
        return
    task.cancel()
    _, left = await asyncio.wait({task}, timeout=grace)
    if left:
        log.error("a cancelled task does not end; abandoned", task=task.get_name())
