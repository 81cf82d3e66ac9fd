"""What a start does when the user's limit is met: look for slots left behind, then the policy (protocol, section 5).

A slot may be freed from outside only when its conversation is unowned and the node it names is buried or has no
record of it: the record is written before RESERVE and removed after UNRESERVE, so without one nobody is about to
use the slot. Freeing is by nonce, so a slot that was taken anew meanwhile stays (I6).
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Mapping
from typing import Final, cast

import structlog

from convener.core.admission import Slot, Waiting
from convener.core.model import ClaimReason
from convener.errors import ConvenerError, ConversationStopped, LimitExceeded, NotFound, StoreFull
from convener.ids import new_nonce
from convener.manager.context import NodeContext
from convener.manager.records import Records
from convener.manager.starter import Queued

log = structlog.get_logger(__name__)

RETRY_S: Final = 5.0

Hibernate = Callable[[str, str], Awaitable[bool]]
"""Ask the owner (an incarnation) to hibernate a conversation if it is idle; True if its slot is free."""


class Admission:
    """Makes room by the policy, and looks after the starts that wait in this node's name."""

    def __init__(self, node: NodeContext, records: Records, hibernate: Hibernate) -> None:
        self._node = node
        self._records = records
        self._hibernate = hibernate
        self._waiting: dict[str, tuple[str, str, ClaimReason]] = {}
        self.start: Callable[[str, ClaimReason], Awaitable[object]] | None = None
        self.poke: Callable[[Waiting], Awaitable[None]] | None = None

    async def limit_of(self, user: str) -> int:
        """The user's limit as people say it: how many may run."""
        own = await self._node.agent.limit(user)
        return self._node.options.raised_limit - 1 if own is None else own

    async def make_room(self, user: str, cid: str, reason: ClaimReason, attempt: int) -> None:
        """See `Starts.make_room`."""
        slots = await self._node.store.slots(user)
        if attempt == 1:
            await self._adopt_orphans(user)
            if await self._free_stale(user, slots):
                return
        policy = self._node.options.limit_policy
        limit = await self.limit_of(user)
        # Others may take what was freed; a few more tries than there are slots, then it is really full.
        if attempt <= 2 * limit + 2 and await self._evict(user, cid, slots, only_waiting=policy != "evict_idle"):
            return
        self._node.metrics.limit_rejections.labels(policy=policy).inc()
        # Only a start and a message's wake can be refused without losing anything.
        refusable = reason == "start" or (reason == "wake" and policy == "reject")
        waits = policy == "queue" or not refusable
        if waits and await self._enqueue(user, cid, reason):
            raise Queued(f"{len(slots)} of {limit} conversations are running; this one waits for its turn")
        raise LimitExceeded(limit=limit, running=sorted(c for c in slots if c != cid))

    async def _free_stale(self, user: str, slots: Mapping[str, Slot]) -> bool:
        freed = False
        for cid, slot in slots.items():
            meta = await self._node.store.head(cid)
            if meta is not None and meta.owner:
                continue
            if slot.incarnation not in self._node.buried:
                record = await self._node.store.record(slot.incarnation, cid)
                if record is not None:
                    continue
            log.info("a slot was left behind; freed", conversation_id=cid, user_id=user, node=slot.incarnation)
            await self._node.store.unreserve(user, cid, slot.nonce)
            freed = True
        return freed

    async def _evict(self, user: str, cid: str, slots: Mapping[str, Slot], only_waiting: bool) -> bool:
        """Hibernate the user's longest idle conversation; never a working one, never the newcomer.

        One that waits for a person does not count: it makes room whatever the policy (`only_waiting`).
        """
        others = [other for other in slots if other != cid]
        # From the heads: the directory is a moment behind, and would name one that works, or pass one that is idle.
        heads = zip(others, await self._node.store.heads(others), strict=True)
        idle = [
            (not m.asks, m.updated, other, m.owner)
            for other, m in heads
            if m is not None
            and m.owner
            and ((m.position == m.done and not only_waiting) or (m.asks and m.cursor == m.position))
        ]
        for _, _, other, incarnation in sorted(idle):
            if await self._hibernate(other, incarnation):
                log.info("idle conversation hibernated for a new one", conversation_id=other, user_id=user)
                return True
        # Nothing was idle; but what was working may have ended its slot meanwhile.
        return len(await self._node.store.slots(user)) < len(slots)

    # -- waiting starts ----------------------------------------------------------------------------------------

    async def _enqueue(self, user: str, cid: str, reason: ClaimReason) -> bool:
        """Enter the user's queue in this node's name. The record lets recovery find the entry if this node dies."""
        held = user, new_nonce(), reason
        # Known before it is made: an entry whose reply is lost would hold everybody up that comes after it.
        self._waiting[cid] = held
        await self._records.begin(cid, user, 0, held[1])
        try:
            if await self._node.store.enqueue(user, cid, self._node.incarnation, reason):
                return True
        except StoreFull:
            await self._leave(cid, held)
            raise
        await self._leave(cid, held)
        return False

    async def _leave(self, cid: str, held: tuple[str, str, ClaimReason]) -> None:
        """The start waits no more: its record goes."""
        await self._records.end(cid, held[1], self._node.incarnation, "hibernated")
        if self._waiting.get(cid) == held:
            del self._waiting[cid]

    async def keep(self, cid: str, nonce: str) -> bool:
        """Put a waiting start's record in the place of the one under `nonce`. False if `cid` does not wait here."""
        held, record = self._waiting.get(cid), self._records.held(cid)
        if held is None or record is None or record.nonce != nonce:
            return False
        await self._records.begin(cid, held[0], 0, held[1])
        return True

    async def _adopt_orphans(self, user: str) -> None:
        """Look after entries of the buried that recovery did not find: nobody else lets those behind them pass."""
        for entry in await self._node.store.waiting(user):
            if entry.incarnation not in self._node.buried:
                continue
            record = self._records.held(entry.conversation_id)
            if record is None:
                await self._enqueue(user, entry.conversation_id, cast("ClaimReason", entry.reason))
            elif record.status != "starting":
                await self._node.store.dequeue(user, entry.conversation_id)

    def started(self, cid: str) -> None:
        """The conversation runs here; RESERVE has taken it out of the queue."""
        self._waiting.pop(cid, None)

    async def freed(self, waiting: Waiting | None) -> None:
        """A slot was given back: let the longest waiting start try."""
        if waiting is None:
            return
        if waiting.incarnation == self._node.incarnation:
            self._node.supervisor.spawn(f"queued start {waiting.conversation_id}", self.retry(waiting.conversation_id))
        elif self.poke is not None:
            await self.poke(waiting)

    async def retry(self, cid: str) -> None:
        """Try a waiting start of this node again."""
        held = self._waiting.get(cid)
        if held is None or self.start is None:
            return
        try:
            with contextlib.suppress(NotFound, ConversationStopped):
                await self.start(cid, held[2])
            # The entry is still there if another node made the start before this one entered the queue.
            await self._node.store.dequeue(held[0], cid)
            await self._leave(cid, held)
        except ConvenerError as error:
            log.info("a start waits on", conversation_id=cid, error=str(error))

    async def run(self) -> None:
        """Try this node's waiting starts every 5 s: what freed a slot may have died before it told anybody."""
        while True:
            await asyncio.sleep(RETRY_S)
            for cid in list(self._waiting):
                await self.retry(cid)

    def new_life(self) -> None:
        """A new incarnation: recovery takes the old one's entries over."""
        self._waiting.clear()
