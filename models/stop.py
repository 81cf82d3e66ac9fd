"""Deliberate stops against crash, takeover, wake, handoff, archiving and fail-over (I15).

Two nodes, one conversation, owned by node 0 at the start. A user asks for a stop at either node; it is promised once
STOP has answered. A read and the compare-and-set that follows it are separate steps, so anything may happen between.

Wanted: after a promised stop no node starts the loop by itself (takeover, wake, handoff); and when nothing is left to
do, a promised stop has its `stopped` entry, no loop runs, and no slot is held.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, Literal, NamedTuple

from models.explore import Run, Step, put, system, world


@dataclass(frozen=True)
class Guards:
    """The rules, and how much happens."""

    recorded: bool = True
    """STOP writes the intent into the conversation's head before anybody acts on it."""
    claim_checks: bool = True
    """CLAIM compares the status in the same script."""
    handoff_checks: bool = True
    """So does the owner change of a handoff."""
    numbered: bool = True
    """The owner is told through the numbered inbox; else by a publication that may be lost."""
    finishes: bool = True
    """Recovery closes a conversation whose stop is pending: `open` and `stopped` in one script."""
    leaves_mark: bool = True
    """A closed conversation leaves a mark in its head when its log goes; SEND never creates a conversation."""
    waited_for: bool = True
    """STOP waits for the replica as CLAIM does."""
    frees_slot: bool = True
    """Who closes also frees the slot."""
    crashes: int = 1
    lost: int = 1
    failovers: int = 0
    sends: int = 1
    handoffs: int = 1


Status = Literal["running", "stopping", "stopped", "gone"]


@dataclass(frozen=True, slots=True)
class Claiming:
    """A node has read owner and epoch and is about to CLAIM, for a wake or a takeover."""

    why: str
    owner: int | None
    epoch: int


@dataclass(frozen=True, slots=True)
class HandingOver:
    """A node is about to make another one the owner."""

    target: int


class Node(NamedTuple):
    """A node: the epoch of the loop that it runs (0: none), whether that loop has heard of the stop, known burials."""

    alive: bool = True
    loop: int = 0
    told: bool = False
    knows: frozenset[int] = frozenset()
    job: Claiming | HandingOver | None = None


class Left(NamedTuple):
    """What may still happen."""

    crashes: int
    lost: int
    failovers: int
    sends: int
    handoffs: int


class State(NamedTuple):
    """Everything. `closed`: the log has its `stopped` entry; `replica`: what a fail-over would bring back."""

    left: Left
    nodes: tuple[Node, ...] = (Node(loop=1), Node())
    status: Status = "running"
    owner: int | None = 0
    epoch: int = 1
    slot: bool = True
    closed: bool = False
    promised: bool = False
    asked: bool = False
    buried: frozenset[int] = frozenset()
    replica: tuple[Status, bool] | None = None
    broken: str | None = None

    def with_node(self, i: int, node: Node) -> State:
        """The same with another node."""
        return self._replace(nodes=put(self.nodes, i, node))

    def starting(self, i: int, why: str) -> State:
        """Node `i` becomes owner and runs the loop."""
        epoch = self.epoch + 1
        node = self.nodes[i]._replace(loop=epoch, told=False, job=None)
        after = self.with_node(i, node)._replace(owner=i, epoch=epoch, slot=True)
        return after._replace(broken=f"{why} starts the loop after a promised stop") if self.promised else after


