"""What happens to the conversations of a buried node (protocol, section 8).

Any node that knows of a burial walks the dead node's hash. Every record ends in one of two ways, and goes only then:
the conversation is *claimed*, if anything is unread or unanswered or it has clients; else it is *disowned*, by one
script that clears the owner and raises the epoch, so that no late CLAIM can match; then slot and record go. It works
without any client connected, and is repeated until the hash is empty (I11, I12).
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Final

import structlog

from convener.core.conversation import is_settled
from convener.core.directory import Record
from convener.core.model import Meta
from convener.core.placement import rendezvous
from convener.errors import ConvenerError, ConversationStopped, NotFound
from convener.manager.clock import boottime
from convener.manager.engine import Engine
from convener.manager.members import Members
from convener.manager.starter import Queued

log = structlog.get_logger(__name__)

AT_ONCE: Final = 64
ANYONE_AFTER_S: Final = 2.0
IDLE_AFTER_S: Final = 0.5
"""Idle conversations wait a moment, so that a node with clients claims what another would disown."""
ROUND_S: Final = 0.25
CHUNK: Final = 256


class Recovery:
    """Walks the hashes of the buried."""

    def __init__(self, engine: Engine, members: Members) -> None:
        self._engine = engine
        self._node = engine.node
        self._members = members
        self._walking: set[str] = set()
        self._limit = asyncio.Semaphore(AT_ONCE)
        members.on_buried.append(self.walk)

    def walk(self, incarnation: str) -> None:
        """Recover what `incarnation` left, in the background, until nothing is left."""
        if incarnation in self._walking or incarnation == self._node.incarnation:
            return
        self._walking.add(incarnation)
        self._node.supervisor.spawn(f"recover {incarnation}", self._walk(incarnation))

    async def _walk(self, incarnation: str) -> None:
        began = boottime()
        life = self._node.incarnation
        try:
            while life == self._node.incarnation and not self._node.draining:
                try:
                    if await self._round(incarnation, began):
                        return
                except ConvenerError as error:
                    log.info("recovery waits", node=incarnation, error=str(error))
                await asyncio.sleep(ROUND_S)
        finally:
            self._walking.discard(incarnation)

    async def _round(self, incarnation: str, began: float) -> bool:
        """Look at every record once. True if none is left."""
        if not self._node.lease.valid():
            return False
        _, records, _ = await self._node.store.node_records(incarnation)
        if not records:
            return await self._node.store.drop_node(incarnation)
        work: list[tuple[bool, Record, Meta | None]] = []
        for start in range(0, len(records), CHUNK):
            chunk = records[start : start + CHUNK]
            heads = await self._node.store.heads([r.conversation_id for r in chunk])
            work += [(not _is_open(m), r, m) for r, m in zip(chunk, heads, strict=True)]
        mine = [item for item in work if self._goes_first(item[1], item[2], boottime() - began)]
        # Open turns first: somebody waits for their answer.
        mine.sort(key=lambda item: (item[0], item[1].conversation_id))
        await asyncio.gather(*(self._guarded(incarnation, record, began) for _, record, _ in mine))
        return False

    def _goes_first(self, record: Record, meta: Meta | None, waited: float) -> bool:
        cid = record.conversation_id
        view = self._engine.views.get(cid)
        if (view is not None and view.feeds) or waited > ANYONE_AFTER_S:
            return True
        live: Sequence[str] = self._members.live() or [self._node.incarnation]
        if rendezvous(cid, live) != self._node.incarnation:
            return False
        return _is_open(meta) or waited > IDLE_AFTER_S or len(live) == 1

    async def _guarded(self, incarnation: str, record: Record, began: float) -> None:
        async with self._limit:
            try:
                if self._node.lease.valid():
                    await self._one(incarnation, record, began)
            except ConvenerError as error:
                log.info(
                    "a conversation is still to be recovered", conversation_id=record.conversation_id, error=str(error)
                )

    async def _one(self, incarnation: str, record: Record, began: float) -> None:
        """Bring one record to its end. Raises `ConvenerError` if that has to be tried again."""
        cid, store = record.conversation_id, self._node.store
        meta = await store.head(cid)
        if meta is not None and meta.owner in self._node.buried:
            if meta.status == "stopping":
                await self._engine.finish_stop(cid, meta.owner)
            elif self._has_work(meta, record):
                if not await self._claim(record, began):
                    return
            elif await store.disown(cid, meta.owner, meta.epoch) != "OK":
                return
        elif meta is not None and not meta.owner and meta.status == "running":
            # A claim of the dead may be on its way: raise the epoch before the record goes.
            if await store.disown(cid, "", meta.epoch) != "OK":
                return
            waits = not is_settled(meta) or await self._was_queued(cid, record.user)
            if waits and not await self._claim(record, began):
                return
        elif meta is not None and (meta.owner == incarnation or self._leads_nowhere(cid, meta.owner)):
            # To be looked at again when that burial is known here too, or that start is done with.
            return
        await self._free_slot(cid, record.user)
        await store.drop_record(incarnation, cid, record.nonce)
        self._engine.records.note(record.user, cid)

    def _leads_nowhere(self, cid: str, owner: str) -> bool:
        return bool(owner) and not self._engine.is_answering(cid, owner)

    def _has_work(self, meta: Meta, record: Record) -> bool:
        view = self._engine.views.get(record.conversation_id)
        keeps = meta.status == "running" and self._node.traits.keeps_running
        # With a question open the head does not say whether the turn did something else besides; the node did.
        acted = meta.asks > 0 and record.status in ("running", "draining")
        return not is_settled(meta) or keeps or acted or (view is not None and bool(view.feeds))

    async def _was_queued(self, cid: str, user: str) -> bool:
        """Whether its start waits in the name of a buried node: nobody tries it any more, and it keeps its place."""
        waiting = await self._node.store.waiting(user) if user else ()
        return any(w.conversation_id == cid and w.incarnation in self._node.buried for w in waiting)

    async def _claim(self, record: Record, began: float) -> bool:
        """Take it over, under the slot that is there. True if somebody alive owns it or looks after it now."""
        cid = record.conversation_id
        try:
            started = await self._engine.starter.take_over(cid, acted=record.status == "running")
        except Queued:
            return True
        except (ConversationStopped, NotFound):
            # Since the head was read: a stop has to be finished, or nothing is there any more. Look again.
            return False
        if started.here:
            self._node.metrics.takeover_duration.observe(boottime() - began)
        return True

    async def _free_slot(self, cid: str, user: str) -> None:
        """Free a slot that names a buried node, if the conversation is unowned now: never before (I6)."""
        if not user:
            return
        slot = await self._node.store.slot(user, cid)
        if slot is None or slot.incarnation not in self._node.buried:
            return
        meta = await self._node.store.head(cid)
        if meta is None or not meta.owner:
            waiting = await self._node.store.unreserve(user, cid, slot.nonce)
            await self._engine.admission.freed(waiting)


def _is_open(meta: Meta | None) -> bool:
    return meta is not None and not is_settled(meta)
