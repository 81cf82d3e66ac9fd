"""Ownership: leases and burial, RESERVE, CLAIM, RESOLVE, APPEND, RELEASE (I2, I3, I6, I7).

Two nodes, conversations of one user whose limit is 1. Time passes in ticks; a lease lasts two. Commands may be delayed
for as long as the search lasts, also past a crash or a time-out of their sender, may get lost, or lose their reply. A
reconciler frees slots that name buried nodes; it reads and acts in separate steps.

Wanted: log entries of one epoch are of one writer, and nothing of an older epoch comes after a newer one began; at most
one node that may act runs a conversation; a user's running conversations, and those owned by nodes that are not buried,
stay within the limit; an owner that is not buried has its slot.

Nonces are (node, attempt), and of the log only the last entry is kept, since the rules compare neighbours: that makes
the search end.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, Literal

from models.explore import Run, Step, put, world
from models.ownership_state import (
    LEASE,
    Append,
    Claim,
    Claiming,
    Command,
    GivingBack,
    Head,
    Job,
    Moving,
    Node,
    Reserve,
    Reserved,
    Reserving,
    Slot,
    State,
)

NODES: Final = (0, 1)
LIMIT: Final = 1
APPENDS: Final = 3
"""Log entries after which nobody appends any more."""


@dataclass(frozen=True)
class Guards:
    """The rules, and how much happens."""

    burial: bool = True
    """A node is dead only when it was buried, for ever; else when its key has expired, until it renews."""
    resolves: bool = True
    """A CLAIM with unknown outcome is settled in the store before its slot is given back."""
    restamps: bool = True
    """Who adopts a buried node's slot writes an own nonce into it."""
    adopts_what_was_read: bool = True
    """RESERVE adopts exactly the slot value that was read with the head; else whatever a buried node has left."""
    compares_epoch: bool = True
    """APPEND compares owner and epoch."""
    suspends: bool = True
    """A node acts only while its own clock says that its lease is valid."""
    hands_over: Literal["no", "stamped", "naive"] = "no"
    """Planned moves: `stamped` writes the slot for the target first; `naive` leaves it as it is."""
    conversations: int = 1
    ticks: int = 3
    operations: int = 2
    """Starts, releases and moves per node."""


