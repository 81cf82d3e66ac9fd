"""The clustered manager: one owner, one order, every message once."""

from __future__ import annotations

import asyncio
import dataclasses
from types import SimpleNamespace
from typing import Any

import pytest

from convener.core.cursor import Cursor, parse
from convener.errors import (
    CallTimeout,
    ConversationBusy,
    ConversationFailed,
    ConversationStopped,
    InboxFull,
    InvalidRequest,
    NotAuthorized,
    NotFound,
    OwnerUnavailable,
    PayloadTooLarge,
    RemoteError,
)
from convener.manager import ClusteredConversationManager
from convener.manager.conversation import Conversation
from convener.manager.turn import Turn
from convener.testing.cluster import QUICK, FunctionAgent, RecordingSink
from tests.manager.conftest import MakeCluster, join
from tests.support.waiting import wait_until

pytestmark = pytest.mark.anyio


async def echo(turn: Turn) -> None:
    await turn.reply({"text": turn.text})


class Gate:
    """An agent that answers when it is let."""

    def __init__(self) -> None:
        self.open = asyncio.Event()
        self.begun: list[tuple[str, int]] = []
        self.cancelled = 0

    async def __call__(self, turn: Turn) -> None:
        self.begun.append((turn.id, turn.attempt))
        try:
            await self.open.wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        await turn.reply({"text": turn.text, "attempt": turn.attempt, "reason": turn.reason})


async def test_simultaneous_starts_have_one_owner(make_cluster: MakeCluster) -> None:
    cluster = await make_cluster(echo, limit=100)
    for number in range(10):
        cid = f"c{number}"
        infos = await asyncio.gather(*(m.maybe_start_agent_loop(cid, user_id="u") for m in cluster for _ in range(3)))
        assert len({(i.node, i.epoch) for i in infos}) == 1
        assert sum(i.created for i in infos) == 1
        assert sum(m.get_agent_session(cid) is not None for m in cluster) == 1


async def test_all_clients_see_one_order(make_cluster: MakeCluster) -> None:
    cluster = await make_cluster(echo)
    sinks = [await join(cluster, node, "c", f"s{node}") for node in range(3)]

    async def talk(node: int) -> None:
        for n in range(20):
            ident = f"{node}.{n}"
            first = await cluster[node].send_event_to_conversation("c", {"text": ident}, message_id=ident)
            again = await cluster[(node + 1) % 3].send_event_to_conversation("c", {"text": ident}, message_id=ident)
            assert again.duplicate
            assert again.position == first.position

    await asyncio.gather(*(talk(node) for node in range(3)))
    for sink in sinks:
        await wait_until(lambda s=sink: len(s.replies()) == 60, "60 replies arrive")
    assert sinks[0].events == sinks[1].events == sinks[2].events
    assert [e["seq"] for e in sinks[0].events] == list(range(1, len(sinks[0].events) + 1))
    late = await join(cluster, 1, "c", "late")
    await wait_until(lambda: late.named("joined"), "the late client has joined")
    assert late.events == sinks[0].events
    assert late.named("joined")[0]["last_seq"] == len(late.events)


async def test_resuming_from_any_place(make_cluster: MakeCluster) -> None:
    cluster = await make_cluster(echo)
    whole = await join(cluster, 0, "c", "s")
    for n in range(5):
        await cluster[0].send_event_to_conversation("c", {"text": str(n)})
    await wait_until(lambda: len(whole.replies()) == 5, "5 replies arrive")
    events = whole.events
    for number, event in enumerate(events):
        for place in (parse(event["cursor"]), parse(event["seq"])):
            sink = await join(cluster, (number + 1) % 3, "c", "again", after=place)
            await wait_until(lambda s=sink: s.named("joined"), "joined")
            assert sink.events == events[number + 1 :]
            assert not sink.named("resync")
    sink = await join(cluster, 2, "c", "tail", tail=4)
    await wait_until(lambda: sink.named("joined"), "joined")
    assert sink.events == events[-4:]


