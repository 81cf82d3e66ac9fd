"""The loss detector: what a store has lost that fell back, what of it was repaired, and how far replicas are.

Says so in the log, in two metrics, and in reports for operators (`/readyz?verbose`), which name no conversation.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Iterable
from typing import Final, Protocol

import structlog

from convener.errors import ConvenerError
from convener.manager.clock import boottime, wall_ms
from convener.manager.context import NodeContext
from convener.manager.ops import FallbackReport
from convener.manager.tail import Tail
from convener.store.base import Fallback, Progress

log = structlog.get_logger(__name__)

LOOK_S: Final = 0.5
"""Seconds between two looks at how far the replicas are."""
APART_MS: Final = 60_000
"""What is missing so long after the last time that the store fell back is missing for another reason."""
REPORTS: Final = 20
"""Reports that a node keeps."""


class Owned(Protocol):
    """A conversation, as far as its tail is concerned."""

    @property
    def cid(self) -> str: ...

    @property
    def tail(self) -> Tail: ...


class Replicas:
    """Which instants' answers a replica has, by server: an offset that was read after an answer is beyond it."""

    def __init__(self) -> None:
        self._marks: dict[str, deque[tuple[int, float]]] = {}
        self._lines: dict[str, str | None] = {}

    def look(self, place: str, progress: Progress, asked: float) -> float | None:
        """Take one look. Returns the instant before which everything answered is at a replica, None for none new.

        Args:
            asked: boot-time clock before the server was asked.
        """
        marks = self._marks.setdefault(place, deque(maxlen=1000))
        if self._lines.get(place) != progress.line:
            # Offsets of another line say nothing of this one.
            marks.clear()
        self._lines[place] = progress.line
        if progress.offset is not None:
            marks.append((progress.offset, asked))
        upto: float | None = None
        while marks and progress.confirmed is not None and marks[0][0] <= progress.confirmed:
            upto = marks.popleft()[1]
        return upto


class Losses:
    """What one node knows of losses of its store."""

    def __init__(self, node: NodeContext, owned: Callable[[], Iterable[Owned]]) -> None:
        self._node = node
        self._owned = owned
        self._replicas = Replicas()
        self.reports: deque[FallbackReport] = deque(maxlen=REPORTS)

    def told(self, fallback: Fallback, conversations: int) -> None:
        """A server is there again that may have lost something."""
        log.warning(
            "the store may have lost what was written last",
            store=fallback.place,
            way=fallback.way,
            missing_bytes=fallback.missing,
            conversations=conversations,
        )
        self.reports.append(FallbackReport(wall_ms(), fallback.place, fallback.way, fallback.missing, conversations))

    @property
    def _latest(self) -> FallbackReport:
        if not self.reports or wall_ms() - self.reports[-1].at > APART_MS:
            # No server was seen to be another one, but something is missing all the same.
            self.reports.append(FallbackReport(wall_ms(), "", "unnoticed", None, len(list(self._owned()))))
        return self.reports[-1]

    def lost(self, cid: str, entries: int) -> None:
        """Confirmed entries are not in the log any more; 0: the ownership is not."""
        log.warning("the store has lost what it had confirmed", conversation_id=cid, entries=entries)
        self._node.metrics.log_entries_lost.inc(entries)
        self._latest.lost += entries

    def repaired(self, cid: str, entries: int) -> None:
        """They were written again."""
        log.warning("repaired what the store had lost", conversation_id=cid, entries=entries)
        self._node.metrics.log_entries_repaired.inc(entries)
        self._latest.repaired += entries

    def given_up(self, cid: str) -> None:
        """They are not known here either."""
        log.error("what the store has lost cannot be repaired", conversation_id=cid)
        self._latest.unrepaired += 1

    def verified(self) -> None:
        """Everything that this node owns was looked at."""
        for report in self.reports:
            report.verified = True

    async def run(self) -> None:
        """Drop for ever what replicas have from the tails."""
        while True:
            await asyncio.sleep(LOOK_S)
            asked = boottime()
            try:
                progress = await self._node.store.progress()
            except ConvenerError as error:
                log.debug("cannot see how far the replicas are", error=str(error))
                continue
            self._drop({place: self._replicas.look(place, of, asked) for place, of in progress.items()})

    def _drop(self, upto: dict[str, float | None]) -> None:
        if not any(upto.values()):
            return
        for owned in self._owned():
            before = upto.get(self._node.store.place_of(owned.cid))
            if before is not None:
                owned.tail.confirmed(before)
