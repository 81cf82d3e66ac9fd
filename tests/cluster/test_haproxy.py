"""HAProxy with the configuration of `deploy/compose`, before real nodes of which each is exchanged."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

import httpx
import pytest

from tests.cluster.leaving import Person, scene, user_of
from tests.cluster.talking import Api, talking
from tests.support.cluster import Cluster
from tests.support.processes import ROOT, RunningProcess, free_port
from tests.support.waiting import wait_until

CONFIGURATION: Final = ROOT / "deploy" / "compose" / "haproxy.cfg"
PEOPLE: Final = 4


@asynccontextmanager
async def haproxy(cluster: Cluster, directory: Path) -> AsyncGenerator[str]:
    """The address of an HAProxy before the nodes."""
    front = f"127.0.0.1:{free_port()}"
    nodes = {f"NODE_{n + 1}": urlsplit(cluster.url(n)).netloc for n in range(len(cluster.nodes))}
    command = ["haproxy", "-db", "-f", str(CONFIGURATION)]
    with RunningProcess(command, directory, nodes | {"FRONT": front}) as process:
        async with httpx.AsyncClient(trust_env=False) as http:

            async def answers() -> bool:
                assert process.process.poll() is None, process.errors
                return (await http.get(f"http://{front}/readyz")).status_code == 200

            await wait_until(answers, "HAProxy passes requests on", 30, retry_on=httpx.TransportError)
        yield f"http://{front}"


async def talk(person: Person, api: Api, over: asyncio.Event) -> None:
    """By socket and by HTTP in turn, until it is over and once more."""
    number = 0
    while True:
        last, number = over.is_set(), number + 1
        if number % 2:
            await person.send(f"by socket {number}")
        else:
            await api.deliver(person.client.cid, f"by http {number}")
        await person.client.wait_for(number, "turn_done", 60)
        if last:
            return


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("haproxy") is None, reason="HAProxy is not installed")
async def test_nodes_are_exchanged_behind_haproxy_and_nobody_notices(tmp_path: Path) -> None:
    async with (
        scene(nodes=3, shutdown_delay=2, drain_timeout=5) as here,
        haproxy(here.cluster, tmp_path) as url,
        talking(lambda: [url]) as api,
    ):
        people: list[Person] = []
        for number in range(PEOPLE):
            cid = f"proxied-{number}"
            await api.start(url, cid, user_of(cid))
            client = await here.clients.join(url, cid, comes_back=True, user_id=user_of(cid))
            people.append(Person(client, api))
        over = asyncio.Event()
        talks = [asyncio.create_task(talk(person, api, over)) for person in people]
        try:
            for index in range(3):
                goal = api.accepted + 2 * PEOPLE
                await wait_until(lambda goal=goal: api.accepted >= goal, "more messages are accepted", 60)
                here.cluster.term(index)
                assert await here.ended(index) == 0
                await asyncio.to_thread(here.cluster.restart, index)
        finally:
            over.set()
            await asyncio.gather(*talks)
        here.api.sent.update(api.sent)
        for person in people:
            await here.check(person.client.cid, person.client)
            assert person.client.refusals == [], "a stock client that is refused stays away"
            assert set(person.client.closes) <= {1012}, person.client.closes
            assert not person.rejected
