"""Stores that are there again with less than they had confirmed, under nodes that go on."""

from __future__ import annotations

import asyncio
import json
import secrets
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import asynccontextmanager
from typing import Any, cast

import msgspec
import pytest

from convener.core import cursor as cursors
from convener.core.cursor import Cursor
from convener.core.model import AppendRequest, LogEntry, NewMessage
from convener.errors import ConvenerError, StoreUnavailable
from convener.manager.ops import FallbackReport
from convener.manager.published import Publication
from convener.manager.turn import Turn
from convener.testing.cluster import InProcessCluster, RecordingSink
from tests.manager.conftest import audit, join
from tests.manager.stepped import Steps
from tests.support.servers import FLAVOURS, Flavour, Server, binary
from tests.support.topologies import tell
from tests.support.waiting import wait_until

pytestmark = [pytest.mark.anyio, pytest.mark.xdist_group("falling stores")]


@pytest.fixture(params=FLAVOURS)
def server(request: pytest.FixtureRequest) -> Iterator[Server]:
    """A server that a restart takes back to when it was saved last."""
    flavour = cast("Flavour", request.param)
    if binary(flavour) is None:
        pytest.skip(f"no {flavour} server is installed on this machine")
    with Server(flavour, persistence="rdb") as one:
        yield one


def fall_back(server: Server) -> None:
    """Lose everything since the last save."""
    server.kill()
    server.start()


async def answer(turn: Turn) -> None:
    turn.state["answered"] = turn.state.get("answered", 0) + 1
    await turn.reply({"to": turn.input.message_id, "n": turn.state["answered"]})


@asynccontextmanager
async def running(server: Server, agent: Any = answer, nodes: int = 2) -> AsyncGenerator[InProcessCluster]:
    """A cluster whose data the auditor likes in the end."""
    async with InProcessCluster(agent, url=server.url, nodes=nodes) as cluster:
        yield cluster
        await audit(cluster)


async def send(cluster: InProcessCluster, cid: str, message_id: str, node: int = 0) -> None:
    async def is_accepted() -> bool:
        await cluster[node].send_event_to_conversation(cid, {"text": message_id}, user_id="u", message_id=message_id)
        return True

    await wait_until(is_accepted, f"{message_id} is accepted", 30, retry_on=ConvenerError)


async def talked(cluster: InProcessCluster, cid: str, *message_ids: str, node: int = 0) -> RecordingSink:
    """A conversation in which some messages were answered."""
    sink = await join(cluster, node, cid, f"{cid}.{secrets.token_hex(4)}")
    for message_id in message_ids:
        await send(cluster, cid, message_id, node)
    await wait_until(lambda: answers(sink) == list(message_ids), f"{message_ids} are answered")
    return sink


def shown(sink: RecordingSink) -> list[dict[str, Any]]:
    """The log as a client has it: what came since it was last told to begin again (I9)."""
    resyncs = [i for i, (event, _) in enumerate(sink.sent) if event == "resync"]
    return [payload for event, payload in sink.sent[max(resyncs, default=-1) + 1 :] if event == "event"]


def answers(sink: RecordingSink) -> list[str]:
    return [entry["data"]["to"] for entry in shown(sink) if entry["kind"] == "reply"]


def runner(cluster: InProcessCluster, cid: str) -> Any:
    """The owner's loop."""
    owner = cluster.owner_of(cid)
    assert owner is not None
    return cluster[owner].engine.runners[cid]


async def log(cluster: InProcessCluster, cid: str) -> Sequence[LogEntry]:
    page = await cluster[0].engine.node.store.read(cid, Cursor(), 1000)
    assert page is not None
    return page.entries


async def reports(cluster: InProcessCluster, node: int = 0) -> list[FallbackReport]:
    """What a node tells its operators, when it has looked at everything."""

    def verified() -> list[FallbackReport]:
        found = list(cluster[node].readiness().fallbacks)
        return found if found and all(report.verified for report in found) else []

    return await wait_until(verified, "everything is verified", 30)


def counted(cluster: InProcessCluster, name: str, node: int = 0) -> float:
    return cluster[node].metrics.registry.get_sample_value(f"convener_{name}_total") or 0


async def test_lost_entries_are_repaired_under_their_old_ids(server: Server) -> None:
    async with running(server) as cluster:
        await talked(cluster, "c", "m1")
        other = await join(cluster, 1, "c", "other")
        tell(server, "SAVE")
        await send(cluster, "c", "m2")
        await wait_until(lambda: answers(other) == ["m1", "m2"], "m2 is answered")
        before = await log(cluster, "c")
        await asyncio.to_thread(fall_back, server)
        (report,) = await reports(cluster)
        await send(cluster, "c", "m3", 1)
        await wait_until(lambda: answers(other)[-1:] == ["m3"], "m3 is answered")
        after = await log(cluster, "c")
        assert after[: len(before)] == before
        assert {entry.epoch for entry in after} == {runner(cluster, "c").epoch}
        assert (report.way, report.unrepaired) == ("restart", 0)
        assert report.lost == report.repaired > 0
        assert counted(cluster, "log_entries_lost") == counted(cluster, "log_entries_repaired") == report.lost


