"""The store goes away for a while: nobody is buried for it, nothing is lost, everything goes on where it was."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable

import pytest

from tests.cluster.agents import scripted
from tests.cluster.checks import check_answered, opened
from tests.cluster.clients import Client, Clients
from tests.cluster.talking import Api, while_talking
from tests.support.cluster import Cluster
from tests.support.servers import Server
from tests.support.waiting import TIME_SCALE, wait_until

pytestmark = scripted
LEASE = 4


async def _freeze(cluster: Cluster, server: Server, until: Callable[[], bool | Awaitable[bool]], what: str) -> None:
    server.freeze()
    try:
        await wait_until(until, what, 30)
    finally:
        server.resume()


@pytest.mark.parametrize("longer", [False, True], ids=["shorter than a lease", "longer than a lease"])
async def test_a_store_that_pauses_buries_nobody_and_loses_nothing(
    cluster: Cluster, clients: Clients, api: Api, longer: bool
) -> None:
    server, stored = cluster.server, cluster.stored
    assert server is not None
    assert stored is not None
    cids = [f"paused-{number}" for number in range(3)]
    guests: dict[str, Client] = {}
    for number, cid in enumerate(cids):
        await api.start(cluster.url(number), cid, f"user-{number}")
        guests[cid] = await clients.join(cluster.url((number + 1) % 3), cid, user_id=f"user-{number}")
    members, began = stored.members(), time.monotonic()

    async def all_are_suspended() -> bool:
        if longer and time.monotonic() < began + (LEASE + 1) * TIME_SCALE:
            return False
        checks = [(await api.http.get(f"{cluster.url(n)}/readyz?verbose")).json()["checks"] for n in range(3)]
        return all(each["lease"] != "ok" for each in checks)

    async def pause() -> None:
        count = api.accepted + 15
        await wait_until(lambda: api.accepted >= count, "messages flow")
        await _freeze(cluster, server, all_are_suspended, "no node acts any more")

    await while_talking(api, cids, pause())
    for cid in cids:
        events = await api.answered(cid)
        check_answered(events, api.sent[cid])
        assert [reason for _, reason in opened(events)] == ["start"], "the same epoch goes on"
        await guests[cid].wait_seq(events[-1]["seq"])
        assert guests[cid].events == events
    assert stored.members() == members
    for index in range(3):
        await asyncio.to_thread(cluster.wait_ready, index)
