"""A store in SQLite: the standalone mode with ``--data DIR``.

One thread owns the connection and runs every step. Steps that queued up meanwhile share a transaction, so a
burst costs one commit; if anything in it fails, all of it is rolled back and each step runs again alone, so
each has exactly its own outcome.

``synchronous=NORMAL`` in WAL mode: a commit is in the operating system's cache before it is acknowledged, so
nothing acknowledged is lost when this process dies, however it dies. When the *machine* loses power, the last
commits may be gone (the database is not damaged, its history is rolled back a little); ``synchronous="FULL"``
waits for the disk at each commit and closes that gap, at some milliseconds a commit.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import sqlite3
import sys
import threading
from collections.abc import Callable, Generator
from concurrent.futures import Future
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Final, Literal

from convener.core import membership
from convener.errors import ConfigurationError, StoreFull, StoreUnavailable
from convener.store.clock import WallClock
from convener.store.local import LocalStore
from convener.store.localbus import Exchange, LocalBus
from convener.store.sqlite_tables import FIRST_VERSION, MIGRATIONS, SCHEMA, SCHEMA_VERSION, SQLiteTables
from convener.store.tables import Step, T, Tables

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl

_log = logging.getLogger(__name__)

Synchronous = Literal["NORMAL", "FULL"]

APPLICATION_ID: Final = 0x636F6E76
BATCH: Final = 256
"""Steps in one transaction at most, so that the first reply does not wait for a long queue."""
QUEUE_LIMIT: Final = 10_000
"""Steps that may wait; beyond, callers are refused."""
PATIENCE: Final = 10.0
"""Seconds that a caller waits for its step; past that the outcome is unknown."""


@dataclass(slots=True)
class _Job:
    """A step on its way, with the future of the loop or of the thread that waits for it."""

    step: Step[Any]
    reply: asyncio.Future[Any] | Future[Any]
    value: Any = None
    error: Exception | None = None

    def settle(self) -> None:
        """Hand the outcome over, where somebody still waits."""
        if self.reply.done():
            return
        if self.error is None:
            self.reply.set_result(self.value)
        else:
            self.reply.set_exception(self.error)


def _settle_all(jobs: list[_Job]) -> None:
    for job in jobs:
        job.settle()


def _translated(error: Exception) -> Exception:
    """SQLite's errors in our words. A full disk is noticed before the commit record: nothing has happened."""
    if not isinstance(error, sqlite3.Error):
        return error
    if getattr(error, "sqlite_errorname", "").startswith("SQLITE_FULL"):
        return StoreFull("the disk is full, or the database has reached its size limit")
    return StoreUnavailable(f"SQLite failed: {error}")


