"""Answers that are written while clients look on: who writes them, and what a client makes of what it is sent."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping, Sequence
from typing import Any

from convener.core import wire
from convener.core.cursor import Cursor
from convener.core.model import AppendRequest, ClaimRequest, NewMessage
from convener.manager.turn import Turn
from convener.store.base import Store
from convener.testing.cluster import InProcessCluster, RecordingSink
from tests.manager.conftest import MakeCluster
from tests.support.waiting import wait_until


def piece_text(turn: str, attempt: int, offset: int, data: Any, *, part: str = "text", reply: int = 0) -> str:
    """A piece as it is stored and published; data that are a list are of type `call`."""
    kind = "text" if isinstance(data, str) else "call"
    fields = {"turn": turn, "attempt": attempt, "reply": reply, "part": part, "type": kind, "offset": offset}
    return wire.json_text(fields | {"data": data})


class Pen:
    """Writes pieces of one attempt of a turn, each part from where it ends."""

    def __init__(self, store: Store, cid: str, owner: str, epoch: int, turn: str, attempt: int) -> None:
        self._store, self._cid, self._owner, self._epoch = store, cid, owner, epoch
        self.turn, self.attempt, self.reply = turn, attempt, 0
        self.parts: dict[str, Any] = {}

    async def write(self, *pieces: Any, part: str = "text") -> None:
        """Write pieces (strings, or lists for a structured part) in one step."""
        texts: list[str] = []
        for piece in pieces:
            held = self.parts.get(part, piece[:0])
            text = piece_text(self.turn, self.attempt, len(held), piece, part=part, reply=self.reply)
            texts.append(text)
            self.parts[part] = held + piece
        await self.put(*texts)

    async def put(self, *texts: str) -> None:
        """Write texts as they are."""
        position = wire.turn_position(self.turn)
        assert await self._store.add_pieces(self._cid, self._owner, self._epoch, position, texts) == "OK"

    def next_reply(self) -> None:
        """What comes now is after one more reply."""
        self.reply += 1
        self.parts = {}


class Owner:
    """Owns a conversation as a node would, one step of the store at a time; no agent, no node."""

    def __init__(self, store: Store, cid: str, name: str = "scripted~1") -> None:
        self.store, self.cid, self.name = store, cid, name
        self.epoch, self.seq, self.batch, self.position = 0, 0, 0, 0

    async def create(self) -> None:
        await self.store.create(self.cid, "", "{}", "g1")

    async def claim(self, reason: str = "start") -> None:
        head = await self.store.head(self.cid)
        assert head is not None
        request = ClaimRequest(self.name, f"n{head.epoch}", head.owner, head.epoch, reason)  # type: ignore[arg-type]
        reply = await self.store.claim(self.cid, request)
        assert (reply.outcome, reply.meta is not None) == ("OK", True), reply
        assert reply.meta is not None
        self.epoch, self.seq = reply.meta.epoch, reply.meta.seq

    async def append(self, *events: tuple[str, str, Any], **fields: Any) -> None:
        """Append entries (kind, turn, data); the fields are `AppendRequest`'s."""
        texts = tuple(wire.event(kind, turn, 1, wire.json_text(data)) for kind, turn, data in events)
        self.batch += 1
        values: dict[str, Any] = {"cursor": self.position, "done": 0, "base": 0} | fields
        request = AppendRequest(self.name, self.epoch, self.seq, f"b{self.epoch}.{self.batch}", events=texts, **values)
        reply = await self.store.append(self.cid, request)
        assert reply.outcome == "OK", reply
        self.seq += len(texts)

    async def take(self) -> str:
        """Accept a message and take it in; its turn's id."""
        reply = await self.store.send(self.cid, NewMessage(f"m{self.position}", "", "1"), max_pending=10)
        assert reply.outcome == "OK"
        self.position = reply.position
        data = {"message_id": f"m{reply.position - 1}", "user_id": "", "data": 1}
        await self.append(("input", wire.turn_id(reply.position), data))
        return wire.turn_id(reply.position)

    async def begin(self, turn: str, attempt: int = 1) -> Pen:
        """Begin an attempt of a turn."""
        data = {"attempt": attempt, "reason": "new" if attempt == 1 else "takeover"}
        await self.append(("turn_started", turn, data), begins_turn=True)
        return self.pen(turn, attempt)

    def pen(self, turn: str, attempt: int) -> Pen:
        return Pen(self.store, self.cid, self.name, self.epoch, turn, attempt)

    async def reply(self, turn: str, data: Any) -> None:
        await self.append(("reply", turn, data))

    async def end(self, turn: str, *replies: Any, then: Sequence[tuple[str, str, Any]] = ()) -> None:
        """End a turn, with its last replies; `then` comes in the same batch."""
        position = wire.turn_position(turn)
        events = [("reply", turn, data) for data in replies]
        events.append(("turn_done", turn, {"settles": [position]}))
        await self.append(*events, *then, done=position, base=self.seq, ends_turn=True, begins_turn=bool(then))


