"""What the gateway needs of a node beyond conversations."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, Protocol

from convener.manager.ops import DrainStatus, NodeInfo, Readiness
from convener.manager.why import Why


class Operations(Protocol):
    """A node, for those who operate it."""

    def readiness(self) -> Readiness:
        """Whether this node may receive traffic. From memory: it must not wait for a store that is away."""
        ...

    def nodes(self) -> Sequence[NodeInfo]:
        """The cluster's nodes as this node sees them, itself included."""
        ...

    async def drain(self, node: str | None, timeout: float | None) -> DrainStatus:
        """Begin to empty a node (None: this one), and say how far that is. Asked again, it only says.

        Args:
            timeout: seconds that turns under way may take; default the node's `drain_timeout`.

        Raises:
            NotFound: no such node (code ``node_not_found``).
            OwnerUnavailable: the node did not answer.
        """
        ...

    def on_drain(self, farewell: Callable[[Callable[[str], bool]], Awaitable[None]]) -> None:
        """How this node's clients are sent away: ``farewell(stays)`` is called when a drain begins and returns when
        nobody is left; ``stays(conversation_id)`` says whether a conversation is still on this node.
        """
        ...

    async def drained(self) -> None:
        """Empty this node within its `drain_timeout`, and return when that is done."""
        ...

    async def kick(self, user_id: str | None, conversation_id: str | None) -> tuple[int, int]:
        """Have open connections checked now, on all nodes that answer: (checked, closed)."""
        ...

    def on_kick(self, recheck: Callable[[str | None, str | None], Awaitable[tuple[int, int]]]) -> None:
        """How this node's connections are checked."""
        ...

    async def keep_ticket(self, name: str, sealed: bytes, ttl: int) -> None:
        """Keep some bytes under a new name for `ttl` ms, for whatever node is asked for them. Raises `StoreFull`."""
        ...

    async def take_ticket(self, name: str) -> bytes | None:
        """What was kept, once; None if it was taken, is too old or never was."""
        ...

    def hurry(self) -> None:
        """End a drain at once; what is left is recovered by other nodes, as after a crash."""
        ...

    async def why(self, conversation_id: str) -> Why:
        """Who owns a conversation since when, how that came to be, and what it waits for.

        Raises:
            NotFound: there is no such conversation.
        """
        ...

    async def audit(self, conversation_ids: Sequence[str] | None) -> Mapping[str, Any]:
        """Check the invariants of these conversations, or of all.

        Returns:
            JSON-ready ``{checked, violations: [{invariant, where, detail}], conversations, nodes}``.
        """
        ...
