"""All stores at once: the same random commands, the same replies, the same state, the same publications.

Every store has a clock of its own, and epochs are taken from it. So what is compared are not the numbers but their
order: each store's epochs are ranked, times are left out. Commands name epochs by rank as well ("the present one",
"the one before"), so a stale token is stale in all of them.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import asdict, dataclass, is_dataclass
from pathlib import Path
from typing import Any, cast

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from convener.core.admission import Slot
from convener.core.cursor import Cursor
from convener.core.directory import Record
from convener.core.model import (
    MESSAGES,
    REMEMBERED,
    AppendRequest,
    ClaimRequest,
    InboxEntry,
    Meta,
    NewMessage,
)
from convener.core.repair import RepairRequest
from convener.core.view import Place
from convener.core.wire import answer_event, event, input_event
from convener.store.base import Store
from convener.store.tables import timer_shard
from convener.testing.contract_checks.tools import until
from convener.testing.leaks import Touched, delete_everything
from tests.contract.conftest import KINDS
from tests.contract.harnesses import factory
from tests.support.servers import FLAVOURS, Server, binary

pytestmark = pytest.mark.anyio

NODES = ("a~1", "b~1")
ALARMS = ("alarm/1", "alarm/2", "m5")
"""The last one is an id of a message as well."""
TIMES = {"ts", "created", "updated", "since", "strike_at", "deadline", "pulse", "grace"}
EPOCHS = {"epoch", "floor"}
FIRST_TIME = 10**11
"""Numbers above it are epochs taken from a clock."""


@dataclass(frozen=True)
class Step:
    """One command; numbers are relative to what the store holds then."""

    name: str
    node: int = 0
    nonce: int = 0
    message: int = 0
    back: int = 0
    off: int = 0
    count: int = 1
    flag: bool = False


NAMES = (
    *("create", "send", "send", "send", "unsend", "claim", "claim", "claim", "resolve", "take_in", "take_in", "end"),
    *("append", "append", "release", "release", "disown", "stop", "finish", "resume", "patch", "erase", "read"),
    *("reserve", "reserve", "unreserve", "enqueue", "dequeue", "put_record", "drop_record", "flush"),
    *("index", "unindex", "interrupt", "ask", "ask", "answer", "answer", "begin", "pieces", "pieces", "park", "resume"),
    *("set_alarm", "set_alarm", "fire", "drop_alarm", "set_timer", "set_timer", "clear_timer", "repair", "repair"),
)
steps = st.builds(
    Step,
    name=st.sampled_from(NAMES),
    node=st.integers(0, 1),
    nonce=st.integers(0, 2),
    message=st.integers(1, 5),
    back=st.sampled_from([0, 0, 0, 0, 1, 2]),
    off=st.sampled_from([0, 0, 0, 0, -1, 1]),
    count=st.integers(0, 3),
    flag=st.booleans(),
)


class Subject:
    """One conversation `c` and one user `u` of one store."""

    def __init__(self, kind: str, store: Store, cid: str, user: str) -> None:
        self.kind = kind
        self.store = store
        self.cid = cid
        self.user = user
        self.epochs: list[int] = [0]
        self.heard: list[bytes] = []
        self.gaps = 0

    async def listen(self) -> None:
        await self.store.subscribe(self.store.channel("c", self.cid), self.heard.append, self._gap)

    def _gap(self) -> None:
        self.gaps += 1

    async def said(self) -> list[Any]:
        """Publications so far, as JSON."""
        mark = json.dumps({"mark": len(self.heard)}).encode()
        await self.store.publish(self.store.channel("c", self.cid), mark)

        async def look() -> list[bytes]:
            return self.heard

        await until(look, lambda heard: mark in heard, "the mark was heard")
        assert self.gaps == 0
        return [json.loads(payload) for payload in self.heard if not payload.startswith(b'{"mark"')]

    def epoch(self, back: int) -> int:
        """The present epoch, or one of those before."""
        return self.epochs[max(-len(self.epochs), -1 - back)]

    async def head(self) -> Meta:
        found = await self.store.head(self.cid) or Meta(self.user, "g", 0, 0)
        if found.epoch not in self.epochs:
            self.epochs.append(found.epoch)
        return found

    async def do(self, step: Step) -> Any:
        head = await self.head()
        reply = await STEPS[step.name](self, step, head)
        await self.head()
        return self.canonical(reply)

    # -- what may be compared ------------------------------------------------------------------------------------

    def canonical(self, value: Any, name: str = "") -> Any:
        """Plain data without what differs by clock."""
        if is_dataclass(value) and not isinstance(value, type):
            value = asdict(value)
        if isinstance(value, dict):
            pairs = cast("dict[str, Any]", value).items()
            return {k.replace(self.cid, "c"): self.canonical(v, k) for k, v in sorted(pairs)}
        if isinstance(value, list | tuple):
            return [self.canonical(v, name) for v in cast("list[Any]", value)]
        if isinstance(value, str) and name == "event":
            return self.canonical(json.loads(value))
        if isinstance(value, str):
            return value.replace(self.cid, "c").replace(self.user, "u")
        if isinstance(value, bool) or not isinstance(value, int):
            return value
        if name in TIMES:
            return "time"
        return self.rank(value) if name in EPOCHS or value >= FIRST_TIME else value

    def rank(self, epoch: int) -> str:
        known = sorted({*self.epochs, epoch})
        return f"epoch {known.index(epoch)} of {len(known)}"

    async def everything(self) -> Any:
        """All that the store says about the conversation, its user and its nodes."""
        s, cid, user = self.store, self.cid, self.user
        page = await s.read(cid, Cursor(), 1_000)
        shards = [await s.list_all(shard, "", 1_000) for shard in range(64)]
        values = {
            "head": await s.head(cid),
            "log": page,
            "inbox": await s.inbox(cid),
            "seen": dict(await s.all_seen(cid)),
            "state": await s.state(cid),
            "asks": dict(await s.asks(cid)),
            "pieces": list(await s.pieces(cid)),
            "alarms": dict(await s.alarms(cid)),
            "timers": [timer for timer in await s.due_timers(timer_shard(cid), 10_000) if timer[0] == cid],
            "slots": dict(await s.slots(user)),
            "waiting": list(await s.waiting(user)),
            "nodes": [await self.node(name) for name in NODES],
            "list": [found for found, _ in await s.list_user(user, None, 100)],
            "all": [found for shard in shards for found in shard],
        }
        return self.canonical(values)

    async def node(self, name: str) -> Any:
        version, records, connections = await self.store.node_records(name)
        return [version, sorted(records, key=lambda r: r.conversation_id), dict(connections)]


# -- steps -----------------------------------------------------------------------------------------------------------


async def create(u: Subject, s: Step, m: Meta) -> Any:
    return await u.store.create(u.cid, u.user, f'{{"n":{s.count}}}', "gen")


async def send(u: Subject, s: Step, m: Meta) -> Any:
    kind = "interrupting" if s.nonce == 2 else "message"
    message = NewMessage(f"m{s.message}", u.user, f'{{"text":"é {s.count}"}}', kind)
    return await u.store.send(u.cid, message, max_pending=3, reject_busy=s.flag and s.count == 0)


async def unsend(u: Subject, s: Step, m: Meta) -> Any:
    name = (f"m{s.message}", f"r{s.message}", ALARMS[0])[s.nonce]
    (position,) = await u.store.seen(u.cid, [name])
    return await u.store.unsend(u.cid, name, (position or 1) + s.off)


async def claim(u: Subject, s: Step, m: Meta) -> Any:
    reason = ("start", "takeover", "wake", "handoff")[s.count]
    owner = m.owner if s.off == 0 else NODES[s.node]
    request = ClaimRequest(
        NODES[s.node], f"n{s.nonce}", owner, u.epoch(s.back), cast("Any", reason), acted=s.message > 0
    )
    return await u.store.claim(u.cid, request)


async def resolve(u: Subject, s: Step, m: Meta) -> Any:
    return await u.store.resolve(u.cid, NODES[s.node], f"n{s.nonce}", u.epoch(s.back))


def batch(u: Subject, s: Step, m: Meta, events: list[str], **changes: Any) -> AppendRequest:
    values: dict[str, Any] = {"cursor": m.cursor, "done": m.done, "base": m.base, "state": None, "closing": ""}
    owner = m.owner if s.off < 1 or s.flag else NODES[s.node]
    return AppendRequest(
        owner, u.epoch(s.back), m.seq + min(s.off, 0), f"b{s.nonce}", events=tuple(events), **{**values, **changes}
    )


async def take_in(u: Subject, s: Step, m: Meta) -> Any:
    read = await u.store.inbox(u.cid)
    unread = [e for e in read[1] if e.kind != "stop"][: s.count] if read else []
    cursor = unread[-1].position if unread else m.cursor
    return await u.store.append(u.cid, batch(u, s, m, logged(unread), cursor=cursor, halted=s.nonce * s.message))


def logged(entries: Sequence[InboxEntry]) -> list[str]:
    """Events of those entries that enter the log."""
    return [input_event(e) if e.kind in MESSAGES else answer_event(e) for e in entries if e.kind in REMEMBERED]


async def end(u: Subject, s: Step, m: Meta) -> Any:
    done = min(m.done + 1, m.cursor)
    ended = event("turn_done", f"t{done}", 1, f'{{"settles":[{done}]}}')
    changes = {"done": done, "state": b"state %d" % s.count, "ends_turn": True, "asks": asks(s, m)[: s.flag]}
    return await u.store.append(u.cid, batch(u, s, m, [ended], **changes))


def asks(s: Step, m: Meta) -> tuple[tuple[str, str], ...]:
    return tuple((f"t{m.done + 1}.{(s.message + i) % 3}", f'{{"é":{i}}}') for i in range(s.count))


async def ask(u: Subject, s: Step, m: Meta) -> Any:
    return await u.store.append(u.cid, batch(u, s, m, [event("ask", "t1", 1, "{}")], asks=asks(s, m)))


async def answer(u: Subject, s: Step, m: Meta) -> Any:
    ask_id = f"t{m.done + 1 - s.back}.{s.message % 3}"
    data = (f'{{"ask_id":"{ask_id}","data":{{"é":1.50}}}}', f'{{"ask_id":"{ask_id}","expired":true}}', '"plain"')
    message = NewMessage(f"r{s.message}{s.count}", u.user, data[s.nonce], "answer")
    return await u.store.answer(u.cid, ask_id, message)


async def interrupt(u: Subject, s: Step, m: Meta) -> Any:
    return await u.store.interrupt(u.cid, f"t{m.done + 1 + s.off}" if s.flag else "")


async def begin(u: Subject, s: Step, m: Meta) -> Any:
    return await u.store.append(u.cid, batch(u, s, m, [], begins_turn=True))


async def pieces(u: Subject, s: Step, m: Meta) -> Any:
    texts = [json.dumps("é" * 2_500 * i, ensure_ascii=False) for i in range(s.count)]
    owner = m.owner if s.off < 1 or s.flag else NODES[s.node]
    return await u.store.add_pieces(u.cid, owner, u.epoch(s.back), m.done + 1 + min(s.off, 0), texts)


async def park(u: Subject, s: Step, m: Meta) -> Any:
    changes = {"closing": "failed" if s.flag else "held", "ends_turn": s.count == 0}
    return await u.store.append(u.cid, batch(u, s, m, [event("x", "", 1, "1")], **changes))


async def set_alarm(u: Subject, s: Step, m: Meta) -> Any:
    return await u.store.set_alarm(u.cid, ALARMS[s.nonce], f'{{"é":{s.count}}}')


async def fire(u: Subject, s: Step, m: Meta) -> Any:
    return await u.store.fire(u.cid, ALARMS[s.nonce], max_pending=3)


async def drop_alarm(u: Subject, s: Step, m: Meta) -> Any:
    return await u.store.drop_alarm(u.cid, ALARMS[s.nonce])


async def set_timer(u: Subject, s: Step, m: Meta) -> Any:
    return await u.store.set_timer(u.cid, f"timer/{s.message}", 10**15 if s.flag and s.count == 3 else s.count)


async def clear_timer(u: Subject, s: Step, m: Meta) -> Any:
    return await u.store.clear_timer(u.cid, f"timer/{s.message}")


async def append(u: Subject, s: Step, m: Meta) -> Any:
    events = [event("reply", "t1", 1, json.dumps("x" * 4000 * i)) for i in range(s.count)]
    return await u.store.append(
        u.cid, batch(u, s, m, events, base=m.base + s.nonce, closing="stopped" if s.flag and s.count == 3 else "")
    )


async def repair(u: Subject, s: Step, m: Meta) -> Any:
    """Any owner wants to write again what no store has lost."""
    page = await u.store.read(u.cid, Cursor(), 1_000)
    epoch, seq = page.tip if page is not None else (0, 0)
    request = RepairRequest(
        *(m.owner if s.off < 1 or s.flag else NODES[s.node], u.epoch(s.back), f"n{s.nonce}", u.user, m.generation, 1),
        *("{}", (epoch, seq + min(s.off, 0)), tuple(event("reply", "t1", 1, str(i)) for i in range(s.count))),
        batch=f"b{s.nonce}" if s.count else "",
        cursor=m.cursor + s.message - 1,
        done=m.done,
        base=m.base + s.nonce,
        halted=m.halted,
        settled=tuple(f"m{i}" for i in range(s.message, 6)) if s.nonce else (),
        answered=(f"t{m.done + 1}.0",),
        asks=asks(s, m)[: s.nonce],
        closes=s.flag,
        state=b"repaired" if s.message == 1 else None,
    )
    return await u.store.repair(u.cid, request)


async def release(u: Subject, s: Step, m: Meta) -> Any:
    return await u.store.release(u.cid, m.owner or NODES[s.node], u.epoch(s.back), m.seq + s.off)


async def disown(u: Subject, s: Step, m: Meta) -> Any:
    return await u.store.disown(u.cid, m.owner if s.off == 0 else NODES[s.node], u.epoch(s.back))


async def stop(u: Subject, s: Step, m: Meta) -> Any:
    return await u.store.stop(u.cid, NODES[s.node], f'why "{s.count}" é', m.owner if s.flag else "")


async def finish(u: Subject, s: Step, m: Meta) -> Any:
    """What an owner does that finds a stop in its inbox."""
    read = await u.store.inbox(u.cid)
    events = [*logged(read[1] if read else ()), event("stopped", "", 1, '{"reason":"x"}')]
    return await u.store.append(u.cid, batch(u, s, m, events, cursor=m.position + min(s.off, 0), closing="stopped"))


async def resume(u: Subject, s: Step, m: Meta) -> Any:
    return await u.store.resume(u.cid)


async def patch(u: Subject, s: Step, m: Meta) -> Any:
    return await u.store.set_metadata(u.cid, f'{{"é":{s.count}}}')


async def erase(u: Subject, s: Step, m: Meta) -> Any:
    return await u.store.erase(u.cid)


async def read(u: Subject, s: Step, m: Meta) -> Any:
    generation = ("gen", "", "other")[s.nonce]
    return await u.store.read(u.cid, Cursor(generation, Place(u.epoch(s.back), max(m.seq + s.off, 0))), s.count)


async def reserve(u: Subject, s: Step, m: Meta) -> Any:
    held = await u.store.slot(u.user, f"s{s.message}")
    slot = Slot(f"n{s.nonce}", NODES[s.node])
    return await u.store.reserve(
        u.user, f"s{s.message}", slot, raised_limit=3 if s.count else 0, read=held if s.flag else None
    )


async def unreserve(u: Subject, s: Step, m: Meta) -> Any:
    return await u.store.unreserve(u.user, f"s{s.message}", f"n{s.nonce}")


async def enqueue(u: Subject, s: Step, m: Meta) -> Any:
    return await u.store.enqueue(u.user, f"s{s.message}", NODES[s.node], ("wake", "alarm")[s.flag])


async def dequeue(u: Subject, s: Step, m: Meta) -> Any:
    return await u.store.dequeue(u.user, f"s{s.message}")


def record(u: Subject, s: Step) -> Record:
    return Record(f"{u.cid}.{s.message}", u.user, "idle" if s.flag else "running", s.count, f"n{s.nonce}", 5, s.count)


async def put_record(u: Subject, s: Step, m: Meta) -> Any:
    return await u.store.put_record(NODES[s.node], record(u, s))


async def drop_record(u: Subject, s: Step, m: Meta) -> Any:
    return await u.store.drop_record(NODES[s.node], f"{u.cid}.{s.message}", None if s.flag else f"n{s.nonce}")


async def flush(u: Subject, s: Step, m: Meta) -> Any:
    joined = {f"socket{s.nonce}": u.cid} if s.flag else {}
    return await u.store.flush(NODES[s.node], s.message, [record(u, s)], joined, [] if s.flag else [f"socket{s.nonce}"])


async def index(u: Subject, s: Step, m: Meta) -> Any:
    return await u.store.index(u.user, u.cid)


async def unindex(u: Subject, s: Step, m: Meta) -> Any:
    return await u.store.unindex(u.user, u.cid)


STEPS: dict[str, Callable[[Subject, Step, Meta], Any]] = {
    function.__name__: function
    for function in (
        *(create, send, unsend, claim, resolve, take_in, end, append, repair, release, disown, stop, finish, resume),
        *(patch, erase, read, reserve, unreserve, enqueue, dequeue, put_record, drop_record, flush, index, unindex),
        *(interrupt, ask, answer, begin, pieces, park, set_alarm, fire, drop_alarm, set_timer, clear_timer),
    )
}


# -- the comparison --------------------------------------------------------------------------------------------------


@pytest.fixture
async def stores(server: Callable[[str], Server], tmp_path: Path) -> AsyncIterator[dict[str, Store]]:
    """One store of each kind that this machine can run, empty."""
    async with AsyncExitStack() as stack:
        found: dict[str, Store] = {}
        for kind in KINDS:
            if kind in FLAVOURS and binary(kind) is None:
                continue
            harness = await stack.enter_async_context(factory(kind, server, tmp_path)())
            found[kind] = await harness.connect()
        yield found


def test_every_step_is_played() -> None:
    assert set(STEPS) == set(NAMES)


counter = iter(range(10**9))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(plan=st.lists(steps, min_size=20, max_size=60))
async def test_all_stores_agree(stores: dict[str, Store], plan: list[Step]) -> None:
    number = next(counter)
    subjects = [Subject(kind, store, f"c{number}", f"u{number}") for kind, store in stores.items()]
    first, *others = subjects
    for subject in subjects:
        await subject.listen()
    for step in [Step("index"), Step("create"), *plan]:
        replies = await asyncio.gather(*(subject.do(step) for subject in subjects))
        for subject, reply in zip(others, replies[1:], strict=True):
            assert reply == replies[0], f"{subject.kind} differs from {first.kind} on {step}"
    states = await asyncio.gather(*(subject.everything() for subject in subjects))
    heard = [subject.canonical(await subject.said()) for subject in subjects]
    for subject, state, said in zip(others, states[1:], heard[1:], strict=True):
        assert state == states[0], f"{subject.kind} differs from {first.kind} in its state"
        assert said == heard[0], f"{subject.kind} differs from {first.kind} in what it published"
    for subject in subjects:
        await subject.store.unsubscribe(subject.store.channel("c", subject.cid))
        timers = {f"timer/{number}" for number in range(6)}
        touched = Touched({subject.cid}, {subject.user}, set(NODES), timers)
        await delete_everything(subject.store, touched)
