"""Stops, messages and clients: what once was repeated, lost, or left with nobody to see to it (I8, I9, I11, I15)."""

# pyright: reportPrivateUsage=false

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

import pytest

from convener.core.cursor import Cursor, parse
from convener.core.view import START
from convener.errors import ConvenerError, ConversationStopped, InvalidRequest, PayloadTooLarge
from convener.testing.cluster import InProcessCluster, RecordingSink
from tests.manager.conftest import MakeCluster, join
from tests.manager.stepped import Stepped, answered, idle, position
from tests.manager.test_cluster import Gate, echo
from tests.support.waiting import wait_until

pytestmark = pytest.mark.anyio


@pytest.fixture
def stepped(make_cluster: MakeCluster) -> Stepped:
    return Stepped(make_cluster)


async def hibernated(cluster: InProcessCluster, node: int, cid: str) -> None:
    await cluster[node].maybe_start_agent_loop(cid, user_id="u")
    await idle(cluster[node], cid)
    assert await cluster[node].engine.hibernate(cid)
    await wait_until(lambda: cluster[node].engine.runner(cid) is None, "it has left")


def statuses(sink: RecordingSink) -> list[str]:
    return [payload["status"] for payload in sink.named("status")]


# -- stops -----------------------------------------------------------------------------------------------------------


async def test_a_stop_that_looks_late_does_not_stop_what_was_resumed_since(stepped: Stepped) -> None:
    cluster = await stepped.start(nodes=2)
    await cluster[0].maybe_start_agent_loop("c", user_id="u")
    asked = stepped.stores[1].hold_reply("stop")
    stopping = asyncio.ensure_future(cluster[1].close_session("c"))
    await wait_until(asked.reached.is_set, "the stop is recorded")
    await wait_until(lambda: resumed(cluster), "it is stopped, and opened again")
    await cluster[0].send_event_to_conversation("c", {"text": "x"})
    asked.go()
    assert await stopping == "stopped"
    head = await cluster[0].engine.node.store.head("c")
    assert head is not None
    assert head.status == "running"
    await wait_until(lambda: cluster[0].engine.runner("c"), "it runs on")


async def resumed(cluster: InProcessCluster) -> bool:
    try:
        return await cluster[0].resume("c") == "resumed"
    except ConvenerError:
        return False


async def test_the_news_of_a_stop_does_not_send_away_who_came_after_the_resumption(make_cluster: MakeCluster) -> None:
    cluster = await make_cluster(echo, nodes=2)
    await cluster[0].maybe_start_agent_loop("c", user_id="u")
    epoch = (await cluster[0].describe("c")).epoch
    await cluster[0].close_session("c")
    await cluster[0].resume("c")
    sink = await join(cluster, 1, "c", "s")
    await wait_until(lambda: sink.named("joined"), "joined")
    news = {"type": "conversation_stopped", "conversation_id": "c", "source_node": "other~1", "epoch": epoch}
    tasks = {t for t in asyncio.all_tasks() if t.get_name() == "stopped c"}
    await cluster[1]._process_message(news)
    mine = {t for t in asyncio.all_tasks() if t.get_name() == "stopped c"} - tasks
    await asyncio.wait(mine or {asyncio.ensure_future(asyncio.sleep(0))})
    assert not sink.disconnected.is_set()
    assert not sink.named("stopped")


@pytest.mark.parametrize(("reason", "error"), [("x" * 2_000_000, PayloadTooLarge), ("\ud800", InvalidRequest)])
async def test_a_reason_that_cannot_be_written_is_refused(
    make_cluster: MakeCluster, reason: str, error: type[ConvenerError]
) -> None:
    """The owner could not have written it into the log, and the stop would never have been finished (I15)."""
    gate = Gate()
    cluster = await make_cluster(gate, nodes=1)
    await cluster[0].maybe_start_agent_loop("c", user_id="u", initial_user_msg={"text": "x"})
    await wait_until(lambda: gate.begun, "a turn runs")
    with pytest.raises(error):
        await cluster[0].close_session("c", reason)
    assert await cluster[0].close_session("c", "x" * 1000) == "stopped"


