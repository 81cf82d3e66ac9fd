"""Agents that act by themselves: one loop per loaded conversation, its turns kept like any other."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from convener.errors import InvalidRequest
from convener.manager.loops import Loop
from convener.manager.traits import ModelCodec, Traits
from convener.manager.turn import Turn
from convener.testing.cluster import QUICK, FunctionAgent, InProcessCluster
from tests.manager.conftest import MakeCluster, join
from tests.support.waiting import wait_until

pytestmark = pytest.mark.anyio


def looping(loop: Callable[[Loop[Any]], Awaitable[None]], hibernates: bool = True, **traits: Any) -> FunctionAgent:
    """An agent that is a loop, as `@app.loop` makes it."""

    async def never(turn: Turn) -> None:
        raise AssertionError(f"turn {turn.id} did not go to the loop")

    return FunctionAgent(never, traits=Traits(loop=loop, hibernates=hibernates, keeps_running=True, **traits))


async def counting(loop: Loop) -> None:
    """Counts its turns in the state and says so."""
    async for turn in loop.turns():
        turn.state["n"] = turn.state.get("n", 0) + 1
        await turn.reply({"n": turn.state["n"], "text": turn.text, "reason": turn.reason})


async def status(cluster: InProcessCluster, node: int, cid: str = "c") -> str:
    return (await cluster[node].describe(cid)).status


async def test_messages_become_turns_of_the_loop(make_cluster: MakeCluster) -> None:
    cluster = await make_cluster(looping(counting))
    sink = await join(cluster, 1, "c", "s")
    for text in ("a", "b", "c"):
        await cluster[0].send_event_to_conversation("c", {"text": text})
    await wait_until(lambda: len(sink.replies()) == 3, "three replies")
    assert [r["text"] for r in sink.replies()] == ["a", "b", "c"]
    assert [r["n"] for r in sink.replies()] == [1, 2, 3]


async def test_a_loop_acts_without_clients_and_messages(make_cluster: MakeCluster) -> None:
    async def ticking(loop: Loop) -> None:
        async for turn in loop.turns(every=0.05):
            turn.state["ticks"] = turn.state.get("ticks", 0) + (turn.data is None)
            await turn.emit("tick", {"reason": turn.reason, "ticks": turn.state["ticks"]})

    cluster = await make_cluster(looping(ticking), options=dataclasses.replace(QUICK, hibernate_after=0.2))
    await cluster[0].maybe_start_agent_loop("c", user_id="u")

    async def ticks() -> list[Any]:
        page = await cluster[1].engine.node.store.read("c", _beginning(), 1000)
        return [e.event for e in page.entries if '"kind":"tick"' in e.event] if page else []

    await wait_until(lambda: _longer(ticks, 3), "it has acted three times, though it would be idle long since")
    assert '"reason":"alarm"' in (await ticks())[0]
    await cluster.kill(0)
    before = len(await ticks())
    await wait_until(lambda: _longer(ticks, before + 3), "another node goes on")


async def test_a_loaded_loop_is_loaded_again_when_its_node_goes_down(make_cluster: MakeCluster) -> None:
    began: list[int] = []

    async def waiting(loop: Loop) -> None:
        began.append(loop.conversation.epoch)
        async for turn in loop.turns():
            await turn.reply(turn.data)

    cluster = await make_cluster(looping(waiting))
    await cluster[0].maybe_start_agent_loop("c", user_id="u")
    await wait_until(lambda: began, "it runs")
    await cluster.kill(0)
    await wait_until(lambda: len(began) == 2, "it runs elsewhere, though nothing is unanswered")
    assert began[1] > began[0]


async def test_a_loop_moves_when_its_node_leaves(make_cluster: MakeCluster) -> None:
    began: list[str] = []

    async def waiting(loop: Loop) -> None:
        began.append(loop.conversation.id)
        async for _ in loop.turns():
            pass

    cluster = await make_cluster(looping(waiting, hibernates=False))
    await cluster[0].maybe_start_agent_loop("c", user_id="u")
    await wait_until(lambda: began, "it runs")
    await cluster.leave(0)
    await wait_until(lambda: len(began) == 2, "it runs on another node")


async def test_a_cut_off_turn_comes_again(make_cluster: MakeCluster) -> None:
    begun: list[int] = []
    gate = asyncio.Event()

    async def loop_(loop: Loop) -> None:
        async for turn in loop.turns():
            begun.append(turn.attempt)
            await gate.wait()
            await turn.reply({"attempt": turn.attempt, "n": turn.state.setdefault("n", 1)})

    cluster = await make_cluster(looping(loop_))
    await cluster[0].maybe_start_agent_loop("c", user_id="u")
    sink = await join(cluster, 1, "c", "s")
    await cluster[1].send_event_to_conversation("c", {"text": "x"})
    await wait_until(lambda: begun, "the turn has begun")
    owner = cluster.owner_of("c")
    assert owner is not None
    if owner == 1:
        sink = await join(cluster, 2, "c", "s2")
    await cluster.kill(owner)
    await wait_until(lambda: len(begun) == 2, "it is begun again")
    gate.set()
    await wait_until(sink.replies, "it is done")
    assert begun == [1, 2]
    assert sink.replies() == [{"attempt": 2, "n": 1}]


async def test_an_error_fails_the_turn_and_begins_the_loop_again(make_cluster: MakeCluster) -> None:
    begun: list[str] = []

    async def brittle(loop: Loop) -> None:
        begun.append("loop")
        async for turn in loop.turns():
            if turn.text == "bad":
                turn.state["bad"] = True
                raise ValueError("secret")
            await turn.reply(dict(turn.state))

    cluster = await make_cluster(looping(brittle))
    sink = await join(cluster, 0, "c", "s")
    for text in ("bad", "good"):
        await cluster[0].send_event_to_conversation("c", {"text": text})
    await wait_until(sink.replies, "the next message is answered")
    failed = [e["data"] for e in sink.events if e["kind"] == "turn_failed"]
    assert [(f["message"], f["code"]) for f in failed] == [("the agent failed", "agent_error")]
    assert sink.replies() == [{}]
    assert len(begun) == 2


async def test_interrupt_cuts_the_turn_off_and_keeps_what_it_said(make_cluster: MakeCluster) -> None:
    begun: list[str] = []

    async def endless(loop: Loop) -> None:
        async for turn in loop.turns():
            begun.append(turn.text)
            await turn.stream("so far")
            if turn.text == "long":
                await asyncio.Event().wait()

    cluster = await make_cluster(looping(endless))
    sink = await join(cluster, 0, "c", "s")
    await cluster[0].send_event_to_conversation("c", {"text": "long"})
    await wait_until(lambda: begun, "it has begun")
    assert await cluster[2].interrupt("c") == "interrupted"
    await cluster[1].send_event_to_conversation("c", {"text": "short"})
    await wait_until(lambda: len(sink.replies()) == 2, "the next one is answered")
    assert sink.replies() == [{"text": "so far", "partial": True}, {"text": "so far"}]
    assert begun == ["long", "short"]


async def test_a_loop_that_returns_begins_again_with_the_next_message(make_cluster: MakeCluster) -> None:
    begun: list[int] = []

    async def once(loop: Loop) -> None:
        begun.append(1)
        async for turn in loop.turns():
            await turn.reply({"text": turn.text})
            return

    cluster = await make_cluster(looping(once))
    sink = await join(cluster, 0, "c", "s")
    for text in ("a", "b", "c"):
        await cluster[0].send_event_to_conversation("c", {"text": text})
    await wait_until(lambda: len(sink.replies()) == 3, "three replies")
    done = [e["turn"] for e in sink.events if e["kind"] == "turn_done"]
    await wait_until(lambda: len([e for e in sink.events if e["kind"] == "turn_done"]) == 3, f"all ended, not {done}")


async def test_what_comes_from_outside_becomes_a_turn_once(make_cluster: MakeCluster) -> None:
    sent: list[bool] = []

    async def listening(loop: Loop) -> None:
        for _ in range(2):
            result = await loop.send({"text": "news"}, message_id="news-1")
            sent.append(result.duplicate)
        async for turn in loop.turns():
            await turn.reply({"text": turn.text, "user": turn.input.user_id})

    cluster = await make_cluster(looping(listening))
    sink = await join(cluster, 0, "c", "s")
    await wait_until(sink.replies, "it is answered")
    assert sent == [False, True]
    assert sink.replies() == [{"text": "news", "user": "u"}]


async def test_an_idle_loop_hibernates_unless_it_may_not(make_cluster: MakeCluster) -> None:
    options = dataclasses.replace(QUICK, hibernate_after=0.2)
    cluster = await make_cluster(looping(counting), options=options)
    await cluster[0].maybe_start_agent_loop("c", user_id="u")
    await wait_until(lambda: _is(cluster, "hibernated"), "it has hibernated")
    sink = await join(cluster, 1, "d", "s")
    await cluster[1].send_event_to_conversation("c", {"text": "wake"})

    async def answered() -> bool:
        head = await cluster[1].engine.node.store.head("c")
        return head is not None and head.done == head.position == 1

    await wait_until(answered, "a message wakes it")
    assert sink.replies() == []

    awake = await make_cluster(looping(counting, hibernates=False), options=options)
    await awake[0].maybe_start_agent_loop("c", user_id="u")
    assert not await awake[0].engine.hibernate("c")
    assert await status(awake, 0) == "idle"


async def test_a_loop_sees_its_state_and_may_have_a_form_for_it(make_cluster: MakeCluster) -> None:
    seen: list[Any] = []

    async def typed(loop: Loop[Tally]) -> None:
        seen.append(loop.state)
        async for turn in loop.turns():
            turn.state.n += 1
            await turn.reply({"n": turn.state.n})

    agent = looping(typed, codec=ModelCodec(Tally, version=3))
    cluster = await make_cluster(agent)
    await cluster[0].maybe_start_agent_loop("c", user_id="u")
    sink = await join(cluster, 2, "c", "s")
    await cluster[0].send_event_to_conversation("c", "x")
    await wait_until(sink.replies, "it is answered")
    await cluster.kill(0)
    await wait_until(lambda: len(seen) == 2, "it runs elsewhere")
    assert seen == [Tally(0), Tally(1)]


async def test_wrong_intervals_are_refused(make_cluster: MakeCluster) -> None:
    refused: list[str] = []

    async def wrong(loop: Loop) -> None:
        for every in (0, -1):
            with pytest.raises(InvalidRequest, match="every"):
                loop.turns(every=every)
            refused.append(str(every))

    cluster = await make_cluster(looping(wrong))
    await cluster[0].maybe_start_agent_loop("c", user_id="u")
    await wait_until(lambda: len(refused) == 2, "both were refused")


@dataclasses.dataclass
class Tally:
    n: int = 0


def _beginning() -> Any:
    from convener.core.cursor import Cursor

    return Cursor()


async def _longer(what: Callable[[], Awaitable[list[Any]]], count: int) -> bool:
    return len(await what()) >= count


async def _is(cluster: InProcessCluster, wanted: str) -> bool:
    return await status(cluster, 1) == wanted
