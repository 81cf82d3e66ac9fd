"""The tables of a local store in SQLite.

The membership is kept in memory: only who is a member, who is buried, and the version are written. Leases
need not outlive the process, since whoever opens the database buries all former members.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Mapping, Sequence
from dataclasses import astuple, fields
from typing import Final

from convener.core.admission import Slot, Waiting
from convener.core.directory import Record
from convener.core.membership import Member, Membership
from convener.core.model import InboxEntry, LogEntry, Meta
from convener.store.memory import membership_keys
from convener.store.tables import shard_of, timer_shard

SCHEMA_VERSION: Final = 3
FIRST_VERSION: Final = 2
"""The schema of the first release; an older one was never released."""

_HEAD: Final = ", ".join(field.name for field in fields(Meta))
_RECORD: Final = "conversation_id, user, status, epoch, nonce, since, version"

SCHEMA: Final = f"""
CREATE TABLE head (cid TEXT PRIMARY KEY, {_HEAD}) WITHOUT ROWID;
CREATE TABLE state (cid TEXT PRIMARY KEY, state BLOB NOT NULL);
CREATE TABLE log (cid TEXT, seq INTEGER, epoch INTEGER NOT NULL, event TEXT NOT NULL, PRIMARY KEY (cid, seq))
    WITHOUT ROWID;
CREATE TABLE inbox (cid TEXT, position INTEGER, message_id TEXT NOT NULL, kind TEXT NOT NULL,
    user TEXT NOT NULL, ts INTEGER NOT NULL, data TEXT NOT NULL, PRIMARY KEY (cid, position)) WITHOUT ROWID;
CREATE TABLE seen (cid TEXT, message_id TEXT, position INTEGER NOT NULL, PRIMARY KEY (cid, message_id))
    WITHOUT ROWID;
CREATE INDEX seen_by_position ON seen (cid, position);
CREATE TABLE asks (cid TEXT, ask_id TEXT, data TEXT NOT NULL, PRIMARY KEY (cid, ask_id)) WITHOUT ROWID;
CREATE TABLE alarms (cid TEXT, alarm_id TEXT, data TEXT NOT NULL, PRIMARY KEY (cid, alarm_id)) WITHOUT ROWID;
CREATE TABLE timers (cid TEXT, timer_id TEXT, shard INTEGER NOT NULL, due INTEGER NOT NULL,
    PRIMARY KEY (cid, timer_id)) WITHOUT ROWID;
CREATE INDEX timers_by_due ON timers (shard, due);
CREATE TABLE slots (user TEXT, cid TEXT, nonce TEXT NOT NULL, incarnation TEXT NOT NULL,
    PRIMARY KEY (user, cid)) WITHOUT ROWID;
CREATE TABLE waiting (place INTEGER PRIMARY KEY, user TEXT NOT NULL, cid TEXT NOT NULL,
    incarnation TEXT NOT NULL, reason TEXT NOT NULL, since INTEGER NOT NULL, UNIQUE (user, cid));
