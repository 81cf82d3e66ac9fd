"""Messages and presses that meet a turn under way: wait for it, be refused, or end it; whoever owns it meanwhile."""

from __future__ import annotations

import asyncio
import dataclasses
from typing import Any

import pytest

from convener.errors import ConversationBusy, InvalidRequest
from convener.manager.turn import Turn
from convener.testing.cluster import QUICK, InProcessCluster
from tests.manager.conftest import MakeCluster, join
from tests.manager.people import ask, asked, ends, ends_turn, head_of, hibernated, kinds_of, log_of, replies_of, settled
from tests.manager.stepped import Stepped
from tests.manager.test_cluster import Gate
from tests.support.waiting import wait_until

pytestmark = pytest.mark.anyio


class Talker:
    """Streams half a sentence, then waits to be let go on; "short" is answered at once."""

    def __init__(self) -> None:
        self.open = asyncio.Event()
        self.begun: list[tuple[str, int]] = []
        self.cancelled: list[str] = []

    async def __call__(self, turn: Turn) -> None:
        self.begun.append((turn.id, turn.attempt))
        if turn.text != "short":
            await turn.stream(f"half of {turn.text}")
            try:
                await self.open.wait()
            except asyncio.CancelledError:
                self.cancelled.append(turn.id)
                raise
        await turn.reply({"text": turn.text})


async def talking(cluster: InProcessCluster, talker: Talker | Gate, cid: str = "c", node: int = 0) -> None:
    """Start a conversation on a node; return when its first turn runs."""
    await cluster[node].maybe_start_agent_loop(cid, user_id="u", initial_user_msg={"text": "one"})
    await wait_until(lambda: talker.begun, "the first turn runs")


def halves(*texts: str) -> list[Any]:
    return [{"text": f"half of {text}", "partial": True} for text in texts]


@pytest.mark.parametrize("how", ["the setting", "the message"])
@pytest.mark.parametrize("policy", ["enqueue", "reject", "interrupt"])
async def test_the_policies(make_cluster: MakeCluster, policy: Any, how: str) -> None:
    setting, own = (policy, None) if how == "the setting" else ("enqueue", policy)
    cluster = await make_cluster(talker := Talker(), options=dataclasses.replace(QUICK, overlap_policy=setting))
    await talking(cluster, talker)
    sink = await join(cluster, 2, "c", "s")

    async def send() -> Any:
        return await cluster[1].send_event_to_conversation("c", {"text": "short"}, message_id="m", overlap=own)

    if policy == "reject":
        with pytest.raises(ConversationBusy) as busy:
            await send()
        assert busy.value.retryable
        talker.open.set()
        await wait_until(lambda: len(sink.replies()) == 1, "the first is answered")
        assert not (await send()).duplicate
        await wait_until(lambda: len(sink.replies()) == 2, "the second is answered")
        assert ends(sink) == [("t1", "turn_done"), ("t2", "turn_done")]
        return
    assert (await send()).position == 2
    assert (await send()).duplicate
    if policy == "enqueue":
        assert talker.cancelled == []
        talker.open.set()
        await settled(cluster, "c")
        assert sink.replies() == [{"text": "one"}, {"text": "short"}]
        return
    await settled(cluster, "c")
    await wait_until(lambda: len(ends(sink)) == 2, "the client has seen both ends")
    assert talker.cancelled == ["t1"]
    assert sink.replies() == [*halves("one"), {"text": "short"}]
    assert ends(sink) == [("t1", "turn_interrupted"), ("t2", "turn_done")]
    assert (await head_of(cluster, "c")).halted == 1


async def test_a_message_may_choose_against_the_setting(make_cluster: MakeCluster) -> None:
    talker = Talker()
    cluster = await make_cluster(talker, options=dataclasses.replace(QUICK, overlap_policy="interrupt"))
    await talking(cluster, talker)
    await cluster[1].send_event_to_conversation("c", {"text": "short"}, overlap="enqueue")
    with pytest.raises(ConversationBusy):
        await cluster[1].send_event_to_conversation("c", {"text": "short"}, overlap="reject")
    with pytest.raises(InvalidRequest):
        await cluster[1].send_event_to_conversation("c", {"text": "short"}, overlap="other")
    talker.open.set()
    await settled(cluster, "c")
    assert await replies_of(cluster, "c") == [{"text": "one"}, {"text": "short"}]


