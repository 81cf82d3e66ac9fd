"""A store in memory, for tests and the standalone mode without `--data`: as strict as Redis, gone at exit."""

from __future__ import annotations

import asyncio
import threading
from bisect import bisect_left, bisect_right, insort
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice, takewhile
from types import MappingProxyType
from typing import Final

from convener.core.admission import Slot, Waiting
from convener.core.directory import Record
from convener.core.membership import Membership
from convener.core.model import InboxEntry, LogEntry, Meta
from convener.errors import StoreUnavailable
from convener.store.clock import WallClock
from convener.store.local import LocalStore
from convener.store.localbus import Exchange, LocalBus
from convener.store.tables import Step, T, shard_of, timer_shard

_NOTHING: Final[Mapping[str, str]] = MappingProxyType({})


@dataclass(slots=True)
class _Conversation:
    """Lists, not deques: they are short (the inbox is bounded), and an empty one costs a tenth."""

    meta: Meta
    log: list[LogEntry] = field(default_factory=list[LogEntry])
    inbox: list[InboxEntry] = field(default_factory=list[InboxEntry])
    seen: dict[str, int] = field(default_factory=dict[str, int])
    state: bytes | None = None
    asks: dict[str, str] = field(default_factory=dict[str, str])
    pieces: list[str] = field(default_factory=list[str])
    alarms: dict[str, str] = field(default_factory=dict[str, str])


@dataclass(slots=True)
class _User:
    slots: dict[str, Slot] = field(default_factory=dict[str, Slot])
    waiting: dict[str, Waiting] = field(default_factory=dict[str, Waiting])


@dataclass(slots=True)
class _Node:
    version: int = 0
    records: dict[str, Record] = field(default_factory=dict[str, Record])
    connections: dict[str, str] = field(default_factory=dict[str, str])


@dataclass(slots=True)
class _List:
    """Conversations of one user: last activity of each, and the same in order."""

    activity: dict[str, int] = field(default_factory=dict[str, int])
    order: list[tuple[int, str]] = field(default_factory=list[tuple[int, str]])


@dataclass(slots=True)
class _Timers:
    """One part of what is to happen when: ``conversation|timer`` by time, and the same in order."""

    due: dict[str, int] = field(default_factory=dict[str, int])
    order: list[tuple[int, str]] = field(default_factory=list[tuple[int, str]])


def _apart(member: str) -> tuple[str, str]:
    cid, _, timer_id = member.partition("|")
    return cid, timer_id


def _seq(entry: LogEntry) -> int:
    return entry.seq


