"""Membership, slots, lists and records: the scripts against the core, or against the store that applies the core."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from convener.core import membership
from convener.core.admission import MAX_WAITING, Slot, Waiting
from convener.core.directory import Record
from convener.core.membership import Member, Membership
from convener.store.base import Store
from convener.store.memory import MemoryStore
from convener.store.redis import RedisStore
from convener.store.redis.scripts import Script
from tests.support.waiting import wait_until

NODES = ("a~1", "b~2")

# -- the membership ------------------------------------------------------------------------------------------------

NAMES = ("a~1", "b~1", "c~1", "d~1", "e~1")
TTL = 100_000
LONG = 10 * TTL


@dataclass(frozen=True, slots=True)
class Move:
    name: str
    who: int = 0
    flag: bool = False


MOVES = st.builds(
    Move,
    name=st.sampled_from(
        (
            *("join", "join", "join", "renew", "late", "lapse", "silence", "reap", "bury", "bury", "leave", "forget"),
            *("live", "supersede", "supersede", "ahead"),
        )
    ),
    who=st.integers(0, len(NAMES) - 1),
    flag=st.booleans(),
)


class Members:
    """The membership in the server and in the model. Time passes by moving deadlines, far enough to be certain."""

    def __init__(self, store: RedisStore) -> None:
        self.store = store
        self.model = Membership()
        self.live: set[str] = set()

    async def step(self, move: Move) -> None:
        before = self.model
        await getattr(self, f"_{move.name}")(NAMES[move.who], move)
        found = await self.store.membership()
        assert found == self.model, (move, before)
        assert await self.store.is_buried(NAMES[move.who]) == (NAMES[move.who] in self.model.dead)

    async def _now(self) -> int:
        """The server's time at the step before, out of what it wrote; else the time now, which matters to nothing."""
        found, time = await self.store.membership(), await self._time()
        buried = [at for name, at in found.dead.items() if name not in self.model.dead]
        known = self.model.members
        moved = [m.deadline - m.ttl for n, m in found.members.items() if n in known and m.deadline != known[n].deadline]
        if moved:
            return moved[0]
        if found.grace < self.model.grace:
            return found.grace - TTL
        felt = bool(found.pulse) and time - found.pulse > LONG // 2
        return buried[0] if buried else found.grace - TTL if felt else time

    async def _pulse(self) -> int:
        """The same of a step that renews."""
        return (await self.store.membership()).pulse

    async def _time(self) -> int:
        seconds, micros = await self.store.topology.execute("", "TIME")
        return int(seconds) * 1000 + int(micros) // 1000

    async def _join(self, name: str, move: Move) -> None:
        member = Member(0, TTL, 500, '{"a|b":"é"}' if move.flag else "{}")
        reply = await self.store.join(name, member)
        expected, self.model = membership.join(self.model, name, member, await self._pulse())
        assert reply == expected

    async def _renew(self, name: str, move: Move) -> None:
        info = '{"load":1}' if move.flag else None
        reply = await self.store.renew(name, info)
        expected, self.model = membership.renew(self.model, name, info, await self._pulse())
        assert reply == expected

    async def _shift(self, name: str, amount: int) -> None:
        if name in self.model.members:
            key = self.store.keys.lease
            await self.store.topology.execute(key, "ZINCRBY", key, -amount, name)
            member = self.model.members[name]
            moved = replace(member, deadline=member.deadline - amount)
            self.model = replace(self.model, members={**self.model.members, name: moved})

    async def _late(self, name: str, _: Move) -> None:
        await self._shift(name, TTL // 2)

    async def _ahead(self, name: str, move: Move) -> None:
        """The clock was set back after a renewal; or after a grace period began."""
        if not move.flag:
            await self._shift(name, -LONG)
        elif self.model.pulse:
            key, value = self.store.keys.grace, await self._time() + LONG
            await self.store.topology.execute(key, "SET", key, value)
            self.model = replace(self.model, grace=value)

    async def _lapse(self, name: str, _: Move) -> None:
        await self._shift(name, LONG)

    async def _silence(self, _name: str, move: Move) -> None:
        """Nobody renewed for long; or a grace period that is over."""
        key = self.store.keys.grace if move.flag else self.store.keys.pulse
        value = self.model.grace if move.flag else self.model.pulse
        if value:
            await self.store.topology.execute(key, "SET", key, value - LONG)
            field_name = "grace" if move.flag else "pulse"
            self.model = replace(self.model, **{field_name: value - LONG})

    async def _reap(self, _name: str, _: Move) -> None:
        reply = await self.store.reap(TTL, "who~1")
        expected, self.model = membership.reap(self.model, TTL, await self._now(), "who~1")
        assert sorted(reply) == sorted(expected)

    async def _bury(self, name: str, _: Move) -> None:
        reply = await self.store.bury(name, TTL, "who~1")
        holders = int(name in self.live)
        now = await self._now()
        expected, self.model = membership.bury(self.model, name, holders, TTL, now, "who~1")
        assert reply == expected

    async def _supersede(self, name: str, move: Move) -> None:
        member = self.model.members.get(name)
        deadline = 0 if member is None else member.deadline + (not move.flag)
        by = f"{name.rpartition('~')[0]}~again"
        reply = await self.store.supersede(name, by, deadline)
        expected, self.model = membership.supersede(self.model, name, by, deadline, await self._now())
        assert reply == expected

    async def _leave(self, name: str, _: Move) -> None:
        await self.store.leave(name)
        self.model = membership.leave(self.model, name, await self._now())

    async def _forget(self, name: str, move: Move) -> None:
        kept = LONG if move.flag else 0
        await self.store.forget(name, kept)
        self.model = membership.forget(self.model, name, kept, await self._time())

    async def _live(self, name: str, _: Move) -> None:
        channel = self.store.keys.live(name)
        if name in self.live:
            self.live.discard(name)
            await self.store.unsubscribe(channel)
            await wait_until(lambda: self._holders(channel, 0), "the channel is let go")
        else:
            self.live.add(name)
            await self.store.subscribe(channel, lambda _: None, lambda: None)

    async def _holders(self, channel: str, number: int) -> bool:
        return (await self.store.topology.execute("", "PUBSUB", "SHARDNUMSUB", channel))[1] == number

    async def clear(self) -> None:
        await self.store.topology.execute("", "DEL", *self.store.keys.membership)
        for name in self.live:
            await self.store.unsubscribe(self.store.keys.live(name))
            await wait_until(lambda name=name: self._holders(self.store.keys.live(name), 0), "the channel is let go")


JOINS = [Move("join", i) for i in range(5)]
QUIET = Move("silence", flag=True)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(moves=st.lists(MOVES, min_size=3, max_size=40))
@example(moves=[*JOINS, Move("late"), Move("bury")])
@example(moves=[*JOINS, Move("live"), Move("late"), Move("bury"), Move("live"), Move("bury")])
@example(moves=[*JOINS, Move("late"), Move("late", 1), Move("bury")])
@example(moves=[*JOINS, Move("lapse"), Move("lapse", 1), Move("reap"), Move("renew"), Move("join")])
@example(
    moves=[*JOINS, Move("silence"), Move("lapse"), Move("reap"), Move("bury"), QUIET, Move("renew", 1), Move("reap")]
)
@example(
    moves=[*JOINS, Move("ahead"), Move("reap"), Move("late"), Move("bury"), Move("ahead", flag=True), Move("reap")]
)
async def test_the_membership(store: RedisStore, moves: list[Move]) -> None:
    members = Members(store)
    try:
        for move in moves:
            await members.step(move)
    finally:
        await members.clear()


# -- users: against the store in memory, which applies the core's functions ----------------------------------------


@dataclass(frozen=True, slots=True)
class Ask:
    name: str
    cid: int = 0
    nonce: int = 0
    node: int = 0
    limit: int = 0
    read: int = 0


ASKS = st.builds(
    Ask,
    name=st.sampled_from(["reserve", "reserve", "reserve", "unreserve", "enqueue", "enqueue", "dequeue"]),
    cid=st.integers(0, 4),
    nonce=st.integers(0, 2),
    node=st.integers(0, 1),
    limit=st.integers(0, 4),
    read=st.integers(0, 2),
)


def _timeless(waiting: Sequence[Waiting]) -> list[Waiting]:
    return [replace(entry, since=0) for entry in waiting]


async def _ask(store: Store, user: str, ask: Ask, read: Slot | None) -> object:
    cid, nonce = f"c{ask.cid}", f"x{ask.nonce}"
    match ask.name:
        case "reserve":
            slot = Slot(nonce, NODES[ask.node])
            return await store.reserve(user, cid, slot, raised_limit=ask.limit, read=read)
        case "unreserve":
            head = await store.unreserve(user, cid, nonce)
            return _timeless([head] if head else [])
        case "enqueue":
            return await store.enqueue(user, cid, NODES[ask.node], ("start", "a|b")[ask.read % 2])
        case _:
            return await store.dequeue(user, cid)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(asks=st.lists(ASKS, min_size=3, max_size=40))
async def test_slots(store: RedisStore, asks: list[Ask]) -> None:
    user = secrets.token_hex(6)
    memory = MemoryStore()
    await memory.open()
    try:
        for ask in asks:
            cid = f"c{ask.cid}"
            held = await memory.slot(user, cid)
            read = (None, held, Slot("old", "gone~1"))[ask.read]
            assert await _ask(store, user, ask, read) == await _ask(memory, user, ask, read), ask
            assert dict(await store.slots(user)) == dict(await memory.slots(user))
            assert await store.slot(user, cid) == await memory.slot(user, cid)
            assert _timeless(await store.waiting(user)) == _timeless(await memory.waiting(user))
    finally:
        await memory.close()


async def test_the_queue_is_bounded_and_keeps_its_order_within_a_millisecond(store: RedisStore) -> None:
    cids = [f"c{i * 7919 % MAX_WAITING}" for i in range(MAX_WAITING)]
    outcomes = await asyncio.gather(*(store.enqueue("u", cid, "a~1", "start") for cid in cids))
    assert all(outcomes)
    assert not await store.enqueue("u", "one-more", "a~1", "start")
    assert await store.enqueue("u", cids[5], "b~2", "wake")
    waiting = await store.waiting("u")
    assert [entry.conversation_id for entry in waiting] == cids
    assert (waiting[5].incarnation, waiting[5].reason) == ("b~2", "wake")
    assert sorted(entry.since for entry in waiting) == [entry.since for entry in waiting]


async def test_lists_page_through_ties(store: RedisStore) -> None:
    cids = sorted(f"c{i}" for i in range(100))
    for cid in cids:
        await store.index("u", cid)
    await store.touch("u", [*cids[20:60], "unknown"])
    everything = list(await store.list_user("u", None, 1000))
    assert sorted(cid for cid, _ in everything) == cids
    assert everything == sorted(everything, key=lambda pair: (pair[1], pair[0]), reverse=True)
    assert len({at for _, at in everything}) < 100, "some share a millisecond"
    for limit in (1, 7, 39):
        pages: list[tuple[str, int]] = []
        while page := await store.list_user("u", (pages[-1][1], pages[-1][0]) if pages else None, limit):
            assert len(page) <= limit
            pages += page
            assert len(pages) <= len(cids), "the pages overlap"
        assert pages == everything
    # A place whose conversation has moved on since is still a place.
    at = everything[30][1]
    after = [pair for pair in everything if (pair[1], pair[0]) < (at, "c5")]
    assert list(await store.list_user("u", (at, "c5"), 1000)) == after
    shards: list[str] = []
    for shard in range(64):
        found: list[str] = []
        while page := await store.list_all(shard, found[-1] if found else "", 2):
            found += page
        assert found == sorted(found)
        shards += found
    assert sorted(shards) == cids
    for cid in cids:
        await store.unindex("u", cid)
    assert await store.list_user("u", None, 5) == []


async def test_a_flush_of_thousands_never_shows_a_version_before_its_changes(
    store: RedisStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    records = [Record(f"c{i}", "u", "idle", i, "x", 1, 1) for i in range(2500)]
    await asyncio.gather(*(store.put_record("n~1", replace(record, version=0)) for record in records))
    clients = {f"k{i}": f"c{i}" for i in range(1700)}
    unknown = Record("gone", "u", "idle", 1, "x", 1, 1)
    call = store.topology.call
    versions: list[object] = []

    def recording(script: Script, keys: tuple[str, ...], *arguments: str) -> asyncio.Future[Any]:
        versions.append(arguments[0])
        assert len(arguments) < 3000
        return call(script, keys, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(store.topology, "call", recording)
        await store.flush("n~1", 1, [*records, unknown], clients, ["k9999"])
    assert versions == ["", "", "", "", "1"]
    version, seen, joined = await store.node_records("n~1")
    assert {record.version for record in seen} == {1}
    assert (version, len(seen), joined) == (1, 2500, clients)
    await store.flush("n~1", 2, [], {}, list(clients))
    version, seen, joined = await store.node_records("n~1")
    assert (version, sorted(seen, key=lambda r: r.epoch), joined) == (2, records, {})
    assert await store.record("n~1", "c7") == records[7]
    assert not await store.drop_node("n~1")
    dropped = await asyncio.gather(*(store.drop_record("n~1", r.conversation_id, None) for r in records))
    assert all(dropped)
    assert await store.drop_node("n~1")
    assert await store.topology.execute("", "EXISTS", store.keys.records("n~1"), store.keys.connections("n~1")) == 0
