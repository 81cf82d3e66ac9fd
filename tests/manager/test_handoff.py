"""Planned changes of owner: nothing is lost, repeated or run twice, whoever dies in the middle."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import random
from typing import Any

import pytest

from convener.errors import InvalidRequest, LimitExceeded, NotFound, OwnerUnavailable, StoreUnavailable
from convener.manager.context import LimitPolicy
from convener.manager.turn import Turn
from convener.testing.cluster import QUICK, InProcessCluster, RecordingSink
from convener.testing.faults import FaultyStore
from tests.manager.conftest import MakeCluster, join
from tests.support.waiting import wait_until

pytestmark = pytest.mark.anyio


class Work:
    """An agent that counts its turns, and works in steps as long as the gate is closed."""

    def __init__(self) -> None:
        self.gate = asyncio.Event()
        self.begun: list[tuple[str, int, str]] = []
        self.steps: list[str] = []
        self.turns: list[Turn] = []

    async def __call__(self, turn: Turn) -> None:
        if turn.conversation.id == "c":
            self.begun.append((turn.id, turn.attempt, turn.reason))
        self.turns.append(turn)
        turn.state["n"] = turn.state.get("n", 0) + 1
        if turn.text == "work":
            for i in range(3):
                await turn.step("part", self.part, f"{turn.id}.{i}")
        if turn.text == "ask":
            await turn.reply({"answer": await turn.ask("sure?")})
            return
        await turn.reply({"n": turn.state["n"], "text": turn.text})

    async def part(self, name: str) -> str:
        self.steps.append(name)
        if name.endswith(".1"):
            await self.gate.wait()
        return name


def reasons(sink: RecordingSink) -> list[str]:
    return [e["data"]["reason"] for e in sink.events if e["kind"] == "open"]


async def owner(cluster: InProcessCluster, cid: str = "c") -> str:
    return (await cluster[next(i for i, m in enumerate(cluster.managers) if m)].describe(cid)).node


async def slot_is_right(cluster: InProcessCluster, user: str = "u", cid: str = "c") -> None:
    """The owner's slot names the owner, under the owner's nonce (I6)."""
    store = next(iter(cluster)).engine.node.store
    head, slot = await store.head(cid), await store.slot(user, cid)
    assert head is not None
    assert slot is not None
    assert (slot.incarnation, slot.nonce) == (head.owner, head.nonce)


async def test_an_idle_conversation_moves_to_any_node(make_cluster: MakeCluster) -> None:
    work = Work()
    cluster = await make_cluster(work)
    await cluster[0].maybe_start_agent_loop("c", user_id="u", initial_user_msg={"text": "a"})
    sink = await join(cluster, 2, "c", "s")
    await wait_until(sink.replies, "it is answered")
    # From the owner, from the target, from neither; and back.
    for asked, target in ((0, 1), (2, 2), (0, 1), (1, 0)):
        assert await cluster[asked].move("c", f"node-{target}") == "moved"
        assert await owner(cluster) == f"node-{target}"
        await slot_is_right(cluster)
    assert await cluster[1].move("c", "node-0") == "there"
    await cluster[1].send_event_to_conversation("c", {"text": "b"})
    await wait_until(lambda: len(sink.replies()) == 2, "it goes on")
    assert sink.replies()[1] == {"n": 2, "text": "b"}
    assert reasons(sink) == ["start", "handoff", "handoff", "handoff", "handoff"]


async def test_what_does_not_run_is_started_there(make_cluster: MakeCluster) -> None:
    cluster = await make_cluster(Work())
    await cluster[0].maybe_start_agent_loop("c", user_id="u")
    await wait_until(lambda: cluster[0].engine.hibernate("c"), "it hibernates")
    assert await cluster[0].move("c", "node-2") == "moved"
    assert await owner(cluster) == "node-2"


async def test_a_turn_under_way_is_not_cut_off_unasked(make_cluster: MakeCluster) -> None:
    work = Work()
    cluster = await make_cluster(work)
    await cluster[0].maybe_start_agent_loop("c", user_id="u", initial_user_msg={"text": "work"})
    sink = await join(cluster, 1, "c", "s")
    await wait_until(lambda: len(work.steps) == 2, "it works")
    assert await cluster[1].move("c", "node-1") == "busy"
    assert await cluster[2].move("c", "node-1", cut=True) == "moved"
    await cluster[0].send_event_to_conversation("c", {"text": "next"})
    await wait_until(lambda: len(work.begun) == 2, "it is begun again there")
    work.gate.set()
    await wait_until(lambda: len(sink.replies()) == 2, "both are answered")
    assert work.begun == [("t1", 1, "new"), ("t1", 2, "handoff"), ("t2", 1, "new")]
    assert work.steps == ["t1.0", "t1.1", "t1.1", "t1.2"], "a recorded step runs once"
    assert [r["n"] for r in sink.replies()] == [1, 2]
    head = await cluster[0].engine.node.store.head("c")
    assert head is not None
    assert head.strikes == 0, "a planned move is not what takes nodes down"


async def test_a_drain_stops_at_a_step_and_drops_nothing(make_cluster: MakeCluster) -> None:
    work = Work()
    cluster = await make_cluster(work, options=dataclasses.replace(QUICK, drain_timeout=4.0))
    await cluster[0].maybe_start_agent_loop("c", user_id="u", initial_user_msg={"text": "work"})
    await cluster[0].maybe_start_agent_loop("idle", user_id="u", initial_user_msg={"text": "hello"})
    sink = await join(cluster, 1, "c", "s")
    await wait_until(lambda: len(work.steps) == 2, "it works")
    await cluster[0].send_event_to_conversation("c", {"text": "queued"})
    leaving = asyncio.create_task(cluster.leave(0))
    await wait_until(lambda: any(turn.stopped for turn in work.turns), "its time is over: it may go to its next step")
    work.gate.set()
    await leaving
    await wait_until(lambda: len(sink.replies()) == 2, "both are answered")
    assert [r["n"] for r in sink.replies()] == [1, 2]
    assert work.steps == ["t1.0", "t1.1", "t1.2"], "it stopped between two steps"
    assert work.begun == [("t1", 1, "new"), ("t1", 2, "handoff"), ("t2", 1, "new")]
    assert reasons(sink) == ["start", "handoff"], "nobody had to recover anything"
    assert (await cluster[1].describe("idle")).status == "hibernated"


async def test_a_turn_that_does_not_end_is_begun_again_elsewhere(make_cluster: MakeCluster) -> None:
    work = Work()
    cluster = await make_cluster(work, options=dataclasses.replace(QUICK, drain_timeout=0.5))
    await cluster[0].maybe_start_agent_loop("c", user_id="u", initial_user_msg={"text": "work"})
    sink = await join(cluster, 1, "c", "s")
    await wait_until(lambda: len(work.steps) == 2, "it works")
    await cluster.leave(0)
    await wait_until(lambda: len(work.begun) == 2, "it is begun again")
    work.gate.set()
    await wait_until(sink.replies, "it is done")
    assert sink.replies() == [{"n": 1, "text": "work"}]
    assert reasons(sink) == ["start", "handoff"]


async def test_a_question_survives_a_drain(make_cluster: MakeCluster) -> None:
    cluster = await make_cluster(Work())
    await cluster[0].maybe_start_agent_loop("c", user_id="u", initial_user_msg={"text": "ask"})
    sink = await join(cluster, 1, "c", "s")
    await wait_until(lambda: [e for e in sink.events if e["kind"] == "ask"], "it asks")
    await cluster.leave(0)
    assert (await cluster[1].describe("c")).status == "waiting"
    assert await cluster[1].engine.node.store.slots("u") == {}, "who waits for a person holds no slot"
    await cluster[2].answer("c", "t1.1", "yes")
    await wait_until(sink.replies, "it goes on")
    assert sink.replies() == [{"answer": "yes"}]


@pytest.mark.parametrize("victim", ["source", "target"])
@pytest.mark.parametrize("moment", ["reserve", "claim"])
async def test_either_node_may_die_in_the_middle(make_cluster: MakeCluster, victim: str, moment: str) -> None:
    work = Work()
    work.gate.set()
    held = Held()
    cluster = await make_cluster(work, wrap=held.wrap_target)
    await cluster[0].maybe_start_agent_loop("c", user_id="u", initial_user_msg={"text": "a"})
    sink = await join(cluster, 2, "c", "s")
    await wait_until(sink.replies, "it is answered")
    held.hold(moment)
    moving = asyncio.create_task(cluster[2].move("c", "node-1"))
    await wait_until(lambda: held.reached, f"the target is at its {moment}")
    await cluster.kill(0 if victim == "source" else 1)
    held.release()
    with pytest.raises(OwnerUnavailable):
        await moving
    await cluster[2].send_event_to_conversation("c", {"text": "b"})
    await wait_until(lambda: len(sink.replies()) == 2, "it goes on somewhere")
    assert [r["n"] for r in sink.replies()] == [1, 2]
    await wait_until(lambda: _settled(cluster), "owner and slot agree")


class Held:
    """Holds one kind of command of one node back until it is released."""

    def __init__(self) -> None:
        self._name = ""
        self._gate = asyncio.Event()
        self.reached = False

    def hold(self, name: str) -> None:
        self._name = name

    def release(self) -> None:
        self._name = ""
        self._gate.set()

    def wrap_target(self, index: int, store: Any) -> Any:
        return self.wrap(store) if index == 1 else store

    def wrap(self, store: Any) -> Any:
        outer = self

        class Store:
            def __getattr__(self, name: str) -> Any:
                value = getattr(store, name)
                if name not in ("reserve", "claim"):
                    return value

                async def call(*args: Any, **options: Any) -> Any:
                    if outer._name == name:
                        outer.reached = True
                        await outer._gate.wait()
                    return await value(*args, **options)

                return call

        return Store()


async def test_lost_replies_cost_time_and_nothing_else(make_cluster: MakeCluster) -> None:
    seed = random.randrange(10**6)
    stores: list[FaultyStore] = []

    def faulty(index: int, store: Any) -> Any:
        stores.append(FaultyStore(store, random.Random(seed + index)))
        return stores[-1]

    work = Work()
    cluster = await make_cluster(work, wrap=faulty)
    await cluster[0].maybe_start_agent_loop("c", user_id="u")
    sink = await join(cluster, 2, "c", "s")
    count = 6
    for i in range(count):
        for store in stores:
            store.rate = 0.2
        try:
            with contextlib.suppress(OwnerUnavailable, StoreUnavailable):
                await cluster[i % 3].move("c", f"node-{(i + 1) % 3}", cut=True)
        finally:
            for store in stores:
                store.rate = 0.0
        await cluster[i % 3].send_event_to_conversation("c", {"text": str(i)}, message_id=f"m{i}")
    await wait_until(lambda: len(sink.replies()) == count, f"all are answered (seed {seed})")
    assert [r["n"] for r in sink.replies()] == list(range(1, count + 1)), f"seed {seed}"
    await wait_until(lambda: _settled(cluster), f"owner and slot agree (seed {seed})")


async def _settled(cluster: InProcessCluster) -> bool:
    store = next(iter(cluster)).engine.node.store
    head, slot = await store.head("c"), await store.slot("u", "c")
    if head is None or not head.owner or slot is None:
        return head is not None and not head.owner and slot is None
    return (slot.incarnation, slot.nonce) == (head.owner, head.nonce)


async def test_where_to_has_to_be_a_node(make_cluster: MakeCluster) -> None:
    cluster = await make_cluster(Work())
    await cluster[0].maybe_start_agent_loop("c", user_id="u")
    with pytest.raises(NotFound, match="no node nowhere"):
        await cluster[0].move("c", "nowhere")
    with pytest.raises(NotFound, match="no conversation"):
        await cluster[0].move("d", "node-1")
    with pytest.raises(InvalidRequest):
        await cluster[0].move("c d", "node-1")


# --- a node that is drained and goes on being asked ------------------------------------------------------------------


async def drained(cluster: InProcessCluster, index: int, timeout: float | None = None) -> None:
    """Drain a node that is not ended."""
    await cluster[index].drain(None, timeout)
    await wait_until(lambda: cluster[index].drain_status().state == "drained", f"node {index} is drained")


@pytest.mark.parametrize("policy", ["reject", "queue"])
async def test_the_limit_is_the_same_through_a_node_that_leaves(make_cluster: MakeCluster, policy: LimitPolicy) -> None:
    work = Work()
    cluster = await make_cluster(work, limit=1, options=dataclasses.replace(QUICK, limit_policy=policy))
    await cluster[1].maybe_start_agent_loop("c", user_id="u", initial_user_msg={"text": "work"})
    await wait_until(lambda: len(work.steps) == 2, "it works")
    await drained(cluster, 0)
    store = cluster[1].engine.node.store
    if policy == "reject":
        with pytest.raises(LimitExceeded) as refused:
            await cluster[0].maybe_start_agent_loop("d", user_id="u", initial_user_msg={"text": "one more"})
        assert (refused.value.limit, refused.value.running) == (1, ("c",))
        assert await store.head("d") is None, "a refused start leaves nothing"
        work.gate.set()
        return
    await cluster[0].maybe_start_agent_loop("d", user_id="u", initial_user_msg={"text": "one more"})
    assert [w.conversation_id for w in await store.waiting("u")] == ["d"]
    work.gate.set()
    sink = await join(cluster, 1, "d", "s", start=False)
    await cluster[1].close_session("c")
    await wait_until(sink.replies, "it has come to its turn")


async def test_what_no_node_takes_is_taken_as_soon_as_there_is_one(make_cluster: MakeCluster) -> None:
    """Drained by request a node does not end: what it could not give away must not be its own for ever."""
    work = Work()
    cluster = await make_cluster(work, nodes=1)
    await cluster[0].maybe_start_agent_loop("c", user_id="u", initial_user_msg={"text": "work"})
    sink = await join(cluster, 0, "c", "s")
    await wait_until(lambda: len(work.steps) == 2, "it works")
    await drained(cluster, 0, 0.2)
    with pytest.raises(OwnerUnavailable):
        await cluster[0].send_event_to_conversation("c", {"text": "b"}, message_id="m")
    index = await cluster.add()
    await wait_until(lambda: len(work.begun) == 2, "it is begun again there")
    assert work.begun[1] == ("t1", 2, "handoff"), "its turn was ended on purpose"
    work.gate.set()
    await wait_until(lambda: len(sink.replies()) == 2, "both are answered")
    assert (await cluster[index].send_event_to_conversation("c", {"text": "b"}, message_id="m")).duplicate
    head = await cluster[index].engine.node.store.head("c")
    assert head is not None
    assert head.strikes == 0


async def test_a_target_that_leaves_too_is_passed_over(
    make_cluster: MakeCluster, capsys: pytest.CaptureFixture[str]
) -> None:
    work = Work()
    cluster = await make_cluster(work)
    await cluster[0].maybe_start_agent_loop("c", user_id="u", initial_user_msg={"text": "work"})
    sink = await join(cluster, 2, "c", "s")
    await wait_until(lambda: len(work.steps) == 2, "it works")
    await cluster[0].send_event_to_conversation("c", {"text": "queued"})
    # The others do not know yet that it leaves: nobody is told before its next renewal.
    cluster[1].engine.node.draining = True
    draining = asyncio.create_task(drained(cluster, 0, 0.2))
    await wait_until(lambda: len(work.begun) == 2, "it goes on")
    work.gate.set()
    await draining
    await wait_until(lambda: len(sink.replies()) == 2, "both are answered")
    assert cluster.owner_of("c") == 2
    assert "left to recovery" not in capsys.readouterr().out
    assert set(reasons(sink)) <= {"start", "handoff"}