class Ownership:
    """Who owns what, while nothing can be relied on to arrive."""

    def __init__(self, guards: Guards) -> None:
        self.guards = guards

    def initial(self) -> State:
        """Two nodes that own nothing."""
        count = self.guards.conversations
        node = Node(epochs=(0,) * count)
        return State(heads=(Head(),) * count, slots=(None,) * count, nodes=(node, node))

    def is_dead(self, state: State, i: int) -> bool:
        """Whether others may take over from node `i`."""
        if self.guards.burial:
            return i in state.buried
        lease = state.leases[i]
        return lease is None or lease <= state.time

    def may_act(self, state: State, i: int) -> bool:
        """Whether node `i` may act, by its own clock."""
        node = state.nodes[i]
        return node.alive and (state.time < node.deadline or not self.guards.suspends)

    def steps(self, state: State) -> Iterator[Step[State]]:
        """See `Model`."""
        if state.time < self.guards.ticks:
            yield world("tick", state._replace(time=state.time + 1))
        for i in NODES:
            yield from self._membership(state, i)
            node = state.nodes[i]
            if not node.alive:
                continue
            for cid in range(self.guards.conversations):
                if self.may_act(state, i):
                    if node.job is None and node.operations < self.guards.operations:
                        yield from self._begins(state, i, cid)
                    yield from self._appends(state, i, cid)
                if self.guards.hands_over != "no":
                    yield from self._adopts(state, i, cid)
            if node.job is not None:
                yield from self._goes_on(state, i, node.job)
        yield from self._reconciles(state)
        for command in state.network:
            yield self._delivered(state._replace(network=state.network - {command}), command)

    def _membership(self, state: State, i: int) -> Iterator[Step[State]]:
        node, lease = state.nodes[i], state.leases[i]
        nothing = Node(epochs=(0,) * len(node.epochs), alive=False, deadline=node.deadline, operations=node.operations)
        if self.guards.burial and i not in state.buried and lease is not None and state.time >= lease:
            yield world(f"{i} is buried", self._buried(state, i))
        if not node.alive:
            return
        if i in state.buried:
            if node.job is not None or any(node.epochs):
                yield world(f"{i} learns that it is buried", state.with_node(i, nothing))
        elif node.deadline < state.time + LEASE:
            renewed = state.with_node(i, node._replace(deadline=state.time + LEASE))
            yield world(f"{i} renews", renewed._replace(leases=put(state.leases, i, state.time + LEASE)))
        yield world(f"{i} crashes", state.with_node(i, nothing))
        idle = node.job is None and not any(node.epochs) and all(head.owner != i for head in state.heads)
        if self.guards.hands_over != "no" and idle and i not in state.buried:
            yield world(f"{i} leaves", self._buried(state.with_node(i, nothing), i))

    @staticmethod
    def _buried(state: State, i: int) -> State:
        return state._replace(buried=state.buried | {i}, leases=put(state.leases, i, None))

    # -- a node's own steps ----------------------------------------------------------------------------------------

    def _begins(self, state: State, i: int, cid: int) -> Iterator[Step[State]]:
        node, head = state.nodes[i], state.heads[cid]
        nonce = (i, node.operations)
        busy = node._replace(operations=node.operations + 1)
        if not node.epochs[cid]:
            if head.owner is None or self.is_dead(state, head.owner):
                started = state.with_node(i, busy._replace(job=Reserving(cid, head.owner, head.epoch, nonce)))
                started = started._replace(network=state.network | {Reserve(i, cid, nonce, state.slots[cid])})
                yield world(f"{i} starts c{cid}", started)
            return
        stopped = busy._replace(epochs=put(node.epochs, cid, 0))
        if (head.owner, head.epoch) != (i, node.epochs[cid]):
            yield world(f"{i} finds that it has lost c{cid}", state.running(i, cid, 0))
            return
        if head.nonce is not None:
            released = state.with_head(cid, head._replace(owner=None, nonce=None))
            giving = stopped._replace(job=GivingBack(cid, head.nonce))
            yield world(f"{i} releases c{cid}", released.with_node(i, giving))
        target, slot = 1 - i, state.slots[cid]
        if self.guards.hands_over == "no" or target in state.buried or head.nonce is None:
            return
        if self.guards.hands_over == "naive":
            yield world(f"{i} moves c{cid}", state.with_node(i, stopped._replace(job=Moving(cid, target, head.nonce))))
        elif slot is not None and slot.nonce == head.nonce:
            stamped = state.with_slot(cid, Slot(nonce, target))
            moving = stopped._replace(job=Moving(cid, target, nonce))
            yield world(f"{i} stamps the slot of c{cid} for {target}", stamped.with_node(i, moving))

    def _appends(self, state: State, i: int, cid: int) -> Iterator[Step[State]]:
        epoch = state.nodes[i].epochs[cid]
        on_its_way = any(isinstance(c, Append) and c.node == i for c in state.network)
        if epoch and not on_its_way and state.heads[cid].entries < APPENDS:
            yield world(f"{i} appends to c{cid}", state._replace(network=state.network | {Append(i, cid, epoch)}))

    def _adopts(self, state: State, i: int, cid: int) -> Iterator[Step[State]]:
        node, head = state.nodes[i], state.heads[cid]
        if head.owner == i and not node.epochs[cid] and node.job is None and i not in state.buried:
            yield world(f"{i} sees itself named owner of c{cid}", state.running(i, cid, head.epoch))

    def _goes_on(self, state: State, i: int, job: Job) -> Iterator[Step[State]]:
        match job:
            case Reserving(cid, _, _, nonce):
                yield world(f"{i}: no answer to RESERVE of c{cid}", state.doing(i, GivingBack(cid, nonce)))
            case Reserved(cid, owner, epoch, nonce):
                if self.may_act(state, i):
                    sent = state.doing(i, Claiming(cid, owner, epoch, nonce))
                    command = Claim(i, cid, owner, epoch, nonce)
                    yield world(f"{i} claims c{cid}", sent._replace(network=state.network | {command}))
            case Claiming():
                yield self._settles(state, i, job)
            case GivingBack(cid, nonce):
                yield world(f"{i} gives the slot of c{cid} back", state.freed(cid, nonce).doing(i, None))
            case Moving(cid, target, nonce):
                head = state.heads[cid]
                if head.owner != i:
                    yield world(f"{i}: the move of c{cid} is refused", state.doing(i, None))
                else:
                    moved = head._replace(owner=target, epoch=head.epoch + 1, nonce=nonce)
                    after = state.with_head(cid, moved).written(cid, head.epoch + 1, target)
                    yield world(f"{i} makes {target} the owner of c{cid}", after.doing(i, None))

    def _settles(self, state: State, i: int, job: Claiming) -> Step[State]:
        """CLAIM is not answered: RESOLVE decides it for good, or it is taken for lost."""
        cid, head = job.cid, state.heads[job.cid]
        back = state.doing(i, GivingBack(cid, job.nonce))
        if not self.guards.resolves:
            return world(f"{i}: no answer to CLAIM of c{cid}", back)
        if head.owner == i and head.nonce == job.nonce:
            return world(f"{i} RESOLVE: c{cid} is owned", state.running(i, cid, head.epoch))
        if head.epoch == job.epoch:
            return world(f"{i} RESOLVE: no claim can land", back.with_head(cid, head._replace(epoch=head.epoch + 1)))
        return world(f"{i} RESOLVE: c{cid} has moved", back)

    # -- the reconciler and the network ----------------------------------------------------------------------------

    def _reconciles(self, state: State) -> Iterator[Step[State]]:
        if state.seen is not None:
            cid, nonce = state.seen
            yield world(f"the slot of c{cid} is freed", state.freed(cid, nonce)._replace(seen=None))
            return
        for cid, slot in enumerate(state.slots):
            head = state.heads[cid]
            if slot is None or not self.is_dead(state, slot.node):
                continue
            if head.owner is None or (self.is_dead(state, head.owner) and head.nonce != slot.nonce):
                yield world(f"the slot of c{cid} is found stale", state._replace(seen=(cid, slot.nonce)))

    def _delivered(self, state: State, command: Command) -> Step[State]:
        match command:
            case Reserve():
                return self._reserves(state, command)
            case Claim():
                return self._claims(state, command)
            case Append(i, cid, epoch):
                head = state.heads[cid]
                if self.guards.compares_epoch and (head.owner, head.epoch) != (i, epoch):
                    return world(f"APPEND of {i} to c{cid}: FENCED", state)
                return world(f"APPEND of {i} to c{cid}: OK", state.written(cid, epoch, i))

    def _reserves(self, state: State, command: Reserve) -> Step[State]:
        i, cid, nonce, read, _ = command
        job, slot = state.nodes[i].job, state.slots[cid]
        waits = isinstance(job, Reserving) and job.nonce == nonce and state.nodes[i].alive
        held = nonce
        if slot is None and sum(other is not None for other in state.slots) < LIMIT:
            after = state.with_slot(cid, Slot(nonce, i))
        elif (
            slot is not None
            and self.is_dead(state, slot.node)
            and (slot == read or not self.guards.adopts_what_was_read)
        ):
            after = state.with_slot(cid, Slot(nonce, i)) if self.guards.restamps else state
            held = nonce if self.guards.restamps else slot.nonce
        else:
            return world(f"RESERVE of {i} for c{cid}: refused", state.doing(i, None) if waits else state)
        if waits and isinstance(job, Reserving):
            after = after.doing(i, Reserved(cid, job.owner, job.epoch, held))
        return world(f"RESERVE of {i} for c{cid}: OK", after)

    def _claims(self, state: State, command: Claim) -> Step[State]:
        i, cid, owner, epoch, nonce, _ = command
        node, head = state.nodes[i], state.heads[cid]
        waits = node.alive and isinstance(node.job, Claiming) and node.job.nonce == nonce
        if (head.owner, head.epoch) != (owner, epoch):
            after = state.doing(i, GivingBack(cid, nonce)) if waits else state
            return world(f"CLAIM of {i} for c{cid}: CONFLICT", after)
        after = state.with_head(cid, head._replace(owner=i, epoch=epoch + 1, nonce=nonce))
        after = after.written(cid, epoch + 1, i)
        return world(f"CLAIM of {i} for c{cid}: OK", after.running(i, cid, epoch + 1) if waits else after)

    # -- what must not be ------------------------------------------------------------------------------------------

    def violation(self, state: State, quiet: bool) -> str | None:
        """See `Model`."""
        if state.broken:
            return state.broken
        running = 0
        owned: list[int] = []
        for cid, head in enumerate(state.heads):
            acting = [i for i in NODES if state.nodes[i].epochs[cid] and self.may_act(state, i)]
            if len(acting) > 1:
                return f"I7: nodes {acting} both run c{cid}"
            running += bool(acting)
            if head.owner is not None and not self.is_dead(state, head.owner):
                owned.append(cid)
        if running > LIMIT or len(owned) > LIMIT:
            return f"I6: {max(running, len(owned))} conversations run, the limit is {LIMIT}"
        for cid in owned:
            if state.slots[cid] is None:
                return f"I6: c{cid} is owned by {state.heads[cid].owner}, which is not buried, without a slot"
        return None


