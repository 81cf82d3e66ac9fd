"""What reaches the owner of a conversation besides messages, and what it says besides its log: the transitions.

Same form and same rules as `convener.core.conversation`.
"""

from __future__ import annotations

from dataclasses import replace

from convener.core import wire
from convener.core.conversation import Effects, refusal
from convener.core.model import (
    MAX_ALARMS,
    MAX_UNREAD,
    AddAlarm,
    AddInbox,
    AddPieces,
    AlarmOutcome,
    CloseAsks,
    Conversation,
    DropAlarm,
    InboxEntry,
    InterruptReply,
    NewMessage,
    PieceOutcome,
    Publish,
    SendReply,
    SetMeta,
)


def interrupt(state: Conversation, turn: str, now: int) -> tuple[InterruptReply, Effects]:
    """INTERRUPT: record that the running turn is to end; whoever owns or takes over the conversation obeys.

    Args:
        turn: the turn that is meant, "" for whichever runs: a press meant for an earlier turn must not hit the next.
    """
    meta = state.meta
    if meta is None:
        return InterruptReply("NOT_FOUND"), ()
    if meta.status != "running":
        return InterruptReply(refusal(meta.status)), ()
    if meta.position == meta.done:
        return InterruptReply("IDLE"), ()
    if turn and wire.turn_position(turn) <= meta.done:
        return InterruptReply("STALE"), ()
    if meta.position - meta.cursor >= MAX_UNREAD:
        return InterruptReply("FULL"), ()
    position = meta.position + 1
    entry = InboxEntry(position, f"interrupt.{position}", "interrupt", "", now, wire.json_text(turn))
    return InterruptReply("OK", position, meta.owner, meta.epoch), (
        SetMeta(replace(meta, position=position, updated=now)),
        AddInbox(entry),
        Publish(wire.publish_inbox(entry)),
    )


def answer(state: Conversation, ask_id: str, message: NewMessage, now: int) -> tuple[SendReply, Effects]:
    """ANSWER: take the answer to an open question; the first one closes it, so there is never a second.

    It is exempt from the limit on messages: a full queue behind the question must not keep it from being answered.
    """
    meta = state.meta
    if meta is None:
        return SendReply("NOT_FOUND"), ()
    if meta.status != "running":
        return SendReply(refusal(meta.status)), ()
    if state.seen is not None:
        return SendReply("DUP", state.seen, meta.owner, meta.epoch), ()
    if ask_id not in state.asks:
        return SendReply("ASK_CLOSED"), ()
    if meta.position - meta.cursor >= MAX_UNREAD:
        return SendReply("FULL"), ()
    position = meta.position + 1
    entry = InboxEntry(position, message.message_id, "answer", message.user, now, message.data)
    return SendReply("OK", position, meta.owner, meta.epoch), (
        SetMeta(replace(meta, position=position, asks=len(state.asks) - 1, updated=now)),
        AddInbox(entry),
        CloseAsks(ask_id),
        Publish(wire.publish_inbox(entry)),
    )


def set_alarm(state: Conversation, alarm_id: str, data: str) -> tuple[AlarmOutcome, Effects]:
    """SET_ALARM: keep what an alarm will say, with the conversation. Set again, it says the new thing.

    One that has fired is not set again (DUP): the turn that set it may be repeated.
    """
    meta = state.meta
    if meta is None:
        return "NOT_FOUND", ()
    if meta.status in ("stopping", "stopped"):
        return "CLOSED", ()
    if state.seen is not None:
        return "DUP", ()
    if state.alarm is None and state.alarms >= MAX_ALARMS:
        return "FULL", ()
    return "OK", (AddAlarm(alarm_id, data),)


def fire(state: Conversation, alarm_id: str, max_pending: int, now: int) -> tuple[SendReply, Effects]:
    """FIRE: turn an alarm into a message, once: it is removed in the same step.

    DUP means that it is not set (any more); as after SEND, the conversation may still have to be woken (I11). So does
    an id that is remembered already: a second entry under it would make the owner pass the first one over (I8).
    """
    meta = state.meta
    if meta is None:
        return SendReply("NOT_FOUND"), ()
    if meta.status in ("stopping", "stopped"):
        return SendReply("CLOSED"), (DropAlarm(alarm_id),)
    if meta.status != "running":
        return SendReply(refusal(meta.status)), ()
    if state.alarm is None or state.seen is not None:
        return SendReply("DUP", state.seen or 0, meta.owner, meta.epoch), (DropAlarm(alarm_id),)
    if meta.position - meta.done >= max_pending:
        return SendReply("FULL"), ()
    position = meta.position + 1
    entry = InboxEntry(position, alarm_id, "alarm", meta.user, now, state.alarm)
    return SendReply("OK", position, meta.owner, meta.epoch), (
        SetMeta(replace(meta, position=position, updated=now)),
        AddInbox(entry),
        DropAlarm(alarm_id),
        Publish(wire.publish_inbox(entry)),
    )


def pieces(
    state: Conversation, owner: str, epoch: int, position: int, texts: tuple[str, ...]
) -> tuple[PieceOutcome, Effects]:
    """PIECES: add to the answer that is being written, as its owner, while its turn has not ended.

    Args:
        position: of the turn's message.
        texts: JSON texts. They carry their offsets, so one that is added twice does no harm.
    """
    meta = state.meta
    if meta is None or meta.owner != owner or meta.epoch != epoch:
        return "FENCED", ()
    if position <= meta.done:
        return "STALE", ()
    if not texts:
        return "OK", ()
    return "OK", (AddPieces(texts), Publish(wire.publish_pieces(epoch, texts)))
