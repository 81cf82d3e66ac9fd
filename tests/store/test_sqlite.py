"""What is particular about SQLite: the directory, the schema, crashes, full disks, transactions that are undone."""

from __future__ import annotations

import asyncio
import sqlite3
import sys
import threading
from asyncio.subprocess import PIPE
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from convener.core.cursor import Cursor
from convener.core.membership import Member
from convener.core.model import AppendRequest, ClaimRequest, NewMessage
from convener.core.wire import event
from convener.errors import ConfigurationError, StoreFull, StoreUnavailable
from convener.store import sqlite
from convener.store.sqlite import SQLiteStore
from convener.store.sqlite_tables import FIRST_VERSION, SCHEMA_VERSION, SQLiteTables
from convener.store.tables import Tables, timer_shard

pytestmark = pytest.mark.anyio


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[SQLiteStore]:
    store = SQLiteStore(tmp_path)
    await store.open()
    yield store
    await store.close()


def message(name: str, data: str = "1") -> NewMessage:
    return NewMessage(name, "u", data)


async def test_what_was_written_is_there_after_closing(tmp_path: Path) -> None:
    store = SQLiteStore(tmp_path / "new" / "directory")
    await store.open()
    await store.index("u", "c")
    await store.create("c", "u", '{"a":"é"}', "g")
    await store.send("c", message("m1", '{"text":"😀"}'), max_pending=9)
    claimed = await store.claim("c", ClaimRequest("a~1", "n", "", 0, "start"))
    assert claimed.meta is not None
    reply = event("reply", "t1", 1, '"é"')
    asks = (("t1.1", '{"prompt":"é"}'),)
    request = AppendRequest("a~1", claimed.meta.epoch, 1, "b", 0, 0, 0, (reply,), b"\x00state", halted=5, asks=asks)
    await store.append("c", request)
    await store.set_alarm("c", "alarm/1", '"😀"')
    await store.set_timer("c", "alarm/1", 17)
    before = await everything(store)
    await store.close()
    again = SQLiteStore(tmp_path / "new" / "directory")
    await again.open()
    assert await everything(again) == before
    assert (await again.list_user("u", None, 9))[0][0] == "c"
    await again.close()


async def everything(store: SQLiteStore) -> list[object]:
    """All that is to be there after closing."""
    conversation = [await store.inbox("c"), await store.read("c", Cursor(), 9), await store.state("c")]
    timers = [list(await store.due_timers(timer_shard("c"), 9)), dict(await store.alarms("c"))]
    return [*conversation, dict(await store.asks("c")), *timers, await store.keys()]


# -- the directory -------------------------------------------------------------------------------------------------


async def test_a_second_store_on_the_directory_is_refused(store: SQLiteStore, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="in use") as refused:
        await SQLiteStore(tmp_path).open()
    assert str(tmp_path) in str(refused.value)
    assert await store.head("c") is None


HOLDER = """
import asyncio, sys
from convener.core.membership import Member
from convener.core.model import NewMessage
from convener.store.sqlite import SQLiteStore

async def main():
    store = SQLiteStore(sys.argv[1])
    await store.open()
    await store.join("a~1", Member(0, 10_000, 500))
    await store.create("c", "u", "{}", "g")
    for i in range(20):
        await store.send("c", NewMessage(f"m{i}", "u", "1"), max_pending=99)
        print(i, flush=True)
    await asyncio.sleep(600)

asyncio.run(main())
"""


async def test_what_was_acknowledged_survives_a_kill(tmp_path: Path) -> None:
    """And the lock dies with the process; its members are buried at once."""
    child = await asyncio.create_subprocess_exec(sys.executable, "-c", HOLDER, str(tmp_path), stdout=PIPE)
    try:
        assert child.stdout is not None
        for i in range(20):
            assert await child.stdout.readline() == b"%d\n" % i
        with pytest.raises(ConfigurationError, match="in use"):
            await SQLiteStore(tmp_path).open()
    finally:
        child.kill()
        await child.wait()
    store = SQLiteStore(tmp_path)
    await store.open()
    read = await store.inbox("c")
    assert read is not None
    assert [e.message_id for e in read[1]] == [f"m{i}" for i in range(20)]
    assert await store.is_buried("a~1")
    assert (await store.renew("a~1")).outcome == (await store.join("a~1", Member(0, 9, 1))).outcome == "DEAD"
    assert dict((await store.membership()).members) == {}
    # A new node has no grace period to wait for: nobody was silent, the former is known to be gone.
    assert (await store.join("b~1", Member(0, 10_000, 500))).outcome == "OK"
    assert (await store.membership()).grace == 0
    await store.close()


async def test_members_are_buried_when_the_directory_is_opened_again(tmp_path: Path) -> None:
    first = SQLiteStore(tmp_path)
    await first.open()
    await first.join("a~1", Member(0, 10_000, 500))
    await first.join("b~1", Member(0, 10_000, 500))
    await first.leave("b~1")
    version = (await first.membership()).version
    await first.close()
    second = SQLiteStore(tmp_path)
    await second.open()
    state = await second.membership()
    assert (dict(state.members), set(state.dead), state.version) == ({}, {"a~1", "b~1"}, version + 1)
    await second.close()


