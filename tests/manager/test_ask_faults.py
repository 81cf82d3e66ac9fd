"""Questions to people while commands get lost, nodes die at the worst moment, and deadlines pass."""

from __future__ import annotations

import asyncio
import dataclasses
from typing import Any

import pytest

from convener.errors import AskClosed, AskExpired, ConvenerError
from convener.manager.turn import Turn
from convener.testing.cluster import QUICK
from tests.manager.conftest import MakeCluster, join
from tests.manager.people import ask, asked, asks, hibernated, keys_of, kinds_of, log_of, replies_of, settled
from tests.manager.stepped import Stepped
from tests.support.waiting import wait_until

pytestmark = pytest.mark.anyio


# -- lost commands and replies


async def test_an_answer_whose_reply_was_lost_is_looked_after(make_cluster: MakeCluster) -> None:
    stepped = Stepped(make_cluster)
    cluster = await stepped.start(ask)
    await cluster[0].maybe_start_agent_loop("c", user_id="u", initial_user_msg={"ask": "ok?"})
    await asked(cluster, "c")
    await hibernated(cluster, "c")
    stepped.stores[1].lose_reply("answer")
    with pytest.raises(ConvenerError) as unknown:
        await cluster[1].answer("c", "t1.1", "yes", message_id="m")
    assert unknown.value.retryable
    # Nobody tries again: it is answered all the same.
    await settled(cluster, "c")
    assert (await cluster[2].answer("c", "t1.1", "yes", message_id="m")).duplicate
    assert [r["said"] for r in await replies_of(cluster, "c")] == ["yes"]


async def test_an_answer_that_could_not_wake_anybody_is_looked_after(make_cluster: MakeCluster) -> None:
    stepped = Stepped(make_cluster)
    cluster = await stepped.start(ask)
    await cluster[0].maybe_start_agent_loop("c", user_id="u", initial_user_msg={"ask": "ok?"})
    await asked(cluster, "c")
    await hibernated(cluster, "c")
    stepped.stores[1].down.add("put_record")
    with pytest.raises(ConvenerError):
        await cluster[1].answer("c", "t1.1", "yes", message_id="m")
    stepped.stores[1].down.clear()
    await settled(cluster, "c")
    assert [r["said"] for r in await replies_of(cluster, "c")] == ["yes"]


@pytest.mark.parametrize("fault", ["lose", "lose_reply", "repeat"])
async def test_a_question_whose_append_is_repeated_is_asked_once(make_cluster: MakeCluster, fault: str) -> None:
    stepped = Stepped(make_cluster)
    cluster = await stepped.start(ask)
    getattr(stepped.stores[0], fault)("append", asks)
    await cluster[0].maybe_start_agent_loop("c", user_id="u", initial_user_msg={"ask": "ok?"})
    await asked(cluster, "c")
    await cluster[1].answer("c", "t1.1", "yes")
    await settled(cluster, "c")
    assert (await kinds_of(cluster, "c", "t1")).count("ask") == 1
    assert [r["said"] for r in await replies_of(cluster, "c")] == ["yes"]


async def test_questions_recorded_out_of_order_keep_ids_of_their_own(make_cluster: MakeCluster) -> None:
    """The first of two waits for its deadline to be entered when its node goes down; only the second is recorded."""
    stepped = Stepped(make_cluster)

    async def agent(turn: Turn) -> None:
        await turn.reply(await asyncio.gather(turn.ask("first?", timeout=1000), turn.ask("second?")))

    cluster = await stepped.start(agent)
    held = stepped.stores[0].hold("set_timer")
    await cluster[0].maybe_start_agent_loop("c", user_id="u", initial_user_msg={})
    await join(cluster, 1, "c", "s")
    assert [(q.ask_id, q.prompt) for q in await asked(cluster, "c")] == [("t1.2", "second?")]
    await asyncio.wait_for(held.reached.wait(), 20)
    await cluster.kill(0)
    questions = await asked(cluster, "c", 2)
    assert [(q.ask_id, q.prompt) for q in questions] == [("t1.2", "second?"), ("t1.3", "first?")]
    await cluster[1].answer("c", "t1.3", 1)
    await cluster[2].answer("c", "t1.2", 2)
    await settled(cluster, "c")
    assert await replies_of(cluster, "c") == [[1, 2]]


# -- time


@pytest.mark.parametrize("life", ["loaded", "hibernated", "its node is gone"])
async def test_a_question_expires(make_cluster: MakeCluster, life: str) -> None:
    async def agent(turn: Turn) -> None:
        try:
            await turn.reply(await turn.ask("in time?", timeout=1.0))
        except AskExpired as error:
            await turn.reply(error.wire_code)

    cluster = await make_cluster(agent)
    await cluster[0].maybe_start_agent_loop("c", user_id="u", initial_user_msg={})
    (question,) = await asked(cluster, "c")
    assert question.deadline is not None
    if life == "hibernated":
        await hibernated(cluster, "c")
    elif life != "loaded":
        await cluster.kill(0)
    await settled(cluster, "c")
    assert await replies_of(cluster, "c") == ["ask_expired"]
    (answer,) = [e for e in await log_of(cluster, "c") if e["kind"] == "answer"]
    assert (answer["turn"], answer["data"]) == ("t1", {"ask_id": "t1.1", "expired": True})
    with pytest.raises(AskClosed):
        await cluster[1].answer("c", "t1.1", "too late")


