"""What an owner has written and no replica is known to have: kept to be written again if the store falls back.

Bounded per conversation and per node: what does not fit is forgotten, oldest first, and what comes before it can not
be repaired any more. What a replica has confirmed is dropped.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, cast

import msgspec

from convener.core.model import AppendRequest, LogEntry, Meta
from convener.core.repair import RepairRequest
from convener.core.view import opens_after
from convener.core.wire import turn_position
from convener.manager.timers import ASK_TIMER

KEPT_BYTES: Final = 1 << 20
"""Of one conversation."""
KEPT_EVENTS: Final = 1000
"""Of one conversation; the store's scripts take a few thousand arguments at most."""
NODE_BYTES: Final = 64 << 20
"""Of all conversations of a node."""


class Budget:
    """Bytes that the tails of one node may take together. `total` 0: nothing is ever lost here, keep nothing."""

    def __init__(self, total: int = 0) -> None:
        self.total = total
        self.used = 0


@dataclass(frozen=True, slots=True)
class Written:
    """A batch that the store has confirmed. `before`: where the log ended without it; `at`: boot-time clock."""

    before: tuple[int, int]
    request: AppendRequest
    at: float
    size: int


class Tail:
    """The last batches of one ownership, without a hole.

    Args:
        mine: the head as it was when the ownership began.
        opened: the `open` entry of the ownership, None if it is not known.
    """

    def __init__(self, budget: Budget, mine: Meta, opened: LogEntry | None, now: float) -> None:
        self._budget = budget
        self._mine = mine
        self._batches: deque[Written] = deque()
        self._size = self._events = 0
        before = None if opened is None else opens_after(opened.event)
        if opened is not None and before is not None:
            request = AppendRequest(mine.owner, mine.epoch, before.seq, "", 0, 0, 0, (opened.event,))
            self._keep(Written((before.epoch, before.seq), request, now, len(opened.event)))

    def __len__(self) -> int:
        return len(self._batches)

    def keep(self, request: AppendRequest, now: float) -> None:
        """The store has confirmed a batch."""
        size = sum(map(len, request.events)) + len(request.state or b"") + 64
        size += sum(len(ask_id) + len(data) for ask_id, data in request.asks)
        self._keep(Written((request.epoch, request.expected), request, now, size))

    def _keep(self, batch: Written) -> None:
        self._batches.append(batch)
        self._count(batch, 1)
        while self._batches and (
            self._size > KEPT_BYTES or self._events > KEPT_EVENTS or self._budget.used > self._budget.total
        ):
            self._count(self._batches.popleft(), -1)

    def _count(self, batch: Written, sign: int) -> None:
        self._size += sign * batch.size
        self._events += sign * len(batch.request.events)
        self._budget.used += sign * batch.size

    def confirmed(self, before: float) -> None:
        """A replica has whatever was answered before this instant."""
        while self._batches and self._batches[0].at < before:
            self._count(self._batches.popleft(), -1)

    def clear(self) -> None:
        """The ownership is over."""
        while self._batches:
            self._count(self._batches.popleft(), -1)

    def missing(self, head: Meta | None, tip: tuple[int, int]) -> RepairRequest | None:
        """What is to be written again into a log that ends at `tip`; None if not all of that is known."""
        lost = list(self._batches)
        while lost and lost[0].before != tip:
            del lost[0]
        if not lost:
            return None
        if head is None and lost[0].before != (0, 0):
            return None
        return _request(self._mine, tip, [batch.request for batch in lost])


def _request(mine: Meta, tip: tuple[int, int], lost: Sequence[AppendRequest]) -> RepairRequest:
    events = [text for request in lost for text in request.events]
    settled, answered = _named(events)
    closes, asks = False, dict[str, str]()
    for request in lost:
        if request.ends_turn:
            closes, asks = True, {}
        asks |= dict(request.asks)
    return RepairRequest(
        owner=mine.owner,
        epoch=mine.epoch,
        nonce=mine.nonce,
        user=mine.user,
        generation=mine.generation,
        created=mine.created,
        metadata=mine.metadata,
        after=tip,
        events=tuple(events),
        batch=lost[-1].batch,
        cursor=max(request.cursor for request in lost),
        done=max(request.done for request in lost),
        base=max(request.base for request in lost),
        halted=max(request.halted for request in lost),
        settled=tuple(settled),
        answered=tuple(answered),
        asks=tuple((ask_id, data) for ask_id, data in asks.items() if ask_id not in answered),
        closes=closes,
        state=next((request.state for request in reversed(lost) if request.state is not None), None),
    )


def inputs(events: Sequence[str]) -> dict[int, str]:
    """The messages among some events: position → id."""
    found = dict[int, str]()
    for text in events:
        if text.startswith('{"kind":"input"'):
            event = cast("dict[str, Any]", msgspec.json.decode(text))
            found[turn_position(event["turn"])] = event["data"]["message_id"]
    return found


def _named(events: Sequence[str]) -> tuple[list[str], list[str]]:
    """Message ids and questions that are settled by inputs and answers."""
    settled, answered = list[str](), list[str]()
    for text in events:
        if not text.startswith(('{"kind":"input"', '{"kind":"answer"')):
            continue
        data = cast("dict[str, Any]", msgspec.json.decode(text))["data"]
        if "ask_id" in data:
            answered.append(str(data["ask_id"]))
        # The answer that a deadline gives is remembered under the question's own id, after a slash.
        settled.append(str(data["message_id"]) if "message_id" in data else f"{ASK_TIMER}{data['ask_id']}")
    return settled, answered
