"""What becomes of a turn whose node went down: repeated, held until somebody says so, given up."""

from __future__ import annotations

import asyncio
import dataclasses
from typing import Any

import pytest

from convener.errors import ConversationHeld, ConversationStopped
from convener.manager.traits import Interrupted, Recover, Traits
from convener.manager.turn import Turn
from convener.testing.cluster import QUICK, InProcessCluster
from tests.manager.conftest import MakeCluster, join
from tests.manager.people import (
    TraitedAgent,
    ask,
    asked,
    ends_turn,
    head_of,
    kinds_of,
    log_of,
    replies_of,
    settled,
    unowned,
)
from tests.manager.stepped import Stepped, reborn
from tests.support.waiting import wait_until

pytestmark = pytest.mark.anyio


class Poison:
    """Takes a while, so that its node can be killed; goes on when it is let."""

    def __init__(self) -> None:
        self.open = asyncio.Event()
        self.begun: list[tuple[str, int, str]] = []

    async def __call__(self, turn: Turn) -> None:
        self.begun.append((turn.id, turn.attempt, turn.reason))
        await turn.step("look", lambda: "seen")
        await self.open.wait()
        await turn.reply(turn.text)

    @property
    def turns(self) -> list[str]:
        """Turns in the order in which they were begun."""
        return [turn for turn, _, _ in self.begun]


def mode(recovery: Any, **options: Any) -> Any:
    return dataclasses.replace(QUICK, recovery=recovery, **options)


async def cut_off(cluster: InProcessCluster, poison: Poison, *queued: str, node: int = 0) -> None:
    """Kill the node on which the first turn of `c` runs; more messages wait behind it."""
    await cluster[node].maybe_start_agent_loop("c", user_id="u", initial_user_msg={"text": "one"})
    for text in queued:
        await cluster[node].send_event_to_conversation("c", {"text": text})
    await wait_until(lambda: poison.begun, "the turn runs")
    await wait_until(lambda: _is_recorded(cluster, "step"), "its step is recorded")
    await cluster.kill(node)


async def _is_recorded(cluster: InProcessCluster, kind: str) -> bool:
    return kind in [e["kind"] for e in await log_of(cluster, "c")]


async def shown(cluster: InProcessCluster, status: str) -> None:
    """Return when every node says that the conversation has this status and is not busy."""
    for manager in cluster:

        async def is_shown(manager: Any = manager) -> bool:
            info = await manager.describe("c")
            return (info.status, info.busy, info.node) == (status, False, "")

        await wait_until(is_shown, f"it is shown as {status}")


# -- the modes


async def test_resume_repeats_the_turn(make_cluster: MakeCluster) -> None:
    cluster = await make_cluster(poison := Poison(), options=mode("resume"))
    await cut_off(cluster, poison, "two")
    poison.open.set()
    await settled(cluster, "c")
    assert poison.begun == [("t1", 1, "new"), ("t1", 2, "takeover"), ("t2", 1, "new")]
    assert await replies_of(cluster, "c") == ["one", "two"]


async def test_wait_holds_the_conversation_until_somebody_says_resume(make_cluster: MakeCluster) -> None:
    cluster = await make_cluster(poison := Poison(), options=mode("wait"))
    await cut_off(cluster, poison, "two")
    await shown(cluster, "waiting")
    await unowned(cluster, "c")
    head = await head_of(cluster, "c")
    assert (head.status, head.done, head.position) == ("held", 0, 2)
    for refused in (
        cluster[1].send_event_to_conversation("c", {"text": "three"}),
        cluster[2].interrupt("c"),
        cluster[1].maybe_start_agent_loop("c", user_id="u"),
        cluster[1].answer("c", "t1.1", "?"),
    ):
        with pytest.raises(ConversationHeld) as error:
            await refused
        assert error.value.wire_code == "conversation_held"
    sink = await join(cluster, 1, "c", "s")
    poison.open.set()
    assert await cluster[2].resume("c") == "resumed"
    await settled(cluster, "c")
    assert poison.begun == [("t1", 1, "new"), ("t1", 2, "retry"), ("t2", 1, "new")]
    await wait_until(lambda: len(sink.replies()) == 2, "the client, who has waited, sees both replies")
    assert (await kinds_of(cluster, "c", "t1")).count("step") == 1
    assert await cluster[1].resume("c") == "running"


