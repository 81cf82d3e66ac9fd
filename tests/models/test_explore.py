"""The search itself, on models small enough to check by hand."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from models import __main__ as command
from models import catalogue
from models import explore as explore_module
from models.explore import Run, Step, TooLarge, explore, system, world


@dataclass(frozen=True)
class Counter:
    """Counts up by one or by two; `bad` is the number that must never be met."""

    top: int
    bad: int | None = None

    def initial(self) -> int:
        return 0

    def steps(self, state: int) -> Iterator[Step[int]]:
        for by in (1, 2):
            if state + by <= self.top:
                yield system(f"+{by}", state + by)

    def violation(self, state: int, quiet: bool) -> str | None:
        if state == self.bad:
            return f"I0: met {state}"
        return "I9: the end" if quiet and self.bad == -1 else None


@dataclass(frozen=True)
class Room:
    """A room that the world may enter and lock; the system opens it again only if it has a key."""

    key: bool

    def initial(self) -> str:
        return "out"

    def steps(self, state: str) -> Iterator[Step[str]]:
        if state == "out":
            yield world("enter", "in")
        if state == "in":
            yield system("leave", "out")
            yield world("lock", "locked")
        if state == "locked":
            yield system("open" if self.key else "rattle", "in" if self.key else "locked")

    def violation(self, state: str, quiet: bool) -> str | None:
        return None

    def settled(self, state: str) -> bool:
        return state == "out"


def test_clean_search_visits_every_state() -> None:
    found = explore(Counter(top=9))
    assert (found.verdict, found.states) == ("clean", 10)


def test_counterexample_is_a_shortest_one() -> None:
    found = explore(Counter(top=9, bad=7))
    assert found.verdict == "violation"
    assert found.reason == "I0: met 7"
    assert sorted(found.trace) == ["+1", "+2", "+2", "+2"]


def test_model_hears_when_the_system_has_nothing_left_to_do() -> None:
    found = explore(Counter(top=3, bad=-1))
    assert found.reason == "I9: the end"
    assert len(found.trace) == 2


def test_system_that_can_settle_is_clean() -> None:
    assert explore(Room(key=True)).verdict == "clean"


def test_system_that_cannot_settle_is_stuck_with_the_shortest_way_there() -> None:
    found = explore(Room(key=False))
    assert (found.verdict, found.trace) == ("stuck", ("enter", "lock"))


def test_search_that_grows_too_large_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(explore_module, "LARGEST", 5)
    with pytest.raises(TooLarge, match="5"):
        explore(Counter(top=9))


@pytest.mark.parametrize(
    ("run", "problem"),
    [
        (Run("a", "", lambda: Counter(5)), None),
        (Run("a", "", lambda: Counter(5, bad=3)), "must be clean"),
        (Run("a", "", lambda: Counter(5, bad=3), breaks="I0", length=2), None),
        (Run("a", "", lambda: Counter(5, bad=3), breaks="I0", length=3), "after 2 steps, not 3"),
        (Run("a", "", lambda: Counter(5, bad=3), breaks="I1", length=2), "must break with I1"),
        (Run("a", "", lambda: Counter(5), breaks="I0", length=2), "is clean"),
        (Run("a", "", lambda: Room(key=False), breaks="stuck", length=2), None),
    ],
)
def test_run_is_judged_by_outcome_invariant_and_length(run: Run, problem: str | None) -> None:
    judged = run.judge(explore(run.make()))
    assert judged is None if problem is None else problem in str(judged)


def run_command(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["models", *arguments])
    return command.main()


def test_command_ends_with_0_when_all_is_as_expected(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command(monkeypatch, "burial", "rollback/own-number", "--trace") == 0
    output = capsys.readouterr().out
    assert "ok   burial/full" in output
    assert "ok   rollback/own-number" in output
    assert "FAIL-OVER" in output


def test_command_ends_with_1_when_a_run_is_not_as_expected(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong = (Run("one", "", lambda: Counter(5, bad=3)),)
    monkeypatch.setattr(catalogue, "MODELS", {"counter": wrong})
    assert run_command(monkeypatch, "counter") == 1
    assert "FAIL counter/one" in capsys.readouterr().out


def test_command_ends_with_2_for_an_unknown_name(monkeypatch: pytest.MonkeyPatch) -> None:
    assert run_command(monkeypatch, "nonsense") == 2
