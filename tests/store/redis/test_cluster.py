"""A real Redis Cluster: slots that move under load, servers that go, and what order and subscriptions make of it.

With Valkey the store is an access list's user with the least rights; with Redis everything goes through TLS.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, ExitStack, closing
from typing import cast

import pytest

from convener.core.membership import Member, RenewReply
from convener.core.model import NewMessage
from convener.errors import ConfigurationError, StoreUnavailable
from convener.store.redis.cluster import Cluster
from convener.store.redis.keys import kind_of
from convener.store.redis.wire import slot_of
from tests.store.redis.clusters import RIGHTS, Opener, batch, load_push, other, owned
from tests.store.redis.load import PUSH, check_order, progress, push_in_order, working
from tests.support.certificates import certificate
from tests.support.servers import FLAVOURS, Flavour, Server, binary, free_port
from tests.support.topologies import HOST, RedisCluster, info, role, tell
from tests.support.waiting import wait_until, wait_until_sync

pytestmark = pytest.mark.xdist_group("processes")

# What does not depend on the server is tested on one.
only_valkey = pytest.mark.parametrize("servers", ["valkey"], indirect=True)


@pytest.fixture(scope="module", params=FLAVOURS)
def servers(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisCluster]:
    """Three primaries with a replica each, that the tests share: each leaves them complete."""
    flavour = cast("Flavour", request.param)
    if binary(flavour) is None:
        pytest.skip(f"no {flavour} server is installed on this machine")
    directory = tmp_path_factory.mktemp(flavour)
    users = directory / "users.acl"
    users.write_text(f"user default on nopass ~* &* +@all\nuser node on >pw {' '.join(RIGHTS)}\n")
    # Valkey's embedded binary is built without TLS.
    tls = certificate(directory) if flavour == "redis" else None
    with RedisCluster(flavour, replicas=1, tls=tls, options={"aclfile": str(users)}) as group:
        yield group


@pytest.fixture
async def opening(servers: RedisCluster) -> AsyncIterator[Opener]:
    """Opens stores in a namespace of its own; what is left there is as it should be, and so are the servers."""
    async with AsyncExitStack() as stack:
        opener = Opener(servers, stack)
        yield opener
    for server in servers.servers:
        if role(server) == "master":
            for key in cast("list[bytes]", tell(server, "KEYS", f"{{{opener.namespace}:*")):
                kind = kind_of(key.decode(), opener.namespace)
                assert kind is not None, f"{key!r} is of no known kind"
                assert tell(server, "TYPE", key.decode()) == kind.type.encode()
    await asyncio.to_thread(wait_until_sync, servers.complete, "the cluster is complete", 30)


# -- slots that move -----------------------------------------------------------------------------------------------


async def _move_under_load(opening: Opener, move: Callable[[int, Server], None]) -> None:
    servers = opening.servers
    load_push(servers)
    store = await opening()
    cids = opening.conversations()
    key = f"{{{opening.namespace}:c:{cids[0]}}}:pushed"
    slot, stop = opening.slot(cids[0]), asyncio.Event()
    async with working(store, cids) as works:
        pushing = asyncio.create_task(push_in_order(store, key, stop.is_set))
        await progress(works)
        for _ in range(3):
            await asyncio.to_thread(move, slot, other(servers, servers.owner(slot)))
            await progress(works)
        stop.set()
        good, bad = await pushing
    for work in works:
        await work.check()
    await check_order(store, key, good, bad)
    assert len(good) > len(bad)
    # Who was not touched has noticed nothing.
    assert [(work.failed, work.heard.count(None)) for work in works[1:]] == [(0, 0)] * 2
    assert works[0].heard.count(None) >= 3
    assert opening.told == []
    assert store.statistics()[0].connects == 3


async def test_a_slot_that_moves_key_by_key_under_load(opening: Opener) -> None:
    await _move_under_load(opening, opening.servers.move)


@only_valkey
async def test_a_slot_that_moves_in_one_step_under_load(opening: Opener) -> None:
    """Valkey has that since 9.0."""
    await _move_under_load(opening, opening.servers.move_at_once)


async def test_no_script_begins_while_its_slot_is_on_the_move(opening: Opener) -> None:
    """What would stop it in its middle: it removes a key's last element, and looks at the key again."""
    servers = opening.servers
    store = await opening()
    await owned(store, "c")
    key, slot = store.keys.asks("c"), opening.slot("c")
    await store.topology.execute(key, "HSET", key, "f", "1")
    await store.send("c", NewMessage("m1", "u", "{}"), max_pending=9)
    source = servers.owner(slot)
    with servers.migrating(slot, other(servers, source)):
        script = "#!lua\nredis.call('HDEL', KEYS[1], 'f')\nreturn redis.call('HLEN', KEYS[1])\n"
        with pytest.raises(Exception, match="non local key"):
            tell(source, "EVAL", script, 1, key)
        assert tell(source, "EXISTS", store.keys.meta("c")) == 1
        # What needs one key only goes on, and so do others.
        assert await store.head("c")
        waiting = asyncio.create_task(store.send("c", NewMessage("m2", "u", "{}"), max_pending=9))
        await asyncio.gather(*(store.create(cid, "u", "{}", "g") for cid in opening.conversations()))
        assert not waiting.done()
        assert tell(source, "XLEN", store.keys.inbox("c")) == 1
    assert (await waiting).outcome == "OK"
    unread = await store.inbox("c")
    assert unread is not None
    assert [entry.message_id for entry in unread[1]] == ["m1", "m2"]


