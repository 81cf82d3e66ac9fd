"""Keeping the directory equal to all nodes' hashes (I14): the listener, and reading where something was missed."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from typing import Any, Final

import msgspec
import structlog

from convener.core.directory import Batch
from convener.errors import ConvenerError
from convener.manager.context import NodeContext
from convener.manager.members import Members
from convener.version import OLDEST_PROTOCOL

log = structlog.get_logger(__name__)

QUEUE: Final = 10_000
"""Publications that wait for the worker; when it is full everything is read anew, nothing is waited for."""
RECONCILE_S: Final = 60.0
PAUSE_S: Final = 0.5


class SyncMessage(msgspec.Struct):
    """A message of the `sync` channel: ``state`` (a batch of one node) or ``members``. `v` is the protocol of a batch's
    sender; 0.1.0 does not say it.
    """

    t: str
    node: str = ""
    ver: int = 0
    messages: list[dict[str, Any]] = []
    joined: dict[str, str] = {}
    left: list[str] = []
    v: int = 1


_decoder = msgspec.json.Decoder(SyncMessage)

Process = Callable[[dict[str, Any]], Awaitable[None]]


class Sync:
    """Listens to the other nodes and reads their hashes where a version is missing."""

    def __init__(self, node: NodeContext, members: Members) -> None:
        self._node = node
        self._members = members
        self._queue: asyncio.Queue[SyncMessage] = asyncio.Queue(QUEUE)
        self._to_read: set[str] = set()
        self._wanted = asyncio.Event()
        self.subscribed = asyncio.Event()
        self.on_missed: list[Callable[[], None]] = []
        """Called when messages may have been missed that no hash can make good, and rarely without a reason."""
        members.on_buried.append(self._on_buried)
        members.on_changed.append(self._on_members)

    async def listen(self, process: Process) -> None:
        """Subscribe, then handle messages one by one until cancelled. The bus is never blocked by that."""
        channel = self._node.store.channel("sync")
        await self._node.store.subscribe(channel, self._on_message, self.reconcile)
        self.subscribed.set()
        try:
            while True:
                message = await self._queue.get()
                try:
                    await self._handle(message, process)
                except ConvenerError as error:
                    log.info("a state message could not be handled", error=str(error))
                    self.reconcile()
        finally:
            self.subscribed.clear()
            await self._node.store.unsubscribe(channel)

    def _on_message(self, raw: bytes) -> None:
        try:
            message = _decoder.decode(raw)
        except msgspec.MsgspecError:
            self._node.metrics.malformed.labels(where="sync").inc()
            log.warning("malformed state message skipped", size=len(raw))
            return
        if message.v < OLDEST_PROTOCOL:
            self._node.metrics.malformed.labels(where="sync").inc()
            log.warning("a message of an older protocol skipped", protocol=message.v)
            return
        try:
            self._queue.put_nowait(message)
        except asyncio.QueueFull:
            self._node.metrics.resyncs.labels(reason="queue").inc()
            self.reconcile()

    async def _handle(self, message: SyncMessage, process: Process) -> None:
        if message.t == "members":
            if message.ver != self._members.state.version:
                await self._members.refresh()
            return
        if message.t != "state" or self._node.owns(message.node) or message.node in self._node.buried:
            return
        batch = Batch(message.node, message.ver, joined=message.joined, left=tuple(message.left))
        if not self._node.directory.apply(batch):
            self._want(message.node)
            self._missed()
        for one in message.messages:
            try:
                await process(one)
            except Exception:
                # One bad message must not make the node deaf.
                self._node.metrics.malformed.labels(where="sync").inc()
                log.exception("a state message failed")

    # -- reading ---------------------------------------------------------------------------------------------------

    def reconcile(self) -> None:
        """Read every node's hash: at the start, after a gap, and rarely."""
        for name in self._members.state.members:
            if not self._node.owns(name):
                self._want(name)
        self._missed()

    def _missed(self) -> None:
        for tell in self.on_missed:
            tell()

    def _want(self, name: str) -> None:
        self._to_read.add(name)
        self._wanted.set()

    def _on_members(self) -> None:
        known = self._node.directory.nodes
        for name in self._members.state.members:
            if name not in known and not self._node.owns(name):
                self._want(name)
        for name in list(known):
            if name not in self._members.state.members and not self._node.owns(name):
                self._node.directory.forget(name)

    def _on_buried(self, incarnation: str) -> None:
        self._node.directory.forget(incarnation)
        self._to_read.discard(incarnation)
        # What it had still to tell nobody tells.
        self._missed()

    async def read_forever(self) -> None:
        """Read the hashes that are wanted, one at a time."""
        while True:
            await self._wanted.wait()
            self._wanted.clear()
            while self._to_read:
                name = self._to_read.pop()
                try:
                    await self.read(name)
                except ConvenerError as error:
                    log.info("cannot read a node's hash, again", node=name, error=str(error))
                    self._want(name)
                    await asyncio.sleep(PAUSE_S)

    async def read(self, name: str) -> None:
        """Take over one node's hash as it is now."""
        version, records, connections = await self._node.store.node_records(name)
        if name in self._members.state.members:
            self._node.directory.replace(name, version, records, connections)

    async def read_all(self) -> None:
        """Read everybody now."""
        for name in list(self._members.state.members):
            if not self._node.owns(name):
                self._to_read.discard(name)
                await self.read(name)

    async def reconcile_forever(self) -> None:
        """Rarely, jittered: against whatever nobody thought of."""
        while True:
            await asyncio.sleep(RECONCILE_S * random.uniform(0.5, 1.5))
            self.reconcile()
