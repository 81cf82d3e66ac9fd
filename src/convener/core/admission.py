"""The exact per-user limit: register first, then check, own registration counted (I6).

A user's slots are one hash, conversation → `Slot`; queued starts are one ordered list. The limit that arrives
here is *raised* by one: the new entry counts itself, so it is refused when the count with the entry reaches
it. Nobody else adds or subtracts; that is what keeps the limit from being off by one in either direction.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Literal

MAX_WAITING: Final = 1000
"""Queued starts of one user; a bound, so that a store key cannot grow without end."""


@dataclass(frozen=True, slots=True)
class Slot:
    """A user's right to one running conversation: who holds it under which nonce."""

    nonce: str
    incarnation: str

    def encode(self) -> str:
        """The value in the store."""
        return f"{self.nonce}|{self.incarnation}"

    @staticmethod
    def decode(value: str) -> Slot:
        """Inverse of `encode`."""
        nonce, _, incarnation = value.partition("|")
        return Slot(nonce, incarnation)


@dataclass(frozen=True, slots=True)
class Waiting:
    """A queued start: `incarnation` looks after it, `since` is the store's clock in ms."""

    conversation_id: str
    incarnation: str
    reason: str
    since: int


ReserveOutcome = Literal["OK", "HELD", "LIMIT"]


@dataclass(frozen=True, slots=True)
class ReserveReply:
    """Outcome of RESERVE.

    `slot` is the value found (OK, HELD), `count` the number of slots taken without the caller's (LIMIT).
    """

    outcome: ReserveOutcome
    slot: Slot | None = None
    count: int = 0


def reserve(
    slots: Mapping[str, Slot],
    waiting: tuple[Waiting, ...],
    conversation_id: str,
    slot: Slot,
    raised_limit: int,
    read: Slot | None,
) -> ReserveReply:
    """RESERVE: whether `conversation_id` may take or adopt a slot now.

    Args:
        slots: the user's slots by conversation.
        waiting: queued starts, oldest first.
        conversation_id: what is to be started.
        slot: what is to be written.
        raised_limit: the limit plus one; 0 for no limit.
        read: the slot value that the caller has read and may adopt: a buried node's, or one that names the
            caller.
    """
    held = slots.get(conversation_id)
    if held is not None:
        if held.nonce == slot.nonce or held == read:
            return ReserveReply("OK", held)
        return ReserveReply("HELD", held)
    # Nobody is passed over: those who wait longer count as if they held a slot already.
    ahead = len(waiting)
    for rank, entry in enumerate(waiting):
        if entry.conversation_id == conversation_id:
            ahead = rank
            break
    if raised_limit and len(slots) + 1 + ahead >= raised_limit:
        return ReserveReply("LIMIT", None, len(slots))
    return ReserveReply("OK", None)
