"""The log as one, wherever its entries are: what the store has trimmed is read from the archive."""

from __future__ import annotations

from typing import Final

from convener.core.cursor import Cursor
from convener.core.model import LogEntry, Page
from convener.core.view import START, Place
from convener.errors import ArchiveUnavailable
from convener.store.archive.archive import Archive
from convener.store.archive.segments import Manifest
from convener.store.base import ConversationStore

TRIES: Final = 5
"""Times that a read is begun again because the log was trimmed, or its manifest replaced, under it."""


class LogReader:
    """READ, whether the store still has the entries or not.

    Args:
        archive: None if this node has none; what was trimmed then cannot be read.
    """

    def __init__(self, store: ConversationStore, archive: Archive | None = None) -> None:
        self._store = store
        self._archive = archive

    @property
    def archive(self) -> Archive | None:
        """The archive, if this node has one."""
        return self._archive

    async def read(self, cid: str, after: Cursor, limit: int) -> Page | None:
        """See `ConversationStore.read`: the same, of the whole log. `Page.first` is the first entry that there is at
        all: 1, unless segments of the archive were deleted for their age.

        Raises:
            StoreUnavailable: the store is away; `ArchiveUnavailable`: the archive is, and is needed.
        """
        for tried in range(TRIES):
            page = await self._store.read(cid, after, limit)
            if page is None or page.first <= 1 or not page.manifest:
                return page
            if not page.resync and after.place.seq + 1 >= page.first:
                return page
            found = await self._beyond(cid, page, after, limit, tried == TRIES - 1)
            if found is not None:
                return found
        raise ArchiveUnavailable(f"the archive lacks what the head of {cid} names", retry_after=1.0)

    async def _beyond(self, cid: str, hot: Page, after: Cursor, limit: int, last_try: bool) -> Page | None:
        """A page that begins in the archive; None if that has changed under us."""
        if self._archive is None:
            raise ArchiveUnavailable("the older part of the log is in an archive, and this node has no archive_url")
        manifest = await self._archive.manifest(cid, hot.generation, hot.manifest)
        if manifest is None and last_try:
            manifest = await self._archive.as_of(cid, hot.generation, hot.archived)
        if manifest is None:
            return None
        # Of a bare number only this can be told: whether what follows it was deleted, so that there would be a hole.
        known = await self._knows(manifest, after) if after.is_exact else not 0 < after.place.seq < manifest.first - 1
        if known is None:
            return None
        resync, start = not known, after.place.seq if known else 0
        entries: list[LogEntry] = []
        for ref in manifest.after(start):
            if len(entries) >= limit:
                break
            segment = await self._archive.segment(cid, hot.generation, ref)
            if segment is None:
                return None
            entries += [e for e in segment.entries if e.seq > start][: limit - len(entries)]
        tip = hot.tip
        if len(entries) < limit:
            # The manifest ends at or beyond where the store began when it was read.
            last = max(start, manifest.last[1])
            rest = await self._store.read(cid, Cursor(place=Place(0, last)), limit - len(entries))
            if rest is None or rest.generation != hot.generation or rest.first > last + 1:
                return None
            entries += rest.entries
            tip = rest.tip
        return Page(hot.generation, tip, tuple(entries), resync, manifest.first, hot.archived, hot.manifest)

    async def _knows(self, manifest: Manifest, after: Cursor) -> bool | None:
        """Whether the archived log has exactly this place; None if its segment has gone under us."""
        place = after.place
        if after.generation != manifest.generation or place == START:
            return after.generation == manifest.generation
        for ref in manifest.after(place.seq - 1)[:1]:
            assert self._archive is not None
            segment = await self._archive.segment(manifest.cid, manifest.generation, ref)
            if segment is None:
                return None
            return any((e.epoch, e.seq) == (place.epoch, place.seq) for e in segment.entries)
        return False