class _ConversationTables:
    def __init__(self) -> None:
        self._conversations: dict[str, _Conversation] = {}

    def meta(self, cid: str) -> Meta | None:
        held = self._conversations.get(cid)
        return None if held is None else held.meta

    def set_meta(self, cid: str, meta: Meta) -> None:
        held = self._conversations.get(cid)
        if held is None:
            self._conversations[cid] = _Conversation(meta)
        else:
            held.meta = meta

    def tip(self, cid: str) -> tuple[int, int]:
        held = self._conversations.get(cid)
        return (held.log[-1].epoch, held.log[-1].seq) if held is not None and held.log else (0, 0)

    def add_log(self, cid: str, entries: Sequence[LogEntry]) -> None:
        self._conversations[cid].log.extend(entries)

    def trim_log(self, cid: str, seq: int) -> None:
        log = self._conversations[cid].log
        del log[: bisect_right(log, seq, key=_seq)]

    def log(self, cid: str, after: int, limit: int) -> tuple[LogEntry, ...]:
        log = self._conversations[cid].log
        start = bisect_right(log, after, key=_seq)
        return tuple(log[start : start + limit])

    def epoch_at(self, cid: str, seq: int) -> int | None:
        log = self._conversations[cid].log
        at = bisect_left(log, seq, key=_seq)
        return log[at].epoch if at < len(log) and log[at].seq == seq else None

    def inbox(self, cid: str) -> tuple[InboxEntry, ...]:
        held = self._conversations.get(cid)
        return tuple(held.inbox) if held is not None else ()

    def add_inbox(self, cid: str, entry: InboxEntry) -> None:
        self._conversations[cid].inbox.append(entry)

    def drop_inbox(self, cid: str, position: int) -> None:
        held = self._conversations[cid]
        held.inbox = [entry for entry in held.inbox if entry.position != position]

    def trim_inbox(self, cid: str, position: int) -> None:
        inbox = self._conversations[cid].inbox
        del inbox[: bisect_right(inbox, position, key=lambda entry: entry.position)]

    def seen(self, cid: str, message_id: str) -> int | None:
        held = self._conversations.get(cid)
        return None if held is None else held.seen.get(message_id)

    def all_seen(self, cid: str) -> Mapping[str, int]:
        held = self._conversations.get(cid)
        return {} if held is None else dict(held.seen)

    def remember(self, cid: str, message_id: str, position: int) -> None:
        self._conversations[cid].seen[message_id] = position

    def forget_id(self, cid: str, message_id: str) -> None:
        self._conversations[cid].seen.pop(message_id, None)

    def trim_seen(self, cid: str, position: int) -> None:
        # Ids are remembered in the order of their positions (but for 0), so what is to go comes first.
        seen = self._conversations[cid].seen
        first = takewhile(lambda item: item[1] <= position, seen.items())
        for message_id in [message_id for message_id, at in first if at > 0]:
            del seen[message_id]

    def state(self, cid: str) -> bytes | None:
        held = self._conversations.get(cid)
        return None if held is None else held.state

    def set_state(self, cid: str, state: bytes) -> None:
        self._conversations[cid].state = state

    def asks(self, cid: str) -> Mapping[str, str]:
        held = self._conversations.get(cid)
        return {} if held is None else dict(held.asks)

    def open_ask(self, cid: str, ask_id: str, data: str) -> None:
        self._conversations[cid].asks[ask_id] = data

    def close_asks(self, cid: str, ask_id: str) -> None:
        asks = self._conversations[cid].asks
        if ask_id:
            asks.pop(ask_id, None)
        else:
            asks.clear()

    def pieces(self, cid: str) -> tuple[str, ...]:
        held = self._conversations.get(cid)
        return () if held is None else tuple(held.pieces)

    def add_pieces(self, cid: str, pieces: Sequence[str]) -> None:
        self._conversations[cid].pieces.extend(pieces)

    def clear_pieces(self, cid: str) -> None:
        self._conversations[cid].pieces.clear()

    def alarms(self, cid: str) -> Mapping[str, str]:
        held = self._conversations.get(cid)
        return {} if held is None else dict(held.alarms)

    def add_alarm(self, cid: str, alarm_id: str, data: str) -> None:
        self._conversations[cid].alarms[alarm_id] = data

    def drop_alarm(self, cid: str, alarm_id: str) -> bool:
        held = self._conversations.get(cid)
        return held is not None and held.alarms.pop(alarm_id, None) is not None

    def erase(self, cid: str) -> None:
        self._conversations.pop(cid, None)


class _TimerTables:
    def __init__(self) -> None:
        self._timers: dict[int, _Timers] = {}

    def set_timer(self, cid: str, timer_id: str, due: int) -> None:
        self.clear_timer(cid, timer_id)
        held = self._timers.setdefault(timer_shard(cid), _Timers())
        held.due[f"{cid}|{timer_id}"] = due
        insort(held.order, (due, f"{cid}|{timer_id}"))

    def clear_timer(self, cid: str, timer_id: str) -> bool:
        shard, member = timer_shard(cid), f"{cid}|{timer_id}"
        held = self._timers.get(shard)
        due = None if held is None else held.due.pop(member, None)
        if held is None or due is None:
            return False
        del held.order[bisect_left(held.order, (due, member))]
        if not held.order:
            del self._timers[shard]
        return True

    def due_timers(self, shard: int, until: int, limit: int) -> Sequence[tuple[str, str, int]]:
        held = self._timers.get(shard)
        first = () if held is None else takewhile(lambda timer: timer[0] <= until, held.order)
        return [(*_apart(member), due) for due, member in islice(first, max(limit, 0))]


