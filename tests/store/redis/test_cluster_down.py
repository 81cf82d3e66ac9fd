"""A Redis Cluster of which a part is down."""

from __future__ import annotations

import asyncio

import pytest

from convener.errors import StoreUnavailable
from convener.store.redis import RedisStore
from convener.store.redis.wire import slot_of
from tests.store.redis.clusters import batch, owned
from tests.support.topologies import RedisCluster, tell

pytestmark = [pytest.mark.anyio, pytest.mark.xdist_group("processes")]


async def test_a_slot_that_nobody_has() -> None:
    with RedisCluster("valkey", primaries=2, options={"cluster-require-full-coverage": "no"}) as servers:
        async with RedisStore(servers.url, namespace="t", deadline=1.5) as store:
            epoch = await owned(store, "c")
            slot = slot_of(store.keys.meta("c"))
            home = servers.owner(slot)
            for server in servers.servers:
                tell(server, "CLUSTER", "DELSLOTS", slot)
            with pytest.raises(StoreUnavailable, match="the cluster is down"):
                await store.append("c", batch(epoch, 1))
            with pytest.raises(StoreUnavailable, match="confirm"):
                await store.subscribe(store.channel("c", "c"), lambda _: None, lambda: None)
            waiting = [asyncio.create_task(store.append("c", batch(epoch, n))) for n in (1, 2, 3)]
            tell(home, "CLUSTER", "ADDSLOTS", slot)
            assert [reply.outcome for reply in await asyncio.gather(*waiting)] == ["OK"] * 3
