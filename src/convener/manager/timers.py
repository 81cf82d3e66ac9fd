"""What is to happen when: alarms of conversations, deadlines of questions (protocol, section 8).

A timer is an entry of one of 16 lists in the store. Each list is polled by one node (rendezvous over the live ones),
and, if it has not done what was due, by every other a few seconds later. What a timer does is done once, however many
nodes try: firing an alarm removes it in the same step of the store, and a question takes one answer. So a timer is
entered before what it stands for and removed after it has happened: a leftover does no harm, and none is lost.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import math
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Final, TypeVar, cast

import structlog

from convener.core.placement import rendezvous
from convener.errors import ConvenerError, InvalidRequest, OwnershipLost, StoreFull, StoreUnavailable
from convener.manager.clock import wall_ms
from convener.store.tables import TIMER_SHARDS

if TYPE_CHECKING:
    from convener.manager.context import NodeContext
    from convener.manager.engine import Engine

log = structlog.get_logger(__name__)

T = TypeVar("T")

ASK_TIMER: Final = "ask/"
"""Prefix of the timer of a question's deadline, and of the message id of its expiry; clients' ids have no slash."""
ALARM_TIMER: Final = "alarm/"
"""Prefix of an alarm's id, which is that of its timer and of its message too."""

POLL_S: Final = 0.5
OTHERS_EVERY: Final = 10
"""Rounds between two looks at the lists of other nodes."""
OTHERS_AFTER_MS: Final = 5000
AT_ONCE: Final = 100
RETRY_S: Final = 0.2
SOON_MS: Final = 5_000
AGAIN_MS: Final = 60_000
UNSET_MS: Final = 60_000
"""How long after its time an alarm may still be set; a turn that has not done that by then is begun again."""
MAX_AHEAD_MS: Final = 100 * 366 * 86_400_000

When = datetime.datetime | datetime.timedelta | float


async def insist(node: NodeContext, step: Callable[[], Awaitable[T]]) -> T:
    """Repeat an idempotent step until the store answers.

    Raises:
        OwnershipLost: this life of the node has ended meanwhile.
        StoreFull: the store has no room for it.
    """
    life = node.incarnation
    while True:
        await node.lease.wait_valid()
        if life != node.incarnation:
            raise OwnershipLost("this life of the node has ended")
        try:
            return await step()
        except StoreFull:
            raise
        except StoreUnavailable as error:
            node.metrics.store_errors.labels(kind=error.wire_code).inc()
            await asyncio.sleep(RETRY_S)


def due_at(when: When) -> int:
    """A time in ms since 1970. Raises `InvalidRequest` for a time without a zone, or more than a century ahead, and
    for what is no time.
    """
    now = wall_ms()
    if isinstance(when, datetime.datetime):
        if when.tzinfo is None:
            raise InvalidRequest("when must have a time zone, as in datetime.now(UTC) + timedelta(hours=1)")
        due = int(when.timestamp() * 1000)
    else:
        seconds = when.total_seconds() if isinstance(when, datetime.timedelta) else when
        is_number = isinstance(cast("object", seconds), int | float) and not isinstance(seconds, bool)
        if not is_number or not math.isfinite(seconds) or abs(seconds) * 1000 > MAX_AHEAD_MS:
            raise InvalidRequest("when must be a time, or how long from now: a timedelta or a number of seconds")
        due = now + int(seconds * 1000)
    if due > now + MAX_AHEAD_MS:
        raise InvalidRequest("when must be at most a hundred years ahead")
    return max(due, 0)


def later() -> int:
    """When to look again at what cannot be done now and is nobody's hurry, in ms since 1970."""
    return wall_ms() + AGAIN_MS


def unset_until(at: int) -> int:
    """`at`, at which an alarm was due that does not say anything, if it may still be about to be set; else 0."""
    return at if wall_ms() - at < UNSET_MS else 0


class Timers:
    """Polls the lists and does what is due.

    Args:
        live: the incarnations among which the lists are shared out.
    """

    def __init__(self, engine: Engine, live: Callable[[], list[str]]) -> None:
        self._engine = engine
        self._node = engine.node
        self._live = live

    async def run(self) -> None:
        """Look for what is due, for ever."""
        turn = 0
        while True:
            await asyncio.sleep(POLL_S)
            turn += 1
            if not self._node.lease.valid() or self._node.draining:
                continue
            live = self._live() or [self._node.incarnation]
            mine = {s for s in range(TIMER_SHARDS) if rendezvous(f"timers {s}", live) == self._node.incarnation}
            shards = range(TIMER_SHARDS) if turn % OTHERS_EVERY == 0 else mine
            try:
                await asyncio.gather(*(self._poll(shard, shard in mine) for shard in shards))
            except ConvenerError as error:
                log.info("timers wait for the store", error=str(error))

    async def _poll(self, shard: int, mine: bool) -> None:
        now = wall_ms()
        for cid, timer_id, at in await self._node.store.due_timers(shard, AT_ONCE):
            # Others look later; a node whose clock is wrong is only early or late with that.
            if mine or now - at > OTHERS_AFTER_MS:
                await self._happen(cid, timer_id, at)

    async def _happen(self, cid: str, timer_id: str, at: int) -> None:
        store = self._node.store
        try:
            if timer_id.startswith(ASK_TIMER):
                again = await self._engine.intents.expire(cid, timer_id.removeprefix(ASK_TIMER), at)
            else:
                again = await self._engine.intents.fire(cid, timer_id, at)
            await (store.set_timer(cid, timer_id, again) if again else store.clear_timer(cid, timer_id))
        except ConvenerError as error:
            log.info("what is due is tried again", conversation_id=cid, timer=timer_id, error=str(error))
            # Moved, so that it does not stand before what can be done.
            with contextlib.suppress(ConvenerError):
                await store.set_timer(cid, timer_id, wall_ms() + SOON_MS)