async def test_it_interrupts_nothing_when_nothing_runs(make_cluster: MakeCluster) -> None:
    cluster = await make_cluster(Talker())
    await cluster[0].maybe_start_agent_loop("c", user_id="u")
    for _ in range(3):
        await cluster[1].send_event_to_conversation("c", {"text": "short"}, overlap="interrupt")
        await settled(cluster, "c")
    assert await replies_of(cluster, "c") == 3 * [{"text": "short"}]
    assert (await head_of(cluster, "c")).halted == 0


async def test_it_ends_the_queue_before_it_too(make_cluster: MakeCluster) -> None:
    cluster = await make_cluster(talker := Talker())
    await talking(cluster, talker)
    for text in ("two", "three"):
        await cluster[1].send_event_to_conversation("c", {"text": text})
    await cluster[2].send_event_to_conversation("c", {"text": "short"}, overlap="interrupt")
    await cluster[1].send_event_to_conversation("c", {"text": "short"})
    await settled(cluster, "c")
    log = await log_of(cluster, "c")
    assert [(e["turn"], e["kind"]) for e in log if e["kind"] in ("turn_interrupted", "turn_done")] == [
        *((f"t{n}", "turn_interrupted") for n in (1, 2, 3)),
        *((f"t{n}", "turn_done") for n in (4, 5)),
    ]
    assert [t for t, _ in talker.begun] == ["t1", "t4", "t5"], "what was queued was never begun"
    assert await replies_of(cluster, "c") == [*halves("one"), {"text": "short"}, {"text": "short"}]


async def test_many_at_once_leave_the_last(make_cluster: MakeCluster) -> None:
    cluster = await make_cluster(talker := Talker())
    await talking(cluster, talker)
    await asyncio.gather(
        *(cluster[n % 3].send_event_to_conversation("c", {"text": "x"}, overlap="interrupt") for n in range(12))
    )
    await cluster[0].send_event_to_conversation("c", {"text": "short"}, overlap="interrupt")
    head = await settled(cluster, "c")
    assert head.position == 14
    done = [e["turn"] for e in await log_of(cluster, "c") if e["kind"] == "turn_done"]
    assert done == ["t14"]
    interrupted = [e["turn"] for e in await log_of(cluster, "c") if e["kind"] == "turn_interrupted"]
    assert interrupted == [f"t{n}" for n in range(1, 14)]


# -- the owner goes down


async def test_it_is_not_lost_with_an_owner_that_has_not_taken_it_in(make_cluster: MakeCluster) -> None:
    stepped = Stepped(make_cluster)
    cluster = await stepped.start(talker := Talker())
    await talking(cluster, talker)
    await cluster[1].send_event_to_conversation("c", {"text": "two"})
    await wait_until(lambda: _is_taken(cluster, 2), "the second is taken in")
    stepped.stores[0].down |= {"append", "inbox"}
    await cluster[1].send_event_to_conversation("c", {"text": "short"}, overlap="interrupt")
    await cluster.kill(0)
    await settled(cluster, "c")
    assert [t for t, _ in talker.begun] == ["t1", "t3"]
    assert await replies_of(cluster, "c") == [{"text": "short"}]
    assert [await _end(cluster, turn) for turn in ("t1", "t2", "t3")] == [*2 * ["turn_interrupted"], "turn_done"]


