"""Conversations that wait for a person: what they show, what they hold, how they leave memory and come back."""

from __future__ import annotations

import asyncio
import dataclasses
from typing import Any

import pytest

from convener.errors import AskClosed, ConversationStopped, LimitExceeded, NotFound
from convener.manager.base import AgentLoopInfo
from convener.manager.turn import Turn
from convener.testing.cluster import QUICK, InProcessCluster
from tests.manager.conftest import MakeCluster, join
from tests.manager.people import (
    ask,
    asked,
    ends,
    head_of,
    hibernated,
    keys_of,
    kinds_of,
    log_of,
    recorded,
    replies_of,
    settled,
    store_of,
    unowned,
    waits,
)
from tests.manager.stepped import Stepped
from tests.support.waiting import wait_until

pytestmark = pytest.mark.anyio


async def waiting(cluster: InProcessCluster, cid: str, node: int = 0) -> None:
    """Start a conversation on a node that asks, and return when it waits."""
    await cluster[node].maybe_start_agent_loop(cid, user_id="u", initial_user_msg={"ask": "ok?"})
    await asked(cluster, cid)
    assert await waits(cluster, cid) == node


async def infos(cluster: InProcessCluster, node: int, cid: str) -> list[AgentLoopInfo]:
    """What the node says of the conversation: by its head, in the user's list, by the directory if it is there."""
    rows = await cluster[node].list_conversations("u", None, 100)
    listed = [row.info for row in rows if row.info.conversation_id == cid]
    assert len(listed) == 1
    return [await cluster[node].describe(cid), *listed, *await cluster[node].get_agent_loop_info("u", {cid})]


async def test_what_it_shows(make_cluster: MakeCluster) -> None:
    cluster = await make_cluster(ask)
    await waiting(cluster, "c")
    for node in range(3):

        async def is_shown(node: int = node) -> bool:
            found = await infos(cluster, node, "c")
            return len(found) == 3 and {(i.status, i.busy, i.node) for i in found} == {("waiting", False, "node-0")}

        await wait_until(is_shown, f"node {node} shows that it waits")
        assert await cluster[node].is_agent_loop_running("c")
    await hibernated(cluster, "c")
    for node in range(3):

        async def is_gone(node: int = node) -> bool:
            found = await infos(cluster, node, "c")
            return len(found) == 2 and {(i.status, i.busy, i.node) for i in found} == {("waiting", False, "")}

        await wait_until(is_gone, f"node {node} shows that it waits and is not loaded")
        assert not await cluster[node].is_agent_loop_running("c")
    await cluster[1].answer("c", "t1.1", "yes")
    await settled(cluster, "c")
    for node in range(3):

        async def is_idle(node: int = node) -> bool:
            found = await infos(cluster, node, "c")
            return len(found) == 3 and {(i.status, i.busy, i.node) for i in found} == {("idle", False, "node-1")}

        await wait_until(is_idle, f"node {node} shows that it is idle")


async def test_it_hibernates_after_a_while_and_then_holds_no_slot(make_cluster: MakeCluster) -> None:
    cluster = await make_cluster(ask, options=dataclasses.replace(QUICK, hibernate_after=0.2))
    await cluster[0].maybe_start_agent_loop("c", user_id="u", initial_user_msg={"ask": "ok?"})
    sink = await join(cluster, 1, "c", "s")
    await asked(cluster, "c")
    await unowned(cluster, "c")
    assert await store_of(cluster).slots("u") == {}
    # Its client is still there, and sees the rest when somebody has answered.
    await cluster[2].answer("c", "t1.1", "yes")
    await wait_until(sink.replies, "the client sees the reply")
    await settled(cluster, "c")
    await unowned(cluster, "c")
    assert (await cluster[0].describe("c")).status == "hibernated"


async def test_an_answered_turn_is_worked_on_and_not_hibernated(make_cluster: MakeCluster) -> None:
    open_ = asyncio.Event()

    async def agent(turn: Turn) -> None:
        await turn.ask("ok?")
        await open_.wait()
        await turn.reply("done")

    cluster = await make_cluster(agent)
    await waiting(cluster, "c")
    await cluster[1].answer("c", "t1.1", "yes")

    def works() -> bool:
        return cluster[0].engine.runner("c").status == "running"

    await wait_until(works, "it works")
    assert not await cluster[0].engine.hibernate("c")
    info = await cluster[1].describe("c")
    assert (info.status, info.busy) == ("running", True)
    open_.set()
    await settled(cluster, "c")
    assert await replies_of(cluster, "c") == ["done"]


