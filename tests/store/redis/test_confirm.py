"""``durability=replicated``: a write counts when a replica has it."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any, cast

import pytest

from convener.core.admission import Slot
from convener.core.directory import Record
from convener.core.model import AppendRequest, ClaimRequest, NewMessage
from convener.errors import ConfigurationError, ConvenerError, NotConfirmed, StoreUnavailable
from convener.store.redis import RedisStore
from convener.store.redis.confirm import Confirmation
from convener.store.redis.scripts import SCRIPTS
from convener.store.redis.wire import Call
from tests.support.servers import FLAVOURS, Flavour, Server, binary
from tests.support.topologies import HOST, RedisCluster, caught_up, info, lines, tell
from tests.support.waiting import wait_until_sync

pytestmark = [pytest.mark.anyio, pytest.mark.xdist_group("processes")]

OPTIONS = {"repl-diskless-sync-delay": "0", "repl-ping-replica-period": "1"}


class Pair:
    """A primary and its replica."""

    def __init__(self, primary: Server, replica: Server) -> None:
        self.primary = primary
        self.replica = replica
        tell(replica, "REPLICAOF", HOST, primary.port)
        wait_until_sync(lambda: info(replica, "replication")["master_link_status"] == "up", "the replica is in sync")
        caught_up(replica, primary)

    def count(self, command: str) -> int:
        """How often the primary was given a command."""
        shown = lines(tell(self.primary, "INFO", "commandstats")).get(f"cmdstat_{command}", "calls=0")
        return int(shown.partition("calls=")[2].partition(",")[0])

    def caught_up(self) -> None:
        caught_up(self.replica, self.primary)


@pytest.fixture(params=FLAVOURS)
def pair(request: pytest.FixtureRequest) -> Iterator[Pair]:
    flavour = cast("Flavour", request.param)
    if binary(flavour) is None:
        pytest.skip(f"no {flavour} server is installed on this machine")
    with ExitStack() as stack:
        yield Pair(*(stack.enter_context(Server(flavour, options=OPTIONS)) for _ in range(2)))


def replicated(pair: Pair, deadline: float = 5.0) -> RedisStore:
    return RedisStore(pair.primary.url, namespace="t", durability="replicated", deadline=deadline)


def message(number: int) -> NewMessage:
    return NewMessage(f"m{number}", "u", f'"{number}"')


async def test_what_no_replica_has_is_done_and_not_confirmed(pair: Pair) -> None:
    async with replicated(pair) as store:
        await store.create("c", "u", "{}", "g")
        pair.replica.freeze()
        with pytest.raises(NotConfirmed, match="send: no replica has confirmed it within 1 s"):
            await store.send("c", message(1), max_pending=10)
        head = await store.head("c")
        assert head is not None
        assert head.position == 1
        pair.replica.resume()
        reply = await store.send("c", message(1), max_pending=10)
        assert (reply.outcome, reply.position) == ("DUP", 1)


async def test_a_repeated_write_is_not_confirmed_by_a_connection_that_wrote_nothing(pair: Pair) -> None:
    """WAIT speaks of its own connection's writes, and a duplicate writes nothing."""
    async with replicated(pair) as store, replicated(pair) as other:
        await store.create("c", "u", "{}", "g")
        pair.replica.freeze()
        for sender in (store, other, store):
            with pytest.raises(NotConfirmed):
                await sender.send("c", message(1), max_pending=10)
        pair.replica.resume()
        assert (await other.send("c", message(1), max_pending=10)).outcome == "DUP"


async def test_one_wait_for_each_written_batch(pair: Pair) -> None:
    async with replicated(pair) as store:
        await store.create("c", "u", "{}", "g")
        before = pair.count("wait")
        replies = await asyncio.gather(*(store.send("c", message(n), max_pending=100) for n in range(20)))
        assert [reply.position for reply in replies] == list(range(1, 21))
        assert pair.count("wait") == before + 1


async def test_what_waits_and_what_does_not(pair: Pair) -> None:
    async with replicated(pair) as store:
        meta = (await store.create("c", "u", "{}", "g")).meta
        request = ClaimRequest("n~1", "x", "", meta.epoch, "start", user="u", generation="g")
        claimed = await store.claim("c", request)
        assert claimed.meta is not None
        epoch = claimed.meta.epoch
        pair.replica.freeze()
        appended = await store.append("c", AppendRequest("n~1", epoch, 1, "b", 0, 0, 0, ('{"kind":"x"}',)))
        assert appended.outcome == "OK"
        assert await store.head("c") is not None
        record = Record("c", "u", "idle", epoch, "x", 1)
        for waits in (
            store.put_record("n~1", record),
            store.reserve("u", "c", Slot("x", "n~1"), raised_limit=4, read=None),
            store.stop("c", "n~1", "why", ""),
            store.release("c", "n~1", epoch, 2),
            store.leave("n~1"),
            store.set_timer("c", "alarm/1", 5),
        ):
            with pytest.raises(NotConfirmed):
                await waits
        pair.replica.resume()


