"""What nodes know of each other, and their lives: losses that once were never made good (I10, I14)."""

# pyright: reportPrivateUsage=false

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest

from convener.core.directory import Record
from convener.core.membership import Member, Membership
from convener.errors import OwnerUnavailable, StoreUnavailable
from convener.manager import standalone
from convener.manager.supervisor import Supervisor
from convener.testing.cluster import FunctionAgent, InProcessCluster
from tests.manager.conftest import MakeCluster, join
from tests.manager.stepped import Stepped, idle, reborn
from tests.manager.test_cluster import echo
from tests.support.waiting import wait_until

pytestmark = pytest.mark.anyio


@pytest.fixture
def stepped(make_cluster: MakeCluster) -> Stepped:
    return Stepped(make_cluster)


async def listed(cluster: InProcessCluster, node: int, cid: str) -> bool:
    return await cluster[node].is_agent_loop_running(cid)


async def unlisted(cluster: InProcessCluster, node: int, cid: str) -> bool:
    return not await listed(cluster, node, cid)


async def known(cluster: InProcessCluster) -> None:
    """Let node 0 run "c", and return when node 1 knows and node 0 has nothing more to tell."""
    await cluster[0].maybe_start_agent_loop("c", user_id="u")
    await idle(cluster[0], "c")
    await cluster[0]._update_state_in_redis()
    await wait_until(lambda: listed(cluster, 1, "c"), "the other node knows it")


# -- the directory -------------------------------------------------------------------------------------------------


async def test_a_conversation_that_comes_back_within_one_batch_stays_listed(stepped: Stepped) -> None:
    """The batch held the removal of the old record besides the new one, and both nodes took it out."""
    cluster = await stepped.start(nodes=2)
    await known(cluster)
    engine = cluster[0].engine
    async with engine.records._turn:
        assert await engine.hibernate("c")
        await wait_until(lambda: engine.runner("c") is None, "it has left")
        await cluster[0].maybe_start_agent_loop("c", user_id="u")
        await idle(cluster[0], "c")
    await cluster[0]._update_state_in_redis()
    incarnation, version = engine.node.incarnation, engine.records._version
    assert await listed(cluster, 0, "c")
    nodes = cluster[1].engine.node.directory.nodes
    await wait_until(lambda: nodes[incarnation].version >= version, "the batch has come")
    assert await listed(cluster, 1, "c")


@pytest.mark.parametrize("lost", ["flush", "publish"])
async def test_a_batch_that_fails_is_sent_again_though_nothing_else_changes(stepped: Stepped, lost: str) -> None:
    cluster = await stepped.start(nodes=2)
    await known(cluster)
    step = stepped.stores[0].lose(lost)
    assert await cluster[0].engine.hibernate("c")
    await wait_until(step.reached.is_set, f"{lost} fails")
    await wait_until(lambda: unlisted(cluster, 1, "c"), "the other node knows all the same", limit=5)


async def test_a_failed_batch_does_not_part_a_node_from_its_own_directory(stepped: Stepped) -> None:
    cluster = await stepped.start(nodes=1)
    step = stepped.stores[0].lose("flush")
    await cluster[0].maybe_start_agent_loop("c", user_id="u")
    await wait_until(step.reached.is_set, "a flush fails")
    await join(cluster, 0, "c", "s")
    await wait_until(lambda: connections(cluster), "the node knows its own client", limit=5)


async def connections(cluster: InProcessCluster) -> bool:
    return await cluster[0].get_connections() == {"s": "c"}