class Stop:
    """One conversation and a user who wants it to end."""

    def __init__(self, guards: Guards) -> None:
        self.guards = guards

    def initial(self) -> State:
        """Node 0 runs the loop."""
        g = self.guards
        return State(Left(g.crashes, g.lost, g.failovers, g.sends, g.handoffs))

    def steps(self, state: State) -> Iterator[Step[State]]:
        """See `Model`."""
        for i, node in enumerate(state.nodes):
            if node.alive:
                yield from self._membership(state, i)
                yield from self._stops(state, i)
                yield from self._sends(state, i)
                yield from self._owns(state, i)
                yield from self._hands_over(state, i)
                yield from self._recovers(state, i)
            elif i not in state.buried:
                yield system(f"{i} is buried", state._replace(buried=state.buried | {i}))
        if state.status == "stopped" and state.closed and state.owner is None:
            yield world("archived whole, it leaves the store", state._replace(status="gone"))
        if state.replica is not None:
            yield world("the replica catches up", state._replace(replica=None))
            if state.left.failovers:
                status, closed = state.replica
                left = state.left._replace(failovers=state.left.failovers - 1)
                fallen = state._replace(status=status, closed=closed, replica=None, left=left)
                yield world("FAIL-OVER: the stop is forgotten", fallen)

    def _membership(self, state: State, i: int) -> Iterator[Step[State]]:
        node = state.nodes[i]
        for other in state.buried - node.knows:
            learned = node._replace(knows=node.knows | {other})
            yield system(f"{i} learns of the burial of {other}", state.with_node(i, learned))
        if state.left.crashes and sum(n.alive for n in state.nodes) > 1:
            left = state.left._replace(crashes=state.left.crashes - 1)
            dead = node._replace(alive=False, loop=0, told=False, job=None)
            yield world(f"{i} crashes", state.with_node(i, dead)._replace(left=left))

    def _stops(self, state: State, i: int) -> Iterator[Step[State]]:
        """The user asks node `i`."""
        if state.asked or state.status != "running":
            return
        after = state._replace(asked=True, promised=True)
        if self.guards.recorded:
            forgettable = None if self.guards.waited_for else (state.status, state.closed)
            after = after._replace(status="stopping", replica=forgettable or state.replica)
        owner = None if state.owner is None else state.nodes[state.owner]
        if state.owner is None or owner is None or not (owner.alive and owner.loop):
            yield world(f"STOP at {i}", after)
            return
        yield world(f"STOP at {i}", after.with_node(state.owner, owner._replace(told=True)))
        if state.left.lost and not self.guards.numbered:
            left = state.left._replace(lost=state.left.lost - 1)
            yield world(f"STOP at {i}, the publication is lost", after._replace(left=left))

    def _sends(self, state: State, i: int) -> Iterator[Step[State]]:
        """A message arrives at node `i` and may wake the conversation."""
        node = state.nodes[i]
        if not state.left.sends or node.job is not None:
            return
        state = state._replace(left=state.left._replace(sends=state.left.sends - 1))
        if state.status == "running" and (state.owner is None or state.owner in node.knows):
            waking = node._replace(job=Claiming("wake", state.owner, state.epoch))
            yield world(f"SEND at {i}: owner {state.owner}, it wakes it", state.with_node(i, waking))
        elif state.status == "gone" and not self.guards.leaves_mark:
            state = state._replace(status="running", owner=None, closed=False, epoch=state.epoch + 1)
            waking = node._replace(job=Claiming("wake", None, state.epoch))
            yield world(f"SEND at {i}: nothing is known, a new inbox, it wakes it", state.with_node(i, waking))

    def _owns(self, state: State, i: int) -> Iterator[Step[State]]:
        node = state.nodes[i]
        if not node.loop:
            return
        quiet = node._replace(loop=0, told=False)
        if (state.owner, state.epoch) != (i, node.loop):
            yield system(f"{i} finds itself fenced", state.with_node(i, quiet))
        elif node.told:
            closed = state._replace(status="stopped", closed=True, owner=None, slot=not self.guards.frees_slot)
            yield system(f"{i} ends the loop and closes", closed.with_node(i, quiet))
        else:
            if node.job is None and state.status == "running":
                asleep = state._replace(owner=None, slot=False).with_node(i, node._replace(loop=0))
                yield world(f"{i} hibernates", asleep)
            if node.job is None and state.left.handoffs and 1 - i not in node.knows:
                left = state.left._replace(handoffs=state.left.handoffs - 1)
                begun = state.with_node(i, node._replace(job=HandingOver(1 - i)))._replace(left=left)
                yield world(f"{i} begins a handoff to {1 - i}", begun)

    def _hands_over(self, state: State, i: int) -> Iterator[Step[State]]:
        node = state.nodes[i]
        if not isinstance(node.job, HandingOver):
            return
        target = node.job.target
        mine = (state.owner, state.epoch) == (i, node.loop)
        if not mine or (self.guards.handoff_checks and state.status != "running"):
            yield system(f"{i}: the handoff is refused", state.with_node(i, node._replace(job=None)))
        elif state.nodes[target].alive:
            gone = state.with_node(i, node._replace(loop=0, told=False, job=None))
            yield system(f"{i} makes {target} the owner", gone.starting(target, "I15: a handoff"))
        else:
            yield system(f"{i}: no answer to the handoff", state.with_node(i, node._replace(job=None)))

    def _recovers(self, state: State, i: int) -> Iterator[Step[State]]:
        node, guards = state.nodes[i], self.guards
        if isinstance(node.job, Claiming):
            unchanged = (state.owner, state.epoch) == (node.job.owner, node.job.epoch)
            allowed = state.status == "running" or not guards.claim_checks
            if unchanged and allowed and state.status != "gone":
                yield system(f"{i} claims", state.starting(i, f"I15: a {node.job.why}"))
            else:
                yield system(f"{i}: CLAIM is refused", state.with_node(i, node._replace(job=None)))
        if node.job is not None:
            return
        pending = state.status == "stopping"
        if state.owner in node.knows:
            if pending and guards.finishes:
                yield system(f"{i} finishes the stop", self._finished(state, slot=not guards.frees_slot))
            elif state.status == "running" or (pending and not guards.claim_checks):
                taking = node._replace(job=Claiming("takeover", state.owner, state.epoch))
                yield system(f"{i} reads owner {state.owner}, epoch {state.epoch}", state.with_node(i, taking))
        if state.owner is None and pending and guards.finishes:
            slot = state.slot and not guards.frees_slot
            yield system(f"{i} finishes the stop of an unowned conversation", self._finished(state, slot=slot))

    @staticmethod
    def _finished(state: State, *, slot: bool) -> State:
        return state._replace(status="stopped", closed=True, owner=None, epoch=state.epoch + 1, slot=slot)

    def violation(self, state: State, quiet: bool) -> str | None:
        """See `Model`."""
        if state.broken:
            return state.broken
        if not (state.promised and quiet):
            return None
        if any(node.loop for node in state.nodes):
            return f"I15: a loop runs on, and nothing will end it (status {state.status})"
        if not state.closed:
            return f"I15: no `stopped` entry, and nobody will write it (status {state.status})"
        if state.slot:
            return "I15: the slot is never freed"
        return None


