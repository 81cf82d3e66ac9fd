"""Deliberate stops: from any node, finished whatever dies, never undone by recovery (I15)."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from convener.errors import ConversationStopped, NotFound
from tests.manager.conftest import MakeCluster, join
from tests.manager.test_cluster import Gate, echo
from tests.support.waiting import wait_until

pytestmark = pytest.mark.anyio


@pytest.mark.parametrize("node", [0, 1])
async def test_stop_tells_and_disconnects_everybody(make_cluster: MakeCluster, node: int) -> None:
    gate = Gate()
    cluster = await make_cluster(gate)
    sinks = [await join(cluster, n, "c", f"s{n}") for n in range(3)]
    for n in range(3):
        await cluster[n].send_event_to_conversation("c", {"text": str(n)})
    await wait_until(lambda: gate.begun, "a turn runs")
    assert await cluster[node].close_session("c", "enough") == "stopped"
    for sink in sinks:
        await asyncio.wait_for(sink.disconnected.wait(), 20)
        assert sink.named("stopped") == [{"conversation_id": "c", "reason": "enough"}]
        assert [e["kind"] for e in sink.events][-2:] == ["turn_interrupted", "stopped"]
        assert len([e for e in sink.events if e["kind"] == "input"]) == 3
    store = cluster[0].engine.node.store
    await wait_until(lambda: _nothing_held(store), "slot and claim are given back")
    assert await cluster[2].close_session("c") == "already_stopped"
    assert gate.cancelled == 1
    assert not gate.open.is_set()


async def _nothing_held(store: Any) -> bool:
    head = await store.head("c")
    return head is not None and head.status == "stopped" and not head.owner and not await store.slots("u")


async def test_stop_of_a_hibernated_conversation(make_cluster: MakeCluster) -> None:
    cluster = await make_cluster(echo)
    sink = await join(cluster, 1, "c", "s")
    await wait_until(lambda: sink.named("joined"), "joined")
    await wait_until(lambda: cluster[1].engine.hibernate("c"), "it is released")
    assert await cluster[0].close_session("c") == "stopped"
    await asyncio.wait_for(sink.disconnected.wait(), 20)
    with pytest.raises(NotFound):
        await cluster[0].close_session("unknown")


async def test_stop_of_a_dead_owners_conversation_is_final(make_cluster: MakeCluster) -> None:
    gate = Gate()
    cluster = await make_cluster(gate)
    await cluster[0].maybe_start_agent_loop("c", user_id="u", initial_user_msg={"text": "x"}, message_id="m")
    await wait_until(lambda: gate.begun, "a turn runs")
    await cluster.kill(0)
    assert await cluster[1].close_session("c") in ("stopped", "stopping")
    store = cluster[1].engine.node.store
    await wait_until(lambda: _nothing_held(store), "the stop is finished and the slot is free")
    gate.open.set()
    log = await store.inbox("c")
    assert log is not None
    late = await join(cluster, 2, "c", "late", start=False)
    await wait_until(lambda: late.named("joined"), "joined to read")
    assert late.named("joined")[0]["status"] == "stopped"
    assert [e["kind"] for e in late.events].count("input") == 1
    assert late.events[-1]["kind"] == "stopped"
    assert len(gate.begun) == 1


async def test_a_promised_stop_survives_the_owner(make_cluster: MakeCluster) -> None:
    """The intent is in the inbox; whoever recovers finishes it and starts nothing."""
    gate = Gate()
    cluster = await make_cluster(gate)
    await cluster[0].maybe_start_agent_loop("c", user_id="u", initial_user_msg={"text": "x"})
    await wait_until(lambda: gate.begun, "a turn runs")
    store = cluster[1].engine.node.store
    await cluster[0].engine.node.store.close()
    reply = await store.stop("c", cluster[1].engine.node.incarnation, "the intent", "")
    assert reply.outcome == "STOPPING"
    await cluster.kill(0)
    await wait_until(lambda: _nothing_held(store), "recovery finishes the stop")
    late = await join(cluster, 1, "c", "late", start=False)
    await wait_until(lambda: late.named("joined"), "joined to read")
    assert late.events[-1]["data"] == {"reason": "the intent"}
    assert len(gate.begun) == 1


async def test_resume_opens_it_again(make_cluster: MakeCluster) -> None:
    cluster = await make_cluster(echo)
    await cluster[0].maybe_start_agent_loop("c", user_id="u", initial_user_msg={"text": "1"})
    assert await cluster[1].resume("c") == "running"
    await cluster[1].close_session("c")
    with pytest.raises(ConversationStopped):
        await cluster[2].send_event_to_conversation("c", {"text": "2"})
    assert await cluster[2].resume("c") == "resumed"
    sink = await join(cluster, 2, "c", "s")
    await cluster[2].send_event_to_conversation("c", {"text": "2"})
    await wait_until(lambda: {"text": "2"} in sink.replies(), "it answers again")
    assert [e["seq"] for e in sink.events] == list(range(1, len(sink.events) + 1))
    with pytest.raises(NotFound):
        await cluster[0].resume("unknown")
