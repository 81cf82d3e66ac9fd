"""Examining real stores: what is in them, how they are set up, what they hide, in each topology."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from typing import cast

import pytest

from convener.core.directory import Record
from convener.core.membership import Member
from convener.errors import ConfigurationError, StoreUnavailable
from convener.store.diagnosis import Diagnosis, Finding
from convener.store.redis import RedisStore, acl
from convener.store.redis.doctor import diagnose
from tests.support.servers import FLAVOURS, Flavour, Server, free_port
from tests.support.topologies import RedisCluster, SentinelGroup, tell

pytestmark = pytest.mark.xdist_group("processes")


@pytest.fixture(params=FLAVOURS, scope="module")
def server(request: pytest.FixtureRequest) -> Iterator[Server]:
    with Server(cast("Flavour", request.param), persistence="aof", options={"maxmemory": "200mb"}) as made:
        yield made


@pytest.fixture
def own(server: Server) -> Iterator[Server]:
    """Empty, and set up well."""
    yield server
    tell(server, "FLUSHALL")
    for name, value in (("maxmemory-policy", "noeviction"), ("appendonly", "yes")):
        tell(server, "CONFIG", "SET", name, value)


async def _examine(url: str, *, watch: float = 0.0) -> Diagnosis:
    return await diagnose(RedisStore(url, namespace="ns"), watch=watch)


def _of(diagnosis: Diagnosis) -> dict[str, Finding]:
    return {finding.check: finding for finding in diagnosis.findings}


async def test_a_store_that_is_well(own: Server) -> None:
    async with RedisStore(own.url, namespace="ns") as store:
        await store.index("u", "c")
        await store.create("c", "u", "{}", "g")
        await store.join("n~1", Member(0, 100_000, 500, '{"protocol":1,"version":"0.1.0"}'))
    found = await _examine(own.url)
    assert found.verdict == "safe"
    assert {finding.verdict for finding in found.findings} == {"safe"}
    assert _of(found)["members"].says == "protocol 1: n (0.1.0)"
    assert _of(found)["keys"].says.endswith("all in use")


async def test_what_is_left_over(own: Server) -> None:
    async with RedisStore(own.url, namespace="ns") as store:
        k = store.keys
        for cid in ("kept", "unlisted"):
            await store.create(cid, "u", "{}", "g")
        await store.index("u", "kept")
        tell(own, "ZADD", k.seen("gone"), 1, "m")
        tell(own, "HSET", k.records("ghost~1"), "c", "{}")
        tell(own, "HSET", k.slots("u"), "vanished", "nonce|n~1", "kept", "nonce|n~1")
        tell(own, "SET", "{ns:strange}", "1")
        tell(own, "SET", "{other:strange}", "1")
        await store.join("n~1", Member(0, 100_000, 500, '{"protocol":1}'))
        await store.join("n~2", Member(0, 100_000, 500, '{"protocol":2,"version":"9"}'))
    found = _of(await _examine(own.url))
    says = found["keys"].says
    assert found["keys"].verdict == "reduced"
    assert says.startswith("5 of ")
    for what in (
        "{ns:strange} is none of convener's",
        f"{k.seen('gone')} belongs to no conversation",
        f"{k.meta('unlisted')} belongs to a conversation that no list has",
        f"{k.records('ghost~1')} belongs to a node that is neither a member nor buried",
        f"{k.slots('u')} counts vanished, which does not exist",
    ):
        assert what in says
    assert found["members"].verdict == "reduced"
    assert "protocol 1: n (unknown version); protocol 2: n (9)" in found["members"].says


async def test_a_store_that_deletes_is_refused_and_examined_all_the_same(own: Server) -> None:
    tell(own, "CONFIG", "SET", "maxmemory-policy", "allkeys-lru")
    tell(own, "CONFIG", "SET", "appendonly", "no")
    found = await _examine(own.url)
    assert found.verdict == "refused"
    assert (_of(found)["eviction"].verdict, _of(found)["persistence"].verdict) == ("refused", "reduced")
    assert _of(found)["rights"].verdict == "safe"


async def test_a_node_says_at_its_start_what_is_not_as_it_should_be(
    own: Server, caplog: pytest.LogCaptureFixture
) -> None:
    async with RedisStore(own.url, namespace="ns"):
        assert caplog.messages == []
    tell(own, "CONFIG", "SET", "appendonly", "no")
    async with RedisStore(own.url, namespace="ns"):
        pass
    (said,) = caplog.messages
    assert said == "the store, persistence: none: a restart loses everything; set appendonly yes"


async def test_growth_is_seen(own: Server) -> None:
    over = threading.Event()

    def grow() -> None:
        number = 0
        while not over.is_set():
            number += 1
            tell(own, "SETRANGE", f"ballast{number % 100}", 1 << 20, "x")

    writing = asyncio.create_task(asyncio.to_thread(grow))
    try:
        found = _of(await _examine(own.url, watch=0.5))
    finally:
        over.set()
        await writing
    assert "a second now: full in 0.0 h" in found["growth"].says


async def test_sentinels_and_clusters_are_walked_as_well() -> None:
    with SentinelGroup("valkey") as group:
        found = _of(await _examine(group.url))
        assert (found["persistence"].verdict, found["replicas"].says) == ("refused", "1")
        assert found["keys"].says.startswith("0 keys")
    with RedisCluster("valkey") as cluster:
        async with RedisStore(cluster.url, namespace="ns") as store:
            await store.join("n~1", Member(0, 100_000, 500, "{}"))
            for number in range(20):
                await store.enqueue(f"u{number}", "c", "n~1", "start")
                await store.put_record(f"ghost~{number}", Record("c", "u", "idle", 1, "x", 1))
        diagnosis = await _examine(cluster.url)
        assert len({f.says.partition(": ")[0] for f in diagnosis.findings if f.check == "version"}) == 3
        assert _of(diagnosis)["keys"].says.startswith("20 of ")


@pytest.mark.parametrize("less", [("-info",), ("-config",), ("-scan",), ("-wait", "-pubsub|shardnumsub")])
async def test_what_is_hidden_is_unknown(own: Server, less: tuple[str, ...]) -> None:
    rights = [f"+{command}" for command in sorted(acl.DOCTOR)]
    tell(own, "ACL", "SETUSER", "node", "reset", "on", ">pw", *acl.rules("ns"), *rights, *less)
    found = await _examine(f"redis://node:pw@127.0.0.1:{own.port}/0")
    verdicts = {finding.check: finding.verdict for finding in found.findings if finding.verdict != "safe"}
    assert "refused" not in verdicts.values()
    match less[0]:
        case "-info":
            assert verdicts.keys() >= {"version", "memory", "replicas"}
            assert verdicts["version"] == "unknown"
        case "-config":
            assert verdicts == {"pubsub_buffer": "unknown"}
        case "-scan":
            assert verdicts == {"keys": "unknown"}
        case _:
            assert verdicts == {"fast_burial": "reduced", "wait": "reduced"}
            assert found.verdict == "reduced"


async def test_too_few_rights_are_refused_by_name(own: Server) -> None:
    tell(own, "ACL", "SETUSER", "node", "reset", "on", ">pw", *acl.rules("ns"), "-hmget")
    found = await _examine(f"redis://node:pw@127.0.0.1:{own.port}/0")
    assert found.verdict == "refused"
    assert "lacks +hmget" in _of(found)["rights"].says


async def test_nobody_is_there(own: Server) -> None:
    with pytest.raises(StoreUnavailable):
        await _examine(f"redis://127.0.0.1:{free_port()}/0")
    with pytest.raises(ConfigurationError, match=r"refuses the credentials"):
        await _examine(f"redis://nobody:pw@127.0.0.1:{own.port}/0")
