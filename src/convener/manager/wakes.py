"""That somebody looks into the inbox after something was put there (I11).

Who puts something into the inbox wakes the conversation before it acknowledges. What it cannot make sure of (an unknown
outcome, a start that failed) is tried again here, whether or not the sender does so.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, TypeVar

import structlog

from convener.core.conversation import is_settled
from convener.core.model import ClaimReason, NewMessage, SendReply
from convener.errors import (
    ConvenerError,
    ConversationStopped,
    LimitExceeded,
    OwnershipLost,
    OwnerUnavailable,
    StoreFull,
    StoreUnavailable,
)
from convener.manager.starter import Queued

if TYPE_CHECKING:
    from convener.manager.engine import Engine

log = structlog.get_logger(__name__)

T = TypeVar("T")

OWED_S: Final = 0.5


@dataclass(eq=False, frozen=True, slots=True)
class _Owed:
    """Why somebody is to look; each with an identity of its own."""

    reason: ClaimReason


class Wakes:
    """Makes somebody own what something was sent to, for one node."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._node = engine.node
        self._owed: dict[str, _Owed] = {}

    @property
    def owed(self) -> int:
        """Conversations that are still to be looked at."""
        return len(self._owed)

    async def owing(self, cid: str, put: Awaitable[T], reason: ClaimReason = "wake") -> T:
        """Await a step after which somebody must be made to look into the inbox. If its outcome is unknown it may be
        done all the same, and is looked after.
        """
        try:
            return await put
        except StoreUnavailable as error:
            self._node.metrics.store_errors.labels(kind=error.wire_code).inc()
            if not isinstance(error, StoreFull):
                self._owe(cid, reason)
            raise
        except asyncio.CancelledError:
            self._owe(cid, reason)
            raise

    def _owe(self, cid: str, reason: ClaimReason) -> None:
        held = self._owed.get(cid)
        # A message may be refused for want of a slot, what people want of a turn may not: that goes before.
        self._owed[cid] = _Owed(reason if held is None or held.reason == "wake" else held.reason)

    async def make_answered(self, cid: str, message: NewMessage, reply: SendReply, reason: ClaimReason) -> None:
        """Make sure that somebody answers what was put into the inbox. Raises as `ConversationManager` says."""
        try:
            await self.make_owned(cid, reply.owner, reason)
        except LimitExceeded:
            # Only who appended it may take it back: a repeated one may have been acknowledged already.
            if reply.outcome != "OK" or await self._node.store.unsend(cid, message.message_id, reply.position) == "OK":
                raise

    async def make_owned(self, cid: str, owner: str, reason: ClaimReason) -> None:
        """Make sure that somebody looks into the inbox, if `owner` will not. Raises as a start."""
        if self._engine.is_answering(cid, owner):
            return
        try:
            await self._engine.starter.ensure(cid, reason)
        except Queued:
            return
        except ConversationStopped:
            # Stopped between the step and now: the stop has taken what was put in into the log and given it up.
            return
        except LimitExceeded:
            if reason == "wake":
                raise
            # The start that was joined was one of a message.
            self._owe(cid, reason)
        except (StoreUnavailable, OwnerUnavailable, OwnershipLost, asyncio.CancelledError):
            # Not acknowledged, but stored: it must not lie there until somebody happens to come by.
            self._owe(cid, reason)
            raise

    async def run(self) -> None:
        """Wake what could not be woken when its message was stored: the sender was told to try again, and may not."""
        while True:
            await asyncio.sleep(OWED_S)
            for cid, owed in list(self._owed.items()):
                # What is owed anew meanwhile stays.
                if await self._is_done(cid, owed.reason) and self._owed.get(cid) is owed:
                    del self._owed[cid]

    async def _is_done(self, cid: str, reason: ClaimReason) -> bool:
        """Try again. False if that has to be repeated."""
        try:
            await self.wake_if_owed(cid, reason)
        except Queued:
            return True
        except ConvenerError as error:
            log.info("what was stored is not answered now", conversation_id=cid, error=str(error))
            again = isinstance(error, StoreUnavailable | OwnerUnavailable | OwnershipLost)
            return not (again or (reason != "wake" and isinstance(error, LimitExceeded)))
        return True

    async def wake_if_owed(self, cid: str, reason: ClaimReason) -> None:
        """Start a conversation in which something is unanswered and nobody is about to answer. Raises as a start."""
        meta = await self._node.store.head(cid)
        if meta is not None and not is_settled(meta) and not self._engine.is_answering(cid, meta.owner):
            await self._engine.starter.ensure(cid, reason)
