"""How to write agents: every piece of code of the page runs, and does what the page says of it."""

from __future__ import annotations

import asyncio
import importlib.util
import re
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, cast

import msgspec
import pytest

from convener import Convener, Interrupted, Settings, Turn
from convener.core.cursor import Cursor
from convener.errors import AskClosed, ConversationBusy, InvalidRequest
from convener.manager.base import ConversationManager, SendResult
from convener.testing.cluster import InProcessCluster
from tests.docs.pages import DOCS, blocks, steps
from tests.support.waiting import wait_until

PAGE = (DOCS / "how-to" / "agents.md").read_text(encoding="utf-8")
FILES = {step.argument: step.code for step in steps(PAGE, ["file"])}


def load(name: str, directory: Path) -> Any:
    """A piece of code of the page, as a module."""
    path = directory / name
    path.write_text(FILES[name], encoding="utf-8")
    spec = importlib.util.spec_from_file_location(f"page_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Talk:
    """Somebody who talks to the agent, in one conversation."""

    def __init__(self, manager: ConversationManager) -> None:
        self.manager = manager

    async def say(self, text: str, **more: Any) -> SendResult:
        return await self.manager.send_event_to_conversation("c", {"text": text}, **more)

    async def events(self, kind: str) -> list[Any]:
        """Data of the log's entries of a kind."""
        page = await self.manager.read_log("c", Cursor(), 1000)
        entries = [msgspec.json.decode(entry.event) for entry in page.entries]
        return [entry["data"] for entry in entries if entry["kind"] == kind]

    async def until(self, kind: str, count: int = 1) -> list[Any]:
        """The same, as soon as there are so many."""

        async def look() -> list[Any]:
            found = await self.events(kind)
            return found if len(found) >= count else []

        return await wait_until(look, f"there are {count} entries of kind {kind}")

    async def answers(self, text: str) -> Any:
        """Say something; the reply to it."""
        before = len(await self.events("turn_done"))
        await self.say(text)
        await self.until("turn_done", before + 1)
        return (await self.events("reply"))[-1]


@asynccontextmanager
async def running(app: Convener) -> AsyncGenerator[Talk]:
    """One node with the application, and a conversation."""
    async with app.lifespan(None):
        await app.manager.maybe_start_agent_loop("c", user_id="alice")
        yield Talk(app.manager)


async def test_steps(tmp_path: Path) -> None:
    async with running(load("steps.py", tmp_path).app) as talk:
        assert await talk.answers("Rome") == {
            "text": "bought 'maps on Rome' once for c/t1/buy/1",
            "found": ["maps on Rome", "weather on Rome"],
        }
        recorded = [(step["name"], step["number"]) for step in await talk.events("step")]
        assert recorded == [("search", 1), ("search", 2), ("buy", 1)]


async def test_stream(tmp_path: Path) -> None:
    async with running(load("stream.py", tmp_path).app) as talk:
        reply = await talk.answers("How is Rome?")
        (told,) = [quoted for quoted in PAGE.replace("\n", " ").split("`") if quoted.startswith('{"text": "Rome')]
        assert msgspec.json.decode(told) == reply


async def test_streaming_within_a_step(tmp_path: Path) -> None:
    module = load("stream_once.py", tmp_path)
    model, asked, filing = module.model, list[str](), asyncio.Event()

    def counted(prompt: str) -> Any:
        asked.append(prompt)
        return model(prompt)

    async def file_that_hangs_once(text: str) -> int:
        if not filing.is_set():
            filing.set()
            await asyncio.Event().wait()
        return len(text)

    module.model, module.file_away = counted, file_that_hangs_once
    async with InProcessCluster(module.app._agent, nodes=2) as cluster:
        await cluster[0].maybe_start_agent_loop("c", user_id="alice")
        await Talk(cluster[0]).say("How is Rome?")
        await filing.wait()
        await cluster.kill(0)
        talk = Talk(cluster[1])
        assert await talk.until("reply") == [{"text": "Rome is sunny.", "length": 14}]
        assert len(await talk.events("turn_started")) == 2
    assert asked == ["How is Rome?"]


async def test_ask(tmp_path: Path) -> None:
    async with running(load("ask.py", tmp_path).app) as talk:
        await talk.say("30 EUR")
        (asked,) = await talk.until("ask")
        assert asked["prompt"] == "Refund 30 EUR?"
        assert (await talk.manager.describe("c")).status == "waiting"
        with pytest.raises(InvalidRequest) as refused:
            await talk.manager.answer("c", asked["ask_id"], "sure")
        assert refused.value.wire_code == "invalid_answer"
        await talk.manager.answer("c", asked["ask_id"], {"approved": True})
        assert await talk.until("reply") == [{"text": "Refunded."}]
        with pytest.raises(AskClosed) as late:
            await talk.manager.answer("c", asked["ask_id"], {"approved": False})
        assert late.value.wire_code == "ask_closed"


async def test_overlap_and_the_stop_button(tmp_path: Path) -> None:
    module = load("overlap.py", tmp_path)
    async with running(module.app) as talk:
        await talk.say("everything")
        await talk.until("turn_started")
        with pytest.raises(ConversationBusy):
            await talk.say("me?", overlap="reject")
        await talk.say("rain", overlap="interrupt")
        await talk.until("turn_done")
        assert await talk.events("reply") == [
            {"text": "About everything: ", "partial": True},
            {"text": "About rain: done."},
        ]
        await talk.say("everything")
        await talk.until("turn_started", 3)
        assert await talk.manager.interrupt("c") in ("interrupted", "interrupting")
        await talk.until("turn_interrupted", 2)
        assert (await talk.events("reply"))[2]["partial"] is True
        assert module.released == ["t1", "t2", "t3"]


async def test_alarms(tmp_path: Path) -> None:
    async with running(load("alarms.py", tmp_path).app) as talk:
        await talk.say("the train")
        await talk.until("turn_done", 2)
        assert await talk.events("reply") == [
            {"text": "I will."},
            {"text": "You wanted to be reminded of the train."},
        ]
        assert [started["reason"] for started in await talk.events("turn_started")] == ["new", "alarm"]


async def test_loops(tmp_path: Path) -> None:
    async with running(load("loops.py", tmp_path).app) as talk:
        await talk.until("turn_done", 2)
        assert await talk.answers("ticking") == {"text": "ticking: True"}


async def test_typed_state_of_an_older_version(tmp_path: Path) -> None:
    class Names(msgspec.Struct):
        items: list[str] = msgspec.field(default_factory=list[str])

    old = Convener(Settings(data_dir=tmp_path / "data"))

    @old.agent(state=Names)
    async def shop(turn: Turn[Names]) -> None:
        turn.state.items.append(turn.text)
        await turn.reply({"text": " ".join(turn.state.items)})

    async with running(old) as talk:
        assert await talk.answers("apple") == {"text": "apple"}
    module = load("typed_state.py", tmp_path)
    module.app.configure(Settings(data_dir=tmp_path / "data"))
    async with running(module.app) as talk:
        assert await talk.answers("pear") == {"text": "1 apple, 1 pear"}
        assert await talk.answers("apple") == {"text": "2 apple, 1 pear"}
    older = Convener(Settings(data_dir=tmp_path / "data"))
    older.agent(state=Names)(shop)
    async with running(older) as talk:
        await talk.say("too late")
        (failed,) = await talk.until("turn_failed")
        assert failed["code"] == "bad_state"
    again = load("typed_state.py", tmp_path)
    again.app.configure(Settings(data_dir=tmp_path / "data"))
    async with running(again.app) as talk:
        assert await talk.answers("pear") == {"text": "2 apple, 2 pear"}


async def test_recovery(tmp_path: Path) -> None:
    module = load("recovery.py", tmp_path)
    began = asyncio.Event()
    transfer: Callable[[str], Any] = module.transfer

    async def transfer_that_hangs(amount: str) -> str:
        if not began.is_set():
            began.set()
            await asyncio.Event().wait()
        return await transfer(amount)

    module.transfer = transfer_that_hangs
    async with InProcessCluster(module.app._agent, nodes=2) as cluster:
        await cluster[0].maybe_start_agent_loop("c", user_id="alice")
        await Talk(cluster[0]).say("30 EUR")
        await began.wait()
        await cluster.kill(0)
        talk = Talk(cluster[1])

        async def held() -> bool:
            return (await talk.manager.describe("c")).status == "waiting"

        await wait_until(held, "it waits for a person")
        assert await talk.events("reply") == []
        await talk.manager.resume("c")
        assert await talk.until("reply") == [{"text": "transferred 30 EUR"}]
    unused = cast("Any", None)
    recorded = Interrupted(conversation=unused, turn="t1", input=unused, attempt=1, steps=("transfer",))
    assert module.decide(recorded) == "resume"


def test_every_piece_of_code_is_tested() -> None:
    assert len(blocks(PAGE, "python")) == len(FILES)
    loaded = re.findall(r'load\("(\w+\.py)"', Path(__file__).read_text(encoding="utf-8"))
    assert set(loaded) == set(FILES)
