"""Moving conversations and emptying nodes on request, from the command line and over HTTP."""

from __future__ import annotations

import asyncio
import json
import random
import signal
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.cluster.checks import attempts, opened
from tests.cluster.leaving import Person, Scene, scene
from tests.cluster.talking import PASSING, talking
from tests.support.jsclient import missing
from tests.support.processes import convener, free_port
from tests.support.waiting import wait_until


class Terminal:
    """Somebody who types commands, to one node.

    Args:
        node: whose address the commands are given.
    """

    def __init__(self, here: Scene, directory: Path, node: int) -> None:
        self._url = here.cluster.url(node)
        self._directory = directory

    async def run(self, *words: str, code: int = 0) -> str:
        """What a command prints: its output, or its errors if it ends with another code than 0."""
        with convener(*words, "--url", self._url, directory=self._directory) as process:
            assert await asyncio.to_thread(process.wait, 60) == code, [*process.output, *process.errors]
            return "\n".join(process.errors if code else process.output)

    async def states(self) -> dict[str, set[str]]:
        """Node → the states that `convener nodes` shows of it."""
        found: dict[str, set[str]] = {}
        for node in json.loads(await self.run("nodes", "--json"))["nodes"]:
            found.setdefault(node["name"], set()).add(node["state"])
        return found