# -- slots


@pytest.mark.parametrize("policy", ["evict_idle", "reject", "queue"])
async def test_it_makes_room_for_a_new_start(make_cluster: MakeCluster, policy: Any) -> None:
    cluster = await make_cluster(ask, limit=2, options=dataclasses.replace(QUICK, limit_policy=policy))
    await waiting(cluster, "a")
    await waiting(cluster, "b", 1)
    for number, cid in enumerate(("x", "y")):
        info = await cluster[2].maybe_start_agent_loop(cid, user_id="u")
        assert info.started_here
        assert len(await store_of(cluster).slots("u")) == 2
        assert {(await cluster[0].describe(c)).node for c in "ab"} == ({"", "node-1"} if number == 0 else {""})
    for cid in ("a", "b"):
        assert [q.ask_id for q in await cluster[2].questions(cid)] == ["t1.1"]


async def test_idle_conversations_are_no_room_under_reject(make_cluster: MakeCluster) -> None:
    cluster = await make_cluster(ask, limit=1, options=dataclasses.replace(QUICK, limit_policy="reject"))
    await cluster[0].maybe_start_agent_loop("idle", user_id="u")
    with pytest.raises(LimitExceeded):
        await cluster[1].maybe_start_agent_loop("new", user_id="u")
    assert cluster.owner_of("idle") == 0


@pytest.mark.parametrize("policy", ["evict_idle", "reject", "queue"])
async def test_an_answer_when_the_limit_is_met_is_taken_and_waits_for_a_slot(
    make_cluster: MakeCluster, policy: Any
) -> None:
    gates = {"b": asyncio.Event()}

    async def agent(turn: Turn) -> None:
        if turn.conversation.id in gates:
            await gates[turn.conversation.id].wait()
        else:
            await ask(turn)

    cluster = await make_cluster(agent, limit=1, options=dataclasses.replace(QUICK, limit_policy=policy))
    await waiting(cluster, "a")
    await cluster[1].maybe_start_agent_loop("b", user_id="u", initial_user_msg={})
    await unowned(cluster, "a")
    result = await cluster[2].answer("a", "t1.1", "yes", message_id="m")
    assert (result.position, result.duplicate) == (2, False)
    assert [w.conversation_id for w in await store_of(cluster).waiting("u")] == ["a"]
    assert not (await head_of(cluster, "a")).owner
    assert (await cluster[0].describe("a")).status == "starting"
    if policy == "evict_idle":
        # Idle again, it makes room at the next try of who waits.
        gates["b"].set()
    else:
        await cluster[0].close_session("b")
    await settled(cluster, "a")
    assert [r["said"] for r in await replies_of(cluster, "a")] == ["yes"]
    assert set(await store_of(cluster).slots("u")) == {"a"}
    assert not await store_of(cluster).waiting("u")


async def test_an_answer_is_not_refused_with_the_message_beside_it(make_cluster: MakeCluster) -> None:
    """Under `reject` a message to a conversation without a slot is refused, an answer is not; both need one start."""
    stepped = Stepped(make_cluster)
    open_ = asyncio.Event()

    async def agent(turn: Turn) -> None:
        await (open_.wait() if turn.conversation.id == "b" else ask(turn))

    cluster = await stepped.start(agent, limit=1, options=dataclasses.replace(QUICK, limit_policy="reject"))
    await waiting(cluster, "a")
    await cluster[1].maybe_start_agent_loop("b", user_id="u", initial_user_msg={})
    await unowned(cluster, "a")
    looking = stepped.stores[2].hold("slots")
    message = asyncio.create_task(cluster[2].send_event_to_conversation("a", {"text": "hello"}))
    await asyncio.wait_for(looking.reached.wait(), 20)
    answer = asyncio.create_task(cluster[2].answer("a", "t1.1", "yes"))

    await asked(cluster, "a", 0)
    looking.go()
    with pytest.raises(LimitExceeded):
        await message
    await answer
    await cluster[0].close_session("b")
    await settled(cluster, "a")
    assert [r["said"] for r in await replies_of(cluster, "a")] == ["yes"]