async def test_fail_gives_the_turn_up_and_goes_on(make_cluster: MakeCluster) -> None:
    cluster = await make_cluster(poison := Poison(), options=mode("fail"))
    await cut_off(cluster, poison, "two")
    poison.open.set()
    await settled(cluster, "c")
    assert poison.turns == ["t1", "t2"]
    (failed,) = [e for e in await log_of(cluster, "c") if e["kind"] == "turn_failed"]
    assert (failed["turn"], failed["data"]["code"], failed["data"]["settles"]) == ("t1", "recovery_failed", [1])
    assert await replies_of(cluster, "c") == ["two"]
    assert (await head_of(cluster, "c")).status == "running"


@pytest.mark.parametrize("recovery", ["wait", "fail"])
async def test_a_message_that_was_not_begun_is_not_cut_off(make_cluster: MakeCluster, recovery: str) -> None:
    stepped = Stepped(make_cluster)
    cluster = await stepped.start(poison := Poison(), options=mode(recovery))
    await cluster[0].maybe_start_agent_loop("c", user_id="u")
    stepped.stores[0].down.add("append")
    await cluster[1].send_event_to_conversation("c", {"text": "one"})
    await cluster.kill(0)
    poison.open.set()
    await settled(cluster, "c")
    assert await replies_of(cluster, "c") == ["one"]


@pytest.mark.parametrize("recovery", ["wait", "fail"])
async def test_a_deploy_cuts_nothing_off(make_cluster: MakeCluster, recovery: str) -> None:
    cluster = await make_cluster(poison := Poison(), options=mode(recovery, drain_timeout=0.2))
    await cluster[0].maybe_start_agent_loop("c", user_id="u", initial_user_msg={"text": "one"})
    await wait_until(lambda: _is_recorded(cluster, "step"), "its step is recorded")
    leaving = asyncio.create_task(cluster.leave(0))
    await wait_until(lambda: len(poison.begun) == 2, "the turn is begun again elsewhere")
    poison.open.set()
    await leaving
    await settled(cluster, "c")
    assert await replies_of(cluster, "c") == ["one"]
    assert [reason for _, _, reason in poison.begun] == ["new", "handoff"]


@pytest.mark.parametrize("recovery", ["wait", "fail"])
@pytest.mark.parametrize("answered", [True, False], ids=["answered", "not answered"])
async def test_waiting_for_a_person_is_not_being_cut_off(
    make_cluster: MakeCluster, recovery: str, answered: bool
) -> None:
    cluster = await make_cluster(ask, options=mode(recovery))
    await cluster[0].maybe_start_agent_loop("c", user_id="u", initial_user_msg={"ask": "ok?"})
    await asked(cluster, "c")
    await cluster.kill(0)
    if answered:
        # Before anybody knows that the node is gone; the answer has closed the question.
        await cluster[1].answer("c", "t1.1", "yes")
    else:
        await join(cluster, 1, "c", "s")
        await wait_until(lambda: cluster.owner_of("c") == 1, "it is taken over")
        await cluster[2].answer("c", "t1.1", "yes")
    await settled(cluster, "c")
    assert [r["said"] for r in await replies_of(cluster, "c")] == ["yes"]


@pytest.mark.parametrize("recovery", ["wait", "fail"])
async def test_an_interrupted_turn_is_not_cut_off(make_cluster: MakeCluster, recovery: str) -> None:
    stepped = Stepped(make_cluster)
    cluster = await stepped.start(poison := Poison(), options=mode(recovery))
    await cluster[0].maybe_start_agent_loop("c", user_id="u", initial_user_msg={"text": "one"})
    await wait_until(lambda: _is_recorded(cluster, "step"), "its step is recorded")
    ending = stepped.stores[0].hold("append", ends_turn)
    await cluster[1].send_event_to_conversation("c", {"text": "two"}, overlap="interrupt")
    await asyncio.wait_for(ending.reached.wait(), 20)

    async def is_halted() -> bool:
        return (await head_of(cluster, "c")).halted == 1

    await wait_until(is_halted, "the interruption is in the head")
    poison.open.set()
    await cluster.kill(0)
    await settled(cluster, "c")
    assert (await kinds_of(cluster, "c", "t1"))[-1] == "turn_interrupted"
    assert await replies_of(cluster, "c") == ["two"]


# -- the application's own decision


def deciding(poison: Poison, recover: Recover) -> TraitedAgent:
    return TraitedAgent(poison, Traits(recover=recover))