async def test_a_directory_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigurationError, match="cannot be used"):
        await SQLiteStore(tmp_path / "file" / "data").open()


# -- the database --------------------------------------------------------------------------------------------------


def database(directory: Path) -> Path:
    return directory / "convener.db"


async def test_a_newer_schema_is_refused(tmp_path: Path) -> None:
    store = SQLiteStore(tmp_path)
    await store.open()
    await store.close()
    with sqlite3.connect(database(tmp_path)) as db:
        db.execute(f"PRAGMA user_version = {SCHEMA_VERSION + 1}")
    db.close()
    with pytest.raises(ConfigurationError, match=f"newer version .schema {SCHEMA_VERSION + 1}; this one knows"):
        await store.open()
    with sqlite3.connect(database(tmp_path)) as db:
        db.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
    db.close()
    await store.open()
    await store.close()


async def test_a_schema_from_before_the_first_release_is_refused(tmp_path: Path) -> None:
    store = SQLiteStore(tmp_path)
    await store.open()
    await store.close()
    with sqlite3.connect(database(tmp_path)) as db:
        db.execute(f"PRAGMA user_version = {FIRST_VERSION - 1}")
    db.close()
    with pytest.raises(ConfigurationError, match=f"before the first release .schema {FIRST_VERSION - 1}.; start with"):
        await store.open()


async def test_a_database_of_the_first_release_goes_on(tmp_path: Path) -> None:
    """Its heads know nothing of an archive, so nothing is archived."""
    store = SQLiteStore(tmp_path)
    await store.open()
    created = await store.create("c", "u", "{}", "g")
    await store.close()
    with sqlite3.connect(database(tmp_path)) as db:
        for column in ("archived", "archived_epoch", "manifest"):
            db.execute(f"ALTER TABLE head DROP COLUMN {column}")
        db.execute(f"PRAGMA user_version = {FIRST_VERSION}")
    db.close()
    for _ in range(2):
        await store.open()
        assert await store.head("c") == created.meta
        await store.close()


async def test_a_database_of_somebody_else_is_refused(tmp_path: Path) -> None:
    with sqlite3.connect(database(tmp_path)) as db:
        db.execute("CREATE TABLE mine (x)")
    db.close()
    with pytest.raises(ConfigurationError, match="another application"):
        await SQLiteStore(tmp_path).open()


async def test_a_file_that_is_no_database_is_refused(tmp_path: Path) -> None:
    database(tmp_path).write_bytes(b"no database, but long enough to look at, " * 100)
    with pytest.raises(ConfigurationError, match="cannot be read as a database"):
        await SQLiteStore(tmp_path).open()


@pytest.mark.parametrize(("setting", "number"), [("NORMAL", 1), ("FULL", 2)])
async def test_synchronous(tmp_path: Path, setting: sqlite.Synchronous, number: int) -> None:
    store = SQLiteStore(tmp_path, synchronous=setting)
    await store.open()
    assert await _pragma(store, "synchronous") == number
    assert await _pragma(store, "journal_mode") == "wal"
    await store.close()


async def _pragma(store: SQLiteStore, name: str, value: int | None = None) -> object:
    def step(t: Tables) -> object:
        assert isinstance(t, SQLiteTables)
        (found,) = t.db.execute(f"PRAGMA {name}" + ("" if value is None else f" = {value}")).fetchone()
        return found

    return await store.run(step)


# -- errors ----------------------------------------------------------------------------------------------------------


async def test_a_full_disk_refuses_and_changes_nothing(store: SQLiteStore) -> None:
    await store.create("c", "u", "{}", "g")
    await store.send("c", message("m1"), max_pending=99)
    pages = await _pragma(store, "page_count")
    assert isinstance(pages, int)
    await _pragma(store, "max_page_count", pages)
    heard: list[bytes] = []
    await store.subscribe(store.channel("c", "c"), heard.append, lambda: None)
    big = '"' + "x" * 100_000 + '"'
    # In one burst, so that they share a transaction: each has its own outcome all the same.
    outcomes = await asyncio.gather(
        store.send("c", message("m2"), max_pending=99),
        store.send("c", message("big", big), max_pending=99),
        store.send("c", message("m3"), max_pending=99),
        store.head("c"),
        return_exceptions=True,
    )
    assert isinstance(outcomes[1], StoreFull)
    assert not isinstance(outcomes[0], BaseException)
    assert not isinstance(outcomes[2], BaseException)
    assert (outcomes[0].position, outcomes[2].position) == (2, 3)
    assert list(await store.seen("c", ["big"])) == [None]
    await _pragma(store, "max_page_count", 1_000_000)
    assert (await store.send("c", message("big", big), max_pending=99)).position == 4
    await asyncio.sleep(0)
    assert [b'"id":"big"' in payload for payload in heard] == [False, False, True]


