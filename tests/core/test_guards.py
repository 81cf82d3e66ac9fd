"""No guard is there for nothing: with any one of them cut out, a test of this directory fails.

For each mutant the directed tests of its module run first, and then, if none of them has noticed, the machine.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import RuleBasedStateMachine, run_state_machine_as_test

from convener.core import admission, conversation, intents, lease, membership, repair, retention
from tests.core import (
    test_admission,
    test_alarms,
    test_conversation,
    test_conversation_owned,
    test_intents,
    test_interrupt,
    test_lease,
    test_membership,
    test_repair,
    test_retention,
)
from tests.core.mutants import Mutant, mutants
from tests.core.test_burial import Burial
from tests.core.test_ownership import Ownership
from tests.core.test_starts import Starts

WATCHED: dict[ModuleType, tuple[list[ModuleType], type[RuleBasedStateMachine]]] = {
    conversation: ([test_conversation, test_conversation_owned, test_interrupt, test_intents, test_alarms], Ownership),
    intents: ([test_intents, test_interrupt, test_alarms], Ownership),
    retention: ([test_retention], Ownership),
    admission: ([test_admission], Starts),
    membership: ([test_membership], Burial),
    lease: ([test_lease], Burial),
    repair: ([test_repair], Ownership),
}

HARMLESS: dict[str, str] = {
    "append: `request.cursor > meta.cursor` always True": "what is below the cursor was trimmed before",
    "append: `request.cursor > meta.cursor` with the bound moved": "what is below the cursor was trimmed before",
    "_asks: `request.asks` always True": "opens no question",
    "append: `done > meta.done` always True": "forgets sooner what is answered and beyond the window",
    "append: `done > meta.done` with the bound moved": "forgets sooner what is answered and beyond the window",
    "repair: `entries` always True #2": "appends no entry",
    "repair: `request.asks` always True": "opens no question",
}
"""Mutants that behave like the original, with the reason."""

BRIEFLY = settings(
    max_examples=60,
    stateful_step_count=25,
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.generate],
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)

ALL = [mutant for module in WATCHED for mutant in mutants(module)]


def directed(module: ModuleType) -> list[Callable[[], None]]:
    """The tests of a module of the core."""
    return [f for tests in WATCHED[module][0] for name, f in vars(tests).items() if name.startswith("test_")]


def is_noticed(mutant: Mutant) -> bool:
    machine = WATCHED[mutant.module][1]
    with mutant.alive():
        for test in directed(mutant.module):
            try:
                test()
            except Exception:
                return True
        try:
            run_state_machine_as_test(machine, settings=BRIEFLY)
        except Exception:
            return True
    return False


@pytest.mark.parametrize("module", WATCHED, ids=lambda m: m.__name__)
def test_the_originals_pass(module: ModuleType) -> None:
    for test in directed(module):
        test()


def test_the_guards_are_cut_out_of_what_there_is() -> None:
    assert len(ALL) > 150
    assert set(HARMLESS) <= {mutant.label for mutant in ALL}


FOUND_BY_MACHINE = {
    "append: `meta.owner != request.owner or meta.epoch != request.epoch` always False": Ownership,
    "append: `meta.seq != request.expected` always False": Ownership,
    "claim: without `meta.epoch != request.epoch`": Ownership,
    "claim: `meta.status != 'running'` always False": Ownership,
    "release: without `not _may_leave(meta)`": Ownership,
    "is_settled: without `meta.asks > 0`": Ownership,
    "is_settled: without `meta.cursor == meta.position`": Ownership,
    "append: without the change of `halted`": Ownership,
    "answer: `ask_id not in state.asks` always False": Ownership,
    "fire: without `state.seen is not None`": Ownership,
    "resolve: `meta.epoch == epoch` always False": Ownership,
    "send: `state.seen is not None` always False": Ownership,
    "unsend: without `e.position == position`": Ownership,
    "unsend: without `e.kind in RETRACTABLE`": Ownership,
    "reserve: `raised_limit and len(slots) + 1 + ahead >= raised_limit` always False": Starts,
    "reserve: `len(slots) + 1` without `1`": Starts,
    "join: `incarnation in state.dead` always False": Burial,
    "bury: `not member.is_stale(now)` always False": Burial,
    "reap: without the filter `member.deadline <= now`": Burial,
    "LeaseTerms.window: `self.fast_burial` always False": Burial,
}
"""Guards whose loss the machines have to find by themselves, without any directed test."""


@pytest.mark.parametrize("label", FOUND_BY_MACHINE)
def test_the_machines_find_what_matters_most(label: str) -> None:
    (mutant,) = [m for m in ALL if m.label == label]
    with mutant.alive(), pytest.raises(Exception):  # noqa: B017, PT011
        run_state_machine_as_test(FOUND_BY_MACHINE[label], settings=settings(BRIEFLY, max_examples=1500))


@pytest.mark.parametrize("mutant", [m for m in ALL if m.label not in HARMLESS], ids=lambda m: m.label)
def test_a_missing_guard_is_noticed(mutant: Mutant) -> None:
    assert is_noticed(mutant)
