"""Interleavings that once broke an invariant, each stopped at the very call where it happens."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

import pytest

from convener.errors import ConvenerError
from convener.manager.turn import Turn
from convener.testing.cluster import FunctionAgent, InProcessCluster
from convener.testing.steps import Step
from tests.manager.conftest import MakeCluster
from tests.manager.stepped import Stepped, answered, idle, position
from tests.manager.test_cluster import echo
from tests.support.waiting import wait_until

pytestmark = pytest.mark.anyio


@pytest.fixture
def stepped(make_cluster: MakeCluster) -> Stepped:
    return Stepped(make_cluster)


async def stopped_release(stepped: Stepped, step: Step, releasing: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
    task = asyncio.ensure_future(releasing)
    await wait_until(step.reached.is_set, "RELEASE has come to where it is stopped")
    return task


async def test_who_releases_does_not_acknowledge(stepped: Stepped) -> None:
    """I11: a runner that has released and does not know it is not somebody who will answer."""
    cluster = await stepped.start(nodes=1)
    await cluster[0].maybe_start_agent_loop("c", user_id="u")
    await idle(cluster[0], "c")
    step = stepped.stores[0].hold_reply("release")
    release = await stopped_release(stepped, step, cluster[0].engine.hibernate("c"))
    sending = asyncio.ensure_future(cluster[0].send_event_to_conversation("c", {"text": "x"}))
    await wait_until(lambda: position(cluster, "c"), "the message is stored")
    await wait_until(lambda: sending.done() or cluster[0].engine.starter.is_starting("c"), "an owner is looked for")
    step.go()
    await sending
    assert await release
    await wait_until(lambda: answered(cluster, "c", 1), "it is answered", limit=5)


@pytest.mark.parametrize("refused", [False, True], ids=["released", "refused"])
async def test_a_release_whose_asker_gives_up_is_carried_through(stepped: Stepped, refused: bool) -> None:
    """Whoever asked for hibernation may time out; the runner must neither leave half-way nor leave for ever."""
    cluster = await stepped.start(nodes=2)
    await cluster[0].maybe_start_agent_loop("c", user_id="u")
    await idle(cluster[0], "c")
    name = "hold" if refused else "hold_reply"
    step: Step = getattr(stepped.stores[0], name)("release")
    release = await stopped_release(stepped, step, cluster[0].engine.hibernate("c"))
    release.cancel()
    await asyncio.wait({release})
    if refused:
        await cluster[1].send_event_to_conversation("c", {"text": "x"})
    step.go()
    if not refused:
        await wait_until(lambda: cluster[0].engine.runner("c") is None, "the runner has ended", limit=5)
        await cluster[1].send_event_to_conversation("c", {"text": "x"})
    await wait_until(lambda: answered(cluster, "c", 1), "the message is answered", limit=5)


async def test_an_agent_that_ends_by_a_cancellation_of_its_own_fails_its_turn(stepped: Stepped) -> None:
    async def agent(turn: Turn) -> None:
        if turn.text == "bad":
            inner = asyncio.ensure_future(asyncio.Event().wait())
            inner.cancel()
            await inner
        await echo(turn)

    cluster = await stepped.start(agent, nodes=1)
    await cluster[0].maybe_start_agent_loop("c", user_id="u")
    for text in ("bad", "good"):
        await cluster[0].send_event_to_conversation("c", {"text": text})
    await wait_until(lambda: answered(cluster, "c", 2), "both turns have ended", limit=5)


class Unequal(dict[str, Any]):
    """As a dict that holds an array: it cannot be compared."""

    def __eq__(self, other: object) -> bool:
        raise ValueError("the truth value is ambiguous")

    __hash__ = None


@pytest.mark.parametrize("kind", ["kept", "unequal", "no object"])
async def test_what_an_agent_does_to_its_state_fails_at_most_its_turn(stepped: Stepped, kind: str) -> None:
    kept: list[dict[str, Any]] = []

    async def agent(turn: Turn) -> None:
        if kind == "unequal":
            turn.state["m"] = Unequal()
        elif kind == "no object" and turn.text == "1":
            turn.state = 5  # type: ignore[assignment]
        else:
            turn.state["n"] = turn.state.get("n", 0) + 1
        kept.append(turn.state)

    cluster = await stepped.start(FunctionAgent(agent), nodes=1)
    await cluster[0].maybe_start_agent_loop("c", user_id="u")
    for n in range(3):
        await cluster[0].send_event_to_conversation("c", {"text": str(n)})
        await wait_until(lambda k=n: answered(cluster, "c", k + 1), "the turn has ended", limit=5)
        if kind == "kept":
            kept[-1]["late"] = object()
    raw = await cluster[0].engine.node.store.state("c")
    assert raw == {"kept": b'{"n":3}', "unequal": b'{"m":{}}', "no object": b'{"n":2}'}[kind]


async def refusal(work: Coroutine[Any, Any, Any]) -> str:
    """The code of the error that `work` raises, "" for none."""
    try:
        await work
    except ConvenerError as error:
        return error.wire_code
    return ""


def runners(cluster: InProcessCluster) -> int:
    return sum(len(manager.engine.runners) for manager in cluster)
