"""Emptying a node: what it owns hibernates or goes on elsewhere (protocol, section 8).

In this order: nothing new is begun or claimed; what is idle hibernates; a turn under way may end, then goes no further
than its next step, then is cut off; what is not done is handed over. Clients are sent away as soon as their
conversation is not here any more. Then the node buries itself, so that others recover at once what it could not give
up, if anything.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Final

import structlog

from convener.errors import ConvenerError, OwnershipLost
from convener.manager.clock import boottime, wall_ms
from convener.manager.engine import Engine
from convener.manager.runner import Runner
from convener.manager.supervisor import cancel_and_wait

log = structlog.get_logger(__name__)

Stays = Callable[[str], bool]
"""Whether a conversation is still on this node."""
Farewell = Callable[[Stays], Awaitable[None]]

FINISHING: Final = 0.8
"""The part of a drain's time in which turns may end by themselves; then they are stopped at their next step."""
LET_GO_S: Final = 10.0
"""Time beyond that for giving up what was cut off."""
AWAY_S: Final = 5.0
"""How long a drain waits for a store that is away: without it nothing can be given up, and a crash loses nothing."""
FAREWELL_S: Final = 10.0
AT_ONCE: Final = 32
"""Conversations that are handed over at a time."""
LOOK_S: Final = 0.05
AGAIN_S: Final = 0.25