class Typist:
    """An agent whose answers a test writes past it: it begins its turns, and ends them when it is told to."""

    def __init__(self) -> None:
        self.begun: dict[tuple[str, int], Turn] = {}
        self._says: dict[tuple[str, int], asyncio.Queue[tuple[str, Any]]] = {}

    async def answer(self, turn: Turn) -> None:
        key = (turn.id, turn.attempt)
        self.begun[key] = turn
        queue = self._queue(key)
        while True:
            what, data = await queue.get()
            if what == "end":
                return
            if what == "reply":
                await turn.reply(data)
            else:
                await turn.step(data, lambda: 1)

    def _queue(self, key: tuple[str, int]) -> asyncio.Queue[tuple[str, Any]]:
        return self._says.setdefault(key, asyncio.Queue())

    def tell(self, pen: Pen, what: str, data: Any = None) -> None:
        """`reply`, `step` (which writes what was replied before it) or `end`."""
        self._queue((pen.turn, pen.attempt)).put_nowait((what, data))

    def finish(self, pen: Pen, reply: Any = None) -> None:
        """Let the turn end with a reply: by default what the pen has written."""
        self.tell(pen, "reply", dict(pen.parts) if reply is None else reply)
        self.tell(pen, "end")

    async def pen(self, cluster: InProcessCluster, cid: str, turn: str = "t1", attempt: int = 1) -> Pen:
        """A pen for an attempt that is under way: its start is in the log."""
        await wait_until(lambda: (turn, attempt) in self.begun, f"attempt {attempt} of {turn} is under way")
        fence = self.begun[turn, attempt].fence
        owner = next(m for m in cluster if (r := m.engine.runner(cid)) is not None and r.epoch == fence.epoch)
        store = owner.engine.node.store
        await wait_until(lambda: _has_begun(store, cid, turn, attempt), "its start is in the log")
        return Pen(store, cid, owner.engine.node.incarnation, fence.epoch, turn, attempt)


async def _has_begun(store: Store, cid: str, turn: str, attempt: int) -> bool:
    page = await store.read(cid, Cursor(), 1000)
    events: list[Any] = [] if page is None else [json.loads(entry.event) for entry in page.entries]
    return any(e["kind"] == "turn_started" and (e["turn"], e["data"]["attempt"]) == (turn, attempt) for e in events)


