"""A store that is full, seen by one node: what was accepted comes to its end, whichever of its writes came too late."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from typing import Any, cast

import pytest

from convener.errors import StoreFull
from convener.manager.storage import Storage
from convener.manager.turn import Turn
from convener.store.base import Store, StoreInfo
from convener.testing.cluster import InProcessCluster
from convener.testing.steps import StepStore
from tests.manager.conftest import audit
from tests.support.servers import Server
from tests.support.waiting import wait_until

pytestmark = pytest.mark.anyio


@pytest.fixture(scope="module")
def own() -> Iterator[Server]:
    """A server that the tests may fill."""
    with Server("valkey") as server:
        yield server


@pytest.fixture
async def filling(own: Server) -> AsyncIterator[tuple[InProcessCluster, StepStore]]:
    """A node that echoes, and its store."""
    stores: list[StepStore] = []

    def wrap(index: int, store: Store) -> Store:
        stores.append(StepStore(store))
        return cast("Store", stores[-1])

    async def echo(turn: Turn[Any]) -> None:
        await turn.reply({"text": turn.text})

    async with InProcessCluster(echo, nodes=1, url=own.url, namespace="full", wrap=wrap) as cluster:
        yield cluster, stores[0]
        await audit(cluster)


async def test_a_turn_ends_although_its_beginning_came_too_late(
    own: Server, filling: tuple[InProcessCluster, StepStore]
) -> None:
    """The batch that ends it is taken by a full store, so those that it waits for have to be."""
    cluster, store = filling
    manager = cluster[0]
    await manager.maybe_start_agent_loop("c", user_id="u")
    held = store.hold("append")
    await manager.send_event_to_conversation("c", {"text": "just in time"})
    await held.reached.wait()
    await asyncio.to_thread(own.ask, "CONFIG", "SET", "maxmemory", "1")
    try:
        with pytest.raises(StoreFull) as refusal:
            await manager.send_event_to_conversation("c", {"text": "too late"})
        assert refusal.value.retry_after
        held.go()

        async def is_done() -> bool:
            head = await store.head("c")
            return head is not None and head.done == 1

        await wait_until(is_done, "the turn has ended in the full store")
    finally:
        await asyncio.to_thread(own.ask, "CONFIG", "SET", "maxmemory", "0")


def test_the_mark() -> None:
    storage = Storage(0.5)
    storage.take(StoreInfo("redis", memory_ratio=None, eviction=None))
    storage.check_conversation()
    storage.take(StoreInfo("redis", memory_ratio=0.49, eviction="volatile-lru"))
    storage.check_conversation()
    assert storage.problem() == ""
    storage.take(StoreInfo("redis", memory_ratio=0.5, eviction="noeviction"))
    storage.check_message()
    with pytest.raises(StoreFull, match="no new conversations"):
        storage.check_conversation()
    storage.take(StoreInfo("redis", memory_ratio=0.5, eviction="allkeys-lfu"))
    with pytest.raises(StoreFull, match="delete conversations"):
        storage.check_message()
    assert "allkeys-lfu" in storage.problem()
    storage.take(StoreInfo("redis", memory_ratio=0.2, eviction="allkeys-lfu"))
    storage.check_message()
    assert storage.problem()
