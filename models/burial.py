"""Fast burial: can a node be buried while it may still act (I7)?

Time runs in ticks of 250 ms. A node renews its lease every two ticks and holds a subscription whose existence shows
that it lives. An observer looks at most once a tick; it buries when the lease has missed two renewals and two looks in
a row saw no subscriber. The world stops the node and lets it go on (SIGSTOP, a long garbage collection, a frozen
virtual machine), cuts and heals its network, makes its threads late (a held GIL), and closes the subscription from the
store's side (an output buffer limit, CLIENT KILL, a proxy's idle time-out). The node sees that its connection was
closed only when it runs, the network is up, and it has come to read it.

A node acts while it runs, its clock says that the lease is valid, and it has not seen its connection closed.

A subscription proves nothing: the store can lose it while the node acts. What keeps I7 is that a node stops acting as
early as it may be buried, and that BURY compares everything itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, NamedTuple

from models.explore import Run, Step, system, world

INTERVAL: Final = 2
"""Ticks between renewals."""
STALE: Final = 2 * INTERVAL
"""A lease older than so many ticks has missed two renewals."""
LEASE_LESS_MARGIN: Final = 32
"""The window of a node that relies on its lease alone: 10 s less 2 s."""


@dataclass(frozen=True)
class Guards:
    """The rules, and what the world may do."""

    short_window: bool = True
    """A node acts for two renewal intervals after its last good renewal, not for the rest of its lease."""
    bury_compares: bool = True
    """BURY looks at lease and subscribers again, in the script that buries."""
    stops: bool = False
    cuts: bool = False
    closes: bool = False
    late: bool = False

    @property
    def window(self) -> int:
        """Ticks during which a node may act after a renewal."""
        return STALE if self.short_window else LEASE_LESS_MARGIN


class State(NamedTuple):
    """One node as it is, and as the observer sees it. Durations are ticks."""

    valid: int
    age: int = 0
    due: int = INTERVAL
    subscribed: bool = True
    sees_up: bool = True
    runs: bool = True
    network: bool = True
    looks: int = 0
    looked: bool = False
    decided: bool = False
    buried: bool = False


class Burial:
    """One node and one observer."""

    def __init__(self, guards: Guards) -> None:
        self.guards = guards

    def initial(self) -> State:
        """A node that has just renewed."""
        return State(valid=self.guards.window)

    def steps(self, state: State) -> Iterator[Step[State]]:
        """See `Model`."""
        yield from self._faults(state)
        yield from self._node(state)
        yield from self._observer(state)
        # A healthy node is never late: its renewals and reads happen before time goes on.
        on_time = state.runs and state.network and not self.guards.late
        if not (on_time and (state.due <= 0 or not state.sees_up or not state.subscribed)):
            yield system("tick", self._ticked(state))

    def _faults(self, state: State) -> Iterator[Step[State]]:
        if self.guards.stops:
            yield world("node stops" if state.runs else "node goes on", state._replace(runs=not state.runs))
        if self.guards.cuts:
            yield world("network cut" if state.network else "network heals", state._replace(network=not state.network))
        if self.guards.closes and state.subscribed:
            yield world("the live connection is closed", state._replace(subscribed=False))

    def _node(self, state: State) -> Iterator[Step[State]]:
        if not (state.runs and state.network):
            return
        if not state.subscribed:
            yield system("node sees its connection closed", state._replace(sees_up=False))
        if state.due <= 0 or not state.sees_up:
            if state.buried:
                yield system("renewal: DEAD", state._replace(valid=0, due=INTERVAL))
            else:
                renewed = state._replace(age=0, due=INTERVAL, valid=self.guards.window)
                yield system("renewal", renewed if state.sees_up else renewed._replace(subscribed=True, sees_up=True))

    def _observer(self, state: State) -> Iterator[Step[State]]:
        if state.decided and not state.buried:
            yield system("BURY lands", state._replace(buried=True))
        if state.buried or state.looked:
            return
        gone = state.age > STALE and not state.subscribed
        looked = state._replace(looked=True, looks=state.looks + 1 if gone else 0)
        if looked.looks < 2:
            yield system("first look" if looked.looks else "look", looked)
        elif self.guards.bury_compares:
            yield system("second look: BURY", looked._replace(looks=0, buried=True))
        else:
            yield system("second look: decides", looked._replace(looks=0, decided=True))

    @staticmethod
    def _ticked(state: State) -> State:
        return state._replace(
            age=min(state.age + 1, STALE + 1),
            due=max(state.due - 1, 0),
            valid=max(state.valid - 1, 0),
            looked=False,
        )

    def violation(self, state: State, quiet: bool) -> str | None:
        """See `Model`."""
        if state.buried and state.runs and state.valid > 0 and state.sees_up:
            return f"I7: buried, and acts for another {state.valid / 4:g} s"
        return None


RUNS: Final = (
    Run(
        "full",
        "a short window, and BURY compares: whatever the world does",
        lambda: Burial(Guards(stops=True, cuts=True, closes=True, late=True)),
    ),
    Run(
        "lease-window-own-close",
        "the lease's window is enough as long as nobody but the node closes its connection",
        lambda: Burial(Guards(short_window=False, stops=True, cuts=True, late=True)),
    ),
    Run(
        "lease-window-stopped",
        "acting for ttl - 2 s: the node stops, its connection is closed meanwhile",
        lambda: Burial(Guards(short_window=False, stops=True, closes=True)),
        breaks="I7",
        length=11,
    ),
    Run(
        "lease-window-cut",
        "acting for ttl - 2 s: the node never stops, its network is cut",
        lambda: Burial(Guards(short_window=False, cuts=True, closes=True)),
        breaks="I7",
        length=10,
    ),
    Run(
        "lease-window-late",
        "acting for ttl - 2 s: heartbeat and reader are late",
        lambda: Burial(Guards(short_window=False, late=True, closes=True)),
        breaks="I7",
        length=9,
    ),
    Run(
        "bury-in-two-steps",
        "the looks and BURY are separate commands, and BURY does not look again",
        lambda: Burial(Guards(bury_compares=False, stops=True, cuts=True, closes=True, late=True)),
        breaks="I7",
        length=11,
    ),
)