async def test_a_cursor_of_another_history_means_resync(make_cluster: MakeCluster) -> None:
    cluster = await make_cluster(echo)
    whole = await join(cluster, 0, "c", "s")
    await cluster[0].send_event_to_conversation("c", {"text": "x"})
    await wait_until(whole.replies, "a reply arrives")
    good = parse(whole.events[1]["cursor"])
    assert good is not None
    strange = [
        Cursor("anotherlog", good.place),
        Cursor(good.generation, dataclasses.replace(good.place, epoch=good.place.epoch + 1)),
        Cursor(good.generation, dataclasses.replace(good.place, seq=99)),
    ]
    for number, cursor in enumerate(strange):
        sink = await join(cluster, 1, "c", f"strange{number}", after=cursor)
        await wait_until(lambda s=sink: s.named("joined"), "joined")
        assert next(name for name, _ in sink.sent) == "resync"
        assert sink.events == whole.events


async def test_a_client_that_does_not_read_holds_nobody_up(make_cluster: MakeCluster) -> None:
    cluster = await make_cluster(echo)
    good, slow = await join(cluster, 0, "c", "good"), RecordingSink()
    await cluster[0].join_conversation("c", "slow", user_id="u", sink=slow)
    slow.gate.clear()
    cluster[0].begin_replay("slow")
    # Far more than a view keeps in memory, so that the slow one has to read the store later.
    for n in range(120):
        await cluster[1].send_event_to_conversation("c", {"text": str(n)})
        if n % 50 == 49:
            await wait_until(lambda k=n: len(good.replies()) == k + 1, "the good client keeps up")
    await wait_until(lambda: len(good.replies()) == 120, "the good client has all")
    assert len(good.events) > 256
    assert slow.events == []
    slow.gate.set()
    await wait_until(lambda: len(slow.events) == len(good.events), "the slow one catches up")
    assert slow.events == good.events


async def test_refusals_of_messages(make_cluster: MakeCluster) -> None:
    gate = Gate()
    options = dataclasses.replace(QUICK, max_pending_messages=3, max_payload_bytes=1000)
    cluster = await make_cluster(gate, options=options)
    await cluster[0].maybe_start_agent_loop("c", user_id="u")
    manager = cluster[1]
    with pytest.raises(NotFound):
        await manager.send_event_to_conversation("unknown", {})
    with pytest.raises(NotFound):
        await manager.send_to_event_stream("nobody", {})
    with pytest.raises(PayloadTooLarge):
        await manager.send_event_to_conversation("c", {"text": "x" * 1000})
    for bad in ("", "a b", "x" * 129, "é"):
        with pytest.raises(InvalidRequest):
            await manager.send_event_to_conversation("c", {}, message_id=bad)
    with pytest.raises(InvalidRequest):
        await manager.send_event_to_conversation("c", object())
    await manager.send_event_to_conversation("c", {}, message_id="m1")
    with pytest.raises(ConversationBusy):
        await manager.send_event_to_conversation("c", {}, overlap="reject")
    await manager.send_event_to_conversation("c", {})
    await manager.send_event_to_conversation("c", {})
    with pytest.raises(InboxFull):
        await manager.send_event_to_conversation("c", {})
    assert (await manager.send_event_to_conversation("c", {}, message_id="m1")).duplicate
    gate.open.set()
    assert await manager.close_session("c") == "stopped"
    with pytest.raises(ConversationStopped):
        await manager.send_event_to_conversation("c", {})
    with pytest.raises(NotAuthorized):
        await manager.maybe_start_agent_loop("c", user_id="somebody.else")