RUNS: Final = (
    Run("full", "one operation per node", lambda: Ownership(Guards(operations=1))),
    Run("full-two-operations", "two operations per node", lambda: Ownership(Guards(ticks=2)), slow=True),
    Run(
        "full-two-conversations",
        "two conversations, one of which may run",
        lambda: Ownership(Guards(conversations=2, operations=1)),
        slow=True,
    ),
    Run(
        "full-handoff",
        "planned moves, one operation per node",
        lambda: Ownership(Guards(hands_over="stamped", operations=1)),
    ),
    Run(
        "full-handoff-two-operations",
        "planned moves, two operations per node",
        lambda: Ownership(Guards(hands_over="stamped", ticks=2)),
        slow=True,
    ),
    Run(
        "expiry-instead-of-burial",
        "a node is dead when its key has expired",
        lambda: Ownership(Guards(burial=False)),
        breaks="I6",
        length=9,
    ),
    Run(
        "no-resolve",
        "a CLAIM that is not answered is taken for lost",
        lambda: Ownership(Guards(resolves=False)),
        breaks="I6",
        length=6,
    ),
    Run(
        "no-restamp",
        "a slot that was adopted keeps its nonce",
        lambda: Ownership(Guards(restamps=False)),
        breaks="I6",
        length=12,
        slow=True,
    ),
    Run(
        "no-epoch",
        "APPEND does not compare owner and epoch",
        lambda: Ownership(Guards(compares_epoch=False)),
        breaks="I3",
        length=12,
        slow=True,
    ),
    Run(
        "no-suspension",
        "a node acts whatever its clock says",
        lambda: Ownership(Guards(suspends=False)),
        breaks="I7",
        length=11,
    ),
    Run(
        "adopts-what-is-there",
        "RESERVE adopts whatever a buried node has left, also what came after it was sent",
        lambda: Ownership(Guards(hands_over="stamped", adopts_what_was_read=False)),
        breaks="I6",
        length=12,
        slow=True,
    ),
    Run(
        "handoff-without-stamp",
        "a planned move leaves the slot in the name of the source",
        lambda: Ownership(Guards(hands_over="naive")),
        breaks="I6",
        length=11,
        slow=True,
    ),
)
