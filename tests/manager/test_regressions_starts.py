"""Starts that once left a slot, a record, a queued start or an owner without a runner behind (I6, I11, I12)."""

from __future__ import annotations

import asyncio
import dataclasses
from typing import Any

import pytest

from convener.errors import ConvenerError
from convener.manager.turn import Turn
from convener.testing.cluster import QUICK, InProcessCluster
from convener.testing.steps import Step
from tests.manager.conftest import MakeCluster, join
from tests.manager.stepped import Stepped, answered, idle, position, reborn
from tests.manager.test_cluster import Gate, echo
from tests.support.waiting import wait_until

pytestmark = pytest.mark.anyio

BRISK = dataclasses.replace(QUICK, start_timeout=1.0)
QUEUE = dataclasses.replace(QUICK, limit_policy="queue")


@pytest.fixture
def stepped(make_cluster: MakeCluster) -> Stepped:
    return Stepped(make_cluster)


@pytest.fixture
def brisk_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("convener.manager.admission.RETRY_S", 0.2)


async def code_of(work: Any) -> str:
    """The code of the error that `work` raises, "" for none."""
    try:
        await work
    except ConvenerError as error:
        return error.wire_code
    return ""


async def hibernated(cluster: InProcessCluster, node: int, cid: str) -> None:
    await cluster[node].maybe_start_agent_loop(cid, user_id="u")
    await idle(cluster[node], cid)
    assert await cluster[node].engine.hibernate(cid)
    await wait_until(lambda: nothing_held(cluster), "it is released")


async def nothing_held(cluster: InProcessCluster) -> bool:
    """No slot of the user and no record of any node that lives."""
    store = next(iter(cluster)).engine.node.store
    if await store.slots("u"):
        return False
    for manager in cluster:
        _, records, _ = await store.node_records(manager.engine.node.incarnation)
        if records:
            return False
    return True


async def reached(step: Step) -> None:
    await wait_until(step.reached.is_set, f"{step.name} has come to where it is stopped")


async def test_a_new_life_goes_on_with_what_the_old_one_owed(stepped: Stepped) -> None:
    """The end of a life cancels its starts; that must neither cancel who waits for them nor what tries them again."""
    cluster = await stepped.start(nodes=1)
    await hibernated(cluster, 0, "c")
    stepped.stores[0].lose("slot")
    assert await code_of(cluster[0].send_event_to_conversation("c", {"text": "x"})) == "store_unavailable"
    again = stepped.stores[0].hold("slot")
    await reached(again)
    await reborn(cluster[0])
    await wait_until(lambda: answered(cluster, "c", 1), "the message is answered", limit=5)
    await idle(cluster[0], "c")
    assert await cluster[0].engine.hibernate("c")
    during = stepped.stores[0].hold("slot")
    sending = asyncio.ensure_future(code_of(cluster[0].send_event_to_conversation("c", {"text": "y"})))
    await reached(during)
    await reborn(cluster[0])
    assert await sending == "ownership_lost"
    await wait_until(lambda: answered(cluster, "c", 2), "that one too", limit=5)


async def test_a_failed_start_is_undone_although_the_store_is_away_just_then(stepped: Stepped) -> None:
    cluster = await stepped.start(nodes=2)
    await hibernated(cluster, 0, "c")
    claim = stepped.stores[0].hold("claim")
    start = asyncio.ensure_future(code_of(cluster[0].maybe_start_agent_loop("c", user_id="u")))
    await reached(claim)
    assert await cluster[1].close_session("c") == "stopped"
    stepped.stores[0].lose("unreserve")
    claim.go()
    assert await start in ("conversation_stopped", "store_unavailable")
    await wait_until(lambda: nothing_held(cluster), "slot and record are given back", limit=5)


@pytest.mark.parametrize("how", ["new life", "owned after all"])
async def test_a_start_that_is_cut_off_keeps_no_view(stepped: Stepped, how: str) -> None:
    cluster = await stepped.start(nodes=1, options=BRISK)
    await hibernated(cluster, 0, "c")
    engine = cluster[0].engine
    claim = stepped.stores[0].hold("claim") if how == "new life" else stepped.stores[0].hold_reply("claim")
    start = asyncio.ensure_future(code_of(cluster[0].maybe_start_agent_loop("c", user_id="u")))
    await reached(claim)
    if how == "new life":
        await reborn(cluster[0])
        assert await start == "ownership_lost"
    else:
        assert await start == "owner_unavailable"
        await wait_until(lambda: engine.runner("c") is not None, "it runs what it owns")
        await idle(cluster[0], "c")
        assert await engine.hibernate("c")
    await wait_until(lambda: engine.views.get("c") is None, "nobody holds the view", limit=5)


