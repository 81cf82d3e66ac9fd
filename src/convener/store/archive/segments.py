"""What the archive's objects hold, as data: segments of a log, and the manifests that list them.

A segment is gzip of lines: a head ``{"v":1,"conversation":…,"generation":…,"first":[epoch,seq],"last":[…],"count":…}``,
then one entry each, ``[epoch,seq,"event"]``, with dense numbers. A manifest is JSON.
"""

from __future__ import annotations

import gzip
import itertools
import json
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, cast

from convener.core.model import LogEntry

FORMAT: Final = 1
LOG: Final = "log-"
MANIFEST: Final = "manifest-"


def writer_of(name: str) -> int:
    """The epoch under which an object was written, by its name; 0 if it is none of ours."""
    kind, _, rest = name.partition("-")
    epoch = ([*rest.split("-"), ""])[1]
    return int(epoch) if f"{kind}-" in (LOG, MANIFEST) and epoch.isascii() and epoch.isdigit() else 0


class Malformed(ValueError):
    """An object is not what its name says."""


@dataclass(frozen=True, slots=True)
class SegmentRef:
    """Where a part of the log is.

    Attributes:
        first, last: (epoch, seq) of its first and its last entry.
        newest: time of its latest entry, in ms since 1970.
        name: of the object, below the conversation's generation.
    """

    first: tuple[int, int]
    last: tuple[int, int]
    newest: int
    name: str


@dataclass(frozen=True, slots=True)
class Segment:
    """A part of a log, never empty."""

    cid: str
    generation: str
    entries: tuple[LogEntry, ...]

    @property
    def size(self) -> int:
        """Characters of its events."""
        return sum(len(entry.event) for entry in self.entries)

    def ref(self, writer: int) -> SegmentRef:
        """How a manifest lists it. The name has the first number and the epoch of the owner that writes it: two owners
        never write the same object.
        """
        first, last = self.entries[0], self.entries[-1]
        name = f"{LOG}{first.seq:015d}-{writer}"
        return SegmentRef((first.epoch, first.seq), (last.epoch, last.seq), _newest(self.entries), name)

    def encode(self) -> bytes:
        """The object's content."""
        first, last = self.entries[0], self.entries[-1]
        head = {
            "v": FORMAT,
            "conversation": self.cid,
            "generation": self.generation,
            "first": [first.epoch, first.seq],
            "last": [last.epoch, last.seq],
            "count": len(self.entries),
        }
        lines = [json.dumps(head), *(json.dumps([e.epoch, e.seq, e.event]) for e in self.entries)]
        return gzip.compress("\n".join(lines).encode(), compresslevel=6, mtime=0)

    @classmethod
    def decode(cls, data: bytes) -> Segment:
        """Inverse of `encode`. Raises `Malformed`."""
        try:
            head, *rows = [json.loads(line) for line in gzip.decompress(data).decode().split("\n")]
            if head["v"] != FORMAT:
                raise Malformed(f"a segment of format {head['v']}, which this version cannot read")
            entries = tuple(LogEntry(int(epoch), int(seq), str(event)) for epoch, seq, event in rows)
            found = cls(str(head["conversation"]), str(head["generation"]), entries)
            ends = [[e.epoch, e.seq] for e in (entries[0], entries[-1])]
            good = ends == [head["first"], head["last"]] and len(entries) == head["count"]
        except (OSError, EOFError, ValueError, KeyError, TypeError, IndexError) as error:
            raise error if isinstance(error, Malformed) else Malformed(f"not a segment: {error}") from error
        if not good or any(after.seq != before.seq + 1 for before, after in itertools.pairwise(entries)):
            raise Malformed("a segment with entries missing")
        return found


def _newest(entries: Sequence[LogEntry]) -> int:
    """The latest time in the entries, 0 if none tells it."""
    newest = 0
    for entry in entries:
        try:
            ts: Any = json.loads(entry.event)["ts"]
        except (ValueError, KeyError, TypeError):
            continue
        if isinstance(ts, int):
            newest = max(newest, ts)
    return newest


@dataclass(frozen=True, slots=True)
class Manifest:
    """Which segments there are, in order and without holes; earlier ones may have been deleted."""

    cid: str
    generation: str
    segments: tuple[SegmentRef, ...] = ()

    @property
    def first(self) -> int:
        """Number of the first entry that there is; 1 if nothing is listed."""
        return self.segments[0].first[1] if self.segments else 1

    @property
    def last(self) -> tuple[int, int]:
        """(epoch, seq) of the last entry, (0, 0) if nothing is listed."""
        return self.segments[-1].last if self.segments else (0, 0)

    def after(self, seq: int) -> tuple[SegmentRef, ...]:
        """The segments with entries above `seq`."""
        return tuple(ref for ref in self.segments if ref.last[1] > seq)

    def with_(self, ref: SegmentRef) -> Manifest:
        """This one and one more segment."""
        assert not self.segments or ref.first[1] == self.last[1] + 1
        return Manifest(self.cid, self.generation, (*self.segments, ref))

    def newer_than(self, time: int) -> Manifest:
        """Without the segments at the beginning whose latest entry is older than `time`; the last one always stays."""
        keep = 0
        while keep < len(self.segments) - 1 and self.segments[keep].newest < time:
            keep += 1
        return Manifest(self.cid, self.generation, self.segments[keep:])

    def new_name(self, writer: int) -> str:
        """A name that no other manifest has."""
        return f"{MANIFEST}{self.last[1]:015d}-{writer}-{secrets.token_hex(6)}"

    def encode(self) -> bytes:
        """The object's content."""
        rows = [[*ref.first, *ref.last, ref.newest, ref.name] for ref in self.segments]
        head = {"v": FORMAT, "conversation": self.cid, "generation": self.generation}
        return json.dumps(head | {"segments": rows}).encode()

    @classmethod
    def decode(cls, data: bytes) -> Manifest:
        """Inverse of `encode`. Raises `Malformed`."""
        try:
            value: dict[str, Any] = json.loads(data)
            if value["v"] != FORMAT:
                raise Malformed(f"a manifest of format {value['v']}, which this version cannot read")
            refs = tuple(
                SegmentRef((int(e1), int(s1)), (int(e2), int(s2)), int(newest), str(name))
                for e1, s1, e2, s2, newest, name in cast("list[list[Any]]", value["segments"])
            )
            return cls(str(value["conversation"]), str(value["generation"]), refs)
        except (ValueError, KeyError, TypeError) as error:
            raise error if isinstance(error, Malformed) else Malformed(f"not a manifest: {error}") from error
