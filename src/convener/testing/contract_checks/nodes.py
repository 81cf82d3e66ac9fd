"""What nodes say of themselves; opening and closing."""

from __future__ import annotations

import asyncio
from dataclasses import replace

from convener.core.directory import LoopStatus, Record
from convener.errors import StoreUnavailable
from convener.testing.harness import Harness


def record(cid: str, nonce: str = "n", epoch: int = 1, status: LoopStatus = "running") -> Record:
    """A record of user `u`."""
    return Record(cid, "u", status, epoch, nonce, 1_700_000_000_000, 3)


async def check_records(h: Harness) -> None:
    """Written and read one by one; dropped by nonce."""
    a, b = await h.connect(), await h.connect()
    assert await a.record("a~1", "c1") is None
    await a.put_record("a~1", record("c1"))
    await a.put_record("a~1", record("c1", "n2", 9, "starting"))
    assert await b.record("a~1", "c1") == record("c1", "n2", 9, "starting")
    assert await b.record("b~1", "c1") is None
    assert not await b.drop_record("a~1", "c1", "n")
    assert not await b.drop_record("a~1", "none", None)
    assert await b.drop_record("a~1", "c1", "n2")
    assert not await a.drop_record("a~1", "c1", "n2")
    await a.put_record("a~1", record("c1"))
    assert await b.drop_record("a~1", "c1", None)
    assert await a.record("a~1", "c1") is None


async def check_flush_replaces_and_never_makes(h: Harness) -> None:
    """Whoever removed a record meanwhile is right."""
    s = await h.connect()
    await s.put_record("a~1", record("c1"))
    changed = replace(record("c1"), status="idle", version=7)
    await s.flush("a~1", 7, [changed, record("c2")], {"s1": "c1", "s2": "c1"}, [])
    version, records, connections = await s.node_records("a~1")
    assert (version, list(records), dict(connections)) == (7, [changed], {"s1": "c1", "s2": "c1"})
    await s.flush("a~1", 8, [], {"s3": "c1", "s2": "c2"}, ["s1", "none"])
    version, records, connections = await s.node_records("a~1")
    assert (version, list(records), dict(connections)) == (8, [changed], {"s2": "c2", "s3": "c1"})
    version, records, connections = await s.node_records("b~1")
    assert (version, list(records), dict(connections)) == (0, [], {})


async def check_a_large_node(h: Harness) -> None:
    """Thousands of records and clients, whole."""
    s = await h.connect()
    cids = [f"c{i}" for i in range(3_000)]
    await asyncio.gather(*(s.put_record("a~1", record(cid)) for cid in cids))
    changed = [replace(record(cid), status="idle") for cid in cids]
    await s.flush("a~1", 5, changed, {f"s{i}": cid for i, cid in enumerate(cids)}, [])
    version, records, connections = await s.node_records("a~1")
    assert version == 5
    assert sorted(r.conversation_id for r in records) == sorted(cids)
    assert {r.status for r in records} == {"idle"}
    assert len(connections) == len(cids)
    await s.flush("a~1", 6, [], {}, [f"s{i}" for i in range(len(cids))])
    assert dict((await s.node_records("a~1"))[2]) == {}


async def check_a_node_is_dropped_when_its_hash_is_empty(h: Harness) -> None:
    """Never with a record in it: that is what recovery still has to look at."""
    s = await h.connect()
    await s.put_record("a~1", record("c1"))
    await s.flush("a~1", 2, [], {"s1": "c1"}, [])
    assert not await s.drop_node("a~1")
    assert (await s.node_records("a~1"))[0] == 2
    await s.drop_record("a~1", "c1", "n")
    assert await s.drop_node("a~1")
    assert (await s.node_records("a~1"))[0] == 0
    assert not {key for key in await h.keys() if key.startswith("n:a~1")}
    assert await s.drop_node("a~1")


async def check_a_closed_store_is_unavailable(h: Harness) -> None:
    """Every call, and closing again is nothing; other stores over the same data go on."""
    a, b = await h.connect(), await h.connect()
    await a.index("u", "c1")
    await a.close()
    for call in (a.head("c1"), a.index("u", "c2"), a.publish(b.channel("sync"), b"x"), a.membership()):
        try:
            await call
        except StoreUnavailable:
            continue
        raise AssertionError("a closed store answered")
    await a.close()
    assert [cid for cid, _ in await b.list_user("u", None, 10)] == ["c1"]


async def check_calls_under_way_end_with_the_store(h: Harness) -> None:
    """With a reply or with `StoreUnavailable`, never without an end."""
    s = await h.connect()
    calls = [asyncio.ensure_future(s.head(f"c{i}")) for i in range(100)]
    await asyncio.sleep(0)
    await s.close()
    async with asyncio.timeout(20):
        ends = await asyncio.gather(*calls, return_exceptions=True)
    assert all(end is None or isinstance(end, StoreUnavailable) for end in ends)


async def check_the_store_says_what_it_is(h: Harness) -> None:
    """Kind at least; channels have different names."""
    s = await h.connect()
    assert (await s.info()).kind
    names = {s.channel("c", "x"), s.channel("c", "y"), s.channel("n", "x"), s.channel("sync")}
    assert len(names) == 4
    try:
        s.channel("other", "x")
    except ValueError:
        return
    raise AssertionError("a channel of an unknown kind was named")