class _UserTables:
    def __init__(self) -> None:
        self._users: dict[str, _User] = {}

    def slots(self, user: str) -> Mapping[str, Slot]:
        held = self._users.get(user)
        return {} if held is None else held.slots

    def slot(self, user: str, cid: str) -> Slot | None:
        return self.slots(user).get(cid)

    def put_slot(self, user: str, cid: str, slot: Slot) -> None:
        self._users.setdefault(user, _User()).slots[cid] = slot

    def drop_slot(self, user: str, cid: str) -> None:
        held = self._users.get(user)
        if held is not None:
            held.slots.pop(cid, None)
            self._tidy(user, held)

    def waiting(self, user: str) -> tuple[Waiting, ...]:
        held = self._users.get(user)
        return () if held is None else tuple(held.waiting.values())

    def put_waiting(self, user: str, entry: Waiting) -> None:
        self._users.setdefault(user, _User()).waiting[entry.conversation_id] = entry

    def drop_waiting(self, user: str, cid: str) -> bool:
        held = self._users.get(user)
        if held is None or held.waiting.pop(cid, None) is None:
            return False
        self._tidy(user, held)
        return True

    def _tidy(self, user: str, held: _User) -> None:
        if not held.slots and not held.waiting:
            del self._users[user]


class _NodeTables:
    def __init__(self) -> None:
        self._membership = Membership()
        self._nodes: dict[str, _Node] = {}
        self.live_holders: dict[str, int] = {}

    def membership(self) -> Membership:
        return self._membership

    def set_membership(self, state: Membership) -> None:
        self._membership = state

    def live(self, incarnation: str) -> int:
        return self.live_holders.get(incarnation, 0)

    def _node(self, incarnation: str) -> _Node:
        return self._nodes.setdefault(incarnation, _Node())

    def node_version(self, incarnation: str) -> int:
        held = self._nodes.get(incarnation)
        return 0 if held is None else held.version

    def set_node_version(self, incarnation: str, version: int) -> None:
        self._node(incarnation).version = version

    def record(self, incarnation: str, cid: str) -> Record | None:
        held = self._nodes.get(incarnation)
        return None if held is None else held.records.get(cid)

    def records(self, incarnation: str) -> tuple[Record, ...]:
        held = self._nodes.get(incarnation)
        return () if held is None else tuple(held.records.values())

    def put_record(self, incarnation: str, record: Record) -> None:
        self._node(incarnation).records[record.conversation_id] = record

    def drop_record(self, incarnation: str, cid: str) -> None:
        self._node(incarnation).records.pop(cid, None)

    def connections(self, incarnation: str) -> Mapping[str, str]:
        held = self._nodes.get(incarnation)
        return _NOTHING if held is None else held.connections

    def connect(self, incarnation: str, connection: str, cid: str) -> None:
        self._node(incarnation).connections[connection] = cid

    def disconnect(self, incarnation: str, connection: str) -> None:
        self._node(incarnation).connections.pop(connection, None)

    def drop_node(self, incarnation: str) -> None:
        self._nodes.pop(incarnation, None)


class _IndexTables:
    def __init__(self) -> None:
        self._lists: dict[str, _List] = {}
        self._shards: dict[int, list[str]] = {}

    def index(self, user: str, cid: str, activity: int) -> None:
        held = self._lists.setdefault(user, _List())
        if cid not in held.activity:
            held.activity[cid] = activity
            insort(held.order, (activity, cid))
        self.touch(user, cid, activity)
        shard = self._shards.setdefault(shard_of(cid), [])
        at = bisect_left(shard, cid)
        if shard[at : at + 1] != [cid]:
            shard.insert(at, cid)

    def touch(self, user: str, cid: str, activity: int) -> None:
        held = self._lists.get(user)
        before = None if held is None else held.activity.get(cid)
        if held is not None and before is not None:
            del held.order[bisect_left(held.order, (before, cid))]
            held.activity[cid] = activity
            insort(held.order, (activity, cid))

    def unindex(self, user: str, cid: str) -> None:
        held = self._lists.get(user)
        before = None if held is None else held.activity.pop(cid, None)
        if held is not None and before is not None:
            del held.order[bisect_left(held.order, (before, cid))]
            if not held.order:
                del self._lists[user]
        number = shard_of(cid)
        shard = self._shards.get(number, [])
        at = bisect_left(shard, cid)
        if shard[at : at + 1] == [cid]:
            del shard[at]
            if not shard:
                del self._shards[number]

    def list_user(self, user: str, before: tuple[int, str] | None, limit: int) -> Sequence[tuple[str, int]]:
        order = self._lists[user].order if user in self._lists else []
        end = len(order) if before is None else bisect_left(order, before)
        return [(cid, activity) for activity, cid in reversed(order[max(0, end - max(limit, 0)) : end])]

    def list_all(self, shard: int, after: str, limit: int) -> Sequence[str]:
        held = self._shards.get(shard, [])
        start = bisect_right(held, after)
        return held[start : start + max(limit, 0)]


