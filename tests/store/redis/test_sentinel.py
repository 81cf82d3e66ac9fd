"""Real Sentinels: fail-overs under load, of each kind, and what they make of log, subscriptions and heartbeat.

With Valkey the Sentinels have a password and the servers an access list; with Redis everything goes through TLS.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, closing
from typing import Any, cast

import pytest

from convener.core.membership import Member, RenewReply
from convener.errors import ConfigurationError, StoreUnavailable
from convener.store.redis import RedisStore
from convener.store.redis.endpoint import Attached
from convener.store.redis.history import NewHistory
from convener.store.redis.sentinel import Named, Primary, UnderSentinels, newest
from tests.store.redis.clusters import RIGHTS
from tests.store.redis.load import CHAIN, progress, working
from tests.support.certificates import certificate
from tests.support.servers import FLAVOURS, Flavour, Server, binary, free_port
from tests.support.topologies import HOST, SERVICE, Sentinel, SentinelGroup, hosts, info, role, tell
from tests.support.waiting import wait_until, wait_until_sync

pytestmark = pytest.mark.xdist_group("processes")

only_valkey = pytest.mark.parametrize("servers", ["valkey"], indirect=True)
only_redis = pytest.mark.parametrize("servers", ["redis"], indirect=True)

WATCHER = ("resetkeys", "resetchannels", "-@all", "+sentinel|get-master-addr-by-name", "+sentinel|master")


@pytest.fixture(scope="module", params=FLAVOURS)
def servers(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[SentinelGroup]:
    """A primary, a replica and three Sentinels, that the tests share: each leaves them complete."""
    flavour = cast("Flavour", request.param)
    if binary(flavour) is None:
        pytest.skip(f"no {flavour} server is installed on this machine")
    directory = tmp_path_factory.mktemp(flavour)
    users = directory / "users.acl"
    users.write_text(f"user default on nopass ~* &* +@all\nuser node on >pw {' '.join(RIGHTS)}\n")
    # Valkey's embedded binary is built without TLS.
    tls = certificate(directory) if flavour == "redis" else None
    with SentinelGroup(flavour, tls=tls, password=None if tls else "spw", options={"aclfile": str(users)}) as group:
        yield group


class Opener:
    """Opens stores in one namespace."""

    def __init__(self, servers: SentinelGroup, stack: AsyncExitStack) -> None:
        self.servers = servers
        self.namespace = f"t{secrets.token_hex(4)}"
        self.told: list[NewHistory] = []
        self._stack = stack

    @property
    def url(self) -> str:
        own = "" if self.servers.password is None else f"?sentinel_password={self.servers.password}"
        return self.servers.url.replace("://", "://node:pw@") + own

    async def __call__(self, url: str | None = None, **options: Any) -> RedisStore:
        tls = self.servers.tls
        options.setdefault("tls", None if tls is None else {"ssl_ca_certs": str(tls.certificate)})
        options.setdefault("on_new_history", self.told.append)
        return await self._stack.enter_async_context(RedisStore(url or self.url, namespace=self.namespace, **options))


@pytest.fixture
async def opening(servers: SentinelGroup) -> AsyncIterator[Opener]:
    """Opens stores in a namespace of its own; afterwards the servers are made what they were."""
    async with AsyncExitStack() as stack:
        opener = Opener(servers, stack)
        yield opener
    await asyncio.to_thread(servers.restore)


async def _fail_over_under_load(
    opening: Opener, change: Callable[[Server], object], *, lost: bool
) -> tuple[RedisStore, Server]:
    servers = opening.servers
    store = await opening(deadline=60)
    await store.join("n~1", Member(0, 100_000, 500, "{}"))
    former = servers.primary()
    with closing(store.heartbeat_link(timeout=5)) as link:
        await asyncio.to_thread(link.hold_live, "n~1")
        async with working(store, ["c0", "c1", "c2"]) as works:
            await progress(works)
            # What is lost then is at most what came after this.
            await asyncio.to_thread(servers.caught_up)
            await asyncio.to_thread(change, former)
            await progress(works)
            await wait_until(lambda: opening.told, "the other history is told")
            await progress(works)
            await asyncio.to_thread(
                wait_until_sync,
                lambda: link.renew("n~1") == RenewReply("OK", 1),
                "the renewal goes through",
                retry_on=StoreUnavailable,
            )
            await asyncio.to_thread(
                wait_until_sync, lambda: not link.hold_live("n~1"), "the channel is held", retry_on=StoreUnavailable
            )
            await asyncio.to_thread(link.ping_live)
        heir = servers.primary()
        assert heir is not former
        for work in works:
            await work.check(lost=lost)
            assert work.heard.count(None) >= 1
            # What was under way may fail; what came later has waited.
            assert work.failed <= CHAIN
        assert tell(heir, "PUBSUB", "SHARDNUMSUB", store.keys.live("n~1"))[1] == 1
    (told,) = opening.told
    assert told.new.takes_over(told.old)
    assert store.history == {"": told.new}
    assert told.new.run == info(heir, "server")["run_id"]
    assert told.new.line == info(heir, "replication")["master_replid"]
    return store, heir


async def test_a_primary_that_is_killed(opening: Opener) -> None:
    await _fail_over_under_load(opening, lambda primary: primary.kill(), lost=True)


@only_redis
async def test_a_primary_that_hangs(opening: Opener) -> None:
    def hang(primary: Server) -> None:
        primary.freeze()
        opening.servers.wait_for_other_primary(primary)

    await _fail_over_under_load(opening, hang, lost=True)


@only_valkey
async def test_a_fail_over_that_loses_nothing(opening: Opener) -> None:
    """Valkey's Sentinels can coordinate it since 9.0."""
    await _fail_over_under_load(opening, lambda _: opening.servers.fail_over(), lost=False)


