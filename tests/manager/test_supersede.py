"""A node that is started again under its name, beside what is left of its former incarnation (I7, I10, I11)."""

from __future__ import annotations

import dataclasses

import pytest

from convener.manager.members import Members
from convener.manager.turn import Turn
from convener.testing.cluster import QUICK, InProcessCluster
from tests.manager.conftest import MakeCluster, join
from tests.support.waiting import wait_until

pytestmark = pytest.mark.anyio

SLOW = dataclasses.replace(QUICK, lease_ttl=120.0)
"""A lease that no test waits for."""


async def echo(turn: Turn) -> None:
    await turn.reply(turn.data)


async def members(cluster: InProcessCluster, index: int) -> set[str]:
    return set((await cluster[index].engine.node.store.membership()).members)


def incarnation(cluster: InProcessCluster, index: int) -> str:
    return cluster[index].engine.node.incarnation


async def nobody_is_looked_at(_: Members) -> None:
    """When many are silent, or there is grace, the fast burial buries nobody; here it is sure to."""


async def test_a_cluster_that_was_killed_goes_on_as_soon_as_it_is_started_again(
    make_cluster: MakeCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Members, "_look", nobody_is_looked_at)
    cluster = await make_cluster(echo, nodes=3, options=SLOW)
    former = [incarnation(cluster, index) for index in range(3)]
    for index in range(3):
        await cluster[index].maybe_start_agent_loop(f"c{index}", user_id=f"u{index}")
    for index in range(3):
        await cluster.kill(index)
    for index in range(3):
        await cluster.add(f"node-{index}")
    sinks = [await join(cluster, 3 + index, f"c{index}", "s", user_id=f"u{index}") for index in range(3)]
    for index, sink in enumerate(sinks):
        await cluster[5 - index].send_event_to_conversation(f"c{index}", {"text": "are you there?"})
        await wait_until(sink.replies, f"c{index} answers")
    state = await cluster[3].engine.node.store.membership()
    assert set(state.dead) == set(former)
    told = {name: (burial.kind, burial.by.rpartition("~")[0]) for name, burial in state.burials.items()}
    assert told == {name: ("superseded", name.rpartition("~")[0]) for name in former}, "each by its own successor"


async def test_a_frozen_node_is_superseded_and_comes_back_as_somebody_new(
    make_cluster: MakeCluster, capsys: pytest.CaptureFixture[str]
) -> None:
    cluster = await make_cluster(echo, nodes=2, options=SLOW)
    await cluster[0].maybe_start_agent_loop("c", user_id="u")
    old, heartbeat = incarnation(cluster, 0), cluster[0].heartbeat
    assert heartbeat is not None
    # It holds its live channel, so nobody buries it; and it does nothing, as a process that was stopped.
    heartbeat.last_tick = float("-inf")
    heartbeat.tick = lambda: None
    await cluster.add("node-0")
    await wait_until(lambda: old in cluster[2].engine.node.buried, "it is superseded")
    await cluster[2].send_event_to_conversation("c", {"text": "a"})
    heartbeat.last_tick = float("inf")
    await wait_until(lambda: incarnation(cluster, 0) != old, "it has learnt that")
    await wait_until(lambda: len(cluster[0].engine.node.buried) == 1 and cluster[0].readiness().ready, "it is back")
    assert await members(cluster, 1) == {incarnation(cluster, index) for index in range(3)}
    await wait_until(lambda: "another process runs under" in capsys.readouterr().out, "the mistake is told")


async def test_two_processes_with_one_name_live_side_by_side_and_say_so(
    make_cluster: MakeCluster, capsys: pytest.CaptureFixture[str]
) -> None:
    cluster = await make_cluster(echo, nodes=1, options=SLOW)
    await cluster[0].maybe_start_agent_loop("c", user_id="u")
    await cluster.add("node-0")
    told = ""

    def said() -> bool:
        nonlocal told
        told += capsys.readouterr().out
        return "another process runs under this node's name" in told

    await wait_until(said, "the mistake is told")
    assert f"other={incarnation(cluster, 0)}" in told
    assert await members(cluster, 0) == {incarnation(cluster, 0), incarnation(cluster, 1)}
    assert dict((await cluster[0].engine.node.store.membership()).dead) == {}


async def test_a_node_that_still_leaves_is_not_taken_for_a_mistake(
    make_cluster: MakeCluster, capsys: pytest.CaptureFixture[str]
) -> None:
    cluster = await make_cluster(echo, nodes=1, options=SLOW)
    old, before = incarnation(cluster, 0), await cluster[0].engine.node.store.membership()
    cluster[0].engine.node.draining = True
    await cluster.add("node-0")

    async def renewed() -> bool:
        member = (await cluster[1].engine.node.store.membership()).members[old]
        return member.deadline - before.members[old].deadline > 6 * member.renew

    await wait_until(renewed, "it has renewed often")
    assert "another process" not in capsys.readouterr().out
    await cluster.leave(0)
    assert await members(cluster, 1) == {incarnation(cluster, 1)}


async def test_a_former_incarnation_with_other_settings_is_given_its_time(make_cluster: MakeCluster) -> None:
    """Without fast burial it may act for nearly its whole lease; its successor has it switched on."""
    before = dataclasses.replace(QUICK, lease_ttl=5.0, fast_burial=False)
    cluster = await make_cluster(echo, nodes=1, options=before)
    old, heartbeat, lease = incarnation(cluster, 0), cluster[0].heartbeat, cluster[0].engine.node.lease
    assert heartbeat is not None
    heartbeat.last_tick = float("-inf")
    heartbeat.tick = lambda: None
    cluster._options = dataclasses.replace(before, fast_burial=True)
    await cluster.add("node-0")
    acted = True

    def is_buried() -> bool:
        nonlocal acted
        acted = lease.valid() if old not in cluster[1].engine.node.buried else acted
        return old in cluster[1].engine.node.buried

    await wait_until(is_buried, "it is superseded")
    assert not acted
    heartbeat.last_tick = float("inf")
    await wait_until(lambda: incarnation(cluster, 0) != old, "it has learnt that")