async def test_a_step_that_raises_is_undone_alone(store: SQLiteStore) -> None:
    await store.create("c", "u", "{}", "g")

    def bad(t: Tables) -> None:
        t.set_membership(t.membership().__class__(version=99))
        t.remember("c", "ghost", 7)
        t.publish("sync", "never")
        raise ValueError("on purpose")

    said: list[bytes] = []
    await store.subscribe(store.channel("sync"), said.append, lambda: None)
    outcomes = await asyncio.gather(
        store.join("a~1", Member(0, 10_000, 500)),
        store.run(bad),
        store.send("c", message("m1"), max_pending=9),
        return_exceptions=True,
    )
    assert isinstance(outcomes[1], ValueError)
    assert list(await store.seen("c", ["ghost", "m1"])) == [None, 1]
    state = await store.membership()
    assert (state.version, set(state.members)) == (1, {"a~1"})
    assert said == [b'{"t":"members","ver":1}']


async def test_pieces_are_undone_with_their_step(store: SQLiteStore) -> None:
    """They are in memory, and all the same part of the transaction: neither lost nor there twice."""
    await store.create("c", "u", "{}", "g")
    await store.create("other", "u", "{}", "g")
    claimed = await store.claim("c", ClaimRequest("a~1", "n", "", 0, "start"))
    assert claimed.meta is not None
    epoch = claimed.meta.epoch
    await store.add_pieces("c", "a~1", epoch, 1, ["1"])

    def bad(t: Tables) -> None:
        t.add_pieces("c", ["never"])
        t.clear_pieces("c")
        t.add_pieces("c", ["neither"])
        t.add_pieces("other", ["nor this"])
        raise ValueError("on purpose")

    outcomes = await asyncio.gather(
        store.add_pieces("c", "a~1", epoch, 1, ["2", "3"]),
        store.run(bad),
        store.add_pieces("c", "a~1", epoch, 1, ["4"]),
        return_exceptions=True,
    )
    assert outcomes[::2] == ["OK", "OK"]
    assert isinstance(outcomes[1], ValueError)
    assert list(await store.pieces("c")) == ["1", "2", "3", "4"]
    assert "c:other:tail" not in await store.keys()
    request = AppendRequest("a~1", epoch, 1, "b", 0, 0, 0, (), ends_turn=True)
    outcomes = await asyncio.gather(store.append("c", request), store.run(bad), return_exceptions=True)
    assert isinstance(outcomes[1], ValueError)
    assert list(await store.pieces("c")) == []
    assert "c:c:tail" not in await store.keys()


async def test_errors_of_the_disk_make_it_unavailable(store: SQLiteStore) -> None:
    def broken(t: Tables) -> None:
        raise sqlite3.OperationalError("disk I/O error")

    with pytest.raises(StoreUnavailable, match="disk I/O error"):
        await store.run(broken)
    assert await store.head("c") is None


async def test_nobody_waits_for_ever(store: SQLiteStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sqlite, "PATIENCE", 0.01)
    inside, leave = threading.Event(), threading.Event()

    def slow(t: Tables) -> None:
        inside.set()
        leave.wait(20)

    with pytest.raises(StoreUnavailable, match="did not answer"):
        await store.run(slow)
    assert inside.is_set()
    link = store.heartbeat_link(timeout=0.01)
    with pytest.raises(StoreUnavailable, match="did not answer"):
        await asyncio.to_thread(link.renew, "a~1")
    leave.set()
    monkeypatch.setattr(sqlite, "PATIENCE", 20)
    assert await store.head("c") is None


async def test_the_queue_is_bounded(store: SQLiteStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sqlite, "QUEUE_LIMIT", 5)
    inside, leave = threading.Event(), threading.Event()

    def slow(t: Tables) -> None:
        inside.set()
        leave.wait(20)

    waiting = [asyncio.ensure_future(store.run(slow))]
    await asyncio.to_thread(inside.wait, 20)
    waiting += [asyncio.ensure_future(store.head("c")) for _ in range(6)]
    await asyncio.wait(waiting[6:])
    with pytest.raises(StoreUnavailable, match="are waiting"):
        await waiting[6]
    leave.set()
    assert await asyncio.gather(*waiting[:6]) == [None] * 6


async def test_closing_answers_everybody(tmp_path: Path) -> None:
    store = SQLiteStore(tmp_path)
    await store.open()
    calls = [asyncio.ensure_future(store.index("u", f"c{i}")) for i in range(1_000)]
    await asyncio.sleep(0)
    await store.close()
    await asyncio.wait(calls)
    await store.open()
    assert len(await store.list_user("u", None, 2_000)) == 1_000
    await store.close()


async def test_peers_keep_the_database_open(tmp_path: Path) -> None:
    store = SQLiteStore(tmp_path)
    peer = store.peer()
    await asyncio.gather(store.open(), peer.open())
    await store.create("c", "u", "{}", "g")
    await store.close()
    assert await peer.head("c") is not None
    await peer.close()
    with pytest.raises(StoreUnavailable):
        await peer.head("c")
