"""Durable steps: recorded when done, given back after a crash, never run twice once recorded."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import pytest

from convener.errors import InvalidRequest
from convener.manager.turn import Retry, StepFailed, Turn
from tests.manager.conftest import MakeCluster, join
from tests.support.waiting import wait_until

pytestmark = pytest.mark.anyio


class Recorder:
    """Counts, outside the cluster, how often each step was run and under which keys."""

    def __init__(self) -> None:
        self.ran: list[str] = []
        self.keys: list[str] = []
        self.open = asyncio.Event()


async def test_a_recorded_step_is_not_run_again_after_a_crash(make_cluster: MakeCluster) -> None:
    outside = Recorder()

    async def agent(turn: Turn) -> None:
        async def work(what: str) -> dict[str, str]:
            outside.ran.append(what)
            outside.keys.append(turn.key)
            return {"did": what}

        await turn.reply({"text": "one moment"})
        first = await turn.step("work", work, "first")
        second = await turn.step("work", work, "second")
        await turn.step("wait", outside.open.wait)
        turn.state["n"] = turn.state.get("n", 0) + 1
        await turn.reply({"first": first, "second": second, "attempt": turn.attempt, "key": turn.key})

    cluster = await make_cluster(agent)
    sink = await join(cluster, 1, "c", "s")
    await cluster[0].maybe_start_agent_loop("c", user_id="u")
    elsewhere = await join(cluster, 2, "c", "s2")
    await cluster[1].send_event_to_conversation("c", {"text": "go"})
    await wait_until(lambda: len(_steps(elsewhere)) == 2, "two steps are recorded")
    owner = cluster.owner_of("c")
    assert owner is not None
    await cluster.kill(owner)
    outside.open.set()
    await wait_until(lambda: len(elsewhere.replies()) == 2, "the turn is done elsewhere")
    assert outside.ran == ["first", "second"]
    assert outside.keys == ["c/t1/work/1", "c/t1/work/2"]
    assert elsewhere.replies() == [
        {"text": "one moment"},
        {"first": {"did": "first"}, "second": {"did": "second"}, "attempt": 2, "key": ""},
    ]
    kinds = [e["kind"] for e in elsewhere.events if e["turn"] == "t1"]
    assert kinds == [
        *("input", "turn_started", "reply", "step", "step"),
        *("turn_started", "step", "reply", "turn_done"),
    ]
    assert sink.events == elsewhere.events[: len(sink.events)]
    assert await cluster[2].engine.node.store.state("c") == b'{"n":1}'


def _steps(sink: Any) -> list[Any]:
    return [e["data"] for e in sink.events if e["kind"] == "step"]


async def test_steps_at_the_same_time_are_matched_by_name(make_cluster: MakeCluster) -> None:
    outside = Recorder()

    async def agent(turn: Turn) -> None:
        async def slow() -> str:
            outside.ran.append("slow")
            await outside.open.wait()
            return "slow"

        def quick() -> str:
            outside.ran.append("quick")
            return "quick"

        results = await asyncio.gather(turn.step("slow", slow), turn.step("quick", quick))
        await turn.reply(results)

    cluster = await make_cluster(agent)
    await cluster[0].maybe_start_agent_loop("c", user_id="u")
    sink = await join(cluster, 1, "c", "s")
    await cluster[0].send_event_to_conversation("c", {})
    await wait_until(lambda: _steps(sink), "the quick one is recorded")
    await cluster.kill(0)
    outside.open.set()
    await wait_until(sink.replies, "the turn is done")
    assert sink.replies() == [["slow", "quick"]]
    assert sorted(outside.ran) == ["quick", "slow", "slow"]


async def test_a_suspended_turn_keeps_its_steps(make_cluster: MakeCluster) -> None:
    outside = Recorder()

    async def agent(turn: Turn) -> None:
        async def work() -> int:
            outside.ran.append("work")
            return 7

        result = await turn.step("work", work)
        await outside.open.wait()
        await turn.reply(result)

    cluster = await make_cluster(agent)
    sink = await join(cluster, 0, "c", "s")
    await cluster[0].send_event_to_conversation("c", {})
    await wait_until(lambda: _steps(sink), "the step is recorded")
    await cluster[0].engine.suspend()
    await cluster[0].engine.resume()
    outside.open.set()
    await wait_until(sink.replies, "the turn is done")
    assert sink.replies() == [7]
    assert outside.ran == ["work"]
    assert [e["data"]["attempt"] for e in sink.events if e["kind"] == "turn_started"] == [1, 2]


async def test_a_step_is_retried_and_its_last_error_is_the_turns(make_cluster: MakeCluster) -> None:
    tries: list[str] = []

    async def agent(turn: Turn) -> None:
        def flaky(succeed_at: int) -> int:
            tries.append(turn.text)
            if len(tries) < succeed_at:
                raise ConnectionError("not yet")
            return len(tries)

        again = Retry(attempts=3, wait=0.001)
        if turn.text == "good":
            await turn.reply(await turn.step("flaky", flaky, 3, retry=again))
        else:
            await turn.step("flaky", flaky, 99, retry=again)

    cluster = await make_cluster(agent)
    sink = await join(cluster, 0, "c", "s")
    await cluster[0].send_event_to_conversation("c", {"text": "good"})
    await cluster[0].send_event_to_conversation("c", {"text": "bad"})
    await wait_until(lambda: [e for e in sink.events if e["kind"] == "turn_failed"], "the second turn fails")
    assert sink.replies() == [3]
    assert tries == ["good"] * 3 + ["bad"] * 3
    assert len(_steps(sink)) == 1


async def test_a_recorded_error_is_raised_again(make_cluster: MakeCluster) -> None:
    outside = Recorder()
    causes: list[BaseException | None] = []

    async def agent(turn: Turn) -> None:
        def fail() -> None:
            outside.ran.append("fail")
            raise ValueError("no such thing")

        said = ""
        try:
            await turn.step("fail", fail, record_errors=True)
        except StepFailed as error:
            said = str(error)
            causes.append(error.__cause__)
        await turn.step("wait", outside.open.wait)
        await turn.reply(said)

    cluster = await make_cluster(agent)
    await cluster[0].maybe_start_agent_loop("c", user_id="u")
    sink = await join(cluster, 1, "c", "s")
    await cluster[0].send_event_to_conversation("c", {})
    await wait_until(lambda: _steps(sink), "the error is recorded")
    await cluster.kill(0)
    outside.open.set()
    await wait_until(sink.replies, "the turn is done")
    assert sink.replies() == ["ValueError: no such thing"]
    assert outside.ran == ["fail"]
    assert [type(cause) for cause in causes] == [ValueError, type(None)]


async def test_a_step_returns_the_same_before_and_after_a_crash(make_cluster: MakeCluster) -> None:
    """Not the function's own object, which only the attempt that runs it would see."""

    @dataclass
    class Found:
        places: tuple[str, ...]

    outside = Recorder()
    seen: list[Any] = []

    async def agent(turn: Turn) -> None:
        seen.append(await turn.step("find", lambda: Found(("Rome",))))
        await turn.step("wait", outside.open.wait)
        await turn.reply("done")

    cluster = await make_cluster(agent)
    await cluster[0].maybe_start_agent_loop("c", user_id="u")
    sink = await join(cluster, 1, "c", "s")
    await cluster[0].send_event_to_conversation("c", {})
    await wait_until(lambda: _steps(sink), "the step is recorded")
    await cluster.kill(0)
    outside.open.set()
    await wait_until(sink.replies, "the turn is done")
    assert seen == [{"places": ["Rome"]}, {"places": ["Rome"]}]


