"""Clocks that are set: no decision depends on a node's wall clock, and a store's that jumps buries nobody who lives."""

from __future__ import annotations

import time

import pytest

from convener.manager.turn import Turn
from convener.testing.cluster import InProcessCluster
from tests.manager.conftest import MakeCluster, join
from tests.support.waiting import wait_until

pytestmark = pytest.mark.anyio

HOUR_NS = 3_600 * 10**9


class Clock:
    """The wall clock of this process, which can be set. A store in memory goes by it too, and follows it forward."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.ahead = 0
        real = time.time_ns
        monkeypatch.setattr(time, "time_ns", lambda: real() + self.ahead)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


async def echo(turn: Turn) -> None:
    await turn.step("noted", lambda: turn.text)
    await turn.reply(turn.data)


def lives(cluster: InProcessCluster) -> list[str]:
    return [manager.engine.node.incarnation for manager in cluster]


async def test_wall_clocks_that_jump_change_nothing(make_cluster: MakeCluster, clock: Clock) -> None:
    cluster = await make_cluster(echo, nodes=3)
    before = lives(cluster)
    sinks = [await join(cluster, (n + 1) % 3, f"c{n}", "s", user_id=f"u{n}") for n in range(3)]
    for number, jump in enumerate((24 * HOUR_NS, -48 * HOUR_NS, HOUR_NS, -HOUR_NS), start=1):
        clock.ahead += jump
        for n in range(3):
            await cluster[n].send_event_to_conversation(f"c{n}", {"text": f"after {jump}"})
        for n, sink in enumerate(sinks):
            await wait_until(lambda s=sink, m=number: len(s.replies()) == m, f"c{n} answers after the jump")
    assert lives(cluster) == before
    assert dict((await cluster[0].engine.node.store.membership()).dead) == {}
    for sink in sinks:
        assert [event["data"]["reason"] for event in sink.events if event["kind"] == "open"] == ["start"]


async def test_a_node_that_goes_down_after_a_jump_is_replaced(make_cluster: MakeCluster, clock: Clock) -> None:
    cluster = await make_cluster(echo, nodes=3)
    sink = await join(cluster, 1, "c", "s")
    old = cluster[1].engine.node.incarnation
    assert cluster.owner_of("c") == 1
    watcher = await join(cluster, 2, "c", "t")
    clock.ahead += 24 * HOUR_NS
    clock.ahead -= 48 * HOUR_NS
    await cluster.kill(1)
    await cluster[2].send_event_to_conversation("c", {"text": "are you there?"})
    await wait_until(watcher.replies, "another node answers", 30)
    assert [event["data"]["reason"] for event in watcher.events if event["kind"] == "open"] == ["start", "takeover"]
    assert await cluster[2].engine.node.store.is_buried(old)
    assert sink.replies() == []