@pytest.mark.skipif(missing() is not None, reason=missing() or "")
async def test_a_conversation_moves_and_its_clients_stay(tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    async with scene() as here:
        terminal = Terminal(here, tmp_path, 2)
        await here.start("c1", 0)
        python, javascript = await here.python("c1", 0), await here.javascript("c1", 2)
        await here.api.talk("c1", 1)
        await python.wait_for(1, "turn_done")
        assert await terminal.run("move", "c1", "n1") == "moved"
        assert here.cluster.owner("c1") == 1
        assert await terminal.run("move", "c1", "n1") == "there"
        await python.say("after the move", "by-socket")
        here.api.sent["c1"]["by-socket"] = "after the move"
        await here.api.deliver("c1", f"/until {gate}", "gated")
        await here.begun("c1", 3)
        assert await terminal.run("move", "c1", "n2") == "busy"
        assert json.loads(await terminal.run("move", "c1", "n2", "--cut", "--json")) == {"outcome": "moved"}
        gate.touch()
        events = await here.check("c1", python, javascript)
        assert opened(events) == [("n0", "start"), ("n1", "handoff"), ("n2", "handoff")]
        assert attempts(events, "gated") == [(1, "new"), (2, "handoff")]
        assert python.closes == []
        assert javascript.of("disconnect") == []
        assert "node_not_found" in await terminal.run("move", "c1", "n9", code=1)
        assert "not_found" in await terminal.run("move", "unknown", "n1", code=1)


async def test_a_node_that_is_drained_by_command_is_empty_and_goes_on_answering(tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    async with scene() as here:
        terminal = Terminal(here, tmp_path, 1)
        for cid in ("busy", "idle"):
            await here.start(cid, 0)
        guests = {cid: await here.python(cid, 0) for cid in ("busy", "idle")}
        await here.api.deliver("busy", f"/until {gate}", "gated")
        await here.begun("busy", 1)
        (old,) = here.cluster.incarnations(0)
        draining = asyncio.create_task(terminal.run("drain", "n0", "--within", "300"))
        await here.unready(0)
        assert "draining" in (await terminal.states())["n0"]
        assert "node_leaving" in await terminal.run("move", "idle", "n0", code=1)
        waiting = json.loads(await terminal.run("drain", "n0", "--no-wait", "--json"))
        assert (waiting["node"], waiting["state"], waiting["remaining"]) == ("n0", "draining", 1)
        gate.touch()
        assert (await draining).splitlines()[-1] == "n0 drained: 0 conversations left"
        for guest in guests.values():
            await guest.wait_named("joined", 2)
            assert guest.closes == [1012]
        # The process is there until somebody ends it. It owns nothing, and whoever asks it is answered.
        assert here.cluster.nodes[0].running
        assert old in here.stored.buried()
        assert here.stored.records(old) == set()
        assert (await terminal.states())["n0"] == {"buried"}
        await here.api.deliver("idle", "to the one that is drained", url=here.cluster.url(0))
        fresh = await here.api.http.post(f"{here.cluster.url(0)}/api/conversations", json={"conversation_id": "fresh"})
        assert (fresh.status_code, fresh.json()["node"] in ("n1", "n2")) == (201, True), fresh.text
        assert (await terminal.run("drain", "n0")).startswith("n0 drained")
        for cid, guest in guests.items():
            await here.check(cid, guest)
        here.cluster.term(0)
        assert await here.ended(0) == 0


async def test_what_the_last_node_cannot_give_away_waits_for_the_next(tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    async with scene(nodes=2) as here:
        await here.start("left", 1)
        await here.api.deliver("left", f"/until {gate}", "gated")
        await here.begun("left", 1)
        for node in (0, 1):
            await Terminal(here, tmp_path, node).run("drain", f"n{node}", "--within", "0.5")
        refused = await here.api.post(here.cluster.url(1), "left", "is anybody there?", "late")
        assert (refused.status_code, refused.json()["code"]) == (503, "owner_unavailable"), refused.text
        assert int(refused.headers["Retry-After"]) >= 1
        here.cluster.term(0)
        assert await here.ended(0) == 0
        await asyncio.to_thread(here.cluster.restart, 0)
        gate.touch()
        # Refused, and kept: the same message again is known.
        await here.api.deliver("left", "is anybody there?", "late", url=here.cluster.url(0))
        events = await here.check("left")
        assert attempts(events, "gated") == [(1, "new"), (2, "handoff")]
        assert here.stored.head("left")["strikes"] == "0", "nobody crashed"
        here.cluster.term(1)
        assert await here.ended(1) == 0


async def test_moves_under_load_lose_and_repeat_nothing(rng: random.Random) -> None:
    cids = [f"moved-{number}" for number in range(6)]
    async with scene() as here:
        for number, cid in enumerate(cids):
            await here.start(cid, number % 3)
        people = [await here.person(cid) for cid in cids]
        over = asyncio.Event()

        async def talk(person: Person) -> None:
            number = 0
            while not over.is_set() or number < 5:
                number += 1
                await person.send(rng.choice((f"short {number}", f"/stream a longer answer {number}", "/work 3 0.02")))

        async def move_about() -> int:
            moved = 0
            while moved < 30:
                url = here.cluster.url(rng.randrange(3))
                body = {"node": f"n{rng.randrange(3)}", "cut": rng.random() < 0.5}
                answer = await here.api.http.post(f"{url}/api/conversations/{rng.choice(cids)}/move", json=body)
                if answer.status_code == 200:
                    moved += answer.json()["outcome"] == "moved"
                else:
                    assert answer.json()["code"] in PASSING, answer.text
            over.set()
            return moved

        await asyncio.gather(move_about(), *(talk(person) for person in people))
        for cid, person in zip(cids, people, strict=True):
            events = await here.check(cid, person.client)
            assert {reason for _, reason in opened(events)} <= {"start", "handoff"}
            assert person.client.closes == []


@pytest.mark.skipif(sys.platform == "win32", reason="`convener up` is for POSIX systems")
async def test_ctrl_c_ends_a_cluster_in_time_although_turns_are_under_way(tmp_path: Path) -> None:
    port = free_port(3)
    urls = [f"http://127.0.0.1:{port + number}" for number in range(3)]
    with convener("up", "--port", str(port), directory=tmp_path, environment={"CONVENER_DRAIN_TIMEOUT": "2"}) as up:
        await asyncio.to_thread(up.wait_for_output, "ready", 90)
        async with talking(lambda: urls) as api:
            for number, url in enumerate(urls):
                await api.start(url, f"c{number}", f"u{number}")
                await api.deliver(f"c{number}", "/sleep 600", url=url)

                async def is_busy(cid: str = f"c{number}", at: str = url) -> Any:
                    return (await api.show(cid, at))["busy"]

                await wait_until(is_busy, f"c{number} sleeps", retry_on=httpx.TransportError)
        up.signal(signal.SIGINT)
        assert await asyncio.to_thread(up.wait, 60) == 0
        log = "\n".join(up.errors)
        assert "killing it" not in log, "every node ended by itself"
        assert "Traceback" not in log