async def test_large_payloads_travel_by_number(make_cluster: MakeCluster) -> None:
    cluster = await make_cluster(echo)
    sinks = [await join(cluster, node, "c", f"s{node}") for node in range(3)]
    text = "x" * 100_000
    for node in range(3):
        await cluster[node].send_event_to_conversation("c", {"text": f"{node}{text}"})
    for sink in sinks:
        await wait_until(lambda s=sink: len(s.replies()) == 3, "3 large replies arrive")
        assert [r["text"][0] for r in sink.replies()] == ["0", "1", "2"]
    assert sinks[0].events == sinks[1].events == sinks[2].events


async def test_a_failing_agent_fails_its_turn_only(make_cluster: MakeCluster) -> None:
    async def agent(turn: Turn) -> None:
        turn.state["n"] = turn.state.get("n", 0) + 1
        await turn.reply({"n": turn.state["n"]})
        if turn.text == "bad":
            raise RuntimeError("a secret of the server")

    cluster = await make_cluster(agent)
    sink = await join(cluster, 0, "c", "s")
    for text in ("good", "bad", "good"):
        await cluster[1].send_event_to_conversation("c", {"text": text})
    await wait_until(lambda: len([e for e in sink.events if e["kind"] == "turn_done"]) == 2, "two turns are done")
    assert sink.replies() == [{"n": 1}, {"n": 2}]
    failed = [e for e in sink.events if e["kind"] == "turn_failed"]
    assert len(failed) == 1
    assert failed[0]["turn"] == "t2"
    assert "secret" not in str(failed)


async def test_crash_of_the_owner_with_clients(make_cluster: MakeCluster) -> None:
    gate = Gate()
    cluster = await make_cluster(gate)
    sink = await join(cluster, 1, "c", "s")
    owner = cluster.owner_of("c")
    assert owner == 1
    elsewhere = await join(cluster, 2, "c", "s2")
    for n in range(3):
        await cluster[0].send_event_to_conversation("c", {"text": str(n)}, message_id=f"m{n}")
    await wait_until(lambda: gate.begun, "the first turn has begun")
    await cluster.kill(1)
    await cluster[0].send_event_to_conversation("c", {"text": "3"}, message_id="m3")
    gate.open.set()
    await wait_until(lambda: len(elsewhere.replies()) == 4, "all four are answered")
    assert [r["text"] for r in elsewhere.replies()] == ["0", "1", "2", "3"]
    assert elsewhere.replies()[0] == {"text": "0", "attempt": 2, "reason": "takeover"}
    inputs = [e["data"]["message_id"] for e in elsewhere.events if e["kind"] == "input"]
    assert inputs == ["m0", "m1", "m2", "m3"]
    assert [e["seq"] for e in elsewhere.events] == list(range(1, len(elsewhere.events) + 1))
    seen = sink.events
    assert seen == elsewhere.events[: len(seen)]


async def test_crash_of_the_owner_without_clients(make_cluster: MakeCluster) -> None:
    gate = Gate()
    cluster = await make_cluster(gate)
    await cluster[0].maybe_start_agent_loop("busy", user_id="u", initial_user_msg={"text": "work"})
    await cluster[0].maybe_start_agent_loop("idle", user_id="u")
    await wait_until(lambda: gate.begun, "the turn has begun")
    await cluster.kill(0)
    gate.open.set()
    store = cluster[1].engine.node.store

    async def settled() -> bool:
        busy, idle = await store.heads(["busy", "idle"])
        assert busy is not None
        assert idle is not None
        return busy.done == 1 and busy.owner != "" and not idle.owner

    await wait_until(settled, "the busy one is answered elsewhere, the idle one is disowned")
    slots = await wait_until(lambda: _slots(store, {"busy"}), "only the busy one holds a slot")
    assert set(slots) == {"busy"}
    assert (await cluster[2].describe("idle")).status == "hibernated"
    await cluster[2].send_event_to_conversation("idle", {"text": "wake up"})
    await wait_until(lambda: cluster.owner_of("idle") == 2, "the next message wakes it")


async def _slots(store: Any, expected: set[str]) -> Any:
    slots = await store.slots("u")
    return slots if set(slots) == expected else None


