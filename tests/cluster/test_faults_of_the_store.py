"""Whatever becomes of the store: nodes do not die of it, and nothing that was accepted is lost while the store keeps
its data.

All faults are one story: clients write all the time, the fault strikes, it is healed, and then every message that was
accepted is answered once and in its place, under the ownership that there was before. The auditor looks after each.
"""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import AsyncGenerator, Iterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Final, cast

import pytest

from tests.cluster.agents import SCRIPTED
from tests.cluster.checks import check_answered, opened
from tests.cluster.clients import Client, Clients
from tests.cluster.conftest import Pool
from tests.cluster.faults import FAULTS, LOST, Fault, Site, undo
from tests.cluster.talking import Api, until_started, while_talking
from tests.support.cluster import Cluster
from tests.support.servers import FLAVOURS
from tests.support.waiting import wait_until

pytestmark = pytest.mark.cluster(app=SCRIPTED, lease_ttl=4, proxied=True)

EVERYTHING: Final = bool(os.environ.get("TEST_ALL_FAULTS"))
ON_REDIS_TOO: Final = ("away, then back with its data", "full")


def cases() -> Iterator[tuple[str, str]]:
    """Each fault on Valkey, a few on Redis; with ``TEST_ALL_FAULTS`` all on both."""
    for flavour in FLAVOURS:
        for name in FAULTS:
            if flavour == "valkey" or EVERYTHING or name in ON_REDIS_TOO:
                yield flavour, name


once = pytest.mark.parametrize("flavour", FLAVOURS if EVERYTHING else FLAVOURS[:1], indirect=True)


@asynccontextmanager
async def _site(cluster: Cluster, clients: Clients, api: Api, pool: Pool) -> AsyncGenerator[Site]:
    """Three conversations, each at a node of its own, with a guest at the next one."""
    assert cluster.server is not None
    assert pool.proxy is not None
    guests: dict[str, Client] = {}
    for number in range(3):
        cid = f"talk-{number}"
        await api.start(cluster.url(number), cid, f"user-{number}")
        guests[cid] = await clients.join(cluster.url((number + 1) % 3), cid, user_id=f"user-{number}")
    site = Site(cluster, cluster.server, pool.proxy, api, guests)
    try:
        yield site
    finally:
        await undo(site)


async def _go_through(site: Site, fault: Fault, name: str) -> None:
    """Let it strike, have its effect, and heal; then let conversations go on."""
    goal = site.api.accepted + 6
    await wait_until(lambda: site.api.accepted >= goal, "messages flow")
    site.mark()
    await fault.strike(site)
    await wait_until(lambda: fault.until(site), f"the store has been seen to be {name}", 40)
    await fault.heal(site)
    back = site.api.accepted + 6
    await wait_until(lambda: site.api.accepted >= back, "messages flow again", 40)


@pytest.mark.parametrize(("flavour", "name"), list(cases()), indirect=["flavour"])
async def test_everything_goes_on_where_it_was(
    cluster: Cluster, clients: Clients, api: Api, pool: Pool, name: str
) -> None:
    fault, stored = FAULTS[name], cluster.stored
    assert stored is not None
    async with _site(cluster, clients, api, pool) as site:
        members, pids = stored.members(), [node.process.pid for node in cluster.nodes if node.process is not None]
        await while_talking(api, site.guests, _go_through(site, fault, name))
        assert fault.refuses or not api.refused
        for refusal in api.refused:
            assert refusal.get("retry_after", 0) > 0, refusal
        for cid, guest in site.guests.items():
            events = await api.answered(cid)
            check_answered(events, api.sent[cid])
            assert [reason for _, reason in opened(events)] == ["start"], "the same epoch goes on"
            await guest.wait_seq(events[-1]["seq"])
            assert guest.events == events
            await wait_until(lambda cid=cid: site.statuses(cid)[-1:] in ([], ["idle"]), f"{cid} is idle again")
            assert guest.closes == []
        assert stored.members() == members, "nobody was buried"
        assert [node.process.pid for node in cluster.nodes if node.process is not None] == pids
        assert [line for node in cluster.nodes for line in node.log() if "crashed" in line or "Traceback" in line] == []


