"""Questions to people: asked once, answered once, whatever happens to the nodes meanwhile."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from convener.errors import AskClosed, ConvenerError, InvalidRequest, NotFound, PayloadTooLarge
from convener.manager.base import Question
from convener.manager.turn import Turn
from tests.manager.conftest import MakeCluster, join
from tests.manager.people import (
    ask,
    asked,
    asks,
    ends_turn,
    head_of,
    hibernated,
    kinds_of,
    log_of,
    recorded,
    replies_of,
    settled,
    unowned,
    waits,
)
from tests.manager.stepped import Stepped
from tests.support.waiting import wait_until

pytestmark = pytest.mark.anyio

APPROVE = {"type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"]}


@pytest.mark.parametrize("node", [0, 1, 2])
async def test_an_answer_from_any_node(make_cluster: MakeCluster, node: int) -> None:
    cluster = await make_cluster(ask)
    sink = await join(cluster, 1, "c", "s")
    await cluster[0].send_event_to_conversation("c", {"ask": {"text": "really?"}})
    assert await asked(cluster, "c") == [Question("t1.1", {"text": "really?"})]
    first = await cluster[node].answer("c", "t1.1", "yes", message_id="m", user_id="u")
    assert (first.message_id, first.position, first.duplicate) == ("m", 2, False)
    again = await cluster[(node + 1) % 3].answer("c", "t1.1", "yes", message_id="m", user_id="u")
    assert (again.position, again.duplicate) == (2, True)
    with pytest.raises(AskClosed) as refused:
        await cluster[node].answer("c", "t1.1", "no")
    assert refused.value.wire_code == "ask_closed"
    await wait_until(sink.replies, "the turn goes on")
    assert sink.replies() == [{"said": "yes", "attempt": 1, "reason": "new"}]
    data = {e["kind"]: e["data"] for e in sink.events if e["turn"] == "t1"}
    assert data["ask"] == {"ask_id": "t1.1", "prompt": {"text": "really?"}, "schema": None, "deadline": None}
    assert data["answer"] == {"ask_id": "t1.1", "message_id": "m", "user_id": "u", "data": "yes"}
    kinds = ["input", "turn_started", "ask", "answer", "reply", "turn_done"]
    assert await kinds_of(cluster, "c", "t1") == kinds
    assert await cluster[node].questions("c") == []
    head = await settled(cluster, "c")
    assert (head.position, head.asks) == (2, 0)


async def test_an_answer_must_fit_the_schema_and_the_question_stays_open(make_cluster: MakeCluster) -> None:
    cluster = await make_cluster(ask)
    await cluster[0].maybe_start_agent_loop("c", user_id="u", initial_user_msg={"ask": "ok?", "schema": APPROVE})
    (question,) = await asked(cluster, "c")
    assert question.schema == APPROVE
    for manager in cluster:
        for bad in ({"ok": "yes"}, {}, "yes", None):
            with pytest.raises(InvalidRequest) as refused:
                await manager.answer("c", "t1.1", bad)
            assert refused.value.wire_code == "invalid_answer"
    with pytest.raises(InvalidRequest, match=r"the answer\['ok'\] does not fit"):
        await cluster[1].answer("c", "t1.1", {"ok": 1})
    assert await cluster[2].questions("c") == [question]
    assert (await head_of(cluster, "c")).position == 1
    await cluster[1].answer("c", "t1.1", {"ok": True})
    await settled(cluster, "c")
    assert [r["said"] for r in await replies_of(cluster, "c")] == [{"ok": True}]


async def test_what_cannot_be_asked_and_answered(make_cluster: MakeCluster) -> None:
    said: list[str] = []

    async def agent(turn: Turn) -> None:
        bad: list[dict[str, Any]] = [
            {"prompt": object()},
            {"prompt": "x" * (2 << 20)},
            {"prompt": "p", "schema": {"type": "no such type"}},
            {"prompt": "p", "schema": {"pattern": "("}},
            {"prompt": "p", "schema": 5},
            *({"prompt": "p", "timeout": t} for t in (0, -1, float("nan"), float("inf"), 1e12, "soon")),
        ]
        for arguments in bad:
            try:
                await turn.ask(**arguments)
            except ConvenerError as error:
                said.append(error.wire_code)
        # A reference must never make a server fetch anything; who answers is told that it cannot be checked.
        await turn.ask("p", {"$ref": "http://127.0.0.1:1/schema"}, timeout=0.2)

    cluster = await make_cluster(agent)
    await cluster[0].maybe_start_agent_loop("c", user_id="u", initial_user_msg={})
    await asked(cluster, "c")
    assert said == ["invalid_request", "payload_too_large", *["invalid_request"] * 9]
    with pytest.raises(InvalidRequest) as unchecked:
        await cluster[1].answer("c", "t1.1", 5)
    assert unchecked.value.wire_code == "invalid_answer"
    with pytest.raises(PayloadTooLarge):
        await cluster[1].answer("c", "t1.1", "x" * (2 << 20))
    for bad in ("", "a b", "x" * 129):
        with pytest.raises(InvalidRequest):
            await cluster[1].answer("c", bad, 5)
    with pytest.raises(AskClosed):
        await cluster[1].answer("c", "t1.2", 5)
    with pytest.raises(NotFound):
        await cluster[1].answer("unknown", "t1.1", 5)
    await settled(cluster, "c")
    assert await kinds_of(cluster, "c", "t1") == ["input", "turn_started", "ask", "answer", "turn_failed"]


async def test_of_racing_answers_one_is_taken(make_cluster: MakeCluster) -> None:
    cluster = await make_cluster(ask)
    await cluster[0].maybe_start_agent_loop("c", user_id="u")
    for number in range(5):
        await cluster[0].send_event_to_conversation("c", {"ask": "who?"})
        (question,) = await asked(cluster, "c")
        tries = [(node, f"{number}.{node}.{n}") for node in range(3) for n in range(4)]
        outcomes = await asyncio.gather(
            *(cluster[node].answer("c", question.ask_id, ident, message_id=ident) for node, ident in tries),
            return_exceptions=True,
        )
        taken = [o for o in outcomes if not isinstance(o, BaseException)]
        assert len(taken) == 1
        assert sum(isinstance(o, AskClosed) for o in outcomes) == 11
        await settled(cluster, "c")
        assert (await replies_of(cluster, "c"))[number]["said"] == taken[0].message_id


async def test_of_the_same_answer_sent_at_once_one_is_taken(make_cluster: MakeCluster) -> None:
    cluster = await make_cluster(ask)
    await cluster[0].maybe_start_agent_loop("c", user_id="u", initial_user_msg={"ask": "who?"})
    await asked(cluster, "c")
    results = await asyncio.gather(*(m.answer("c", "t1.1", "me", message_id="m") for m in cluster for _ in range(4)))
    assert sorted(r.duplicate for r in results) == [False] + 11 * [True]
    assert {r.position for r in results} == {2}
    await settled(cluster, "c")
    assert (await kinds_of(cluster, "c", "t1")).count("answer") == 1


@pytest.mark.parametrize("watched", [True, False], ids=["a client watches", "nobody watches"])
async def test_a_question_survives_its_node(make_cluster: MakeCluster, watched: bool) -> None:
    cluster = await make_cluster(ask)
    await cluster[0].maybe_start_agent_loop("c", user_id="u", initial_user_msg={"ask": "ok?"})
    if watched:
        await join(cluster, 1, "c", "s")
    before = await asked(cluster, "c")
    assert await waits(cluster, "c") == 0
    await cluster.kill(0)
    if watched:
        assert await waits(cluster, "c") == 1
    else:
        await unowned(cluster, "c")
        assert (await cluster[2].describe("c")).status == "waiting"
    assert await cluster[2].questions("c") == before
    await cluster[2].answer("c", "t1.1", "yes")
    await settled(cluster, "c")
    (reply,) = await replies_of(cluster, "c")
    assert (reply["said"], reply["attempt"]) == ("yes", 2)
    kinds = await kinds_of(cluster, "c", "t1")
    assert sorted(kinds) == sorted(["input", *["turn_started"] * 2, "ask", "answer", "reply", "turn_done"])


async def test_an_answer_that_comes_before_the_burial(make_cluster: MakeCluster) -> None:
    cluster = await make_cluster(ask)
    await cluster[0].maybe_start_agent_loop("c", user_id="u", initial_user_msg={"ask": "ok?"})
    await asked(cluster, "c")
    await cluster.kill(0)
    await cluster[1].answer("c", "t1.1", "yes")
    head = await settled(cluster, "c")
    assert [r["said"] for r in await replies_of(cluster, "c")] == ["yes"]
    assert (await kinds_of(cluster, "c", "t1")).count("ask") == 1
    assert head.strikes == 0, "waiting is not what took its node down"


async def test_an_answer_that_its_dead_owner_had_taken_in(make_cluster: MakeCluster) -> None:
    stepped = Stepped(make_cluster)
    cluster = await stepped.start(ask)
    await cluster[0].maybe_start_agent_loop("c", user_id="u", initial_user_msg={"ask": "ok?"})
    await asked(cluster, "c")
    ending = stepped.stores[0].hold("append", ends_turn)
    await cluster[1].answer("c", "t1.1", "yes")
    await asyncio.wait_for(ending.reached.wait(), 20)
    await cluster.kill(0)
    await settled(cluster, "c")
    (reply,) = await replies_of(cluster, "c")
    assert (reply["said"], reply["attempt"], reply["reason"]) == ("yes", 2, "takeover")


async def test_a_question_survives_a_deploy(make_cluster: MakeCluster) -> None:
    cluster = await make_cluster(ask)
    await cluster[0].maybe_start_agent_loop("c", user_id="u", initial_user_msg={"ask": "ok?"})
    before = await asked(cluster, "c")
    await waits(cluster, "c")
    await cluster.leave(0)
    await unowned(cluster, "c")
    assert await cluster[1].questions("c") == before
    assert (await cluster[1].describe("c")).status == "waiting"
    await cluster[2].answer("c", "t1.1", "yes")
    assert cluster.owner_of("c") == 2
    await settled(cluster, "c")
    assert await replies_of(cluster, "c") == [{"said": "yes", "attempt": 2, "reason": "retry"}]
    assert [e["data"]["reason"] for e in await log_of(cluster, "c") if e["kind"] == "open"] == ["start", "answer"]


async def test_a_question_survives_suspension(make_cluster: MakeCluster) -> None:
    cluster = await make_cluster(ask)
    await cluster[0].maybe_start_agent_loop("c", user_id="u", initial_user_msg={"ask": "ok?"})
    await waits(cluster, "c")
    await cluster[0].engine.suspend()
    assert cluster[0].engine.runner("c").status == "recovering"
    await cluster[1].answer("c", "t1.1", "yes")
    await cluster[0].engine.resume()
    await settled(cluster, "c")
    assert await replies_of(cluster, "c") == [{"said": "yes", "attempt": 2, "reason": "retry"}]
    assert (await kinds_of(cluster, "c", "t1")).count("ask") == 1


async def test_two_questions_at_once_with_their_answers_the_other_way_round(make_cluster: MakeCluster) -> None:
    async def agent(turn: Turn) -> None:
        await turn.reply(await asyncio.gather(turn.ask("first?"), turn.ask("second?")))

    cluster = await make_cluster(agent)
    await cluster[0].maybe_start_agent_loop("c", user_id="u", initial_user_msg={})
    assert [(q.ask_id, q.prompt) for q in await asked(cluster, "c", 2)] == [("t1.1", "first?"), ("t1.2", "second?")]
    await waits(cluster, "c")
    await cluster[1].answer("c", "t1.2", 2)
    assert [q.ask_id for q in await asked(cluster, "c", 1)] == ["t1.1"]
    assert (await cluster[2].describe("c")).status == "waiting"
    await cluster.kill(0)
    await unowned(cluster, "c")
    await cluster[2].answer("c", "t1.1", 1)
    await settled(cluster, "c")
    assert await replies_of(cluster, "c") == [[1, 2]]
    kinds = await kinds_of(cluster, "c", "t1")
    assert (kinds.count("ask"), kinds.count("answer")) == (2, 2)


async def test_equal_questions_have_answers_of_their_own(make_cluster: MakeCluster) -> None:
    async def agent(turn: Turn) -> None:
        await turn.reply(await asyncio.gather(*(turn.ask("more?") for _ in range(12))))

    cluster = await make_cluster(agent)
    await cluster[0].maybe_start_agent_loop("c", user_id="u", initial_user_msg={})
    questions = await asked(cluster, "c", 12)
    assert [q.ask_id for q in questions] == [f"t1.{n}" for n in range(1, 13)], "in the order in which they were asked"
    await asyncio.gather(*(cluster[n % 3].answer("c", f"t1.{n + 1}", n) for n in range(12)))
    await settled(cluster, "c")
    assert await replies_of(cluster, "c") == [list(range(12))]


async def test_a_step_beside_a_question_is_neither_lost_nor_run_twice(make_cluster: MakeCluster) -> None:
    ran: list[str] = []
    open_ = asyncio.Event()

    async def agent(turn: Turn) -> None:
        async def work() -> int:
            ran.append("work")
            await open_.wait()
            return 7

        await turn.reply(await asyncio.gather(turn.ask("ok?"), turn.step("work", work)))

    cluster = await make_cluster(agent)
    await cluster[0].maybe_start_agent_loop("c", user_id="u", initial_user_msg={})
    await asked(cluster, "c")
    await wait_until(lambda: ran, "the step runs")
    assert not await cluster[0].engine.hibernate("c"), "a step is at work"
    assert cluster[0].engine.runner("c").status == "running"
    open_.set()
    await waits(cluster, "c")
    await hibernated(cluster, "c")
    await cluster[1].answer("c", "t1.1", "yes")
    await settled(cluster, "c")
    assert await replies_of(cluster, "c") == [["yes", 7]]
    assert ran == ["work"]


async def test_work_beside_a_question_goes_on_after_a_crash(make_cluster: MakeCluster) -> None:
    """It must not wait for the answer, or for somebody who looks."""
    ran: list[int] = []
    open_ = asyncio.Event()

    async def agent(turn: Turn) -> None:
        async def work() -> int:
            ran.append(turn.attempt)
            await open_.wait()
            return 7

        await turn.reply(await asyncio.gather(turn.ask("ok?"), turn.step("work", work)))

    cluster = await make_cluster(agent)
    await cluster[0].maybe_start_agent_loop("c", user_id="u", initial_user_msg={})
    await asked(cluster, "c")
    await wait_until(lambda: ran == [1], "the step runs")
    await recorded(cluster, 0, "c", "running")
    await cluster.kill(0)
    await wait_until(lambda: ran == [1, 2], "the step is run again elsewhere")
    open_.set()
    await waits(cluster, "c")
    await cluster[1].answer("c", "t1.1", "yes")
    await settled(cluster, "c")
    assert await replies_of(cluster, "c") == [["yes", 7]]


async def test_what_was_said_before_a_question_is_in_the_log_before_it(make_cluster: MakeCluster) -> None:
    async def agent(turn: Turn) -> None:
        await turn.reply("before")
        turn.state["asked"] = turn.state.get("asked", 0) + 1
        said = await turn.ask("ok?")
        await turn.reply([said, turn.state["asked"]])

    cluster = await make_cluster(agent)
    await cluster[0].maybe_start_agent_loop("c", user_id="u", initial_user_msg={})
    await asked(cluster, "c")
    assert await replies_of(cluster, "c") == ["before"]
    assert await cluster[0].engine.node.store.state("c") is None, "the state is saved with the end"
    await hibernated(cluster, "c")
    await cluster[1].answer("c", "t1.1", "yes")
    await settled(cluster, "c")
    assert await replies_of(cluster, "c") == ["before", ["yes", 1]]
    assert await cluster[0].engine.node.store.state("c") == b'{"asked":1}'


async def test_a_question_that_changed_between_attempts_fails_the_turn(make_cluster: MakeCluster) -> None:
    prompt = {"text": "old?"}

    async def agent(turn: Turn) -> None:
        await turn.reply(await turn.ask(dict(prompt)))

    cluster = await make_cluster(agent)
    await cluster[0].maybe_start_agent_loop("c", user_id="u", initial_user_msg={})
    sink = await join(cluster, 1, "c", "s")
    await asked(cluster, "c")
    prompt["text"] = "new?"
    await cluster.kill(0)
    assert [(q.ask_id, q.prompt["text"]) for q in await asked(cluster, "c", 2)] == [("t1.1", "old?"), ("t1.2", "new?")]
    await cluster[2].answer("c", "t1.2", "yes")
    await settled(cluster, "c")
    (failed,) = [e for e in await log_of(cluster, "c") if e["kind"] == "turn_failed"]
    assert failed["data"]["code"] == "turn_mismatch"
    assert failed["data"]["message"] == "question t1.1 was asked by an earlier attempt and is not asked now"
    assert await replies_of(cluster, "c") == []
    with pytest.raises(AskClosed):
        await cluster[2].answer("c", "t1.1", "too late")
    assert not sink.named("resync")


async def test_an_answer_that_comes_before_the_turn_waits(make_cluster: MakeCluster) -> None:
    stepped = Stepped(make_cluster)
    cluster = await stepped.start(ask)
    opening = stepped.stores[0].hold_reply("append", asks)
    await cluster[0].maybe_start_agent_loop("c", user_id="u", initial_user_msg={"ask": "ok?"})
    await asyncio.wait_for(opening.reached.wait(), 20)
    await cluster[1].answer("c", "t1.1", "yes")
    opening.go()
    await settled(cluster, "c")
    assert [r["said"] for r in await replies_of(cluster, "c")] == ["yes"]


async def test_a_large_answer(make_cluster: MakeCluster) -> None:
    cluster = await make_cluster(ask)
    await cluster[0].maybe_start_agent_loop("c", user_id="u", initial_user_msg={"ask": "tell me all"})
    await asked(cluster, "c")
    await cluster[1].answer("c", "t1.1", "x" * 100_000)
    await settled(cluster, "c")
    assert [len(r["said"]) for r in await replies_of(cluster, "c")] == [100_000]


async def test_what_is_said_while_a_question_is_open_waits_for_it(make_cluster: MakeCluster) -> None:
    cluster = await make_cluster(ask)
    await cluster[0].maybe_start_agent_loop("c", user_id="u", initial_user_msg={"ask": "ok?"})
    await asked(cluster, "c")
    await hibernated(cluster, "c")
    await cluster[1].send_event_to_conversation("c", {"text": "hello?"})
    assert await waits(cluster, "c") == 1
    await hibernated(cluster, "c")
    await cluster[2].answer("c", "t1.1", "yes")
    await settled(cluster, "c")
    assert [(r["said"], r["attempt"]) for r in await replies_of(cluster, "c")] == [("yes", 3), (None, 1)]
    turns = [e["turn"] for e in await log_of(cluster, "c") if e["kind"] == "turn_done"]
    assert turns == ["t1", "t2"]


async def test_an_agent_that_gives_a_question_up_leaves_nothing_open(make_cluster: MakeCluster) -> None:
    async def agent(turn: Turn) -> None:
        try:
            async with asyncio.timeout(0.05):
                await turn.ask("quick?")
        except TimeoutError:
            await turn.reply("never mind")

    cluster = await make_cluster(agent)
    await cluster[0].maybe_start_agent_loop("c", user_id="u", initial_user_msg={})
    await settled(cluster, "c")
    assert await replies_of(cluster, "c") == ["never mind"]
    assert await cluster[1].questions("c") == []
    with pytest.raises(AskClosed):
        await cluster[1].answer("c", "t1.1", "here")


async def test_a_question_that_outlives_its_turn_is_told_so(make_cluster: MakeCluster) -> None:
    left: list[asyncio.Task[Any]] = []

    async def agent(turn: Turn) -> None:
        left.append(asyncio.create_task(turn.ask("anybody?")))
        await asked(cluster, "c")
        await turn.reply("done")

    cluster = await make_cluster(agent, nodes=1)
    await cluster[0].maybe_start_agent_loop("c", user_id="u", initial_user_msg={})
    await settled(cluster, "c")
    await wait_until(left[0].done, "whoever waits hears that nobody can answer any more")
    assert isinstance(left[0].exception(), ConvenerError)
    assert await cluster[0].questions("c") == []