async def test_an_answered_question_leaves_no_deadline(make_cluster: MakeCluster) -> None:
    cluster = await make_cluster(ask)
    await cluster[0].maybe_start_agent_loop("c", user_id="u", initial_user_msg={"ask": "?", "timeout": 1000})
    await asked(cluster, "c")
    assert [key for key in await keys_of(cluster) if key.startswith("t:")]
    await cluster[1].answer("c", "t1.1", "yes")

    async def is_clear() -> bool:
        return not [key for key in await keys_of(cluster) if key.startswith("t:")]

    await wait_until(is_clear, "its deadline is cleared away")
    await settled(cluster, "c")


async def test_an_expiry_that_nobody_catches_fails_the_turn(make_cluster: MakeCluster) -> None:
    cluster = await make_cluster(ask, nodes=1)
    await cluster[0].maybe_start_agent_loop("c", user_id="u", initial_user_msg={"ask": "?", "timeout": 0.1})
    await settled(cluster, "c")
    (failed,) = [e for e in await log_of(cluster, "c") if e["kind"] == "turn_failed"]
    assert failed["data"] == {
        "code": "ask_expired",
        "message": "nobody has answered the question in time",
        "settles": [1],
    }


async def test_an_expiry_that_races_an_answer(make_cluster: MakeCluster) -> None:
    async def agent(turn: Turn) -> None:
        try:
            await turn.reply(await turn.ask("who is first?", timeout=1000))
        except AskExpired:
            await turn.reply("expired")

    cluster = await make_cluster(agent)
    await cluster[0].maybe_start_agent_loop("c", user_id="u")
    for number in range(6):
        await cluster[0].send_event_to_conversation("c", {})
        (question,) = await asked(cluster, "c")
        due = question.deadline
        outcome, *_ = await asyncio.gather(
            cluster[number % 3].answer("c", question.ask_id, "answered"),
            *(m.engine.intents.expire("c", question.ask_id, due) for m in cluster),
            return_exceptions=True,
        )
        assert not isinstance(outcome, BaseException) or isinstance(outcome, AskClosed)
        await settled(cluster, "c")
        expected = "expired" if isinstance(outcome, AskClosed) else "answered"
        assert (await replies_of(cluster, "c"))[number] == expected
        assert (await kinds_of(cluster, "c", question.ask_id.rpartition(".")[0])).count("answer") == 1


async def test_a_deadline_that_passes_before_the_question_is_recorded(
    make_cluster: MakeCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("convener.manager.timers.AGAIN_MS", 300)
    stepped = Stepped(make_cluster)
    looked_at: list[str] = []

    async def agent(turn: Turn) -> None:
        try:
            await turn.ask("in time?", timeout=0.1)
        except AskExpired:
            await turn.reply("expired")

    def is_expiry(cid: str, ask_id: str, message: Any) -> bool:
        looked_at.append(ask_id)
        return False

    stepped.prepare = lambda store: store.hold("answer", is_expiry)
    cluster = await stepped.start(agent)
    opening = stepped.stores[0].hold("append", asks)
    await cluster[0].maybe_start_agent_loop("c", user_id="u", initial_user_msg={})
    await asyncio.wait_for(opening.reached.wait(), 20)
    await wait_until(lambda: looked_at, "the deadline has passed and was looked at")
    opening.go()
    await settled(cluster, "c")
    assert await replies_of(cluster, "c") == ["expired"]


async def test_a_deadline_of_an_earlier_attempt_does_not_end_a_later_question(make_cluster: MakeCluster) -> None:
    """The node went down between the deadline and the question, which is then asked without one."""
    stepped = Stepped(make_cluster)
    timeouts: list[float | None] = [3.0, None]

    async def agent(turn: Turn) -> None:
        await turn.reply(await turn.ask("ok?", timeout=timeouts[turn.attempt - 1]))

    cluster = await stepped.start(agent)
    opening = stepped.stores[0].hold("append", asks)
    await cluster[0].maybe_start_agent_loop("c", user_id="u", initial_user_msg={})
    await asyncio.wait_for(opening.reached.wait(), 20)
    await cluster.kill(0)
    (question,) = await asked(cluster, "c")
    assert (question.ask_id, question.deadline) == ("t1.1", None)

    async def is_clear() -> bool:
        return not [key for key in await keys_of(cluster) if key.startswith("t:")]

    await wait_until(is_clear, "the leftover deadline is cleared away")
    assert await cluster[1].questions("c") == [question]
    await cluster[1].answer("c", "t1.1", "yes")
    await settled(cluster, "c")
    assert await replies_of(cluster, "c") == ["yes"]


async def test_the_limit_of_time_stands_still_while_a_person_thinks(make_cluster: MakeCluster) -> None:
    said: list[str] = []

    async def agent(turn: Turn) -> None:
        try:
            await turn.ask("think", timeout=1.2)
        except AskExpired:
            said.append("expired")
        # And goes on then.
        await asyncio.Event().wait()

    cluster = await make_cluster(agent, options=dataclasses.replace(QUICK, turn_timeout=0.6))
    await cluster[0].maybe_start_agent_loop("c", user_id="u", initial_user_msg={})
    await settled(cluster, "c")
    assert said == ["expired"]
    (failed,) = [e for e in await log_of(cluster, "c") if e["kind"] == "turn_failed"]
    assert failed["data"]["code"] == "turn_timeout"