async def test_a_conversation_that_is_gone_is_there_again(server: Server) -> None:
    """Head, ownership, log, state, slot, record, lists: all of it came after the last save."""
    async with running(server) as cluster:
        await talked(cluster, "other", "m1")
        tell(server, "SAVE")
        sink = await talked(cluster, "c", "m1", "m2")
        before, head = await log(cluster, "c"), await cluster[0].engine.node.store.head("c")
        await asyncio.to_thread(fall_back, server)
        (report,) = await reports(cluster)
        store = cluster[0].engine.node.store
        after = await store.head("c")
        assert head is not None
        assert after is not None
        assert (after.owner, after.epoch, after.nonce) == (head.owner, head.epoch, head.nonce)
        assert (after.created, after.position, after.done) == (head.created, head.position, head.done)
        assert await log(cluster, "c") == before
        assert report.lost == report.repaired == len(before)
        assert "c" in [cid for cid, _ in await store.list_user("u", None, 10)]
        await send(cluster, "c", "m3", 1)
        await wait_until(lambda: answers(sink) == ["m1", "m2", "m3"], "m3 is answered")
        assert sink.replies()[-1]["n"] == 3


async def test_a_repeated_message_is_known_after_the_repair(server: Server) -> None:
    async with running(server) as cluster:
        sink = await talked(cluster, "c", "m1")
        tell(server, "SAVE")
        await send(cluster, "c", "m2")
        await wait_until(lambda: answers(sink) == ["m1", "m2"], "m2 is answered")
        await asyncio.to_thread(fall_back, server)
        await reports(cluster)
        result = await cluster[1].send_event_to_conversation("c", {}, user_id="u", message_id="m2")
        assert result.duplicate
        await send(cluster, "c", "m3")
        await wait_until(lambda: answers(sink)[-1:] == ["m3"], "m3 is answered")
        assert [e.event for e in await log(cluster, "c") if '"m2"' in e.event and '"input"' in e.event] != []


async def test_messages_that_come_before_the_repair_get_positions_of_their_own(server: Server) -> None:
    """The store gives the positions of the lost messages out again."""
    steps = Steps()
    async with InProcessCluster(answer, url=server.url, nodes=2, wrap=steps.wrap) as cluster:
        sink = await talked(cluster, "c", "m1")
        tell(server, "SAVE")
        for message_id in ("m2", "m3"):
            await send(cluster, "c", message_id)
        await wait_until(lambda: answers(sink) == ["m1", "m2", "m3"], "all are answered")
        repair = steps.stores[0].hold("repair")
        await asyncio.to_thread(fall_back, server)
        await asyncio.wait_for(repair.reached.wait(), 30)
        reply = await wait_until(
            lambda: steps.stores[1].send("c", NewMessage("x1", "u", '"x"'), max_pending=10),
            "x1 is stored",
            retry_on=StoreUnavailable,
        )
        assert (reply.outcome, reply.position) == ("OK", 2)
        again = await steps.stores[1].send("c", NewMessage("m3", "u", '"x"'), max_pending=10)
        assert (again.outcome, again.position) == ("OK", 3)
        repair.go()
        await wait_until(lambda: answers(sink)[-1:] == ["x1"], "x1 is answered")
        turns = [json.loads(e.event)["turn"] for e in await log(cluster, "c") if '"kind":"input"' in e.event]
        assert turns == ["t1", "t2", "t3", "t4"]
        await audit(cluster)


async def test_what_nobody_remembers_is_reported_and_owned_anew(server: Server) -> None:
    """I9: whoever was shown what is lost is told to begin again."""
    async with running(server) as cluster:
        sink = await talked(cluster, "c", "m1")
        other = await join(cluster, 1, "c", "other")
        tell(server, "SAVE")
        await send(cluster, "c", "m2")
        await wait_until(lambda: answers(sink) == answers(other) == ["m1", "m2"], "m2 is answered")
        epoch = runner(cluster, "c").epoch
        runner(cluster, "c").appender.tail.clear()
        await asyncio.to_thread(fall_back, server)
        (report,) = await reports(cluster)
        assert (report.repaired, report.unrepaired) == (0, 1)
        assert report.lost == counted(cluster, "log_entries_lost") > 0
        await send(cluster, "c", "m3", 1)
        for client in (sink, other):
            await wait_until(lambda c=client: answers(c)[-1:] == ["m3"], "m3 is answered")
            assert client.named("resync")
        assert runner(cluster, "c").epoch > epoch