async def test_three_takeovers_give_a_turn_up(make_cluster: MakeCluster) -> None:
    gate = Gate()
    cluster = await make_cluster(gate, nodes=4)
    await cluster[0].maybe_start_agent_loop("c", user_id="u", initial_user_msg={"text": "poison"})
    await cluster[0].send_event_to_conversation("c", {"text": "next"})
    for attempt in range(1, 4):
        await wait_until(lambda a=attempt: len(gate.begun) >= a, f"attempt {attempt} has begun")
        owner = cluster.owner_of("c")
        assert owner is not None
        await cluster.kill(owner)
    last = next(i for i, m in enumerate(cluster.managers) if m is not None)

    async def is_given_up() -> bool:
        return (await cluster[last].describe("c")).status == "failed"

    await wait_until(is_given_up, "the conversation is given up")
    sink = await join(cluster, last, "c", "s")
    gate.open.set()
    with pytest.raises(ConversationFailed):
        await cluster[last].send_event_to_conversation("c", {"text": "refused"})
    assert await cluster[last].resume("c") == "resumed"
    await wait_until(sink.replies, "the next message is answered")
    failed = [e for e in sink.events if e["kind"] == "turn_failed"]
    assert [(e["turn"], e["data"]["code"]) for e in failed] == [("t1", "too_many_takeovers")]
    assert [t for t, _ in gate.begun] == ["t1", "t1", "t1", "t2"]


async def test_a_clean_exit_leaves_nothing_behind(make_cluster: MakeCluster) -> None:
    cluster = await make_cluster(echo)
    sink = await join(cluster, 1, "c", "s")
    await cluster[0].maybe_start_agent_loop("c2", user_id="u")
    incarnation = cluster[0].engine.node.incarnation
    await cluster.leave(0)
    store = cluster[1].engine.node.store
    head = await store.head("c2")
    assert head is not None
    assert head.owner == ""
    assert set(await store.slots("u")) == {"c"}
    assert incarnation in (await store.membership()).dead
    await cluster[2].send_event_to_conversation("c2", {"text": "x"})
    await cluster.leave(1)
    await cluster[2].send_event_to_conversation("c", {"text": "y"})
    late = await join(cluster, 2, "c", "late")
    await wait_until(late.replies, "it is answered on the last node")
    assert sink.events == late.events[: len(sink.events)]


async def test_calls_reach_the_owner(make_cluster: MakeCluster) -> None:
    cancelled = asyncio.Event()

    async def add(conversation: Conversation, params: Any) -> Any:
        return {"sum": params["a"] + params["b"], "id": conversation.id, "epoch": conversation.epoch}

    async def fail(conversation: Conversation, params: Any) -> Any:
        raise ValueError("no good")

    async def hang(conversation: Conversation, params: Any) -> Any:
        try:
            await asyncio.Event().wait()
        finally:
            cancelled.set()

    async def llm(conversation: Conversation, params: Any) -> Any:
        return [params["service_id"], len(params["messages"])]

    methods = {"add": add, "fail": fail, "hang": hang, "llm_completion": llm}
    cluster = await make_cluster(FunctionAgent(echo, methods))
    info = await cluster[0].maybe_start_agent_loop("c", user_id="u")
    for manager in cluster:
        result = await manager.call("c", "add", {"a": 1, "b": 2})
        assert result == {"sum": 3, "id": "c", "epoch": info.epoch}
        with pytest.raises(RemoteError, match="ValueError: no good"):
            await manager.call("c", "fail")
        with pytest.raises(NotFound, match="no method"):
            await manager.call("c", "nothing")
        assert await manager.request_llm_completion("c", "gpt", [{"role": "user"}]) == ["gpt", 1]
    with pytest.raises(NotFound):
        await cluster[1].call("unknown", "add", {})
    with pytest.raises(CallTimeout):
        await cluster[1].call("c", "hang", timeout=0.2)
    await asyncio.wait_for(cancelled.wait(), 20)
    call = asyncio.create_task(cluster[1].call("c", "hang", timeout=60))
    cancelled.clear()
    await wait_until(lambda: cluster[0]._calls.serving, "the owner works on the call")
    await cluster.kill(0)
    with pytest.raises(OwnerUnavailable):
        await call


