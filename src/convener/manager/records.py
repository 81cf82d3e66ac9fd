"""What this node says of itself: a record per conversation, its clients, and the batches that tell the others.

A record is written before the claim, and removed after the release by its nonce, so the node's hash is a superset
of what it owns and of the slots that name it (I12): recovery walks that hash. Changes are gathered and published at
most once per sync interval, with the node's next version number; who sees a gap reads the hash (I14).
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Awaitable, Callable, Collection, Mapping
from dataclasses import replace
from typing import Any, Final

import msgspec
import structlog

from convener.core.directory import Batch, LoopStatus, Record
from convener.core.placement import sync_interval
from convener.errors import StoreUnavailable
from convener.manager.clock import wall_ms
from convener.manager.context import NodeContext
from convener.manager.runner import Runner
from convener.version import PROTOCOL

log = structlog.get_logger(__name__)

SWEEP_S: Final = 60.0
BATCH: Final = 500
"""Records in one publication; the store's scripts take a few thousand arguments at most."""
MAX_NOTED: Final = 10_000
"""Changes without a record that wait to be told; beyond that, the other nodes find them when they compare."""


class Records:
    """The node's own records and clients, and what of them the others have not been told."""

    def __init__(self, node: NodeContext, publish: bool) -> None:
        self._node = node
        self._publish = publish
        self._version = 0
        self._records: dict[str, Record] = {}
        self._dirty: dict[str, None] = {}
        self._removed: dict[str, tuple[str, int, str]] = {}
        self._clients: dict[str, str] = {}
        self._joined: dict[str, str] = {}
        self._left: dict[str, None] = {}
        self._touched: dict[str, dict[str, None]] = {}
        self._noted: dict[tuple[str, str], None] = {}
        self._told: set[str] = set()
        self._ending = Counter[str]()
        self.stray: Callable[[str, str], Awaitable[None]] | None = None
        """What becomes of a conversation (and its user) of which the hash has a record, and this node knows nothing."""
        self._changed = asyncio.Event()
        self._closed = False
        self._turn = asyncio.Lock()
        # The others' views begin with what is read of them; this node knows itself from its version 0.
        node.directory.replace(node.incarnation, 0, (), {})

    # -- changes ---------------------------------------------------------------------------------------------

    async def begin(self, cid: str, user: str, epoch: int, nonce: str) -> None:
        """Write the record of a start that is about to reserve and claim. `starting` is not listed."""
        record = Record(cid, user, "starting", epoch, nonce, wall_ms(), self._version)
        self._records[cid] = record
        # One batch must not hold both: what comes back is not gone.
        self._removed.pop(cid, None)
        self._node.directory.put(self._node.incarnation, record)
        await self._node.store.put_record(self._node.incarnation, record)

    def update(self, runner: Runner, status: LoopStatus) -> None:
        """A conversation that is owned here changed."""
        if runner.incarnation != self._node.incarnation:
            return
        record = Record(runner.cid, runner.user, status, runner.epoch, runner.nonce, runner.since, self._version)
        self._records[runner.cid] = record
        self._node.directory.put(self._node.incarnation, record)
        self._dirty[runner.cid] = None
        self._touched.setdefault(runner.user, {})[runner.cid] = None
        self._changed.set()

    async def end(self, cid: str, nonce: str, incarnation: str, status: LoopStatus) -> None:
        """Remove a record, by nonce: the record of a later start of the same conversation stays.

        First from the hash: whoever is told that it is gone and reads the hash must not find it there (I14).
        """
        self._ending[cid] += 1
        try:
            await self._node.store.drop_record(incarnation, cid, nonce)
        finally:
            self._ending -= Counter([cid])
        held = self._records.get(cid)
        if held is not None and held.nonce == nonce and incarnation == self._node.incarnation:
            del self._records[cid]
            self._dirty.pop(cid, None)
            self._node.directory.drop(incarnation, cid)
            self._removed[cid] = (status, held.epoch, held.user)
            self._changed.set()

    async def write(self, cid: str) -> None:
        """Write the record of a conversation that is owned here again if the store has lost it (I12)."""
        incarnation = self._node.incarnation
        stored = await self._node.store.record(incarnation, cid)
        held = self._records.get(cid)
        if held is None or cid in self._ending or incarnation != self._node.incarnation:
            return
        if stored is None or stored.nonce != held.nonce:
            await self._node.store.put_record(incarnation, held)

    def note(self, user: str, cid: str) -> None:
        """A change that no record shows, as of a conversation that nobody owns: tell the lists everywhere."""
        self._node.directory.announce(user, cid)
        if self._publish and user and len(self._noted) < MAX_NOTED:
            self._noted[user, cid] = None
            self._changed.set()

    def held(self, cid: str) -> Record | None:
        """This node's record of a conversation."""
        return self._records.get(cid)

    def client_joined(self, connection: str, cid: str) -> None:
        """A client of this node."""
        self._clients[connection] = cid
        self._joined[connection] = cid
        self._left.pop(connection, None)
        self._changed.set()

    def client_left(self, connection: str) -> None:
        """A client of this node went away."""
        if self._clients.pop(connection, None) is not None:
            self._joined.pop(connection, None)
            self._left[connection] = None
            self._changed.set()

    def new_life(self) -> None:
        """A new incarnation: nothing is owned, the clients are still here."""
        self._version = 0
        self._records.clear()
        self._dirty.clear()
        self._removed.clear()
        self._joined = dict(self._clients)
        self._left.clear()
        self._told.clear()
        self._node.directory.replace(self._node.incarnation, 0, (), {})
        self._changed.set()

    def close(self) -> None:
        """This incarnation is over: nothing more is said of it, or its keys would be there again after their end."""
        self._closed = True

    @property
    def clients(self) -> Mapping[str, str]:
        """Connection → conversation, on this node."""
        return self._clients

    # -- telling the others --------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Flush for ever: at once after a quiet time, else once per sync interval."""
        while True:
            await self._changed.wait()
            try:
                await self.flush()
            except StoreUnavailable as error:
                log.info("state could not be written, again", error=str(error))
                self._changed.set()
            interval = sync_interval(len(self._node.directory.nodes)) if self._publish else 0.2
            await asyncio.sleep(interval)

    async def flush(self) -> None:
        """Write what changed to the node's hash and publish it, in batches with consecutive versions.

        Raises:
            StoreUnavailable: the outcome is unknown; the same changes go again with the next version, at the next
                call, and whoever missed one version reads the hash.
        """
        async with self._turn:
            self._changed.clear()
            if self._closed:
                return
            await self._touch()
            while self._dirty or self._removed or self._joined or self._left or self._noted:
                noted = list(self._noted)[:BATCH]
                for note in noted:
                    # Before it is told: what changes meanwhile has to be told once more.
                    del self._noted[note]
                try:
                    await self._flush_some(noted)
                except BaseException:
                    self._noted = dict.fromkeys(noted) | self._noted
                    raise

    async def _touch(self) -> None:
        while self._touched:
            user, cids = self._touched.popitem()
            try:
                await self._node.store.touch(user, list(cids))
            except StoreUnavailable:
                self._touched.setdefault(user, {}).update(cids)
                raise

    async def _flush_some(self, noted: Collection[tuple[str, str]]) -> None:
        incarnation = self._node.incarnation
        self._version += 1
        version = self._version
        changed = [replace(self._records[c], version=version) for c in list(self._dirty)[:BATCH]]
        removed = dict(list(self._removed.items())[:BATCH])
        joined = dict(list(self._joined.items())[:BATCH])
        left = list(self._left)[:BATCH]
        await self._node.store.flush(incarnation, version, changed, joined, left)
        if self._publish:
            news = {r.conversation_id for r in changed} - self._told
            payload = encode_batch(incarnation, version, changed, news, removed, joined, left, noted)
            # Nothing counts as told before it is published: without a later batch nobody would see the gap.
            await self._node.store.publish(self._node.store.channel("sync"), payload)
        if incarnation != self._node.incarnation:
            return
        self._told |= {r.conversation_id for r in changed}
        self._told -= removed.keys()
        self._forget_told(changed, removed, joined, left)
        gone = tuple(cid for cid in removed if cid not in self._records)
        batch = Batch(incarnation, version, tuple(changed), gone, joined, tuple(left))
        self._node.directory.apply(batch, own=True)

    async def sweep_forever(self) -> None:
        """Rarely, jittered: take out of the hash what this node does not know of."""
        while True:
            await asyncio.sleep(SWEEP_S * random.uniform(0.5, 1.5))
            try:
                await self._sweep()
            except StoreUnavailable as error:
                log.info("cannot compare the own records", error=str(error))

    async def _sweep(self) -> None:
        """A command whose reply was lost may land after what it wrote was taken out again; nobody else would look.

        What this node knows of and the hash lacks is about to come or to go. What is wrong here because either has
        happened meanwhile is put right by the next sweep.
        """
        incarnation, store = self._node.incarnation, self._node.store
        _, records, clients = await store.node_records(incarnation)
        for record in records:
            held = self._records.get(record.conversation_id)
            if incarnation != self._node.incarnation:
                return
            if held is None:
                if self.stray is not None:
                    await self.stray(record.conversation_id, record.user)
            elif held.nonce != record.nonce:
                await store.put_record(incarnation, held)
        self._left |= dict.fromkeys(clients.keys() - self._clients.keys())
        self._joined |= {c: cid for c, cid in self._clients.items() if clients.get(c) != cid}
        if self._left or self._joined:
            self._changed.set()

    def _forget_told(
        self,
        changed: list[Record],
        removed: Mapping[str, tuple[str, int, str]],
        joined: Mapping[str, str],
        left: list[str],
    ) -> None:
        for record in changed:
            held = self._records.get(record.conversation_id)
            # What changed again meanwhile stays dirty.
            if held is None or replace(held, version=0) == replace(record, version=0):
                self._dirty.pop(record.conversation_id, None)
        for cid, value in removed.items():
            if self._removed.get(cid) == value:
                del self._removed[cid]
        for connection, cid in joined.items():
            if self._joined.get(connection) == cid:
                del self._joined[connection]
        for connection in left:
            self._left.pop(connection, None)


