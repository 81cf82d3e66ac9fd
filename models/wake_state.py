"""What `models.wake` is about: one conversation, the nodes around it, the messages on their way."""

from __future__ import annotations

from typing import Final, Literal, NamedTuple

from models.explore import put

OPEN: Final = 0
"""Stands for an `open` entry among the positions that a node has been told of."""

Numbers = frozenset[int]
NONE: Final[Numbers] = frozenset()


# What a node is about to do. Named tuples of different types are equal if their fields are; `kind` keeps them apart.


class Read(NamedTuple):
    """It reads the head, to start the conversation."""

    kind: Literal["read"] = "read"


class Record(NamedTuple):
    """It has read owner and epoch; it writes its record and subscribes."""

    owner: int | None
    epoch: int
    kind: Literal["record"] = "record"


class Claim(NamedTuple):
    """CLAIM is next."""

    owner: int | None
    epoch: int
    kind: Literal["claim"] = "claim"


class ReadInbox(NamedTuple):
    """It owns the conversation and takes in what was unread."""

    kind: Literal["inbox"] = "inbox"


class Subscribe(NamedTuple):
    """It subscribes, after it has read the inbox: the wrong way round."""

    kind: Literal["subscribe"] = "subscribe"


class Recover(NamedTuple):
    """It looks at the record of a buried node."""

    dead: int
    kind: Literal["recover"] = "recover"


class Disown(NamedTuple):
    """DISOWN is next."""

    dead: int
    owner: int
    epoch: int
    kind: Literal["disown"] = "disown"


class Asking(NamedTuple):
    """It asks another node to take the conversation over."""

    target: int
    kind: Literal["asking"] = "asking"


class HandOver(NamedTuple):
    """It is about to make another node the owner."""

    target: int
    kind: Literal["hand over"] = "hand over"


class HandedOver(NamedTuple):
    """It has made another node the owner and still has its record."""

    target: int
    kind: Literal["handed over"] = "handed over"


class Leaving(NamedTuple):
    """It has sent RELEASE and does not know what became of it."""

    kind: Literal["leaving"] = "leaving"


Job = Read | Record | Claim | ReadInbox | Subscribe | Recover | Disown | Asking | HandOver | HandedOver | Leaving


class LateClaim(NamedTuple):
    """A CLAIM on its way, of a node that is gone."""

    node: int
    owner: int | None
    epoch: int
    kind: Literal["claim"] = "claim"


class LateRelease(NamedTuple):
    """A RELEASE on its way: what its sender had read when it sent it."""

    node: int
    epoch: int
    cursor: int
    offset: int
    kind: Literal["release"] = "release"


class At(NamedTuple):
    """A message was sent through `node`, and SEND returned `owner`."""

    node: int
    owner: int | None
    kind: Literal["at"] = "at"


class Waits(NamedTuple):
    """A message waits until `node` has woken the conversation."""

    node: int
    kind: Literal["waits"] = "waits"


Fate = At | Waits | Literal["acknowledged", "lost"] | None
"""What became of a message; `lost`: its sender's node is gone, and it may send again; None: not sent."""


class Node(NamedTuple):
    """A node.

    Attributes:
        epoch: under which it believes to own the conversation, 0 for none.
        subscribed: whether the store has its subscription.
        queue: what was published to it and not read yet.
        knows: the burials it has heard of.
    """

    alive: bool = True
    epoch: int = 0
    subscribed: bool = False
    queue: Numbers = NONE
    knows: Numbers = NONE
    job: Job | None = None


class Left(NamedTuple):
    """What may still happen."""

    crashes: int
    drops: int
    late: int
    handoffs: int


class State(NamedTuple):
    """Everything.

    Attributes:
        last: position of the last inbox entry.
        cursor: inbox position up to which everything is in the log.
        offset: length of the log.
        records: nodes whose hash has a record of the conversation.
        fates: of the messages.
        positions: of the messages in the inbox; 0 for one that was never sent.
    """

    left: Left
    nodes: tuple[Node, ...]
    fates: tuple[Fate, ...]
    positions: tuple[int, ...]
    owner: int | None = 0
    epoch: int = 1
    last: int = 0
    cursor: int = 0
    taken: Numbers = NONE
    done: Numbers = NONE
    offset: int = 1
    buried: Numbers = NONE
    records: Numbers = frozenset({0})
    network: frozenset[LateClaim | LateRelease] = frozenset()

    @property
    def open_turns(self) -> Numbers:
        """Positions that were taken in and not answered."""
        return self.taken - self.done

    def with_node(self, i: int, node: Node) -> State:
        """The same with another node."""
        return self._replace(nodes=put(self.nodes, i, node))

    def doing(self, i: int, job: Job | None) -> State:
        """The same with another job of node `i`."""
        return self.with_node(i, self.nodes[i]._replace(job=job))

    def without_record(self, i: int) -> State:
        """The same without a record in the hash of node `i`."""
        return self._replace(records=self.records - {i})

    def with_fate(self, message: int, fate: Fate) -> State:
        """The same with another fate of a message."""
        return self._replace(fates=put(self.fates, message, fate))

    def owned_by(self, i: int) -> bool:
        """Whether node `i` owns the conversation, under the epoch that it believes in."""
        return self.owner == i and self.epoch == self.nodes[i].epoch

    def published(self, number: int) -> State:
        """Whoever subscribes is told."""
        nodes = tuple(
            node._replace(queue=node.queue | {number}) if node.subscribed and node.alive else node
            for node in self.nodes
        )
        return self._replace(nodes=nodes)

    def taken_in(self, i: int) -> State:
        """Node `i` reads the inbox from the store's cursor and appends the inputs; refused if it is not the owner."""
        if not self.owned_by(i):
            return self.with_node(i, self.nodes[i]._replace(epoch=0))
        new = frozenset(range(self.cursor + 1, self.last + 1))
        if not new:
            return self
        return self._replace(taken=self.taken | new, cursor=max(new), offset=self.offset + len(new))

    def finished(self, i: int, node: Node) -> State:
        """The job of node `i` is done, which becomes `node`: who waited for it is acknowledged."""
        waited = Waits(i)
        fates: tuple[Fate, ...] = tuple("acknowledged" if fate == waited else fate for fate in self.fates)
        return self.with_node(i, node._replace(job=None))._replace(fates=fates)

    def claimed(self, i: int, owner: int | None, epoch: int) -> State | None:
        """CLAIM for node `i` with what it expects; None if it is refused. The node does not know of it yet."""
        if (self.owner, self.epoch) != (owner, epoch):
            return None
        return self._replace(owner=i, epoch=self.epoch + 1, offset=self.offset + 1).published(OPEN)