async def test_a_claim_that_conflicted_once_is_settled_under_the_epoch_it_named_last(stepped: Stepped) -> None:
    """I6: a late CLAIM must not make this node the owner after slot and record are gone."""
    cluster = await stepped.start(nodes=1, options=BRISK)
    await hibernated(cluster, 0, "c")
    store = stepped.stores[0]
    first = store.hold("claim")
    start = asyncio.ensure_future(code_of(cluster[0].maybe_start_agent_loop("c", user_id="u")))
    await reached(first)
    head = await store.head("c")
    assert await store.disown("c", "", head.epoch) == "OK"
    second = store.late("claim")
    store.down.add("resolve")
    first.go()
    await reached(second)
    assert await start == "owner_unavailable"
    store.down.clear()
    await wait_until(lambda: nothing_held(cluster), "slot and record are given back")
    await second.land()
    head = await store.head("c")
    assert head.owner == ""


async def test_a_claim_that_landed_unseen_is_run_even_after_a_suspension(
    stepped: Stepped, monkeypatch: pytest.MonkeyPatch
) -> None:
    """I11: this node is the owner, not buried, so everybody acknowledges in its name."""
    monkeypatch.setattr("convener.manager.starter.SUSPENDED_S", 0.1)
    cluster = await stepped.start(nodes=2, options=BRISK)
    await hibernated(cluster, 0, "c")
    claim = stepped.stores[0].hold_reply("claim")
    start = asyncio.ensure_future(code_of(cluster[0].maybe_start_agent_loop("c", user_id="u")))
    await reached(claim)
    resolve = stepped.stores[0].hold_reply("resolve")
    await reached(resolve)
    assert await start == "owner_unavailable"
    lease, starter = cluster[0].engine.node.lease, cluster[0].engine.starter
    real, lease.valid = lease.valid, lambda: False
    again = stepped.stores[0].hold_reply("slot")
    resolve.go()
    await reached(again)
    again.go()
    await wait_until(lambda: not starter.is_starting("c"), "it cannot be started while the node is suspended")
    lease.valid = real
    await cluster[1].send_event_to_conversation("c", {"text": "x"})
    await wait_until(lambda: answered(cluster, "c", 1), "the message is answered", limit=5)


async def test_a_stop_during_a_takeover_is_finished_and_frees_the_slot(stepped: Stepped) -> None:
    """I15: the stop is recorded between RESERVE and CLAIM of who takes over from a buried owner."""
    cluster = await stepped.start(Gate(), nodes=2)
    await cluster[0].maybe_start_agent_loop("c", user_id="u", initial_user_msg={"text": "x"})
    claim = stepped.stores[1].hold("claim")
    await cluster.kill(0)
    await reached(claim)
    reply = await stepped.stores[1].stop("c", "somebody~1", "enough", "")
    assert reply.outcome == "STOPPING"
    claim.go()
    await wait_until(lambda: status_of(cluster, "c", "stopped"), "the stop is finished", limit=5)
    await wait_until(lambda: nothing_held(cluster), "slot and record are given back", limit=5)


async def status_of(cluster: InProcessCluster, cid: str, status: str) -> bool:
    head = await next(iter(cluster)).engine.node.store.head(cid)
    return head is not None and head.status == status


async def test_a_takeover_given_up_leaves_no_slot_when_another_node_disowns(stepped: Stepped) -> None:
    """The slot of a buried owner's conversation stays with who adopted it; somebody must give it back later."""
    cluster = await stepped.start(nodes=2, options=BRISK)
    await cluster[0].maybe_start_agent_loop("c", user_id="u")
    sink = await join(cluster, 1, "c", "s")
    await wait_until(lambda: sink.named("joined"), "joined")
    stepped.stores[1].down.add("claim")
    adopted = stepped.stores[1].hold_reply("reserve")
    await cluster.kill(0)
    await reached(adopted)
    await cluster[1].disconnect_from_session("s")
    adopted.go()
    await wait_until(lambda: owner_of(cluster, "c", ""), "it is disowned")
    await wait_until(lambda: nothing_held(cluster), "slot and record are given back", limit=5)


async def owner_of(cluster: InProcessCluster, cid: str, owner: str) -> bool:
    head = await next(iter(cluster)).engine.node.store.head(cid)
    return head is not None and head.owner == owner