async def test_the_directory_equals_the_nodes_hashes(make_cluster: MakeCluster) -> None:
    cluster = await make_cluster(echo, limit=100)
    for number in range(12):
        await cluster[number % 3].maybe_start_agent_loop(f"c{number}", user_id=f"u{number % 2}")
    await join(cluster, 0, "c0", "s0", user_id="u0")
    await join(cluster, 1, "c0", "s1", user_id="u0")

    async def agree(manager: ClusteredConversationManager) -> bool:
        running = await manager.get_running_agent_loops()
        return running == {f"c{n}" for n in range(12)} and await manager.get_connections() == {"s0": "c0", "s1": "c0"}

    for manager in cluster:
        await wait_until(lambda m=manager: agree(m), "every node knows all conversations and clients")
        assert await manager.get_running_agent_loops("u1", {"c1", "c2", "x"}) == {"c1"}
        assert await manager.get_running_agent_loops(None, set()) == set()
        assert await manager.get_connections("u1") == {}
        assert (await manager.get_connections("u0", {"c0"})).keys() == {"s0", "s1"}
        infos = {i.conversation_id: i for i in await manager.get_agent_loop_info("u0")}
        assert infos["c0"].connections == 2
        assert infos["c4"].node == "node-1"
    await cluster[0].disconnect_from_session("s0")
    await cluster[2].close_session("c1")
    for manager in cluster:
        await wait_until(
            lambda m=manager: _gone(m),
            "the closed one and the client are forgotten everywhere",
        )


async def _gone(manager: ClusteredConversationManager) -> bool:
    return not await manager.is_agent_loop_running("c1") and await manager.get_connections() == {"s1": "c0"}


async def test_handles_read_without_being_clients(make_cluster: MakeCluster) -> None:
    cluster = await make_cluster(echo)
    await cluster[0].maybe_start_agent_loop("c", user_id="u")
    assert await cluster[1].attach_to_conversation("unknown") is None
    handle = await cluster[1].attach_to_conversation("c", "u")
    assert handle is not None
    assert cluster[1].engine.views.get("c") is not None
    await cluster[1].detach_from_conversation(handle)
    await cluster[1].detach_from_conversation(handle)
    assert cluster[1].engine.views.get("c") is None


async def test_metadata_lists_and_deletion(make_cluster: MakeCluster) -> None:
    cluster = await make_cluster(echo, limit=10)
    for number in range(5):
        await cluster[number % 3].maybe_start_agent_loop(f"c{number}", user_id="u", metadata={"n": number})
    assert (await cluster[1].describe("c3")).metadata == {"n": 3}
    changed = await cluster[2].set_metadata("c3", {"title": "x"})
    assert changed.metadata == {"title": "x"}
    rows = await cluster[0].list_conversations("u", None, 3)
    more = await cluster[0].list_conversations("u", (rows[-1].activity, rows[-1].info.conversation_id), 10)
    assert {r.info.conversation_id for r in [*rows, *more]} == {f"c{n}" for n in range(5)}
    await cluster[1].delete("c3")
    with pytest.raises(NotFound):
        await cluster[0].describe("c3")
    with pytest.raises(NotFound):
        await cluster[0].delete("c3")
    assert len(await cluster[0].list_conversations("u", None, 10)) == 4


def test_the_callers_config_stays_untouched() -> None:
    config = SimpleNamespace(max_concurrent_conversations=3)
    managers = [ClusteredConversationManager(config=config) for _ in range(3)]
    assert config.max_concurrent_conversations == 3
    assert [m.config.max_concurrent_conversations for m in managers] == [4, 4, 4]