# -- messages --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["its sender went away", "its reply was lost"])
async def test_a_stored_message_is_answered_although(stepped: Stepped, how: str) -> None:
    cluster = await stepped.start(nodes=1)
    await hibernated(cluster, 0, "c")
    store = stepped.stores[0]
    if how == "its reply was lost":
        store.lose_reply("send")
        with pytest.raises(ConvenerError):
            await cluster[0].send_event_to_conversation("c", {"text": "x"})
    else:
        step = store.hold("slot")
        sending = asyncio.ensure_future(cluster[0].send_event_to_conversation("c", {"text": "x"}))
        await wait_until(step.reached.is_set, "the message is stored, its wake is under way")
        sending.cancel()
        await asyncio.wait({sending})
        store.lose("put_record")
        step.go()
    await wait_until(lambda: answered(cluster, "c", 1), "it is answered", limit=5)


async def test_what_was_not_stored_wakes_nobody(stepped: Stepped) -> None:
    cluster = await stepped.start(nodes=1)
    await hibernated(cluster, 0, "c")
    stepped.stores[0].lose("send")
    with pytest.raises(ConvenerError):
        await cluster[0].send_event_to_conversation("c", {"text": "x"})
    await wait_until(lambda: not cluster[0].engine.wakes.owed, "it was looked at", limit=5)
    assert cluster[0].engine.runner("c") is None
    assert await position(cluster, "c") == 0


async def test_deep_data_is_answered_or_refused(make_cluster: MakeCluster) -> None:
    """What is accepted must not be too deep for who takes it in: it would be taken in again for ever."""
    cluster = await make_cluster(echo, nodes=1)
    sink = await join(cluster, 0, "c", "s")
    accepted = 0
    for depth in (50, 500, 900, 930, 950, 970, 985):
        data: Any = 1
        for _ in range(depth):
            data = [data]
        try:
            await cluster[0].send_event_to_conversation("c", data)
            accepted += 1
        except InvalidRequest:
            pass
    await wait_until(lambda: answered(cluster, "c", accepted), "all is answered", limit=10)
    await wait_until(lambda: len(sink.replies()) == accepted, "its client sees all", limit=5)


# -- clients ---------------------------------------------------------------------------------------------------------


async def test_a_departure_that_is_cancelled_is_carried_through(make_cluster: MakeCluster) -> None:
    cluster = await make_cluster(echo, nodes=1)
    await join(cluster, 0, "c", "s")
    await idle(cluster[0], "c")
    leaving = asyncio.ensure_future(cluster[0].disconnect_from_session("s"))
    await asyncio.sleep(0)
    leaving.cancel()
    await asyncio.wait({leaving})
    assert await cluster[0].engine.hibernate("c")
    await wait_until(lambda: cluster[0].engine.views.get("c") is None, "nobody holds the view", limit=5)


async def test_two_joins_of_one_connection_are_one_client(make_cluster: MakeCluster) -> None:
    cluster = await make_cluster(echo, nodes=1)
    await cluster[0].maybe_start_agent_loop("c", user_id="u")
    await asyncio.gather(join(cluster, 0, "c", "s"), join(cluster, 0, "c", "s"))
    await idle(cluster[0], "c")
    await cluster[0].disconnect_from_session("s")
    assert await cluster[0].engine.hibernate("c")
    await wait_until(lambda: cluster[0].engine.views.get("c") is None, "nobody holds the view", limit=5)


async def test_what_is_heard_before_the_place_is_known_has_a_cursor_like_all(stepped: Stepped) -> None:
    """The first `open` follows the beginning, so it was taken before the log's generation was read."""
    cluster = await stepped.start(nodes=2)
    claim = stepped.stores[0].hold("claim")
    starting = asyncio.ensure_future(cluster[0].maybe_start_agent_loop("c", user_id="u"))
    await wait_until(claim.reached.is_set, "it is about to be started")
    page = await stepped.stores[1].read("c", Cursor(), 1)
    read = stepped.stores[1].hold("read")
    joining = asyncio.ensure_future(join(cluster, 1, "c", "early", start=False))
    await wait_until(read.reached.is_set, "a reader has subscribed")
    claim.go()
    await starting
    read.go()
    early = await joining
    await wait_until(lambda: early.events, "the entry is shown")
    late = await join(cluster, 1, "c", "late", after=Cursor(page.generation, START), start=False)
    await wait_until(lambda: late.events, "and to who comes with a cursor of the beginning")
    assert [parse(e["cursor"]) is not None for e in early.events + late.events] == [True, True]