async def test_single_keys_are_found_on_either_side(opening: Opener) -> None:
    servers = opening.servers
    store = await opening()
    epoch = await owned(store, "c")
    await store.append("c", batch(epoch, 1))
    await store.send("c", NewMessage("m1", "u", "{}"), max_pending=9)
    slot = opening.slot("c")
    source = servers.owner(slot)
    to = other(servers, source)
    with servers.migrating(slot, to):
        head = await store.head("c")
        for _ in range(4):
            servers.move_keys(slot, source, to, most=1)
            assert await store.head("c") == head
            assert await store.all_seen("c") == {"m1": 1}
            assert await store.state("c") is None
    assert await store.append("c", batch(epoch, 2))


@only_valkey
async def test_a_slot_that_moves_for_too_long(opening: Opener) -> None:
    servers = opening.servers
    store = await opening(deadline=1)
    epoch = await owned(store, "c")
    slot = opening.slot("c")
    with servers.migrating(slot, other(servers, servers.owner(slot))):
        chain = await asyncio.gather(*(store.append("c", batch(epoch, n)) for n in (1, 2, 3)), return_exceptions=True)
    assert [str(error) for error in chain] == ["append: a hash slot is being moved; it did not run"] * 3
    assert all(isinstance(error, StoreUnavailable) for error in chain)
    chain = await asyncio.gather(*(store.append("c", batch(epoch, n)) for n in (1, 2, 3)))
    assert [reply.outcome for reply in chain] == ["OK"] * 3
    assert store.statistics()[0].in_flight == 0


async def test_what_came_after_a_refused_command_does_not_come_before_it(opening: Opener) -> None:
    """The script is refused at the old server, and what was sent after it is done there."""
    servers = opening.servers
    store = await opening()
    load_push(servers)
    k, slot = store.keys, opening.slot("c")
    pushed = f"{{{opening.namespace}:c:c}}:pushed"
    await store.create("c", "u", "{}", "g")
    await store.topology.execute(pushed, "RPUSH", pushed, 0)
    with servers.migrating(slot, other(servers, servers.owner(slot))):
        overtaken = store.topology.call(PUSH, (pushed,), 1)
        changed = store.topology.execute(pushed, "RPUSH", pushed, 2)
        assert await changed == 2
        with pytest.raises(StoreUnavailable, match="it did not run, and what was called after it did"):
            await overtaken
        # A read, a refusal: both wait until the first one has run.
        first = store.topology.call(PUSH, (pushed,), 3)
        read = store.topology.execute(pushed, "ZRANGE", k.seen("c"), 0, -1)
        published = store.topology.execute(pushed, "SPUBLISH", k.channel("c"), "x")
        assert await published == 0
        assert not first.done()
        assert not read.done()
    assert await first == 3
    assert await read == []
    assert await store.topology.execute(pushed, "LRANGE", pushed, 0, -1) == [b"0", b"2", b"3"]
    await store.topology.execute(pushed, "DEL", pushed)


