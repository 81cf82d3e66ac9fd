"""The transitions of one conversation: each compares and sets in one atomic step.

``f(state, request, now_ms) -> (reply, effects)``. All refusals come first and have no effect; a publication
comes last. `state` holds what the store read in the same atomic step (a script, a transaction). The order of
the checks is part of the protocol: each was found by a counterexample (docs/explanation/protocol.md).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from convener.core import wire
from convener.core.model import (
    MESSAGES,
    REMEMBERED,
    RETRACTABLE,
    SEEN_WINDOW,
    STRIKE_WINDOW_MS,
    AddInbox,
    AddLog,
    AppendReply,
    AppendRequest,
    ClaimReply,
    ClaimRequest,
    ClearPieces,
    CloseAsks,
    Conversation,
    Created,
    DisownOutcome,
    DropInbox,
    Effect,
    Erase,
    EraseOutcome,
    InboxEntry,
    LogEntry,
    Meta,
    NewMessage,
    OpenAsks,
    Publish,
    ReleaseOutcome,
    ResolveReply,
    ResumeOutcome,
    SendReply,
    SetMeta,
    SetState,
    Status,
    StopReply,
    TrimInbox,
    TrimSeen,
    UnsendOutcome,
)

Effects = tuple[Effect, ...]


def create(state: Conversation, user: str, metadata: str, generation: str, now: int) -> tuple[Created, Effects]:
    """CREATE: make the head with epoch 0, or return the one that exists; the first creator's user stays."""
    if state.meta is not None:
        return Created(state.meta, created=False), ()
    meta = Meta(user=user, generation=generation, created=now, updated=now, metadata=metadata)
    return Created(meta, created=True), (SetMeta(meta),)


def refusal(status: Status) -> Literal["CLOSED", "FAILED", "HELD"]:
    """How an entry is refused that somebody wants to put into the inbox of a conversation that is not `running`."""
    return "FAILED" if status == "failed" else "HELD" if status == "held" else "CLOSED"


def send(
    state: Conversation, message: NewMessage, max_pending: int, reject_busy: bool, now: int
) -> tuple[SendReply, Effects]:
    """SEND: put a message into the inbox, once per id within the window of `seen` (I8)."""
    meta = state.meta
    if meta is None:
        return SendReply("NOT_FOUND"), ()
    if meta.status != "running":
        return SendReply(refusal(meta.status)), ()
    if state.seen is not None:
        # Followed by the same wake as OK: whoever sent it first may have died before waking anybody (I11).
        return SendReply("DUP", state.seen, meta.owner, meta.epoch), ()
    if meta.position - meta.done >= max_pending:
        return SendReply("FULL"), ()
    if reject_busy and meta.position > meta.done:
        return SendReply("BUSY"), ()
    position = meta.position + 1
    entry = InboxEntry(position, message.message_id, message.kind, message.user, now, message.data)
    return SendReply("OK", position, meta.owner, meta.epoch), (
        SetMeta(replace(meta, position=position, updated=now)),
        AddInbox(entry),
        Publish(wire.publish_inbox(entry)),
    )


def unsend(state: Conversation, message_id: str, position: int) -> tuple[UnsendOutcome, Effects]:
    """UNSEND: take an entry back that nobody has read, of a conversation that nobody owns.

    `meta.position` always names an entry that is there or was taken in: if it stayed on one that was taken
    back (this one, or one below it before), nothing could ever settle it, and RELEASE would be refused for
    ever.
    """
    meta = state.meta
    if meta is None or meta.owner or state.seen != position:
        return "REFUSED", ()
    if not any(e.position == position and e.kind in RETRACTABLE for e in state.inbox):
        return "REFUSED", ()
    effects: list[Effect] = []
    if position == meta.position:
        last = max((e.position for e in state.inbox if e.position < position), default=meta.cursor)
        effects.append(SetMeta(replace(meta, position=last)))
    return "OK", (*effects, DropInbox(position, message_id))


