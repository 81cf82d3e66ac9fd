"""A fail-over that loses acknowledged writes: are log entries immutable (I4), do clients notice (I9)?

Two nodes, one conversation, a primary and a replica that lags. Appends are commands on the way: they may arrive late,
after their sender has sent the same batch again, or lost the ownership. The owner keeps its last entries in memory and
appends them again under their old ids if the log has lost them. One client follows the log and resumes by cursor.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Final, NamedTuple

from models.explore import Run, Step, put, system, world

NODES: Final = (0, 1)
MEMORY: Final = 3
"""Entries that an owner keeps for repair."""


@dataclass(frozen=True)
class Guards:
    """The rules, and how much happens."""

    epoch_by_clock: bool = True
    """A new epoch is above the store's clock, not just the previous epoch plus one."""
    batch_ids: bool = True
    """A repeated batch is recognised by its id, and a pending one is never replaced; else by its place alone."""
    exact_cursors: bool = True
    """A client resumes from an exact (epoch, seq); else from a number."""
    appends: int = 3
    claims: int = 3
    failovers: int = 1


class Entry(NamedTuple):
    """A log entry."""

    epoch: int
    seq: int
    value: str

    @property
    def place(self) -> tuple[int, int]:
        """(epoch, seq)."""
        return self.epoch, self.seq


class Store(NamedTuple):
    """One conversation in the store."""

    owner: int | None = None
    epoch: int = 0
    seq: int = 0
    log: tuple[Entry, ...] = ()
    batch: str | None = None


class Node(NamedTuple):
    """What a node believes: its epoch (0: not the owner), the last seq, its memory, the batch without an answer."""

    epoch: int = 0
    seq: int = 0
    memory: tuple[Entry, ...] = ()
    pending: tuple[int, str] | None = None


class Append(NamedTuple):
    """An APPEND on its way."""

    sender: int
    epoch: int
    expected: int
    value: str


class State(NamedTuple):
    """Everything. `known` are all entries that anybody was ever told of."""

    primary: Store = Store()
    replica: Store = Store()
    clock: int = 0
    nodes: tuple[Node, ...] = (Node(), Node())
    network: frozenset[Append] = frozenset()
    view: tuple[Entry, ...] = ()
    connected: bool = True
    known: frozenset[Entry] = frozenset()
    appends: int = 0
    claims: int = 0
    failovers: int = 0


def published(state: State, entries: Iterable[Entry]) -> State:
    """The client hears of new entries; after a gap or a strange epoch it goes and resumes."""
    view, connected = state.view, state.connected
    for entry in entries if connected else ():
        expected = view[-1].seq + 1 if view else 1
        if entry.seq == expected and (not view or entry.epoch >= view[-1].epoch):
            view = (*view, entry)
        else:
            connected = False
    return state._replace(view=view, connected=connected)


