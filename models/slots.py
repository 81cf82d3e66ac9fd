"""The limit per user: does it neither leak nor block recovery (I6, and that it always settles)?

One conversation C of a user whose limit is 1, three nodes, and a second conversation that takes the slot whenever it is
free. A slot is (nonce, node). The world has budgets: crashes, a RESERVE whose reply is lost and which lands late, a
handoff, starts.

Wanted: at most one conversation holds the slot; C owned by a node that is not buried holds a slot. And from every state
the system alone, without clients and further faults, can get to one where C either has a live owner that holds the slot
under the owner's nonce, or is unowned with no turn in progress and holds no slot.

`models.ownership` checks safety alone; most of what breaks here is safe, and stuck for ever.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, Literal, NamedTuple

from models.explore import Run, Step, put, system, world

Slot = tuple[int, int]
"""(nonce, node)."""


@dataclass(frozen=True)
class Guards:
    """The rules, and how much happens."""

    disowns: bool = True
    """Recovery clears the owner of an idle conversation of a buried node, which lets its slot be freed."""
    named_claims: bool = True
    """Who is named in the slot of a conversation whose owner is buried may take the slot and claim."""
    examines_at_limit: bool = True
    """A start that meets the limit first frees stale slots: conversation unowned, and the node that the slot names is
    buried or has no record of it (the record is written before RESERVE and removed after UNRESERVE)."""
    slot_first: bool = True
    """A starter reads the slot, then the head, and RESERVE adopts exactly the slot value that was read."""
    keeps_slot: bool = True
    """The slot of a conversation with a buried owner is never given back: not after a lost CLAIM, not after a RESERVE
    with unknown outcome; the node begins again under the slot it has."""
    verifies: bool = True
    """After the owner change of a handoff the source looks whether the target is buried, and recovers C if so."""
    single: bool = True
    """A node that is starting C accepts no handoff of it, and starts none while one is coming in."""
    frees_other_nonce: bool = False
    """A reconciler also frees a slot whose conversation a buried node owns under another nonce."""
    frees_own_slots: bool = False
    """A live node frees any slot in its own name that it neither owns nor is claiming."""
    nodes: int = 3
    crashes: int = 1
    late: int = 0
    handoffs: int = 0
    starts: int = 2


# What a node is about to do; in a start, one step after the other. Named tuples of different types are equal
# if their fields are; `kind` keeps them apart.


class Read(NamedTuple):
    """It has read the slot and is about to read the head."""

    slot: Slot | None
    kind: Literal["read"] = "read"


class Record(NamedTuple):
    """It has read owner and epoch and is about to write its record."""

    owner: int | None
    epoch: int
    slot: Slot | None
    kind: Literal["record"] = "record"


class Reserve(NamedTuple):
    """RESERVE is next."""

    owner: int | None
    epoch: int
    slot: Slot | None
    kind: Literal["reserve"] = "reserve"


class Claim(NamedTuple):
    """CLAIM is next."""

    owner: int | None
    epoch: int
    nonce: int
    kind: Literal["claim"] = "claim"


class Unknown(NamedTuple):
    """It does not know what became of its RESERVE."""

    nonce: int
    kind: Literal["unknown"] = "unknown"


class GiveBack(NamedTuple):
    """UNRESERVE is next, and then the record goes."""

    nonce: int
    kind: Literal["give back"] = "give back"


class HandOver(NamedTuple):
    """It is giving C to another node, whose record is written."""

    target: int
    nonce: int
    kind: Literal["hand over"] = "hand over"


class Incoming(NamedTuple):
    """It has accepted a handoff."""

    source: int
    kind: Literal["incoming"] = "incoming"


class Verify(NamedTuple):
    """It has made another node the owner and looks whether that one is buried."""

    target: int
    kind: Literal["verify"] = "verify"


Job = Read | Record | Reserve | Claim | Unknown | GiveBack | HandOver | Incoming | Verify


class Node(NamedTuple):
    """A node: the epoch that it owns C under (0: it does not), the slot nonce, the burials it knows of."""

    alive: bool = True
    epoch: int = 0
    nonce: int = 0
    knows: frozenset[int] = frozenset()
    job: Job | None = None


class LateReserve(NamedTuple):
    """A RESERVE that is still on its way."""

    node: int
    nonce: int
    slot: Slot | None


class Left(NamedTuple):
    """What may still happen."""

    crashes: int
    late: int
    handoffs: int
    starts: int


class State(NamedTuple):
    """Everything. `other`: the second conversation holds the slot; `busy`: a turn of C is in progress."""

    left: Left
    nodes: tuple[Node, ...]
    owner: int | None = 0
    epoch: int = 1
    nonce: int = 1
    slot: Slot | None = (1, 0)
    other: bool = False
    busy: bool = True
    buried: frozenset[int] = frozenset()
    records: frozenset[int] = frozenset({0})
    network: frozenset[LateReserve] = frozenset()
    nonces: int = 1

    def with_node(self, i: int, node: Node) -> State:
        """The same with another node."""
        return self._replace(nodes=put(self.nodes, i, node))

    def doing(self, i: int, job: Job | None) -> State:
        """The same with another job of node `i`."""
        return self.with_node(i, self.nodes[i]._replace(job=job))

    def without_record(self, i: int) -> State:
        """The same without a record in the hash of node `i`."""
        return self._replace(records=self.records - {i})


class Slots:
    """One user, limit 1."""

    def __init__(self, guards: Guards) -> None:
        self.guards = guards

    def initial(self) -> State:
        """Node 0 owns C and answers a message."""
        g = self.guards
        nodes = (Node(epoch=1, nonce=1), *(Node() for _ in range(g.nodes - 1)))
        return State(Left(g.crashes, g.late, g.handoffs, g.starts), nodes)

    def steps(self, state: State) -> Iterator[Step[State]]:
        """See `Model`."""
        if state.slot is None and not state.other:
            yield world("the other conversation takes the slot", state._replace(other=True))
        if state.other:
            yield world("the other conversation ends", state._replace(other=False))
        for i, node in enumerate(state.nodes):
            if node.alive:
                yield from self._membership(state, i)
                yield from self._owns(state, i)
                if node.job is None:
                    yield from self._recovers(state, i)
                elif isinstance(node.job, HandOver):
                    yield from self._hands_over(state, i, node.job)
                else:
                    yield from self._starts(state, i, node.job)
            elif i not in state.buried:
                yield system(f"{i} is buried", state._replace(buried=state.buried | {i}))
        for command in state.network:
            without = state._replace(network=state.network - {command})
            after = self._reserved(without, command.node, command.nonce, command.slot)
            if after is None:
                yield system(f"a late RESERVE of {command.node} is refused", without)
            else:
                yield system(f"a late RESERVE of {command.node} lands", after)

    def _reserved(self, state: State, i: int, nonce: int, read: Slot | None) -> State | None:
        """RESERVE by node `i`, which has read the slot value `read`; None if it is refused."""
        slot = state.slot
        if slot is None:
            return None if state.other else state._replace(slot=(nonce, i))
        if self.guards.slot_first and slot != read:
            return None
        if slot[1] in state.nodes[i].knows or (self.guards.named_claims and slot[1] == i):
            return state._replace(slot=(nonce, i))
        return None

    def _membership(self, state: State, i: int) -> Iterator[Step[State]]:
        node = state.nodes[i]
        for other in state.buried - node.knows:
            learned = state.with_node(i, node._replace(knows=node.knows | {other}))
            yield system(f"{i} learns of the burial of {other}", learned)
        if state.left.crashes and sum(n.alive for n in state.nodes) > 1:
            left = state.left._replace(crashes=state.left.crashes - 1)
            dead = node._replace(alive=False, epoch=0, nonce=0, job=None)
            yield world(f"{i} crashes", state.with_node(i, dead)._replace(left=left))

    def _owns(self, state: State, i: int) -> Iterator[Step[State]]:
        node = state.nodes[i]
        mine = state.owner == i and state.epoch == node.epoch
        if node.epoch and not mine:
            yield system(f"{i} finds itself fenced", state.with_node(i, node._replace(epoch=0, nonce=0)))
        if isinstance(node.job, Incoming):
            source = state.nodes[node.job.source]
            given_up = source.alive and not isinstance(source.job, HandOver)
            if state.owner == i or node.job.source in node.knows or given_up:
                yield system(f"{i}: the handoff is over", state.doing(i, None))
        if node.job is not None:
            return
        if state.owner == i and not node.epoch:
            adopted = node._replace(epoch=state.epoch, nonce=state.nonce)
            yield system(f"{i} sees itself named owner", state.with_node(i, adopted))
        if mine and state.busy:
            yield world(f"{i} ends the turn", state._replace(busy=False))
            yield from self._begins_handoffs(state, i)
        elif mine:
            asleep = node._replace(epoch=0, job=GiveBack(node.nonce))
            yield world(f"{i} hibernates: RELEASE", state.with_node(i, asleep)._replace(owner=None))
        elif state.owner is None and not state.busy and state.left.starts:
            left = state.left._replace(starts=state.left.starts - 1)
            yield world(f"{i} is asked to start C", state.doing(i, Read(state.slot))._replace(left=left))

    def _begins_handoffs(self, state: State, i: int) -> Iterator[Step[State]]:
        for target, other in enumerate(state.nodes):
            if not state.left.handoffs or target == i or target in state.nodes[i].knows or not other.alive:
                continue
            if self.guards.single and other.job is not None:
                continue
            begun = state.doing(i, HandOver(target, state.nonces + 1))._replace(
                records=state.records | {target},
                nonces=state.nonces + 1,
                left=state.left._replace(handoffs=state.left.handoffs - 1),
            )
            name = f"{i} begins a handoff to {target}, which writes its record"
            yield world(name, begun.doing(target, Incoming(i)) if self.guards.single else begun)

    def _recovers(self, state: State, i: int) -> Iterator[Step[State]]:
        """Node `i` walks the records of the buried, and looks at stale slots."""
        node, guards, slot = state.nodes[i], self.guards, state.slot
        for dead in sorted(node.knows & state.records):
            named = slot is not None and slot[1] == dead
            if state.owner in node.knows:
                yield self._recovers_owned(state, i, dead)
            elif named and state.owner is None:
                yield system(f"{i} frees the slot of {dead}", state._replace(slot=None))
            elif state.owner is None or state.owner not in state.buried:
                yield system(f"{i} drops the record of {dead}", state.without_record(dead))
            other = slot is not None and slot[0] != state.nonce
            if guards.frees_other_nonce and named and other and state.owner in node.knows:
                yield system(f"{i} frees the slot of {dead}: other nonce", state._replace(slot=None))
        if slot is None:
            return
        unused = not node.epoch and (state.owner is None or (guards.frees_own_slots and state.owner != i))
        if slot[1] == i and i in state.records and unused:
            yield system(f"{i} gives back a slot in its own name", state._replace(slot=None).without_record(i))
        stale = state.owner is None and (slot[1] in node.knows or slot[1] not in state.records)
        if guards.examines_at_limit and stale:
            yield system(f"a start at {i} meets the limit and frees a stale slot", state._replace(slot=None))

    def _recovers_owned(self, state: State, i: int, dead: int) -> Step[State]:
        if state.busy:
            return system(f"{i} recovers C from {state.owner}", state.doing(i, Read(state.slot)))
        if self.guards.disowns:
            return system(f"{i} disowns C", state._replace(owner=None, epoch=state.epoch + 1))
        return system(f"{i} leaves C alone and drops the record of {dead}", state.without_record(dead))

    def _starts(self, state: State, i: int, job: Job) -> Iterator[Step[State]]:
        node = state.nodes[i]
        match job:
            case Read(slot):
                if state.owner is None or state.owner in node.knows:
                    read = state.doing(i, Record(state.owner, state.epoch, slot))
                    yield system(f"{i} reads owner {state.owner}, epoch {state.epoch}", read)
                else:
                    yield system(f"{i} reads: owned by {state.owner}", state.doing(i, None))
            case Record(owner, epoch, slot):
                written = state.doing(i, Reserve(owner, epoch, slot))._replace(records=state.records | {i})
                yield system(f"{i} writes its record", written)
            case Reserve():
                yield from self._reserves(state, i, job)
            case Claim():
                yield self._claims(state, i, job)
            case Verify(target):
                if target in state.buried:
                    seen = node._replace(knows=node.knows | {target}, job=Read(state.slot))
                    yield system(f"{i} sees that {target} is buried", state.with_node(i, seen))
                else:
                    yield system(f"{i} sees that {target} is not buried", state.doing(i, None).without_record(i))
            case Unknown(nonce) if self.guards.keeps_slot and state.owner is not None and state.owner in node.knows:
                yield system(f"{i} begins again", state.doing(i, Read(state.slot)))
            case Unknown(nonce) | GiveBack(nonce):
                freed = state._replace(slot=None) if state.slot and state.slot[0] == nonce else state
                freed = freed.with_node(i, node._replace(job=None, nonce=0)).without_record(i)
                yield system(f"{i} UNRESERVE, drops its record", freed)
            case _:
                return

    def _reserves(self, state: State, i: int, job: Reserve) -> Iterator[Step[State]]:
        nonce = state.nonces + 1
        after = self._reserved(state, i, nonce, job.slot)
        if after is None:
            yield system(f"{i} RESERVE is refused, it gives up", state.doing(i, None).without_record(i))
        else:
            claiming = after.doing(i, Claim(job.owner, job.epoch, nonce))
            yield system(f"{i} RESERVE", claiming._replace(nonces=nonce))
        if state.left.late:
            lost = state.doing(i, Unknown(nonce))._replace(
                nonces=nonce,
                network=state.network | {LateReserve(i, nonce, job.slot)},
                left=state.left._replace(late=state.left.late - 1),
            )
            yield world(f"{i} RESERVE: no answer, it is still on its way", lost)

    def _claims(self, state: State, i: int, job: Claim) -> Step[State]:
        node = state.nodes[i]
        if (state.owner, state.epoch) == (job.owner, job.epoch):
            owning = node._replace(epoch=job.epoch + 1, nonce=job.nonce, job=None)
            owned = state.with_node(i, owning)
            return system(f"{i} claims", owned._replace(owner=i, epoch=job.epoch + 1, nonce=job.nonce, busy=True))
        if self.guards.keeps_slot and state.owner is not None and state.owner in state.buried:
            again = node._replace(job=Claim(state.owner, state.epoch, job.nonce), knows=node.knows | {state.owner})
            return system(f"{i} CLAIM: conflict with the buried {state.owner}, again", state.with_node(i, again))
        return system(f"{i} CLAIM: conflict", state.doing(i, GiveBack(job.nonce)))

    def _hands_over(self, state: State, i: int, job: HandOver) -> Iterator[Step[State]]:
        node, target = state.nodes[i], job.target
        if not (state.owner == i and state.epoch == node.epoch):
            yield system(f"{i} handoff: fenced", state.doing(i, None))
        elif state.slot == (node.nonce, i):
            if state.nodes[target].alive:
                yield system(f"{i} stamps the slot for {target}", state._replace(slot=(job.nonce, target)))
            else:
                yield system(f"{i} gives the handoff up", state.doing(i, None))
        elif target in node.knows:
            yield system(f"{i} stamps the slot back", state.doing(i, None)._replace(slot=(node.nonce, i)))
        else:
            done = node._replace(epoch=0, nonce=0, job=Verify(target) if self.guards.verifies else None)
            given = state.with_node(i, done)._replace(owner=target, epoch=state.epoch + 1, nonce=job.nonce)
            yield system(f"{i} makes {target} the owner", given)

    def violation(self, state: State, quiet: bool) -> str | None:
        """See `Model`."""
        if state.slot is not None and state.other:
            return "I6: two conversations on one slot"
        if state.owner is not None and state.owner not in state.buried and state.slot is None:
            return f"I6: C is owned by {state.owner}, which is not buried, without a slot"
        return None

    def settled(self, state: State) -> bool:
        """See `Settling`."""
        if state.network:
            return False
        if state.owner is not None and state.nodes[state.owner].alive:
            return state.slot is not None and state.slot == (state.nonce, state.owner)
        return state.owner is None and state.slot is None and not state.busy


RUNS: Final = (
    Run("full", "one crash, two starts", lambda: Slots(Guards())),
    Run("full-two-crashes", "two crashes", lambda: Slots(Guards(crashes=2)), slow=True),
    Run("full-late", "a RESERVE lands late", lambda: Slots(Guards(late=1)), slow=True),
    Run("full-handoff", "a handoff", lambda: Slots(Guards(handoffs=1)), slow=True),
    Run(
        "no-disown",
        "recovery leaves idle conversations of a buried node alone",
        lambda: Slots(Guards(disowns=False)),
        breaks="stuck",
        length=2,
    ),
    Run(
        "frees-other-nonce",
        "a slot is freed because a buried owner has another nonce",
        lambda: Slots(Guards(crashes=2, frees_other_nonce=True)),
        breaks="stuck",
        length=13,
        slow=True,
    ),
    Run(
        "gives-slot-back",
        "a lost CLAIM gives the slot back although the owner is buried",
        lambda: Slots(Guards(keeps_slot=False)),
        breaks="stuck",
        length=18,
    ),
    Run(
        "gives-slot-back-unknown",
        "so does a RESERVE with unknown outcome",
        lambda: Slots(Guards(keeps_slot=False, late=1, starts=0)),
        breaks="stuck",
        length=10,
    ),
    Run(
        "target-may-not-claim",
        "who is named in the slot may not claim under it",
        lambda: Slots(Guards(handoffs=1, named_claims=False)),
        breaks="stuck",
        length=3,
        slow=True,
    ),
    Run(
        "slot-read-last",
        "the head is read before the slot, and RESERVE adopts whatever is there",
        lambda: Slots(Guards(handoffs=1, slot_first=False)),
        breaks="I6",
        length=19,
        slow=True,
    ),
    Run(
        "target-not-verified",
        "the source of a handoff does not look whether the target is buried",
        lambda: Slots(Guards(handoffs=1, verifies=False)),
        breaks="stuck",
        length=7,
        slow=True,
    ),
    Run(
        "start-during-handoff",
        "a node starts C while a handoff of it is coming in",
        lambda: Slots(Guards(handoffs=1, single=False)),
        breaks="stuck",
        length=17,
        slow=True,
    ),
    Run(
        "target-frees-its-slot",
        "a node frees whatever slot names it",
        lambda: Slots(Guards(handoffs=1, frees_own_slots=True)),
        breaks="stuck",
        length=8,
        slow=True,
    ),
    Run(
        "no-look-at-limit",
        "a start that meets the limit does not look for stale slots",
        lambda: Slots(Guards(late=1, examines_at_limit=False)),
        breaks="stuck",
        length=8,
        slow=True,
    ),
)