class Drain:
    """The end of one node's work. Asked for again, it is the same drain.

    Attributes:
        farewell: sends this node's clients away as their conversations leave; None if it has no clients.
        bury: tells the other nodes that this one is over.
        others_wait: how many requests of other nodes are worked on here; they may end within the drain's time.
    """

    def __init__(self, engine: Engine, bury: Callable[[], Awaitable[None]]) -> None:
        self._engine = engine
        self._task: asyncio.Task[None] | None = None
        self._letting_go: dict[Runner, asyncio.Task[None]] = {}
        self._handing_over = asyncio.Semaphore(AT_ONCE)
        self._end = 0.0
        self._hurried = False
        self.deadline: int | None = None
        """When turns under way are cut off, ms since 1970; None if the node does not leave."""
        self.farewell: Farewell | None = None
        self.bury = bury
        self.others_wait: Callable[[], int] = lambda: 0

    @property
    def remaining(self) -> int:
        """Conversations that are still here."""
        return len(self._engine.held())

    @property
    def done(self) -> bool:
        """Whether the node owns nothing any more and never will."""
        return self._task is not None and self._task.done()

    def begin(self, timeout: float) -> None:
        """Drain in the background. Nothing new is claimed or begun from now on."""
        if self._task is None:
            node = self._engine.node
            node.draining = True
            self._end = boottime() + timeout
            self.deadline = wall_ms() + round(timeout * 1000)
            node.metrics.drain_remaining_conversations.set(self.remaining)
            log.info("draining", node=node.incarnation, conversations=self.remaining, seconds=timeout)
            self._task = node.supervisor.spawn("drain", self._run(timeout))

    async def run(self, timeout: float) -> None:
        """Give up everything that this node owns, and return when that is done.

        Args:
            timeout: seconds that turns under way may take; what is left then is cut off, and begun again elsewhere.
        """
        if not self._hurried:
            self.begin(timeout)
        if self._task is not None:
            await asyncio.wait({self._task})

    def hurry(self) -> None:
        """Give up what is left at once, as a crash would."""
        self._hurried = True
        self._engine.node.draining = True
        if self._task is not None:
            self._task.cancel()

    async def _run(self, timeout: float) -> None:
        farewell: asyncio.Task[None] | None = None
        if self.farewell is not None:
            # In a task of its own: how long clients take must not hold conversations up.
            work = self.farewell(self._engine.is_held)
            farewell = self._engine.node.supervisor.spawn("farewell", _awaited(work))
        try:
            await self._empty(timeout)
            await self.leave_behind()
            if farewell is not None:
                await asyncio.wait({farewell}, timeout=FAREWELL_S)
            await self.bury()
        finally:
            await cancel_and_wait(farewell)
        log.info("drained", node=self._engine.node.incarnation)

    # -- conversations ---------------------------------------------------------------------------------------------

    async def _empty(self, timeout: float) -> None:
        """Let go of everything, also of what starts that were under way still bring."""
        gauge = self._engine.node.metrics.drain_remaining_conversations
        last = self._end + LET_GO_S
        try:
            while self._is_working() and boottime() < last:
                for runner in self._engine.runners.values():
                    if runner not in self._letting_go:
                        work = self._let_go(runner, timeout)
                        self._letting_go[runner] = self._engine.node.supervisor.spawn(f"let go {runner.cid}", work)
                gauge.set(self.remaining)
                under_way = [task for task in self._letting_go.values() if not task.done()]
                if under_way:
                    await asyncio.wait(under_way, timeout=LOOK_S)
                else:
                    await asyncio.sleep(LOOK_S)
        finally:
            await asyncio.gather(*(cancel_and_wait(task) for task in self._letting_go.values()))
        gauge.set(self.remaining)

    def _is_working(self) -> bool:
        """Whether there is something that leaves, or ends, before the node does."""
        if any(not task.done() for task in self._letting_go.values()):
            return True
        if any(runner not in self._letting_go for runner in self._engine.runners.values()):
            return True
        if self._engine.starter.claiming:
            return True
        if self._engine.nowhere_to_go():
            return False
        if any(cid not in self._engine.runners for cid in self._engine.held()):
            return True
        return boottime() < self._end and bool(self._engine.wakes.owed or self.others_wait())

    async def _let_go(self, runner: Runner, timeout: float) -> None:
        """Hibernate it when it is idle; else another node goes on with it, from a step boundary if it has come to one.
        Returns when it is not here any more, or cannot leave: recovery by another node makes it go on then.
        """
        try:
            await self._finish(runner, timeout)
            while await self._try_to_let_go(runner) and boottime() < self._end + LET_GO_S:  # noqa: ASYNC110
                await asyncio.sleep(AGAIN_S)
            if runner.over:
                await runner.wait_gone()
        except OwnershipLost:
            log.warning("cannot be given up without the store", conversation_id=runner.cid)

    async def _finish(self, runner: Runner, timeout: float) -> None:
        """Let a turn under way end, or come to a step."""
        await runner.finish_turn(self._end - (1 - FINISHING) * timeout)
        if runner.acting:
            log.info("its turn may go to its next step", conversation_id=runner.cid)
            runner.stop_at_step()
            await runner.finish_turn(self._end)

    async def _try_to_let_go(self, runner: Runner) -> bool:
        """Once. True if it is worth trying again. Raises `OwnershipLost` if this node may not act any more."""
        engine = self._engine
        await engine.node.lease.wait_valid(AWAY_S)
        try:
            if runner.over or (not engine.node.traits.keeps_running and await runner.hibernate()):
                return False
            if engine.elsewhere is None or engine.nowhere_to_go():
                return False
            async with self._handing_over:
                return not await engine.elsewhere.hand_over(runner)
        except ConvenerError as error:
            log.info("not handed over", conversation_id=runner.cid, error=str(error))
            # What has ended meanwhile is owned anew, or is not to be; that is looked after elsewhere.
            return not runner.over

    async def leave_behind(self) -> None:
        """What could not be given up is recovered by another node, at once: its turns are ended before that is said."""
        left = list(self._engine.runners.values())
        if not self._engine.held():
            return
        log.warning("left to recovery", node=self._engine.node.incarnation, conversations=sorted(self._engine.held()))
        acted = [runner for runner in left if runner.status == "running"]
        await asyncio.gather(*(runner.close() for runner in left))
        for runner in acted:
            # Ended on purpose: that is no strike against the turn.
            self._engine.records.update(runner, "draining")
        await self.bury()


async def _awaited(work: Awaitable[None]) -> None:
    await work
