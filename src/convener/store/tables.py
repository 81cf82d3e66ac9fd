"""What the local stores must provide below `store.local`: tables, and an engine that runs steps over them.

A *step* is a function of `Tables`. It reads what the core's transition needs, calls the transition and writes
its effects. The engine runs each step in one transaction and publishes what it said only if that is kept.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Final, Protocol, TypeVar

from convener.core.admission import Slot, Waiting
from convener.core.directory import Record
from convener.core.membership import Membership
from convener.core.model import InboxEntry, LogEntry, Meta
from convener.store.localbus import LocalBus

T = TypeVar("T")

SHARDS: Final = 64
"""Parts of the list of all conversations."""


def shard_of(cid: str) -> int:
    """The part of the list of all that holds `cid`."""
    return zlib.crc32(cid.encode()) % SHARDS


TIMER_SHARDS: Final = 16
"""Parts of the list of what is to happen when; each is polled by one node."""


def timer_shard(cid: str) -> int:
    """The part of that list that holds what is to happen to `cid`."""
    return zlib.crc32(cid.encode()) % TIMER_SHARDS


def channel_name(kind: str, ident: str = "") -> str:
    """Name of a channel on a local bus."""
    return f"{kind}:{ident}" if ident else kind


class ConversationTables(Protocol):
    """Head, log, inbox, remembered message ids and state of conversations."""

    def meta(self, cid: str) -> Meta | None: ...

    def set_meta(self, cid: str, meta: Meta) -> None:
        """Write the head; the only call that makes a conversation."""
        ...

    def tip(self, cid: str) -> tuple[int, int]:
        """(epoch, seq) of the last log entry, (0, 0) without one."""
        ...

    def add_log(self, cid: str, entries: Sequence[LogEntry]) -> None: ...

    def trim_log(self, cid: str, seq: int) -> None:
        """Remove the entries up to and including `seq`."""
        ...

    def log(self, cid: str, after: int, limit: int) -> tuple[LogEntry, ...]:
        """At most `limit` entries with a seq above `after`."""
        ...

    def epoch_at(self, cid: str, seq: int) -> int | None:
        """Epoch of the log entry `seq`, None if there is none."""
        ...

    def inbox(self, cid: str) -> tuple[InboxEntry, ...]: ...

    def add_inbox(self, cid: str, entry: InboxEntry) -> None: ...

    def drop_inbox(self, cid: str, position: int) -> None: ...

    def trim_inbox(self, cid: str, position: int) -> None:
        """Remove the entries up to and including `position`."""
        ...

    def seen(self, cid: str, message_id: str) -> int | None: ...

    def all_seen(self, cid: str) -> Mapping[str, int]: ...

    def remember(self, cid: str, message_id: str, position: int) -> None: ...

    def forget_id(self, cid: str, message_id: str) -> None: ...

    def trim_seen(self, cid: str, position: int) -> None:
        """Forget the ids with 0 < position <= `position`."""
        ...

    def state(self, cid: str) -> bytes | None: ...

    def set_state(self, cid: str, state: bytes) -> None: ...

    def asks(self, cid: str) -> Mapping[str, str]: ...

    def open_ask(self, cid: str, ask_id: str, data: str) -> None: ...

    def close_asks(self, cid: str, ask_id: str) -> None:
        """Close one question, or all without an id."""
        ...

    def pieces(self, cid: str) -> tuple[str, ...]: ...

    def add_pieces(self, cid: str, pieces: Sequence[str]) -> None: ...

    def clear_pieces(self, cid: str) -> None: ...

    def alarms(self, cid: str) -> Mapping[str, str]: ...

    def add_alarm(self, cid: str, alarm_id: str, data: str) -> None: ...

    def drop_alarm(self, cid: str, alarm_id: str) -> bool: ...

    def erase(self, cid: str) -> None:
        """Remove everything of the conversation; nothing if there is none."""
        ...


class UserTables(Protocol):
    """Slots and queued starts of users."""

    def slots(self, user: str) -> Mapping[str, Slot]: ...

    def slot(self, user: str, cid: str) -> Slot | None: ...

    def put_slot(self, user: str, cid: str, slot: Slot) -> None: ...

    def drop_slot(self, user: str, cid: str) -> None: ...

    def waiting(self, user: str) -> tuple[Waiting, ...]:
        """Queued starts, oldest first."""
        ...

    def put_waiting(self, user: str, entry: Waiting) -> None:
        """Enter at the end; an entry of the same conversation is replaced in its place."""
        ...

    def drop_waiting(self, user: str, cid: str) -> bool: ...


class NodeTables(Protocol):
    """Membership and what nodes say of themselves."""

    def membership(self) -> Membership: ...

    def set_membership(self, state: Membership) -> None: ...

    def live(self, incarnation: str) -> int:
        """How many hold the incarnation's `live` channel."""
        ...

    def node_version(self, incarnation: str) -> int: ...

    def set_node_version(self, incarnation: str, version: int) -> None: ...

    def record(self, incarnation: str, cid: str) -> Record | None: ...

    def records(self, incarnation: str) -> tuple[Record, ...]: ...

    def put_record(self, incarnation: str, record: Record) -> None: ...

    def drop_record(self, incarnation: str, cid: str) -> None: ...

    def connections(self, incarnation: str) -> Mapping[str, str]: ...

    def connect(self, incarnation: str, connection: str, cid: str) -> None: ...

    def disconnect(self, incarnation: str, connection: str) -> None: ...

    def drop_node(self, incarnation: str) -> None: ...


class IndexTables(Protocol):
    """Lists of conversations."""

    def index(self, user: str, cid: str, activity: int) -> None: ...

    def touch(self, user: str, cid: str, activity: int) -> None:
        """Set the activity of what is listed; nothing if it is not."""
        ...

    def unindex(self, user: str, cid: str) -> None: ...

    def list_user(self, user: str, before: tuple[int, str] | None, limit: int) -> Sequence[tuple[str, int]]: ...

    def list_all(self, shard: int, after: str, limit: int) -> Sequence[str]: ...


class TimerTables(Protocol):
    """What is to happen when."""

    def set_timer(self, cid: str, timer_id: str, due: int) -> None: ...

    def clear_timer(self, cid: str, timer_id: str) -> bool: ...

    def due_timers(self, shard: int, until: int, limit: int) -> Sequence[tuple[str, str, int]]: ...


class Tables(ConversationTables, TimerTables, UserTables, NodeTables, IndexTables, Protocol):
    """Everything a step may touch."""

    now: int
    """The store's clock in ms, read once per step."""

    def publish(self, channel: str, message: str) -> None:
        """Publish when (and only if) the step is kept."""
        ...

    def keys(self) -> set[str]:
        """Names of all keys that hold anything, as in the protocol's table of keys; for leak checks."""
        ...


Step = Callable[[Tables], T]


class Engine(Protocol):
    """Runs steps, each in one transaction, in the order in which they were handed in."""

    kind: str
    version: str | None

    async def open(self) -> None: ...

    async def close(self) -> None: ...

    async def run(self, step: Step[T]) -> T: ...

    def run_from_thread(self, step: Step[T], timeout: float) -> T:
        """The same from another thread, which waits at most `timeout` seconds.

        Raises:
            StoreUnavailable: not done in time, or closed.
        """
        ...

    def connect(self) -> LocalBus:
        """A new connection to the engine's bus."""
        ...

    def publish(self, channel: str, payload: bytes) -> None:
        """Publish outside any step."""
        ...

    def hold_live(self, incarnation: str) -> None: ...

    def drop_live(self, incarnation: str) -> None: ...
