"""REPAIR: what an owner writes again after the store has fallen back.

No store can be made to fall back from here. A conversation that was never written to looks the same as one whose
writes are all lost, so that is what is repaired.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from convener.core.cursor import Cursor
from convener.core.model import LogEntry, Meta
from convener.core.repair import RepairRequest
from convener.core.wire import event
from convener.store.base import Store
from convener.testing.contract_checks.tools import GENERATION, REPLY, append, ask, head, made, owned, send, unread
from convener.testing.harness import Harness

OPEN = event("open", "", 3, '{"node":"a~1","reason":"start","prev":[0,0]}')
INPUT = event("input", "t1", 4, '{"message_id":"m1","user_id":"u","data":"é"}')
EPOCH = 1_000


def request(*events: str, **changes: Any) -> RepairRequest:
    """What an owner writes that has lost everything; `changes` are fields of the request."""
    made = RepairRequest("a~1", EPOCH, "n", "u", GENERATION, 2, '{"é":1}', (0, 0), events)
    return replace(made, **{"batch": "b7" if events else "", **changes})


async def log(store: Store) -> Sequence[LogEntry]:
    """The log of the conversation."""
    page = await store.read("c", Cursor(), 100)
    assert page is not None
    return page.entries


async def check_repair_of_a_conversation_that_is_gone(h: Harness) -> None:
    """Head, log, state and ids are there again, under the old epoch, and the owner goes on."""
    s = await h.connect()
    await s.index("u", "c")
    lost = request(OPEN, INPUT, cursor=1, done=0, base=1, halted=1, settled=("m1",), state=b"\x00\xff")
    assert await s.repair("c", lost) == "OK"
    found = await head(s)
    assert found == Meta(
        *("u", GENERATION, 2, found.updated, '{"é":1}', "a~1", EPOCH, 2, "b7", 1, 1, 0, 1, "n"), halted=1
    )
    assert await log(s) == (LogEntry(EPOCH, 1, OPEN), LogEntry(EPOCH, 2, INPUT))
    assert (await s.state("c"), dict(await s.all_seen("c"))) == (b"\x00\xff", {"m1": 0})
    assert (await send(s, "m1")).outcome == "DUP"
    assert (await append(s, REPLY, done=1)).outcome == "OK"
    assert (await log(s))[2] == LogEntry(EPOCH, 3, REPLY)


async def check_repair_of_an_ownership(h: Harness) -> None:
    """The former owner, or nobody, is replaced; the head keeps what else it has."""
    s = await h.connect()
    before = await made(s)
    assert await s.repair("c", request(OPEN)) == "OK"
    found = await head(s)
    assert (found.owner, found.nonce, found.epoch, found.seq, found.batch) == ("a~1", "n", EPOCH, 1, "b7")
    assert (found.created, found.metadata, found.position) == (before.created, "{}", 0)


async def check_repair_gives_new_positions(h: Harness) -> None:
    """What was accepted since comes after all that the owner has taken in, in its order; repaired ids leave."""
    s = await h.connect()
    await made(s)
    for name in ("x1", "m1", "x2"):
        await send(s, name, data=f'"{name} é"')
    before = {entry.message_id: entry for entry in await unread(s)}
    assert await s.repair("c", request(OPEN, INPUT, cursor=2, settled=("m1",))) == "OK"
    assert await unread(s) == [replace(before["x1"], position=3), replace(before["x2"], position=4)]
    assert dict(await s.all_seen("c")) == {"m1": 0, "x1": 3, "x2": 4}
    found = await head(s)
    assert (found.cursor, found.position) == (2, 4)
    assert (await send(s, "x3")).position == 5


async def check_repair_leaves_good_positions(h: Harness) -> None:
    """Entries above what the owner has taken in stay where they are."""
    s = await h.connect()
    await made(s)
    for name in ("m1", "x1"):
        await send(s, name)
    (_, kept) = await unread(s)
    assert await s.repair("c", request(OPEN, INPUT, cursor=1, settled=("m1",))) == "OK"
    assert await unread(s) == [kept]
    found = await head(s)
    assert (found.cursor, found.position) == (1, 2)
    assert (await send(s, "x2")).position == 3


async def check_repair_keeps_a_stop(h: Harness) -> None:
    """Its id is nobody's: that of a message which looks the same is not forgotten."""
    s = await h.connect()
    m = await owned(s)
    await send(s, "stop.3")
    await send(s, "m2")
    assert (await s.stop("c", "a~1", "why", "")).outcome == "STOPPING"
    lost = request(epoch=m.epoch, after=(m.epoch, 1), cursor=5, settled=("m2",))
    assert await s.repair("c", lost) == "OK"
    assert [(e.position, e.kind, e.message_id) for e in await unread(s)] == [
        (6, "message", "stop.3"),
        (7, "stop", "stop.3"),
    ]
    assert dict(await s.all_seen("c")) == {"stop.3": 6, "m2": 0}
    assert (await head(s)).status == "stopping"


async def check_repair_of_questions(h: Harness) -> None:
    """Answered ones are closed, open ones are open again; those of a turn that has ended are closed."""
    s = await h.connect()
    m = await owned(s)
    await ask(s, "t1.1", "t1.2")
    lost = request(REPLY, epoch=m.epoch, after=(m.epoch, 3), answered=("t1.1",), asks=(("t1.3", '{"é":1}'),))
    assert await s.repair("c", lost) == "OK"
    assert (set(await s.asks("c")), (await head(s)).asks) == ({"t1.2", "t1.3"}, 2)
    assert (await s.asks("c"))["t1.3"] == '{"é":1}'
    lost = request(REPLY, epoch=m.epoch, after=(m.epoch, 4), asks=(("t2.1", "1"),), closes=True)
    assert await s.repair("c", lost) == "OK"
    assert (dict(await s.asks("c")), (await head(s)).asks) == ({"t2.1": "1"}, 1)


async def check_repair_is_refused(h: Harness) -> None:
    """I2, I3, I4, I15: where anything else has happened nothing is written."""
    s = await h.connect()
    await made(s)
    assert await s.repair("c", request(OPEN, generation="other")) == "FENCED"
    assert await s.repair("c", request(OPEN, after=(0, 1))) == "GAP"
    assert await s.repair("c", request(OPEN, after=(1, 0))) == "GAP"
    m = await owned(s)
    good = request(REPLY, epoch=m.epoch, after=(m.epoch, 1))
    for refused in (
        replace(good, owner="b~1"),
        replace(good, epoch=m.epoch - 1),
        replace(good, epoch=EPOCH),
    ):
        assert await s.repair("c", refused) == "FENCED"
    for after in ((m.epoch, 2), (m.epoch, 0), (m.epoch - 1, 1)):
        assert await s.repair("c", replace(good, after=after)) == "GAP"
    before = await head(s)
    assert (len(await log(s)), before.owner) == (1, "a~1")
    assert (await append(s, closing="held")).outcome == "OK"
    assert await s.repair("c", replace(good, epoch=m.epoch + 1)) == "CLOSED"
    assert len(await log(s)) == 1
