"""The auditor on a log whose beginning was deleted for its age: what is left is judged, what is gone is not missed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from convener.core.audit import ConversationFacts
from convener.core.model import LogEntry
from convener.core.wire import event, input_event, open_event
from tests.core.audited import (
    appended,
    asking,
    expired,
    findings,
    held,
    interrupted,
    living,
    message,
    resumed,
    started_again,
    stopped,
    waiting,
)
from tests.core.world import World


def cut(facts: ConversationFacts, since: int) -> ConversationFacts:
    return replace(facts, log=facts.log[since - 1 :], since=since)


@pytest.mark.parametrize(
    "made",
    [living, stopped, resumed, started_again, interrupted, asking, waiting, expired, held],
    ids=lambda f: f.__name__,
)
def test_what_is_clean_is_clean_from_any_entry_on(made: Callable[[], World]) -> None:
    facts = made().facts()
    for since in range(1, len(facts.log) + 1):
        assert findings(cut(facts, since)) == []


def test_the_rest_is_judged_as_ever() -> None:
    facts = living().facts()
    for since in range(2, len(facts.log)):
        whole = cut(facts, since)
        holes = replace(whole, log=whole.log[1:])
        assert ("I1", f"after seq {since - 1} comes entry {_at(holes.log[0])}") in findings(holes)
        twice = appended(whole, open_event("x~1", "start", (1, 1), 9))
        assert any(name == "I2" for name, _ in findings(twice))
        late = appended(whole, input_event(message(99, "m99")))
        assert not any(name == "I1" for name, _ in findings(late))
        early = appended(whole, event("turn_done", "t77", 1, "{}"))
        found = ("I8", f"turn_done {_at(early.log[-1])} settles position 77, which is not in the log")
        assert (found in findings(early)) == any('"input"' in entry.event for entry in whole.log)


def test_a_log_that_says_it_is_whole_is_missed() -> None:
    facts = living().facts()
    assert ("I1", f"after seq 0 comes entry {_at(facts.log[3])}") in findings(replace(facts, log=facts.log[3:]))


def _at(entry: LogEntry) -> str:
    return f"({entry.epoch}, {entry.seq})"
