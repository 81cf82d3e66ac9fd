"""The directory: every node's records of the conversations that are loaded, merged in one place (I14).

Each node publishes its changes in batches with a version of its own. Who sees a gap, or a node it does not
know, reads that one node's hash. A record carries epoch and nonce; when two nodes name one conversation, the
higher epoch wins. The functions change the `Directory` that they are given: it is a cache of one event loop,
not shared state.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

LoopStatus = Literal[
    "starting", "running", "idle", "waiting", "hibernated", "recovering", "draining", "stopped", "failed"
]

LISTED: frozenset[str] = frozenset({"running", "idle", "waiting", "recovering", "draining"})
"""Statuses of a loaded conversation. `starting` is written before the claim and is not listed."""


@dataclass(frozen=True, slots=True)
class Record:
    """One conversation as its node knows it. `since` is when `status` began, ms since 1970."""

    conversation_id: str
    user: str
    status: LoopStatus
    epoch: int
    nonce: str
    since: int
    version: int = 0


@dataclass(slots=True)
class NodeView:
    """What is known of one node: the version reached, its records, its clients by connection."""

    version: int = 0
    records: dict[str, Record] = field(default_factory=dict[str, Record])
    connections: dict[str, str] = field(default_factory=dict[str, str])


@dataclass(frozen=True, slots=True)
class Batch:
    """What a node publishes: changes between version - 1 and version."""

    node: str
    version: int
    records: tuple[Record, ...] = ()
    removed: tuple[str, ...] = ()
    joined: Mapping[str, str] = field(default_factory=dict[str, str])
    left: tuple[str, ...] = ()


class Directory:
    """All nodes' views, with an index by conversation."""

    def __init__(self) -> None:
        self.nodes: dict[str, NodeView] = {}
        self._by_conversation: dict[str, set[str]] = {}
        self._by_client: dict[str, set[str]] = {}
        self.watchers: list[Callable[[str, str], None]] = []
        """Called with user and conversation whenever something of it may have changed. Must neither block nor raise."""

    # -- changes ---------------------------------------------------------------------------------------------

    def apply(self, batch: Batch, *, own: bool = False) -> bool:
        """Apply the next batch of a node; False if it is not the next one (a gap, or an unknown node).

        Args:
            own: this node made the batch. Versions before it that failed are no gap: it holds what they held.
        """
        view = self.nodes.get(batch.node)
        if view is None or (batch.version > view.version + 1 and not own):
            return False
        if batch.version <= view.version:
            return True
        view.version = batch.version
        for record in batch.records:
            self._put(batch.node, view, record)
        for cid in batch.removed:
            self._drop(batch.node, view, cid)
        for connection, cid in batch.joined.items():
            self._connect(batch.node, view, connection, cid)
        for connection in batch.left:
            self._disconnect(batch.node, view, connection)
        return True

    def replace(self, node: str, version: int, records: Iterable[Record], connections: Mapping[str, str]) -> None:
        """Take over what was read from a node's hash while it was at least at `version`."""
        view = self.nodes.setdefault(node, NodeView())
        if view.version > version:
            return
        for cid in list(view.records):
            self._drop(node, view, cid)
        for connection in list(view.connections):
            self._disconnect(node, view, connection)
        for record in records:
            self._put(node, view, record)
        for connection, cid in connections.items():
            self._connect(node, view, connection, cid)
        view.version = version

    def forget(self, node: str) -> None:
        """Drop everything of a node that is buried."""
        view = self.nodes.pop(node, None)
        if view is not None:
            for cid, record in view.records.items():
                self._unindex(self._by_conversation, cid, node)
                self.announce(record.user, cid)
            for connection, cid in view.connections.items():
                self._unindex(self._by_client, cid, f"{node} {connection}")

    def put(self, node: str, record: Record) -> None:
        """Enter a record without a version: a single change that was heard of."""
        self._put(node, self.nodes.setdefault(node, NodeView()), record)

    def drop(self, node: str, cid: str) -> None:
        """Remove a record without a version."""
        if (view := self.nodes.get(node)) is not None:
            self._drop(node, view, cid)

    def announce(self, user: str, cid: str) -> None:
        """Tell the watchers of a change that no record shows."""
        for watcher in self.watchers:
            watcher(user, cid)

    def _put(self, node: str, view: NodeView, record: Record) -> None:
        held = view.records.get(record.conversation_id)
        if held is not None and held.epoch > record.epoch:
            return
        view.records[record.conversation_id] = record
        self._by_conversation.setdefault(record.conversation_id, set()).add(node)
        self.announce(record.user, record.conversation_id)

    def _drop(self, node: str, view: NodeView, cid: str) -> None:
        record = view.records.pop(cid, None)
        if record is not None:
            self._unindex(self._by_conversation, cid, node)
            self.announce(record.user, cid)

    def _connect(self, node: str, view: NodeView, connection: str, cid: str) -> None:
        self._disconnect(node, view, connection)
        view.connections[connection] = cid
        self._by_client.setdefault(cid, set()).add(f"{node} {connection}")

    def _disconnect(self, node: str, view: NodeView, connection: str) -> None:
        cid = view.connections.pop(connection, None)
        if cid is not None:
            self._unindex(self._by_client, cid, f"{node} {connection}")

    @staticmethod
    def _unindex(index: dict[str, set[str]], key: str, value: str) -> None:
        held = index[key]
        held.discard(value)
        if not held:
            del index[key]

    # -- questions -------------------------------------------------------------------------------------------

    def find(self, cid: str) -> tuple[str, Record] | None:
        """Node and record of a conversation: the highest epoch wins, in it one that is listed.

        The node's name breaks a tie, so that all nodes with the same records give the same answer (I14).
        """
        found = [(node, self.nodes[node].records[cid]) for node in self._by_conversation.get(cid, ())]
        return max(found, key=lambda f: (f[1].epoch, f[1].status in LISTED, f[0]), default=None)

    def listed(self) -> Iterator[tuple[str, Record]]:
        """Every loaded conversation once, with its node."""
        for cid in self._by_conversation:
            found = self.find(cid)
            if found is not None and found[1].status in LISTED:
                yield found

    def connections(self) -> Iterator[tuple[str, str, str]]:
        """(node, connection, conversation) of every client in the cluster."""
        for node, view in self.nodes.items():
            for connection, cid in view.connections.items():
                yield node, connection, cid

    def connection_count(self, cid: str) -> int:
        """Clients of a conversation on all nodes."""
        return len(self._by_client.get(cid, ()))