async def test_a_hibernation_that_was_not_heard_of_is_shown_after_the_gap(stepped: Stepped) -> None:
    cluster = await stepped.start(nodes=2)
    sink = await join(cluster, 1, "c", "s", start=True)
    owner = cluster.owner_of("c")
    assert owner is not None
    await idle(cluster[owner], "c")
    await wait_until(lambda: sink.named("joined"), "joined")
    view = cluster[1].engine.views.get("c")
    assert view is not None
    await stepped.stores[1].unsubscribe(view.channel)
    head = await stepped.stores[0].head("c")
    assert await stepped.stores[0].disown("c", head.owner, head.epoch) == "OK"
    await stepped.stores[1].subscribe(view.channel, view.on_publication, view.on_gap)
    view.listener = None
    view.on_gap()
    await wait_until(lambda: statuses(sink)[-1:] == ["hibernated"], "its client is told", limit=5)


async def test_a_status_from_elsewhere_ends_with_the_hibernation(make_cluster: MakeCluster) -> None:
    cluster = await make_cluster(echo, nodes=2)
    await cluster[0].maybe_start_agent_loop("c", user_id="u")
    sink = await join(cluster, 1, "c", "s")
    await wait_until(lambda: sink.named("joined"), "joined")
    head = await cluster[0].engine.node.store.head("c")
    assert head is not None
    news = {"type": "status_update", "conversation_id": "c", "source_node": "other~1", "new_status": "recovering"}
    await cluster[1]._process_message({**news, "epoch": head.epoch})
    await wait_until(lambda: statuses(sink)[-1:] == ["recovering"], "its client is told")
    view = cluster[1].engine.views.get("c")
    assert view is not None
    view.on_publication(b'{"t":"status","epoch":%d,"status":"hibernated"}' % head.epoch)
    await wait_until(lambda: statuses(sink)[-1:] == ["hibernated"], "and of what became of it", limit=5)


class BreakingSink(RecordingSink):
    """A sink that cannot write one kind of entry."""

    async def send(self, connection_id: str, event: str, payload: Mapping[str, Any]) -> None:
        if payload.get("kind") == "input":
            raise ValueError("this cannot be encoded")
        await super().send(connection_id, event, payload)


async def test_a_client_that_cannot_be_written_to_is_sent_away(make_cluster: MakeCluster) -> None:
    """It would stay connected and hear nothing more (I9)."""
    cluster = await make_cluster(echo, nodes=1)
    sink = BreakingSink()
    await cluster[0].join_conversation("c", "s", user_id="u", sink=sink)
    cluster[0].begin_replay("s")
    await cluster[0].send_event_to_conversation("c", {"text": "x"})
    await asyncio.wait_for(sink.disconnected.wait(), 5)
    await cluster[0].disconnect_from_session("s")


async def test_a_stopped_conversation_can_be_read_after_a_forced_farewell(make_cluster: MakeCluster) -> None:
    cluster = await make_cluster(echo, nodes=1)
    first = await join(cluster, 0, "c", "first")
    await wait_until(lambda: first.named("joined"), "joined")
    news = {"type": "conversation_stopped", "conversation_id": "c", "source_node": "other~1", "reason": "gone"}
    await cluster[0]._process_message(news)
    await asyncio.wait_for(first.disconnected.wait(), 10)
    await cluster[0].close_session("c")
    await cluster[0].resume("c")
    await cluster[0].send_event_to_conversation("c", {"text": "x"})
    await cluster[0].close_session("c")
    with pytest.raises(ConversationStopped):
        await cluster[0].send_event_to_conversation("c", {"text": "y"})
    reader = await join(cluster, 0, "c", "reader", start=False)
    await wait_until(lambda: reader.named("joined"), "joined to read")
    await cluster[0].set_metadata("c", {"read": True})
    assert not reader.disconnected.is_set()
