"""What `models.ownership` is about: conversations, slots, nodes, and commands on their way."""

from __future__ import annotations

from typing import Final, Literal, NamedTuple

from models.explore import put

LEASE: Final = 2
"""Ticks that a lease lasts."""
Nonce = tuple[int, int]
"""(node, attempt)."""


class Slot(NamedTuple):
    """A slot."""

    nonce: Nonce
    node: int


# What a node is about to do. Named tuples of different types are equal if their fields are; `kind` keeps them apart.


class Reserving(NamedTuple):
    """RESERVE is on its way."""

    cid: int
    owner: int | None
    epoch: int
    nonce: Nonce
    kind: Literal["reserving"] = "reserving"


class Reserved(NamedTuple):
    """It has the slot; CLAIM is next."""

    cid: int
    owner: int | None
    epoch: int
    nonce: Nonce
    kind: Literal["reserved"] = "reserved"


class Claiming(NamedTuple):
    """CLAIM is on its way."""

    cid: int
    owner: int | None
    epoch: int
    nonce: Nonce
    kind: Literal["claiming"] = "claiming"


class GivingBack(NamedTuple):
    """UNRESERVE is next."""

    cid: int
    nonce: Nonce
    kind: Literal["giving back"] = "giving back"


class Moving(NamedTuple):
    """The owner change of a planned move is next."""

    cid: int
    target: int
    nonce: Nonce
    kind: Literal["moving"] = "moving"


Job = Reserving | Reserved | Claiming | GivingBack | Moving


class Reserve(NamedTuple):
    """A RESERVE on its way."""

    node: int
    cid: int
    nonce: Nonce
    read: Slot | None
    kind: Literal["RESERVE"] = "RESERVE"


class Claim(NamedTuple):
    """A CLAIM on its way."""

    node: int
    cid: int
    owner: int | None
    epoch: int
    nonce: Nonce
    kind: Literal["CLAIM"] = "CLAIM"


class Append(NamedTuple):
    """An APPEND on its way."""

    node: int
    cid: int
    epoch: int
    kind: Literal["APPEND"] = "APPEND"


Command = Reserve | Claim | Append


class Head(NamedTuple):
    """A conversation: owner, epoch, the owner's nonce; epoch and writer of the last log entry, and how many."""

    owner: int | None = None
    epoch: int = 0
    nonce: Nonce | None = None
    written: tuple[int, int] | None = None
    entries: int = 0


class Node(NamedTuple):
    """A node: until when it may act by its own clock, and under which epoch it runs each conversation (0: not)."""

    epochs: tuple[int, ...]
    alive: bool = True
    deadline: int = LEASE
    job: Job | None = None
    operations: int = 0


class State(NamedTuple):
    """Everything.

    Attributes:
        leases: the store's deadlines, None for one that was removed.
        seen: a slot that the reconciler has read and is about to free.
    """

    heads: tuple[Head, ...]
    slots: tuple[Slot | None, ...]
    nodes: tuple[Node, ...]
    time: int = 0
    leases: tuple[int | None, ...] = (LEASE, LEASE)
    buried: frozenset[int] = frozenset()
    network: frozenset[Command] = frozenset()
    seen: tuple[int, Nonce] | None = None
    broken: str | None = None

    def with_node(self, i: int, node: Node) -> State:
        """The same with another node."""
        return self._replace(nodes=put(self.nodes, i, node))

    def doing(self, i: int, job: Job | None) -> State:
        """The same with another job of node `i`."""
        return self.with_node(i, self.nodes[i]._replace(job=job))

    def running(self, i: int, cid: int, epoch: int) -> State:
        """The same with node `i` running a conversation (0: not any more), and without a job."""
        node = self.nodes[i]
        return self.with_node(i, node._replace(job=None, epochs=put(node.epochs, cid, epoch)))

    def with_head(self, cid: int, head: Head) -> State:
        """The same with another head."""
        return self._replace(heads=put(self.heads, cid, head))

    def with_slot(self, cid: int, slot: Slot | None) -> State:
        """The same with another slot."""
        return self._replace(slots=put(self.slots, cid, slot))

    def freed(self, cid: int, nonce: Nonce) -> State:
        """UNRESERVE."""
        slot = self.slots[cid]
        return self.with_slot(cid, None) if slot is not None and slot.nonce == nonce else self

    def written(self, cid: int, epoch: int, writer: int) -> State:
        """An entry is added to the log."""
        head = self.heads[cid]
        after = self.with_head(cid, head._replace(written=(epoch, writer), entries=head.entries + 1))
        last = head.written
        if last is not None and epoch < last[0]:
            return after._replace(broken=f"I3: an entry of epoch {epoch} after one of epoch {last[0]}")
        if last is not None and epoch == last[0] and writer != last[1]:
            return after._replace(broken=f"I2: nodes {last[1]} and {writer} both write in epoch {epoch}")
        return after