class Seen:
    """What a client makes of what it was sent on one connection. Complains of whatever must not come.

    Attributes:
        parts: of the answer that is being written.
        replied: (turn, reply, what had been streamed of it by then), in order.
        deltas: how many there were.
    """

    def __init__(self, sent: Sequence[tuple[str, Mapping[str, Any]]]) -> None:
        self.parts: dict[str, Any] = {}
        self.replied: list[tuple[str, Any, dict[str, Any]]] = []
        self.deltas = 0
        self._joined = False
        self._started: tuple[str, int] | None = None
        self._writing: tuple[str, int] | None = None
        self._ended: set[str] = set()
        for name, payload in sent:
            if name == "joined":
                self._joined = True
            elif name == "delta":
                self._delta(payload)
            elif name == "event":
                self._event(payload)
            elif name == "resync":
                self._started, self._writing, self.parts, self._ended = None, None, {}, set()

    def _delta(self, delta: Mapping[str, Any]) -> None:
        self.deltas += 1
        assert set(delta) == {"turn", "attempt", "part", "type", "offset", "data"}, delta
        assert self._joined, "a piece before joined"
        assert delta["turn"] not in self._ended, f"a piece of a turn that has ended: {delta}"
        writing = (delta["turn"], delta["attempt"])
        assert self._started in (None, writing), f"a piece of another turn than {self._started}: {delta}"
        if writing != self._writing:
            self._writing, self.parts = writing, {}
        held = self.parts.get(delta["part"], delta["data"][:0])
        assert delta["offset"] == len(held), f"{len(held)} were there, this begins at {delta['offset']}"
        assert delta["data"], "an empty piece"
        self.parts[delta["part"]] = held + delta["data"]

    def _event(self, entry: Mapping[str, Any]) -> None:
        kind, turn = entry["kind"], entry["turn"]
        if kind == "turn_started":
            self._started, self.parts = (turn, entry["data"]["attempt"]), {}
        elif kind == "reply":
            self.replied.append((turn, entry["data"], self.parts))
            self.parts = {}
        elif kind in ("turn_done", "turn_failed", "turn_interrupted"):
            self._ended.add(turn)
            self.parts = {}


def seen(sink: RecordingSink) -> Seen:
    """What a client has seen so far."""
    return Seen(sink.sent)


async def sees(sink: RecordingSink, what: Any, part: str = "text") -> None:
    """Wait until a part of the answer that is being written is just that."""
    await wait_until(lambda: seen(sink).parts.get(part) == what, f"{str(what)[:60]!r} is shown")


async def done(sink: RecordingSink, turn: str = "t1") -> None:
    """Wait until a client has seen the end of a turn."""
    await wait_until(
        lambda: any(
            e["kind"].startswith("turn_") and e["kind"] != "turn_started" and e["turn"] == turn for e in sink.events
        ),
        f"{turn} has ended",
    )


class Setting:
    """A cluster whose agent is a `Typist`, and a conversation on it."""

    def __init__(self, cluster: InProcessCluster, typist: Typist) -> None:
        self.cluster = cluster
        self.typist = typist

    async def pen(self, turn: str = "t1", attempt: int = 1) -> Pen:
        return await self.typist.pen(self.cluster, "c", turn, attempt)

    async def ask(self, node: int = 0) -> None:
        await self.cluster[node].send_event_to_conversation("c", {"text": "?"})

    @property
    def owner(self) -> int:
        found = self.cluster.owner_of("c")
        assert found is not None
        return found

    def rest(self) -> list[int]:
        """The nodes that are there."""
        return [i for i, m in enumerate(self.cluster.managers) if m is not None]

    def others(self) -> list[int]:
        return [i for i, m in enumerate(self.cluster.managers) if m is not None and i != self.owner]


async def set_up(make_cluster: MakeCluster, **options: Any) -> Setting:
    """A turn is about to begin."""
    typist = Typist()
    cluster = await make_cluster(typist.answer, **options)
    await cluster[0].maybe_start_agent_loop("c", user_id="u")
    setting = Setting(cluster, typist)
    await setting.ask()
    return setting


async def end(setting: Setting, pen: Pen, *sinks: RecordingSink) -> None:
    """Let the turn end, when everything is shown; then it was shown once, and is what the reply says."""
    for sink in sinks:
        for part, data in pen.parts.items():
            await sees(sink, data, part)
    setting.typist.finish(pen)
    for sink in sinks:
        await done(sink, pen.turn)
        assert seen(sink).replied[-1] == (pen.turn, pen.parts, pen.parts)