async def test_it_is_not_lost_with_an_owner_that_has_taken_it_in(make_cluster: MakeCluster) -> None:
    """Between the batch with the message and the one that ends the turn the owner goes down."""
    stepped = Stepped(make_cluster)
    cluster = await stepped.start(talker := Talker())
    await talking(cluster, talker)
    await cluster[1].send_event_to_conversation("c", {"text": "two"})
    await wait_until(lambda: _is_taken(cluster, 2), "the second is taken in")
    ending = stepped.stores[0].hold("append", ends_turn)
    await cluster[1].send_event_to_conversation("c", {"text": "short"}, overlap="interrupt")
    await asyncio.wait_for(ending.reached.wait(), 20)
    await wait_until(lambda: _is_taken(cluster, 3), "the third is taken in")
    assert (await head_of(cluster, "c")).halted == 2
    await cluster.kill(0)
    await settled(cluster, "c")
    # The third had begun when its start was on its way to the store.
    assert [t for t, _ in talker.begun] == ["t1", "t3", "t3"]
    assert [await _end(cluster, turn) for turn in ("t1", "t2", "t3")] == [*2 * ["turn_interrupted"], "turn_done"]


@pytest.mark.parametrize("taken", [True, False], ids=["taken in", "not taken in"])
async def test_a_press_is_not_lost_with_its_owner(make_cluster: MakeCluster, taken: bool) -> None:
    stepped = Stepped(make_cluster)
    cluster = await stepped.start(talker := Talker())
    await talking(cluster, talker)
    ending = stepped.stores[0].hold("append", ends_turn)
    if not taken:
        stepped.stores[0].down |= {"append", "inbox"}
    assert await cluster[1].interrupt("c", "t1") == "interrupting"
    if taken:
        await asyncio.wait_for(ending.reached.wait(), 20)
        await wait_until(lambda: _is_taken(cluster, 2), "the press is taken in")
        assert (await head_of(cluster, "c")).halted == 1
    await cluster.kill(0)
    await cluster[1].send_event_to_conversation("c", {"text": "short"})
    await settled(cluster, "c")
    assert [t for t, _ in talker.begun] == ["t1", "t3"], "the turn is not begun again"
    assert [await _end(cluster, turn) for turn in ("t1", "t3")] == ["turn_interrupted", "turn_done"]


async def test_what_was_streamed_is_kept_once_when_the_end_is_repeated(make_cluster: MakeCluster) -> None:
    stepped = Stepped(make_cluster)
    cluster = await stepped.start(talker := Talker())
    await talking(cluster, talker)
    stepped.stores[0].lose_reply("append", ends_turn)
    await cluster[1].send_event_to_conversation("c", {"text": "short"}, overlap="interrupt")
    await settled(cluster, "c")
    assert await replies_of(cluster, "c") == [*halves("one"), {"text": "short"}]


async def test_an_interrupted_turn_is_ended_after_a_suspension(make_cluster: MakeCluster) -> None:
    cluster = await make_cluster(talker := Talker())
    await talking(cluster, talker)
    await cluster[0].engine.suspend()
    await cluster[1].send_event_to_conversation("c", {"text": "short"}, overlap="interrupt")
    await cluster[0].engine.resume()
    await settled(cluster, "c")
    assert [t for t, _ in talker.begun] == ["t1", "t2"]
    assert await replies_of(cluster, "c") == [*halves("one"), {"text": "short"}]
    assert [await _end(cluster, turn) for turn in ("t1", "t2")] == ["turn_interrupted", "turn_done"]


async def test_a_suspension_between_the_press_and_the_end(make_cluster: MakeCluster) -> None:
    """Taken in, and suspended before the turn could be ended: ended when the lease is good again."""
    leave = asyncio.Event()
    begun: list[int] = []

    async def agent(turn: Turn) -> None:
        begun.append(turn.attempt)
        if turn.text == "one":
            await turn.stream("so far")
            try:
                await asyncio.Event().wait()
            finally:
                await leave.wait()
        await turn.reply(turn.text)

    cluster = await make_cluster(agent)
    await cluster[0].maybe_start_agent_loop("c", user_id="u", initial_user_msg={"text": "one"})
    await wait_until(lambda: begun, "the turn runs")
    await cluster[1].send_event_to_conversation("c", {"text": "two"}, overlap="interrupt")
    await wait_until(lambda: _is_taken(cluster, 2), "the second is taken in")
    suspended = asyncio.create_task(cluster[0].engine.suspend())
    await wait_until(lambda: cluster[0].engine.runner("c")._suspended, "it is suspended")
    leave.set()
    await suspended
    assert (await head_of(cluster, "c")).done == 0
    await cluster[0].engine.resume()
    await settled(cluster, "c")
    assert begun == [1, 1]
    assert await replies_of(cluster, "c") == [{"text": "so far", "partial": True}, "two"]


