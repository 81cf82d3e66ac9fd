"""One server that changes what it is: a replica for a while, restarted with other data."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import cast

import pytest

from convener.core.model import NewMessage
from convener.errors import StoreUnavailable
from convener.store.base import Progress
from convener.store.redis import RedisStore
from convener.store.redis.history import History, NewHistory, identify, progress_of
from convener.store.redis.scripts import SCRIPTS
from convener.store.redis.slots import SLOTS, SlotMap, read_slots, replaced
from convener.store.redis.wire import READ_COMMANDS, Call, slot_of, tag_of
from tests.store.redis.load import PUSH
from tests.support.servers import FLAVOURS, Flavour, Server, free_port
from tests.support.topologies import info, tell
from tests.support.waiting import wait_until


@pytest.fixture(params=FLAVOURS)
def own(request: pytest.FixtureRequest) -> Iterator[Server]:
    """A server that the test may change."""
    with Server(cast("Flavour", request.param), persistence="aof") as server:
        yield server


# -- a primary that is one no more ---------------------------------------------------------------------------------


async def test_a_primary_that_becomes_a_replica_and_is_promoted_again(own: Server) -> None:
    told: list[NewHistory] = []
    async with RedisStore(own.url, namespace="t", deadline=30, on_new_history=told.append) as store:
        await store.create("c", "u", "{}", "g")
        own.ask("REPLICAOF", "127.0.0.1", free_port())
        sends = [
            asyncio.create_task(store.send("c", NewMessage(f"m{n}", "u", "{}"), max_pending=99)) for n in range(20)
        ]
        await wait_until(lambda: not store.statistics()[0].connected, "the replica is left")
        with closing(store.heartbeat_link(timeout=5)) as link, pytest.raises(StoreUnavailable, match="replica"):
            await asyncio.to_thread(link.renew, "n~1")
        assert not any(task.done() for task in sends)
        own.ask("REPLICAOF", "NO", "ONE")
        replies = [await task for task in sends]
        assert [reply.position for reply in replies] == list(range(1, 21))
        assert [(change.old.run == change.new.run, change.new.takes_over(change.old)) for change in told] == [
            (True, True)
        ]


async def test_what_was_overtaken_by_an_effect_is_not_run_after_it(own: Server) -> None:
    """The script is lost, the plain command after it is not."""
    key = "{t:c:c}:list"
    async with RedisStore(own.url, namespace="t") as store:
        first, second = store.topology.call(PUSH, (key,), 1), store.topology.execute(key, "RPUSH", key, 2)
        assert await second == 1
        with pytest.raises(StoreUnavailable, match="what was called after it did"):
            await first
        # Another group is none of its business, nor is a publication, nor what has an effect before it.
        own.ask("SCRIPT", "FLUSH")
        before = store.topology.execute(key, "RPUSH", key, 3)
        again = store.topology.call(PUSH, (key,), 4)
        elsewhere = store.topology.execute("{t:c:d}", "RPUSH", "{t:c:d}", 1)
        published = store.topology.execute(key, "SPUBLISH", "{t:c:c}", "x")
        assert [await before, await again, await elsewhere, await published] == [2, 3, 1, 0]
        assert await store.topology.execute(key, "LRANGE", key, 0, -1) == [b"2", b"3", b"4"]


def test_which_commands_change_nothing(own: Server) -> None:
    for name in READ_COMMANDS:
        (about,) = tell(own, "COMMAND", "INFO", name)
        assert b"readonly" in about[2], name


async def test_which_scripts_change_nothing() -> None:
    loop = asyncio.get_running_loop()
    reads = {name for name, script in SCRIPTS.items() if Call(loop.create_future(), script, "k", ("EVALSHA",), 1).reads}
    assert reads == {"due", "inbox", "list_user", "members", "read"}


# -- histories -----------------------------------------------------------------------------------------------------


async def test_a_restart_is_another_history_and_a_lost_connection_is_not(own: Server) -> None:
    told: list[NewHistory] = []
    reconnects: list[int] = []
    async with RedisStore(
        own.url, namespace="t", on_new_history=told.append, on_reconnect=lambda: reconnects.append(len(told))
    ) as store:
        (first,) = store.history.values()
        assert (first.run, first.line) == (
            info(own, "server")["run_id"],
            info(own, "replication")["master_replid"],
        )
        tell(own, "CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
        await wait_until(lambda: reconnects, "the link is back")
        assert told == []
        await asyncio.to_thread(own.kill)
        await asyncio.to_thread(own.start)
        await wait_until(lambda: len(reconnects) == 2, "the link is back")
        (change,) = told
        assert change.old.is_same(first)
        assert change.new.run != first.run
        assert store.history == {"": change.new}
        # Told before anybody else could notice.
        assert reconnects == [0, 1]


async def test_a_history_that_is_hidden_may_be_another_one_each_time(own: Server) -> None:
    own.ask("ACL", "SETUSER", "node", "on", ">pw", "~*", "&*", "+@all", "-info")
    told: list[NewHistory] = []
    url = own.url.replace("://", "://node:pw@")

    def fails(change: NewHistory) -> None:
        told.append(change)
        raise ValueError("no good")

    async with RedisStore(url, namespace="t", on_new_history=fails) as store:
        tell(own, "CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
        await wait_until(lambda: told, "it is told")
        assert await store.head("c") is None


def test_what_a_server_says_of_itself() -> None:
    said = (
        b"# Server\r\nrun_id:r1\r\nredis_mode:standalone\r\n\r\n# Replication\r\nrole:master\r\nmaster_replid:l2\r\n"
        b"master_replid2:l1\r\nmaster_repl_offset:120\r\nsecond_repl_offset:101\r\n"
    )
    found = identify("h:1", None, said)
    assert (found.role, found.mode) == ("master", "standalone")
    assert found.history == History("h:1", "r1", "l2", "l1", 100, 120)
    assert found.history.takes_over(History("h:2", "r0", "l1"))
    assert not found.history.takes_over(History("h:2", "r0", "l0"))
    assert found.history.is_same(History("h:2", "r1", "l2", None, None, 5))
    hello: list[object] = [b"server", b"redis", b"proto", 2, b"mode", b"cluster", b"role", b"replica", b"modules", []]
    hidden = identify("h:1", hello, None)
    assert (hidden.role, hidden.mode, hidden.history) == ("slave", "cluster", History("h:1"))
    assert not hidden.history.is_same(hidden.history)
    assert not hidden.history.takes_over(hidden.history)
    assert identify("h:1", None, None).role is None


# -- hash slots ----------------------------------------------------------------------------------------------------


def test_slots_and_groups_of_keys(tmp_path: Path) -> None:
    assert slot_of("123456789") == 12739
    assert slot_of("{user1000}.following") == slot_of("{user1000}.followers") == slot_of("user1000")
    assert [tag_of(key) for key in ("a{b}c", "{b}", "a{}c", "a{b", "a{{b}}", "a{b}{c}", "abc")] == [
        "b", "b", "a{}c", "a{b", "{b", "b", "abc",
    ]  # fmt: skip


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_slots_are_the_servers_slots(flavour: Flavour) -> None:
    keys = ["", "a", "{", "}", "{}", "{}a", "a{b}c", "a{{b}}", "a{b}{c}", "{ns:c:C-1}:meta", "日本{語}"]
    options = {"cluster-enabled": "yes", "cluster-port": str(free_port())}
    with Server(flavour, options=options) as server:
        assert [tell(server, "CLUSTER", "KEYSLOT", key) for key in keys] == [slot_of(key) for key in keys]


def test_maps_of_slots() -> None:
    reply: list[list[object]] = [
        [0, 99, [b"h1", 1, b"id"], [b"h2", 2, b"id"]],
        [200, SLOTS - 1, [b"", 3, b"id", []], [None, 4, b"id"], [b"?", 5, b"id"]],
        [150, 150, [b"h1", 1, b"id"]],
    ]
    found = read_slots(reply, "asked")
    assert [found.owners[slot] for slot in (0, 99, 100, 150, 199, 200, SLOTS - 1)] == [
        "h1:1", "h1:1", None, "h1:1", None, "asked:3", "asked:3",
    ]  # fmt: skip
    assert found.replicas == {"h1:1": {"h2:2"}, "asked:3": {"asked:4", "asked:5"}}
    assert found.hosts["asked:4"] == ("asked", 4)
    assert found.primaries() == {"h1:1", "asked:3"}
    for nonsense in (None, 7, [7], [[0, 1]], [[0, 1, [b"h", b"x"]]], [[b"a", 1, [b"h", 1]]], []):
        with pytest.raises(StoreUnavailable):
            read_slots(nonsense, "asked")


def test_who_has_taken_over_from_whom() -> None:
    def of(*owners: str, **replicas: str) -> SlotMap:
        filled = [owner or None for owner in owners]
        return SlotMap([*filled, *([None] * (SLOTS - len(filled)))], {p: frozenset({r}) for p, r in replicas.items()})

    old = of("a", "a", "b", "b", a="x", b="y")
    assert list(replaced(old, old)) == []
    assert list(replaced(old, of("x", "x", "b", "b"))) == [("a", "x")], "a known replica"
    assert list(replaced(old, of("z", "z", "b", "b"))) == [("a", "z")], "nobody knew it, but the old one is gone"
    assert list(replaced(old, of("a", "z", "b", "z"))) == [], "a new server was given slots"
    assert list(replaced(old, of("a", "b", "b", "b"))) == [], "an old one was"
    assert list(replaced(old, of("", "", "b", "b"))) == []
    assert list(replaced(old, of("x", "x", "y", "y"))) == [("a", "x"), ("b", "y")]


def test_what_may_be_missing_after_a_change() -> None:
    old = History("h:1", run="r1", line="l1", offset=100)
    heir = History("h:2", run="r2", line="l2", former="l1", until=150, offset=150)

    def found(old: History, new: History, seen: History | None = None) -> tuple[str, str, int | None]:
        fallback = NewHistory(old, new).fallback(seen)
        return fallback.place, fallback.way, fallback.missing

    assert found(old, heir) == ("h:2", "fail-over", 0)
    assert found(old, heir, replace(old, offset=170)) == ("h:2", "fail-over", 20)
    # What was seen of another line says nothing of this one.
    assert found(old, heir, replace(old, line="l0", offset=170)) == ("h:2", "fail-over", 0)
    assert found(replace(old, offset=None), heir) == ("h:2", "fail-over", None)
    assert found(old, replace(heir, until=None)) == ("h:2", "fail-over", None)
    assert found(old, History("h:1", run="r2", line="l3")) == ("h:1", "restart", None)
    assert found(old, History("h:2", run="r2", line="l3")) == ("h:2", "replaced", None)
    assert found(old, replace(old, line="l3")) == ("h:1", "replaced", None)


def test_how_far_the_replicas_are() -> None:
    said = (
        b"role:master\r\nconnected_slaves:3\r\nslave0:ip=::1,port=1,state=online,offset=90,lag=0\r\n"
        b"slave1:ip=::1,port=2,state=wait_bgsave,offset=99,lag=0\r\nslave2:ip=::1,port=3,state=online,offset=80,lag=1\r\n"
        b"slave_expires_tracked_keys:0\r\nmaster_replid:abc\r\nmaster_repl_offset:95\r\n"
    )
    assert progress_of(said) == Progress("abc", 95, 90, 3)
    assert progress_of(b"role:master\r\nconnected_slaves:0\r\n") == Progress(replicas=0)
    assert progress_of(None) == Progress()
