"""Breadth-first search over the states of a model: shortest counterexamples, and whether it can always settle."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final, Generic, Literal, NamedTuple, Protocol, TypeVar

S = TypeVar("S", bound=Hashable)
ModelState = TypeVar("ModelState", bound=Hashable)

By = Literal["system", "world"]
"""Who takes a step: the system, by itself; or the world: clients, and faults."""

LARGEST: Final = 5_000_000
"""States after which a search gives up: a run that grows beyond what it was written for must say so."""


class Step(NamedTuple, Generic[S]):
    """A step that is possible now, and the state after it. One that changes nothing is no step."""

    by: By
    name: str
    state: S


class Model(Protocol[ModelState]):
    """A model. States are values: hashable, never changed."""

    def initial(self) -> ModelState:
        """Where it begins."""
        ...

    def steps(self, state: ModelState) -> Iterable[Step[ModelState]]:
        """Everything that may happen next."""
        ...

    def violation(self, state: ModelState, quiet: bool) -> str | None:
        """What is wrong with `state`, none if nothing is.

        Args:
            state: any state that can be reached.
            quiet: the system has nothing left to do by itself, so what is missing now stays missing.
        """
        ...


class Settling(Model[ModelState], Protocol[ModelState]):
    """A model that also says when everything is as it should be in the end.

    From every state the system alone, without clients and further faults, must be able to get to such a state.
    """

    def settled(self, state: ModelState) -> bool:
        """Whether nothing is left behind."""
        ...


Verdict = Literal["clean", "violation", "stuck"]


@dataclass(frozen=True, slots=True)
class Found:
    """What a search found.

    Attributes:
        verdict: `clean`, `violation` (a bad state can be reached), or `stuck` (a state can be reached from which the
            system alone never settles).
        states: how many were visited.
        reason: what is wrong.
        trace: the names of the steps to it; none shorter exists.
    """

    verdict: Verdict
    states: int
    reason: str = ""
    trace: tuple[str, ...] = ()


class TooLarge(Exception):
    """A search met more than `LARGEST` states."""


class _Visited(Generic[S]):
    """The states met so far, each with the step that first led there."""

    def __init__(self, start: S) -> None:
        self.came: dict[S, tuple[S, str] | None] = {start: None}

    def enter(self, state: S, before: S, name: str) -> bool:
        if state in self.came:
            return False
        if len(self.came) >= LARGEST:
            raise TooLarge(f"more than {LARGEST} states")
        self.came[state] = before, name
        return True

    def trace(self, state: S) -> tuple[str, ...]:
        names: list[str] = []
        while (origin := self.came[state]) is not None:
            state, name = origin
            names.append(name)
        return tuple(reversed(names))


def explore(model: Model[S] | Settling[S]) -> Found:
    """Visit every state that can be reached; stop at the first bad one.

    Raises:
        TooLarge: there are more than `LARGEST` states.
    """
    settled: Callable[[S], bool] | None = getattr(model, "settled", None)
    start = model.initial()
    visited, queue = _Visited(start), deque([start])
    before: dict[S, list[S]] = {}
    while queue:
        state = queue.popleft()
        steps = [step for step in model.steps(state) if step.state != state]
        quiet = not any(step.by == "system" for step in steps)
        reason = model.violation(state, quiet)
        if reason is not None:
            return Found("violation", len(visited.came), reason, visited.trace(state))
        for by, name, after in steps:
            if settled is not None and by == "system":
                before.setdefault(after, []).append(state)
            if visited.enter(after, state, name):
                queue.append(after)
    count = len(visited.came)
    if settled is not None:
        # Insertion order is breadth first, so the first state found stuck has the shortest trace.
        good = _reaching([state for state in visited.came if settled(state)], before)
        for state in visited.came:
            if state not in good:
                return Found("stuck", count, f"the system alone never settles: {state}", visited.trace(state))
    return Found("clean", count)


def _reaching(targets: Sequence[S], before: dict[S, list[S]]) -> set[S]:
    """All states from which one of `targets` can be reached, given each state's predecessors."""
    good, todo = set(targets), list(targets)
    while todo:
        for state in before.get(todo.pop(), ()):
            if state not in good:
                good.add(state)
                todo.append(state)
    return good


@dataclass(frozen=True, slots=True)
class Run:
    """A search, and what must come of it.

    Attributes:
        name: of the run, unique in its model.
        about: what it shows, in a line.
        make: makes the model; guards are removed here.
        breaks: the run has to break: how its reason begins (``I8``, ``stuck``); None if it must be clean.
        length: steps of the shortest counterexample.
        slow: takes more than a few seconds.
    """

    name: str
    about: str
    make: Callable[[], Model[Any] | Settling[Any]]
    breaks: str | None = None
    length: int = 0
    slow: bool = False

    def judge(self, found: Found) -> str | None:
        """What is not as expected; None if all is."""
        if self.breaks is None:
            return None if found.verdict == "clean" else f"must be clean: {found.verdict} ({found.reason})"
        if found.verdict == "clean":
            return f"must break ({self.breaks}), and is clean: the guard is not needed, or not modelled any more"
        reason = "stuck" if found.verdict == "stuck" else found.reason
        if not reason.startswith(self.breaks):
            return f"must break with {self.breaks}, and breaks with {found.verdict} ({found.reason})"
        if len(found.trace) != self.length:
            return f"breaks after {len(found.trace)} steps, not {self.length}"
        return None


# -- for writing models ------------------------------------------------------------------------------------------------


def system(name: str, state: S) -> Step[S]:
    """A step of the system."""
    return Step("system", name, state)


def world(name: str, state: S) -> Step[S]:
    """A step of clients or of faults."""
    return Step("world", name, state)


T = TypeVar("T")


def put(values: tuple[T, ...], index: int, value: T) -> tuple[T, ...]:
    """`values` with one of them replaced."""
    return (*values[:index], value, *values[index + 1 :])