def _within(turn: Turn) -> dict[str, Callable[[], Awaitable[Any]]]:
    return {
        "step": lambda: turn.step("inner", lambda: 1),
        "reply": lambda: turn.reply("from within"),
        "emit": lambda: turn.emit("noted", 1),
        "ask": lambda: turn.ask("how much?"),
        "schedule": lambda: turn.conversation.schedule(60, {}),
    }


@pytest.mark.parametrize("what", ["step", "reply", "emit", "ask", "schedule"])
async def test_what_could_not_be_matched_after_a_crash_is_refused_within_a_step(
    make_cluster: MakeCluster, what: str
) -> None:
    async def agent(turn: Turn) -> None:
        if turn.text == "within":
            await turn.step("outer", _within(turn)[what])
        await turn.step("outer", lambda: 1)
        await _within(turn)[what]()

    cluster = await make_cluster(agent)
    sink = await join(cluster, 0, "c", "s")
    await cluster[0].send_event_to_conversation("c", {"text": "within"})
    await wait_until(lambda: [e for e in sink.events if e["kind"] == "turn_failed"], "the turn fails")
    failed = next(e["data"] for e in sink.events if e["kind"] == "turn_failed")
    assert failed["code"] == "invalid_request"
    assert "within a step" in failed["message"]
    assert [e["kind"] for e in sink.events if e["turn"] == "t1"] == ["input", "turn_started", "turn_failed"]
    # Between steps it is as ever.
    await cluster[0].send_event_to_conversation("c", {"text": "outside"})
    over = "ask" if what == "ask" else "turn_done"
    await wait_until(lambda: [e for e in sink.events if e["kind"] == over], "the second turn goes on")