async def test_what_was_given_back_is_given_back_again(server: Server) -> None:
    """I6, I12: the store says again that this node owns a conversation of which it knows nothing any more."""
    async with running(server) as cluster:
        await talked(cluster, "c", "m1")
        manager = cluster[0]
        await wait_until(lambda: runner(cluster, "c").status == "idle", "the conversation is idle")
        tell(server, "SAVE")
        assert await manager.engine.hibernate("c")
        assert await manager.engine.node.store.slot("u", "c") is None
        await asyncio.to_thread(fall_back, server)
        await reports(cluster)

        async def is_owned() -> bool:
            head = await manager.engine.node.store.head("c")
            return head is not None and cluster.owner_of("c") is not None

        await wait_until(is_owned, "the conversation has an owner that knows it", 30, retry_on=ConvenerError)


async def test_a_membership_that_is_lost_goes_on_under_the_same_name(server: Server) -> None:
    async with running(server, nodes=1) as cluster:
        tell(server, "SAVE")
        await cluster.add()
        sink = await talked(cluster, "c", "m1", node=1)
        incarnation = cluster[1].engine.node.incarnation
        await asyncio.to_thread(fall_back, server)
        await reports(cluster, 1)
        await send(cluster, "c", "m2")
        await wait_until(lambda: answers(sink) == ["m1", "m2"], "m2 is answered")
        assert cluster[1].engine.node.incarnation == incarnation
        assert incarnation in (await cluster[0].engine.node.store.membership()).members


async def test_burials_that_are_lost_are_written_again(server: Server) -> None:
    async with running(server) as cluster:
        await talked(cluster, "c", "m1", node=1)
        assert cluster.owner_of("c") == 1
        sink = await join(cluster, 0, "c", "client")
        dead = cluster[1].engine.node.incarnation
        tell(server, "SAVE")
        await cluster.kill(1)
        node = cluster[0].engine.node
        await wait_until(lambda: dead in node.buried, "the dead node is buried", 30)
        await wait_until(lambda: cluster.owner_of("c") == 0, "the other node has taken over", 30)
        await asyncio.to_thread(fall_back, server)
        await reports(cluster)
        await wait_until(lambda: dead in node.buried, "the burial counts again", 30)
        assert dead in (await node.store.membership()).dead
        await send(cluster, "c", "m2")
        await wait_until(lambda: answers(sink) == ["m1", "m2"], "m2 is answered")


async def test_nothing_is_done_before_it_was_verified(server: Server) -> None:
    """Though nothing is missing: who cannot know yet may not act."""
    steps = Steps()
    async with InProcessCluster(answer, url=server.url, nodes=2, wrap=steps.wrap) as cluster:
        sink = await talked(cluster, "c", "m1")
        tell(server, "SAVE")
        owned = runner(cluster, "c")
        seen = steps.stores[0].hold("index")
        await asyncio.to_thread(fall_back, server)
        await asyncio.wait_for(seen.reached.wait(), 30)
        before = await log(cluster, "c")
        reply = await steps.stores[1].send("c", NewMessage("x1", "u", '"x"'), max_pending=10)
        assert reply.outcome == "OK"
        owned.heard(publication(reply.position, "x1"))
        assert await log(cluster, "c") == before
        assert owned.appender.held
        seen.go()
        await wait_until(lambda: answers(sink) == ["m1", "x1"], "x1 is answered")
        assert owned.epoch == runner(cluster, "c").epoch
        await audit(cluster)


def publication(position: int, message_id: str) -> Publication:
    return Publication(t="in", pos=position, id=message_id, kind="message", user="u", ts=1, data=msgspec.Raw(b'"x"'))


async def test_a_loss_that_no_connection_shows_is_noticed(server: Server) -> None:
    """The same process, the same line of replication, and nothing in it."""
    async with running(server) as cluster:
        sink = await talked(cluster, "c", "m1")
        before = await log(cluster, "c")
        tell(server, "FLUSHALL")
        (report,) = await reports(cluster)
        assert (report.way, report.conversations) == ("unnoticed", 1)
        assert report.lost == report.repaired == len(before)
        assert await log(cluster, "c") == before
        await send(cluster, "c", "m2", 1)
        await wait_until(lambda: answers(sink) == ["m1", "m2"], "m2 is answered")


# -- what clients keep to resume ---------------------------------------------------------------------------------------


def place(sink: RecordingSink) -> Cursor:
    """What the client would resume from."""
    found = cursors.parse(shown(sink)[-1]["cursor"])
    assert found is not None
    return found


