"""Old log entries on their way out of the store, in the background (protocol, section 6, "Retention").

The owner of a conversation does it, and, once it is stopped, whoever sweeps: segment, then manifest, then ARCHIVED,
which is fenced and makes that manifest the one that counts, and trims the log. Wherever a node dies between these, the
next one goes on from the manifest that counts; what it does not list is cleared away. An archive that is away delays
this and nothing else.
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
from convener.store.archive import Archive, Manifest, Segment, SegmentRef, writer_of

if TYPE_CHECKING:
    from convener.manager.context import NodeContext
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
            return now - (progress.rubbish[0][0] if progress.rubbish else progress.since) > rubbish_age(self._node)
        return self._node.options.retention is not None and now - progress.aged > AGE_CHECK_S

    async def _archive_one(self, runner: Runner, progress: _Progress, old: int) -> None:
        generation = runner.view.generation
        try:
            async with self._limit:
                await _Job(self._node, self._archive, runner, progress).run(old)
            progress.failures = 0
        except Stop as reason:
            log.info("nothing more is archived for now", conversation_id=runner.cid, reason=str(reason))
            self._put_off(progress)
            await clear_if_gone(self._node, runner.cid, generation)
        except ConvenerError as error:
            kind = "archive" if isinstance(error, ArchiveUnavailable) else "store"
            self._node.metrics.archive_failures.labels(kind=kind).inc()
            log.warning("archiving is put off", conversation_id=runner.cid, error=str(error))
            self._put_off(progress)
            await clear_if_gone(self._node, runner.cid, generation)
        finally:
            self._busy.discard(runner.cid)

    def _put_off(self, progress: _Progress) -> None:
        # What went wrong may have left something that is noted nowhere.
        progress.tidied = False
        progress.failures += 1
        pause = self._node.options.archive_every * 2.0 ** min(progress.failures, 10)
        progress.not_before = boottime() + min(pause, LONGEST_PAUSE_S)


class Writer:
    """What archives one conversation: its owner, or, if it is stopped, anybody under its last epoch.

    Args:
        owner, epoch: what the head must have.
    """

    def __init__(self, node: NodeContext, archive: Archive, cid: str, owner: str, epoch: int) -> None:
        self._node = node
        self._archive = archive
        self._cid = cid
        self._owner = owner
        self._epoch = epoch

    async def head(self) -> Meta:
        """The head. Raises `Stop` if somebody else may archive now, not this one."""
        head = await self._node.store.head(self._cid)
        if head is None or head.owner != self._owner or head.epoch != self._epoch:
            raise Stop("it has another owner, or another epoch has begun")
        return head

    async def manifest(self, head: Meta) -> Manifest:
        """The manifest that counts. Raises `ArchiveUnavailable`."""
        manifest = await self._archive.manifest(self._cid, head.generation, head.manifest)
        if manifest is None:
            # The store was put back to what it was before that manifest was replaced.
            manifest = await self._archive.as_of(self._cid, head.generation, head.archived)
            if manifest is not None and manifest.last == (head.archived_epoch, head.archived):
                await self.commit(manifest)
        if manifest is None or manifest.last != (head.archived_epoch, head.archived):
            raise ArchiveUnavailable(f"the archive lacks the manifest {head.manifest}, or it is not what it should be")
        return manifest

    async def entries(self, after: int, upto: int, size: int) -> list[LogEntry]:
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

    async def segment(self, head: Meta, after: int, upto: int) -> tuple[SegmentRef, list[LogEntry]]:
        """Write the next segment; how a manifest lists it, and its entries."""
        entries = await self.entries(after, min(upto, after + SEGMENT_ENTRIES), SEGMENT_BYTES)
        segment = Segment(self._cid, head.generation, tuple(entries))
        ref = await self._archive.put_segment(segment, self._epoch, self._known)
        self._node.metrics.archived_entries.inc(ref.last[1] - after)
        return ref, [entry for entry in entries if entry.seq <= ref.last[1]]

    async def _known(self, first: int, last: int) -> Sequence[LogEntry]:
        return await self.entries(first - 1, last, 1 << 62)

    async def commit(self, manifest: Manifest, keep: tuple[int, int] = (0, 0)) -> str:
        """Make `manifest` the one that counts; its name. Raises `Stop` if this one may not (any more)."""
        name = manifest.new_name(self._epoch)
        await self._archive.put_manifest(manifest, name)
        request = ArchivedRequest(self._owner, self._epoch, manifest.last, name, keep)
        outcome = await self._node.store.archived(self._cid, request)
        if outcome != "OK":
            raise Stop(f"ARCHIVED was answered {outcome}")
        return name

    async def rubbish(self, head: Meta) -> list[str]:
        """Names of objects of earlier epochs that the manifest which counts does not list: no other can list them.

        Looked at first, and then whether this one may still archive. Objects of this epoch are none of that: somebody
        else may just be about to make them count, if the conversation is stopped.
        """
        there = await self._archive.names(self._cid, head.generation)
        head = await self.head()
        counts = {ref.name for ref in (await self.manifest(head)).segments} | {head.manifest}
        return [name for name in there if name not in counts and 0 < writer_of(name) < self._epoch]


async def archive_closed(node: NodeContext, archive: Archive, cid: str, head: Meta) -> None:
    """Archive a stopped conversation whole; the store keeps the last entry of its log. Raises `Stop`,
    `ArchiveUnavailable`, `StoreUnavailable`.

    Several nodes may be at it: the log does not change, so they write the same.
    """
    writer = Writer(node, archive, cid, head.owner, head.epoch)
    head = await writer.head()
    manifest = await writer.manifest(head)
    if head.status != "stopped" or manifest.last[1] >= head.seq:
        return
    while manifest.last[1] < head.seq:
        ref, _ = await writer.segment(head, manifest.last[1], head.seq)
        manifest = manifest.with_(ref)
    name = await writer.commit(manifest, manifest.last)
    await asyncio.sleep(rubbish_age(node))
    gone = set(await writer.rubbish(head))
    # Each name is made to count once at most, so one that does not count now never will.
    gone |= {former for former in (head.manifest, name) if former} - {(await writer.head()).manifest}
    await archive.delete(cid, head.generation, gone)


async def erase_archive(node: NodeContext, cid: str) -> None:
    """Delete what the archive has of a conversation, but for a log that is in use. Raises `ArchiveUnavailable`,
    `StoreUnavailable`.
    """
    archive = node.logs.archive
    if archive is None:
        return
    # Listed first: a log that begins after this look is not among them, and one that has ended never comes back.
    found = await archive.generations(cid)
    head = await node.store.head(cid) if found else None
    await archive.erase(cid, [g for g in found if head is None or g != head.generation])


async def clear_if_gone(node: NodeContext, cid: str, generation: str) -> None:
    """What was put while the conversation was being deleted came too late for who deleted it."""
    try:
        head = await node.store.head(cid)
        if head is not None and head.generation == generation:
            return
        try:
            await erase_archive(node, cid)
        except ArchiveUnavailable:
            if head is None:
                # The sweep looks again at what is listed and does not exist.
                await node.store.index("", cid)
    except ConvenerError as error:
        log.warning("the archive may keep something of it", conversation_id=cid, error=str(error))


async def time_of_day(node: NodeContext) -> int:
    """Now, in ms since 1970, for deciding what is so old that it is deleted: not later than the store has it. A node
    whose clock is wrong by years must not delete what everybody uses.
    """
    now = wall_ms()
    return now if node.lease.terms is None else min(now, (await node.store.membership()).pulse)


def rubbish_age(node: NodeContext) -> float:
    """How long what counts no more stays, in seconds."""
    return max(RUBBISH_S, 2 * node.options.lease_ttl)


class _Job(Writer):
    """One go at one conversation of this node."""

    def __init__(self, node: NodeContext, archive: Archive, runner: Runner, progress: _Progress) -> None:
        super().__init__(node, archive, runner.cid, runner.incarnation, runner.epoch)
        self._runner = runner
        self._progress = progress

    async def run(self, old: int) -> None:
        """Archive what is old and worth it, let go of what is too old, clear away what counts no more.

        Args:
            old: number of the last entry that is old enough.
        """
        progress, runner = self._progress, self._runner
        head = await self.head()
        manifest = await self.manifest(head)
        if progress.archived != head.archived:
            # At first; and after a fail-over that lost ARCHIVED.
            progress.archived = head.archived
            progress.volume = runner.view.volume
            progress.size = await self._size_above(head.archived)
        while old - progress.archived >= ENOUGH or (old > progress.archived and self._size() >= SEGMENT_BYTES):
            head, manifest = await self._step(head, manifest, old)
        await self._let_go(head, manifest)
        await self._tidy(head)

    def _size(self) -> int:
        return self._progress.size + self._runner.view.volume - self._progress.volume

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

    async def _step(self, head: Meta, manifest: Manifest, old: int) -> tuple[Meta, Manifest]:
        """Segment, manifest, ARCHIVED."""
        progress = self._progress
        ref, entries = await self.segment(head, progress.archived, old)
        manifest = manifest.with_(ref)
        head = await self._replace(head, manifest, await self._keep(entries, ref.last[1], head.base))
        progress.size = max(self._size() - sum(len(entry.event) for entry in entries), 0)
        progress.volume = self._runner.view.volume
        progress.archived = ref.last[1]
        return head, manifest

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

    async def _replace(self, head: Meta, manifest: Manifest, keep: tuple[int, int] = (0, 0)) -> Meta:
        """Make `manifest` the one that counts; the former one is rubbish. The head then."""
        await self.commit(manifest, keep)
        if head.manifest:
            self._progress.rubbish.append((boottime(), head.manifest))
        return await self.head()

    async def _let_go(self, head: Meta, manifest: Manifest) -> None:
        """Take segments that are too old off the list."""
        retention, now = self._node.options.retention, boottime()
        if retention is None or now - self._progress.aged <= min(AGE_CHECK_S, retention / 4):
            return
        self._progress.aged = now
        shorter = manifest.newer_than(await time_of_day(self._node) - round(retention * 1000))
        if shorter == manifest:
            return
        await self._replace(head, shorter)
        kept = {ref.name for ref in shorter.segments}
        self._progress.rubbish += [(now, ref.name) for ref in manifest.segments if ref.name not in kept]

    async def _tidy(self, head: Meta) -> None:
        """Delete what has counted no more for a while; once per ownership also what earlier owners have left."""
        progress, now = self._progress, boottime()
        age = rubbish_age(self._node)
        gone = [name for at, name in progress.rubbish if now - at > age]
        if not progress.tidied and now - progress.since > age:
            gone += await self.rubbish(head)
            progress.tidied = True
        if gone:
            # After a fail-over that lost ARCHIVED an earlier manifest may be the one that counts, again.
            head = await self.head()
            counts = {ref.name for ref in (await self.manifest(head)).segments} | {head.manifest}
            gone = [name for name in gone if name not in counts]
            progress.rubbish = [(at, name) for at, name in progress.rubbish if name not in counts]
            await self._archive.delete(self._cid, head.generation, gone)
            progress.rubbish = [(at, name) for at, name in progress.rubbish if name not in gone]