async def test_a_conversation_that_a_step_wakes_is_not_within_the_step(make_cluster: MakeCluster) -> None:
    async def agent(turn: Turn) -> None:
        async def tell_the_other() -> None:
            await cluster[0].maybe_start_agent_loop("other", user_id="u")
            await cluster[0].send_event_to_conversation("other", {"text": "from c"})

        if turn.conversation.id == "c":
            await turn.step("tell", tell_the_other)
        await turn.reply({"key": turn.key, "did": await turn.step("inner", lambda: turn.key)})

    cluster = await make_cluster(agent, nodes=1)
    sink = await join(cluster, 0, "c", "s")
    await cluster[0].send_event_to_conversation("c", {"text": "go"})
    await wait_until(sink.replies, "the first one answers")
    other = await join(cluster, 0, "other", "s2")
    await wait_until(other.replies, "the other one answers")
    assert sink.replies() == [{"key": "", "did": "c/t1/inner/1"}]
    assert other.replies() == [{"key": "", "did": "other/t1/inner/1"}]


async def test_a_step_may_stream(make_cluster: MakeCluster) -> None:
    async def agent(turn: Turn) -> None:
        async def write() -> str:
            await turn.stream("one ")
            await turn.stream("two")
            return "one two"

        await turn.reply({"text": await turn.step("write", write)})

    cluster = await make_cluster(agent)
    sink = await join(cluster, 0, "c", "s")
    await cluster[0].send_event_to_conversation("c", {})
    await wait_until(sink.replies, "the turn is done")
    assert sink.replies() == [{"text": "one two"}]


async def test_code_that_does_not_fit_the_record_fails_the_turn(make_cluster: MakeCluster) -> None:
    outside = Recorder()
    code = {"step": "old"}

    async def agent(turn: Turn) -> None:
        await turn.step(code["step"], lambda: 1)
        await outside.open.wait()
        await turn.reply("done")

    cluster = await make_cluster(agent)
    await cluster[0].maybe_start_agent_loop("c", user_id="u")
    sink = await join(cluster, 1, "c", "s")
    await cluster[0].send_event_to_conversation("c", {})
    await wait_until(lambda: _steps(sink), "a step is recorded")
    await cluster.kill(0)
    code["step"] = "new"
    outside.open.set()
    await wait_until(lambda: [e for e in sink.events if e["kind"] == "turn_failed"], "the turn fails")
    failed = next(e for e in sink.events if e["kind"] == "turn_failed")
    assert failed["data"]["code"] == "turn_mismatch"
    assert "step old number 1" in failed["data"]["message"]
    assert sink.replies() == []


async def test_results_that_cannot_be_recorded(make_cluster: MakeCluster) -> None:
    said: list[str] = []

    async def agent(turn: Turn) -> None:
        results: list[object] = [object(), "x" * (2 << 20)]
        for _ in range(2):
            try:
                await turn.step("bad", results.pop, 0)
            except InvalidRequest as error:
                said.append(error.wire_code)
        await turn.reply("went on")

    cluster = await make_cluster(agent, nodes=1)
    sink = await join(cluster, 0, "c", "s")
    await cluster[0].send_event_to_conversation("c", {})
    await wait_until(sink.replies, "the turn is done")
    assert said == ["invalid_request", "payload_too_large"]