async def test_many_commands_of_many_groups_keep_their_order(opening: Opener) -> None:
    servers = opening.servers
    store = await opening(max_in_flight=20_000)
    cids = [f"c{n}" for n in range(30)]
    epochs = await asyncio.gather(*(owned(store, cid) for cid in cids))
    source = servers.owner(opening.slot(cids[0]))
    to = other(servers, source)
    moving = [slot for cid in cids if servers.owner(slot := opening.slot(cid)) is source]

    async def chain(cid: str, epoch: int) -> list[str]:
        batches = (store.append(cid, batch(epoch, expected)) for expected in range(1, 101))
        return [reply.outcome for reply in await asyncio.gather(*batches)]

    chains = [asyncio.create_task(chain(cid, epoch)) for cid, epoch in zip(cids, epochs, strict=True)]

    def move_all() -> None:
        for slot in moving:
            servers.move(slot, to)

    await asyncio.to_thread(move_all)
    assert await asyncio.gather(*chains) == [["OK"] * 100] * len(cids)


# -- servers that go -----------------------------------------------------------------------------------------------


async def test_a_fail_over_that_loses_nothing(opening: Opener) -> None:
    servers = opening.servers
    store = await opening()
    cids = opening.conversations()
    primary = servers.owner(opening.slot(cids[0]))
    before = dict(store.history)
    async with working(store, cids) as works:
        await progress(works)
        heir = await asyncio.to_thread(servers.fail_over, primary)
        await progress(works)
    for work in works:
        await work.check()
    assert [work.failed for work in works[1:]] == [0, 0]
    assert works[0].heard.count(None) >= 1
    await wait_until(lambda: opening.told, "the other history is told")
    (told,) = opening.told
    assert told.new.takes_over(told.old)
    assert told.old in before.values()
    assert (told.new.run, told.new.line) == (
        info(heir, "server")["run_id"],
        info(heir, "replication")["master_replid"],
    )
    assert told.new in store.history.values()
    await wait_until(lambda: store.statistics()[1].connected and len(store.history) == 3, "the old server is left")


async def test_a_primary_that_is_killed(opening: Opener) -> None:
    servers = opening.servers
    store = await opening()
    cids = opening.conversations()
    primary = servers.owner(opening.slot(cids[0]))
    async with working(store, cids) as works:
        await progress(works)
        await asyncio.to_thread(primary.kill)
        await progress(works)
    for work in works:
        await work.check(lost=work is works[0])
    assert [(work.failed, work.heard.count(None)) for work in works[1:]] == [(0, 0)] * 2
    assert works[0].heard.count(None) >= 1
    assert len(opening.told) == 1
    assert opening.told[0].new.takes_over(opening.told[0].old)
    await asyncio.to_thread(primary.start)


@only_valkey
async def test_calls_subscriptions_and_renewals_find_the_heir(opening: Opener) -> None:
    """Renewals without the event loop, which may be stuck in somebody's blocking call just then."""
    servers = opening.servers
    store = await opening(deadline=30)
    await store.join("n~1", Member(0, 100_000, 500, "{}"))
    primary = servers.owner(slot_of(store.keys.lease))
    heir = servers.replica_of(primary)
    cid = next(f"c{n}" for n in range(100) if servers.owner(opening.slot(f"c{n}")) is primary)
    epoch = await owned(store, cid)
    heard: list[bytes] = []
    with closing(store.heartbeat_link(timeout=5)) as link:
        link.hold_live("n~1")
        await asyncio.to_thread(primary.kill)
        await wait_until(lambda: not store.statistics()[0].connected, "the loss is noticed")
        chain = [asyncio.create_task(store.append(cid, batch(epoch, n))) for n in range(1, 9)]
        subscribing = asyncio.create_task(
            store.subscribe(store.channel("c", cid), heard.append, lambda: heard.append(b"gap"))
        )
        await wait_until(lambda: store.statistics()[0].in_flight >= 8, "the calls wait")
        with pytest.raises(StoreUnavailable):
            link.renew("n~1")
        wait_until_sync(lambda: role(heir) == "master", "the replica has taken over", 60)
        wait_until_sync(
            lambda: link.renew("n~1") == RenewReply("OK", 1), "the renewal goes through", retry_on=StoreUnavailable
        )
        wait_until_sync(lambda: not link.hold_live("n~1"), "the channel is held", retry_on=StoreUnavailable)
        link.ping_live()
    assert [reply.outcome for reply in await asyncio.gather(*chain)] == ["OK"] * 8
    await subscribing
    await store.publish(store.channel("c", cid), b"x")
    await wait_until(lambda: heard[-1:] == [b"x"], "it is heard")
    assert b"gap" not in heard
    await asyncio.to_thread(primary.start)


