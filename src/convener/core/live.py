"""The answer that is being written: which pieces belong to it, and what somebody has not seen of it yet.

Pieces reach a node by publications, which may be lost or late, and by reading the conversation's tail, which holds
what was written so far. Each says where it belongs: the turn's position and attempt, how many replies the turn had
given before it, its part, and its offset in that part. The log says what of that is current: a turn begins, gives
replies, ends. So pieces may come twice, late, or in any order of sources: what fits is taken, once.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Literal

MAX_PARTS: Final = 256
"""Parts of an answer that are shown while it is written; further ones are only in the reply."""

Data = str | list[Any]
Writing = tuple[int, int, int]
"""What is being written: the turn's position, its attempt, the replies given before. Grows with time."""


@dataclass(frozen=True, slots=True)
class Piece:
    """A piece of an answer.

    Attributes:
        writing: what it is a piece of.
        type: of its part; the data of type `text` is a string, that of any other a list of pieces.
        offset: where it begins in its part, in characters or pieces.
        size: bytes that it counts for the limit.
    """

    writing: Writing
    part: str
    type: str
    offset: int
    data: Data
    size: int


@dataclass(frozen=True, slots=True)
class Rest:
    """What somebody has not seen of a part, from `offset` on."""

    part: str
    type: str
    offset: int
    data: Data


@dataclass(slots=True)
class _Part:
    """One part: chunks, and where each begins. `torn`: something of it is lost for good, nothing is added."""

    type: str
    length: int = 0
    torn: bool = False
    starts: list[int] = field(default_factory=list[int])
    chunks: list[Data] = field(default_factory=list[Data])
    sizes: list[int] = field(default_factory=list[int])

    def add(self, data: Data, size: int) -> None:
        self.starts.append(self.length)
        self.chunks.append(data)
        self.sizes.append(size)
        self.length += len(data)

    def rest(self, offset: int, most: int) -> Data:
        """From `offset` on: one chunk, and further ones while they are not more than `most` bytes in all."""
        first = last = bisect_right(self.starts, offset) - 1
        size = self.sizes[first]
        while last + 1 < len(self.chunks) and size + self.sizes[last + 1] <= most:
            last += 1
            size += self.sizes[last]
        found = [self.chunks[first][offset - self.starts[first] :], *self.chunks[first + 1 : last + 1]]
        if self.type == "text":
            return "".join(str(chunk) for chunk in found)
        return [item for chunk in found for item in chunk]


class Live:
    """The answer that is being written, as far as the log has been followed.

    Args:
        limit: bytes of pieces that are kept; what goes beyond is not shown while it is written.
        ended: position up to which all turns have ended.
        known: whether every entry of the open turn has been seen. If not, no piece can be judged until a turn
            begins whose entries are all seen.
    """

    def __init__(self, limit: int, ended: int = 0, *, known: bool = True) -> None:
        self._limit = limit
        self._ended = ended
        self._known = known
        self._writing: Writing = (0, 0, 0)
        self._parts: dict[str, _Part] = {}
        self._size = 0
        self._later = False

    @property
    def known(self) -> bool:
        """Whether pieces can be judged."""
        return self._known

    @property
    def writing(self) -> Writing | None:
        """What is being written now, None if no turn is open (or it is not known which)."""
        return self._writing if self._known and self._writing[0] > self._ended else None

    # -- what the log says ---------------------------------------------------------------------------------------------

    def began(self, position: int, attempt: int) -> None:
        """A turn has begun; what an earlier attempt has written is void."""
        if attempt == 1:
            # Nothing of it was before this.
            self._known = True
        replies = self._writing[2] if position == self._writing[0] else 0
        self._writing = (position, attempt, replies)
        self.clear()

    def replied(self, position: int) -> bool:
        """A reply has taken the place of what was written before it. True if pieces after it were passed over."""
        turn, attempt, replies = self._writing
        if position != turn:
            return False
        self._writing = (turn, attempt, replies + 1)
        later = self._later
        self.clear()
        return later

    def finished(self, position: int) -> None:
        """A turn has ended. Turns end in the order of their positions, so all before it have too."""
        self._ended = max(self._ended, position)
        # Whatever begins now is seen from its beginning.
        self._known = True
        if self._writing[0] <= self._ended:
            self.clear()

    def closed(self) -> None:
        """The conversation was closed: nothing is being written any more."""
        self.finished(self._writing[0])

    def clear(self) -> None:
        """Forget the pieces."""
        self._parts = {}
        self._size = 0
        self._later = False

    # -- pieces ------------------------------------------------------------------------------------------------------

    def _judge(self, piece: Piece) -> Literal["take", "drop", "wait", "read"]:
        if piece.writing[0] <= self._ended:
            return "drop"
        if not self._known:
            return "read"
        if piece.writing[:2] != self._writing[:2]:
            return "drop" if piece.writing[:2] < self._writing[:2] else "read"
        if piece.writing != self._writing:
            return "drop" if piece.writing < self._writing else "wait"
        return "take"

    def add(self, piece: Piece) -> bool:
        """Take a piece that was heard. False if something is missing: the log, or pieces before it."""
        verdict = self._judge(piece)
        if verdict == "take":
            return self._put(piece)
        if verdict == "wait":
            # The reply that comes before it is not in the log yet; once it is, this piece is read.
            self._later = True
        return verdict != "read"

    def load(self, pieces: Iterable[Piece]) -> None:
        """Take what was read of the tail, before the log was read to its end. What is missing in it is lost."""
        for piece in pieces:
            if not self.add(piece) and piece.writing == self.writing:
                self._parts.setdefault(piece.part, _Part(piece.type)).torn = True

    def _put(self, piece: Piece) -> bool:
        part = self._parts.get(piece.part)
        if part is None:
            if len(self._parts) >= MAX_PARTS:
                return True
            if piece.offset > 0:
                return False
            part = self._parts[piece.part] = _Part(piece.type)
        if part.torn or part.type != piece.type:
            return True
        if piece.offset > part.length:
            return False
        data = piece.data[part.length - piece.offset :]
        if not data:
            return True
        if self._size + piece.size > self._limit:
            part.torn = True
            return True
        self._size += piece.size
        part.add(data, piece.size)
        return True

    # -- for those who look on ---------------------------------------------------------------------------------------

    def parts(self) -> tuple[str, ...]:
        """The parts that there are, in the order in which they began."""
        return tuple(self._parts)

    def rest(self, name: str, offset: int, most: int) -> Rest | None:
        """What there is of a part from `offset` on, None if nothing.

        Args:
            most: bytes; if there is more, some is left for the next time.
        """
        part = self._parts.get(name)
        if part is None or part.length <= offset:
            return None
        return Rest(name, part.type, offset, part.rest(offset, most))

    def more(self, got: Mapping[str, int]) -> bool:
        """Whether there is anything beyond what `got` says for each part."""
        return any(part.length > got.get(name, 0) for name, part in self._parts.items())
