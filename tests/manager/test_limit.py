"""The exact limit across the cluster (I6), and its three policies."""

from __future__ import annotations

import asyncio
import dataclasses
from typing import Any

import pytest

from convener.errors import ConversationStopped, LimitExceeded
from convener.manager.turn import Turn
from convener.testing.cluster import QUICK, FunctionAgent, InProcessCluster
from tests.manager.conftest import MakeCluster, join
from tests.manager.test_cluster import Gate, echo
from tests.support.waiting import wait_until

pytestmark = pytest.mark.anyio

REJECT = dataclasses.replace(QUICK, limit_policy="reject")
QUEUE = dataclasses.replace(QUICK, limit_policy="queue")


async def start(cluster: InProcessCluster, node: int, cid: str, user: str = "u", **options: Any) -> bool:
    try:
        await cluster[node].maybe_start_agent_loop(cid, user_id=user, **options)
    except LimitExceeded:
        return False
    return True


async def test_forty_simultaneous_starts_leave_exactly_three(make_cluster: MakeCluster) -> None:
    cluster = await make_cluster(echo, options=REJECT)
    store = cluster[0].engine.node.store
    for round_ in range(10):
        user = f"u{round_}"
        started = await asyncio.gather(*(start(cluster, n % 3, f"{user}.{n}", user) for n in range(40)))
        assert sum(started) == 3
        winners = {f"{user}.{n}" for n, won in enumerate(started) if won}
        assert set(await store.slots(user)) == winners
        # What was refused leaves nothing: no head, no entry in a list.
        heads = await store.heads([f"{user}.{n}" for n in range(40)])
        assert {f"{user}.{n}" for n, head in enumerate(heads) if head is not None} == winners
        assert {c for c, _ in await store.list_user(user, None, 100)} == winners


async def test_sequential_starts_reach_the_limit_and_a_stop_frees_at_once(make_cluster: MakeCluster) -> None:
    cluster = await make_cluster(echo, options=REJECT)
    for n in range(3):
        assert await start(cluster, n, f"c{n}")
    for n in range(3):
        # One that runs is not refused for its own registration, wherever it is asked for.
        assert await start(cluster, n, "c0")
    with pytest.raises(LimitExceeded) as refused:
        await cluster[0].maybe_start_agent_loop("c3", user_id="u")
    assert refused.value.limit == 3
    assert refused.value.running == ("c0", "c1", "c2")
    assert refused.value.current == 3
    for n in range(3, 13):
        assert await cluster[n % 3].close_session(f"c{n - 3}") == "stopped"
        assert await start(cluster, (n + 1) % 3, f"c{n}")
    assert await start(cluster, 0, "other", user="somebody.else")


async def test_users_without_an_id_share_no_limit(make_cluster: MakeCluster) -> None:
    cluster = await make_cluster(echo, options=REJECT)
    for n in range(8):
        info = await cluster[n % 3].maybe_start_agent_loop(f"c{n}")
        assert info.user_id == ""


async def test_a_users_own_limit(make_cluster: MakeCluster) -> None:
    cluster = await make_cluster(FunctionAgent(echo, limits={"big": 5, "small": 1}), options=REJECT)
    assert sum([await start(cluster, n % 3, f"b{n}", "big") for n in range(7)]) == 5
    assert sum([await start(cluster, n % 3, f"s{n}", "small") for n in range(3)]) == 1


async def test_reject_takes_a_wake_back(make_cluster: MakeCluster) -> None:
    cluster = await make_cluster(echo, options=REJECT, limit=1)
    assert await start(cluster, 0, "sleeper")
    await wait_until(lambda: cluster[0].engine.hibernate("sleeper"), "the sleeper is released")
    assert await start(cluster, 1, "other")
    with pytest.raises(LimitExceeded):
        await cluster[2].send_event_to_conversation("sleeper", {"text": "x"}, message_id="m")
    head = await cluster[0].engine.node.store.head("sleeper")
    assert head is not None
    assert head.position == head.done == 0
    await cluster[0].close_session("other")
    result = await cluster[2].send_event_to_conversation("sleeper", {"text": "x"}, message_id="m")
    assert not result.duplicate


async def test_evict_idle_takes_the_longest_idle_and_keeps_its_sockets(make_cluster: MakeCluster) -> None:
    gate = Gate()
    cluster = await make_cluster(gate, limit=3)
    sinks = [await join(cluster, n, f"c{n}", f"s{n}") for n in range(3)]
    await cluster[0].send_event_to_conversation("c0", {"text": "work"})
    await wait_until(lambda: gate.begun, "c0 works")
    for n in range(1, 3):
        await wait_until(lambda s=sinks[n]: s.named("joined"), "joined")
    assert await start(cluster, 2, "new")
    store = cluster[0].engine.node.store
    slots = set(await store.slots("u"))
    assert {"c0", "new"} < slots
    assert len(slots) == 3
    evicted = 1 if "c1" not in slots else 2
    await wait_until(lambda: _statuses(sinks[evicted])[-1:] == ["hibernated"], "its client is told")
    assert not sinks[evicted].disconnected.is_set()
    gate.open.set()
    await wait_until(sinks[0].replies, "the working one was not disturbed")
    await cluster[0].send_event_to_conversation(f"c{evicted}", {"text": "wake"})
    await wait_until(sinks[evicted].replies, "the evicted one answers its next message")
    assert len(await store.slots("u")) == 3


