"""A node that may not act: suspension, resumption, burial and a new life (I7, I10)."""

from __future__ import annotations

import asyncio
import threading

import pytest
from structlog.testing import capture_logs

from convener.core.membership import RenewReply
from convener.core.model import NewMessage
from convener.errors import StoreUnavailable
from convener.manager import ClusteredConversationManager, heartbeat
from convener.manager.turn import Turn
from convener.store.base import HeartbeatLink, Store
from convener.testing.cluster import InProcessCluster
from tests.manager.conftest import MakeCluster, join
from tests.manager.test_cluster import Gate, echo
from tests.support.waiting import wait_until

pytestmark = pytest.mark.anyio


class Switch:
    """Cuts the renewals of one node; what its live subscription shows stays as it is."""

    def __init__(self, manager: ClusteredConversationManager) -> None:
        self.cut = threading.Event()
        heartbeat = manager.heartbeat
        assert heartbeat is not None
        make = heartbeat.make_link

        def make_cut() -> HeartbeatLink:
            return CutLink(make(), self.cut)

        heartbeat.make_link = make_cut
        # The link in use is dropped, so that the next beat makes a cut one.
        heartbeat.refresh_link()


class CutLink:
    def __init__(self, link: HeartbeatLink, cut: threading.Event) -> None:
        self._link = link
        self._cut = cut

    def renew(self, incarnation: str, info: str | None = None) -> RenewReply:
        if self._cut.is_set():
            raise StoreUnavailable("the renewals are cut")
        return self._link.renew(incarnation, info)

    def hold_live(self, incarnation: str) -> None:
        self._link.hold_live(incarnation)

    def ping_live(self) -> None:
        self._link.ping_live()

    def close(self) -> None:
        # Kept: a paused process keeps its sockets too, which spares it the fast burial.
        if not self._cut.is_set():
            self._link.close()


async def test_a_short_silence_suspends_and_repeats_the_turn(make_cluster: MakeCluster) -> None:
    gate = Gate()
    cluster = await make_cluster(gate)
    sink = await join(cluster, 0, "c", "s")
    await cluster[0].send_event_to_conversation("c", {"text": "x"})
    await wait_until(lambda: gate.begun, "the turn runs")
    manager, epoch = cluster[0], (await cluster[0].describe("c")).epoch
    switch = Switch(manager)
    switch.cut.set()
    await wait_until(lambda: gate.cancelled == 1, "the turn is cancelled when the lease is not good")
    assert not manager.engine.node.lease.valid()
    assert manager.readiness().checks["lease"] != "ok"
    assert manager.readiness().degraded
    # Accepted meanwhile by another node; the owner takes it when it may act again.
    await cluster[1].send_event_to_conversation("c", {"text": "y"})
    switch.cut.clear()
    gate.open.set()
    await wait_until(lambda: len(sink.replies()) == 2, "both are answered after the resumption")
    assert sink.replies()[0] == {"text": "x", "attempt": 2, "reason": "retry"}
    assert (await manager.describe("c")).epoch == epoch
    statuses = [p["status"] for p in sink.named("status")]
    assert "recovering" in statuses
    await wait_until(lambda: sink.named("status")[-1]["status"] == "idle", "its clients see that it goes on")


async def test_a_lapse_too_short_to_notice_stops_nobody(make_cluster: MakeCluster) -> None:
    """What was to be written during the lapse is written after it, though the node never suspended."""
    cluster = await make_cluster(echo, nodes=1)
    sink = await join(cluster, 0, "c", "s")
    await wait_until(lambda: sink.named("joined"), "joined")
    node = cluster[0].engine.node
    real, node.lease.valid = node.lease.valid, lambda: False
    await cluster[0].engine.node.store.send("c", NewMessage("m", "u", '{"text":"x"}'), max_pending=9)
    runner = cluster[0].engine.runner("c")
    assert runner is not None
    await wait_until(lambda: runner.status == "running", "the message has arrived while the lease is not good")
    node.lease.valid = real
    await wait_until(lambda: sink.replies() == [{"text": "x"}], "it is answered all the same")


