"""Old log entries on their way out of the store, in the background (protocol, section 6, "Retention").

The owner of a conversation does it, and nobody else: segment, then manifest, then ARCHIVED, which is fenced and makes
that manifest the one that counts, and trims the log. Wherever a node dies between these, the next owner goes on from
the manifest that counts; what it does not list is cleared away. An archive that is away delays this and nothing else.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

import structlog

from convener.core.cursor import Cursor
from convener.core.model import LogEntry, Meta
from convener.core.retention import ArchivedRequest
from convener.core.view import Place
from convener.errors import ArchiveUnavailable, ConvenerError
from convener.manager.clock import boottime, wall_ms
from convener.store.archive import Archive, Manifest, Segment

if TYPE_CHECKING:
    from convener.manager.engine import Engine
    from convener.manager.runner import Runner

log = structlog.get_logger(__name__)

SEGMENT_ENTRIES: Final = 1000
SEGMENT_BYTES: Final = 1 << 20
"""Characters of events in a segment: it ends with the entry that reaches them."""
ENOUGH: Final = 256
"""So many entries, or `SEGMENT_BYTES` of them, are worth a segment."""
WINDOW: Final = 256
"""Archived entries that the store keeps, if they have no more than `SEGMENT_BYTES`: clients that come back read them
from there."""
PAGE: Final = 64
ABREAST: Final = 4
"""Conversations that are archived at once."""
RUBBISH_S: Final = 60.0
"""How long a manifest that does not count any more, and what it alone lists, stays: for readers that have just been
told of it, and for a fail-over that loses ARCHIVED."""
LONGEST_PAUSE_S: Final = 300.0
AGE_CHECK_S: Final = 3600.0


class Stop(Exception):
    """This conversation cannot be archived further by this owner, or not now."""


@dataclass(slots=True)
class _Progress:
    """What this node knows of the archiving of a conversation under one epoch."""

    epoch: int
    since: float
    archived: int = -1
    """The mark; -1 before it was read."""
    marks: deque[tuple[float, int]] = field(default_factory=deque[tuple[float, int]])
    size: int = 0
    """Characters of the entries above the mark, up to `volume` of the view."""
    volume: int = 0
    rubbish: list[tuple[float, str]] = field(default_factory=list[tuple[float, str]])
    tidied: bool = False
    aged: float = 0.0
    failures: int = 0
    not_before: float = 0.0

    def old(self, now: float, seq: int, age: float) -> int:
        """Note the last number as it is now; the last one that was there `age` seconds ago."""
        if not self.marks or self.marks[-1][1] != seq:
            self.marks.append((now, seq))
        while len(self.marks) > 1 and self.marks[1][0] <= now - age:
            self.marks.popleft()
        at, found = self.marks[0]
        return found if at <= now - age else 0


class Archiving:
    """The node's background work.

    Args:
        allowed: whether every node knows of archives.
    """

    def __init__(self, engine: Engine, archive: Archive, allowed: Callable[[], bool]) -> None:
        self._engine = engine
        self._node = engine.node
        self._archive = archive
        self._allowed = allowed
        self._progress: dict[str, _Progress] = {}
        self._busy: set[str] = set()
        self._limit = asyncio.Semaphore(ABREAST)

    async def run(self) -> None:
        """Look at every owned conversation, again and again, for ever."""
        pause = self._node.options.archive_every
        while True:
            await asyncio.sleep(pause)
            runners = self._engine.runners
            for cid in [cid for cid in self._progress if cid not in runners]:
                del self._progress[cid]
            if self._node.lease.valid() and self._allowed():
                for runner in list(runners.values()):
                    self._look_at(runner)

    def _look_at(self, runner: Runner) -> None:
        now = boottime()
        progress = self._progress.get(runner.cid)
        if progress is None or progress.epoch != runner.epoch:
            progress = self._progress[runner.cid] = _Progress(runner.epoch, now)
        old = progress.old(now, runner.view.place.seq, self._node.options.lease_ttl)
        if runner.cid in self._busy or now < progress.not_before:
            return
        if self._is_due(runner, progress, old, now):
            self._busy.add(runner.cid)
            self._node.supervisor.spawn(f"archive {runner.cid}", self._archive_one(runner, progress, old))

    def _is_due(self, runner: Runner, progress: _Progress, old: int, now: float) -> bool:
        if progress.archived < 0:
            return old > 0
        if old - progress.archived >= ENOUGH:
            return True
        if old > progress.archived and progress.size + runner.view.volume - progress.volume >= SEGMENT_BYTES:
            return True
        if progress.archived == 0:
            return False
        if not progress.tidied or progress.rubbish:
            return now - (progress.rubbish[0][0] if progress.rubbish else progress.since) > self._rubbish_s
        return self._node.options.retention is not None and now - progress.aged > AGE_CHECK_S

    @property
    def _rubbish_s(self) -> float:
        return max(RUBBISH_S, 2 * self._node.options.lease_ttl)

    async def _archive_one(self, runner: Runner, progress: _Progress, old: int) -> None:
        try:
            async with self._limit:
                await _Job(self._engine, self._archive, runner, progress, self._rubbish_s).run(old)
            progress.failures = 0
        except Stop as reason:
            log.info("nothing more is archived for now", conversation_id=runner.cid, reason=str(reason))
            self._put_off(progress)
        except ConvenerError as error:
            kind = "archive" if isinstance(error, ArchiveUnavailable) else "store"
            self._node.metrics.archive_failures.labels(kind=kind).inc()
            log.warning("archiving is put off", conversation_id=runner.cid, error=str(error))
            self._put_off(progress)
        finally:
            self._busy.discard(runner.cid)

    def _put_off(self, progress: _Progress) -> None:
        progress.failures += 1
        pause = self._node.options.archive_every * 2.0 ** min(progress.failures, 10)
        progress.not_before = boottime() + min(pause, LONGEST_PAUSE_S)


class _Job:
    """One go at one conversation."""

    def __init__(self, engine: Engine, archive: Archive, runner: Runner, progress: _Progress, rubbish_s: float) -> None:
        self._node = engine.node
        self._archive = archive
        self._runner = runner
        self._cid = runner.cid
        self._progress = progress
        self._rubbish_s = rubbish_s

    async def run(self, old: int) -> None:
        """Archive what is old and worth it, let go of what is too old, clear away what counts no more.

        Args:
            old: number of the last entry that is old enough.
        """
        progress, runner = self._progress, self._runner
        head = await self._head()
        manifest = await self._archive.manifest(self._cid, head.generation, head.manifest)
        if manifest is None or manifest.last != (head.archived_epoch, head.archived):
            raise ArchiveUnavailable(f"the archive lacks the manifest {head.manifest}, or it is not what it should be")
        if progress.archived != head.archived:
            # At first; and after a fail-over that lost ARCHIVED.
            progress.archived = head.archived
            progress.volume = runner.view.volume
            progress.size = await self._size_above(head.archived)
        while old - progress.archived >= ENOUGH or (old > progress.archived and self._size() >= SEGMENT_BYTES):
            head, manifest = await self._step(head, manifest, old)
        manifest = await self._let_go(head, manifest)
        await self._tidy(head, manifest)

    def _size(self) -> int:
        return self._progress.size + self._runner.view.volume - self._progress.volume

    async def _head(self) -> Meta:
        head = await self._node.store.head(self._cid)
        if head is None or head.owner != self._runner.incarnation or head.epoch != self._runner.epoch:
            raise Stop("this node does not own it any more")
        return head

    async def _size_above(self, seq: int) -> int:
        """Characters of the entries above `seq`, as far as that matters."""
        size = 0
        while size < SEGMENT_BYTES:
            page = await self._node.store.read(self._cid, Cursor(place=Place(0, seq)), PAGE)
            if page is None or not page.entries:
                break
            size += sum(len(e.event) for e in page.entries)
            seq = page.entries[-1].seq
        return size

    async def _entries(self, after: int, upto: int, size: int) -> list[LogEntry]:
        """Entries in the store from `after` + 1, at most to `upto`, and until they have `size` characters."""
        found: list[LogEntry] = []
        held = 0
        while after < upto and held < size:
            page = await self._node.store.read(self._cid, Cursor(place=Place(0, after)), min(PAGE, upto - after))
            if page is None or not page.entries or page.entries[0].seq != after + 1:
                raise Stop("the log is not what it was")
            for entry in page.entries:
                found.append(entry)
                held += len(entry.event)
                if held >= size:
                    break
            after = found[-1].seq
        return found

    async def _step(self, head: Meta, manifest: Manifest, old: int) -> tuple[Meta, Manifest]:
        """Segment, manifest, ARCHIVED."""
        progress, epoch = self._progress, self._runner.epoch
        upto = min(old, progress.archived + SEGMENT_ENTRIES)
        entries = await self._entries(progress.archived, upto, SEGMENT_BYTES)
        segment = Segment(self._cid, head.generation, tuple(entries))
        ref = await self._archive.put_segment(segment, epoch, self._known)
        manifest = manifest.with_(ref)
        written = [entry for entry in entries if entry.seq <= ref.last[1]]
        head = await self._commit(head, manifest, await self._keep(written, ref.last[1], head.base))
        metrics = self._node.metrics
        metrics.archived_entries.inc(ref.last[1] - progress.archived)
        progress.size = max(self._size() - segment.size, 0)
        progress.volume = self._runner.view.volume
        progress.archived = ref.last[1]
        return head, manifest

    async def _known(self, first: int, last: int) -> Sequence[LogEntry]:
        return await self._entries(first - 1, last, 1 << 62)

    async def _keep(self, entries: Sequence[LogEntry], upto: int, base: int) -> tuple[int, int]:
        """(epoch, seq) of the first entry that the store is to keep: the window before the mark, and whatever a new
        owner must read.
        """
        count, size = 0, 0
        for entry in reversed(entries):
            size += len(entry.event)
            if count == WINDOW or (count and size > SEGMENT_BYTES):
                break
            count += 1
        seq = min(upto - count, base) + 1
        page = await self._node.store.read(self._cid, Cursor(place=Place(0, seq - 1)), 1)
        if page is None or not page.entries or page.entries[0].seq != seq:
            return (0, 0)
        return (page.entries[0].epoch, seq)

    async def _commit(self, head: Meta, manifest: Manifest, keep: tuple[int, int] = (0, 0)) -> Meta:
        """Make `manifest` the one that counts; the head then."""
        name = manifest.new_name(self._runner.epoch)
        await self._archive.put_manifest(manifest, name)
        request = ArchivedRequest(self._runner.incarnation, self._runner.epoch, manifest.last, name, keep)
        outcome = await self._node.store.archived(self._cid, request)
        if outcome != "OK":
            raise Stop(f"ARCHIVED was answered {outcome}")
        if head.manifest:
            self._progress.rubbish.append((boottime(), head.manifest))
        return await self._head()

    async def _let_go(self, head: Meta, manifest: Manifest) -> Manifest:
        """Take segments that are too old off the list."""
        retention, now = self._node.options.retention, boottime()
        if retention is None or now - self._progress.aged <= min(AGE_CHECK_S, retention / 4):
            return manifest
        self._progress.aged = now
        shorter = manifest.newer_than(wall_ms() - round(retention * 1000))
        if shorter == manifest:
            return manifest
        await self._commit(head, shorter)
        kept = {ref.name for ref in shorter.segments}
        self._progress.rubbish += [(now, ref.name) for ref in manifest.segments if ref.name not in kept]
        return shorter

    async def _tidy(self, head: Meta, manifest: Manifest) -> None:
        """Delete what has counted no more for a while; once per ownership also what earlier owners have left."""
        progress, now = self._progress, boottime()
        gone = [name for at, name in progress.rubbish if now - at > self._rubbish_s]
        if not progress.tidied and now - progress.since > self._rubbish_s:
            # Of all that is there, only what the manifest that counts lists can ever be read again: no owner of an
            # earlier epoch can make another one count.
            # Looked at first, and then whether this node still owns it: so nothing of a later owner is among it.
            there = await self._archive.names(self._cid, head.generation)
            counts = {ref.name for ref in manifest.segments} | {(await self._head()).manifest}
            counts |= {name for _, name in progress.rubbish}
            gone += [name for name in there if name not in counts]
            progress.tidied = True
        if gone:
            await self._archive.delete(self._cid, head.generation, gone)
            progress.rubbish = [(at, name) for at, name in progress.rubbish if name not in gone]