def _statuses(sink: Any) -> list[str]:
    return [p["status"] for p in sink.named("status")]


async def test_evict_idle_never_takes_a_working_one(make_cluster: MakeCluster) -> None:
    gate = Gate()
    cluster = await make_cluster(gate, limit=2)
    for n in range(2):
        await cluster[n].maybe_start_agent_loop(f"c{n}", user_id="u", initial_user_msg={"text": "work"})
    await wait_until(lambda: len(gate.begun) == 2, "both work")
    for node in range(3):
        assert not await start(cluster, node, "new")
    gate.open.set()
    assert gate.cancelled == 0


async def test_a_wake_that_finds_no_room_waits(make_cluster: MakeCluster) -> None:
    gate = Gate()
    cluster = await make_cluster(gate, limit=1)
    assert await start(cluster, 0, "sleeper")
    await wait_until(lambda: cluster[0].engine.hibernate("sleeper"), "the sleeper is released")
    await cluster[1].maybe_start_agent_loop("busy", user_id="u", initial_user_msg={"text": "work"})
    await wait_until(lambda: gate.begun, "the other works")
    accepted = await cluster[2].send_event_to_conversation("sleeper", {"text": "x"})
    assert accepted.position == 1
    store = cluster[0].engine.node.store
    assert [w.conversation_id for w in await store.waiting("u")] == ["sleeper"]
    # Nobody passes over who waits.
    assert not await start(cluster, 0, "newcomer")
    gate.open.set()
    await cluster[0].close_session("busy")
    await wait_until(lambda: _done(store, "sleeper"), "the waiting one is answered")
    assert list(await store.waiting("u")) == []


async def _done(store: Any, cid: str) -> bool:
    head = await store.head(cid)
    return head is not None and head.done == head.position > 0


async def test_queue_starts_in_order_when_slots_are_freed(make_cluster: MakeCluster) -> None:
    order: list[str] = []

    async def agent(turn: Turn) -> None:
        order.append(turn.conversation.id)

    cluster = await make_cluster(agent, options=QUEUE, limit=1)
    await cluster[0].maybe_start_agent_loop("first", user_id="u")
    store = cluster[0].engine.node.store
    for n in range(3):
        info = await cluster[n].maybe_start_agent_loop(f"c{n}", user_id="u", initial_user_msg={"text": "x"})
        assert info.status == "starting"
        assert len(await store.waiting("u")) == n + 1
    assert order == []
    await cluster[1].close_session("first")
    for n in range(3):
        await wait_until(lambda k=n: order == [f"c{i}" for i in range(k + 1)], f"c{n} is answered")
        assert set(await store.slots("u")) == {f"c{n}"}
        await cluster[n].close_session(f"c{n}")


async def test_a_dead_nodes_waiting_starts_are_taken_over(make_cluster: MakeCluster) -> None:
    cluster = await make_cluster(echo, options=QUEUE, limit=1)
    await cluster[1].maybe_start_agent_loop("first", user_id="u")
    await cluster[0].maybe_start_agent_loop("queued", user_id="u", initial_user_msg={"text": "x"})
    dead = cluster[0].engine.node.incarnation
    await cluster.kill(0)
    store = cluster[1].engine.node.store
    await wait_until(lambda: _waits_for_another(store, dead), "another node looks after the waiting start")
    await cluster[1].close_session("first")
    await wait_until(lambda: _done(store, "queued"), "it starts when there is room")


async def _waits_for_another(store: Any, dead: str) -> bool:
    waiting = await store.waiting("u")
    return len(waiting) == 1 and waiting[0].incarnation != dead


async def test_a_stopped_waiting_start_leaves_the_queue(make_cluster: MakeCluster) -> None:
    cluster = await make_cluster(echo, options=QUEUE, limit=1)
    await cluster[1].maybe_start_agent_loop("first", user_id="u")
    await cluster[0].maybe_start_agent_loop("queued", user_id="u", initial_user_msg={"text": "x"})
    assert await cluster[2].close_session("queued") == "stopped"
    store = cluster[1].engine.node.store
    assert list(await store.waiting("u")) == []
    with pytest.raises(ConversationStopped):
        await cluster[0].send_event_to_conversation("queued", {})


@pytest.mark.parametrize("node", [0, 1])
async def test_a_stop_has_freed_the_slot_when_it_is_answered(make_cluster: MakeCluster, node: int) -> None:
    """The owner is slow to give it back; whoever asked must not have to wait for that."""
    cluster = await make_cluster(echo, options=REJECT, limit=1)
    await cluster[0].maybe_start_agent_loop("c", user_id="u")
    owner = cluster[0].engine
    gave_back = asyncio.Event()

    async def later(runner: Any, status: Any) -> None:
        await gave_back.wait()
        await real(runner, status)

    real, owner._give_back = owner._give_back, later
    assert await cluster[node].close_session("c") == "stopped"
    assert await start(cluster, 2, "next")
    gave_back.set()