def next_epoch(meta: Meta, tip: tuple[int, int], now: int, floor: int = 0) -> int:
    """An epoch above every earlier one and above `floor`.

    The first two terms make it grow without any assumption on clocks. The third keeps a token from being
    handed out twice after a fail-over that lost the claim (I5), if the new primary's clock is not behind the
    old one's.
    """
    return max(meta.epoch + 1, tip[0] + 1, now, floor + 1)


def _rebuilt(state: Conversation, request: ClaimRequest, now: int) -> Meta:
    """A head for a log whose own head was lost.

    `done` and `base` are 0: the owner reads the log and finds out. Positions go on where they were, or a turn
    would get the id of an old one and its message be taken for read.
    """
    last = max(state.last, state.inbox[-1].position if state.inbox else 0)
    cursor = state.inbox[0].position - 1 if state.inbox else last
    return Meta(
        user=request.user,
        generation=request.generation,
        created=now,
        updated=now,
        owner=request.owner,
        epoch=request.epoch,
        seq=state.tip[1],
        cursor=cursor,
        position=last,
        asks=len(state.asks),
    )


def claim(state: Conversation, request: ClaimRequest, now: int) -> tuple[ClaimReply, Effects]:
    """CLAIM: become the owner under a new epoch, if owner and epoch are still those that were read.

    The caller has made sure that the expected owner is nobody, buried, or itself.
    """
    meta = state.meta
    if meta is None:
        if state.tip == (0, 0):
            return ClaimReply("NOT_FOUND"), ()
        meta = _rebuilt(state, request, now)
    if meta.owner == request.me and meta.nonce == request.nonce:
        return ClaimReply("OK", meta, state.inbox), ()
    if meta.owner != request.owner or meta.epoch != request.epoch:
        return ClaimReply("CONFLICT", meta), ()
    # A conversation that was deleted and made anew under the same id has owner and epoch of the first one's beginning.
    if request.generation and meta.generation != request.generation:
        return ClaimReply("CONFLICT", meta), ()
    if meta.status != "running":
        return ClaimReply("CLOSED", meta), ()
    epoch, seq = next_epoch(meta, state.tip, now, request.floor), meta.seq + 1
    opened = LogEntry(epoch, seq, wire.open_event(request.me, request.reason, state.tip, now))
    meta = replace(meta, owner=request.me, nonce=request.nonce, epoch=epoch, seq=seq, batch="", updated=now)
    # A turn that only waits for a person is not what takes nodes down, nor one whose answer nobody has taken in.
    waits = meta.asks > 0 or any(entry.kind == "answer" for entry in state.inbox)
    if request.reason == "takeover" and meta.cursor > meta.done and (request.acted or not waits):
        meta = _struck(meta, now)
    return ClaimReply("OK", meta, state.inbox, opened), (
        SetMeta(meta),
        AddLog((opened,)),
        Publish(wire.publish_log(epoch, seq, (opened.event,))),
    )


def _struck(meta: Meta, now: int) -> Meta:
    """Count a takeover of the open turn: before anything is loaded, since loading may be what kills."""
    turn = meta.done + 1
    if meta.struck == turn and now - meta.strike_at <= STRIKE_WINDOW_MS:
        return replace(meta, strikes=meta.strikes + 1)
    return replace(meta, strikes=1, struck=turn, strike_at=now)


def resolve(state: Conversation, me: str, nonce: str, epoch: int) -> tuple[ResolveReply, Effects]:
    """RESOLVE: settle a claim with unknown outcome, for good: if it has not landed, it never will."""
    meta = state.meta
    if meta is None:
        return ResolveReply("NOT_FOUND"), ()
    if meta.owner == me and meta.nonce == nonce:
        return ResolveReply("OWNED", meta, state.inbox), ()
    if meta.epoch == epoch:
        meta = replace(meta, epoch=epoch + 1)
        return ResolveReply("CANCELLED", meta), (SetMeta(meta),)
    return ResolveReply("MOVED", meta), ()


