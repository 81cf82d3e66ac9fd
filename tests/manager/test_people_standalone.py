"""Questions, alarms and typed state of a manager that stands alone, over a file that outlives the process."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest

from convener.errors import AskClosed
from convener.manager import StandaloneConversationManager
from convener.manager.context import NodeOptions
from convener.manager.traits import ModelCodec, Traits
from convener.manager.turn import Turn
from convener.store.sqlite import SQLiteStore
from tests.manager.people import TraitedAgent
from tests.manager.test_faults import events_of
from tests.support.waiting import wait_until

pytestmark = pytest.mark.anyio


class Diary(msgspec.Struct):
    answers: dict[int, str] = msgspec.field(default_factory=dict[int, str])


async def agent(turn: Turn[Diary]) -> None:
    if turn.reason == "alarm":
        turn.state.answers[0] = turn.data
        return
    await turn.conversation.schedule(1.0, "rang")
    turn.state.answers[len(turn.state.answers) + 1] = await turn.ask("what happened?")
    await turn.reply(turn.state.answers[1])


@asynccontextmanager
async def process(directory: Path, recovery: Any = "resume") -> AsyncGenerator[StandaloneConversationManager]:
    """One life of the process."""
    options = NodeOptions(name="alone", drain_timeout=1.0, recovery=recovery)
    traits = Traits(codec=ModelCodec(Diary))
    store = SQLiteStore(directory)
    async with StandaloneConversationManager(
        agent=TraitedAgent(agent, traits), store=store, options=options
    ) as manager:
        yield manager


@pytest.mark.parametrize("recovery", ["resume", "wait", "fail"])
async def test_they_outlive_the_process(tmp_path: Path, recovery: Any) -> None:
    async with process(tmp_path, recovery) as manager:
        await manager.maybe_start_agent_loop("c", user_id="u", initial_user_msg={})
        await wait_until(lambda: manager.questions("c"), "it asks")
    async with process(tmp_path, recovery) as manager:
        assert [q.ask_id for q in await manager.questions("c")] == ["t1.1"]
        assert (await manager.describe("c")).status == "waiting"
        await manager.answer("c", "t1.1", "nothing", message_id="m")
        assert (await manager.answer("c", "t1.1", "nothing", message_id="m")).duplicate
        with pytest.raises(AskClosed):
            await manager.answer("c", "t1.1", "something")
        store = manager.engine.node.store

        async def is_written() -> bool:
            raw = await store.state("c")
            return raw is not None and msgspec.json.decode(raw)["$state"] == {"answers": {"1": "nothing", "0": "rang"}}

        await wait_until(is_written, "it was answered, and its alarm has rung")
        events = await events_of(store, "c")
        assert [e["data"] for e in events if e["kind"] == "reply"] == ["nothing"]
        assert [e["kind"] for e in events].count("ask") == 1
    async with process(tmp_path, recovery) as manager:
        report = await manager.audit()
        assert report["violations"] == []
        await manager.delete("c")
        assert await manager.engine.node.store.alarms("c") == {}