RUNS: Final = (
    Run("full", "all guards", lambda: Stop(Guards())),
    Run("full-failover", "a fail-over may forget what no replica has", lambda: Stop(Guards(failovers=1))),
    Run(
        "intent-only-told",
        "STOP tells the owner and writes nothing",
        lambda: Stop(Guards(recorded=False)),
        breaks="I15",
        length=2,
    ),
    Run(
        "told-by-publication",
        "the owner is told by a publication that may be lost",
        lambda: Stop(Guards(numbered=False, crashes=0)),
        breaks="I15",
        length=1,
    ),
    Run(
        "claim-ignores-status",
        "CLAIM does not compare the status: a message wakes what was stopped",
        lambda: Stop(Guards(claim_checks=False)),
        breaks="I15",
        length=4,
    ),
    Run(
        "takeover-ignores-status",
        "CLAIM does not compare the status: recovery takes over what was stopped",
        lambda: Stop(Guards(claim_checks=False, sends=0, handoffs=0)),
        breaks="I15",
        length=6,
    ),
    Run(
        "handoff-ignores-status",
        "the owner change of a handoff does not compare the status",
        lambda: Stop(Guards(handoff_checks=False, crashes=0)),
        breaks="I15",
        length=3,
    ),
    Run(
        "nobody-finishes",
        "recovery leaves a pending stop alone",
        lambda: Stop(Guards(finishes=False)),
        breaks="I15",
        length=2,
    ),
    Run(
        "no-mark",
        "a closed conversation that was archived leaves nothing in the store",
        lambda: Stop(Guards(leaves_mark=False, crashes=0)),
        breaks="I15",
        length=5,
    ),
    Run(
        "not-waited-for",
        "STOP answers before a replica has it",
        lambda: Stop(Guards(waited_for=False, failovers=1)),
        breaks="I15",
        length=3,
    ),
    Run(
        "slot-kept",
        "who closes leaves the slot",
        lambda: Stop(Guards(frees_slot=False)),
        breaks="I15",
        length=2,
    ),
)
