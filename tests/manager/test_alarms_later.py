"""Alarms of conversations that cannot take them when they come due: stopped, deleted, held, full, asking."""

from __future__ import annotations

import asyncio
import dataclasses
from typing import Any

import pytest

from convener.errors import NotFound
from convener.manager.turn import Turn
from convener.testing.cluster import QUICK, InProcessCluster
from tests.manager.conftest import MakeCluster
from tests.manager.people import (
    asked,
    head_of,
    hibernated,
    keys_of,
    log_of,
    no_timer_is_due,
    settled,
    store_of,
    unowned,
    waits,
)
from tests.manager.stepped import Stepped
from tests.manager.test_alarms import Clock, is_recorded, rings, rung, started
from tests.manager.test_recovery_modes import mode
from tests.support.waiting import wait_until

pytestmark = pytest.mark.anyio


async def test_a_stopped_conversation_is_not_rung(make_cluster: MakeCluster) -> None:
    cluster = await make_cluster((clock := Clock()).agent)
    await started(cluster, {"set": [[0.5, "in a moment"], [86_400, "tomorrow"]]})
    await settled(cluster, "c")
    await cluster[1].close_session("c")

    async def is_dropped() -> bool:
        return await store_of(cluster).alarms("c") == {"alarm/t1.2": '"tomorrow"'}

    await wait_until(is_dropped, "the one that came due is dropped")
    await no_timer_is_due(cluster, "c")
    assert (await head_of(cluster, "c")).status == "stopped"
    assert clock.rang == []


async def test_one_that_is_resumed_in_time_is_rung(make_cluster: MakeCluster) -> None:
    cluster = await make_cluster((clock := Clock()).agent)
    await started(cluster)
    await cluster[0].call("c", "set", [[2.0, "still there"]])
    await cluster[1].close_session("c")
    await cluster[2].resume("c")
    await rung(cluster, clock, 1)
    assert clock.rang[0][1] == "still there"


async def test_a_deleted_conversation_leaves_nothing_over(make_cluster: MakeCluster) -> None:
    cluster = await make_cluster((clock := Clock()).agent)
    for cid in ("c", "d"):
        await started(cluster, {"set": [[0.3, "soon"], [86_400, "tomorrow"], [3e9, "much later"]]}, cid)
        await settled(cluster, cid)
    await asyncio.gather(cluster[1].delete("c"), cluster[2].delete("d"))

    async def is_clean() -> bool:
        return await keys_of(cluster) == set()

    await wait_until(is_clean, "nothing is left of them")
    with pytest.raises(NotFound):
        await cluster[1].describe("c")
    # The same name again is another conversation: nothing rings in it.
    await started(cluster, {"set": [[0, "its own"]]})
    await wait_until(lambda: ("alarm/t1.1", "its own") in clock.rang, "its own alarm rings")
    await settled(cluster, "c")
    assert await rings(cluster) == ["its own"]


async def test_a_held_conversation_is_rung_after_it_was_resumed(
    make_cluster: MakeCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("convener.manager.timers.AGAIN_MS", 300)
    stepped = Stepped(make_cluster)
    clock = Clock()
    cluster = await stepped.start(clock.agent, options=mode("wait"))
    await started(cluster)
    await cluster[0].call("c", "set", [[3600, "later"]])
    clock.open.clear()
    await cluster[0].send_event_to_conversation("c", {})
    await wait_until(lambda: _has_begun(cluster), "the turn runs")
    fired: list[str] = []

    def is_seen(cid: str, alarm_id: str, **options: Any) -> bool:
        fired.append(alarm_id)
        return False

    for store in stepped.stores[1:]:
        store.hold("fire", is_seen)
    await cluster.kill(0)

    async def is_held() -> bool:
        return (await head_of(cluster, "c")).status == "held"

    await wait_until(is_held, "it is held")
    # Only now: an alarm that is due before would ring before.
    store = cluster[1].engine.node.store
    (alarm_id,) = await store.alarms("c")
    await store.set_timer("c", alarm_id, 0)
    await wait_until(lambda: len(fired) > 1, "it was tried, and tried again")
    clock.open.set()
    await cluster[1].resume("c")
    await rung(cluster, clock, 1)


async def _has_begun(cluster: InProcessCluster) -> bool:
    return "turn_started" in [e["kind"] for e in await log_of(cluster, "c")]


async def test_a_full_inbox_is_rung_when_there_is_room(
    make_cluster: MakeCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("convener.manager.timers.AGAIN_MS", 300)
    stepped = Stepped(make_cluster)
    clock = Clock()
    cluster = await stepped.start(clock.agent, options=dataclasses.replace(QUICK, max_pending_messages=2))
    fired: list[str] = []

    def is_seen(cid: str, alarm_id: str, **options: Any) -> bool:
        fired.append(alarm_id)
        return False

    for store in stepped.stores:
        store.hold("fire", is_seen)
    await started(cluster)
    clock.open.clear()
    for _ in range(2):
        await cluster[1].send_event_to_conversation("c", {})
    await cluster[0].call("c", "set", [[0, "when there is room"]])
    await wait_until(lambda: len(fired) > 1, "it was tried, and tried again")
    assert (await head_of(cluster, "c")).position == 2
    clock.open.set()
    await rung(cluster, clock, 1)


async def test_it_queues_behind_a_question(make_cluster: MakeCluster) -> None:
    said: list[tuple[str, Any]] = []

    async def agent(turn: Turn) -> None:
        if turn.reason == "new":
            await turn.conversation.schedule(0.3, "ring")
            said.append(("first", await turn.ask("ok?")))
        elif turn.reason == "retry":
            await turn.conversation.schedule(0.3, "ring")
            said.append(("again", await turn.ask("ok?")))
        else:
            said.append((turn.reason, turn.data))

    cluster = await make_cluster(agent)
    await started(cluster, {})
    await asked(cluster, "c")
    await waits(cluster, "c")
    await hibernated(cluster, "c")
    await wait_until(lambda: is_recorded(cluster, "alarm/t1.1"), "it rings")
    await waits(cluster, "c")
    await cluster[1].answer("c", "t1.1", "yes")
    await settled(cluster, "c")
    assert said == [("again", "yes"), ("alarm", "ring")]
    await hibernated(cluster, "c")
    await unowned(cluster, "c")
