"""The same program without Redis: one process, in memory or with its log in a directory."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncGenerator, Generator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.agents import SCRIPTED
from tests.cluster.checks import attempts, check_answered, opened
from tests.cluster.clients import Clients
from tests.cluster.talking import Api, talking
from tests.support.cluster import Cluster
from tests.support.processes import convener
from tests.support.waiting import wait_until


@contextmanager
def _node(directory: Path | None, **settings: object) -> Generator[Cluster]:
    """One node that keeps its log in `directory`, or in memory."""
    kept = {} if directory is None else {"data_dir": directory}
    with Cluster(None, 1, app=SCRIPTED, settings=kept | settings) as node:
        yield node
        assert node.get(0, "/audit")["violations"] == []


@asynccontextmanager
async def _api(node: Cluster) -> AsyncGenerator[Api]:
    async with talking(lambda: [node.url(0)]) as api:
        yield api


@pytest.fixture(scope="module", params=["memory", "sqlite"])
def node(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Generator[Cluster]:
    """A node of either kind, for the tests that do not end it."""
    directory = tmp_path_factory.mktemp("standalone") if request.param == "sqlite" else None
    with _node(directory, limit_policy="reject") as made:
        yield made


async def test_clients_talk_as_they_would_to_a_cluster(node: Cluster, clients: Clients, rng: random.Random) -> None:
    cid = "alone"
    async with _api(node) as api:
        first = await clients.join(node.url(0), cid, user_id="u")
        second = await clients.join(node.url(0), cid, user_id="u")
        for number in range(20):
            speaker = (first, second)[number % 2]
            answers = [await speaker.say(f"line {number}", f"m{number}") for _ in range(1 + (number % 10 == 9))]
            assert [answer["duplicate"] for answer in answers] == [False, True][: len(answers)]
            assert {answer["position"] for answer in answers} == {number + 1}
            api.sent[cid][f"m{number}"] = f"line {number}"
        events = await api.answered(cid)
        check_answered(events, api.sent[cid])
        for client in (first, second):
            await client.wait_seq(events[-1]["seq"])
            assert client.events == events
        for seq in rng.sample(range(len(events)), 5):
            late = await clients.join(node.url(0), cid, user_id="u", after=events[seq]["cursor"])
            assert late.events == events[seq + 1 :]
        await _check_stop_and_delete(node, api, cid)


async def _check_stop_and_delete(node: Cluster, api: Api, cid: str) -> None:
    path = f"{node.url(0)}/api/conversations/{cid}"
    assert (await api.http.post(f"{path}/stop")).json() == {"outcome": "stopped"}
    assert (await api.http.post(f"{path}/stop")).json() == {"outcome": "already_stopped"}
    assert (await api.post(node.url(0), cid, "too late")).json()["code"] == "conversation_stopped"
    assert (await api.http.post(f"{path}/resume")).json() == {"outcome": "resumed"}
    await api.deliver(cid, "good morning", "morning")
    check_answered(await api.answered(cid), api.sent[cid])
    assert (await api.http.delete(path)).status_code == 204
    assert (await api.http.get(path)).status_code == 404


async def test_the_limit_is_exact(node: Cluster) -> None:
    async with _api(node) as api:
        for user in ("u1", "u2", "u3"):
            bodies: list[dict[str, Any]] = [{"conversation_id": f"{user}.{n}", "user_id": user} for n in range(40)]
            url = f"{node.url(0)}/api/conversations"
            answers = await asyncio.gather(*(api.http.post(url, json=body) for body in bodies))
            codes = [answer.status_code for answer in answers]
            assert (codes.count(201), codes.count(429)) == (3, 37)
            won = next(answer.json()["conversation_id"] for answer in answers if answer.status_code == 201)
            await api.http.post(f"{url}/{won}/stop")
            await api.start(node.url(0), f"{user}.next", user)


@pytest.mark.parametrize("killed", [True, False], ids=["killed", "ended"])
async def test_a_log_on_disk_survives_and_what_was_unanswered_is_answered(
    tmp_path: Path, clients: Clients, killed: bool
) -> None:
    cid, settings = "kept", {"drain_timeout": 0}
    with _node(tmp_path / "data", **settings) as node:
        async with _api(node) as api:
            guest = await clients.join(node.url(0), cid, user_id="u", comes_back=True)
            await api.talk(cid, 10)
            answered = await api.answered(cid)
            await api.deliver(cid, "/hang", "hanging")
            await guest.wait_for(11, "turn_started")
            await api.talk(cid, 5)
            if killed:
                node.kill(0)
            else:
                node.term(0)
                assert await asyncio.to_thread(node.wait_ended, 0) == 0
            await asyncio.to_thread(node.restart, 0)
            # Nobody has asked for anything yet: the node finds by itself what it owes.
            events = await api.answered(cid)
            assert events[: len(answered)] == answered
            check_answered(events, api.sent[cid])
            assert [attempt for attempt, _ in attempts(events, "hanging")] == [1, 2]
            assert len(opened(events)) == 2
            again = await api.deliver(cid, "/hang", "hanging")
            assert (again["duplicate"], again["position"]) == (True, 11)
            await guest.wait_seq(events[-1]["seq"], 60)
            assert guest.events == events
            assert guest.named("resync") == []


async def test_an_idle_conversation_on_disk_is_there_again_and_wakes_up(tmp_path: Path) -> None:
    with _node(tmp_path / "data") as node:
        async with _api(node) as api:
            for number in range(5):
                await api.start(node.url(0), f"c{number}", f"user-{number}", metadata={"number": number})
                await api.talk(f"c{number}", 3)
                await api.answered(f"c{number}")
            stopped = f"{node.url(0)}/api/conversations/c4"
            assert (await api.http.post(f"{stopped}/stop")).json() == {"outcome": "stopped"}
            before = [await api.events(f"c{number}") for number in range(5)]
            node.kill(0)
            await asyncio.to_thread(node.restart, 0)
            for number in range(5):
                shown = await api.show(f"c{number}")
                assert shown["metadata"] == {"number": number}
                assert shown["user_id"] == f"user-{number}"
                assert (await api.events(f"c{number}"))[: len(before[number])] == before[number]
            assert (await api.show("c4"))["status"] == "stopped", "a stop is not taken for a crash"
            assert (await api.post(node.url(0), "c4", "too late")).json()["code"] == "conversation_stopped"
            for number in range(4):
                await api.deliver(f"c{number}", "still there?")
                check_answered(await api.answered(f"c{number}"), api.sent[f"c{number}"])


async def test_repeated_kills_lose_nothing(tmp_path: Path, rng: random.Random) -> None:
    """Messages keep coming while the only node is killed and started again."""
    cids = [f"c{number}" for number in range(4)]
    with _node(tmp_path / "data", max_concurrent_conversations=10) as node:
        async with _api(node) as api:
            for cid in cids:
                await api.start(node.url(0), cid, "u")
            over = asyncio.Event()

            async def kill() -> None:
                try:
                    for _ in range(2):
                        count = api.accepted + rng.randint(20, 60)
                        await wait_until(lambda count=count: api.accepted >= count, f"{count} are accepted", 60)
                        node.kill(0)
                        await asyncio.to_thread(node.restart, 0)
                finally:
                    over.set()

            await asyncio.gather(kill(), *(api.talk_until(cid, over) for cid in cids))
            for cid in cids:
                check_answered(await api.answered(cid), api.sent[cid])


def test_a_second_node_on_the_same_directory_is_refused(tmp_path: Path) -> None:
    with _node(tmp_path / "data"):
        environment = {"CONVENER_DATA_DIR": str(tmp_path / "data")}
        with convener("serve", "--port", "0", directory=tmp_path, environment=environment) as second:
            assert second.wait() != 0
            assert second.errors[-1].startswith("error: ")
            assert "data" in second.errors[-1]
