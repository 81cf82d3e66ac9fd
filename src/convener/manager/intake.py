"""Inbox entries in order and without holes, out of a channel that may lose them and a stream that does not (I8, I11).

The next position is taken as it is heard. A hole, a reconnect, a resumption or a claim makes the owner read the
stream; while it has to, what is heard is only noted: the read brings it, or is done again.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final, cast

import msgspec

from convener.core.cursor import Cursor
from convener.core.model import REMEMBERED, EntryKind, InboxEntry, Meta
from convener.core.replay import Replay
from convener.core.view import Place
from convener.manager.views import Publication
from convener.store.base import ConversationStore

PAGE: Final = 256
KINDS: Final = REMEMBERED | {"stop", "interrupt"}
CHUNK_BYTES: Final = 512 << 10
REASON_LENGTH: Final = 4096


class Intake:
    """What was taken, and whether the stream must be read. `taken` is the last position."""

    def __init__(self, taken: int) -> None:
        self.taken = taken
        self.behind = True
        self._misses = 0
        self._highest = 0

    def hear(self, publication: Publication) -> InboxEntry | None:
        """A publication: the entry if it is the next one, None if it is old, early, or came by number only."""
        self._highest = max(self._highest, publication.pos)
        if publication.pos <= self.taken or self.behind:
            return None
        if publication.pos != self.taken + 1 or not publication.data:
            self.miss()
            return None
        return InboxEntry(
            publication.pos,
            publication.id,
            cast("EntryKind", publication.kind if publication.kind in KINDS else "message"),
            publication.user,
            publication.ts,
            bytes(publication.data).decode(),
        )

    def miss(self) -> None:
        """Entries may have been missed: the stream must be read."""
        self._misses += 1
        self.behind = True

    async def read(self, store: ConversationStore, cid: str) -> tuple[Meta, Sequence[InboxEntry], int] | None:
        """Head, entries to take, and the position that is reached with them; None if there is no conversation.

        By the store's cursor, not by our own number. An entry counts only under the position that `seen` has for
        its id: a repaired one is in the log already. Whoever calls has settled every append that is under way, or
        entries would be taken in twice.
        """
        misses = self._misses
        found = await store.inbox(cid)
        if found is None:
            return None
        meta, entries = found
        ids = [e.message_id for e in entries if e.kind in REMEMBERED]
        seen = dict(zip(ids, await store.seen(cid, ids), strict=True)) if ids else {}
        good = [e for e in entries if e.kind not in REMEMBERED or seen.get(e.message_id) == e.position]
        self.taken = meta.cursor
        upto = max(entries[-1].position if entries else 0, meta.cursor)
        self.behind = misses != self._misses or self._highest > upto
        # Looked at once: a number that the store no longer has (a rollback) must not make this a busy loop.
        self._highest = upto
        return meta, good, upto


def stop_reason(entry: InboxEntry) -> str:
    """Why a stop was asked for. A text that cannot be read must not keep it from being obeyed (I15)."""
    try:
        return str(msgspec.json.decode(entry.data))[:REASON_LENGTH]
    except msgspec.MsgspecError:
        return "stopped"


def chunks(entries: Sequence[InboxEntry]) -> Iterator[list[InboxEntry]]:
    """Entries in pieces of about half a mebibyte: an append of everything would hold the store up."""
    piece: list[InboxEntry] = []
    size = 0
    for entry in entries:
        if piece and size + len(entry.data) > CHUNK_BYTES:
            yield piece
            piece, size = [], 0
        piece.append(entry)
        size += len(entry.data)
    if piece:
        yield piece


async def unanswered(store: ConversationStore, cid: str, meta: Meta) -> Replay:
    """What a new owner must know, from the log after `base`. Raises `StoreUnavailable`."""
    replay = Replay(meta.done)
    cursor = Cursor(place=Place(0, meta.base))
    while True:
        page = await store.read(cid, cursor, PAGE)
        if page is None or not page.entries:
            return replay
        for entry in page.entries:
            replay.take(entry)
        last = page.entries[-1]
        cursor = Cursor(page.generation, Place(last.epoch, last.seq))
        if cursor.place >= Place(*page.tip):
            return replay


async def is_answered(store: ConversationStore, cid: str, meta: Meta) -> bool:
    """Whether a person has answered a question and no owner has taken that in. Raises `StoreUnavailable`."""
    found = None if meta.position == meta.cursor else await store.inbox(cid)
    return found is not None and any(entry.kind == "answer" for entry in found[1])