# -- ends


@pytest.mark.parametrize("life", ["loaded", "hibernated", "its node is gone"])
async def test_stop(make_cluster: MakeCluster, life: str) -> None:
    cluster = await make_cluster(ask)
    await waiting(cluster, "c")
    sink = await join(cluster, 1, "c", "s", start=False)
    if life == "hibernated":
        await hibernated(cluster, "c")
    elif life != "loaded":
        await cluster.kill(0)
    assert await cluster[2].close_session("c", "enough") == "stopped"
    await asyncio.wait_for(sink.disconnected.wait(), 20)
    assert await cluster[1].questions("c") == []
    with pytest.raises(ConversationStopped):
        await cluster[1].answer("c", "t1.1", "yes")
    assert (await kinds_of(cluster, "c", ""))[-1] == "stopped"
    await unowned(cluster, "c")
    # The question is gone with the turn; what comes now is a turn of its own.
    assert await cluster[1].resume("c") == "resumed"
    with pytest.raises(AskClosed):
        await cluster[1].answer("c", "t1.1", "yes")
    position = (await cluster[1].send_event_to_conversation("c", {"ask": "again?"})).position
    assert [q.ask_id for q in await asked(cluster, "c")] == [f"t{position}.1"]
    await cluster[2].answer("c", f"t{position}.1", "yes")
    await settled(cluster, "c")
    assert [r["said"] for r in await replies_of(cluster, "c")] == ["yes"]


@pytest.mark.parametrize("life", ["loaded", "hibernated", "its node is gone"])
async def test_delete(make_cluster: MakeCluster, life: str) -> None:
    cluster = await make_cluster(ask)
    await cluster[0].maybe_start_agent_loop("c", user_id="u", initial_user_msg={"ask": "ok?", "timeout": 1000})
    await asked(cluster, "c")
    await waits(cluster, "c")
    if life == "hibernated":
        await hibernated(cluster, "c")
    elif life != "loaded":
        await cluster.kill(0)
    await cluster[2].delete("c")

    async def is_clean() -> bool:
        return await keys_of(cluster) == set()

    await wait_until(is_clean, "nothing is left of it")
    with pytest.raises(NotFound):
        await cluster[1].answer("c", "t1.1", "yes")
    with pytest.raises(NotFound):
        await cluster[1].describe("c")
    assert await cluster[1].questions("c") == []
    # The same name again is another conversation.
    await waiting(cluster, "c", 1)
    await cluster[2].answer("c", "t1.1", "yes")
    await settled(cluster, "c")


@pytest.mark.parametrize("life", ["loaded", "hibernated", "its node is gone"])
async def test_interrupt(make_cluster: MakeCluster, life: str) -> None:
    async def agent(turn: Turn) -> None:
        await turn.reply("one moment")
        await turn.stream("I wonder")
        await ask(turn)

    cluster = await make_cluster(agent)
    await waiting(cluster, "c")
    await cluster[0].send_event_to_conversation("c", {"text": "next"})
    await waits(cluster, "c")
    if life == "hibernated":
        await hibernated(cluster, "c")
    elif life != "loaded":
        await cluster.kill(0)
    assert await cluster[2].interrupt("c", "t1") in ("interrupted", "interrupting")
    sink = await join(cluster, 1, "c", "s")
    await wait_until(lambda: len(ends(sink)) == 2, "both turns have ended")
    assert ends(sink) == [("t1", "turn_interrupted"), ("t2", "turn_done")]
    said = ["one moment", {"text": "I wonder", "partial": True}] if life == "loaded" else ["one moment"]
    assert sink.replies()[: len(said)] == said
    assert await cluster[1].questions("c") == []
    with pytest.raises(AskClosed):
        await cluster[1].answer("c", "t1.1", "too late")
    await settled(cluster, "c")


