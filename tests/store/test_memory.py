"""What is particular about the store in memory: its clock, its peers, the heartbeat's thread."""

from __future__ import annotations

import asyncio
import threading

import pytest

from convener.core.membership import Member
from convener.core.model import NewMessage
from convener.errors import StoreUnavailable
from convener.store.base import Store
from convener.store.memory import MemoryStore

pytestmark = pytest.mark.anyio


class Clock:
    """Milliseconds that only move when told to."""

    def __init__(self) -> None:
        self.now = 1_000_000

    def __call__(self) -> int:
        return self.now


async def test_its_clock_can_be_set() -> None:
    clock = Clock()
    store = MemoryStore(clock)
    await store.open()
    assert (await store.create("c", "u", "{}", "g")).meta.created == 1_000_000
    clock.now += 500
    await store.send("c", NewMessage("m", "u", "1"), max_pending=9)
    read = await store.inbox("c")
    assert read is not None
    assert (read[0].updated, read[1][0].ts) == (1_000_500, 1_000_500)
    await store.close()


async def test_reap_goes_by_that_clock() -> None:
    clock = Clock()
    store = MemoryStore(clock)
    await store.open()
    for name in ("a~1", "b~1"):
        await store.join(name, Member(0, 10_000, 500))
    for _ in range(20):
        clock.now += 500
        await store.renew("a~1")
    assert list(await store.reap(10_000)) == ["b~1"]
    await store.close()


async def test_peers_share_the_data_but_not_the_connection() -> None:
    store = MemoryStore()
    await store.open()
    peer = store.peer()
    with pytest.raises(StoreUnavailable):
        await peer.head("c")
    await peer.open()
    heard: dict[str, list[bytes]] = {"store": [], "peer": []}
    await store.subscribe(store.channel("sync"), heard["store"].append, lambda: None)
    await peer.subscribe(peer.channel("sync"), heard["peer"].append, lambda: None)
    await store.create("c", "u", "{}", "g")
    assert await peer.head("c") == await store.head("c")
    await peer.unsubscribe(peer.channel("sync"))
    await store.publish(store.channel("sync"), b"1")
    await asyncio.sleep(0)
    assert heard == {"store": [b"1"], "peer": []}
    await store.close()
    assert await peer.head("c") is not None
    await peer.close()


async def test_every_call_lets_others_run() -> None:
    """A loop over the store must not starve the event loop, as it would not with a real one."""
    store: Store = MemoryStore()
    await store.open()
    turns = 0

    async def count() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    counting = asyncio.create_task(count())
    for _ in range(50):
        await store.head("c")
    counting.cancel()
    assert turns >= 50
    await store.close()


async def test_a_renewal_that_cannot_be_done_in_time_is_unavailable() -> None:
    store = MemoryStore()
    await store.open()
    await store.join("a~1", Member(0, 10_000, 500))
    inside, leave = threading.Event(), threading.Event()

    def slow_clock() -> int:
        inside.set()
        leave.wait(20)
        return 1

    slow = MemoryStore(slow_clock)
    await slow.open()
    busy = threading.Thread(target=lambda: asyncio.run(_head(slow)))
    busy.start()
    await asyncio.to_thread(inside.wait, 20)
    link = slow.heartbeat_link(timeout=0.01)
    with pytest.raises(StoreUnavailable):
        await asyncio.to_thread(link.renew, "a~1")
    leave.set()
    await asyncio.to_thread(busy.join)
    await slow.close()
    await store.close()


async def _head(store: Store) -> None:
    await store.head("c")
