"""What the gateway needs of a node beyond conversations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from convener.manager.ops import NodeInfo, Readiness


class Operations(Protocol):
    """A node, for those who operate it."""

    def readiness(self) -> Readiness:
        """Whether this node may receive traffic. From memory: it must not wait for a store that is away."""
        ...

    def nodes(self) -> Sequence[NodeInfo]:
        """The cluster's nodes as this node sees them, itself included."""
        ...

    async def audit(self, conversation_ids: Sequence[str] | None) -> Mapping[str, Any]:
        """Check the invariants of these conversations, or of all.

        Returns:
            JSON-ready ``{checked, violations: [{invariant, where, detail}], conversations, nodes}``.
        """
        ...