@pytest.mark.parametrize("setting", ["resume", "fail"])
@pytest.mark.parametrize("said", ["resume", "wait", "fail", None, "nonsense", RuntimeError("no idea")])
async def test_the_application_decides(make_cluster: MakeCluster, setting: str, said: Any) -> None:
    poison, cuts = Poison(), list[Interrupted]()

    async def recover(cut: Interrupted) -> Any:
        cuts.append(cut)
        if isinstance(said, Exception):
            raise said
        return said

    cluster = await make_cluster(deciding(poison, recover), options=mode(setting))
    await cut_off(cluster, poison)
    poison.open.set()
    decided = said if said in ("resume", "wait", "fail") else setting
    if decided == "wait":
        await shown(cluster, "waiting")
        assert poison.turns == ["t1"]
        await cluster[1].resume("c")
    await settled(cluster, "c")
    assert await replies_of(cluster, "c") == ([] if decided == "fail" else ["one"])
    (cut,) = cuts
    assert (cut.turn, cut.attempt, cut.steps, cut.input.data) == ("t1", 1, ("look",), {"text": "one"})
    assert (cut.conversation.id, cut.conversation.user_id) == ("c", "u")


async def test_a_decision_that_does_not_come_is_the_settings(
    make_cluster: MakeCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("convener.manager.cutoff.DECIDE_S", 0.05)
    monkeypatch.setattr("convener.manager.cutoff.GRACE_S", 0.05)
    poison, release = Poison(), asyncio.Event()

    async def recover(cut: Interrupted) -> Any:
        while not release.is_set():
            try:
                await release.wait()
            except asyncio.CancelledError:
                continue

    cluster = await make_cluster(deciding(poison, recover), options=mode("fail"))
    await cut_off(cluster, poison, "two")
    poison.open.set()
    await settled(cluster, "c")
    release.set()
    assert await replies_of(cluster, "c") == ["two"]


class Thinking:
    """A decision that takes until it is let; counts who asked."""

    def __init__(self) -> None:
        self.open = asyncio.Event()
        self.asked = 0

    async def __call__(self, cut: Interrupted) -> Any:
        self.asked += 1
        await self.open.wait()
        return "wait"


async def test_a_node_that_is_buried_while_it_decides_begins_a_new_life(make_cluster: MakeCluster) -> None:
    poison, thinking = Poison(), Thinking()
    cluster = await make_cluster(deciding(poison, thinking), nodes=2)
    await cut_off(cluster, poison)
    await wait_until(lambda: thinking.asked == 1, "the new owner is asked")
    await reborn(cluster[1])
    await wait_until(lambda: thinking.asked == 2, "its next life takes over, and is asked again")
    thinking.open.set()
    await shown(cluster, "waiting")
    poison.open.set()
    await cluster[1].resume("c")
    await settled(cluster, "c")


async def test_a_node_that_leaves_while_it_decides(make_cluster: MakeCluster) -> None:
    poison, thinking = Poison(), Thinking()
    cluster = await make_cluster(deciding(poison, thinking), nodes=2, options=mode("resume", drain_timeout=0.2))
    await cut_off(cluster, poison)
    await wait_until(lambda: thinking.asked == 1, "the new owner is asked")
    await cluster.add()
    await cluster.leave(1)
    await wait_until(lambda: thinking.asked == 2, "the next one is asked")
    thinking.open.set()
    poison.open.set()
    await shown(cluster, "waiting")
    await cluster[2].resume("c")
    await settled(cluster, "c")
    assert await replies_of(cluster, "c") == ["one"]


async def test_a_stop_while_it_decides(make_cluster: MakeCluster) -> None:
    poison, thinking = Poison(), Thinking()
    cluster = await make_cluster(deciding(poison, thinking))
    await cut_off(cluster, poison, "two")
    await wait_until(lambda: thinking.asked == 1, "the new owner is asked")
    stopped = asyncio.create_task(cluster[1].close_session("c", "enough"))

    async def is_told() -> bool:
        return (await head_of(cluster, "c")).status == "stopping"

    await wait_until(is_told, "the stop is recorded")
    thinking.open.set()
    assert await stopped == "stopped"
    await unowned(cluster, "c")
    assert poison.turns == ["t1"]
    with pytest.raises(ConversationStopped) as error:
        await cluster[1].send_event_to_conversation("c", {})
    assert error.value.wire_code == "conversation_stopped"
