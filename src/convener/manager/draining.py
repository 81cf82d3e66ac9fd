"""Emptying a node: what it owns hibernates or goes on elsewhere (protocol, section 8)."""

from __future__ import annotations

import asyncio
from typing import Final

import structlog

from convener.errors import ConvenerError
from convener.manager.engine import Engine
from convener.manager.runner import Runner

log = structlog.get_logger(__name__)

FINISHING: Final = 0.8
"""The part of a drain's time in which turns may end by themselves; then they are stopped at their next step."""
LET_GO_S: Final = 10.0


async def drain(engine: Engine, timeout: float) -> None:
    """Give up everything that this node owns; nothing new is claimed or begun from now on.

    Args:
        timeout: seconds that turns under way may take; what is left then is cut off, and begun again elsewhere.
    """
    engine.node.draining = True
    await asyncio.gather(*(_let_go(engine, runner, timeout) for runner in list(engine.runners.values())))


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
