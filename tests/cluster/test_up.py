"""`convener up` as a user meets it: talk to it, kill a node of it, end it, start it again."""

from __future__ import annotations

import asyncio
import signal
import sys
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from tests.cluster.checks import check_answered, opened
from tests.cluster.clients import Clients
from tests.cluster.talking import Api, talking
from tests.support.jsclient import javascript_client, missing
from tests.support.processes import RunningProcess, convener, free_port, is_running
from tests.support.waiting import wait_until

pytestmark = [
    pytest.mark.skipif(sys.platform == "win32", reason="`convener up` is for POSIX systems"),
    pytest.mark.skipif(missing() is not None, reason=f"the JavaScript client cannot run: {missing()}"),
]
NODES = 3


class Up:
    """A running `convener up`."""

    def __init__(self, process: RunningProcess, port: int, directory: Path) -> None:
        self.process = process
        self.directory = directory
        self.urls = [f"http://127.0.0.1:{port + number}" for number in range(NODES)]

    def children(self) -> list[psutil.Process]:
        """Every process that it has started."""
        return psutil.Process(self.process.pid).children(recursive=True)

    def node(self, name: str) -> psutil.Process:
        """The process of a node: the innermost one whose command names it."""
        return [child for child in self.children() if name in child.cmdline()][-1]

    def audit(self) -> None:
        """`convener audit --all` finds nothing, and says so."""
        with convener("audit", "--all", "--url", self.urls[0], directory=self.directory) as auditor:
            assert auditor.wait() == 0, "\n".join([*auditor.output, *auditor.errors])
            assert auditor.output[-1].startswith("no violations; ")

    def end(self) -> None:
        """Ctrl-C; nothing may be left of it."""
        children = self.children()
        self.process.signal(signal.SIGINT)
        assert self.process.wait(60) == 0
        assert [child.pid for child in children if is_running(child.pid)] == []
        log = "\n".join(self.process.errors)
        assert "Traceback" not in log
        assert "never awaited" not in log


@contextmanager
def _up(directory: Path) -> Generator[Up]:
    port = free_port(NODES)
    with convener("up", "--nodes", str(NODES), "--port", str(port), directory=directory) as process:
        try:
            assert process.wait_for_output("ready", 60) == f"ready http://127.0.0.1:{port}"
            yield Up(process, port, directory)
        except BaseException as error:
            error.add_note("\n".join(process.errors[-60:]))
            raise


async def _is_ready(api: Api, url: str) -> bool:
    return (await api.http.get(f"{url}/readyz")).json()["status"] == "ready"


@pytest.mark.slow
async def test_up_survives_a_killed_node_and_keeps_everything_for_the_next_start(
    tmp_path: Path, clients: Clients
) -> None:
    cid, sent = "shown", dict[str, str]()
    with _up(tmp_path) as up:
        async with talking(lambda: up.urls) as api:
            before = await _talk_in_two_languages(up, clients, api, cid, sent)
        await asyncio.to_thread(up.end)
    with _up(tmp_path) as up:
        async with talking(lambda: up.urls) as api:
            assert await api.events(cid) == before
            python = await clients.join(up.urls[2], cid, user_id="u")
            sent["again"] = "still there?"
            await python.say(sent["again"], "again")
            await python.wait_for(len(sent), "turn_done")
            check_answered(python.events, sent)
            assert python.events[: len(before)] == before
            answer = await python.say(sent["py.1"], "py.1")
            assert answer["duplicate"], "what was accepted before is known"
        await asyncio.to_thread(up.audit)
        await asyncio.to_thread(up.end)


async def _talk_in_two_languages(
    up: Up, clients: Clients, api: Api, cid: str, sent: dict[str, str]
) -> list[dict[str, Any]]:
    """Two clients on two nodes talk; the node that runs the conversation is killed; they talk on."""
    await api.start(up.urls[0], cid, "u")
    python = await clients.join(up.urls[1], cid, user_id="u")
    async with javascript_client(up.urls[2], cid, "--user", "u") as javascript:
        await javascript.until("joined", lambda: javascript.of("joined"))

        async def exchange(number: int) -> None:
            sent[f"py.{number}"] = sent[f"js.{number}"] = f"line {number}"
            await python.say(f"line {number}", f"py.{number}")
            answer = await javascript.call(
                "message", {"message_id": f"js.{number}", "data": {"text": f"line {number}"}}
            )
            assert answer["status"] == "accepted"

        for number in range(3):
            await exchange(number)
        await python.wait_for(len(sent), "turn_done")
        assert (await api.show(cid))["node"] == "node-1"
        first = up.node("node-1")
        first.kill()
        await exchange(3)
        await python.wait_for(len(sent), "turn_done")
        check_answered(python.events, sent)
        assert opened(python.events)[0] == ("node-1", "start")
        assert opened(python.events)[1][1] == "takeover"
        await wait_until(lambda: _is_ready(api, up.urls[0]), "node-1 is back", 60, retry_on=httpx.TransportError)
        assert up.node("node-1").pid != first.pid
        await exchange(4)
        await python.wait_for(len(sent), "turn_done")
        await javascript.until("seen it all", lambda: len(javascript.of("event")) >= len(python.events))
        assert javascript.of("event") == python.events
        await asyncio.to_thread(up.audit)
        return python.events
