"""Texts that the store holds and publishes: log events and publications of one conversation's channel.

All are JSON. Ids and node names are drawn from an alphabet without quotes and backslashes (`convener.ids`),
so the Lua scripts may write them without escaping; free text goes through the JSON encoder in both places.

Publications on ``{NS:c:C}``::

    {"t":"in","pos":7,"id":"m1","kind":"message","user":"u","ts":1,"data":…}  an inbox entry; no `data` if large
    {"t":"log","epoch":E,"seq":F,"events":[…]}                                entries from seq F; "n" if large
    {"t":"piece","epoch":E,"pieces":[…]}              pieces of the answer that is being written; "n" if large
    {"t":"status","epoch":E,"status":"hibernated"}                            what is not in the log
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Final

from convener.core.model import PUBLISH_LIMIT, InboxEntry

_ANSWERED: Final = re.compile(r'\{"ask_id":"(?:(t[0-9]+)\.)?')


def json_text(value: object) -> str:
    """Compact JSON text of a plain value, always fit for UTF-8.

    A string with half a surrogate pair, which JSON can say and UTF-8 cannot, is written with escapes.

    Raises:
        ValueError: a number is not finite, which JSON cannot say.
    """
    text = json.dumps(value, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    try:
        text.encode()
    except UnicodeEncodeError:
        return json.dumps(value, separators=(",", ":"), allow_nan=False)
    return text


def turn_id(position: int) -> str:
    """The id of the turn that answers the inbox entry at `position`."""
    return f"t{position}"


def turn_position(turn: str) -> int:
    """The inbox position of a turn's message, 0 if `turn` is not a turn id."""
    digits = turn[1:]
    return int(digits) if turn[:1] == "t" and digits.isascii() and digits.isdigit() else 0


def event(kind: str, turn: str, ts: int, data: str) -> str:
    """A log event. `data` is JSON text; `kind` and `turn` are ids."""
    return f'{{"kind":"{kind}","turn":"{turn}","ts":{ts},"data":{data}}}'


def input_event(entry: InboxEntry) -> str:
    """The log event of a message that was taken in. One that an alarm has sent says so."""
    alarm = ',"alarm":true' if entry.kind == "alarm" else ""
    data = f'{{"message_id":"{entry.message_id}","user_id":"{entry.user}","data":{entry.data}{alarm}}}'
    return event("input", turn_id(entry.position), entry.ts, data)


def answer_event(entry: InboxEntry) -> str:
    """The log event of an answer that was taken in; the turn is the one that asked.

    The entry's data is ``{"ask_id":"t5.1", …}``, in this form: the scripts do the same without a JSON parser, which
    would not give numbers back as they are.
    """
    said = f'{{"message_id":"{entry.message_id}","user_id":"{entry.user}",'
    found = _ANSWERED.match(entry.data)
    if found is None:
        return event("answer", "", entry.ts, f'{said}"data":{entry.data}}}')
    return event("answer", found[1] or "", entry.ts, said + entry.data[1:])


def open_event(node: str, reason: str, previous: tuple[int, int], ts: int) -> str:
    """The first event of an epoch. `previous` is the exact (epoch, seq) before it."""
    return event("open", "", ts, f'{{"node":"{node}","reason":"{reason}","prev":[{previous[0]},{previous[1]}]}}')


def stopped_event(reason: str, ts: int) -> str:
    """The last event of a conversation that was stopped on purpose."""
    return event("stopped", "", ts, json_text({"reason": reason}))


def publish_inbox(entry: InboxEntry) -> str:
    """The publication of a new inbox entry."""
    head = (
        f'{{"t":"in","pos":{entry.position},"id":"{entry.message_id}","kind":"{entry.kind}",'
        f'"user":"{entry.user}","ts":{entry.ts}'
    )
    return f'{head},"data":{entry.data}}}' if len(entry.data.encode()) <= PUBLISH_LIMIT else head + "}"


def publish_log(epoch: int, first: int, events: Sequence[str]) -> str:
    """The publication of entries `first`, `first` + 1, … of `epoch`."""
    head = f'{{"t":"log","epoch":{epoch},"seq":{first}'
    if sum(len(e.encode()) for e in events) > PUBLISH_LIMIT:
        return f'{head},"n":{len(events)}}}'
    return f'{head},"events":[{",".join(events)}]}}'


def publish_pieces(epoch: int, pieces: Sequence[str]) -> str:
    """The publication of pieces of the answer that is being written."""
    head = f'{{"t":"piece","epoch":{epoch}'
    if sum(len(p.encode()) for p in pieces) > PUBLISH_LIMIT:
        return f'{head},"n":{len(pieces)}}}'
    return f'{head},"pieces":[{",".join(pieces)}]}}'


def publish_status(epoch: int, status: str) -> str:
    """The publication of a status that the log does not show."""
    return f'{{"t":"status","epoch":{epoch},"status":"{status}"}}'
