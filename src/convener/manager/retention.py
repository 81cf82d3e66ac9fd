"""Conversations that go: with all they have in the store and in the archive, when they are deleted or when nobody has
used them for longer than `retention`; and what a node left that died while it did this.

ERASE or EXPIRE comes first: from then on nobody can read it. Then the archive, then the lists: as long as the list of
all names a conversation that does not exist, something of it may be left, and the sweep finishes it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection
from typing import TYPE_CHECKING, Final

import structlog

from convener.core.model import Meta
from convener.core.placement import rendezvous
from convener.errors import ArchiveUnavailable, ConvenerError
from convener.manager.archiving import Stop, archive_closed, clear_if_gone, erase_archive, time_of_day
from convener.manager.clock import boottime, wall_ms
from convener.manager.timers import ASK_TIMER
from convener.store.archive import Archive
from convener.store.tables import SHARDS

if TYPE_CHECKING:
    from convener.manager.engine import Engine

log = structlog.get_logger(__name__)

PAGE: Final = 200
PAUSE_S: Final = 0.02
"""Between two pages: it is nobody's hurry."""
ABREAST: Final = 16
"""Stopped conversations that are being archived, or have just been and are tidied up."""
CREATING_S: Final = 60.0
"""A list names a conversation before it exists. After that time it is not being created any more."""


def was_left(activity: int) -> bool:
    """Whether an entry of a list without a conversation is of one that was erased; `activity` is in ms since 1970."""
    return activity < wall_ms() - CREATING_S * 1000


async def clear(engine: Engine, cid: str, user: str, timers: Collection[str] = ()) -> None:
    """What is left to do when a conversation was erased: archive, lists, timers. Raises `StoreUnavailable`.

    An archive that is away is left to the sweep.
    """
    store = engine.node.store
    try:
        await erase_archive(engine.node, cid)
    except ArchiveUnavailable as error:
        log.warning("the archive is cleared later", conversation_id=cid, error=str(error))
        await store.unindex(user, cid)
        await store.index("", cid)
    else:
        await store.unindex(user, cid)
        # The archive takes its time; somebody may have made a new one of that name meanwhile.
        head = await store.head(cid)
        if head is not None:
            await store.index(head.user, cid)
    engine.records.note(user, cid)
    # One that is left over goes when it is due, which may be in years.
    for timer_id in timers:
        await store.clear_timer(cid, timer_id)


class Sweep:
    """Walks the list of all conversations, shared out among the nodes.

    Args:
        live: the incarnations among which it is shared out.
        allowed: whether every node knows of archives.
    """

    def __init__(self, engine: Engine, live: Callable[[], list[str]], allowed: Callable[[], bool]) -> None:
        self._engine = engine
        self._node = engine.node
        self._live = live
        self._missing: dict[str, float] = {}
        self._taken_out: list[str] = []
        self._allowed = allowed
        self._leaving: set[str] = set()
        self._before = 0
        """What has not been used since then is too old, in ms since 1970."""

    async def run(self) -> None:
        """Walk again and again, for ever."""
        while True:
            await asyncio.sleep(self._node.options.sweep_every)
            if not self._node.lease.valid() or self._node.draining:
                continue
            live = self._live() or [self._node.incarnation]
            try:
                await self._look_again()
                retention = self._node.options.retention
                if retention is not None:
                    self._before = await time_of_day(self._node) - round(retention * 1000)
                for shard in range(SHARDS):
                    if rendezvous(f"sweep {shard}", live) == self._node.incarnation:
                        await self._walk(shard)
            except ConvenerError as error:
                log.info("the sweep waits", error=str(error))

    async def _walk(self, shard: int) -> None:
        store, after = self._node.store, ""
        while page := await store.list_all(shard, after, PAGE):
            for cid, head in zip(page, await store.heads(page), strict=True):
                if head is None:
                    await self._leftover(cid)
                    continue
                self._missing.pop(cid, None)
                if self._is_old(head):
                    await self._expire(cid, head)
                elif self._may_leave(head):
                    self._archive_closed(cid, head)
            after = page[-1]
            await asyncio.sleep(PAUSE_S)

    def _is_old(self, head: Meta) -> bool:
        return not head.owner and head.updated <= self._before

    def _may_leave(self, head: Meta) -> bool:
        """Whether it is stopped for so long that no fail-over takes that back, and not archived yet."""
        since = wall_ms() - head.updated
        return head.status == "stopped" and head.archived < head.seq and since > self._node.options.lease_ttl * 1000

    def _archive_closed(self, cid: str, head: Meta) -> None:
        archive = self._node.logs.archive
        if archive is not None and len(self._leaving) < ABREAST and cid not in self._leaving and self._allowed():
            self._leaving.add(cid)
            self._node.supervisor.spawn(f"archive {cid}", self._leave(archive, cid, head))

    async def _leave(self, archive: Archive, cid: str, head: Meta) -> None:
        try:
            await archive_closed(self._node, archive, cid, head)
        except Stop as reason:
            log.info("it is not archived", conversation_id=cid, reason=str(reason))
            await clear_if_gone(self._node, cid, head.generation)
        except ConvenerError as error:
            kind = "archive" if isinstance(error, ArchiveUnavailable) else "store"
            self._node.metrics.archive_failures.labels(kind=kind).inc()
            log.warning("archiving is put off", conversation_id=cid, error=str(error))
            await clear_if_gone(self._node, cid, head.generation)
        finally:
            self._leaving.discard(cid)

    async def _expire(self, cid: str, head: Meta) -> None:
        store = self._node.store
        timers = [*await store.alarms(cid), *(f"{ASK_TIMER}{ask_id}" for ask_id in await store.asks(cid))]
        if await store.expire(cid, self._before) == "OK":
            log.info("nobody has used it for long; erased", conversation_id=cid, updated=head.updated)
            await clear(self._engine, cid, head.user, timers)

    async def _leftover(self, cid: str) -> None:
        """Listed, and not there: it is being created, or was erased by a node that did not finish."""
        now = boottime()
        if now - self._missing.setdefault(cid, now) < CREATING_S:
            return
        store = self._node.store
        try:
            await erase_archive(self._node, cid)
        except ArchiveUnavailable as error:
            log.info("the archive is cleared later", conversation_id=cid, error=str(error))
            return
        if await store.head(cid) is None:
            del self._missing[cid]
            await store.unindex("", cid)
            self._taken_out.append(cid)

    async def _look_again(self) -> None:
        """One that was created just when it was taken off the list is listed again."""
        taken_out, self._taken_out = self._taken_out, []
        for cid in taken_out:
            head = await self._node.store.head(cid)
            if head is not None:
                await self._node.store.index(head.user, cid)
