"""Slots, queued starts and lists of conversations."""

from __future__ import annotations

import asyncio

from convener.core.admission import MAX_WAITING, Slot
from convener.store.base import Store
from convener.testing.contract_checks.tools import until
from convener.testing.harness import Harness


async def reserve(s: Store, cid: str, nonce: str, limit: int = 3, read: Slot | None = None, inc: str = "a~1") -> str:
    """RESERVE for user `u` with the raised limit; the outcome."""
    reply = await s.reserve("u", cid, Slot(nonce, inc), raised_limit=limit + 1, read=read)
    return reply.outcome


async def check_the_limit_is_exact(h: Harness) -> None:
    """I6: of forty starts through three connections, exactly three get a slot, in each round."""
    stores = [await h.connect() for _ in range(3)]
    for _ in range(5):
        outcomes = await asyncio.gather(*(reserve(stores[i % 3], f"c{i}", f"n{i}") for i in range(40)))
        assert sorted(outcomes) == ["LIMIT"] * 37 + ["OK"] * 3
        held = await stores[0].slots("u")
        assert len(held) == 3
        for cid, slot in held.items():
            await stores[1].unreserve("u", cid, slot.nonce)


async def check_reserve(h: Harness) -> None:
    """Own nonce: the same slot. Read: adopted. Anything else that is held: held."""
    s = await h.connect()
    assert await s.slot("u", "c1") is None
    reply = await s.reserve("u", "c1", Slot("n1", "a~1"), raised_limit=2, read=None)
    assert (reply.outcome, reply.slot) == ("OK", None)
    assert await reserve(s, "c1", "n1", limit=1) == "OK"
    reply = await s.reserve("u", "c1", Slot("n2", "b~1"), raised_limit=2, read=None)
    assert (reply.outcome, reply.slot) == ("HELD", Slot("n1", "a~1"))
    assert await reserve(s, "c1", "n2", 1, Slot("n0", "a~1")) == "HELD"
    assert await reserve(s, "c1", "n2", 1, Slot("n1", "a~1"), "b~1") == "OK"
    assert await s.slot("u", "c1") == Slot("n2", "b~1")
    reply = await s.reserve("u", "c2", Slot("n3", "a~1"), raised_limit=2, read=None)
    assert (reply.outcome, reply.count) == ("LIMIT", 1)
    assert dict(await s.slots("u")) == {"c1": Slot("n2", "b~1")}
    assert (await s.reserve("u", "c2", Slot("n3", "a~1"), raised_limit=0, read=None)).outcome == "OK"
    assert (await s.reserve("v", "c2", Slot("n3", "a~1"), raised_limit=2, read=None)).outcome == "OK"
    assert dict(await s.slots("nobody")) == {}


async def check_unreserve_goes_by_the_nonce(h: Harness) -> None:
    """A late one cannot free the slot of a later start."""
    s = await h.connect()
    await reserve(s, "c1", "n2")
    assert await s.unreserve("u", "c1", "n1") is None
    assert await s.slot("u", "c1") == Slot("n2", "a~1")
    assert await s.unreserve("u", "c1", "n2") is None
    assert await s.unreserve("u", "none", "n2") is None
    assert dict(await s.slots("u")) == {}


async def check_the_queue(h: Harness) -> None:
    """Oldest first, each conversation once, nobody passed over, left by starting."""
    s = await h.connect()
    await reserve(s, "c0", "n0", limit=1)
    for cid in ("b", "a", "c"):
        assert await s.enqueue("u", cid, "a~1", "wake")
    assert await s.enqueue("u", "b", "b~1", "alarm")
    waiting = await s.waiting("u")
    assert [(w.conversation_id, w.incarnation, w.reason) for w in waiting] == [
        ("b", "b~1", "alarm"),
        ("a", "a~1", "wake"),
        ("c", "a~1", "wake"),
    ]
    assert [w.since for w in waiting] == sorted(w.since for w in waiting)
    assert await reserve(s, "b", "n1", limit=1) == "LIMIT"
    head = await s.unreserve("u", "c0", "n0")
    assert head == waiting[0]
    for cid in ("new", "a", "c"):
        assert await reserve(s, cid, "n2", limit=1) == "LIMIT"
    assert await reserve(s, "b", "n1", limit=1) == "OK"
    assert [w.conversation_id for w in await s.waiting("u")] == ["a", "c"]
    assert await s.dequeue("u", "a")
    assert not await s.dequeue("u", "a")
    assert not await s.dequeue("v", "c")
    assert [w.conversation_id for w in await s.waiting("u")] == ["c"]
    assert list(await s.waiting("nobody")) == []