class Failover:
    """Two nodes, a lagging replica, one client."""

    def __init__(self, guards: Guards) -> None:
        self.guards = guards

    def initial(self) -> State:
        """Nobody owns the conversation yet."""
        return State()

    def steps(self, state: State) -> Iterator[Step[State]]:
        """See `Model`."""
        if state.replica != state.primary:
            yield world("replicate", state._replace(replica=state.primary))
            if state.failovers < self.guards.failovers:
                yield world("FAIL-OVER", state._replace(primary=state.replica, failovers=state.failovers + 1))
        for node in NODES:
            yield from self._claims(state, node)
            yield from self._sends(state, node)
        for command in state.network:
            yield self._delivered(state, command)
        yield self._client(state)

    def _claims(self, state: State, node: int) -> Iterator[Step[State]]:
        store, guards = state.primary, self.guards
        if state.claims >= guards.claims or (store.owner == node and store.epoch == state.nodes[node].epoch):
            return
        epoch = max(store.epoch + 1, state.clock + 1 if guards.epoch_by_clock else 0)
        opened = Entry(epoch, store.seq + 1, f"open {node}.{state.claims}")
        after = state._replace(
            primary=Store(node, epoch, store.seq + 1, (*store.log, opened)),
            clock=max(state.clock + 1, epoch) if guards.epoch_by_clock else state.clock,
            nodes=put(state.nodes, node, Node(epoch, store.seq + 1, (opened,))),
            known=state.known | {opened},
            claims=state.claims + 1,
        )
        yield system(f"{node} claims epoch {epoch}", published(after, [opened]))

    def _sends(self, state: State, i: int) -> Iterator[Step[State]]:
        node, value = state.nodes[i], f"v{state.appends}"
        may_append = state.appends < self.guards.appends

        def sent(expected: int, value: str, appends: int) -> State:
            return state._replace(
                network=state.network | {Append(i, node.epoch, expected, value)},
                nodes=put(state.nodes, i, node._replace(pending=(expected, value))),
                appends=appends,
            )

        if node.pending is None:
            if node.epoch and may_append:
                yield system(f"{i} appends {value} after {node.seq}", sent(node.seq, value, state.appends + 1))
            return
        expected, pending = node.pending
        yield system(f"{i} repeats {pending}", sent(expected, pending, state.appends))
        if not self.guards.batch_ids and may_append:
            yield system(f"{i} gives {pending} up for {value}", sent(expected, value, state.appends + 1))

    def _delivered(self, state: State, command: Append) -> Step[State]:
        """One APPEND arrives; its sender hears of it if it still waits for exactly this."""
        store, i = state.primary, command.sender
        node = state.nodes[i]
        waits = node.pending == (command.expected, command.value) and node.epoch == command.epoch
        state = state._replace(network=state.network - {command})
        entry = Entry(command.epoch, command.expected + 1, command.value)
        done = Node(node.epoch, command.expected + 1, (*node.memory, entry)[-MEMORY:])
        if (store.owner, store.epoch) == (i, command.epoch):
            if store.seq == command.expected:
                written = store._replace(seq=store.seq + 1, log=(*store.log, entry), batch=command.value)
                after = state._replace(primary=written, known=state.known | {entry})
                after = published(after, [entry])
                return system(f"{command.value}: OK", self._told(after, i, done, waits))
            repeated = store.batch == command.value or not self.guards.batch_ids
            if store.seq == command.expected + 1 and repeated:
                known = state.known | {entry} if waits else state.known
                return system(f"{command.value}: DUP", self._told(state._replace(known=known), i, done, waits))
            if store.seq < command.expected and waits:
                return self._repaired(state, i)
        return system(f"{command.value}: refused", self._told(state, i, Node(), waits))

    @staticmethod
    def _told(state: State, i: int, node: Node, waits: bool) -> State:
        return state._replace(nodes=put(state.nodes, i, node)) if waits else state

    def _repaired(self, state: State, i: int) -> Step[State]:
        """The log is shorter than the owner remembers: append the rest again, the same under the same ids."""
        store, node = state.primary, state.nodes[i]
        missing = [entry for entry in node.memory if entry.seq > store.seq]
        if missing and missing[0].seq == store.seq + 1 and all(entry.epoch == store.epoch for entry in missing):
            last = missing[-1]
            repaired = store._replace(seq=last.seq, log=(*store.log, *missing), batch=last.value)
            return system(f"{i} repairs", state._replace(primary=repaired))
        return system(f"{i} cannot repair: it lets go", state._replace(nodes=put(state.nodes, i, Node())))

    def _client(self, state: State) -> Step[State]:
        if state.connected:
            return world("the client's connection breaks", state._replace(connected=False))
        log, view = state.primary.log, state.view
        if not view:
            view = log
        elif not self.guards.exact_cursors:
            view = (*view, *(entry for entry in log if entry.seq > view[-1].seq))
        elif view[-1].place in {entry.place for entry in log}:
            view = (*view, *(entry for entry in log if entry.place > view[-1].place))
        else:
            view = log  # resync
        return world("the client resumes", state._replace(view=view, connected=True))

    def violation(self, state: State, quiet: bool) -> str | None:
        """See `Model`."""
        log, view = state.primary.log, state.view
        for before, entry in pairwise(log):
            if entry.seq != before.seq + 1 or entry.epoch < before.epoch:
                return f"I1: {entry.place} comes after {before.place}"
        contents: dict[tuple[int, int], str] = {}
        for entry in (*state.known, *log, *view):
            if contents.setdefault(entry.place, entry.value) != entry.value:
                return f"I4: {entry.place} is {contents[entry.place]!r} and {entry.value!r}"
        if state.connected and view and log and view[-1] == log[-1] and view != log:
            return f"I9: the client was shown {[e.value for e in view]}, the log is {[e.value for e in log]}"
        return None


RUNS: Final = (
    Run("full", "all guards", lambda: Failover(Guards())),
    Run(
        "epoch-plus-one",
        "a new epoch is the previous one plus one",
        lambda: Failover(Guards(epoch_by_clock=False)),
        breaks="I4",
        length=3,
    ),
    Run(
        "no-batch-ids",
        "a repeated batch is recognised by its place",
        lambda: Failover(Guards(batch_ids=False)),
        breaks="I4",
        length=5,
    ),
    Run(
        "resume-by-number",
        "a client resumes from a number",
        lambda: Failover(Guards(exact_cursors=False)),
        breaks="I9",
        length=5,
    ),
)
