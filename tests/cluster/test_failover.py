"""The store fails over while people talk to node processes: Sentinels and a Redis Cluster, planned and by a kill.

With ``durability=replicated`` nothing that was acknowledged may be lost by the kill; a planned fail-over loses nothing
anyway.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any, Final

import pytest

from convener.store.redis.wire import slot_of
from tests.cluster.checks import check_answered
from tests.cluster.clients import Client, Clients
from tests.cluster.talking import Api, talking, while_talking
from tests.support.cluster import Cluster
from tests.support.topologies import RedisCluster, SentinelGroup
from tests.support.waiting import wait_until, wait_until_sync

CIDS: Final = tuple(f"talk-{number}" for number in range(6))
"""Enough for every shard of a cluster."""
DURING: Final = 3
"""Messages of each conversation before the fail-over, and after it."""

Topology = SentinelGroup | RedisCluster


def take_primary_away(topology: Topology, planned: bool) -> None:
    """Let the primary that has the membership be replaced; return when it is, and is a replica of the new one."""
    if isinstance(topology, SentinelGroup):
        if planned:
            topology.fail_over()
            return
        before = topology.primary()
        before.kill()
        topology.wait_for_other_primary(before)
        topology.restore()
        return
    slot = slot_of("{convener:m}:lease")
    primary = topology.owner(slot)
    if planned:
        topology.fail_over(primary)
        return
    primary.kill()
    wait_until_sync(lambda: topology.owner(slot) is not primary, "a replica has taken over", 60)
    primary.start()
    wait_until_sync(topology.complete, "the former primary is a replica in sync", 60)


@asynccontextmanager
async def nodes(url: str, rng: random.Random, **settings: Any) -> AsyncGenerator[tuple[Cluster, Api, Clients]]:
    """Two nodes over a store with many servers."""
    async with AsyncExitStack() as stack:
        cluster = Cluster(None, 2, url=url, settings={"lease_ttl": 6, **settings})
        stack.push_async_callback(asyncio.to_thread, cluster.close)
        await asyncio.to_thread(cluster.__enter__)
        api = await stack.enter_async_context(talking(lambda: [cluster.url(index) for index in cluster.live()], rng))
        clients = Clients()
        stack.push_async_callback(clients.aclose)
        try:
            yield cluster, api, clients
        except BaseException as error:
            error.add_note(await asyncio.to_thread(cluster.report, str(error)))
            raise


async def accepted(api: Api) -> None:
    """Return when some more messages have been accepted."""
    goal = api.accepted + DURING * len(CIDS)
    await wait_until(lambda: api.accepted >= goal, "more messages are accepted", 90)


async def check(cluster: Cluster, api: Api, cid: str, watcher: Client) -> None:
    """Everything accepted is in the log once and answered once, and a client was shown exactly that."""
    events = await api.answered(cid, 60)
    check_answered(events, api.sent[cid])
    await watcher.wait_seq(events[-1]["seq"])
    assert watcher.events == events, watcher.name
    assert watcher.named("resync") == []


@pytest.mark.slow
@pytest.mark.timeout(240)
@pytest.mark.parametrize("planned", [True, False], ids=["planned", "killed"])
@pytest.mark.parametrize("kind", ["sentinel", "cluster"])
async def test_a_store_fails_over_while_people_talk(kind: str, planned: bool, rng: random.Random) -> None:
    topology: Topology = SentinelGroup() if kind == "sentinel" else RedisCluster(replicas=1)
    durability = "memory" if planned else "replicated"
    async with AsyncExitStack() as stack:
        await asyncio.to_thread(topology.__enter__)
        stack.push_async_callback(asyncio.to_thread, topology.__exit__, None, None, None)
        cluster, api, clients = await stack.enter_async_context(nodes(topology.url, rng, durability=durability))
        watchers: dict[str, Client] = {}
        for number, cid in enumerate(CIDS):
            url = cluster.url(number % 2)
            await api.start(url, cid, f"user-of-{cid}")
            # At the node that does not own it: what it is shown comes by publication.
            other = cluster.url((number + 1) % 2)
            watchers[cid] = await clients.join(other, cid, user_id=f"user-of-{cid}")

        async def story() -> None:
            await accepted(api)
            await asyncio.to_thread(take_primary_away, topology, planned)
            await accepted(api)

        await while_talking(api, CIDS, story())
        for cid in CIDS:
            await check(cluster, api, cid, watchers[cid])
        report = await asyncio.to_thread(cluster.get, 0, "/audit")
        assert report["violations"] == []
        assert report["conversations"] == len(CIDS)
        for index in range(2):
            await asyncio.to_thread(cluster.wait_ready, index)