async def check_the_queue_is_bounded(h: Harness) -> None:
    """At `MAX_WAITING`; who is in may still be renewed."""
    s = await h.connect()
    entered = await asyncio.gather(*(s.enqueue("u", f"c{i}", "a~1", "wake") for i in range(MAX_WAITING + 5)))
    assert entered == [True] * MAX_WAITING + [False] * 5
    assert await s.enqueue("u", "c7", "b~1", "wake")
    waiting = await s.waiting("u")
    assert [w.conversation_id for w in waiting] == [f"c{i}" for i in range(MAX_WAITING)]


async def check_a_users_list(h: Harness) -> None:
    """Newest activity first, ties by id; pages neither skip nor repeat."""
    s = await h.connect()
    assert list(await s.list_user("u", None, 10)) == []
    for i in range(30):
        await s.index("u", f"c{i}")
    await s.index("v", "other")
    listed = list(await s.list_user("u", None, 100))
    assert listed == sorted(listed, key=lambda item: (item[1], item[0]), reverse=True)
    assert {cid for cid, _ in listed} == {f"c{i}" for i in range(30)}
    paged: list[tuple[str, int]] = []
    while page := await s.list_user("u", (paged[-1][1], paged[-1][0]) if paged else None, 7):
        paged += page
    assert paged == listed
    assert list(await s.list_user("u", None, 0)) == []
    assert list(await s.list_user("u", (0, ""), 10)) == []


async def check_activity(h: Harness) -> None:
    """`touch` moves what is listed to the top, and lists nothing anew."""
    s = await h.connect()
    for cid in ("c1", "c2", "c3"):
        await s.index("u", cid)
    before = dict(await s.list_user("u", None, 10))

    async def touched() -> list[str]:
        await s.touch("u", ["c2", "none"])
        return [cid for cid, _ in await s.list_user("u", None, 10)]

    await until(touched, lambda order: order[0] == "c2", "c2 is first")
    after = dict(await s.list_user("u", None, 10))
    assert set(after) == {"c1", "c2", "c3"}
    assert after["c2"] > before["c2"]
    assert after["c1"] == before["c1"]
    await s.touch("nobody", ["c1"])
    assert list(await s.list_user("nobody", None, 10)) == []
    await s.unindex("u", "c2")
    await s.unindex("u", "c2")
    assert {cid for cid, _ in await s.list_user("u", None, 10)} == {"c1", "c3"}


async def check_the_list_of_all(h: Harness) -> None:
    """Sixty-four shards, each in order of id."""
    s = await h.connect()
    names = sorted(f"c{i}" for i in range(300))
    await asyncio.gather(*(s.index(f"u{i % 3}", cid) for i, cid in enumerate(names)))
    found: list[str] = []
    for shard in range(64):
        part: list[str] = []
        while page := await s.list_all(shard, part[-1] if part else "", 2):
            part += page
        assert part == sorted(part)
        found += part
    assert sorted(found) == names
    await s.index("u0", "c0")
    for i, cid in enumerate(names):
        await s.unindex(f"u{i % 3}", cid)
    assert [cid for shard in range(64) for cid in await s.list_all(shard, "", 10)] == []


# -- tickets ---------------------------------------------------------------------------------------------------


async def check_a_ticket_is_taken_once(h: Harness) -> None:
    """By whoever comes first, at any node."""
    one, other = await h.connect(), await h.connect()
    await one.keep_ticket("t1", b"\x00sealed\xff", 60_000)
    await one.keep_ticket("t2", b"", 60_000)
    taken = await asyncio.gather(*(store.take_ticket("t1") for store in (one, other) * 5))
    assert sorted(taken, key=lambda found: found is None) == [b"\x00sealed\xff", *[None] * 9]
    assert await other.take_ticket("t2") == b""
    assert await other.take_ticket("never") is None
    await one.keep_ticket("t1", b"again", 60_000)
    assert await other.take_ticket("t1") == b"again"


async def check_a_ticket_does_not_stay(h: Harness) -> None:
    """Nobody has to delete it."""
    s = await h.connect()
    await s.keep_ticket("t1", b"x", 1)
    await until(h.keys, lambda keys: not any(key.startswith("k:") for key in keys), "the ticket is gone")
    assert await s.take_ticket("t1") is None