def append(state: Conversation, request: AppendRequest, now: int) -> tuple[AppendReply, Effects]:
    """APPEND: the owner's only write. Fenced by owner and epoch, ordered by the expected seq."""
    meta = state.meta
    if meta is None:
        return AppendReply("FENCED"), ()
    if meta.owner != request.owner or meta.epoch != request.epoch:
        return AppendReply("FENCED", meta.seq, meta.batch, meta.owner, meta.epoch), ()
    if meta.seq != request.expected:
        return AppendReply("GAP", meta.seq, meta.batch), ()
    if request.closing and not _may_close(meta, request):
        return AppendReply("PENDING", meta.seq, meta.batch), ()
    entries = tuple(
        LogEntry(request.epoch, request.expected + i, text) for i, text in enumerate(request.events, start=1)
    )
    seq, done = meta.seq + len(entries), max(meta.done, request.done)
    effects: list[Effect] = []
    if request.cursor > meta.cursor:
        effects.append(TrimInbox(request.cursor))
    if done > meta.done:
        effects.append(TrimSeen(min(done, meta.position - SEEN_WINDOW)))
    if request.state is not None:
        effects.append(SetState(request.state))
    asks = _asks(state, request, effects)
    meta = replace(
        meta,
        seq=seq,
        batch=request.batch,
        cursor=max(meta.cursor, request.cursor),
        done=done,
        base=max(meta.base, request.base),
        halted=max(meta.halted, request.halted),
        asks=asks,
        updated=now,
    )
    if request.closing:
        meta = replace(meta, owner="", nonce="", status=request.closing)
    if request.closing == "stopped":
        meta = replace(meta, done=meta.position)
    if entries:
        effects.insert(0, AddLog(entries))
        effects.append(Publish(wire.publish_log(request.epoch, request.expected + 1, request.events)))
    return AppendReply("OK", seq, request.batch), (SetMeta(meta), *effects)


def _may_close(meta: Meta, request: AppendRequest) -> bool:
    """Closing over an inbox entry that was not taken in would lose an acknowledged message (I8), and giving a turn up
    must not undo a stop that somebody has asked for (I15).
    """
    if request.closing == "stopped":
        return meta.status == "stopping" and request.cursor == meta.position
    return meta.status == "running"


def _asks(state: Conversation, request: AppendRequest, effects: list[Effect]) -> int:
    """How many questions are open after the batch. What a turn has streamed and asked ends with it, and a stop ends
    every turn.
    """
    ends = request.ends_turn or request.closing == "stopped"
    if ends or request.begins_turn:
        effects.append(ClearPieces())
    if ends:
        effects.append(CloseAsks())
    if request.asks:
        effects.append(OpenAsks(request.asks))
    before: frozenset[str] = frozenset() if ends else state.asks
    return len(before | {ask_id for ask_id, _ in request.asks})


def is_settled(meta: Meta) -> bool:
    """Nothing is unanswered, or everything is taken in and the open turn waits for a person (I13)."""
    return meta.position == meta.done or (meta.asks > 0 and meta.cursor == meta.position)


def _may_leave(meta: Meta) -> bool:
    """It is settled, and no stop waits to be finished (I15): that goes before any answer."""
    return meta.status == "running" and is_settled(meta)


def _at_rest(meta: Meta) -> str:
    """The status of a conversation that nobody owns any more, or not yet."""
    return "waiting" if meta.asks else "hibernated"


def release(state: Conversation, owner: str, epoch: int, seq: int) -> tuple[ReleaseOutcome, Effects]:
    """RELEASE: give the conversation up, if it is settled (I13) and nothing was appended since."""
    meta = state.meta
    if meta is None or meta.owner != owner or meta.epoch != epoch:
        return "FENCED", ()
    if meta.seq != seq or not _may_leave(meta):
        return "PENDING", ()
    return "OK", (
        SetMeta(replace(meta, owner="", nonce="")),
        Publish(wire.publish_status(epoch, _at_rest(meta))),
    )


def disown(state: Conversation, owner: str, epoch: int) -> tuple[DisownOutcome, Effects]:
    """DISOWN: clear a buried owner, or raise the epoch of what nobody owns, so that no late CLAIM matches.

    An unowned conversation with unread messages may be raised: who sent them wakes it before acknowledging
    (I11).
    """
    meta = state.meta
    if meta is None:
        return "NOT_FOUND", ()
    if meta.owner != owner or meta.epoch != epoch:
        return "CONFLICT", ()
    if owner and not _may_leave(meta):
        return "PENDING", ()
    effects: Effects = (SetMeta(replace(meta, owner="", nonce="", epoch=epoch + 1)),)
    return "OK", (*effects, Publish(wire.publish_status(epoch, _at_rest(meta)))) if owner else effects


