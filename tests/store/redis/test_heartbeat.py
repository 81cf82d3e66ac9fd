"""The heartbeat thread's connections."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import textwrap
from contextlib import AsyncExitStack, closing
from pathlib import Path

import pytest

from convener.core.membership import Member, RenewReply
from convener.errors import StoreUnavailable
from convener.store.redis import HeartbeatLink, RedisStore
from convener.store.redis.endpoint import Endpoint
from convener.store.redis.keys import Keys
from tests.support.proxy import Proxy
from tests.support.servers import Server
from tests.support.waiting import wait_until

MEMBER = Member(0, 10_000, 500, '{"a":1}')


def _holders(server: Server, keys: Keys, incarnation: str) -> int:
    reply = server.ask("PUBSUB", "SHARDNUMSUB", keys.live(incarnation))
    assert isinstance(reply, list)
    return int(reply[1])  # pyright: ignore[reportUnknownArgumentType]


async def test_renewals(server: Server, store: RedisStore) -> None:
    with closing(store.heartbeat_link()) as link:
        assert await asyncio.to_thread(link.renew, "n~1") == RenewReply("DEAD", 0)
        await store.join("n~1", MEMBER)
        before = (await store.membership()).members["n~1"]
        assert await asyncio.to_thread(link.renew, "n~1") == RenewReply("OK", 1)
        server.ask("SCRIPT", "FLUSH")
        assert await asyncio.to_thread(link.renew, "n~1", '{"a":2}') == RenewReply("OK", 2)
        after = (await store.membership()).members["n~1"]
        assert (after.info, after.ttl, after.renew) == ('{"a":2}', 10_000, 500)
        assert after.deadline >= before.deadline
        await store.leave("n~1")
        assert await asyncio.to_thread(link.renew, "n~1") == RenewReply("DEAD", 3)


async def test_the_live_channel_spares_a_late_node(server: Server, store: RedisStore) -> None:
    keys = store.keys
    for name in ("n~1", "n~2", "n~3"):
        await store.join(name, Member(0, 100_000, 500))
    # Late by far, and the store itself was never silent.
    await store.topology.execute(keys.lease, "ZINCRBY", keys.lease, -50_000, "n~1")
    with closing(store.heartbeat_link()) as link:
        await asyncio.to_thread(link.hold_live, "n~1")
        assert _holders(server, keys, "n~1") == 1
        assert await store.bury("n~1", 10_000) == "ALIVE"
        link.ping_live()
    await wait_until(lambda: _holders(server, keys, "n~1") == 0, "the channel is let go")
    assert await store.bury("n~1", 10_000) == "OK"
    assert await store.is_buried("n~1")


async def test_a_lost_live_connection_is_noticed_at_the_next_ping(server: Server, store: RedisStore) -> None:
    with closing(store.heartbeat_link()) as link:
        with pytest.raises(StoreUnavailable, match="nothing is held"):
            link.ping_live()
        link.hold_live("n~1")
        link.ping_live()
        server.ask("CLIENT", "KILL", "TYPE", "pubsub")
        with pytest.raises(StoreUnavailable, match="ping_live"):
            link.ping_live()
        link.hold_live("n~1")
        link.ping_live()
        assert _holders(server, store.keys, "n~1") == 1


async def test_a_server_that_does_not_answer(server: Server, namespace: str, stack: AsyncExitStack) -> None:
    proxy = await stack.enter_async_context(Proxy(server.port))
    link = HeartbeatLink(Endpoint(proxy.url), Keys(namespace), 1)
    stack.callback(link.close)
    assert await asyncio.to_thread(link.renew, "n~1") == RenewReply("DEAD", 0)
    await asyncio.to_thread(link.hold_live, "n~1")
    proxy.freeze()
    with pytest.raises(StoreUnavailable, match="renew"):
        await asyncio.to_thread(link.renew, "n~1")
    with pytest.raises(StoreUnavailable, match="ping_live"):
        await asyncio.to_thread(link.ping_live)
    # Both were closed, so the next calls go over new connections.
    assert await asyncio.to_thread(link.renew, "n~1") == RenewReply("DEAD", 0)
    await asyncio.to_thread(link.hold_live, "n~1")
    await asyncio.to_thread(link.ping_live)


async def test_no_server_at_all(namespace: str) -> None:
    with Server() as gone:
        url = gone.url
    with closing(HeartbeatLink(Endpoint(url), Keys(namespace), 1)) as link:
        with pytest.raises(StoreUnavailable):
            await asyncio.to_thread(link.renew, "n~1")
        with pytest.raises(StoreUnavailable):
            await asyncio.to_thread(link.hold_live, "n~1")


async def test_a_store_that_refuses_the_renewal_is_unavailable(server: Server, store: RedisStore) -> None:
    key = store.keys.lease
    server.ask("SET", key, "x")
    server.ask("HSET", store.keys.info, "n~1", "1|1|{}")
    with closing(store.heartbeat_link()) as link:
        with pytest.raises(StoreUnavailable, match="WRONGTYPE"):
            await asyncio.to_thread(link.renew, "n~1")
        server.ask("DEL", key, store.keys.info)
        assert await asyncio.to_thread(link.renew, "n~1") == RenewReply("DEAD", 0)


FORKS = """
    import os, sys
    from convener.store.redis import HeartbeatLink
    from convener.store.redis.endpoint import Endpoint
    from convener.store.redis.keys import Keys
    link = HeartbeatLink(Endpoint(sys.argv[1]), Keys(sys.argv[2]), 5)
    link.hold_live("n~1")
    if os.fork() == 0:
        sys.stdin.read()  # the child outlives its parent until the test lets it go
        os._exit(0)
    link.ping_live()
    print("held", flush=True)
    sys.stdin.readline()
    os._exit(0)
"""


async def test_a_forked_child_does_not_hold_the_channel_for_its_dead_parent(server: Server, namespace: str) -> None:
    keys = Keys(namespace)
    process = subprocess.Popen(  # noqa: ASYNC220  # waited for below
        [sys.executable, "-c", textwrap.dedent(FORKS), server.url, namespace],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=Path(__file__).parent,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        assert await asyncio.to_thread(process.stdout.readline) == b"held\n"
        assert _holders(server, keys, "n~1") == 1
        process.kill()
        process.wait()
        await wait_until(lambda: _holders(server, keys, "n~1") == 0, "nobody holds it though the child lives")
    finally:
        process.stdin.close()
        process.stdout.close()
        process.kill()
        process.wait()
