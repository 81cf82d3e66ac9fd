"""What has to be true of a history, whoever was shown it. Judges log entries in the form that clients get."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from itertools import pairwise
from typing import Any

Event = Mapping[str, Any]

SETTLING = ("turn_done", "turn_failed", "turn_interrupted")


def check_order(events: Sequence[Event]) -> None:
    """Dense from 1; each epoch begins with its only `open`, which names the entry before it (I1, I2, I3)."""
    assert [event["seq"] for event in events] == list(range(1, len(events) + 1))
    assert not events or events[0]["kind"] == "open"
    for before, event in pairwise(events):
        if event["kind"] == "open":
            assert event["epoch"] > before["epoch"], (before, event)
            assert event["data"]["prev"] == [before["epoch"], before["seq"]], (before, event)
        else:
            assert event["epoch"] == before["epoch"], (before, event)


def check_answered(
    events: Sequence[Event],
    sent: Mapping[str, str],
    *,
    answer: Callable[[str], str] = str,
    given_up: Collection[str] = (),
) -> None:
    """Every message that was sent (id → text) is an `input` once and has one reply, and nothing else is there (I8).

    Args:
        answer: what the agent replies to a text.
        given_up: ids of messages that a stop or a failure left without a reply; they are in the log once all the same.
    """
    check_order(events)
    inputs = {event["turn"]: event["data"] for event in events if event["kind"] == "input"}
    ids = Counter(event["data"]["message_id"] for event in events if event["kind"] == "input")
    assert {ident: times for ident, times in ids.items() if times > 1} == {}, "a message is in the log twice"
    assert set(ids) == set(sent), f"missing: {set(sent) - set(ids)}, unknown: {set(ids) - set(sent)}"
    replies = Counter(event["turn"] for event in events if event["kind"] == "reply")
    settled = Counter(event["turn"] for event in events if event["kind"] in SETTLING)
    for turn, data in inputs.items():
        ident = data["message_id"]
        assert data["data"] == {"text": sent[ident]}
        if ident in given_up:
            assert replies[turn] == 0, f"{ident} was answered"
        else:
            assert (replies[turn], settled[turn]) == (1, 1), f"{ident} in turn {turn}"
    for event in events:
        if event["kind"] == "reply":
            assert event["data"] == {"text": answer(sent[inputs[event["turn"]]["message_id"]])}, event
    check_turns(events)


def check_turns(events: Sequence[Event]) -> None:
    """Attempts count up from 1; one turn at a time; nothing of a turn after its end."""
    running, attempts, over = "", Counter[str](), set[str]()
    for event in events:
        kind, turn = event["kind"], event["turn"]
        if kind == "open":
            running = ""
        if not turn or kind == "input":
            continue
        assert turn not in over, f"{event} comes after the end of its turn"
        if kind == "turn_started":
            assert running in ("", turn), f"{event} while {running} runs"
            attempts[turn] += 1
            assert event["data"]["attempt"] == attempts[turn], event
            running = turn
        elif kind in SETTLING:
            over.add(turn)
            running = ""


def check_explained(why: Mapping[str, Any], events: Sequence[Event]) -> None:
    """`why` names each epoch of the log, with node and reason; of a takeover also who was buried, why and by whom."""
    owned = why["ownerships"]
    assert why["first_seq"] == 1
    told = [(o["node"], o["reason"], o["epoch"], o["seq"]) for o in owned]
    logged = [(e["epoch"], e["seq"]) for e in events if e["kind"] == "open"]
    assert told == [(*who, *where) for who, where in zip(opened(events), logged, strict=True)]
    for before, ownership in pairwise(owned):
        assert before["until"] == ownership["since"]
        assert ownership["former"] == before["incarnation"]
        text, former, buried = ownership["text"], before["node"], ownership["buried"]
        if ownership["reason"] == "takeover":
            assert buried is not None, text
            assert buried["kind"] in ("silent", "reaped", "superseded"), buried
            assert buried["by"], buried
            assert text.startswith(f"taken over by {ownership['node']}, since {former} was buried "), text
        elif ownership["reason"] == "handoff":
            assert former in text, text
            assert text.startswith(("handed over by ", "taken over by ", "moved from ")), text
        else:
            assert ownership["reason"] == "wake", ownership
            assert text.startswith(f"loaded on {ownership['node']} for a message or a client: "), text
            assert former in text, text


def attempts(events: Sequence[Event], message_id: str) -> list[tuple[int, str]]:
    """(attempt, reason) of each time the turn of a message was begun."""
    turn = next(e["turn"] for e in events if e["kind"] == "input" and e["data"]["message_id"] == message_id)
    return [
        (e["data"]["attempt"], e["data"]["reason"]) for e in events if e["kind"] == "turn_started" and e["turn"] == turn
    ]


def opened(events: Sequence[Event]) -> list[tuple[str, str]]:
    """(node, reason) of each epoch."""
    return [(e["data"]["node"].rpartition("~")[0], e["data"]["reason"]) for e in events if e["kind"] == "open"]