async def test_an_interrupt_of_a_hibernated_one_whose_reply_was_lost(make_cluster: MakeCluster) -> None:
    stepped = Stepped(make_cluster)
    cluster = await stepped.start(ask)
    await waiting(cluster, "c")
    await hibernated(cluster, "c")
    stepped.stores[1].lose_reply("interrupt")
    with pytest.raises(Exception, match="lost"):
        await cluster[1].interrupt("c")
    # Nobody presses again: it is obeyed all the same.
    await settled(cluster, "c")
    assert (await kinds_of(cluster, "c", "t1"))[-1] == "turn_interrupted"


# -- races with its release


async def test_an_answer_while_it_is_being_released(make_cluster: MakeCluster) -> None:
    stepped = Stepped(make_cluster)
    cluster = await stepped.start(ask)
    await waiting(cluster, "c")
    release = stepped.stores[0].hold("release")
    hibernation = asyncio.create_task(cluster[0].engine.hibernate("c"))
    await asyncio.wait_for(release.reached.wait(), 20)
    await cluster[1].answer("c", "t1.1", "yes")
    release.go()
    assert not await hibernation, "somebody has answered"
    await settled(cluster, "c")
    assert await replies_of(cluster, "c") == [{"said": "yes", "attempt": 2, "reason": "retry"}]
    assert cluster.owner_of("c") == 0


@pytest.mark.parametrize("reply", ["late", "lost"])
async def test_an_answer_before_its_release_is_known(make_cluster: MakeCluster, reply: str) -> None:
    stepped = Stepped(make_cluster)
    cluster = await stepped.start(ask)
    await waiting(cluster, "c")
    store = stepped.stores[0]
    release = store.hold_reply("release") if reply == "late" else store.lose_reply("release")
    hibernation = asyncio.create_task(cluster[0].engine.hibernate("c"))
    await asyncio.wait_for(release.reached.wait(), 20)
    answer = asyncio.create_task(cluster[1].answer("c", "t1.1", "yes"))
    await asked(cluster, "c", 0)
    release.go()
    assert await hibernation
    assert (await answer).position == 2
    await settled(cluster, "c")
    assert cluster.owner_of("c") == 1
    assert set(await store_of(cluster).slots("u")) == {"c"}
    assert [r["said"] for r in await replies_of(cluster, "c")] == ["yes"]


async def test_a_suspension_while_it_is_being_released(make_cluster: MakeCluster) -> None:
    stepped = Stepped(make_cluster)
    cluster = await stepped.start(ask)
    await waiting(cluster, "c")
    release = stepped.stores[0].hold("release")
    hibernation = asyncio.create_task(cluster[0].engine.hibernate("c"))
    await asyncio.wait_for(release.reached.wait(), 20)
    await cluster[0].engine.suspend()
    await cluster[0].engine.resume()
    release.go()
    assert await hibernation
    await unowned(cluster, "c")
    await cluster[1].answer("c", "t1.1", "yes")
    await settled(cluster, "c")


