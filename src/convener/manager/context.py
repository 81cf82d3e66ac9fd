"""What the duties of one node share. One object per manager; everything in it belongs to one event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, Literal, Protocol, runtime_checkable

from convener.core.directory import Directory
from convener.core.model import PUBLISH_LIMIT
from convener.errors import OwnershipLost, StoreUnavailable
from convener.manager.lease import Lease
from convener.manager.storage import Storage
from convener.manager.supervisor import Supervisor
from convener.manager.tail import Budget
from convener.manager.traits import Traits
from convener.store.archive import LogReader
from convener.store.base import Store
from convener.telemetry.metrics import Metrics

if TYPE_CHECKING:
    from convener.manager.conversation import Conversation
    from convener.manager.turn import Turn

__all__ = ["PUBLISH_LIMIT", "Agent", "LimitPolicy", "NodeContext", "NodeOptions"]

LimitPolicy = Literal["evict_idle", "reject", "queue"]
Overlap = Literal["enqueue", "reject", "interrupt"]
RecoveryMode = Literal["resume", "wait", "fail"]
Placement = Literal["local", "least_loaded", "rendezvous"]

LAPSE_S: Final = 1.0


@runtime_checkable
class Agent(Protocol):
    """What runs in a conversation. `run` answers one message; `methods` may be called from anywhere."""

    async def run(self, turn: Turn[Any]) -> None: ...

    @property
    def methods(self) -> Mapping[str, Callable[[Conversation, Any], Awaitable[Any]]]: ...

    async def limit(self, user_id: str) -> int | None:
        """The user's own limit, None for the configured one."""
        ...


class RecordOnly:
    """The agent of a manager that was given none: messages enter the log and are settled without an answer."""

    methods: Mapping[str, Callable[[Conversation, Any], Awaitable[Any]]] = {}

    async def run(self, turn: Turn[Any]) -> None:
        """Answer nothing."""

    async def limit(self, user_id: str) -> int | None:
        """The configured limit."""
        return None


@dataclass(frozen=True, slots=True)
class NodeOptions:
    """The settings that the managers use; see `convener.settings` for meanings. Durations in seconds.

    `raised_limit` is the user's limit plus one: registration comes before the check and counts itself.
    """

    name: str
    raised_limit: int = 4
    limit_policy: LimitPolicy = "evict_idle"
    overlap_policy: Overlap = "enqueue"
    recovery: RecoveryMode = "resume"
    placement: Placement = "local"
    capacity: int = 0
    rebalance: bool = True
    max_pending_messages: int = 100
    max_payload_bytes: int = 1 << 20
    lease_ttl: float = 10.0
    renew_interval: float = 0.5
    fast_burial: bool = True
    drain_timeout: float = 30.0
    hibernate_after: float = 300.0
    turn_timeout: float | None = None
    start_timeout: float = 10.0
    loop_lag_limit: float = 2.0
    ready_without_store: float = 30.0
    store_high_watermark: float = 0.8
    retention: float | None = None
    archive_every: float = 5.0
    sweep_every: float = 600.0


@dataclass(slots=True)
class NodeContext:
    """The shared parts. `logs` reads logs from store and archive. `incarnation` and `lease` are replaced when a buried
    node begins a new life.
    """

    store: Store
    options: NodeOptions
    metrics: Metrics
    agent: Agent
    supervisor: Supervisor
    lease: Lease
    incarnation: str
    logs: LogReader
    directory: Directory = field(default_factory=Directory)
    buried: set[str] = field(default_factory=set[str])
    draining: bool = False
    traits: Traits = field(default_factory=Traits)
    struck: asyncio.Lock = field(default_factory=asyncio.Lock)
    storage: Storage = field(default_factory=Storage)
    tails: Budget = field(default_factory=Budget)
    fallbacks: int = 0
    """How often the store has fallen back, as far as this node was told."""

    def owns(self, incarnation: str) -> bool:
        """Whether `incarnation` is this life of this node."""
        return incarnation == self.incarnation

    async def not_suspended(self) -> None:
        """Return if this node may act, or soon may: who writes while the store is away learns that at once, not at the
        deadline of a command. Raises `StoreUnavailable`.
        """
        if self.lease.valid() or self.lease.ended:
            return
        try:
            # A lapse that is over in a moment is nobody's business.
            await self.lease.wait_valid(LAPSE_S)
        except OwnershipLost as error:
            raise StoreUnavailable("this node is suspended: it cannot renew its lease at the store") from error