async def test_a_client_resumes_exactly_after_a_repair(server: Server) -> None:
    async with running(server) as cluster:
        sink = await talked(cluster, "c", "m1")
        tell(server, "SAVE")
        await send(cluster, "c", "m2")
        await wait_until(lambda: answers(sink) == ["m1", "m2"], "m2 is answered")
        kept = place(sink)
        await asyncio.to_thread(fall_back, server)
        await reports(cluster)
        again = await join(cluster, 1, "c", "again", after=kept)
        await send(cluster, "c", "m3")
        await wait_until(lambda: answers(again) == ["m3"], "m3 is answered")
        assert again.named("resync") == []
        assert [entry["seq"] for entry in shown(again)] == list(
            range(kept.place.seq + 1, len(await log(cluster, "c")) + 1)
        )


async def test_a_cursor_that_is_not_known_any_more_begins_again(server: Server) -> None:
    """I9: though the log has an entry of that number again, which is another one."""
    async with running(server) as cluster:
        sink = await talked(cluster, "c", "m1")
        tell(server, "SAVE")
        await send(cluster, "c", "m2")
        await wait_until(lambda: answers(sink) == ["m1", "m2"], "m2 is answered")
        kept = place(sink)
        runner(cluster, "c").appender.tail.clear()
        await asyncio.to_thread(fall_back, server)
        await reports(cluster)
        for message_id in ("m3", "m4"):
            await send(cluster, "c", message_id)
        await wait_until(lambda: answers(sink)[-1:] == ["m4"], "all is answered")
        entries = await log(cluster, "c")
        assert entries[kept.place.seq - 1].seq == kept.place.seq
        assert entries[kept.place.seq - 1].epoch != kept.place.epoch
        for node in (0, 1):
            again = await join(cluster, node, "c", f"again.{node}", after=kept)
            await wait_until(lambda c=again: len(shown(c)) == len(entries), "the client has the log")
            assert next(event for event, _ in again.sent if event in ("resync", "event")) == "resync"
            assert [entry["seq"] for entry in shown(again)] == list(range(1, len(entries) + 1))
        page = await cluster[1].engine.node.store.read("c", kept, 10)
        assert page is not None
        assert page.resync


def closes(cid: str, request: AppendRequest) -> bool:
    """Whether an append ends a conversation that is being stopped."""
    return request.closing == "stopped"


async def test_a_stop_that_is_lost_before_it_was_obeyed_is_asked_for_again(server: Server) -> None:
    """Nobody is told that a conversation is stopped because the store has forgotten that it was to be (I15)."""
    steps = Steps()
    async with InProcessCluster(answer, url=server.url, nodes=2, wrap=steps.wrap) as cluster:
        await talked(cluster, "c", "m1")
        tell(server, "SAVE")
        closing = steps.stores[0].hold("append", closes)
        stopping = asyncio.ensure_future(cluster[1].close_session("c", "why"))
        await asyncio.wait_for(closing.reached.wait(), 30)
        await asyncio.to_thread(fall_back, server)
        await wait_until(lambda: cluster[1].readiness().fallbacks, "the fall-back is noticed")
        closing.go()
        await stopping
        head = await cluster[1].engine.node.store.head("c")
        assert head is not None
        assert (head.status, head.owner) == ("stopped", "")
        await audit(cluster)


def takes_in_m2(cid: str, request: AppendRequest) -> bool:
    """Whether an append takes the second message in."""
    return any('"message_id":"m2"' in text for text in request.events)


async def test_what_was_not_confirmed_does_not_take_the_place_of_what_came_since(server: Server) -> None:
    """I8: the append of a message whose acceptance is lost names a position that the store has given out again."""
    steps = Steps()
    async with InProcessCluster(answer, url=server.url, nodes=2, wrap=steps.wrap) as cluster:
        sink = await talked(cluster, "c", "m1")
        tell(server, "SAVE")
        late = steps.stores[0].hold("append", takes_in_m2)
        lost = await steps.stores[1].send("c", NewMessage("m2", "u", '"x"'), max_pending=10)
        await asyncio.wait_for(late.reached.wait(), 30)
        looked = steps.stores[0].hold("head")
        await asyncio.to_thread(fall_back, server)
        await asyncio.wait_for(looked.reached.wait(), 30)
        message = NewMessage("x1", "u", '"x"')
        since = await wait_until(
            lambda: steps.stores[1].send("c", message, max_pending=10), "x1 is stored", retry_on=StoreUnavailable
        )
        assert since.position == lost.position
        looked.go()
        late.go()
        await wait_until(lambda: answers(sink)[-1:] == ["x1"], "x1 is answered")
        await audit(cluster)
