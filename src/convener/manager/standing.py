"""A conversation's status, derived from its log and from what only its channel or its head says (decision 0005)."""

from __future__ import annotations

from collections.abc import Iterable

from convener.core.directory import LoopStatus
from convener.core.model import Meta
from convener.core.replay import SETTLING
from convener.manager.context import NodeContext
from convener.manager.published import Item

GIVEN_UP = "too_many_takeovers"
"""Code of a `turn_failed` entry after which nobody may own the conversation any more, which no entry says."""


def resting(meta: Meta) -> LoopStatus:
    """The status of a conversation that nobody owns and that was not stopped."""
    if meta.status == "failed":
        return "failed"
    return "waiting" if meta.status == "held" or meta.asks else "hibernated"


class Standing:
    """What is known of the status. `show` takes entries in the order of the log."""

    def __init__(self, node: NodeContext) -> None:
        self._node = node
        self.owner = ""
        self.epoch = 0
        self.open_turn = ""
        self.loaded = False
        self.stopped_reason: str | None = None
        self.override: LoopStatus | None = None
        self.sent_away = False
        self._resting: LoopStatus = "hibernated"
        self._asks: set[str] = set()

    @property
    def waiting(self) -> bool:
        """Whether a question of the open turn waits for an answer."""
        return bool(self._asks)

    @property
    def busy(self) -> bool:
        """Whether a message is being answered, as far as the log shows. Who waits for a person is not busy."""
        return bool(self.open_turn) and self.loaded and not self._asks

    @property
    def status(self) -> LoopStatus:
        """The conversation's status."""
        if self.stopped_reason is not None:
            return "stopped"
        if self.override is not None:
            return self.override
        if not self.loaded:
            return self._resting if self.epoch else "starting"
        if self.owner in self._node.buried:
            return "recovering"
        if self._asks:
            return "waiting"
        return "running" if self.open_turn else "idle"

    def set_head(self, meta: Meta, asks: Iterable[str] = ()) -> None:
        """Take the status from a head that was read, and the ids of the open questions."""
        self.owner, self.epoch, self.loaded = meta.owner, meta.epoch, bool(meta.owner)
        self.open_turn = "?" if meta.owner and meta.cursor > meta.done else ""
        self.stopped_reason = "" if meta.status == "stopped" else None
        self._resting = resting(meta)
        self._asks = set(asks)

    def unloaded(self, status: LoopStatus) -> None:
        """Nobody owns it any more."""
        self.loaded, self.owner, self.open_turn, self.override = False, "", "", None
        self._resting = status

    def show(self, item: Item) -> None:
        """Take the next entry."""
        event = item.event
        if event.kind == "open":
            self.owner, self.epoch, self.loaded = str(event.field("node") or ""), item.place.epoch, True
            self.open_turn, self.stopped_reason, self.override, self.sent_away = "", None, None, False
            self._resting = "hibernated"
        elif event.kind == "turn_started":
            self.open_turn = event.turn
        elif event.kind == "ask":
            self._asks.add(str(event.field("ask_id")))
        elif event.kind == "answer":
            self._asks.discard(str(event.field("ask_id")))
        elif event.kind in SETTLING:
            self.open_turn = ""
            self._asks.clear()
        elif event.kind == "stopped":
            self.stopped_reason = str(event.field("reason") or "")
            self.open_turn, self.loaded, self.owner = "", False, ""
            self._asks.clear()
