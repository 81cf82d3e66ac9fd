"""REPAIR: an owner writes again what a store has lost that fell back (asynchronous replication, a restart).

Log entries come back under their old ids and with their old contents (I4), and so does the ownership that they were
written under. Nothing else may have happened since: the log must end exactly where the owner knows that what it
remembers begins, and no later epoch may have begun (I2, I3).

The store has counted the inbox anew from where it fell back to, so what was accepted since may have the positions of
repaired messages, which name their turns. Such entries get new positions, above all that the owner has ever taken in
(`models/rollback.py`); only therefore may the cursor move there.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from convener.core import wire
from convener.core.model import (
    REMEMBERED,
    AddInbox,
    AddLog,
    ClearPieces,
    CloseAsks,
    Conversation,
    DropInbox,
    Effect,
    LogEntry,
    Meta,
    OpenAsks,
    Publish,
    Remember,
    SetMeta,
    SetState,
)

Standing = Literal["good", "lost", "fallen"]
RepairOutcome = Literal["OK", "GAP", "FENCED", "CLOSED"]


@dataclass(frozen=True, slots=True)
class RepairRequest:
    """What an owner writes again after the store has lost it.

    Attributes:
        owner, epoch, nonce: of the ownership, written again if that was lost.
        user, generation, created, metadata: of the head, if all of it was lost.
        after: the exact (epoch, seq) at which the log must end now.
        events: JSON texts of the lost entries, all of `epoch`, in order.
        batch: id of the last lost batch, "" if the log needs nothing.
        cursor, done, base, halted: as of that batch; none goes back.
        settled: ids of the messages and answers among `events`.
        answered: questions that are answered in `events`.
        asks: questions that `events` leave open.
        closes: a turn ends in `events`, so whatever was asked before is closed.
        state: the agent's durable state as of that batch, None to leave it.
    """

    owner: str
    epoch: int
    nonce: str
    user: str
    generation: str
    created: int
    metadata: str
    after: tuple[int, int]
    events: tuple[str, ...] = ()
    batch: str = ""
    cursor: int = 0
    done: int = 0
    base: int = 0
    halted: int = 0
    settled: tuple[str, ...] = ()
    answered: tuple[str, ...] = ()
    asks: tuple[tuple[str, str], ...] = ()
    closes: bool = False
    state: bytes | None = None


def standing(head: Meta | None, tip: tuple[int, int], mine: Meta, written: int) -> Standing:
    """What has become of an ownership in a store that may have fallen back.

    Args:
        head: as the store has it now, None if the conversation is gone.
        tip: (epoch, seq) of the last entry of its log.
        mine: the head as it was when the ownership began.
        written: seq of the last entry that was confirmed to the owner.

    Returns:
        ``good``: nothing is missing. ``lost``: somebody else has it, or it is another conversation. ``fallen``:
        ownership or entries are missing and have to be repaired.
    """
    if head is None:
        return "fallen"
    if head.generation != mine.generation or head.epoch > mine.epoch:
        return "lost"
    if head.epoch < mine.epoch:
        return "fallen"
    if head.owner != mine.owner:
        return "lost"
    return "fallen" if tip[1] < written else "good"


def repair(state: Conversation, request: RepairRequest, now: int) -> tuple[RepairOutcome, tuple[Effect, ...]]:
    """REPAIR: append lost entries under their old ids, and write ownership, state and questions that went with them."""
    meta = state.meta
    if meta is None:
        meta = Meta(request.user, request.generation, request.created, now, request.metadata)
    if meta.generation != request.generation or meta.epoch > request.epoch:
        return "FENCED", ()
    if meta.epoch == request.epoch and meta.owner != request.owner:
        return "FENCED", ()
    if meta.status not in ("running", "stopping"):
        # Asked to stop before or after it was lost that somebody resumed it: a stop is the last word (I15).
        return "CLOSED", ()
    if state.tip != request.after or meta.seq != request.after[1]:
        return "GAP", ()
    first = meta.seq + 1
    entries = tuple(LogEntry(request.epoch, first + i, text) for i, text in enumerate(request.events))
    effects: list[Effect] = [AddLog(entries)] if entries else []
    last = _make_room(state, request, effects)
    before: frozenset[str] = frozenset() if request.closes else state.asks.difference(request.answered)
    meta = replace(
        meta,
        owner=request.owner,
        nonce=request.nonce,
        epoch=request.epoch,
        seq=meta.seq + len(entries),
        batch=request.batch or meta.batch,
        cursor=max(meta.cursor, request.cursor),
        position=max(meta.position, request.cursor, last),
        done=max(meta.done, request.done),
        base=max(meta.base, request.base),
        halted=max(meta.halted, request.halted),
        asks=len(before | {ask_id for ask_id, _ in request.asks}),
        updated=now,
    )
    if request.closes:
        effects += (ClearPieces(), CloseAsks())
    effects += (CloseAsks(ask_id) for ask_id in request.answered)
    if request.asks:
        effects.append(OpenAsks(request.asks))
    if request.state is not None:
        effects.append(SetState(request.state))
    if entries:
        effects.append(Publish(wire.publish_log(request.epoch, first, request.events)))
    return "OK", (SetMeta(meta), *effects)


def _make_room(state: Conversation, request: RepairRequest, effects: list[Effect]) -> int:
    """Take repaired messages out of the inbox, and give the rest positions above what the owner has taken in, in the
    old order. Returns the last position in the inbox, 0 if it is empty.
    """
    repaired = [e for e in state.inbox if e.kind in REMEMBERED and e.message_id in request.settled]
    kept = [e for e in state.inbox if e not in repaired]
    effects += (DropInbox(e.position, e.message_id) for e in repaired)
    effects += (Remember(message_id, 0) for message_id in request.settled)
    if any(e.position <= request.cursor for e in kept):
        moved = [replace(e, position=request.cursor + i) for i, e in enumerate(kept, start=1)]
        # The id of what is not remembered may be that of a message.
        effects += (DropInbox(e.position, e.message_id if e.kind in REMEMBERED else "") for e in kept)
        effects += (AddInbox(e) for e in moved)
        kept = moved
    return kept[-1].position if kept else 0