async def test_connections_cut_and_scripts_flushed_everywhere(opening: Opener) -> None:
    servers = opening.servers
    store = await opening()
    cids = opening.conversations()
    async with working(store, cids) as works:
        await progress(works)
        for server in servers.servers:
            tell(server, "SCRIPT", "FLUSH")
        await progress(works)
        for server in servers.servers:
            tell(server, "CLIENT", "KILL", "USER", "node")
        await progress(works)
    for work in works:
        await work.check()
        assert work.heard.count(None) >= 1
    assert store.statistics()[0].reloads >= 3
    # The servers are what they were.
    assert opening.told == []


@only_valkey
async def test_a_server_that_joins_and_gets_slots(opening: Opener) -> None:
    servers = opening.servers
    store = await opening()
    cids = opening.conversations()
    slot = opening.slot(cids[0])
    with servers.joined() as fresh:
        home = servers.owner(slot)
        async with working(store, cids) as works:
            await progress(works)
            await asyncio.to_thread(servers.move, slot, fresh)
            await progress(works)
            await wait_until(lambda: store.statistics()[1].connects == 4, "the subscriber is there too")
            await asyncio.to_thread(servers.move, slot, home)
            await progress(works)
        for work in works:
            await work.check()
        assert opening.told == []
        await wait_until(lambda: len(store.history) == 3, "a server without slots is left")


# -- subscriptions -------------------------------------------------------------------------------------------------


async def test_channels_of_all_slots_and_the_one_that_moves(opening: Opener) -> None:
    servers = opening.servers
    store = await opening(count_interval=0.2)
    heard: dict[str, list[bytes]] = {}
    gaps: list[str] = []

    async def subscribe(cid: str) -> None:
        heard[cid] = []
        await store.subscribe(store.channel("c", cid), heard[cid].append, lambda: gaps.append(cid))

    cids = [f"c{n}" for n in range(1500)]
    await asyncio.gather(*(subscribe(cid) for cid in cids))
    await asyncio.gather(*(store.publish(store.channel("c", cid), cid.encode()) for cid in cids))
    await wait_until(lambda: all(heard[cid] == [cid.encode()] for cid in cids), "every channel is heard once")
    slot = opening.slot("c7")
    moved = {cid for cid in cids if opening.slot(cid) == slot}
    await asyncio.to_thread(servers.move, slot, other(servers, servers.owner(slot)))
    await wait_until(lambda: set(gaps) == moved, "the gap is told")
    await asyncio.gather(*(store.publish(store.channel("c", cid), b"again") for cid in cids))
    await wait_until(lambda: all(heard[cid][1:] == [b"again"] for cid in cids), "every channel is heard again")
    assert set(gaps) == moved
    before = store.heard()
    await wait_until(lambda: store.heard() > before + 1, "probes go on, and counts were compared")
    assert store.statistics()[1].connects == 3


async def test_the_canary_moves_when_its_slot_does(opening: Opener) -> None:
    servers = opening.servers
    store = await opening(probe_interval=0.2, silence=600)
    channels = [
        channel
        for server in servers.servers
        if role(server) == "master"
        for channel in cast("list[bytes]", tell(server, "PUBSUB", "SHARDCHANNELS", f"{{{opening.namespace}:n:*"))
    ]
    assert len(channels) == 3
    slot = slot_of(channels[0].decode())
    await asyncio.to_thread(servers.move, slot, other(servers, servers.owner(slot)))
    await wait_until(lambda: store.statistics()[1].dropped >= 1, "the server says that it is gone")
    before = store.heard()
    await wait_until(lambda: store.heard() > before + 1, "every connection hears its probes")
    assert store.statistics()[1].connects == 3
    assert store.statistics()[1].probe_misses <= 1


# -- the heartbeat -------------------------------------------------------------------------------------------------