def encode_batch(
    node: str,
    version: int,
    changed: Collection[Record],
    news: Collection[str],
    removed: Mapping[str, tuple[str, int, str]],
    joined: Mapping[str, str],
    left: Collection[str],
    noted: Collection[tuple[str, str]],
) -> bytes:
    """The publication of one batch: a list of messages that `_process_message` takes one by one.

    Args:
        news: which of `changed` nobody has been told of yet.
        removed: conversation → (last status, epoch, user): only one that was stopped disconnects its clients.
        noted: (user, conversation) of what changed without a record.
    """
    messages: list[dict[str, Any]] = [
        {
            "type": "new_conversation" if r.conversation_id in news else "status_update",
            "conversation_id": r.conversation_id,
            "source_node": node,
            "new_status": r.status,
            "user_id": r.user,
            "epoch": r.epoch,
            "nonce": r.nonce,
            "since": r.since,
        }
        for r in changed
    ]
    messages += [
        {
            "type": "conversation_stopped" if status == "stopped" else "status_update",
            "conversation_id": cid,
            "source_node": node,
            "new_status": status,
            "epoch": epoch,
            "user_id": user,
        }
        for cid, (status, epoch, user) in removed.items()
    ]
    messages += [
        {"type": "conversation_changed", "conversation_id": cid, "source_node": node, "user_id": user}
        for user, cid in noted
    ]
    return msgspec.json.encode(
        {
            "t": "state",
            "node": node,
            "ver": version,
            "messages": messages,
            "joined": joined,
            "left": left,
            "v": PROTOCOL,
        }
    )