@once
async def test_a_full_store_lets_what_was_begun_end(
    cluster: Cluster, clients: Clients, api: Api, pool: Pool, tmp_path: Path
) -> None:
    """Nothing new is begun, a turn under way ends, a conversation can be stopped, and nobody is buried."""
    stored, release = cluster.stored, tmp_path / "go on"
    assert stored is not None
    async with _site(cluster, clients, api, pool) as site:
        members = stored.members()
        await api.deliver("talk-0", f"/until {release}", url=cluster.url(0))
        await until_started(cluster, "talk-0", 1)
        await asyncio.to_thread(site.server.ask, "CONFIG", "SET", "maxmemory", "1")
        for answer in (
            await api.post(cluster.url(1), "talk-1", "no room"),
            await api.http.post(f"{cluster.url(1)}/api/conversations", json={"conversation_id": "new"}),
        ):
            assert (answer.status_code, answer.json()["code"]) == (507, "store_full"), answer.text
            assert answer.json()["retry_after"] > 0
        release.touch()
        await site.guests["talk-0"].wait_for(1, "turn_done")
        answer = await api.http.post(f"{cluster.url(2)}/api/conversations/talk-2/stop")
        assert answer.json() == {"outcome": "stopped"}
        await wait_until(lambda: stored.head("talk-2")["owner"] == "", "its owner has let it go")
        assert all(each["status"] == "ready" for each in await site.checks())
        text = (await api.http.get(f"{cluster.url(1)}/metrics")).text
        assert re.search(r'^convener_store_errors_total\{kind="store_full"\} [1-9]', text, re.MULTILINE)
        assert stored.members() == members
        await asyncio.to_thread(site.server.ask, "CONFIG", "SET", "maxmemory", "0")
        await api.deliver("talk-1", "room again")
        check_answered(await api.answered("talk-0"), api.sent["talk-0"])
        check_answered(await api.answered("talk-1"), api.sent["talk-1"])


@once
async def test_a_store_that_is_nearly_full_takes_no_new_conversations(
    cluster: Cluster, clients: Clients, api: Api, pool: Pool
) -> None:
    """Running ones go on; if the store would delete them at its limit, their messages are refused as well."""
    async with _site(cluster, clients, api, pool) as site:

        async def says(code: int, path: str, **body: object) -> bool:
            answers = [await api.http.post(f"{node.url}/api/conversations{path}", json=body) for node in cluster.nodes]
            assert all(a.status_code == 202 or a.json()["code"] == "store_full" for a in answers if a.status_code > 201)
            return all(answer.status_code == code for answer in answers)

        ask = partial(asyncio.to_thread, site.server.ask)
        # So much that it matters little what the test adds.
        await ask("SETRANGE", "ballast", str(32 << 20), "x")
        used = int(cast("dict[str, int]", await ask("INFO", "memory"))["used_memory"])
        await ask("CONFIG", "SET", "maxmemory", str(round(used / 0.9)))
        await wait_until(lambda: says(507, ""), "nodes refuse new conversations")
        text = (await api.http.get(f"{cluster.url(0)}/metrics")).text
        ratio = re.search(r"^convener_store_memory_ratio ([\d.]+)$", text, re.MULTILINE)
        assert ratio is not None
        assert 0.8 < float(ratio[1]) < 1
        for cid in site.guests:
            await api.talk(cid, 1)
            check_answered(await api.answered(cid), api.sent[cid])
        assert api.refused == []
        await ask("CONFIG", "SET", "maxmemory-policy", "allkeys-lru")
        full = partial(says, 507, "/talk-1/messages", message_id="refused", data={"text": "no"})
        api.sent["talk-1"]["refused"] = "no"
        await wait_until(full, "nodes refuse messages")
        await ask("CONFIG", "SET", "maxmemory-policy", "noeviction")
        await ask("CONFIG", "SET", "maxmemory", "0")
        taken = partial(says, 202, "/talk-1/messages", message_id="refused", data={"text": "no"})
        await wait_until(taken, "nodes take messages again")
        await ask("DEL", "ballast")
        check_answered(await api.answered("talk-1"), api.sent["talk-1"])


@once
async def test_a_store_that_comes_back_empty_is_filled_by_the_owners(
    cluster: Cluster, clients: Clients, api: Api, pool: Pool
) -> None:
    """Each node is a member again, and writes again what it remembers: here, all of it."""
    stored = cluster.stored
    assert stored is not None
    async with _site(cluster, clients, api, pool) as site:
        members, pids = stored.members(), [node.process.pid for node in cluster.nodes if node.process is not None]
        for cid in site.guests:
            await api.talk(cid, 2)
            await site.guests[cid].wait_for(2, "turn_done")
        logs = {cid: stored.raw_log(cid) for cid in site.guests}
        site.mark()
        await LOST.strike(site)
        await wait_until(lambda: LOST.until(site), "nobody acts any more", 40)
        await LOST.heal(site)
        await wait_until(lambda: stored.members() == members, "all nodes are members again, under their names")
        for cid in site.guests:
            await wait_until(lambda c=cid: stored.raw_log(c) == logs[c], f"{cid} has its log again")
        for cid, guest in site.guests.items():
            await api.talk(cid, 2)
            events = await api.answered(cid)
            check_answered(events, api.sent[cid])
            assert [reason for _, reason in opened(events)] == ["start"], "the same epoch goes on"
            await wait_until(lambda g=guest, e=events: g.events[-len(e) :] == e, f"{cid} is shown from its beginning")
        for node in cluster.nodes:
            ready = (await api.http.get(f"{node.url}/readyz?verbose")).json()
            report = ready["fallbacks"][-1]
            assert (report["conversations"], report["unrepaired"], report["verified"]) == (1, 0, True)
            assert report["lost"] == report["repaired"] == 9
        assert [node.process.pid for node in cluster.nodes if node.process is not None] == pids
        assert [line for node in cluster.nodes for line in node.log() if "crashed" in line or "Traceback" in line] == []
