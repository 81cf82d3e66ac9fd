"""Attempts that do not end when they are cancelled: abandoned after a while, and without any say from then on."""

from __future__ import annotations

import asyncio
import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import pytest

from convener.errors import ConvenerError
from convener.manager.turn import Turn
from convener.testing.cluster import QUICK
from tests.manager.conftest import MakeCluster, join
from tests.manager.people import asked, kinds_of, log_of, replies_of, settled, store_of
from tests.manager.stepped import Stepped
from tests.support.waiting import wait_until

pytestmark = pytest.mark.anyio


@pytest.fixture(autouse=True)
def short_grace(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("convener.manager.turns.TURN_GRACE_S", 0.05)


class Stubborn:
    """An agent whose first attempt at "stubborn" ignores every cancellation until it is released, and then tries all
    that a turn can do.
    """

    def __init__(self) -> None:
        self.begun: list[int] = []
        self.release = asyncio.Event()
        self.open = asyncio.Event()
        self.said: list[str] = []
        self.over = asyncio.Event()

    async def __call__(self, turn: Turn) -> None:
        if turn.text != "stubborn":
            await turn.reply(turn.text)
            return
        self.begun.append(turn.attempt)
        if turn.attempt > 1:
            await self.open.wait()
            turn.state["by"] = turn.attempt
            await turn.reply(f"attempt {turn.attempt}")
            return
        while not self.release.is_set():
            try:
                await self.release.wait()
            except asyncio.CancelledError:
                continue
        try:
            await self.try_everything(turn)
        finally:
            self.over.set()

    async def try_everything(self, turn: Turn) -> None:
        turn.state["by"] = turn.attempt
        await turn.stream("too late")
        await turn.emit("note", "too late")
        await turn.reply("too late")
        for work in (
            lambda: turn.step("late", lambda: 1),
            lambda: turn.ask("anybody?"),
            lambda: turn.conversation.schedule(1000, "late"),
        ):
            try:
                await work()
            except ConvenerError as error:
                self.said.append(error.wire_code)


async def nothing_of_it(cluster: Any, stubborn: Stubborn) -> None:
    """What the abandoned attempt has tried was refused, and has left no trace."""
    assert stubborn.said == ["ownership_lost"] * 3
    assert "too late" not in str(await log_of(cluster, "c"))
    assert await cluster[0].questions("c") == []
    assert await store_of(cluster).alarms("c") == {}


async def test_after_a_suspension(make_cluster: MakeCluster) -> None:
    """The same turn is under way again when the abandoned attempt goes on."""
    cluster = await make_cluster(stubborn := Stubborn())
    sink = await join(cluster, 0, "c", "s")
    await cluster[0].send_event_to_conversation("c", {"text": "stubborn"})
    await wait_until(lambda: stubborn.begun == [1], "the first attempt runs")
    await cluster[0].engine.suspend()
    await cluster[0].engine.resume()
    await wait_until(lambda: stubborn.begun == [1, 2], "the second attempt runs")
    stubborn.release.set()
    await asyncio.wait_for(stubborn.over.wait(), 20)
    await nothing_of_it(cluster, stubborn)
    assert await kinds_of(cluster, "c", "t1") == ["input", "turn_started", "turn_started"], "it has not ended the turn"
    stubborn.open.set()
    await settled(cluster, "c")
    assert await replies_of(cluster, "c") == ["attempt 2"]
    assert await store_of(cluster).state("c") == b'{"by":2}'
    await cluster[0].send_event_to_conversation("c", {"text": "next"})
    await wait_until(lambda: sink.replies() == ["attempt 2", "next"], "the conversation goes on")


async def test_after_an_interrupt(make_cluster: MakeCluster) -> None:
    cluster = await make_cluster(stubborn := Stubborn())
    await cluster[0].maybe_start_agent_loop("c", user_id="u", initial_user_msg={"text": "stubborn"})
    await wait_until(lambda: stubborn.begun == [1], "the first attempt runs")
    assert await cluster[1].interrupt("c") == "interrupted"
    await cluster[0].send_event_to_conversation("c", {"text": "next"})
    await settled(cluster, "c")
    stubborn.release.set()
    await asyncio.wait_for(stubborn.over.wait(), 20)
    await nothing_of_it(cluster, stubborn)
    assert await replies_of(cluster, "c") == ["next"]
    assert await store_of(cluster).state("c") is None


async def test_after_a_stop(make_cluster: MakeCluster) -> None:
    cluster = await make_cluster(stubborn := Stubborn())
    await cluster[0].maybe_start_agent_loop("c", user_id="u", initial_user_msg={"text": "stubborn"})
    await wait_until(lambda: stubborn.begun == [1], "the first attempt runs")
    assert await cluster[1].close_session("c") == "stopped"
    stubborn.release.set()
    await asyncio.wait_for(stubborn.over.wait(), 20)
    await nothing_of_it(cluster, stubborn)
    assert (await log_of(cluster, "c"))[-1]["kind"] == "stopped"


async def test_on_a_node_that_was_buried(make_cluster: MakeCluster) -> None:
    cluster = await make_cluster(stubborn := Stubborn())
    await cluster[0].maybe_start_agent_loop("c", user_id="u", initial_user_msg={"text": "stubborn"})
    await wait_until(lambda: stubborn.begun == [1], "the first attempt runs")
    old = cluster[0].engine.node.incarnation
    cluster[0]._rebirth.set()
    await wait_until(lambda: cluster[0].engine.node.incarnation != old, "its next life begins")
    await wait_until(lambda: stubborn.begun == [1, 2], "the turn is begun again")
    stubborn.release.set()
    await asyncio.wait_for(stubborn.over.wait(), 20)
    await nothing_of_it(cluster, stubborn)
    stubborn.open.set()
    await settled(cluster, "c")
    assert await replies_of(cluster, "c") == ["attempt 2"]


async def test_pieces_of_an_abandoned_attempt_are_not_shown(make_cluster: MakeCluster) -> None:
    stepped = Stepped(make_cluster)
    begun: list[int] = []
    release, late, end = asyncio.Event(), asyncio.Event(), asyncio.Event()
    shown: list[str] = []

    async def agent(turn: Turn) -> None:
        begun.append(turn.attempt)
        await turn.stream(f"attempt {turn.attempt} ")
        if turn.attempt > 1:
            await late.wait()
            # The second of these goes out after whatever was streamed before the first.
            for text in ("goes on ", "and on"):
                await turn.stream(text)
                await wait_until(lambda t=text: t in str(shown), f"{text} is shown")
            await end.wait()
            return
        while not release.is_set():
            try:
                await release.wait()
            except asyncio.CancelledError:
                continue
        await turn.stream("too late")
        late.set()
        await end.wait()

    def is_seen(cid: str, owner: str, epoch: int, position: int, pieces: Sequence[str]) -> bool:
        shown.extend(pieces)
        return False

    cluster = await stepped.start(agent)
    stepped.stores[0].hold("add_pieces", is_seen)
    await cluster[0].maybe_start_agent_loop("c", user_id="u", initial_user_msg={})
    await wait_until(lambda: "attempt 1" in str(shown), "the first attempt is shown")
    await cluster[0].engine.suspend()
    await cluster[0].engine.resume()
    await wait_until(lambda: "attempt 2" in str(shown), "the second attempt is shown")
    release.set()
    await wait_until(lambda: "and on" in str(shown), "what the second attempt says then is shown")
    assert "too late" not in str(shown)
    end.set()
    await settled(cluster, "c")
    assert await replies_of(cluster, "c") == [{"text": "attempt 2 goes on and on"}]
    assert not await store_of(cluster).pieces("c")


# -- lapses and limits that are no reason to fail a turn


async def test_a_lapse_of_the_lease_at_the_start_of_a_step(make_cluster: MakeCluster) -> None:
    lapsed: list[int] = []

    async def agent(turn: Turn) -> None:
        if not lapsed:
            lapsed.append(turn.attempt)
            cluster[0].engine.node.lease._deadline = -math.inf
        await turn.reply(await turn.step("work", lambda: 7))

    cluster = await make_cluster(agent)
    await cluster[0].maybe_start_agent_loop("c", user_id="u", initial_user_msg={})
    await settled(cluster, "c")
    assert lapsed == [1]
    assert await replies_of(cluster, "c") == [7]
    assert (await kinds_of(cluster, "c", "t1"))[-1] == "turn_done"


async def test_an_agent_that_asks_when_its_time_is_up(make_cluster: MakeCluster) -> None:
    async def agent(turn: Turn) -> None:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            await turn.reply(await turn.ask("more time?"))

    cluster = await make_cluster(agent, options=dataclasses.replace(QUICK, turn_timeout=0.1))
    await cluster[0].maybe_start_agent_loop("c", user_id="u", initial_user_msg={})
    await asked(cluster, "c")
    await cluster[1].answer("c", "t1.1", "no")
    await settled(cluster, "c")
    assert await replies_of(cluster, "c") == ["no"]
