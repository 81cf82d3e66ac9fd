"""What operators ask of a node: may it have traffic, and who else is there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

NodeState = Literal["live", "draining", "suspended", "buried"]


@dataclass(frozen=True, slots=True)
class Readiness:
    """Whether this node may receive traffic.

    Attributes:
        ready: the answer.
        degraded: ready, but something is away that will make it unready if it stays away.
        checks: name of a check → "ok", or what is wrong in a few words; the names are stable.
    """

    ready: bool
    degraded: bool = False
    checks: Mapping[str, str] = field(default_factory=dict[str, str])


DrainState = Literal["idle", "draining", "drained"]


@dataclass(frozen=True, slots=True)
class DrainStatus:
    """How far the end of a node's work is.

    Attributes:
        node: its name.
        state: `idle` does not leave; `drained` owns nothing any more, and never will.
        remaining: conversations that are still there.
        deadline: when turns under way are cut off, ms since 1970.
    """

    node: str
    state: DrainState
    remaining: int = 0
    deadline: int | None = None


@dataclass(frozen=True, slots=True)
class NodeInfo:
    """One node as the node that was asked sees it.

    Attributes:
        name, incarnation: of the node; the incarnation is new at each start.
        state: buried ones are listed while they are remembered.
        version: of the package, "" if unknown.
        protocol: version of the protocol between the nodes.
        address: where clients reach it, "" if unknown.
        conversations: loaded there.
        connections: clients connected there.
        lag: how late its event loop ran last, in seconds; None if unknown.
        started_at: ms since 1970.
        last_renewal: of its lease, ms since 1970 by the store's clock; None without a lease (standalone).
    """

    name: str
    incarnation: str
    state: NodeState = "live"
    version: str = ""
    protocol: int = 1
    address: str = ""
    conversations: int = 0
    connections: int = 0
    lag: float | None = None
    started_at: int = 0
    last_renewal: int | None = None
