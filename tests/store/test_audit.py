"""The auditor on live stores: clean ones pass, planted faults are found, what only passes by is not reported."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from convener.core.admission import Slot
from convener.core.audit import Violation
from convener.core.directory import Record
from convener.core.membership import Member
from convener.core.model import LogEntry
from convener.store import audit as auditing
from convener.store.audit import audit, every_conversation
from convener.store.base import Store
from convener.store.local import LocalStore
from convener.store.memory import MemoryStore
from convener.store.sqlite import SQLiteStore
from convener.store.tables import Tables
from convener.testing.contract_checks.tools import (
    REPLY,
    answer,
    append,
    ask,
    claim,
    head,
    made,
    reply,
    send,
    take_in,
)

pytestmark = pytest.mark.anyio


@pytest.fixture(params=["memory", "sqlite"])
async def store(request: pytest.FixtureRequest, tmp_path: Any) -> Any:
    made_store = MemoryStore() if request.param == "memory" else SQLiteStore(tmp_path)
    await made_store.open()
    yield made_store
    await made_store.close()


async def started(store: Store, cid: str = "c", me: str = "a~1", messages: int = 3) -> None:
    """A conversation of user `u` as a node leaves it that answered all but one of `messages` messages."""
    await store.join(me, Member(0, 60_000, 500))
    await made(store, cid)
    await store.put_record(me, Record(cid, "u", "running", 0, f"n-{cid}", 0))
    await store.reserve("u", cid, Slot(f"n-{cid}", me), raised_limit=0, read=None)
    assert (await claim(store, me, f"n-{cid}", cid)).outcome == "OK"
    for i in range(messages):
        await send(store, f"m{i + 1}", cid)
    await take_in(store, cid)
    for position in range(1, messages):
        await append(store, REPLY, cid=cid)
        await answer(store, position, cid)


async def found(store: Store, **options: Any) -> list[tuple[str, str, str]]:
    report = await audit(store, pause=0, **options)
    return [(v.invariant, v.where, v.detail) for v in report.violations]


async def test_a_healthy_cluster_passes(store: LocalStore) -> None:
    for i in range(5):
        await started(store, f"c{i}", f"n{i % 2}~1")
    await made(store, "never")
    await store.stop("c0", "x~1", "why", "n0~1")
    await store.unreserve("u", "c0", "n-c0")
    await store.drop_record("n0~1", "c0", "n-c0")
    report = await audit(store, pause=0, limit=4)
    assert report.violations == ()
    assert (report.conversations, report.nodes) == (6, 2)
    assert report.checked > 60


async def test_an_empty_store_passes(store: LocalStore) -> None:
    report = await audit(store, pause=0)
    assert report == auditing.AuditReport((), 0, 0, 0)


async def test_conversations_may_be_named(store: LocalStore) -> None:
    await started(store, "c1")
    await started(store, "c2")
    await plant(store, lambda t: t.set_meta("c2", replace(meta_of(t, "c2"), seq=99)))
    assert (await audit(store, ["c1", "c1", "none"], pause=0)).violations == ()
    report = await audit(store, ["c2"], pause=0)
    assert (report.conversations, len(report.violations)) == (1, 1)


async def test_pages_are_followed(store: LocalStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(auditing, "PAGE", 3)
    for i in range(10):
        await started(store, f"c{i}")
    assert sorted(await every_conversation(store)) == sorted(f"c{i}" for i in range(10))
    report = await audit(store, pause=0)
    assert (report.violations, report.conversations) == ((), 10)


# -- planted -------------------------------------------------------------------------------------------------------


async def plant(store: LocalStore, fault: Callable[[Tables], None]) -> None:
    await store.run(fault)


def meta_of(t: Tables, cid: str) -> Any:
    return t.meta(cid)


async def test_an_old_writer_is_found(store: LocalStore) -> None:
    await started(store)
    m = await head(store)

    def fault(t: Tables) -> None:
        t.add_log("c", [LogEntry(m.epoch - 5, m.seq + 1, REPLY)])
        t.set_meta("c", replace(m, seq=m.seq + 1))

    await plant(store, fault)
    assert [v[0] for v in await found(store)] == ["I3", "I2"]
    assert (await found(store))[0] == (
        "I3",
        "conversation c",
        f"entry ({m.epoch - 5}, {m.seq + 1}) was added after epoch {m.epoch} had begun",
    )


async def test_a_lost_message_is_found(store: LocalStore) -> None:
    await started(store)
    await send(store, "m4")
    await send(store, "m5")
    await plant(store, lambda t: t.drop_inbox("c", 4))
    assert await found(store) == [("I8", "conversation c", "message m4 was accepted at position 4, but is nowhere")]


async def test_a_message_that_would_come_twice_is_found(store: LocalStore) -> None:
    await started(store)
    await send(store, "m4")
    await plant(store, lambda t: t.forget_id("c", "m4"))
    place = "inbox entry 4 (message m4) is remembered at None, not at its position"
    assert await found(store) == [("I8", "conversation c", place)]


async def test_an_owner_without_its_slot_is_found(store: LocalStore) -> None:
    await started(store)
    await store.unreserve("u", "c", "n-c")
    assert await found(store) == [("I6", "user u", "a~1 owns conversation c without a slot")]
    await plant(store, lambda t: t.put_slot("u", "c", Slot("other", "a~1")))
    owner = "a~1 owns conversation c under nonce n-c, but the slot is other|a~1"
    assert await found(store) == [("I6", "user u", owner)]


async def test_too_many_slots_are_found(store: LocalStore) -> None:
    for i in range(3):
        await started(store, f"c{i}")
    assert await found(store, limit=3) == []
    assert await found(store, limit=2) == [
        ("I6", "user u", "3 slots with a limit of 2: ['c0', 'c1', 'c2']"),
    ]


async def test_a_missing_record_is_found(store: LocalStore) -> None:
    await started(store)
    await store.drop_record("a~1", "c", None)
    no_record = "but its hash has no record of that"
    assert await found(store) == [
        ("I12", "node a~1", f"it owns conversation c, {no_record}"),
        ("I12", "node a~1", f"the slot of conversation c of user u names it, {no_record}"),
    ]


async def test_an_owner_that_was_forgotten_is_found(store: LocalStore) -> None:
    await started(store)
    await store.leave("a~1")
    assert await found(store) == []
    await store.forget("a~1", 0)
    details = [detail for _, _, detail in await found(store)]
    assert "it owns conversation c, but it is neither a member nor buried" in details


async def test_a_buried_member_is_found(store: LocalStore) -> None:
    def fault(t: Tables) -> None:
        state = t.membership()
        t.set_membership(replace(state, members={"a~1": Member(1, 1, 1)}, dead={"a~1": 5}))

    await plant(store, fault)
    assert await found(store) == [("I10", "node a~1", "it is buried, and a member all the same")]


async def test_an_open_turn_that_nobody_owns_is_found(store: LocalStore) -> None:
    await started(store)
    await plant(store, lambda t: t.set_meta("c", replace(meta_of(t, "c"), owner="", nonce="")))
    assert await found(store) == [
        ("I13", "conversation c", "nobody owns it, but positions 3 to 3 are unanswered"),
    ]


async def test_unread_messages_are_somebodys_business_while_the_start_is_queued(store: LocalStore) -> None:
    await made(store)
    await send(store, "m1")
    unread = "nobody owns it and no start is queued, but positions 1 to 1 are unread"
    assert await found(store) == [("I11", "conversation c", unread)]
    await store.enqueue("u", "c", "a~1", "wake")
    assert await found(store) == []


async def test_a_conversation_that_waits_for_a_person_passes(store: LocalStore) -> None:
    await started(store, messages=1)
    await ask(store, "t1.1", "t1.2")
    assert (await reply(store, "t1.1", "r1")).outcome == "OK"
    assert await found(store) == []
    await take_in(store)
    m = await head(store)
    assert await store.release("c", "a~1", m.epoch, m.seq) == "OK"
    await store.unreserve("u", "c", "n-c")
    assert await found(store) == []


async def test_a_question_that_was_closed_by_nobody_is_found(store: LocalStore) -> None:
    await started(store, messages=1)
    await ask(store, "t1.1", "t1.2")
    await plant(store, lambda t: t.close_asks("c", "t1.2"))
    assert await found(store) == [
        ("I13", "conversation c", "the head says that 2 questions are open, but there are ['t1.1']"),
        ("I8", "conversation c", "question t1.2 of turn t1 is closed, but its answer is nowhere"),
    ]


async def test_a_start_that_is_queued_excuses_what_was_resumed(store: LocalStore) -> None:
    await started(store, messages=1)
    await append(store, closing="held")
    await store.unreserve("u", "c", "n-c")
    assert await found(store) == []
    await store.resume("c")
    assert await found(store) == [("I13", "conversation c", "nobody owns it, but positions 1 to 1 are unanswered")]
    await store.enqueue("u", "c", "a~1", "resume")
    assert await found(store) == []


async def test_users_without_an_id_have_no_slots(store: LocalStore) -> None:
    await store.join("a~1", Member(0, 60_000, 500))
    await made(store, "c", user="")
    await store.put_record("a~1", Record("c", "", "running", 0, "n", 0))
    await claim(store, "a~1")
    assert await found(store, limit=1) == []
    await store.drop_record("a~1", "c", None)
    assert [v[0] for v in await found(store)] == ["I12"]


# -- moving --------------------------------------------------------------------------------------------------------


async def test_what_is_mended_before_the_second_look_is_not_reported(store: LocalStore) -> None:
    await started(store)
    await started(store, "other")
    await store.unreserve("u", "c", "n-c")
    looks: list[str] = []

    class Mending:
        """A store in which the slot is back when the conversation is read for the second time."""

        def __getattr__(self, name: str) -> Any:
            return getattr(store, name)

        async def inbox(self, cid: str) -> Any:
            looks.append(cid)
            if looks.count("c") == 2:
                await store.reserve("u", "c", Slot("n-c", "a~1"), raised_limit=0, read=None)
            return await store.inbox(cid)

    mending: Any = Mending()
    report = await audit(mending, pause=0)
    assert (report.violations, report.conversations) == ((), 2)
    assert sorted(looks) == ["c", "c", "other", "other"]


async def test_a_busy_conversation_passes(store: LocalStore) -> None:
    """It is written to all the time; head, inbox and log are read so that they fit together."""
    await started(store, messages=1)
    await answer(store, 1)
    stop = asyncio.Event()

    async def talk() -> None:
        position = 1
        while not stop.is_set():
            position += 1
            await send(store, f"m{position}")
            await take_in(store)
            await append(store, REPLY)
            await answer(store, position)

    talking = asyncio.create_task(talk())
    for _ in range(20):
        assert (await audit(store, pause=0)).violations == ()
    stop.set()
    await talking
    assert (await audit(store, pause=0)).violations == ()


async def test_questions_that_come_and_go_pass(store: LocalStore) -> None:
    """The open questions are read after the head; what changes between is not judged."""
    await started(store, messages=1)
    stop = asyncio.Event()

    async def talk() -> None:
        number = 0
        while not stop.is_set():
            number += 1
            await ask(store, f"t1.{number}")
            await reply(store, f"t1.{number}", f"r{number}")
            await take_in(store)

    talking = asyncio.create_task(talk())
    for _ in range(20):
        assert (await audit(store, pause=0)).violations == ()
    stop.set()
    await talking
    assert (await audit(store, pause=0)).violations == ()


async def test_what_is_erased_meanwhile_is_left_out(store: LocalStore) -> None:
    await started(store)

    class Erasing:
        """A store of which the conversation vanishes between two reads."""

        def __getattr__(self, name: str) -> Any:
            return getattr(store, name)

        async def inbox(self, cid: str) -> Any:
            read = await store.inbox(cid)
            await store.stop("c", "x~1", "why", "a~1")
            await store.unreserve("u", "c", "n-c")
            await store.drop_record("a~1", "c", None)
            await store.erase("c")
            return read

    erasing: Any = Erasing()
    report = await audit(erasing, ["c"], pause=0)
    assert (report.violations, report.conversations) == ((), 0)


async def test_a_report_can_be_read(store: LocalStore) -> None:
    await started(store)
    await store.unreserve("u", "c", "n-c")
    (violation,) = (await audit(store, pause=0)).violations
    assert violation == Violation("I6", "user u", "a~1 owns conversation c without a slot")
    assert str(violation) == "I6 user u: a~1 owns conversation c without a slot"