CREATE TABLE members (incarnation TEXT PRIMARY KEY) WITHOUT ROWID;
CREATE TABLE dead (incarnation TEXT PRIMARY KEY, buried INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE membership (version INTEGER NOT NULL);
INSERT INTO membership VALUES (0);
CREATE TABLE nodes (incarnation TEXT PRIMARY KEY, node_version INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE records (incarnation TEXT, conversation_id TEXT, user TEXT NOT NULL, status TEXT NOT NULL,
    epoch INTEGER NOT NULL, nonce TEXT NOT NULL, since INTEGER NOT NULL, version INTEGER NOT NULL,
    PRIMARY KEY (incarnation, conversation_id)) WITHOUT ROWID;
CREATE TABLE connections (incarnation TEXT, connection TEXT, cid TEXT NOT NULL,
    PRIMARY KEY (incarnation, connection)) WITHOUT ROWID;
CREATE TABLE lists (user TEXT, cid TEXT, activity INTEGER NOT NULL, PRIMARY KEY (user, cid)) WITHOUT ROWID;
CREATE INDEX lists_by_activity ON lists (user, activity, cid);
CREATE TABLE everything (shard INTEGER, cid TEXT, PRIMARY KEY (shard, cid)) WITHOUT ROWID;
"""

MIGRATIONS: Final[Mapping[int, str]] = {
    2: """
ALTER TABLE head ADD COLUMN archived NOT NULL DEFAULT 0;
ALTER TABLE head ADD COLUMN archived_epoch NOT NULL DEFAULT 0;
ALTER TABLE head ADD COLUMN manifest NOT NULL DEFAULT '';
""",
}
"""What makes the next schema out of one."""

_PUT_HEAD: Final = f"INSERT OR REPLACE INTO head VALUES ({','.join('?' * (1 + len(fields(Meta))))})"


class _Base:
    db: sqlite3.Connection

    def __init__(self, connection: sqlite3.Connection) -> None:
        self.db = connection


class _ConversationTables(_Base):
    _pieces: dict[str, list[str]]
    _undo: list[tuple[str, list[str], int]]
    """What was done to pieces: the list, and its length before."""

    def meta(self, cid: str) -> Meta | None:
        row = self.db.execute(f"SELECT {_HEAD} FROM head WHERE cid = ?", (cid,)).fetchone()
        return None if row is None else Meta(*row)

    def set_meta(self, cid: str, meta: Meta) -> None:
        self.db.execute(_PUT_HEAD, (cid, *astuple(meta)))

    def tip(self, cid: str) -> tuple[int, int]:
        query = "SELECT epoch, seq FROM log WHERE cid = ? ORDER BY seq DESC LIMIT 1"
        row = self.db.execute(query, (cid,)).fetchone()
        return (0, 0) if row is None else (row[0], row[1])

    def add_log(self, cid: str, entries: Sequence[LogEntry]) -> None:
        # INSERT, not REPLACE: the primary key is a second guard of I4.
        rows = [(cid, entry.seq, entry.epoch, entry.event) for entry in entries]
        self.db.executemany("INSERT INTO log VALUES (?, ?, ?, ?)", rows)

    def trim_log(self, cid: str, seq: int) -> None:
        self.db.execute("DELETE FROM log WHERE cid = ? AND seq <= ?", (cid, seq))

    def log(self, cid: str, after: int, limit: int) -> tuple[LogEntry, ...]:
        query = "SELECT epoch, seq, event FROM log WHERE cid = ? AND seq > ? ORDER BY seq LIMIT ?"
        return tuple(LogEntry(*row) for row in self.db.execute(query, (cid, after, limit)))

    def epoch_at(self, cid: str, seq: int) -> int | None:
        row = self.db.execute("SELECT epoch FROM log WHERE cid = ? AND seq = ?", (cid, seq)).fetchone()
        return None if row is None else row[0]

    def inbox(self, cid: str) -> tuple[InboxEntry, ...]:
        query = "SELECT position, message_id, kind, user, ts, data FROM inbox WHERE cid = ? ORDER BY position"
        return tuple(InboxEntry(*row) for row in self.db.execute(query, (cid,)))

    def add_inbox(self, cid: str, entry: InboxEntry) -> None:
        self.db.execute("INSERT INTO inbox VALUES (?, ?, ?, ?, ?, ?, ?)", (cid, *astuple(entry)))

    def drop_inbox(self, cid: str, position: int) -> None:
        self.db.execute("DELETE FROM inbox WHERE cid = ? AND position = ?", (cid, position))

    def trim_inbox(self, cid: str, position: int) -> None:
        self.db.execute("DELETE FROM inbox WHERE cid = ? AND position <= ?", (cid, position))

    def seen(self, cid: str, message_id: str) -> int | None:
        query = "SELECT position FROM seen WHERE cid = ? AND message_id = ?"
        row = self.db.execute(query, (cid, message_id)).fetchone()
        return None if row is None else row[0]

    def all_seen(self, cid: str) -> Mapping[str, int]:
        return dict(self.db.execute("SELECT message_id, position FROM seen WHERE cid = ?", (cid,)))

    def remember(self, cid: str, message_id: str, position: int) -> None:
        self.db.execute("INSERT OR REPLACE INTO seen VALUES (?, ?, ?)", (cid, message_id, position))

    def forget_id(self, cid: str, message_id: str) -> None:
        self.db.execute("DELETE FROM seen WHERE cid = ? AND message_id = ?", (cid, message_id))

    def trim_seen(self, cid: str, position: int) -> None:
        if position > 0:
            self.db.execute("DELETE FROM seen WHERE cid = ? AND position BETWEEN 1 AND ?", (cid, position))

    def state(self, cid: str) -> bytes | None:
        row = self.db.execute("SELECT state FROM state WHERE cid = ?", (cid,)).fetchone()
        return None if row is None else row[0]

    def set_state(self, cid: str, state: bytes) -> None:
        self.db.execute("INSERT OR REPLACE INTO state VALUES (?, ?)", (cid, state))

    def asks(self, cid: str) -> Mapping[str, str]:
        return dict(self.db.execute("SELECT ask_id, data FROM asks WHERE cid = ?", (cid,)))

    def open_ask(self, cid: str, ask_id: str, data: str) -> None:
        self.db.execute("INSERT OR REPLACE INTO asks VALUES (?, ?, ?)", (cid, ask_id, data))

    def close_asks(self, cid: str, ask_id: str) -> None:
        self.db.execute("DELETE FROM asks WHERE cid = ?1 AND (?2 = '' OR ask_id = ?2)", (cid, ask_id))

    def pieces(self, cid: str) -> tuple[str, ...]:
        return tuple(self._pieces.get(cid, ()))

    def add_pieces(self, cid: str, pieces: Sequence[str]) -> None:
        # In memory: an attempt that dies with the process leaves nothing to go on with.
        held = self._pieces.setdefault(cid, [])
        self._undo.append((cid, held, len(held)))
        held.extend(pieces)

    def clear_pieces(self, cid: str) -> None:
        held = self._pieces.pop(cid, None)
        if held is not None:
            self._undo.append((cid, held, len(held)))

    def revert_pieces(self) -> None:
        """Undo what was done to pieces since `keep`: the latest first."""
        while self._undo:
            cid, held, length = self._undo.pop()
            del held[length:]
            if held:
                self._pieces[cid] = held
            else:
                self._pieces.pop(cid, None)

    def alarms(self, cid: str) -> Mapping[str, str]:
        return dict(self.db.execute("SELECT alarm_id, data FROM alarms WHERE cid = ?", (cid,)))

    def add_alarm(self, cid: str, alarm_id: str, data: str) -> None:
        self.db.execute("INSERT OR REPLACE INTO alarms VALUES (?, ?, ?)", (cid, alarm_id, data))

    def drop_alarm(self, cid: str, alarm_id: str) -> bool:
        query = "DELETE FROM alarms WHERE cid = ? AND alarm_id = ?"
        return self.db.execute(query, (cid, alarm_id)).rowcount > 0

    def erase(self, cid: str) -> None:
        self.clear_pieces(cid)
        for table in ("head", "state", "log", "inbox", "seen", "asks", "alarms"):
            self.db.execute(f"DELETE FROM {table} WHERE cid = ?", (cid,))


class _TimerTables(_Base):
    def set_timer(self, cid: str, timer_id: str, due: int) -> None:
        row = (cid, timer_id, timer_shard(cid), due)
        self.db.execute("INSERT OR REPLACE INTO timers VALUES (?, ?, ?, ?)", row)

    def clear_timer(self, cid: str, timer_id: str) -> bool:
        query = "DELETE FROM timers WHERE cid = ? AND timer_id = ?"
        return self.db.execute(query, (cid, timer_id)).rowcount > 0

    def due_timers(self, shard: int, until: int, limit: int) -> Sequence[tuple[str, str, int]]:
        query = (
            "SELECT cid, timer_id, due FROM timers WHERE shard = ? AND due <= ?"
            " ORDER BY due, cid || '|' || timer_id LIMIT ?"
        )
        return list(self.db.execute(query, (shard, until, max(limit, 0))))


class _UserTables(_Base):
    def slots(self, user: str) -> Mapping[str, Slot]:
        rows = self.db.execute("SELECT cid, nonce, incarnation FROM slots WHERE user = ?", (user,))
        return {cid: Slot(nonce, incarnation) for cid, nonce, incarnation in rows}

    def slot(self, user: str, cid: str) -> Slot | None:
        query = "SELECT nonce, incarnation FROM slots WHERE user = ? AND cid = ?"
        row = self.db.execute(query, (user, cid)).fetchone()
        return None if row is None else Slot(*row)

    def put_slot(self, user: str, cid: str, slot: Slot) -> None:
        row = (user, cid, slot.nonce, slot.incarnation)
        self.db.execute("INSERT OR REPLACE INTO slots VALUES (?, ?, ?, ?)", row)

    def drop_slot(self, user: str, cid: str) -> None:
        self.db.execute("DELETE FROM slots WHERE user = ? AND cid = ?", (user, cid))

    def waiting(self, user: str) -> tuple[Waiting, ...]:
        query = "SELECT cid, incarnation, reason, since FROM waiting WHERE user = ? ORDER BY place"
        return tuple(Waiting(*row) for row in self.db.execute(query, (user,)))

    def put_waiting(self, user: str, entry: Waiting) -> None:
        self.db.execute(
            "INSERT INTO waiting (user, cid, incarnation, reason, since) VALUES (?, ?, ?, ?, ?)"
            " ON CONFLICT (user, cid) DO UPDATE SET incarnation = excluded.incarnation,"
            " reason = excluded.reason, since = excluded.since",
            (user, *astuple(entry)),
        )

    def drop_waiting(self, user: str, cid: str) -> bool:
        deleted = self.db.execute("DELETE FROM waiting WHERE user = ? AND cid = ?", (user, cid))
        return deleted.rowcount > 0


class _NodeTables(_Base):
    def __init__(self, connection: sqlite3.Connection, live: Mapping[str, int]) -> None:
        super().__init__(connection)
        self._live = live
        self._membership: Membership = self._read_membership()

    def _read_membership(self) -> Membership:
        names = [row[0] for row in self.db.execute("SELECT incarnation FROM members")]
        dead = dict(self.db.execute("SELECT incarnation, buried FROM dead"))
        (version,) = self.db.execute("SELECT version FROM membership").fetchone()
        return Membership(dict.fromkeys(names, Member(0, 0, 0)), dead, version)

    def membership(self) -> Membership:
        return self._membership

    def set_membership(self, state: Membership) -> None:
        before, self._membership = self._membership, state
        if state.members.keys() != before.members.keys():
            self.db.execute("DELETE FROM members")
            self.db.executemany("INSERT INTO members VALUES (?)", [(name,) for name in state.members])
        if state.dead != before.dead:
            self.db.execute("DELETE FROM dead")
            self.db.executemany("INSERT INTO dead VALUES (?, ?)", list(state.dead.items()))
        if state.version != before.version:
            self.db.execute("UPDATE membership SET version = ?", (state.version,))

    def live(self, incarnation: str) -> int:
        return self._live.get(incarnation, 0)

    def node_version(self, incarnation: str) -> int:
        query = "SELECT node_version FROM nodes WHERE incarnation = ?"
        row = self.db.execute(query, (incarnation,)).fetchone()
        return 0 if row is None else row[0]

    def set_node_version(self, incarnation: str, version: int) -> None:
        self.db.execute("INSERT OR REPLACE INTO nodes VALUES (?, ?)", (incarnation, version))

    def record(self, incarnation: str, cid: str) -> Record | None:
        query = f"SELECT {_RECORD} FROM records WHERE incarnation = ? AND conversation_id = ?"
        row = self.db.execute(query, (incarnation, cid)).fetchone()
        return None if row is None else Record(*row)

    def records(self, incarnation: str) -> tuple[Record, ...]:
        rows = self.db.execute(f"SELECT {_RECORD} FROM records WHERE incarnation = ?", (incarnation,))
        return tuple(Record(*row) for row in rows)

    def put_record(self, incarnation: str, record: Record) -> None:
        row = (incarnation, *astuple(record))
        self.db.execute("INSERT OR REPLACE INTO records VALUES (?, ?, ?, ?, ?, ?, ?, ?)", row)

    def drop_record(self, incarnation: str, cid: str) -> None:
        query = "DELETE FROM records WHERE incarnation = ? AND conversation_id = ?"
        self.db.execute(query, (incarnation, cid))

    def connections(self, incarnation: str) -> Mapping[str, str]:
        query = "SELECT connection, cid FROM connections WHERE incarnation = ?"
        return dict(self.db.execute(query, (incarnation,)))

    def connect(self, incarnation: str, connection: str, cid: str) -> None:
        self.db.execute("INSERT OR REPLACE INTO connections VALUES (?, ?, ?)", (incarnation, connection, cid))

    def disconnect(self, incarnation: str, connection: str) -> None:
        query = "DELETE FROM connections WHERE incarnation = ? AND connection = ?"
        self.db.execute(query, (incarnation, connection))

    def drop_node(self, incarnation: str) -> None:
        for table in ("nodes", "records", "connections"):
            self.db.execute(f"DELETE FROM {table} WHERE incarnation = ?", (incarnation,))


class _IndexTables(_Base):
    def index(self, user: str, cid: str, activity: int) -> None:
        self.db.execute("INSERT OR REPLACE INTO lists VALUES (?, ?, ?)", (user, cid, activity))
        self.db.execute("INSERT OR IGNORE INTO everything VALUES (?, ?)", (shard_of(cid), cid))

    def touch(self, user: str, cid: str, activity: int) -> None:
        query = "UPDATE lists SET activity = ? WHERE user = ? AND cid = ?"
        self.db.execute(query, (activity, user, cid))

    def unindex(self, user: str, cid: str) -> None:
        self.db.execute("DELETE FROM lists WHERE user = ? AND cid = ?", (user, cid))
        self.db.execute("DELETE FROM everything WHERE shard = ? AND cid = ?", (shard_of(cid), cid))

    def list_user(self, user: str, before: tuple[int, str] | None, limit: int) -> Sequence[tuple[str, int]]:
        where = "" if before is None else " AND (activity, cid) < (?, ?)"
        query = f"SELECT cid, activity FROM lists WHERE user = ?{where} ORDER BY activity DESC, cid DESC LIMIT ?"
        rows = self.db.execute(query, (user, *(before or ()), max(limit, 0)))
        return [(cid, activity) for cid, activity in rows]

    def list_all(self, shard: int, after: str, limit: int) -> Sequence[str]:
        query = "SELECT cid FROM everything WHERE shard = ? AND cid > ? ORDER BY cid LIMIT ?"
        return [row[0] for row in self.db.execute(query, (shard, after, max(limit, 0)))]


class SQLiteTables(_ConversationTables, _TimerTables, _UserTables, _NodeTables, _IndexTables):
    """`Tables` over one connection; used by one thread.

    Args:
        live: how many hold each incarnation's `live` channel.
    """

    def __init__(self, connection: sqlite3.Connection, live: Mapping[str, int]) -> None:
        self._pieces, self._undo = {}, []
        _NodeTables.__init__(self, connection, live)
        self.now = 0
        self._kept = self._membership
        self._said: list[tuple[str, str]] = []

    def publish(self, channel: str, message: str) -> None:
        self._said.append((channel, message))

    def keep(self) -> list[tuple[str, str]]:
        """The transaction was committed: what is in memory holds, what was said may be published."""
        self._kept = self._membership
        self._undo.clear()
        said, self._said = self._said, []
        return said

    def revert(self) -> None:
        """The transaction was rolled back: so is what is in memory."""
        self._membership = self._kept
        self.revert_pieces()
        self._said = []

    def keys(self) -> set[str]:
        queries = {
            "c:{}:meta": "SELECT cid FROM head",
            "c:{}:log": "SELECT cid FROM log",
            "c:{}:in": "SELECT cid FROM inbox",
            "c:{}:seen": "SELECT cid FROM seen",
            "c:{}:state": "SELECT cid FROM state",
            "c:{}:asks": "SELECT cid FROM asks",
            "c:{}:alarms": "SELECT cid FROM alarms",
            "t:{}:due": "SELECT shard FROM timers",
            "u:{}:slots": "SELECT user FROM slots",
            "u:{}:wait": "SELECT user FROM waiting",
            "u:{}:conversations": "SELECT user FROM lists",
            "i:{}": "SELECT shard FROM everything",
            "n:{}:conversations": "SELECT incarnation FROM nodes UNION SELECT incarnation FROM records"
            " UNION SELECT incarnation FROM connections",
        }
        names = {name.format(row[0]) for name, query in queries.items() for row in self.db.execute(query)}
        names |= {f"c:{cid}:tail" for cid in self._pieces}
        return names | membership_keys(self._membership)
