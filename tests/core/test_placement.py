"""Who goes first."""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from convener.core.placement import UNEVEN, rendezvous, successors, surplus, sync_interval

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


def test_nothing_moves_until_the_difference_is_worth_it() -> None:
    assert surplus({}, "a") == 0
    assert surplus({"a": 100}, "a") == 0
    assert surplus({"b": 1, "c": 100}, "a") == 0
    # A mean of 10: less than UNEVEN above it is not worth a move.
    assert surplus({"a": 10 + UNEVEN - 1, "b": 10 - UNEVEN + 1}, "a") == 0
    assert surplus({"a": 10 + UNEVEN, "b": 10 - UNEVEN}, "a") == UNEVEN
    assert surplus({"a": 10 + UNEVEN, "b": 10 - UNEVEN}, "b") == 0
    # With many, a quarter above the mean.
    assert surplus({"a": 1249, "b": 751}, "a") == 0
    assert surplus({"a": 1250, "b": 750}, "a") == 250


@given(st.dictionaries(st.text(min_size=1, max_size=3), st.integers(0, 500), min_size=1, max_size=6))
def test_moving_the_surplus_ends(loads: dict[str, int]) -> None:
    """Each round makes the largest load smaller, and no node ends below the mean by giving: so it ends."""
    for _ in range(len(loads) + 1):
        givers = [name for name in loads if surplus(loads, name)]
        if not givers:
            return
        giver = max(givers, key=lambda name: loads[name])
        taker = min(loads, key=lambda name: loads[name])
        count, mean = surplus(loads, giver), sum(loads.values()) / len(loads)
        assert loads[giver] - count >= mean - 1
        loads = {**loads, giver: loads[giver] - count, taker: loads[taker] + count}
