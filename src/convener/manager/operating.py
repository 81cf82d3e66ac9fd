"""What operators ask of a node: to leave, to look at its connections, to say how it is."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

from convener.errors import NotFound
from convener.ids import check_id
from convener.manager.base import ConversationManager
from convener.manager.draining import Drain, Farewell
from convener.manager.engine import Engine
from convener.manager.health import Health
from convener.manager.members import Members
from convener.manager.ops import DrainStatus, NodeInfo, Readiness
from convener.manager.why import Why, explain

Recheck = Callable[[str | None, str | None], Awaitable[tuple[int, int]]]


class Operating(ConversationManager):
    """The operators' side of a manager."""

    _engine: Engine | None
    _health: Health
    _members: Members
    _drain: Drain
    _recheck: Recheck | None

    @property
    @abstractmethod
    def engine(self) -> Engine:
        """The running node. Raises `ConfigurationError` before it was entered."""

    async def drain(self, node: str | None = None, timeout: float | None = None) -> DrainStatus:
        """See `Operations`: begin to empty this node; `farewell` of it is the gateway's."""
        self._check_name(node)
        self._drain.begin(self.engine.node.options.drain_timeout if timeout is None else timeout)
        return self.drain_status()

    def drain_status(self) -> DrainStatus:
        """How far this node's drain is."""
        drain = self._drain
        state = "idle" if drain.deadline is None else "drained" if drain.done else "draining"
        return DrainStatus(self.engine.node.options.name, state, drain.remaining, drain.deadline)

    def on_drain(self, farewell: Farewell) -> None:
        """See `Operations`."""
        self._drain.farewell = farewell

    async def drained(self) -> None:
        """Drain within `drain_timeout`, and return when that is done."""
        await self._drain.run(self.engine.node.options.drain_timeout)

    async def kick(self, user_id: str | None, conversation_id: str | None) -> tuple[int, int]:
        """See `Operations`."""
        return (0, 0) if self._recheck is None else await self._recheck(user_id, conversation_id)

    def on_kick(self, recheck: Recheck) -> None:
        """See `Operations`."""
        self._recheck = recheck

    async def keep_ticket(self, name: str, sealed: bytes, ttl: int) -> None:
        """See `Operations`."""
        await self.engine.node.store.keep_ticket(name, sealed, ttl)

    async def take_ticket(self, name: str) -> bytes | None:
        """See `Operations`."""
        return await self.engine.node.store.take_ticket(name)

    def hurry(self) -> None:
        """See `Operations`."""
        self._drain.hurry()

    def _check_name(self, node: str | None) -> None:
        if node not in (None, self.engine.node.options.name, self.engine.node.incarnation):
            raise NotFound(f"no node {node}", code="node_not_found")

    def readiness(self) -> Readiness:
        """Whether this node may receive traffic; not ready before it was entered and after it was left."""
        if self._engine is None:
            return Readiness(ready=False, checks={"started": "not running"})
        return self._health.readiness()

    def nodes(self) -> Sequence[NodeInfo]:
        """The cluster's nodes as this node sees them."""
        return self._health.nodes()

    async def why(self, conversation_id: str) -> Why:
        """See `Operations`."""
        return await explain(self.engine, check_id(conversation_id, "conversation_id"), self._members.live())

    async def audit(self, conversation_ids: Sequence[str] | None = None) -> Mapping[str, Any]:
        """Check the invariants of these conversations, or of all: ``{checked, violations, conversations, nodes}``."""
        return await self._health.audit(conversation_ids)