class MemoryTables(_ConversationTables, _TimerTables, _UserTables, _NodeTables, _IndexTables):
    """`Tables` in dictionaries. A step cannot fail half-way, so there is nothing to roll back."""

    def __init__(self) -> None:
        _ConversationTables.__init__(self)
        _TimerTables.__init__(self)
        _UserTables.__init__(self)
        _NodeTables.__init__(self)
        _IndexTables.__init__(self)
        self.now = 0
        self.said: list[tuple[str, str]] = []

    def publish(self, channel: str, message: str) -> None:
        self.said.append((channel, message))

    def keys(self) -> set[str]:
        names: set[str] = set()
        for cid, c in self._conversations.items():
            parts = {"meta": True, "log": c.log, "in": c.inbox, "seen": c.seen, "state": c.state is not None}
            parts |= {"asks": c.asks, "tail": c.pieces, "alarms": c.alarms}
            names |= {f"c:{cid}:{part}" for part, held in parts.items() if held}
        for user, u in self._users.items():
            names |= {f"u:{user}:slots"} if u.slots else set()
            names |= {f"u:{user}:wait"} if u.waiting else set()
        names |= {f"u:{user}:conversations" for user in self._lists}
        names |= {f"i:{number}" for number in self._shards}
        names |= {f"t:{number}:due" for number in self._timers}
        names |= {f"n:{incarnation}:conversations" for incarnation in self._nodes}
        return names | membership_keys(self._membership)


def membership_keys(state: Membership) -> set[str]:
    """Names of the keys of the membership that hold anything."""
    parts = {
        "lease": state.members,
        "info": state.members,
        "dead": state.dead,
        "ver": state.version,
        "pulse": state.pulse,
        "grace": state.grace,
        "why": state.burials,
    }
    return {f"m:{part}" for part, held in parts.items() if held}


class MemoryEngine:
    """Runs each step at once, under a lock; the reply comes a turn of the event loop later, as from afar."""

    kind = "memory"
    version: str | None = None

    def __init__(self, now_ms: Callable[[], int]) -> None:
        self._clock = now_ms
        self._lock = threading.RLock()
        self._tables = MemoryTables()
        self._exchange = Exchange()

    async def open(self) -> None:
        """Nothing to open."""

    async def close(self) -> None:
        """Nothing to close: the data lives as long as somebody has the engine."""

    async def run(self, step: Step[T]) -> T:
        reply = self._run(step)
        await asyncio.sleep(0)
        return reply

    def _run(self, step: Step[T]) -> T:
        with self._lock:
            tables = self._tables
            tables.now = self._clock()
            reply = step(tables)
            if tables.said:
                said, tables.said = tables.said, []
                for channel, message in said:
                    self._exchange.publish(channel, message.encode())
            return reply

    def run_from_thread(self, step: Step[T], timeout: float) -> T:
        if not self._lock.acquire(timeout=timeout):
            raise StoreUnavailable("the store did not answer in time")
        try:
            return self._run(step)
        finally:
            self._lock.release()

    def connect(self) -> LocalBus:
        return LocalBus(self._exchange)

    def publish(self, channel: str, payload: bytes) -> None:
        self._exchange.publish(channel, payload)

    def hold_live(self, incarnation: str) -> None:
        with self._lock:
            live = self._tables.live_holders
            live[incarnation] = live.get(incarnation, 0) + 1

    def drop_live(self, incarnation: str) -> None:
        with self._lock:
            live = self._tables.live_holders
            live[incarnation] -= 1
            if not live[incarnation]:
                del live[incarnation]


class MemoryStore(LocalStore):
    """A `Store` in memory.

    `peer` gives further stores over the same data, one for each manager that shares it.

    Args:
        now_ms: the store's clock in ms since 1970; it must not go back.
    """

    def __init__(self, now_ms: Callable[[], int] | None = None) -> None:
        super().__init__(MemoryEngine(now_ms or WallClock()))
