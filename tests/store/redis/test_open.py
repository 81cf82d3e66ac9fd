"""What is accepted, refused or unknown when the store is opened."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from convener.errors import ConfigurationError, StoreUnavailable
from convener.store.base import Store
from convener.store.redis import RedisStore
from convener.store.redis.address import parse
from convener.store.redis.endpoint import Attached, Endpoint
from tests.support.certificates import certificate
from tests.support.servers import FLAVOURS, Flavour, Server, free_port
from tests.support.topologies import Sentinel
from tests.support.waiting import wait_until


@pytest.fixture(params=FLAVOURS)
def own(request: pytest.FixtureRequest) -> Iterator[Server]:
    """A server that the test may change."""
    with Server(request.param, password="s3cret") as server:
        yield server


async def _works(url: str, **options: object) -> RedisStore:
    store: Store = RedisStore(url, **options)  # type: ignore[arg-type]
    await store.open()
    try:
        assert await store.head("c") is None
        heard: list[bytes] = []
        await store.subscribe(store.channel("sync"), heard.append, lambda: None)
        await store.publish(store.channel("sync"), b"x")
        await wait_until(lambda: heard, "the publication is heard")
    finally:
        await store.close()
    assert isinstance(store, RedisStore)
    return store


# -- URLs ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("redis+sentinel://h1,h2/db/name", "needs /DB/NAME"),
        ("redis+sentinel://h1,h2/name", "needs /DB/NAME"),
        ("redis+sentinel://h1,h2/0", "needs /DB/NAME"),
        ("redis+sentinel://h1,h2/0/a/b", "needs /DB/NAME"),
        ("redis+sentinel:///0/name", "hosts"),
        ("redis+sentinel://h1,/0/name", "hosts"),
        ("redis+cluster://h1:x", "hosts"),
        ("redis+cluster://u:pass/word@h1", "hosts"),
        ("redis+cluster://h1:0", "hosts"),
        ("valkeys+cluster://h1/1", "one database only"),
        ("redis+cluster://h1?nonsense=1", "unknown option 'nonsense'"),
        ("redis+sentinel://h1/0/name?sentinel_db=1", "unknown option 'sentinel_db'"),
        ("redis://h1?sentinel_password=x", "unknown option 'sentinel_password'"),
        ("unix+cluster:///path", "unknown scheme"),
        ("redis+nodes://h1", "unknown scheme"),
        ("http://h1", "unknown scheme"),
        ("localhost:6379", "unknown scheme"),
        ("redis://h1:port", "Port could not be cast|port"),
        ("redis://h1/name", "number of a database"),
        ("redis://h1?nonsense=1", "unknown option 'nonsense'"),
        ("redis://h1?socket_timeout=1", "unknown option 'socket_timeout'"),
        ("redis://h1?db=x", "db"),
        ("unix://", "path of a socket"),
    ],
)
def test_urls_that_are_refused(url: str, says: str) -> None:
    with pytest.raises(ConfigurationError, match=says):
        RedisStore(url)


@pytest.mark.parametrize(
    ("url", "where"),
    [
        ("redis://h1", "h1:6379"),
        ("valkey://user:secret@h1:7000/3", "h1:7000"),
        ("rediss://[::1]:7000", "::1:7000"),
        ("valkeys://h1?ssl_check_hostname=false", "h1:6379"),
        ("unix:///run/redis.sock?db=2", "/run/redis.sock"),
        ("valkey+unix:///run/redis.sock", "/run/redis.sock"),
    ],
)
def test_urls_that_are_taken_and_shown_without_secrets(url: str, where: str) -> None:
    assert str(Endpoint(parse(url).server_url)) == where


@pytest.mark.parametrize(
    ("url", "server", "hosts", "service", "sentinel"),
    [
        (
            "redis+sentinel://user:p%40w@h1:1,h2,[::1]:3/2/main?sentinel_password=s%26t&ssl_check_hostname=false",
            "redis://user:p%40w@server/2?ssl_check_hostname=false",
            (("h1", 1), ("h2", 26379), ("::1", 3)),
            "main",
            "redis://sentinel?ssl_check_hostname=false&password=s%26t",
        ),
        ("valkeys+sentinel://h1/0/m", "rediss://server/0?", (("h1", 26379),), "m", "rediss://sentinel?"),
        ("valkey+cluster://:pw@h1,h2:7", "redis://:pw@server?", (("h1", 6379), ("h2", 7)), "", ""),
        ("rediss+cluster://h1/0?ssl_ca_certs=/x", "rediss://server?ssl_ca_certs=%2Fx", (("h1", 6379),), "", ""),
    ],
)
def test_urls_of_several_servers(
    url: str, server: str, hosts: tuple[tuple[str, int], ...], service: str, sentinel: str
) -> None:
    address = parse(url)
    assert (address.server_url, address.hosts, address.service, address.sentinel_url) == (
        server,
        hosts,
        service,
        sentinel,
    )
    RedisStore(url)


def test_a_refused_url_does_not_give_its_password_away() -> None:
    for url in ("redis+cluster://u:secret/x@h1", "redis+sentinel://u:secret@h1/x", "redis+sentinel://u:secret@,/0/m"):
        with pytest.raises(ConfigurationError) as refusal:
            parse(url)
        assert "secret" not in str(refusal.value)


def test_a_password_cannot_come_from_two_places() -> None:
    with pytest.raises(ConfigurationError, match="redis_credentials"):
        RedisStore("redis://:pw@h1", credentials=lambda: ("u", "p"))


def test_channels_have_three_kinds() -> None:
    store = RedisStore("redis://h1", namespace="x")
    assert [store.channel("c", "a"), store.channel("n", "b~1"), store.channel("sync")] == [
        "{x:c:a}",
        "{x:n:b~1}",
        "{x:m}:sync",
    ]
    with pytest.raises(ValueError, match="kind"):
        store.channel("t")


# -- servers -------------------------------------------------------------------------------------------------------


async def test_a_server_that_is_not_there(tmp_path: Path) -> None:
    for url in (f"redis://127.0.0.1:{free_port()}", f"unix://{tmp_path}/none"):
        store = RedisStore(url)
        with pytest.raises(StoreUnavailable, match="cannot connect"):
            await store.open()
        with pytest.raises(StoreUnavailable, match=r"not open|closed"):
            await store.head("c")


async def test_tcp_unix_socket_and_database(server: Server, namespace: str) -> None:
    await _works(server.url, namespace=namespace)
    await _works(server.unix_url, namespace=namespace)
    await _works(server.url.removesuffix("/0"), namespace=namespace)
    async with RedisStore(server.url.removesuffix("/0") + "/3", namespace=namespace) as store:
        await store.create("c", "u", "{}", "g")
        assert server.ask("EXISTS", store.keys.meta("c")) == 0
        await store.erase("c")
    with pytest.raises(ConfigurationError, match="out of range"):
        await RedisStore(server.url.removesuffix("/0") + "/99", namespace=namespace).open()


async def test_a_connection_attempt_that_is_cancelled_ends(server: Server) -> None:
    """At whatever moment. One that went on would keep a node that ends from ending."""

    async def attempt(turns: int) -> bool:
        attached = Attached()
        task = asyncio.create_task(Endpoint(server.url).connect(attached, 5, _Slow()))
        for _ in range(turns):
            await asyncio.sleep(0)
        late = task.done()
        task.cancel()
        await asyncio.wait([task])
        if not task.cancelled():
            await attached.release()
            assert late, f"it went on though it was cancelled after {turns} turns of the loop"
        return late

    for _ in range(3):
        turns = 0
        while not await attempt(turns):
            turns += 1


class _Slow:
    """Asks something, so that there is more to be cut off."""

    commands = (("ROLE",), ("PING",), ("PING",), ("PING",))

    def judge(self, place: str, replies: Sequence[Any]) -> None:
        assert replies[-1] == b"PONG"


async def test_what_the_server_says_of_itself(server: Server, store: RedisStore) -> None:
    info = await store.info()
    assert (info.kind, info.eviction, info.memory_ratio) == (server.flavour, "noeviction", None)
    assert info.version is not None
    assert store.capabilities.counts_subscribers
    assert store.capabilities.version is not None
    assert store.capabilities.version >= (7, 0)


async def test_memory_and_eviction(own: Server) -> None:
    own.ask("CONFIG", "SET", "maxmemory", "100mb")
    own.ask("CONFIG", "SET", "maxmemory-policy", "volatile-lru")
    async with RedisStore(own.url) as store:
        info = await store.info()
    assert info.eviction == "volatile-lru"
    assert info.memory_ratio is not None
    assert 0 < info.memory_ratio < 1
    own.ask("CONFIG", "SET", "maxmemory-policy", "allkeys-lru")
    with pytest.raises(ConfigurationError, match="allkeys-lru"):
        await RedisStore(own.url).open()


@pytest.mark.parametrize("flavour", FLAVOURS)
async def test_what_the_url_does_not_say_is_refused_with_words(flavour: Flavour) -> None:
    options = {"cluster-enabled": "yes", "cluster-port": str(free_port())}
    with Server(flavour, options=options) as one, Server(flavour) as other, Sentinel(flavour, other) as sentinel:
        with pytest.raises(ConfigurationError, match=r"is a Redis Cluster: write redis\+cluster"):
            await RedisStore(one.url).open()
        with pytest.raises(ConfigurationError, match=r"is a Sentinel: write redis\+sentinel"):
            await RedisStore(sentinel.url).open()
        for server in (other, sentinel):
            with pytest.raises(ConfigurationError, match="is no server of a cluster"):
                await RedisStore(f"redis+cluster://127.0.0.1:{server.port}").open()
        with pytest.raises(StoreUnavailable, match="knows nobody who has hash slots"):
            await RedisStore(f"redis+cluster://127.0.0.1:{one.port}").open()
        with pytest.raises(ConfigurationError, match="this is no Sentinel"):
            await RedisStore(f"redis+sentinel://127.0.0.1:{other.port}/0/main").open()
        with pytest.raises(ConfigurationError, match="know no primary called 'main'"):
            await RedisStore(f"redis+sentinel://127.0.0.1:{sentinel.port}/0/main").open()


@pytest.mark.parametrize("flavour", FLAVOURS)
async def test_a_replica_is_no_store(flavour: Flavour) -> None:
    with Server(flavour) as primary, Server(flavour) as replica:
        replica.ask("REPLICAOF", "127.0.0.1", primary.port)
        with pytest.raises(StoreUnavailable, match="is a replica"):
            await RedisStore(replica.url).open()


# -- credentials ---------------------------------------------------------------------------------------------------


async def test_passwords(own: Server) -> None:
    bare = f"redis://127.0.0.1:{own.port}/0"
    await _works(own.url)
    await _works(own.unix_url)
    await _works(bare, credentials=lambda: ("default", "s3cret"))
    for url in (bare, own.url.replace("s3cret", "wrong")):
        with pytest.raises(ConfigurationError, match="redis_url"):
            await RedisStore(url).open()
    with pytest.raises(ConfigurationError, match="credentials"):
        await RedisStore(bare, credentials=lambda: ("default", "wrong")).open()


async def test_a_password_that_changes_while_the_store_is_open(own: Server) -> None:
    current = ["s3cret"]
    store = RedisStore(f"redis://127.0.0.1:{own.port}/0", credentials=lambda: ("default", current[0]), deadline=1)
    async with store:
        # A new user with the old name: connections of the old one end, ours come back only with the new password.
        own.ask("CONFIG", "SET", "requirepass", "fresh")
        own.password = "fresh"
        own.ask("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
        await wait_until(lambda: not store.statistics()[0].connected, "the loss is noticed")
        with pytest.raises(StoreUnavailable, match=r"credentials|lost"):
            await store.head("c")
        current[0] = "fresh"

        async def answers() -> bool:
            return await store.head("c") is None

        await wait_until(answers, "the store is back", retry_on=StoreUnavailable)


async def test_a_provider_that_fails_later_is_only_an_absent_store(own: Server) -> None:
    broken = [False]

    def credentials() -> tuple[str, str]:
        if broken[0]:
            raise RuntimeError("the vault is shut")
        return "default", "s3cret"

    async with RedisStore(f"redis://127.0.0.1:{own.port}/0", credentials=credentials, deadline=1) as store:
        broken[0] = True
        own.ask("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
        await wait_until(lambda: not store.statistics()[0].connected, "the loss is noticed")
        with pytest.raises(StoreUnavailable):
            await store.head("c")
        broken[0] = False

        async def answers() -> bool:
            return await store.head("c") is None

        await wait_until(answers, "the store is back", retry_on=StoreUnavailable)


# -- access lists --------------------------------------------------------------------------------------------------


def _user(own: Server, *rules: str) -> str:
    own.ask("ACL", "SETUSER", "node", "reset", "on", ">pw", *rules)
    return f"redis://node:pw@127.0.0.1:{own.port}/0"


async def test_a_user_with_just_enough_rights(own: Server) -> None:
    url = _user(own, "~{ns:*", "&{ns:*", "+@all", "-@admin", "-@dangerous")
    store = await _works(url, namespace="ns")
    # INFO and CONFIG are dangerous commands: what they show is unknown, not refused.
    assert store.capabilities.version is None
    assert store.capabilities.eviction is None
    assert store.capabilities.counts_subscribers


async def test_scripts_that_cannot_be_loaded_go_by_their_text(own: Server) -> None:
    url = _user(own, "~{ns:*", "&{ns:*", "+@all", "-script")
    async with RedisStore(url, namespace="ns") as store:
        created = await store.create("c", "u", "{}", "g")
        own.ask("SCRIPT", "FLUSH")
        assert (await store.create("c", "u", "{}", "g")).meta == created.meta


@pytest.mark.parametrize(
    "rules",
    [
        ("~{ns:*", "+@all", "resetchannels"),
        ("~{ns:*", "+@all", "resetchannels", "&{ns:m}*"),
        ("~{ns:*", "+@all", "resetchannels", "&{ns:m}*", "&{ns:c:*"),
        ("~{other:*", "+@all", "allchannels"),
        ("~{ns:*", "+@all", "allchannels", "-eval", "-evalsha"),
        ("~{ns:*", "+@all", "allchannels", "-ssubscribe"),
    ],
)
async def test_a_user_with_too_few_rights(own: Server, rules: tuple[str, ...]) -> None:
    with pytest.raises(ConfigurationError, match="redis_url"):
        await RedisStore(_user(own, *rules), namespace="ns").open()


# -- TLS -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flavour", ["redis"])
async def test_tls(flavour: Flavour, tmp_path: Path) -> None:
    """Debian's server is built with TLS; the embedded one is not."""
    files = certificate(tmp_path)
    port = free_port()
    with Server(flavour, options=files.options(port)):
        await _works(f"rediss://localhost:{port}", tls={"ssl_ca_certs": str(files.certificate)})
        await _works(f"valkeys://localhost:{port}?ssl_ca_certs={files.certificate}")
        with pytest.raises(StoreUnavailable, match="certificate verify failed"):
            await RedisStore(f"rediss://localhost:{port}").open()
        store = RedisStore(f"rediss://localhost:{port}", tls={"ssl_ca_certs": str(files.certificate)})
        async with store:
            link = store.heartbeat_link()
            link.hold_live("n~1")
            link.ping_live()
            assert link.renew("n~1").outcome == "DEAD"
            link.close()