@contextmanager
def _lock(directory: Path) -> Generator[None, None, None]:
    """Hold the data directory for this process alone; ends with the process, whatever kills it.

    Raises:
        ConfigurationError: it is held already, or cannot be made or written.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        handle: IO[bytes] = (directory / "convener.lock").open("ab")
    except OSError as error:
        raise ConfigurationError(f"the data directory {directory} cannot be used: {error}") from error
    with handle:
        try:
            if sys.platform == "win32":
                msvcrt.locking(handle.fileno(), msvcrt.LK_NBLCK, 1)
            else:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ConfigurationError(f"the data directory {directory} is in use by another process") from error
        yield


def _connect(file: Path, synchronous: Synchronous) -> sqlite3.Connection:
    """Open the database; make the schema if it is new, and the present one out of an older one.

    Raises:
        ConfigurationError: it is not one of ours, or of a newer version.
    """
    db = sqlite3.connect(file, isolation_level=None, timeout=5)
    try:
        try:
            (version,) = db.execute("PRAGMA user_version").fetchone()
            (application,) = db.execute("PRAGMA application_id").fetchone()
            (tables,) = db.execute("SELECT count(*) FROM sqlite_master").fetchone()
        except sqlite3.DatabaseError as error:
            raise ConfigurationError(f"{file} cannot be read as a database: {error}") from error
        if tables and application != APPLICATION_ID:
            raise ConfigurationError(f"{file} is another application's database")
        if version > SCHEMA_VERSION:
            raise ConfigurationError(
                f"{file} was written by a newer version (schema {version}; this one knows {SCHEMA_VERSION})"
            )
        if tables and version < FIRST_VERSION:
            raise ConfigurationError(
                f"{file} was written by a version before the first release (schema {version}); start with a new folder"
            )
        db.execute("PRAGMA journal_mode = WAL")
        db.execute(f"PRAGMA synchronous = {synchronous}")
        if not tables:
            mark = f"PRAGMA application_id = {APPLICATION_ID}; PRAGMA user_version = {SCHEMA_VERSION};"
            db.executescript(f"BEGIN; {SCHEMA} {mark} COMMIT;")
        for older in range(version if tables else SCHEMA_VERSION, SCHEMA_VERSION):
            db.executescript(f"BEGIN; {MIGRATIONS[older]} PRAGMA user_version = {older + 1}; COMMIT;")
    except BaseException:
        db.close()
        raise
    return db


class SQLiteEngine:
    """Runs steps in a thread of its own."""

    kind = "sqlite"
    version: str | None = sqlite3.sqlite_version

    def __init__(self, directory: Path, now_ms: Callable[[], int], synchronous: Synchronous) -> None:
        self._directory = directory
        self._clock = now_ms
        self._synchronous: Synchronous = synchronous
        self._exchange = Exchange()
        self._live: dict[str, int] = {}
        self._live_lock = threading.Lock()
        self._queue: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._users = 0
        self._running = False
        self._ready: Future[None] = Future()
        self._gone: Future[None] = Future()

    # -- from any event loop, or from a thread ---------------------------------------------------------------

    async def open(self) -> None:
        """Lock the directory, open the database, bury all former members.

        Raises:
            ConfigurationError: the directory is in use, or the database is not one of ours or too new.
        """
        self._users += 1
        if self._users == 1:
            self._queue = queue.SimpleQueue()
            self._ready, self._gone = Future(), Future()
            self._running = True
            threading.Thread(target=self._serve, name="convener-sqlite", daemon=True).start()
        try:
            await asyncio.wrap_future(self._ready)
        except BaseException:
            await self.close()
            raise

    async def close(self) -> None:
        """The last user's close ends the thread, after the steps that were handed in before it."""
        self._users -= 1
        if self._users == 0:
            self._running = False
            self._queue.put(None)
            await asyncio.wrap_future(self._gone)

    async def run(self, step: Step[T]) -> T:
        reply: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        self._submit(_Job(step, reply))
        try:
            async with asyncio.timeout(PATIENCE):
                return await reply
        except TimeoutError:
            raise StoreUnavailable(f"SQLite did not answer within {PATIENCE:g} s") from None

    def run_from_thread(self, step: Step[T], timeout: float) -> T:
        reply: Future[T] = Future()
        self._submit(_Job(step, reply))
        try:
            return reply.result(timeout)
        except TimeoutError:
            raise StoreUnavailable(f"SQLite did not answer within {timeout:g} s") from None

    def _submit(self, job: _Job) -> None:
        if not self._running:
            raise StoreUnavailable("the store is closed")
        if self._queue.qsize() >= QUEUE_LIMIT:
            raise StoreUnavailable(f"{QUEUE_LIMIT} steps are waiting for SQLite")
        self._queue.put(job)

    def connect(self) -> LocalBus:
        return LocalBus(self._exchange)

    def publish(self, channel: str, payload: bytes) -> None:
        self._exchange.publish(channel, payload)

    def hold_live(self, incarnation: str) -> None:
        with self._live_lock:
            self._live[incarnation] = self._live.get(incarnation, 0) + 1

    def drop_live(self, incarnation: str) -> None:
        with self._live_lock:
            self._live[incarnation] -= 1
            if not self._live[incarnation]:
                del self._live[incarnation]

    # -- in the database thread ------------------------------------------------------------------------------

    def _serve(self) -> None:
        file = self._directory / "convener.db"
        try:
            with _lock(self._directory), closing(_connect(file, self._synchronous)) as db:
                tables = SQLiteTables(db, self._live)
                self._bury_all(db, tables)
                self._ready.set_result(None)
                self._loop(db, tables)
        except Exception as error:
            if self._ready.done():
                _log.exception("the SQLite thread ended")
            else:
                self._ready.set_exception(_translated(error))
        finally:
            self._running = False
            self._refuse_rest()
            self._gone.set_result(None)

    def _bury_all(self, db: sqlite3.Connection, tables: SQLiteTables) -> None:
        """Bury the members of the process that had the directory before: the lock proves that it is gone."""

        def step(t: Tables) -> None:
            t.set_membership(membership.inherit(t.membership(), t.now))

        job = _Job(step, Future())
        self._transact(db, tables, [job])
        if job.error is not None:
            raise job.error

    def _loop(self, db: sqlite3.Connection, tables: SQLiteTables) -> None:
        while (job := self._queue.get()) is not None:
            jobs = [job]
            while len(jobs) < BATCH and not self._queue.empty():
                following = self._queue.get()  # This thread alone takes from the queue: it does not wait.
                if following is None:
                    self._queue.put(None)
                    break
                jobs.append(following)
            self._transact(db, tables, jobs)
            self._deliver(jobs)

    def _transact(self, db: sqlite3.Connection, tables: SQLiteTables, jobs: list[_Job]) -> None:
        """Run steps in one transaction; if any fails, none has happened, and each is tried alone."""
        try:
            db.execute("BEGIN")
            for job in jobs:
                tables.now = self._clock()
                job.value = job.step(tables)
            db.execute("COMMIT")
        except Exception as error:
            if db.in_transaction:
                db.execute("ROLLBACK")
            tables.revert()
            if len(jobs) == 1:
                jobs[0].error = _translated(error)
                return
            for job in jobs:
                self._transact(db, tables, [job])
        else:
            for channel, message in tables.keep():
                self._exchange.publish(channel, message.encode())

    def _deliver(self, jobs: list[_Job]) -> None:
        """One wake-up for each event loop that waits."""
        loops: dict[asyncio.AbstractEventLoop, list[_Job]] = {}
        for job in jobs:
            if isinstance(job.reply, asyncio.Future):
                loops.setdefault(job.reply.get_loop(), []).append(job)
            else:
                job.settle()
        for loop, waiting in loops.items():
            with suppress(RuntimeError):  # Closed meanwhile: nobody waits.
                loop.call_soon_threadsafe(_settle_all, waiting)

    def _refuse_rest(self) -> None:
        """Answer what came in after the end."""
        while True:
            try:
                job = self._queue.get_nowait()
            except queue.Empty:
                return
            if job is not None:
                job.error = StoreUnavailable("the store is closed")
                self._deliver([job])


class SQLiteStore(LocalStore):
    """A `Store` in SQLite.

    Args:
        path: the data directory, made if it is missing; one process at a time may have it open.
        now_ms: the store's clock in ms since 1970; it must not go back.
        synchronous: ``FULL`` survives a power failure too, see above.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        now_ms: Callable[[], int] | None = None,
        synchronous: Synchronous = "NORMAL",
    ) -> None:
        super().__init__(SQLiteEngine(Path(path), now_ms or WallClock(), synchronous))
