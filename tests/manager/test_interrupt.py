"""The stop button: the running turn ends, what it has said is kept, the queue goes on."""

from __future__ import annotations

import asyncio

import pytest

from convener.errors import ConversationStopped, NotFound
from convener.manager.turn import Turn
from tests.manager.conftest import MakeCluster, join
from tests.manager.test_cluster import Gate
from tests.support.waiting import wait_until

pytestmark = pytest.mark.anyio


@pytest.mark.parametrize("node", [0, 1])
async def test_a_press_ends_the_turn_and_keeps_what_was_streamed(make_cluster: MakeCluster, node: int) -> None:
    said = asyncio.Event()

    async def agent(turn: Turn) -> None:
        if turn.text == "talk":
            await turn.reply({"text": "first"})
            await turn.stream("half ")
            await turn.stream("a sentence")
            said.set()
            await asyncio.Event().wait()
        await turn.reply({"text": turn.text})

    cluster = await make_cluster(agent)
    sink = await join(cluster, 0, "c", "s")
    await cluster[0].send_event_to_conversation("c", {"text": "talk"})
    await cluster[1].send_event_to_conversation("c", {"text": "next"})
    await asyncio.wait_for(said.wait(), 20)
    assert await cluster[node].interrupt("c", "t1") == "interrupted"
    await wait_until(lambda: {"text": "next"} in sink.replies(), "the queue goes on")
    assert sink.replies() == [
        {"text": "first"},
        {"text": "half a sentence", "partial": True},
        {"text": "next"},
    ]
    ends = [
        (e["turn"], e["kind"]) for e in sink.events if e["kind"].startswith("turn_") and e["kind"] != "turn_started"
    ]
    assert ends == [("t1", "turn_interrupted"), ("t2", "turn_done")]
    assert await cluster[node].interrupt("c", "t1") in ("stale", "idle")
    assert await cluster[node].interrupt("c") == "idle"
    head = await cluster[0].engine.node.store.head("c")
    assert head is not None
    assert head.done == head.cursor == head.position
    assert await cluster[0].engine.hibernate("c")


async def test_a_press_for_an_earlier_turn_is_stale(make_cluster: MakeCluster) -> None:
    gate = Gate()
    cluster = await make_cluster(gate)
    sink = await join(cluster, 0, "c", "s")
    gate.open.set()
    await cluster[0].send_event_to_conversation("c", {"text": "1"})
    await wait_until(sink.replies, "the first is answered")
    gate.open.clear()
    await cluster[0].send_event_to_conversation("c", {"text": "2"})
    await wait_until(lambda: len(gate.begun) == 2, "the second runs")
    assert await cluster[1].interrupt("c", "t1") == "stale"
    assert gate.cancelled == 0
    gate.open.set()
    await wait_until(lambda: len(sink.replies()) == 2, "the second is answered")


async def test_a_press_holds_while_the_owner_is_replaced(make_cluster: MakeCluster) -> None:
    gate = Gate()
    cluster = await make_cluster(gate)
    await cluster[0].maybe_start_agent_loop("c", user_id="u", initial_user_msg={"text": "1"})
    sink = await join(cluster, 1, "c", "s")
    await wait_until(lambda: gate.begun, "the turn runs")
    await cluster[0].engine.node.store.close()
    assert await cluster[1].interrupt("c", "t1") == "interrupting"
    await cluster.kill(0)
    await cluster[1].send_event_to_conversation("c", {"text": "2"})
    gate.open.set()
    await wait_until(sink.replies, "the next one is answered elsewhere")
    assert [r["text"] for r in sink.replies()] == ["2"]
    assert [e["turn"] for e in sink.events if e["kind"] == "turn_interrupted"] == ["t1"]
    assert [t for t, _ in gate.begun] == ["t1", "t3"]


async def test_an_agent_that_ignores_the_press_is_abandoned(
    make_cluster: MakeCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("convener.manager.turns.TURN_GRACE_S", 0.05)
    release = asyncio.Event()
    begun = asyncio.Event()

    async def agent(turn: Turn) -> None:
        if turn.text == "stubborn":
            begun.set()
            while not release.is_set():
                try:
                    await release.wait()
                except asyncio.CancelledError:
                    continue
            await turn.reply("too late")
        else:
            await turn.reply(turn.text)

    cluster = await make_cluster(agent, nodes=1)
    sink = await join(cluster, 0, "c", "s")
    await cluster[0].send_event_to_conversation("c", {"text": "stubborn"})
    await cluster[0].send_event_to_conversation("c", {"text": "next"})
    await asyncio.wait_for(begun.wait(), 20)
    assert await cluster[0].interrupt("c") == "interrupted"
    await wait_until(lambda: sink.replies() == ["next"], "the queue goes on")
    release.set()
    await cluster[0].send_event_to_conversation("c", {"text": "last"})
    await wait_until(lambda: sink.replies() == ["next", "last"], "the abandoned turn writes nothing")


async def test_refusals(make_cluster: MakeCluster) -> None:
    cluster = await make_cluster(Gate())
    with pytest.raises(NotFound):
        await cluster[0].interrupt("unknown")
    await cluster[0].maybe_start_agent_loop("c", user_id="u")
    assert await cluster[1].interrupt("c") == "idle"
    await cluster[0].close_session("c")
    with pytest.raises(ConversationStopped):
        await cluster[1].interrupt("c")


async def test_a_stop_during_a_press_wins(make_cluster: MakeCluster) -> None:
    gate = Gate()
    cluster = await make_cluster(gate)
    sink = await join(cluster, 0, "c", "s")
    await cluster[0].send_event_to_conversation("c", {"text": "1"})
    await wait_until(lambda: gate.begun, "the turn runs")
    pressed = asyncio.create_task(cluster[1].interrupt("c"))
    assert await cluster[2].close_session("c") in ("stopped", "stopping")
    try:
        assert await pressed in ("interrupted", "interrupting")
    except ConversationStopped:
        assert gate.cancelled == 1
    await asyncio.wait_for(sink.disconnected.wait(), 20)
    kinds = [e["kind"] for e in sink.events]
    assert kinds.count("turn_interrupted") == 1
    assert kinds[-1] == "stopped"
