"""Who goes first: rendezvous hashing, successors in name order, throttles.

Placement is a preference, never a right: CLAIM decides. Source of the hash: Thaler and Ravishankar, "Using
name-based mappings to increase hit rates" (1998), highest random weight.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Final

UNEVEN: Final = 8
"""Conversations above the mean below which nothing is moved: moving costs more than it brings then."""


def _weight(key: str, node: str) -> bytes:
    return hashlib.blake2b(f"{key}\0{node}".encode(), digest_size=8).digest()


def rendezvous(key: str, nodes: Iterable[str]) -> str | None:
    """The node that goes first for `key`; None without nodes. Only keys of a node that leaves move."""
    return max(nodes, key=lambda node: (_weight(key, node), node), default=None)


def successors(name: str, names: Iterable[str], count: int = 3) -> Sequence[str]:
    """The `count` names that follow `name` in the ring of sorted names, without itself."""
    ring = sorted(set(names) - {name})
    after = [n for n in ring if n > name]
    return (after + [n for n in ring if n < name])[:count]


def sync_interval(nodes: int) -> float:
    """Seconds between two state notifications of a node: one, and 0.1 more for every ten nodes."""
    return 1.0 + 0.1 * (nodes // 10)


def surplus(loads: Mapping[str, int], name: str) -> int:
    """How many conversations `name` has beyond its share; 0 unless the difference is worth a move.

    Hysteresis: nothing moves until a node has a quarter, and at least `UNEVEN`, more than the mean; then it gives away
    down to the mean, and not to a node that would thereby have more than it.
    """
    if name not in loads or len(loads) < 2:
        return 0
    mean = sum(loads.values()) / len(loads)
    if loads[name] < max(mean * 1.25, mean + UNEVEN):
        return 0
    return math.floor(loads[name] - mean)
