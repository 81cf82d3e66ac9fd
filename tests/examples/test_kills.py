"""Examples whose node is killed in the middle: another one goes on, and what was done is not done again."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Generator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.checks import check_order, check_turns
from tests.cluster.talking import Api, talking
from tests.examples.lessons import EXAMPLES, driven
from tests.support.cluster import Cluster
from tests.support.servers import Server
from tests.support.waiting import wait_until


@pytest.fixture(scope="module")
def server() -> Generator[Server]:
    with Server("valkey") as made:
        yield made


class World:
    """Two nodes with an example, what it has called outside, and somebody who talks to it.

    Attributes:
        cid: the conversation, which is begun on node 0.
    """

    cid = "lesson"

    def __init__(self, cluster: Cluster, api: Api) -> None:
        self.cluster = cluster
        self.api = api
        self.directory = cluster.nodes[0].directory

    def calls(self) -> Counter[str]:
        """How often each call was made, keys included."""
        path = self.directory / "calls.txt"
        return Counter(path.read_text(encoding="utf-8").splitlines() if path.exists() else [])

    def hold(self, order: str) -> None:
        """Let calls that contain `order` not return."""
        (self.directory / "hold").write_text(order, encoding="utf-8")

    def release(self) -> None:
        """Let them return."""
        (self.directory / "hold").unlink()

    async def until(self, what: str, holds: Callable[[list[dict[str, Any]]], object]) -> list[dict[str, Any]]:
        """The log, as soon as it is so."""

        async def look() -> list[dict[str, Any]]:
            events = await self.api.events(self.cid)
            return events if holds(events) else []

        return await wait_until(look, what, 40)

    async def until_steps(self, *wanted: str) -> None:
        """Return when steps of these names are recorded."""
        await self.until(f"steps {wanted} are recorded", lambda events: set(wanted) <= set(steps(events)))

    async def until_called(self, order: str) -> None:
        """Return when a call was made."""
        await wait_until(lambda: any(call.startswith(order) for call in self.calls()), f"{order} is called")

    def kill_owner(self) -> None:
        """SIGKILL for the node that runs it."""
        owner = self.cluster.owner(self.cid)
        assert owner is not None
        self.cluster.kill(owner)

    async def answer(self, ask_id: str, data: Any) -> None:
        """Answer a question, at a node that lives."""
        url = f"{self.api.urls()[0]}/api/conversations/{self.cid}/answer"
        answer = await self.api.http.post(url, json={"ask_id": ask_id, "data": data})
        assert answer.status_code == 202, answer.text


@asynccontextmanager
async def world(server: Server, app: str) -> AsyncGenerator[World]:
    """Begins with one conversation; in the end everything must have come to rest, and the auditor finds nothing."""
    server.ask("FLUSHALL")
    with Cluster(server, 2, app=app, settings={"lease_ttl": 4}) as cluster:
        try:
            async with talking(lambda: [cluster.url(index) for index in cluster.live()]) as api:
                made = World(cluster, api)
                await api.start(cluster.url(0), made.cid, "alice")
                yield made
                events = await api.events(made.cid)
            check_order(events)
            check_turns(events)
            cluster.settle()
            cluster.audit()
        except BaseException as error:
            error.add_note(cluster.report(str(error)))
            raise


def of_kind(events: list[dict[str, Any]], kind: str) -> list[Any]:
    """Data of all entries of a kind."""
    return [event["data"] for event in events if event["kind"] == kind]


def steps(events: list[dict[str, Any]]) -> list[str]:
    """Names of the recorded steps, with their numbers."""
    return [f"{data['name']}/{data['number']}" for data in of_kind(events, "step")]


def replies(events: list[dict[str, Any]]) -> list[str]:
    return [data["text"] for data in of_kind(events, "reply")]


def attempts(events: list[dict[str, Any]], turn: str) -> list[str]:
    """Why each attempt of a turn was made."""
    return [e["data"]["reason"] for e in events if e["kind"] == "turn_started" and e["turn"] == turn]


async def test_pydantic_ai_makes_no_recorded_call_twice(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MODEL", "test")
    async with world(server, driven("pydantic_ai_agent")) as w:
        w.hold("book")
        await w.api.deliver(w.cid, "Get me to Rome.")
        await w.until_steps("model/1", "find_flight/1")
        await w.until_called("book")
        w.kill_owner()
        w.release()
        events = await w.until("it is answered", lambda events: of_kind(events, "turn_done"))
        assert attempts(events, "t1") == ["new", "takeover"]
        assert sorted(steps(events)) == ["book/1", "find_flight/1", "model/1", "model/2"]
        assert replies(events) == ['{"find_flight":"find a: done","book":"book a: done"}']
        # The call that was cut off is made again, and shows the service the same key.
        assert w.calls() == {"find a (lesson/t1/find_flight/1)": 1, "book a (lesson/t1/book/1)": 2}
        # This model calls every tool of a conversation once: it sees in the messages that it has.
        await w.api.deliver(w.cid, "Thank you.")
        events = await w.until("both are answered", lambda events: len(of_kind(events, "turn_done")) == 2)
        assert w.calls().total() == 3
        assert steps(events)[4:] == ["model/1"]


async def test_langgraph_goes_on_at_another_node_from_what_is_recorded(server: Server) -> None:
    async with world(server, driven("langgraph_agent")) as w:
        w.hold("publish 1")
        await w.api.deliver(w.cid, "the sea")
        await w.until("it asks", lambda events: of_kind(events, "ask"))
        await w.answer("t1.1", "yes")
        await w.until_called("publish 1")
        w.kill_owner()
        w.release()
        events = await w.until("it is answered", lambda events: of_kind(events, "turn_done"))
        assert attempts(events, "t1") == ["new", "takeover"]
        assert steps(events) == ["search/1", "publish/1"]
        assert len(of_kind(events, "ask")) == 1, "nobody is asked again"
        assert w.calls() == {"search the sea (lesson/t1/search/1)": 1, "publish 1 notes (lesson/t1/publish/1)": 2}
        # The next turn begins with the checkpoint that the killed one's successor has saved.
        await w.api.deliver(w.cid, "the moon")
        events = await w.until("it asks again", lambda events: len(of_kind(events, "ask")) == 2)
        asked = of_kind(events, "ask")[1]
        assert asked["prompt"] == "Publish 2 notes?"
        await w.answer(asked["ask_id"], "no")
        events = await w.until("both are answered", lambda events: len(of_kind(events, "turn_done")) == 2)
        assert replies(events) == ["publish 1 notes: done", "not published"]


async def test_an_approval_is_still_asked_for_after_a_kill_and_acts_once(server: Server) -> None:
    async with world(server, (EXAMPLES / "approval.py").read_text(encoding="utf-8")) as w:
        await w.api.deliver(w.cid, "30 EUR to Bob")
        await w.until("it asks", lambda events: of_kind(events, "ask"))
        w.kill_owner()
        await w.answer("t1.1", {"approved": True})
        events = await w.until("it is answered", lambda events: of_kind(events, "turn_done"))
        assert len(attempts(events, "t1")) == 2
        assert [data["ask_id"] for data in of_kind(events, "ask")] == ["t1.1"]
        assert of_kind(events, "answer")[0]["data"] == {"approved": True}
        assert replies(events) == ["refunded 30 EUR to Bob"]
        book = w.directory / "refunds.txt"
        assert book.read_text(encoding="utf-8") == "30 EUR to Bob, as lesson/t1/refund/1\n"


def append(feed: Path, *lines: str) -> None:
    with feed.open("a", encoding="utf-8") as file:
        file.writelines(f"{line}\n" for line in lines)


async def test_a_worker_without_clients_tells_about_every_item_once(server: Server) -> None:
    async with world(server, driven("background_worker")) as w:
        feed = w.directory / "feed.txt"
        await w.api.deliver(w.cid, "start")
        append(feed, "one", "and two")
        await w.until("two items are told", lambda events: len(replies(events)) == 3)
        w.hold("three")
        append(feed, "now three", "four are more than three")
        await w.until_called("summarise now three")
        w.kill_owner()
        w.release()
        # Nobody says anything any more, and nobody is connected: the loop is begun again by recovery alone.
        await w.until("it goes on", lambda events: len(replies(events)) == 5)
        append(feed, "five")
        events = await w.until("the new item is told", lambda events: len(replies(events)) == 6)
        told = replies(events)
        assert told == [
            "I have seen 0 items.",
            *("item 1: 1 words", "item 2: 2 words", "item 3: 2 words", "item 4: 5 words", "item 5: 1 words"),
        ]
        assert [re.sub(r" \(\)", "", call) for call, times in w.calls().items() if times > 1] == ["summarise now three"]
        assert (await w.api.show(w.cid))["connections"] == 0
