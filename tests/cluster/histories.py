"""What the log of an agent of `apps/recorded.py` has to say, given its scripts and what the recorder was told."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from tests.cluster.checks import SETTLING, Event, check_order, check_turns
from tests.cluster.recorder import Call
from tests.cluster.windows import Script, Step


def recorded_steps(events: Sequence[Event], turn: str) -> dict[Step, tuple[int, int]]:
    """(name, number) → (result, attempt that recorded it) of each step of a turn in the log, each at most once."""
    found: dict[Step, tuple[int, int]] = {}
    attempt = 0
    for event in events:
        if event["turn"] == turn and event["kind"] == "turn_started":
            attempt = event["data"]["attempt"]
        elif event["turn"] == turn and event["kind"] == "step":
            step = (event["data"]["name"], event["data"]["number"])
            assert step not in found, f"{step} of {turn} is recorded twice"
            found[step] = (event["data"]["result"], attempt)
    return found


def check_history(
    events: Sequence[Event], sent: Mapping[str, str], scripts: Sequence[Script], calls: Sequence[Call]
) -> None:
    """Every message has its turn, once and whole, and what a step was recorded to return is all that anybody saw.

    Args:
        sent: message id → text, in the order in which they were accepted; all are answered.
        scripts: of these messages.
        calls: of this conversation.
    """
    check_order(events)
    check_turns(events)
    inputs = [(e["turn"], e["data"]["message_id"], e["data"]["data"]) for e in events if e["kind"] == "input"]
    expected = [(f"t{n}", ident, {"text": text}) for n, (ident, text) in enumerate(sent.items(), 1)]
    assert inputs == expected, "each accepted message is in the log once, in order"
    ends = [(e["turn"], e["kind"]) for e in events if e["kind"] in SETTLING]
    assert ends == [(turn, "turn_done") for turn, _, _ in expected], "each turn is done once"
    by_turn = defaultdict[str, list[Call]](list)
    for call in calls:
        by_turn[call.turn].append(call)
    for number, script in enumerate(scripts, 1):
        turn = f"t{number}"
        steps = recorded_steps(events, turn)
        assert set(steps) == set(script.steps()), turn
        check_outputs([e for e in events if e["turn"] == turn], number, script, steps)
        check_calls(by_turn.pop(turn, []), steps, turn)
    assert not by_turn, "steps of turns that nobody asked for"
    for before, after in pairwise(calls):
        assert before.epoch <= after.epoch, f"an older owner acted after a newer one: {before}, {after}"


def check_outputs(events: Sequence[Event], number: int, script: Script, steps: Mapping[Step, tuple[int, int]]) -> None:
    """The notes and the reply of the `number`th turn, each once, with the results that are recorded."""
    outputs = [(e["kind"], e["data"]) for e in events if e["kind"] in ("note", "reply")]
    expected: list[tuple[str, Any]] = [
        ("note", {"place": place, "turns": number, "results": [steps[step][0] for step in script.steps(place)]})
        for place, op in enumerate(script.ops)
        if op[0] == "note"
    ]
    assert outputs == [*expected, ("reply", {"text": "".join(script.pieces)})], f"turn {number}"


def check_calls(calls: Sequence[Call], steps: Mapping[Step, tuple[int, int]], turn: str) -> None:
    """No step was run again once it was recorded; one that was not recorded was repeated under the same key."""
    keys: dict[Step, str] = {}
    for step, (result, landed) in steps.items():
        of_step = [call for call in calls if (call.name, call.number) == step]
        assert of_step, f"{step} of {turn} is recorded, but was never run"
        assert of_step[-1].serial == result, f"{step} of {turn} was run after it was recorded, or not recorded"
        assert of_step[-1].attempt == landed, f"{step} of {turn} was recorded by an attempt that did not run it"
        attempts = Counter(call.attempt for call in of_step)
        assert set(attempts.values()) == {1}, f"{step} of {turn} was run twice in one attempt: {of_step}"
        assert len({call.key for call in of_step}) == 1, f"{step} of {turn} has several keys: {of_step}"
        keys[step] = of_step[-1].key
    assert len(set(keys.values())) == len(keys), f"steps of {turn} share a key: {keys}"
    assert all(keys.values()), f"steps of {turn} have no key: {keys}"
    assert {(call.name, call.number) for call in calls} <= set(steps), f"a step of {turn} is not recorded"