@only_redis
async def test_a_former_primary_that_knows_of_nothing_is_left(opening: Opener) -> None:
    """It goes on taking writes until a Sentinel gets round to it, which takes some ten seconds."""
    servers = opening.servers

    def order(primary: Server) -> None:
        tell(servers.sentinels[0], "SENTINEL", "FAILOVER", SERVICE)
        servers.wait_for_other_primary(primary)
        assert role(primary) == "master"

    store, heir = await _fail_over_under_load(opening, order, lost=True)
    head = await store.head("c0")
    assert head is not None
    assert tell(heir, "HGET", store.keys.meta("c0"), "seq") == str(head.seq).encode()


# -- whom to believe -----------------------------------------------------------------------------------------------


def test_the_newest_configuration_counts_and_then_the_majority() -> None:
    a, b, c = ("h", 1), ("h", 2), ("h", 3)
    assert newest([Named(1, a), Named(2, b), Named(1, a)], None) == Named(2, b)
    assert newest([Named(2, a), Named(2, b), Named(2, b)], None) == Named(2, b)
    # What is known already is never given up for an older answer, be it of most.
    assert newest([Named(1, a), Named(1, a)], Named(2, b)) == Named(2, b)
    assert newest([Named(2, c)], Named(2, b)) == Named(2, c)
    # Where the epoch is hidden there is nothing but the majority.
    assert newest([Named(-1, a), Named(-1, b), Named(-1, b)], Named(-1, a)) == Named(-1, b)


@only_valkey
async def test_sentinels_that_begin_anew_are_believed_when_nothing_else_helps(opening: Opener) -> None:
    """They count their configurations from the beginning."""
    servers = opening.servers
    store = await opening()
    topology = store.topology
    assert isinstance(topology, UnderSentinels)
    primary = topology.target("")
    assert isinstance(primary, Primary)
    primary.known = Named(10**6, (HOST, free_port()))
    with closing(store.heartbeat_link(timeout=5)) as link:
        # A Sentinel alone may have been cut off, so the thread, which asks one, waits for what most say.
        with pytest.raises(StoreUnavailable, match="is behind"):
            await asyncio.to_thread(link.renew, "n~1")
        with pytest.raises(StoreUnavailable):
            await primary.connect(Attached(), 5)

        async def renews() -> bool:
            return (await asyncio.to_thread(link.renew, "n~1")).outcome == "DEAD"

        await wait_until(renews, "the thread follows", retry_on=StoreUnavailable)
    primary.known = Named(10**6, (HOST, free_port()))
    tell(servers.primary(), "CLIENT", "KILL", "USER", "node")
    await wait_until(lambda: not store.statistics()[0].connected, "the loss is noticed")

    async def answers() -> bool:
        return await store.head("c") is None

    await wait_until(answers, "the store is back", retry_on=StoreUnavailable)
    assert store.statistics()[0].connects == 2


async def test_sentinels_that_do_not_answer_are_passed_over(opening: Opener) -> None:
    servers = opening.servers
    dead = f"{HOST}:{free_port()},{HOST}:{free_port()}"
    alive = hosts(servers.sentinels)
    store = await opening(opening.url.replace(alive, f"{dead},{hosts(servers.sentinels[:1])}"))
    assert await store.head("c") is None
    with closing(store.heartbeat_link(timeout=5)) as link:
        assert (await asyncio.to_thread(link.renew, "n~1")).outcome == "DEAD"
    with pytest.raises(StoreUnavailable, match=r"no Sentinel of .* answers"):
        await opening(opening.url.replace(alive, dead))


@only_valkey
async def test_a_server_that_is_no_primary_is_not_used(opening: Opener) -> None:
    """A Sentinel that has not heard of a fail-over yet names a replica."""
    servers = opening.servers
    replica = next(server for server in servers.servers if server is not servers.primary())
    with Sentinel(servers.flavour, replica, service="behind") as sentinel:
        url = f"redis+sentinel://node:pw@{HOST}:{sentinel.port}/0/behind"
        with pytest.raises(StoreUnavailable, match="is no primary: slave"):
            await opening(url)
        link = RedisStore(url, namespace="t").heartbeat_link(timeout=5)
        with closing(link), pytest.raises(StoreUnavailable, match="is no primary: slave"):
            await asyncio.to_thread(link.renew, "n~1")


@only_valkey
async def test_credentials_of_sentinels_and_servers(opening: Opener) -> None:
    servers = opening.servers
    for sentinel in servers.sentinels:
        sentinel.ask("ACL", "SETUSER", "watcher", "reset", "on", ">wpw", *WATCHER)
        sentinel.ask("ACL", "SETUSER", "blind", "reset", "on", ">wpw", "-@all", "+ping")
    good = servers.url.replace("://", "://node:pw@")
    store = await opening(f"{good}?sentinel_username=watcher&sentinel_password=wpw")
    assert await store.head("c") is None
    bare = await opening(f"{servers.url}?sentinel_password=spw", credentials=lambda: ("node", "pw"), deadline=5)
    assert await bare.head("c") is None
    for own, says in (
        ("", "Authentication required"),
        ("?sentinel_password=wrong", "refuses the credentials"),
        ("?sentinel_username=blind&sentinel_password=wpw", "Sentinels refuse to answer"),
    ):
        with pytest.raises(ConfigurationError, match=says):
            await opening(good + own)
    with pytest.raises(ConfigurationError, match="refuses the credentials"):
        await opening(f"{servers.url.replace('://', '://node:wrong@')}?sentinel_password=spw")


@only_redis
async def test_a_certificate_that_is_not_trusted(opening: Opener) -> None:
    with pytest.raises(StoreUnavailable, match="certificate verify failed"):
        await opening(tls={})
