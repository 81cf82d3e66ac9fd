"""Conversations that are held or given up: how they come to that, what they hold, and how they go on."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from convener.errors import ConversationFailed, NotFound
from convener.testing.cluster import InProcessCluster
from tests.manager.conftest import MakeCluster, join
from tests.manager.people import ask, ends, head_of, log_of, replies_of, settled, store_of, unowned
from tests.manager.stepped import Stepped, reborn
from tests.manager.test_recovery_modes import Poison, cut_off, mode, shown
from tests.support.waiting import wait_until

pytestmark = pytest.mark.anyio


# -- parking


@pytest.mark.parametrize("fault", ["lose", "lose_reply", "repeat", "late"])
async def test_parking_with_lost_commands(make_cluster: MakeCluster, fault: str) -> None:
    stepped = Stepped(make_cluster)
    parking: list[Any] = []

    def closes(cid: str, request: Any) -> bool:
        return request.closing == "held"

    stepped.prepare = lambda store: parking.append(getattr(store, fault)("append", closes))
    cluster = await stepped.start(poison := Poison(), options=mode("wait"))
    await cut_off(cluster, poison, "two")
    await shown(cluster, "waiting")
    await unowned(cluster, "c")
    hit = [step for step in parking if step.reached.is_set()]
    assert len(hit) == 1
    if fault == "late":
        assert (await hit[0].land()).outcome in ("FENCED", "OK")
    poison.open.set()
    assert await cluster[1].resume("c") == "resumed"
    await settled(cluster, "c")
    assert await replies_of(cluster, "c") == ["one", "two"]


@pytest.mark.parametrize("status", ["held", "failed"])
async def test_a_stop_that_races_the_parking_is_obeyed(make_cluster: MakeCluster, status: str) -> None:
    stepped = Stepped(make_cluster)
    parking: list[Any] = []

    def closes(cid: str, request: Any) -> bool:
        return request.closing == status

    stepped.prepare = lambda store: parking.append(store.hold("append", closes))
    cluster = await stepped.start(poison := Poison(), nodes=1, options=mode("wait" if status == "held" else "resume"))
    await cluster[0].maybe_start_agent_loop("c", user_id="u", initial_user_msg={"text": "one"})
    for attempt in range(1, 2 if status == "held" else 4):
        await wait_until(lambda a=attempt: len(poison.begun) == a, f"attempt {attempt} runs")
        await cluster.add()
        await cluster.kill(attempt - 1)
    await wait_until(lambda: [p for p in parking if p.reached.is_set()], "it is about to be parked")
    await cluster.add()
    other = cluster[len(cluster.managers) - 1]
    stopped = asyncio.create_task(other.close_session("c", "enough"))

    async def is_told() -> bool:
        return (await head_of(cluster, "c")).status == "stopping"

    await wait_until(is_told, "the stop is recorded")
    for held in parking:
        held.go()
    assert await stopped == "stopped"
    await unowned(cluster, "c")
    assert (await log_of(cluster, "c"))[-1]["kind"] == "stopped"
    assert (await other.describe("c")).status == "stopped"


async def test_a_node_that_is_buried_while_it_parks_begins_a_new_life(make_cluster: MakeCluster) -> None:
    stepped = Stepped(make_cluster)
    parking: list[Any] = []

    def closes(cid: str, request: Any) -> bool:
        return request.closing == "held"

    stepped.prepare = lambda store: parking.append(store.hold("append", closes))
    cluster = await stepped.start(poison := Poison(), nodes=2, options=mode("wait"))
    await cut_off(cluster, poison)
    await asyncio.wait_for(parking[1].reached.wait(), 20)
    await reborn(cluster[1])
    parking[1].go()
    await shown(cluster, "waiting")
    poison.open.set()
    assert await cluster[1].resume("c") == "resumed"
    await settled(cluster, "c")
    assert await replies_of(cluster, "c") == ["one"]


# -- too many takeovers


async def poisoned(make_cluster: MakeCluster, poison: Poison, *queued: str, **options: Any) -> InProcessCluster:
    """A cluster in which the first turn of `c` has taken three nodes down and was given up; node 3 is left."""
    cluster = await make_cluster(poison, nodes=1, **options)
    await cluster[0].maybe_start_agent_loop("c", user_id="u", initial_user_msg={"text": "one"})
    for text in queued:
        await cluster[0].send_event_to_conversation("c", {"text": text})
    for attempt in range(1, 4):
        await wait_until(lambda a=attempt: len(poison.begun) == a, f"attempt {attempt} runs")
        await cluster.add()
        await cluster.kill(attempt - 1)
    await shown(cluster, "failed")
    return cluster


async def test_a_turn_that_has_taken_three_nodes_down(make_cluster: MakeCluster) -> None:
    poison = Poison()
    cluster = await poisoned(make_cluster, poison, "two", limit=1)
    await unowned(cluster, "c")
    log = await log_of(cluster, "c")
    assert (log[-1]["kind"], log[-1]["turn"]) == ("turn_failed", "t1")
    assert log[-1]["data"]["code"] == "too_many_takeovers"
    assert log[-1]["data"]["settles"] == [1]
    manager = cluster[3]
    for refused in (
        manager.send_event_to_conversation("c", {"text": "three"}),
        manager.interrupt("c"),
        manager.maybe_start_agent_loop("c", user_id="u"),
        manager.answer("c", "t1.1", "?"),
    ):
        with pytest.raises(ConversationFailed) as error:
            await refused
        assert error.value.wire_code == "conversation_failed"
    # Its slot is free.
    await manager.maybe_start_agent_loop("other", user_id="u")
    assert set(await store_of(cluster).slots("u")) == {"other"}
    sink = await join(cluster, 3, "c", "s")
    poison.open.set()
    assert await manager.resume("c") == "resumed"
    await settled(cluster, "c")
    await wait_until(sink.replies, "what was queued is answered")
    assert sink.replies() == ["two"]
    assert ends(sink) == [("t1", "turn_failed"), ("t2", "turn_done")]
    assert poison.turns == ["t1", "t1", "t1", "t2"]


async def test_takeovers_are_counted_anew_after_resume(make_cluster: MakeCluster) -> None:
    poison = Poison()
    cluster = await poisoned(make_cluster, poison, "two")
    assert (await head_of(cluster, "c")).strikes == 3
    assert await cluster[3].resume("c") == "resumed"
    assert (await head_of(cluster, "c")).strikes == 0
    for number in range(2):
        await wait_until(lambda n=number: poison.turns[3:] == (n + 1) * ["t2"], "the next one runs")
        await cluster.add()
        await cluster.kill(3 + number)
    await wait_until(lambda: poison.turns[3:] == 3 * ["t2"], "it is begun a third time")
    assert (await head_of(cluster, "c")).strikes == 2
    poison.open.set()
    await settled(cluster, "c")
    assert await replies_of(cluster, "c") == ["two"]


@pytest.mark.parametrize("status", ["held", "failed"])
@pytest.mark.parametrize("end", ["stop", "delete"])
async def test_ends_of_a_parked_conversation(make_cluster: MakeCluster, status: str, end: str) -> None:
    poison = Poison()
    if status == "failed":
        cluster, node = await poisoned(make_cluster, poison, "two"), 3
    else:
        cluster, node = await make_cluster(poison, options=mode("wait")), 1
        await cut_off(cluster, poison, "two")
        await shown(cluster, "waiting")
    if end == "delete":
        await cluster[node].delete("c")
        with pytest.raises(NotFound):
            await cluster[node].describe("c")
        return
    assert await cluster[node].close_session("c", "enough") == "stopped"
    assert await cluster[node].close_session("c", "enough") == "already_stopped"
    head = await head_of(cluster, "c")
    assert (head.status, head.done) == ("stopped", 2)
    assert await cluster[node].resume("c") == "resumed"
    poison.open.set()
    await cluster[node].send_event_to_conversation("c", {"text": "three"})
    await settled(cluster, "c")
    assert await replies_of(cluster, "c") == ["three"], "the stop has given up what was queued"


# -- resume


async def test_resume_of_what_runs_or_never_was(make_cluster: MakeCluster) -> None:
    cluster = await make_cluster(ask)
    with pytest.raises(NotFound):
        await cluster[0].resume("unknown")
    await cluster[0].maybe_start_agent_loop("c", user_id="u")
    assert await cluster[1].resume("c") == "running"
    await cluster[0].close_session("c")
    results = await asyncio.gather(*(m.resume("c") for m in cluster for _ in range(3)))
    assert sorted(results) == ["resumed", *8 * ["running"]]


@pytest.mark.parametrize("again", [True, False], ids=["asked again", "not asked again"])
async def test_a_resumption_whose_reply_was_lost(make_cluster: MakeCluster, again: bool) -> None:
    stepped = Stepped(make_cluster)
    cluster = await stepped.start(poison := Poison(), options=mode("wait"))
    await cut_off(cluster, poison)
    await shown(cluster, "waiting")
    stepped.stores[1].lose_reply("resume")
    with pytest.raises(Exception, match="lost"):
        await cluster[1].resume("c")
    if again:
        # Whoever resumed it may be gone; the one who finds it resumed wakes it.
        await cluster.kill(1)
        assert await cluster[2].resume("c") == "running"
    poison.open.set()
    await settled(cluster, "c")
    assert await replies_of(cluster, "c") == ["one"]


async def test_a_resumption_when_the_limit_is_met_waits_for_a_slot(make_cluster: MakeCluster) -> None:
    options = mode("wait", limit_policy="reject")
    cluster = await make_cluster(poison := Poison(), limit=1, options=options)
    await cut_off(cluster, poison)
    await shown(cluster, "waiting")
    await unowned(cluster, "c")
    await cluster[1].maybe_start_agent_loop("other", user_id="u")
    assert await cluster[2].resume("c") == "resumed"
    assert [w.conversation_id for w in await store_of(cluster).waiting("u")] == ["c"]
    poison.open.set()
    await cluster[1].close_session("other")
    await settled(cluster, "c")
    assert await replies_of(cluster, "c") == ["one"]