@pytest.mark.parametrize("durability", ["memory", "managed"])
async def test_nobody_waits_otherwise(pair: Pair, durability: str) -> None:
    async with RedisStore(pair.primary.url, namespace="t", durability=cast("Any", durability)) as store:
        await store.create("c", "u", "{}", "g")
        before = pair.count("wait")
        pair.replica.freeze()
        assert (await store.send("c", message(1), max_pending=10)).outcome == "OK"
        assert pair.count("wait") == before
        pair.replica.resume()


async def test_scripts_that_are_lost_are_confirmed_too(pair: Pair) -> None:
    async with replicated(pair) as store:
        await store.create("c", "u", "{}", "g")
        tell(pair.primary, "SCRIPT", "FLUSH", "SYNC")
        assert (await store.send("c", message(1), max_pending=10)).outcome == "OK"
        tell(pair.primary, "SCRIPT", "FLUSH", "SYNC")
        pair.replica.freeze()
        with pytest.raises(NotConfirmed):
            await store.send("c", message(2), max_pending=10)
        pair.replica.resume()


async def test_a_connection_that_is_lost_before_the_wait_is_answered(pair: Pair) -> None:
    async with replicated(pair, deadline=20) as store:
        await store.create("c", "u", "{}", "g")
        pair.replica.freeze()
        sent = asyncio.ensure_future(store.send("c", message(1), max_pending=10))
        clients = await asyncio.to_thread(lambda: tell(pair.primary, "CLIENT", "LIST"))
        assert clients
        await asyncio.to_thread(lambda: tell(pair.primary, "CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes"))
        with pytest.raises(StoreUnavailable):
            await sent
        pair.replica.resume()
        assert (await store.send("c", message(1), max_pending=10)).outcome in ("OK", "DUP")


async def test_a_connection_that_is_lost_before_the_batch_is_written(pair: Pair) -> None:
    async with replicated(pair) as store:
        await store.create("c", "u", "{}", "g")
        wire = cast("Any", store.topology)._link._wire
        failed: list[object] = []
        asyncio.get_running_loop().set_exception_handler(lambda _, context: failed.append(context))
        sent = asyncio.ensure_future(store.send("c", message(1), max_pending=10))
        await asyncio.sleep(0)
        wire.connection_lost(None)
        with pytest.raises(StoreUnavailable):
            await sent
        assert failed == []
        wire.abort()
        assert (await store.send("c", message(2), max_pending=10)).outcome == "OK"


# -- what it needs -------------------------------------------------------------------------------------------------


async def test_without_a_replica_nothing_starts(pair: Pair) -> None:
    tell(pair.replica, "REPLICAOF", "NO", "ONE")
    wait_until_sync(lambda: info(pair.primary, "replication")["connected_slaves"] == "0", "the replica has left")
    with pytest.raises(ConfigurationError, match="durability: replicated needs a replica, and the store has none"):
        await replicated(pair).open()


async def test_where_wait_is_forbidden_nothing_starts(pair: Pair) -> None:
    rights = ("~{t*", "&{t*", "+@all", "-wait")
    tell(pair.primary, "ACL", "SETUSER", "node", "on", ">pw", *rights)
    url = pair.primary.url.replace("redis://", "redis://node:pw@")
    with pytest.raises(ConfigurationError, match=r"durability: replicated needs WAIT.*\+wait"):
        await RedisStore(url, namespace="t", durability="replicated").open()
    async with RedisStore(url, namespace="t", durability="managed") as store:
        assert await store.head("c") is None


async def test_in_a_cluster_the_primary_of_the_keys_is_asked() -> None:
    if binary("valkey") is None:
        pytest.skip("no valkey server is installed on this machine")
    with RedisCluster("valkey", replicas=1) as servers:
        async with RedisStore(servers.url, namespace="t", durability="replicated") as store:
            slots = {servers.owner(store.topology.slot(store.keys.meta(f"c{n}"))).port: f"c{n}" for n in range(50)}
            assert len(slots) == 3
            for cid in slots.values():
                await store.create(cid, "u", "{}", "g")
            frozen = servers.replica_of(servers.owner(store.topology.slot(store.keys.meta(slots[min(slots)]))))
            frozen.freeze()
            sent = [store.send(cid, message(1), max_pending=10) for _, cid in sorted(slots.items())]
            replies = await asyncio.gather(*sent, return_exceptions=True)
            frozen.resume()
            assert isinstance(replies[0], NotConfirmed)
            assert [reply.outcome for reply in replies[1:] if not isinstance(reply, BaseException)] == ["OK", "OK"]