# -- which turn is meant


async def test_a_press_does_not_hit_what_was_sent_after_it(make_cluster: MakeCluster) -> None:
    """It was lost on its way to the owner, and is found, in one reading, with a message that was sent later."""
    cluster = await make_cluster(gate := Gate())
    await talking(cluster, gate)
    view = cluster[0].engine.views.get("c")
    assert view is not None
    runner, view.listener = view.listener, None
    pressed = asyncio.create_task(cluster[1].interrupt("c"))
    await wait_until(lambda: _is_given(cluster, 2), "the press is recorded")
    gate.open.set()
    await wait_until(lambda: _is_done(cluster, 1), "the turn that was meant has ended by itself")
    await cluster[1].send_event_to_conversation("c", {"text": "two"})
    view.listener = runner
    assert runner is not None
    runner.missed()
    await settled(cluster, "c")
    assert await pressed == "stale"
    assert [r["text"] for r in await replies_of(cluster, "c")] == ["one", "two"]


async def test_an_old_halt_does_not_hit_a_later_turn(make_cluster: MakeCluster) -> None:
    cluster = await make_cluster(talker := Talker())
    await talking(cluster, talker)
    assert await cluster[1].interrupt("c") == "interrupted"
    await cluster[1].send_event_to_conversation("c", {"text": "two"})
    await wait_until(lambda: len(talker.begun) == 2, "the next turn runs")
    assert (await head_of(cluster, "c")).halted == 1
    await cluster.kill(0)
    await wait_until(lambda: len(talker.begun) == 3, "it is begun again elsewhere")
    talker.open.set()
    await settled(cluster, "c")
    assert await replies_of(cluster, "c") == [*halves("one"), {"text": "two"}]


async def test_a_press_on_what_is_queued_is_stale(make_cluster: MakeCluster) -> None:
    cluster = await make_cluster(talker := Talker())
    await talking(cluster, talker)
    await cluster[1].send_event_to_conversation("c", {"text": "short"})
    await cluster[1].interrupt("c", "t2")
    assert talker.cancelled == []
    talker.open.set()
    await settled(cluster, "c")
    assert await replies_of(cluster, "c") == [{"text": "one"}, {"text": "short"}]


async def test_it_ends_a_turn_that_waits_for_a_person(make_cluster: MakeCluster) -> None:
    cluster = await make_cluster(ask)
    await cluster[0].maybe_start_agent_loop("c", user_id="u", initial_user_msg={"ask": "ok?"})
    await asked(cluster, "c")
    await hibernated(cluster, "c")
    await cluster[1].send_event_to_conversation("c", {"ask": "then this?"}, overlap="interrupt")
    (question,) = await asked_now(cluster, "t2.1")
    assert question.prompt == "then this?"
    await cluster[2].answer("c", "t2.1", "yes")
    await settled(cluster, "c")
    assert [r["said"] for r in await replies_of(cluster, "c")] == ["yes"]
    assert await _end(cluster, "t1") == "turn_interrupted"


async def asked_now(cluster: InProcessCluster, ask_id: str) -> Any:
    async def found() -> Any:
        questions = await cluster[0].questions("c")
        return questions if [q.ask_id for q in questions] == [ask_id] else None

    return await wait_until(found, f"{ask_id} alone is open")


async def _is_taken(cluster: InProcessCluster, position: int) -> bool:
    return (await head_of(cluster, "c")).cursor >= position


async def _is_given(cluster: InProcessCluster, position: int) -> bool:
    return (await head_of(cluster, "c")).position >= position


async def _is_done(cluster: InProcessCluster, position: int) -> bool:
    return (await head_of(cluster, "c")).done >= position


async def _end(cluster: InProcessCluster, turn: str) -> str:
    return (await kinds_of(cluster, "c", turn))[-1]
