"""Emptying a node: what it owns hibernates or goes on elsewhere (protocol, section 8)."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Final

import structlog

from convener.errors import ConvenerError
from convener.manager.clock import wall_ms
from convener.manager.engine import Engine
from convener.manager.runner import Runner

log = structlog.get_logger(__name__)

FINISHING: Final = 0.8
"""The part of a drain's time in which turns may end by themselves; then they are stopped at their next step."""
LET_GO_S: Final = 10.0


class Drain:
    """The end of one node's work. Asked for again, it is the same drain.

    Attributes:
        farewell: what is done once the node owns nothing: its clients are sent away.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._task: asyncio.Task[None] | None = None
        self.deadline: int | None = None
        """When turns under way are cut off, ms since 1970; None if the node does not leave."""
        self.farewell: Callable[[], Awaitable[None]] | None = None

    @property
    def remaining(self) -> int:
        """Conversations that are still here."""
        return len(self._engine.runners)

    @property
    def done(self) -> bool:
        """Whether the node owns nothing any more and never will."""
        return self._task is not None and self._task.done()

    def begin(self, timeout: float) -> None:
        """Drain in the background. Nothing new is claimed or begun from now on."""
        if self._task is None:
            node = self._engine.node
            node.draining = True
            self.deadline = wall_ms() + round(timeout * 1000)
            node.metrics.drain_remaining_conversations.set(self.remaining)
            log.info("draining", node=node.incarnation, conversations=self.remaining, seconds=timeout)
            self._task = node.supervisor.spawn("drain", self._run(timeout))

    async def run(self, timeout: float) -> None:
        """Give up everything that this node owns, and return when that is done.

        Args:
            timeout: seconds that turns under way may take; what is left then is cut off, and begun again elsewhere.
        """
        self.begin(timeout)
        assert self._task is not None
        await asyncio.wait({self._task})
        # Nothing is left, unless there was no time: then recovery by another node makes it go on.
        await asyncio.gather(*(runner.close() for runner in list(self._engine.runners.values())))

    def hurry(self) -> None:
        """Give up what is left at once, as a crash would."""
        if self._task is not None:
            self._task.cancel()

    async def _run(self, timeout: float) -> None:
        gauge = self._engine.node.metrics.drain_remaining_conversations
        lets = [self._let_go(runner, timeout) for runner in list(self._engine.runners.values())]
        for let in asyncio.as_completed(lets):
            await let
            gauge.set(self.remaining)
        if self.farewell is not None:
            await self.farewell()

    async def _let_go(self, runner: Runner, timeout: float) -> None:
        try:
            await _let_go(self._engine, runner, timeout)
        except ConvenerError:
            # Recovery by another node makes it go on when this one is gone.
            log.exception("a conversation could not be given up", conversation_id=runner.cid)


async def _let_go(engine: Engine, runner: Runner, timeout: float) -> None:
    """Hibernate it when it is idle; else another node goes on with it, from a step boundary if it has come to one."""
    if engine.node.lease.valid():
        await runner.finish_turn(timeout * FINISHING)
        if runner.acting:
            runner.stop_at_step()
            await runner.finish_turn(timeout * (1 - FINISHING))
        try:
            async with asyncio.timeout(LET_GO_S):
                released = not engine.node.traits.keeps_running and await runner.hibernate()
                if released or await _hand_over(engine, runner):
                    await runner.wait_ended()
                    return
        except TimeoutError:
            log.warning("could not be given up in time", conversation_id=runner.cid)
    # Not released: recovery by another node makes it go on.
    await runner.close()


async def _hand_over(engine: Engine, runner: Runner) -> bool:
    if engine.elsewhere is None:
        return False
    try:
        return await engine.elsewhere.hand_over(runner)
    except ConvenerError as error:
        log.info("not handed over", conversation_id=runner.cid, error=str(error))
        return False
