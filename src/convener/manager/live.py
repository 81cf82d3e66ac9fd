"""How a view comes by the pieces of the answer that is being written (rules: `convener.core.live`).

They come on the conversation's channel. What was missed, or came before this node listened, is read from the
conversation's tail, followed by the log up to its end: then every turn that the tail can speak of has been seen to
begin, and whatever has ended meanwhile is void. Nothing is kept or read while nobody looks on.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

import structlog

from convener.core.cursor import Cursor
from convener.core.live import Live, Piece
from convener.core.model import Meta
from convener.core.replay import SETTLING
from convener.core.view import START, Place
from convener.core.wire import turn_position
from convener.manager.context import NodeContext
from convener.manager.published import Event, Publication, decode, decode_piece

log = structlog.get_logger(__name__)

TURN_OUTPUT: Final = 4
"""Times `max_payload_bytes`: more than a turn may write, so that only what breaks that rule is not shown."""
HEARD: Final = 256
"""Pieces that are kept while the tail is being read."""
PAGE: Final = 128


class LivePieces:
    """The live answer of one view. `missing`: pieces have to be read."""

    def __init__(self, node: NodeContext, cid: str) -> None:
        self._node = node
        self._cid = cid
        self.answer = self._new(0, known=False)
        self.missing = False
        self._reading = False
        self._heard: list[Piece] = []

    def _new(self, ended: int, *, known: bool) -> Live:
        return Live(TURN_OUTPUT * self._node.options.max_payload_bytes, ended, known=known)

    @property
    def wanted(self) -> bool:
        """Whether pieces have to be read, or the entries without which they cannot be judged."""
        return self.missing and (not self.answer.known or self.answer.writing is not None)

    # -- the log -----------------------------------------------------------------------------------------------------

    def set_head(self, meta: Meta) -> None:
        """The view begins at the end of the log, with this head or an older end."""
        is_open = meta.cursor > meta.done
        self.answer = self._new(meta.done, known=not is_open)
        self.missing, self._reading = is_open, False
        self._heard = []

    def show(self, event: Event, *, heard: bool) -> None:
        """Take the next entry. If it was not heard as it was written, nor may be what was published after it; unless
        the pieces are just being read as well.
        """
        if _fold(self.answer, event) or (event.kind == "turn_started" and not heard and not self._reading):
            self.missing = True

    # -- pieces ------------------------------------------------------------------------------------------------------

    def forget(self) -> None:
        """Nobody looks on."""
        self.answer.clear()
        self.missing = True

    def hear(self, publication: Publication, *, keep: bool) -> bool:
        """Take published pieces. True if something has to be read.

        Args:
            keep: the view is just reading; they are taken when it has.
        """
        pieces = list(self._decoded(publication.pieces))
        if not publication.pieces:
            # Too large for the channel.
            self.missing = True
        elif keep:
            self._heard += pieces
            if len(self._heard) > HEARD:
                self._heard, self.missing = [], True
        else:
            self._add(pieces)
        return self.missing

    async def read(self, generation: str, place: Place) -> list[Piece]:
        """What the tail has. Then read the log to its end, then call `take`. Raises `StoreUnavailable`.

        Args:
            place: the view's place in the log.
        """
        self.missing, self._reading = False, True
        if not self.answer.known:
            await self._learn(generation, place)
        return list(self._decoded(await self._node.store.pieces(self._cid)))

    def failed(self) -> None:
        """It could not be read."""
        self.missing, self._reading = True, False

    def take(self, pieces: Iterable[Piece]) -> None:
        """Take what was read, if anything was, then what was heard meanwhile."""
        self._reading = False
        self.answer.load(pieces)
        heard, self._heard = self._heard, []
        self._add(heard)

    def _add(self, pieces: Iterable[Piece]) -> None:
        for piece in pieces:
            if not self.answer.add(piece):
                self.missing = True

    def _decoded(self, texts: Iterable[bytes | str]) -> Iterable[Piece]:
        for text in texts:
            piece = decode_piece(text)
            if piece is None:
                self._node.metrics.malformed.labels(where="piece").inc()
                log.warning("malformed piece skipped", conversation_id=self._cid, size=len(text))
            else:
                yield piece

    async def _learn(self, generation: str, place: Place) -> None:
        """Read the entries of the turns that had not ended, up to the view's place."""
        head = await self._node.store.head(self._cid)
        if head is None:
            return
        answer = self._new(head.done, known=True)
        last = head.base
        while last < place.seq:
            page = await self._node.store.read(self._cid, Cursor(place=Place(0, last)), PAGE)
            if page is None or page.generation != generation or not page.entries:
                return
            for entry in page.entries:
                if entry.seq <= place.seq:
                    _fold(answer, decode(entry, START, generation).event)
            last = page.entries[-1].seq
        self.answer = answer


def _fold(answer: Live, event: Event) -> bool:
    """Let the live answer take an entry. True if pieces were passed over that have to be read now."""
    position = turn_position(event.turn)
    if event.kind == "turn_started":
        answer.began(position, event.attempt)
    elif event.kind == "reply":
        return answer.replied(position)
    elif event.kind in SETTLING:
        answer.finished(position)
    elif event.kind == "stopped":
        answer.closed()
    return False
