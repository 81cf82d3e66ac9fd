"""A cluster inside one process, for tests: real managers over a real or in-memory store, nodes that can be killed.

::

    async with InProcessCluster(my_agent) as cluster:
        await cluster[0].maybe_start_agent_loop("c", user_id="u")
        await cluster.kill(0)
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
from collections.abc import Awaitable, Callable, Iterator, Mapping
from types import SimpleNamespace, TracebackType
from typing import Any, Final, Self

from convener.manager import ClusteredConversationManager
from convener.manager.context import Agent, NodeOptions
from convener.manager.conversation import Conversation
from convener.manager.traits import Traits
from convener.manager.turn import Turn
from convener.store.archive import Archive
from convener.store.base import Store
from convener.store.memory import MemoryStore
from convener.store.redis import RedisStore
from convener.store.redis.store import DurabilityMode

QUICK: Final = NodeOptions(
    name="node", lease_ttl=4.0, renew_interval=0.3, drain_timeout=5.0, hibernate_after=0.0, start_timeout=10.0
)
"""Options under which a killed node is buried within about a second."""


class FunctionAgent:
    """An agent out of functions, without an application around it."""

    def __init__(
        self,
        answer: Callable[[Turn[Any]], Awaitable[None]],
        methods: Mapping[str, Callable[[Conversation, Any], Awaitable[Any]]] | None = None,
        limits: Mapping[str, int] | None = None,
        traits: Traits | None = None,
    ) -> None:
        self._answer = answer
        self.traits = traits or Traits()
        self.methods = dict(methods or {})
        self._limits = dict(limits or {})

    async def run(self, turn: Turn[Any]) -> None:
        """Answer one message."""
        await self._answer(turn)

    async def limit(self, user_id: str) -> int | None:
        """The user's own limit."""
        return self._limits.get(user_id)


class RecordingSink:
    """A `ClientSink` that keeps what it is sent. `gate` closed makes it a client that does not read."""

    def __init__(self) -> None:
        self.sent: list[tuple[str, dict[str, Any]]] = []
        self.disconnected = asyncio.Event()
        self.gate = asyncio.Event()
        self.gate.set()

    async def send(self, connection_id: str, event: str, payload: Mapping[str, Any]) -> None:
        """Keep an event."""
        self.sent.append((event, dict(payload)))

    async def ready(self, connection_id: str) -> None:
        """Wait while the gate is closed."""
        await self.gate.wait()

    async def disconnect(self, connection_id: str) -> None:
        """Note it."""
        self.disconnected.set()

    def named(self, event: str) -> list[dict[str, Any]]:
        """Payloads of one event."""
        return [payload for name, payload in self.sent if name == event]

    @property
    def events(self) -> list[dict[str, Any]]:
        """Log entries, in the order in which they came."""
        return self.named("event")

    def replies(self) -> list[Any]:
        """Data of the replies."""
        return [e["data"] for e in self.events if e["kind"] == "reply"]


class InProcessCluster:
    """Several managers over one store.

    Args:
        agent: an `Agent`, or a coroutine function that answers a turn; None records only.
        url: of a Redis or Valkey; default one `MemoryStore` that all nodes share.
        wrap: makes the store of node i out of its own, for instance one that fails on purpose.
        archive: makes the archive of node i.
        durability: of the stores at `url`.
    """

    def __init__(
        self,
        agent: Agent | Callable[[Turn], Awaitable[None]] | None = None,
        *,
        nodes: int = 3,
        url: str | None = None,
        namespace: str = "convener",
        limit: int = 3,
        options: NodeOptions = QUICK,
        wrap: Callable[[int, Store], Store] = lambda index, store: store,
        archive: Callable[[int], Archive | None] = lambda index: None,
        durability: DurabilityMode = "memory",
    ) -> None:
        self._agent: Agent | None = agent if agent is None or isinstance(agent, Agent) else FunctionAgent(agent)
        self._count = nodes
        self._url = url
        self._namespace = namespace
        self._limit = limit
        self._options = options
        self._wrap = wrap
        self._durability: DurabilityMode = durability
        self._archive = archive
        self._memory = MemoryStore()
        self.managers: list[ClusteredConversationManager | None] = []

    def _make_store(self) -> Store:
        if self._url is not None:
            return RedisStore(self._url, namespace=self._namespace, durability=self._durability)
        return self._memory.peer()

    async def __aenter__(self) -> Self:
        await self._memory.open()
        try:
            for _ in range(self._count):
                await self.add()
        except BaseException:
            await self.__aexit__(None, None, None)
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for index, manager in enumerate(self.managers):
            if manager is not None:
                self.managers[index] = None
                await manager.__aexit__(None, None, None)
        await self._memory.close()

    async def add(self, name: str | None = None) -> int:
        """Start one more node, under a name of its own or a given one; returns its number."""
        index = len(self.managers)
        manager = ClusteredConversationManager(
            config=SimpleNamespace(max_concurrent_conversations=self._limit),
            agent=self._agent,
            store=self._wrap(index, self._make_store()),
            options=dataclasses.replace(self._options, name=name or f"node-{index}"),
            archive=self._archive(index),
        )
        await manager.__aenter__()
        self.managers.append(manager)
        return index

    def __getitem__(self, index: int) -> ClusteredConversationManager:
        manager = self.managers[index]
        if manager is None:
            raise LookupError(f"node {index} is gone")
        return manager

    def __iter__(self) -> Iterator[ClusteredConversationManager]:
        return iter([m for m in self.managers if m is not None])

    def owner_of(self, cid: str) -> int | None:
        """The number of the node where the conversation runs."""
        for index, manager in enumerate(self.managers):
            if manager is not None and manager.get_agent_session(cid) is not None:
                return index
        return None

    async def kill(self, index: int) -> None:
        """End a node as SIGKILL would: nothing is given back, nobody is told."""
        manager = self[index]
        self.managers[index] = None
        engine, heartbeat = manager.engine, manager.heartbeat
        engine.node.draining = True
        engine.node.lease.end()
        # First the way to the store, so that no clean-up of what is cancelled now can reach it.
        await engine.node.store.close()
        if heartbeat is not None:
            await heartbeat.stop()
        with contextlib.suppress(Exception):
            await engine.starter.aclose()
        await engine.node.supervisor.aclose()

    async def leave(self, index: int) -> None:
        """End a node as a deploy would."""
        manager = self[index]
        self.managers[index] = None
        await manager.__aexit__(None, None, None)
