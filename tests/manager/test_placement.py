"""Where conversations start by policy, and that nodes with far more than the others give some away."""

from __future__ import annotations

import dataclasses
from collections import Counter

import pytest

from convener.core.placement import rendezvous
from convener.manager import balancing
from convener.manager.turn import Turn
from convener.testing.cluster import QUICK, InProcessCluster
from tests.manager.conftest import MakeCluster, join
from tests.support.waiting import wait_until

pytestmark = pytest.mark.anyio


async def echo(turn: Turn) -> None:
    await turn.reply({"text": turn.text})


def spread(cluster: InProcessCluster) -> Counter[str]:
    """How many conversations each node runs."""
    return Counter({m.engine.node.options.name: len(m.engine.runners) for m in cluster})


async def start(cluster: InProcessCluster, node: int, count: int, first: int = 0) -> None:
    for i in range(first, first + count):
        await cluster[node].maybe_start_agent_loop(f"c{i}", user_id=f"u{i}")


async def test_least_loaded_spreads_what_one_node_is_asked_for(make_cluster: MakeCluster) -> None:
    options = dataclasses.replace(QUICK, placement="least_loaded", rebalance=False)
    cluster = await make_cluster(echo, options=options)
    for i in range(9):
        await cluster[0].maybe_start_agent_loop(f"c{i}", user_id=f"u{i}")
        directory = cluster[0].engine.node.directory
        await wait_until(lambda n=i, d=directory: len(list(d.listed())) == n + 1, "the directory knows")
    assert spread(cluster) == {"node-0": 3, "node-1": 3, "node-2": 3}
    sink = await join(cluster, 0, "c1", "s", user_id="u1")
    await cluster[0].send_event_to_conversation("c1", {"text": "hello"})
    await wait_until(sink.replies, "it is answered wherever it is")


async def test_rendezvous_is_where_the_id_points_to(make_cluster: MakeCluster) -> None:
    cluster = await make_cluster(echo, options=dataclasses.replace(QUICK, placement="rendezvous", rebalance=False))
    await start(cluster, 1, 6)
    live = {m.engine.node.incarnation: m.engine.node.options.name for m in cluster}
    for i in range(6):
        wanted = rendezvous(f"c{i}", live)
        assert wanted is not None
        assert (await cluster[0].describe(f"c{i}")).node == live[wanted]


async def test_a_full_node_lets_others_start(make_cluster: MakeCluster) -> None:
    cluster = await make_cluster(echo, options=dataclasses.replace(QUICK, capacity=2, rebalance=False))
    await start(cluster, 0, 4)
    assert spread(cluster)["node-0"] == 2
    assert sum(spread(cluster).values()) == 4, "nobody is refused for that"


async def test_who_was_chosen_and_is_gone_does_not_keep_a_conversation_from_starting(make_cluster: MakeCluster) -> None:
    cluster = await make_cluster(echo, options=dataclasses.replace(QUICK, placement="rendezvous", rebalance=False))
    live = [m.engine.node.incarnation for m in cluster]
    cid = next(f"c{i}" for i in range(100) if rendezvous(f"c{i}", live) == live[2])
    await cluster.kill(2)
    await cluster[0].maybe_start_agent_loop(cid, user_id="u", initial_user_msg={"text": "x"})
    assert (await cluster[0].describe(cid)).node in ("node-0", "node-1")


async def test_a_node_that_joins_gets_its_share(make_cluster: MakeCluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(balancing, "ROUND_S", 0.1)
    monkeypatch.setattr(balancing, "SETTLED_S", 0.0)
    cluster = await make_cluster(echo, nodes=1)
    await start(cluster, 0, 30)
    sink = await join(cluster, 0, "c7", "s", user_id="u7")
    await cluster.add()
    await wait_until(lambda: spread(cluster)["node-1"] >= 10, "the new node has got some")

    async def is_settled() -> bool:
        store = cluster[0].engine.node.store
        for i in range(30):
            head, slot = await store.head(f"c{i}"), await store.slot(f"u{i}", f"c{i}")
            if head is None or slot is None or (slot.incarnation, slot.nonce) != (head.owner, head.nonce):
                return False
        return sum(spread(cluster).values()) == 30

    await wait_until(is_settled, "each runs once, in a slot of its owner")
    await cluster[1].send_event_to_conversation("c7", {"text": "still there?"})
    await wait_until(sink.replies, "clients of what was moved go on")


async def test_who_works_is_not_moved(make_cluster: MakeCluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(balancing, "ROUND_S", 0.05)
    monkeypatch.setattr(balancing, "SETTLED_S", 3600.0)
    cluster = await make_cluster(echo, nodes=1)
    await start(cluster, 0, 30)
    await cluster.add()
    for i in range(30):
        await cluster[1].send_event_to_conversation(f"c{i}", {"text": "x"})
    assert spread(cluster)["node-1"] == 0