def stop(state: Conversation, me: str, reason: str, buried: str, now: int) -> tuple[StopReply, Effects]:
    """STOP: record the intent; finish at once if nobody owns the conversation or its owner is `buried` (I15).

    Unread messages and answers were acknowledged, so they enter the log (I8) before the `stopped` entry gives them up.
    """
    meta = state.meta
    if meta is None:
        return StopReply("NOT_FOUND"), ()
    before = StopReply("STOPPED", meta.owner, meta.nonce, meta.user, reason)
    if meta.status == "stopped":
        return replace(before, outcome="ALREADY"), ()
    if meta.owner and meta.owner != buried:
        return _ask_to_stop(meta, reason, replace(before, outcome="STOPPING"), now)
    epoch = next_epoch(meta, state.tip, now)
    unread = (e for e in state.inbox if e.kind in REMEMBERED)
    given_up = tuple(wire.input_event(e) if e.kind in MESSAGES else wire.answer_event(e) for e in unread)
    events = (wire.open_event(me, "stop", state.tip, now), *given_up, wire.stopped_event(reason, now))
    entries = tuple(LogEntry(epoch, meta.seq + i, text) for i, text in enumerate(events, start=1))
    closed = replace(
        meta,
        owner="",
        nonce="",
        epoch=epoch,
        seq=meta.seq + len(entries),
        batch="",
        status="stopped",
        cursor=meta.position,
        done=meta.position,
        asks=0,
        updated=now,
    )
    return before, (
        SetMeta(closed),
        AddLog(entries),
        TrimInbox(meta.position),
        ClearPieces(),
        CloseAsks(),
        Publish(wire.publish_log(epoch, meta.seq + 1, events)),
    )


def _ask_to_stop(meta: Meta, reason: str, reply: StopReply, now: int) -> tuple[StopReply, Effects]:
    """The owner lives: a numbered inbox entry tells it, so that a lost publication is found like any hole.

    Its id is not remembered in `seen`: it must not collide with a message id that a client chose.
    """
    if meta.status == "stopping":
        return reply, ()
    position = meta.position + 1
    entry = InboxEntry(position, f"stop.{position}", "stop", "", now, wire.json_text(reason))
    return reply, (
        SetMeta(replace(meta, status="stopping", position=position, updated=now)),
        AddInbox(entry),
        Publish(wire.publish_inbox(entry)),
    )


def resume(state: Conversation, now: int) -> tuple[ResumeOutcome, Effects]:
    """RESUME: what a user asks for after a stop, or when a turn is not to be repeated unasked; nothing else clears
    it (I15). Takeovers are counted anew. The epoch is raised, so that no CLAIM that was refused comes true.
    """
    meta = state.meta
    if meta is None:
        return "NOT_FOUND", ()
    if meta.status in ("running", "stopping"):
        return ("RUNNING" if meta.status == "running" else "BUSY"), ()
    after = replace(meta, status="running", epoch=meta.epoch + 1, strikes=0, updated=now)
    return "OK", (SetMeta(after), Publish(wire.publish_status(meta.epoch, _at_rest(meta))))


def set_metadata(state: Conversation, metadata: str, now: int) -> tuple[Meta | None, Effects]:
    """Replace the user's metadata; returns the new head, None if there is no conversation."""
    if state.meta is None:
        return None, ()
    meta = replace(state.meta, metadata=metadata, updated=now)
    return meta, (SetMeta(meta),)


def erase(state: Conversation) -> tuple[EraseOutcome, Effects]:
    """ERASE: remove a stopped conversation, or one that was created and never started or written to."""
    meta = state.meta
    if meta is None:
        return "OK", (Erase(),)
    untouched = meta.epoch == 0 and meta.position == 0
    if meta.owner or not (meta.status == "stopped" or untouched):
        return "REFUSED", ()
    return "OK", (Erase(),)
