"""What operators ask of a node: may it have traffic, and who else is there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

NodeState = Literal["live", "draining", "suspended", "buried"]


@dataclass(slots=True)
class FallbackReport:
    """A store that was there again with less than it had confirmed, as one node has found it.

    Attributes:
        at: when it was noticed, ms since 1970.
        store: the server; empty for the only one.
        way: ``restart``, ``fail-over``, ``replaced``, or ``unnoticed``: only a write has shown it.
        missing_bytes: what the server lacks for certain, at least; None if that cannot be told.
        conversations: how many this node owned then.
        lost: log entries of theirs that were confirmed and were missing.
        repaired: how many of these were written again.
        unrepaired: conversations that lost what this node could not write again.
        verified: whether everything that this node owned was looked at since.
    """

    at: int
    store: str
    way: Literal["restart", "fail-over", "replaced", "unnoticed"]
    missing_bytes: int | None
    conversations: int
    lost: int = 0
    repaired: int = 0
    unrepaired: int = 0
    verified: bool = False


@dataclass(frozen=True, slots=True)
class Readiness:
    """Whether this node may receive traffic.

    Attributes:
        ready: the answer.
        degraded: ready, but something is away that will make it unready if it stays away.
        checks: name of a check → "ok", or what is wrong in a few words; the names are stable.
        fallbacks: the last times that the store had lost something, oldest first.
    """

    ready: bool
    degraded: bool = False
    checks: Mapping[str, str] = field(default_factory=dict[str, str])
    fallbacks: Sequence[FallbackReport] = ()


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
        protocol: version of the protocol between the nodes, 0 if unknown.
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
    protocol: int = 0
    address: str = ""
    conversations: int = 0
    connections: int = 0
    lag: float | None = None
    started_at: int = 0
    last_renewal: int | None = None