async def test_a_buried_node_writes_nothing_more_and_lives_anew(make_cluster: MakeCluster) -> None:
    gate = Gate()
    cluster = await make_cluster(gate)
    sink, elsewhere = await join(cluster, 0, "c", "s"), await join(cluster, 1, "c", "s1")
    await cluster[0].send_event_to_conversation("c", {"text": "x"})
    await wait_until(lambda: gate.begun, "the turn runs")
    manager = cluster[0]
    old = manager.engine.node.incarnation
    switch = Switch(manager)
    switch.cut.set()
    store = cluster[1].engine.node.store
    await wait_until(lambda: store.is_buried(old), "the silent node is reaped", limit=30)
    gate.open.set()
    await wait_until(elsewhere.replies, "another node answers")
    switch.cut.clear()
    await wait_until(lambda: manager.engine.node.incarnation != old, "it begins a new life")
    await wait_until(lambda: manager.readiness().ready and manager.engine.node.lease.valid(), "it is ready again")
    await wait_until(lambda: sink.events == elsewhere.events, "its client sees the same log")
    opens = [e for e in sink.events if e["kind"] == "open"]
    assert len(opens) == 2
    boundary = opens[1]["seq"]
    assert all(e["epoch"] == opens[0]["epoch"] for e in sink.events if e["seq"] < boundary)
    assert all(e["epoch"] == opens[1]["epoch"] for e in sink.events if e["seq"] >= boundary)
    assert await store.is_buried(old)
    info = await manager.maybe_start_agent_loop("fresh", user_id="u2")
    assert info.node == "node-0"
    assert await _empty(store, old)


async def _empty(store: Store, incarnation: str) -> bool:
    return await wait_until(lambda: _no_records(store, incarnation), "the dead life's hash is empty")


async def _no_records(store: Store, incarnation: str) -> bool:
    _, records, _ = await store.node_records(incarnation)
    return not records


async def test_a_wedged_event_loop_is_not_renewed(make_cluster: MakeCluster) -> None:
    cluster = await make_cluster(echo)
    heartbeat = cluster[0].heartbeat
    assert heartbeat is not None
    assert heartbeat.may_renew()
    heartbeat.last_tick -= 60
    assert not heartbeat.may_renew()
    await wait_until(heartbeat.may_renew, "the next tick lets it renew again")


async def test_two_nodes_never_act_at_once(make_cluster: MakeCluster) -> None:
    """Turns note when they run; no two of one conversation overlap on different nodes, whatever is cut."""
    running: set[str] = set()
    overlaps: list[str] = []

    async def agent(turn: Turn) -> None:
        cid = turn.conversation.id
        if cid in running:
            overlaps.append(cid)
        running.add(cid)
        try:
            await asyncio.sleep(0.05)
        finally:
            running.discard(cid)

    cluster: InProcessCluster = await make_cluster(agent, limit=10)
    for n in range(6):
        await cluster[n % 3].maybe_start_agent_loop(f"c{n}", user_id="u")
    switches = [Switch(m) for m in cluster]
    sent = 0
    for round_ in range(6):
        switches[round_ % 3].cut.set()
        for n in range(6):
            await cluster[(round_ + 1) % 3].send_event_to_conversation(f"c{n}", {"round": round_})
            sent += 1
        node = cluster[round_ % 3].engine.node
        await wait_until(lambda x=node: not x.lease.valid(), "it is suspended")
        switches[round_ % 3].cut.clear()
    store = cluster[0].engine.node.store

    async def all_done() -> bool:
        heads = await store.heads([f"c{n}" for n in range(6)])
        return all(h is not None and h.position == h.done == 6 for h in heads)

    await wait_until(all_done, "everything is answered", limit=40)
    assert overlaps == []


def test_what_stays_wrong_is_said_from_time_to_time_and_once_when_it_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(heartbeat, "boottime", lambda: now)
    with capture_logs() as said:
        complaint = heartbeat.Complaint("it is wrong", "it is right")
        complaint.over()
        for _ in range(100):
            complaint.say(error="why")
        now += heartbeat.AGAIN_S
        complaint.say(error="why else")
        complaint.over()
        complaint.over()
        complaint.say()
    assert [(line["event"], line["times"], line.get("error")) for line in said] == [
        ("it is wrong", 1, "why"),
        ("it is wrong", 101, "why else"),
        ("it is right", 101, None),
        ("it is wrong", 1, None),
    ]