async def test_a_publication_that_is_refused_confirms_nothing() -> None:
    """The WAIT behind it speaks of an earlier write then."""
    loop = asyncio.get_running_loop()
    confirmation = Confirmation("t:c:c", 1.0)
    call = Call(loop.create_future(), SCRIPTS["send"], "{t:c:c}:meta", ("EVALSHA", "x", 0), 0.0)
    call.confirmation = confirmation
    call.succeed([b"OK"])
    assert not call.future.done()
    marker, wait = loop.create_future(), loop.create_future()
    marker.set_exception(ConvenerError("MOVED"))
    wait.set_result(1)
    confirmation.settle(marker, wait)
    with pytest.raises(NotConfirmed):
        await call.future
    assert confirmation.key == "{t:c:c}:waited"


def answered() -> Call:
    call = Call(asyncio.get_running_loop().create_future(), SCRIPTS["send"], "{t:c:c}:meta", ("EVALSHA", "x", 0), 0.0)
    call.confirmation = Confirmation("t:c:c", 1.0)
    return call


@pytest.mark.parametrize("confirmed", [True, False])
async def test_what_is_answered_too_late_is_not_confirmed_and_told_so(confirmed: bool) -> None:
    """After a stall an answer that was kept back may count after all: nobody else would ever tell its caller."""
    call = answered()
    assert call.confirmation is not None
    call.confirmation.end(confirmed=confirmed)
    call.succeed([b"PENDING"])
    with pytest.raises(NotConfirmed):
        await asyncio.wait_for(call.future, 5)


async def test_many_batches_share_a_wait(pair: Pair) -> None:
    """The server does nothing for a connection that waits: one WAIT per batch would pile up till none is answered."""
    async with replicated(pair) as store:
        await store.create("c", "u", "{}", "g")
        before = pair.count("wait")
        pair.replica.freeze()
        tasks: list[asyncio.Task[Any]] = []
        for number in range(12):
            tasks.append(asyncio.create_task(store.send("c", message(number), max_pending=100)))
            for _ in range(5):
                await asyncio.sleep(0)
        assert (await store.head("c")) is not None
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert [type(result) for result in results] == [NotConfirmed] * 12
        assert "no replica has confirmed" in str(results[-1])
        assert pair.count("wait") == before + 2
        assert store.statistics()[0].connects == 1
        pair.replica.resume()
        assert (await store.send("c", message(0), max_pending=100)).outcome == "DUP"


async def test_what_waits_for_the_next_wait_fails_with_the_connection(pair: Pair) -> None:
    async with replicated(pair) as store:
        await store.create("c", "u", "{}", "g")
        pair.replica.freeze()
        first = asyncio.create_task(store.send("c", message(1), max_pending=100))
        for _ in range(5):
            await asyncio.sleep(0)
        second = asyncio.create_task(store.send("c", message(2), max_pending=100))
        for _ in range(5):
            await asyncio.sleep(0)
        cast("Any", store.topology)._link._wire.abort()
        results = await asyncio.gather(first, second, return_exceptions=True)
        assert all(isinstance(result, StoreUnavailable) for result in results)
        pair.replica.resume()


async def test_in_a_cluster_a_repeated_write_is_not_confirmed_either() -> None:
    """A primary of a cluster does not hand publications on to its replicas: only a write will do."""
    if binary("valkey") is None:
        pytest.skip("no valkey server is installed on this machine")
    with RedisCluster("valkey", replicas=1) as servers:
        options: dict[str, Any] = {"namespace": "t", "durability": "replicated"}
        async with RedisStore(servers.url, **options) as store, RedisStore(servers.url, **options) as other:
            await store.create("c", "u", "{}", "g")
            frozen = servers.replica_of(servers.owner(store.topology.slot(store.keys.meta("c"))))
            frozen.freeze()
            for sender in (store, other, store):
                with pytest.raises(NotConfirmed):
                    await sender.send("c", message(1), max_pending=10)
            frozen.resume()


async def test_what_is_sent_to_a_slot_that_has_moved_is_confirmed_where_it_went() -> None:
    if binary("valkey") is None:
        pytest.skip("no valkey server is installed on this machine")
    with RedisCluster("valkey", replicas=1) as servers:
        async with RedisStore(servers.url, namespace="t", durability="replicated") as store:
            await store.create("c", "u", "{}", "g")
            slot = store.topology.slot(store.keys.meta("c"))
            source = servers.owner(slot)
            to = next(server for server in servers.servers[:3] if server is not source)
            await asyncio.to_thread(servers.move, slot, to)
            # The first attempt is refused by the server that had the slot; nobody waits for a replica of that one.
            sent = store.send("c", message(1), max_pending=10)
            assert (await asyncio.wait_for(sent, 20)).outcome == "OK"