async def test_the_heartbeat_follows_the_membership(opening: Opener) -> None:
    servers = opening.servers
    store = await opening()
    await store.join("n~1", Member(0, 100_000, 500, "{}"))
    slot = slot_of(store.keys.lease)

    def holders() -> int:
        return cast("list[int]", tell(servers.owner(slot), "PUBSUB", "SHARDNUMSUB", store.keys.live("n~1")))[1]

    with closing(store.heartbeat_link(timeout=5)) as link:
        await asyncio.to_thread(link.hold_live, "n~1")
        assert await asyncio.to_thread(link.renew, "n~1") == RenewReply("OK", 1)
        for change in (
            lambda: servers.move(slot, other(servers, servers.owner(slot))),
            lambda: servers.fail_over(servers.owner(slot)),
        ):
            await asyncio.to_thread(change)
            # A renewal goes through at once; the live channel is noticed to be elsewhere, and held there.
            assert await asyncio.to_thread(link.renew, "n~1") == RenewReply("OK", 1)
            with pytest.raises(StoreUnavailable, match="ping_live"):
                await asyncio.to_thread(link.ping_live)
            await asyncio.to_thread(link.hold_live, "n~1")
            await asyncio.to_thread(link.ping_live)
            assert holders() == 1
        lease = store.keys.lease
        await store.topology.execute(lease, "ZINCRBY", lease, -50_000, "n~1")
        assert await store.bury("n~1", 10_000) == "ALIVE"
        await asyncio.to_thread(link.close)
    await wait_until(lambda: holders() == 0, "the channel is let go")


# -- opening -------------------------------------------------------------------------------------------------------


async def test_what_is_found_out_at_every_server(opening: Opener) -> None:
    store = await opening()
    info_ = await store.info()
    assert (info_.kind, info_.eviction) == (opening.servers.flavour, "noeviction" if info_.eviction else None)
    assert store.capabilities.counts_subscribers
    assert store.capabilities.waits
    assert store.capabilities.version is not None
    assert isinstance(store.topology, Cluster)
    assert len(store.topology.targets()) == 3
    primary = next(server for server in opening.servers.servers if role(server) == "master")
    primary.ask("CONFIG", "SET", "maxmemory-policy", "allkeys-lru")
    try:
        with pytest.raises(ConfigurationError, match="allkeys-lru"):
            await opening()
    finally:
        primary.ask("CONFIG", "SET", "maxmemory-policy", "noeviction")


@only_valkey
async def test_servers_that_hide_what_they_can(opening: Opener) -> None:
    for server in opening.servers.servers:
        server.ask("ACL", "SETUSER", "shy", "reset", "on", ">pw", *RIGHTS, "-info", "-client", "-wait", "-hello")
    store = await opening(opening.url.replace("node:", "shy:"), count_interval=0.05, probe_interval=0.2)
    assert (store.capabilities.version, store.capabilities.eviction, store.capabilities.waits) == (None, None, False)
    assert (await store.create("c", "u", "{}", "g")).created
    before = store.heard()
    await wait_until(lambda: store.heard() > before + 1, "several rounds have passed")
    assert store.statistics()[1].connects == 3
    # Nothing tells whether a server that comes back is the same: so nobody is told that it is.
    for server in opening.servers.servers:
        tell(server, "CLIENT", "KILL", "USER", "shy")
    await wait_until(lambda: len(opening.told) == 3, "it is told for each")


@only_valkey
async def test_a_right_that_is_missing_on_one_server(opening: Opener) -> None:
    rights = [*RIGHTS[2:], "~{t*"]
    for number, server in enumerate(s for s in opening.servers.servers if role(s) == "master"):
        channels = "&{t*" if number else "&{t*:c:*"
        server.ask("ACL", "SETUSER", "half", "reset", "on", ">pw", "resetchannels", channels, *rights)
    with pytest.raises(ConfigurationError, match="redis_url"):
        await opening(opening.url.replace("node:", "half:"))


@only_valkey
async def test_servers_that_do_not_answer_are_passed_over(opening: Opener) -> None:
    scheme, _, rest = opening.url.partition("@")
    store = await opening(f"{scheme}@{HOST}:{free_port()},{rest}")
    assert await store.head("c") is None
    with pytest.raises(StoreUnavailable, match="no server of the cluster answers"):
        await opening(f"{scheme}@{HOST}:{free_port()},{HOST}:{free_port()}")


@only_valkey
async def test_closing_ends_what_waits(opening: Opener) -> None:
    servers = opening.servers
    store = await opening()
    epoch = await owned(store, "c")
    slot = opening.slot("c")
    with ExitStack() as stack:
        stack.enter_context(servers.migrating(slot, other(servers, servers.owner(slot))))
        waiting = [asyncio.create_task(store.append("c", batch(epoch, n))) for n in (1, 2, 3)]
        await wait_until(lambda: store.statistics()[0].in_flight, "they are under way")
        await store.close()
        outcomes = await asyncio.gather(*waiting, return_exceptions=True)
        assert all(isinstance(outcome, StoreUnavailable) for outcome in outcomes)
        with pytest.raises(StoreUnavailable, match=r"closed|not open"):
            await store.head("c")