async def test_an_agent_that_does_not_let_go_of_its_question(
    make_cluster: MakeCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("convener.manager.turns.TURN_GRACE_S", 0.05)
    release, late = asyncio.Event(), list[str]()

    async def agent(turn: Turn) -> None:
        try:
            await turn.reply(await turn.ask("ok?"))
        except asyncio.CancelledError:
            while not release.is_set():
                try:
                    await release.wait()
                except asyncio.CancelledError:
                    continue
            try:
                await turn.ask("and this?")
            except Exception as error:
                late.append(type(error).__name__)

    cluster = await make_cluster(agent)
    await waiting(cluster, "c")
    await hibernated(cluster, "c")
    await cluster[1].answer("c", "t1.1", "yes")
    await settled(cluster, "c")
    release.set()
    await wait_until(lambda: late, "the abandoned attempt is refused")
    assert late == ["OwnershipLost"]
    assert await replies_of(cluster, "c") == ["yes"]
    assert await cluster[2].questions("c") == []


# -- moves


async def test_it_moves_with_its_question(make_cluster: MakeCluster) -> None:
    cluster = await make_cluster(ask)
    await waiting(cluster, "c")
    sink = await join(cluster, 2, "c", "s")
    for node in (1, 2, 0):
        await cluster[node].move("c", f"node-{node}")
        assert await waits(cluster, "c") == node
        assert [q.ask_id for q in await cluster[2].questions("c")] == ["t1.1"]
    await cluster[1].answer("c", "t1.1", "yes")
    await wait_until(sink.replies, "the client sees the reply")
    assert [r["said"] for r in sink.replies()] == ["yes"]
    assert (await kinds_of(cluster, "c", "t1")).count("ask") == 1
    assert (await head_of(cluster, "c")).strikes == 0


# -- strikes


async def test_waiting_is_not_what_takes_nodes_down(make_cluster: MakeCluster) -> None:
    cluster = await make_cluster(ask, nodes=5)
    await waiting(cluster, "c")
    for node in range(4):
        # With a client, the conversation is claimed and its turn begun again on each next node.
        await join(cluster, node + 1, "c", f"s{node}")
        await recorded(cluster, node, "c", "waiting")
        await cluster.kill(node)
        assert await waits(cluster, "c") == node + 1
    head = await head_of(cluster, "c")
    assert (head.status, head.strikes) == ("running", 0)
    await cluster[4].answer("c", "t1.1", "yes")
    await settled(cluster, "c")
    assert [(r["said"], r["attempt"]) for r in await replies_of(cluster, "c")] == [("yes", 5)]


async def test_what_a_turn_does_beside_its_question_may_be_what_takes_nodes_down(make_cluster: MakeCluster) -> None:
    begun: list[int] = []

    async def agent(turn: Turn) -> None:
        async def poison() -> None:
            begun.append(turn.attempt)
            await asyncio.Event().wait()

        await asyncio.gather(turn.ask("ok?"), turn.step("poison", poison))

    cluster = await make_cluster(agent, nodes=1)
    await cluster[0].maybe_start_agent_loop("c", user_id="u", initial_user_msg={})
    for attempt in range(1, 4):
        await wait_until(lambda a=attempt: begun == list(range(1, a + 1)), f"attempt {attempt} runs")
        await asked(cluster, "c")
        await recorded(cluster, attempt - 1, "c", "running")
        await cluster.add()
        await cluster.kill(attempt - 1)

    async def is_given_up() -> bool:
        return (await head_of(cluster, "c")).status == "failed"

    await wait_until(is_given_up, "it is given up")
    assert await cluster[3].questions("c") == []
    assert (await kinds_of(cluster, "c", "t1"))[-1] == "turn_failed"
    await unowned(cluster, "c")


async def test_struck_turns_do_not_wait_for_each_others_people(make_cluster: MakeCluster) -> None:
    """They are run one at a time; one that has come to a question has not taken its node down."""
    begun: list[tuple[str, int]] = []

    async def agent(turn: Turn) -> None:
        begun.append((turn.conversation.id, turn.attempt))
        if turn.attempt < 3:
            await asyncio.Event().wait()
        await turn.reply(await turn.ask("ok?"))

    cluster = await make_cluster(agent, nodes=1)
    for cid in ("a", "b"):
        await cluster[0].maybe_start_agent_loop(cid, user_id="u", initial_user_msg={})
    for attempt in (1, 2):
        await wait_until(lambda n=attempt: {("a", n), ("b", n)} <= set(begun), f"attempts {attempt} run")
        await cluster.add()
        await cluster.kill(attempt - 1)
    for cid in ("a", "b"):
        await asked(cluster, cid)
        assert (await head_of(cluster, cid)).strikes == 2
    for cid in ("a", "b"):
        assert (await head_of(cluster, cid)).status == "running"
        await cluster[2].answer(cid, "t1.1", cid)
        await settled(cluster, cid)
        assert await replies_of(cluster, cid) == [cid]


async def test_every_attempt_of_a_waiting_turn_has_its_own_start(make_cluster: MakeCluster) -> None:
    cluster = await make_cluster(ask)
    await waiting(cluster, "c")
    for round_ in range(3):
        await hibernated(cluster, "c")
        await cluster[round_].maybe_start_agent_loop("c", user_id="u")
        assert await waits(cluster, "c") == round_
    await cluster[0].answer("c", "t1.1", "yes")
    await settled(cluster, "c")
    started = [e["data"] for e in await log_of(cluster, "c") if e["kind"] == "turn_started"]
    assert [(s["attempt"], s["reason"]) for s in started] == [(1, "new"), (2, "retry"), (3, "retry"), (4, "retry")]
    assert (await kinds_of(cluster, "c", "t1")).count("ask") == 1
