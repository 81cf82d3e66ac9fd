"""Who goes first."""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from convener.core.placement import rendezvous, successors, sync_interval

names = st.sets(st.text("abcdef~0123456789", min_size=1, max_size=8), max_size=12)


def test_nobody_without_nodes() -> None:
    assert rendezvous("c1", []) is None


def test_load_spreads() -> None:
    nodes = [f"n{i}~1" for i in range(4)]
    counts = Counter(rendezvous(f"c{i}", nodes) for i in range(2_000))
    assert set(counts) == set(nodes)
    assert min(counts.values()) > 350


@given(names, st.text(max_size=8))
def test_only_the_keys_of_a_node_that_leaves_move(nodes: set[str], key: str) -> None:
    first = rendezvous(key, nodes)
    assert first is None or first in nodes
    for node in nodes - {first}:
        assert rendezvous(key, nodes - {node}) == first


@given(names, st.text("abcdef~0123456789", min_size=1, max_size=8))
def test_successors_follow_in_the_ring(nodes: set[str], name: str) -> None:
    found = successors(name, nodes)
    others = sorted(nodes - {name})
    assert len(found) == min(3, len(others))
    assert name not in found
    ring = [n for n in others if n > name] + [n for n in others if n < name]
    assert list(found) == ring[:3]


def test_everybody_is_looked_after_by_three() -> None:
    nodes = [f"n{i}" for i in range(9)]
    counts = Counter(s for n in nodes for s in successors(n, nodes))
    assert set(counts.values()) == {3}


def test_larger_clusters_speak_less_often() -> None:
    assert [sync_interval(n) for n in (1, 9, 10, 100)] == [1.0, 1.0, 1.1, 2.0]
