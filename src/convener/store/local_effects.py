"""The effects of a conversation's steps, applied to tables."""

from __future__ import annotations

from typing import TypeVar

from convener.core.model import (
    REMEMBERED,
    AddAlarm,
    AddInbox,
    AddLog,
    AddPieces,
    ClearPieces,
    CloseAsks,
    DropAlarm,
    DropInbox,
    Effect,
    Erase,
    OpenAsks,
    Publish,
    Remember,
    SetMeta,
    SetState,
    TrimInbox,
    TrimLog,
    TrimSeen,
)
from convener.store.tables import Tables, channel_name

T = TypeVar("T")


def apply(t: Tables, cid: str, result: tuple[T, tuple[Effect, ...]]) -> T:
    """Write what a transition decided; the reply."""
    reply, effects = result
    for effect in effects:
        match effect:
            case SetMeta(meta):
                t.set_meta(cid, meta)
            case AddLog(entries):
                t.add_log(cid, entries)
            case TrimLog(seq):
                t.trim_log(cid, seq)
            case AddInbox(entry):
                t.add_inbox(cid, entry)
                if entry.kind in REMEMBERED:
                    t.remember(cid, entry.message_id, entry.position)
            case DropInbox(position, message_id):
                t.drop_inbox(cid, position)
                if message_id:
                    t.forget_id(cid, message_id)
            case Remember(message_id, position):
                t.remember(cid, message_id, position)
            case TrimInbox(position):
                t.trim_inbox(cid, position)
            case TrimSeen(position):
                t.trim_seen(cid, position)
            case SetState(state):
                t.set_state(cid, state)
            case OpenAsks(asks):
                for ask_id, data in asks:
                    t.open_ask(cid, ask_id, data)
            case CloseAsks(ask_id):
                t.close_asks(cid, ask_id)
            case AddPieces(pieces):
                t.add_pieces(cid, pieces)
            case ClearPieces():
                t.clear_pieces(cid)
            case AddAlarm(alarm_id, data):
                t.add_alarm(cid, alarm_id, data)
            case DropAlarm(alarm_id):
                t.drop_alarm(cid, alarm_id)
            case Erase():
                t.erase(cid)
            case Publish(message):
                t.publish(channel_name("c", cid), message)
    return reply
