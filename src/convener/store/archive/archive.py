"""Segments and manifests of conversations, over an object store; what was read lately is kept in memory."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Collection, Sequence
from typing import Final, Generic, TypeVar

from convener.core.model import LogEntry
from convener.errors import ArchiveUnavailable
from convener.store.archive.objects import Objects
from convener.store.archive.segments import MANIFEST, Malformed, Manifest, Segment, SegmentRef

T = TypeVar("T")

SEGMENTS_KEPT: Final = 32 << 20
"""Characters of events of segments that are kept in memory."""
MANIFESTS_KEPT: Final = 1 << 20
"""Bytes of manifests that are kept in memory."""
ABREAST: Final = 8
"""Objects that are read at once."""


class _Kept(Generic[T]):
    """What was used lately, up to a size. Objects never change, so it is never out of date."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._held: OrderedDict[str, tuple[T, int]] = OrderedDict()
        self._size = 0

    def get(self, name: str) -> T | None:
        found = self._held.get(name)
        if found is None:
            return None
        self._held.move_to_end(name)
        return found[0]

    def put(self, name: str, value: T, size: int) -> None:
        if name in self._held or size > self._limit:
            return
        self._held[name] = (value, size)
        self._size += size
        while self._size > self._limit:
            _, (_, dropped) = self._held.popitem(last=False)
            self._size -= dropped


class Archive:
    """The archive of one cluster.

    Args:
        objects: where it is.
        namespace: the cluster's, so that several may share a bucket.
    """

    def __init__(self, objects: Objects, namespace: str = "convener") -> None:
        self._objects = objects
        self._root = f"ns-{namespace}"
        self._manifests = _Kept[Manifest](MANIFESTS_KEPT)
        self._segments = _Kept[Segment](SEGMENTS_KEPT)
        self._reading = asyncio.Semaphore(ABREAST)

    def folder(self, cid: str, generation: str = "") -> str:
        """Where a conversation's objects are. The prefix keeps an id like ``..`` from naming another folder."""
        return f"{self._root}/c-{cid}" + (f"/{generation}" if generation else "")

    async def manifest(self, cid: str, generation: str, name: str) -> Manifest | None:
        """The manifest of that name; None if there is none (any more). Raises `ArchiveUnavailable`."""
        if not name:
            return Manifest(cid, generation)
        path = f"{self.folder(cid, generation)}/{name}"
        return await self._read(path, self._manifests, Manifest.decode, lambda _, data: len(data))

    async def as_of(self, cid: str, generation: str, seq: int) -> Manifest | None:
        """What was archived when that ended with number `seq`, out of a later manifest; None if none tells.

        For a store that was put back to what it was a while ago: the manifest that it names is deleted by now, what
        that has listed is there. Raises `ArchiveUnavailable`.
        """
        names = sorted(await self.names(cid, generation), reverse=True)
        for name in [name for name in names if name.startswith(MANIFEST)]:
            later = await self.manifest(cid, generation, name)
            ends = [ref.last[1] for ref in later.segments] if later is not None else []
            if later is not None and seq in ends:
                return Manifest(cid, generation, later.segments[: ends.index(seq) + 1])
        return None

    async def segment(self, cid: str, generation: str, ref: SegmentRef) -> Segment | None:
        """The segment; None if there is none (any more). Raises `ArchiveUnavailable`."""
        path = f"{self.folder(cid, generation)}/{ref.name}"
        found = await self._read(path, self._segments, Segment.decode, lambda segment, _: segment.size)
        ends = () if found is None else tuple((e.epoch, e.seq) for e in (found.entries[0], found.entries[-1]))
        if found is not None and ends != (ref.first, ref.last):
            raise ArchiveUnavailable(f"the archive is damaged: {path} has entries {ends}, not {(ref.first, ref.last)}")
        return found

    async def _read(
        self, path: str, kept: _Kept[T], decode: Callable[[bytes], T], size: Callable[[T, bytes], int]
    ) -> T | None:
        held = kept.get(path)
        if held is not None:
            return held
        async with self._reading:
            data = await self._objects.get(path)
            if data is None:
                return None
            try:
                # Unpacking mebibytes would hold the event loop up.
                found = await asyncio.to_thread(decode, data)
            except Malformed as error:
                raise ArchiveUnavailable(f"the archive is damaged: {path}: {error}") from error
        kept.put(path, found, size(found, data))
        return found

    async def put_manifest(self, manifest: Manifest, name: str) -> None:
        """Write a manifest. Raises `ArchiveUnavailable`."""
        path, data = f"{self.folder(manifest.cid, manifest.generation)}/{name}", manifest.encode()
        if not await self._objects.create(path, data) and await self._objects.get(path) != data:
            raise ArchiveUnavailable(f"the archive has another object called {path}")

    async def put_segment(
        self, segment: Segment, writer: int, known: Callable[[int, int], Awaitable[Sequence[LogEntry]]]
    ) -> SegmentRef:
        """Write a segment, or find it written. What is there under its name is never overwritten: it counts if the log
        has all of its entries.

        Args:
            writer: the epoch of the owner that writes.
            known: entries of the log, from one number to another.

        Raises:
            ArchiveUnavailable: it cannot be written, or something else has its name.
        """
        ref = segment.ref(writer)
        path = f"{self.folder(segment.cid, segment.generation)}/{ref.name}"
        if await self._objects.create(path, await asyncio.to_thread(segment.encode)):
            return ref
        # This owner has written it before, and did not live to say so; the log may have grown since.
        data = await self._objects.get(path)
        try:
            found = None if data is None else await asyncio.to_thread(Segment.decode, data)
        except Malformed:
            found = None
        if found is not None and (found.cid, found.generation) == (segment.cid, segment.generation):
            first, last = found.entries[0].seq, found.entries[-1].seq
            if first == ref.first[1] and tuple(await known(first, last)) == found.entries:
                return found.ref(writer)
        raise ArchiveUnavailable(f"the archive has another object called {path}")

    async def generations(self, cid: str) -> dict[str, list[str]]:
        """All objects of a conversation, by generation of its log. Raises `ArchiveUnavailable`."""
        found: dict[str, list[str]] = {}
        folder = self.folder(cid)
        for path in await self._objects.list(folder):
            if path.startswith(f"{folder}/"):
                generation, _, _ = path.removeprefix(f"{folder}/").partition("/")
                found.setdefault(generation, []).append(path)
        return found

    async def names(self, cid: str, generation: str) -> list[str]:
        """Names of the objects of one log. Raises `ArchiveUnavailable`."""
        folder = f"{self.folder(cid, generation)}/"
        paths = await self._objects.list(self.folder(cid, generation))
        return [path.removeprefix(folder) for path in paths if path.startswith(folder)]

    async def delete(self, cid: str, generation: str, names: Collection[str]) -> None:
        """Delete objects of one log. Raises `ArchiveUnavailable`."""
        folder = self.folder(cid, generation)
        await self._objects.delete([f"{folder}/{name}" for name in names])

    async def erase(self, cid: str, generations: Collection[str]) -> None:
        """Delete everything of these logs. Raises `ArchiveUnavailable`."""
        for generation in generations:
            paths = await self._objects.list(self.folder(cid, generation))
            # Manifests last: as long as something is left, it says what.
            await self._objects.delete(sorted(paths))