async def test_a_conversation_stopped_while_it_is_restarted_leaves_nothing(stepped: Stepped) -> None:
    cluster = await stepped.start(nodes=2)
    await cluster[0].maybe_start_agent_loop("c", user_id="u")
    await wait_until(lambda: cluster[1].is_agent_loop_running("c"), "the other node knows it")
    runner = cluster[0].engine.runner("c")
    assert runner is not None
    runner.diverged()
    reply = await stepped.stores[1].stop("c", "somebody~1", "enough", "")
    assert reply.outcome == "STOPPING"
    await wait_until(lambda: status_of(cluster, "c", "stopped"), "the stop is finished", limit=5)
    await wait_until(lambda: nothing_held(cluster), "slot and record are given back", limit=5)
    for manager in cluster:
        await wait_until(lambda m=manager: _unlisted(m), "it is listed no more", limit=5)


async def _unlisted(manager: Any) -> bool:
    return not await manager.is_agent_loop_running("c")


# -- queued starts -----------------------------------------------------------------------------------------------


async def queued(stepped: Stepped, agent: Any = echo) -> InProcessCluster:
    """Node 1 runs "first", which is all that the user may run."""
    cluster = await stepped.start(agent, nodes=2, limit=1, options=QUEUE)
    await cluster[1].maybe_start_agent_loop("first", user_id="u")
    return cluster


async def no_queue(cluster: InProcessCluster) -> bool:
    return not await next(iter(cluster)).engine.node.store.waiting("u")


@pytest.mark.usefixtures("brisk_retries")
async def test_a_queued_start_whose_reply_is_lost_holds_nobody_up(stepped: Stepped) -> None:
    cluster = await queued(stepped)
    stepped.stores[0].lose_reply("enqueue")
    assert await code_of(cluster[0].maybe_start_agent_loop("q", user_id="u")) == "store_unavailable"
    await cluster[1].close_session("first")
    await wait_until(lambda: no_queue(cluster), "the queue moves on", limit=5)


@pytest.mark.usefixtures("brisk_retries")
async def test_a_queued_start_that_somebody_else_made_leaves_the_queue(stepped: Stepped) -> None:
    cluster = await queued(stepped)
    enqueue = stepped.stores[0].hold("enqueue")
    start = asyncio.ensure_future(code_of(cluster[0].maybe_start_agent_loop("q", user_id="u")))
    await reached(enqueue)
    await cluster[1].close_session("first")
    info = await cluster[1].maybe_start_agent_loop("q", user_id="u")
    assert info.started_here
    enqueue.go()
    assert await start == ""
    await wait_until(lambda: no_queue(cluster), "the entry goes, for it would hold others up", limit=5)


async def test_a_failed_attempt_leaves_the_queued_starts_record(stepped: Stepped) -> None:
    """I12: without the record nobody would take the entry over from a buried node."""
    cluster = await queued(stepped)
    await cluster[0].maybe_start_agent_loop("q", user_id="u", initial_user_msg={"text": "x"})
    stepped.stores[0].down.add("slots")
    await cluster[0].engine.admission.retry("q")
    await cluster.kill(0)
    await cluster[1].close_session("first")
    await wait_until(lambda: done(cluster, "q"), "it starts elsewhere and is answered", limit=15)
    assert await no_queue(cluster)


async def done(cluster: InProcessCluster, cid: str) -> bool:
    return await position(cluster, cid) == 1 and await answered(cluster, cid, 1)


async def test_an_entry_that_landed_after_its_nodes_burial_holds_nobody_up(stepped: Stepped) -> None:
    async def agent(turn: Turn) -> None:
        await echo(turn)

    cluster = await queued(stepped, agent)
    dead = cluster[0].engine.node.incarnation
    await cluster[0].engine.create("q", "u", "{}")
    await cluster.kill(0)
    store = cluster[1].engine.node.store
    await wait_until(lambda: dead in cluster[1].engine.node.buried, "its burial is known")
    assert await store.enqueue("u", "q", dead, "start")
    await cluster[1].maybe_start_agent_loop("next", user_id="u")
    await cluster[1].close_session("first")
    await wait_until(lambda: owned(cluster, "q"), "the one before is started", limit=5)
    await cluster[1].close_session("q")
    await wait_until(lambda: owned(cluster, "next"), "then the next", limit=10)


async def owned(cluster: InProcessCluster, cid: str) -> bool:
    return not await owner_of(cluster, cid, "")