async def test_a_record_that_landed_late_is_swept(stepped: Stepped, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("convener.manager.records.SWEEP_S", 0.2)
    cluster = await stepped.start(nodes=1)
    store, incarnation = stepped.stores[0], cluster[0].engine.node.incarnation
    step, dropped = store.late("put_record"), store.hold_reply("drop_record")
    with pytest.raises(StoreUnavailable):
        await cluster[0].maybe_start_agent_loop("c", user_id="u")
    await wait_until(dropped.reached.is_set, "the record is taken out")
    dropped.go()
    await step.land()
    assert await store.record(incarnation, "c") is not None
    await join(cluster, 0, "d", "s")
    await wait_until(lambda: _hash_holds(cluster, {"d"}, {"s"}), "the hash holds what the node knows", limit=5)
    await store.flush(incarnation, 1000, [], {"ghost": "d"}, ["s"])
    await wait_until(lambda: _hash_holds(cluster, {"d"}, {"s"}), "of its clients too", limit=5)


async def _hash_holds(cluster: InProcessCluster, cids: set[str], clients: set[str]) -> bool:
    node = cluster[0].engine.node
    _, records, connections = await node.store.node_records(node.incarnation)
    return {r.conversation_id for r in records} == cids and set(connections) == clients


# -- the membership ------------------------------------------------------------------------------------------------


async def test_a_burial_is_learnt_of_although_reading_it_fails_once(stepped: Stepped) -> None:
    """I11: who does not know of it acknowledges messages in the name of the dead."""
    cluster = await stepped.start(nodes=1)
    store = stepped.stores[0]
    await store.join("other~1", Member(deadline=0, ttl=60_000, renew=500))
    node, members = cluster[0].engine.node, cluster[0]._members
    await wait_until(lambda: "other~1" in members.state.members, "it is known")
    # Two ways lead to it: what RENEW says, and the publication.
    steps = [store.lose("membership"), store.lose("membership")]
    members._look = _nothing
    await store.leave("other~1")
    for step in steps:
        await wait_until(step.reached.is_set, "the membership cannot be read")
    await wait_until(lambda: "other~1" in node.buried, "its burial is known", limit=5)


async def _nothing() -> None:
    pass


async def test_a_record_that_landed_after_the_recovery_is_recovered(
    make_cluster: MakeCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would keep the burial from ever being forgotten."""
    monkeypatch.setattr("convener.manager.members.FORGET_S", 0.2)
    cluster = await make_cluster(echo, nodes=2)
    store, dead = cluster[0].engine.node.store, cluster[1].engine.node.incarnation
    await cluster.kill(1)
    await wait_until(lambda: dead in cluster[0].engine.node.buried, "the burial is known")
    await wait_until(lambda: not cluster[0]._recovery._walking, "it is recovered")
    await store.put_record(dead, Record("late", "u", "starting", 0, "nonce", 0))

    async def gone() -> bool:
        return await store.record(dead, "late") is None

    await wait_until(gone, "the record is gone", limit=5)


async def test_a_node_may_be_called_draining(make_cluster: MakeCluster) -> None:
    cluster = await make_cluster(echo, nodes=1)
    members = cluster[0]._members
    info = members.info().replace('"node-0"', '"draining"')
    members.state = Membership({"draining~1": Member(deadline=0, ttl=1, renew=1, info=info)})
    assert members.live() == ["draining~1"]


# -- lives -----------------------------------------------------------------------------------------------------------


def heartbeats(name: str) -> int:
    return sum(thread.name == f"heartbeat {name}" for thread in threading.enumerate())


async def test_a_new_life_that_is_buried_before_it_begins_is_followed_by_another(stepped: Stepped) -> None:
    """JOIN was applied and its reply lost; by the time it is repeated the incarnation is buried for ever (I10)."""
    cluster = await stepped.start(nodes=1)
    step = stepped.stores[0].hold_reply("join")
    living = asyncio.ensure_future(reborn(cluster[0]))
    await wait_until(step.reached.is_set, "the new life has joined")
    await stepped.stores[0].leave(step.arguments[0])
    stepped.stores[0].lose("membership")
    step.go()
    await living
    await cluster[0].maybe_start_agent_loop("c", user_id="u")


async def test_a_life_that_begins_twice_has_one_heartbeat(stepped: Stepped) -> None:
    cluster = await stepped.start(nodes=1)
    store = stepped.stores[0]
    first, second = store.hold_reply("join"), store.hold_reply("join")
    living = asyncio.ensure_future(reborn(cluster[0]))
    await wait_until(first.reached.is_set, "the new life has joined")
    store.down.add("membership")
    first.go()
    await wait_until(second.reached.is_set, "it could not read the membership and joins again")
    store.down.clear()
    earlier = cluster[0].heartbeat
    second.go()
    await living
    await wait_until(lambda: cluster[0].heartbeat not in (None, earlier), "it begins once more")
    await wait_until(lambda: heartbeats("node-0") == 1, "one thread renews", limit=5)


async def test_a_node_that_fails_to_start_leaves_no_heartbeat(stepped: Stepped) -> None:
    cluster = await stepped.start(nodes=1)
    stepped.prepare = lambda store: store.lose("node_records")
    with pytest.raises(StoreUnavailable):
        await cluster.add()
    await wait_until(lambda: heartbeats("node-1") == 0, "nothing renews its lease", limit=5)


async def test_a_suspended_owner_answers_no_calls(make_cluster: MakeCluster) -> None:
    """I7: a method of the agent is an effect like any other."""

    async def method(conversation: Any, params: Any) -> int:
        return 1

    cluster = await make_cluster(FunctionAgent(echo, {"m": method}), nodes=1)
    await cluster[0].maybe_start_agent_loop("c", user_id="u")
    assert await cluster[0].call("c", "m") == 1
    lease = cluster[0].engine.node.lease
    real, lease.valid = lease.valid, lambda: False
    try:
        with pytest.raises(OwnerUnavailable):
            await cluster[0].call("c", "m")
    finally:
        lease.valid = real


async def test_closing_does_not_wait_for_ever_for_a_task_that_does_not_end() -> None:
    release = asyncio.Event()

    async def stubborn() -> None:
        while not release.is_set():
            try:
                await release.wait()
            except asyncio.CancelledError:
                continue

    supervisor = Supervisor()
    task = supervisor.spawn("stubborn", stubborn())
    await asyncio.sleep(0)
    await asyncio.wait_for(supervisor.aclose(grace=0.05), 5)
    release.set()
    await asyncio.wait({task})


async def test_a_node_whose_store_is_silent_ends_all_the_same(
    stepped: Stepped, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each of its ways out waited for the store by itself, and together longer than a process is given to end."""
    monkeypatch.setattr(standalone, "BURY_S", 0.05)
    monkeypatch.setattr(standalone, "LAST_TRY_S", 0.01)
    cluster = await stepped.start(nodes=2)
    await cluster[0].maybe_start_agent_loop("c", user_id="u")
    left = cluster[0].engine.node.incarnation
    held = [stepped.stores[0].hold("leave") for _ in range(5)]
    await asyncio.wait_for(cluster.leave(0), 20)
    assert held[0].reached.is_set()
    await wait_until(lambda: left in cluster[1].engine.node.buried, "others notice that it has left")
