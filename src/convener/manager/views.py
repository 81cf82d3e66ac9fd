"""What this node knows of conversations that it owns or has clients in: one channel, one place, one ring each.

A view follows its log by the emit rule (`convener.core.view`): what follows its place exactly goes into the ring
and wakes the feeds; anything else makes it read the log. Feeds (`feeds.py`) read from the ring by their own exact
place and fall back to the store, so nothing here can lose or repeat an entry for a client (I9).
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol, cast

import msgspec
import structlog

from convener.core import cursor as cursors
from convener.core.cursor import Cursor
from convener.core.directory import LoopStatus
from convener.core.model import LogEntry, Meta
from convener.core.replay import SETTLING
from convener.core.view import START, Place, accept
from convener.errors import ConvenerError, NotFound
from convener.manager.context import NodeContext

log = structlog.get_logger(__name__)

RING: Final = 256
"""Entries that a view keeps in memory; a client further behind reads the store."""
PAGE: Final = 128
FAR: Final = Cursor(place=Place(0, 10**14))


class Event(msgspec.Struct):
    """The JSON of a log entry."""

    kind: str
    turn: str
    ts: int
    data: Any

    def field(self, name: str) -> Any:
        """A member of `data`, None if data is not an object or has no such member."""
        data: Any = self.data
        return cast(dict[str, Any], data).get(name) if isinstance(data, dict) else None


class Publication(msgspec.Struct):
    """A message of a conversation's channel (`convener.core.wire`)."""

    t: str
    epoch: int = 0
    seq: int = 0
    n: int = 0
    events: list[msgspec.Raw] = []
    status: str = ""
    pos: int = 0
    id: str = ""
    kind: str = "message"
    user: str = ""
    ts: int = 0
    data: msgspec.Raw = msgspec.Raw(b"")


_event = msgspec.json.Decoder(Event)
_publication = msgspec.json.Decoder(Publication)


@dataclass(frozen=True, slots=True)
class Item:
    """An entry as clients get it, decoded once per node."""

    place: Place
    before: Place
    event: Event
    payload: dict[str, Any]


class InboxListener(Protocol):
    """The runner of a conversation that this node owns."""

    def heard(self, publication: Publication) -> None: ...

    def missed(self) -> None: ...


class Feed(Protocol):
    """A client's way through the conversation."""

    def wake(self) -> None: ...


def decode(entry: LogEntry, before: Place, generation: str) -> Item:
    """Decode an entry for clients. A damaged one is shown as kind `damaged` rather than stopping everybody."""
    try:
        event = _event.decode(entry.event)
    except msgspec.MsgspecError:
        log.exception("damaged log entry", epoch=entry.epoch, seq=entry.seq)
        event = Event("damaged", "", 0, None)
    payload = {
        "seq": entry.seq,
        "cursor": cursors.at(generation, entry.epoch, entry.seq),
        "epoch": entry.epoch,
        "kind": event.kind,
        "turn": event.turn,
        "data": event.data,
        "ts": event.ts,
    }
    return Item(Place(entry.epoch, entry.seq), before, event, payload)


class View:
    """One conversation on this node."""

    def __init__(self, node: NodeContext, cid: str) -> None:
        self._node = node
        self.cid = cid
        self.channel = node.store.channel("c", cid)
        self.generation = ""
        self.place = START
        self.ring: deque[Item] = deque(maxlen=RING)
        self.feeds: set[Feed] = set()
        self.listener: InboxListener | None = None
        self.references = 0
        self.owner = ""
        self.epoch = 0
        self.open_turn = ""
        self.loaded = False
        self.stopped_reason: str | None = None
        self.override: LoopStatus | None = None
        self.sent_away = False
        self.ready = asyncio.Event()
        self._behind = False
        self._catching = False
        self._waiters: list[Callable[[], None]] = []

    # -- status ----------------------------------------------------------------------------------------------

    @property
    def busy(self) -> bool:
        """Whether a message is being answered, as far as the log shows."""
        return bool(self.open_turn) and self.loaded

    @property
    def status(self) -> LoopStatus:
        """The conversation's status, derived from the log and from what only the channel says."""
        if self.stopped_reason is not None:
            return "stopped"
        if self.override is not None:
            return self.override
        if not self.loaded:
            return "hibernated" if self.epoch else "starting"
        if self.owner in self._node.buried:
            return "recovering"
        return "running" if self.open_turn else "idle"

    def set_head(self, meta: Meta) -> None:
        """Take status from a head that was read."""
        self.owner, self.epoch, self.loaded = meta.owner, meta.epoch, bool(meta.owner)
        self.open_turn = "?" if meta.owner and meta.cursor > meta.done else ""
        self.stopped_reason = "" if meta.status == "stopped" else None

    def set_override(self, status: LoopStatus | None) -> None:
        """Show a status that the log does not (recovering, draining); None to go by the log again."""
        if status != self.override:
            self.override = status
            self.wake()

    def force_stopped(self, reason: str) -> None:
        """Another node says that it was stopped, though the log does not show it: send the clients away."""
        self.stopped_reason = reason
        self.loaded, self.open_turn = False, ""
        self.sent_away = True
        self.wake()

    def resumed(self) -> None:
        """The conversation was opened again; the log shows it at the next start."""
        if self.stopped_reason is not None:
            self.stopped_reason = None
            self.wake()

    def _show(self, item: Item) -> None:
        kind = item.event.kind
        if kind == "open":
            self.owner, self.epoch, self.loaded = str(item.event.field("node") or ""), item.place.epoch, True
            self.open_turn, self.stopped_reason, self.override, self.sent_away = "", None, None, False
        elif kind == "turn_started":
            self.open_turn = item.event.turn
        elif kind in SETTLING:
            self.open_turn = ""
        elif kind == "stopped":
            self.stopped_reason = str(item.event.field("reason") or "")
            self.open_turn, self.loaded, self.owner = "", False, ""

    # -- input -----------------------------------------------------------------------------------------------

    def on_publication(self, raw: bytes) -> None:
        """Take one message of the channel; a malformed one is counted and treated like a missed one."""
        try:
            publication = _publication.decode(raw)
        except msgspec.MsgspecError:
            self._node.metrics.malformed.labels(where="conversation").inc()
            log.warning("malformed publication skipped", conversation_id=self.cid, size=len(raw))
            self.on_gap()
            return
        if publication.t == "in":
            if self.listener is not None:
                self.listener.heard(publication)
        elif publication.t == "log":
            self._on_log(publication)
        elif publication.t == "status" and publication.epoch >= self.epoch and publication.status == "hibernated":
            self._hibernated()
            self.wake()

    def _hibernated(self) -> None:
        self.loaded, self.owner, self.open_turn, self.override = False, "", "", None

    def _on_log(self, publication: Publication) -> None:
        if not publication.events:
            last = Place(publication.epoch, publication.seq + publication.n - 1)
            if last > self.place:
                self.fall_behind()
            return
        self.offer(
            [
                LogEntry(publication.epoch, publication.seq + i, bytes(raw).decode())
                for i, raw in enumerate(publication.events)
            ]
        )

    def on_gap(self) -> None:
        """Publications may have been missed."""
        self.fall_behind()
        if self.listener is not None:
            self.listener.missed()

    def offer(self, entries: Sequence[LogEntry]) -> None:
        """Take committed entries, from the channel or from the owner's own append."""
        if self._catching or not self.ready.is_set():
            self._behind = True
            return
        before = self.place
        good, place, missing = accept(self.place, entries)
        for entry in good:
            item = decode(entry, before, self.generation)
            before = item.place
            self.ring.append(item)
            self._show(item)
        self.place = place
        if missing:
            self.fall_behind()
        elif good:
            self.wake()

    def wake(self) -> None:
        """Let the feeds, and who waits for a change, look again."""
        for feed in self.feeds:
            feed.wake()
        waiters, self._waiters = self._waiters, []
        for waiter in waiters:
            waiter()

    async def wait_for(self, condition: Callable[[], bool], timeout: float) -> bool:
        """Wait until `condition()` holds, looked at after each change; False after `timeout` seconds."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout
        while not condition():
            changed: asyncio.Future[None] = loop.create_future()
            self._waiters.append(lambda f=changed: None if f.done() else f.set_result(None))
            left = deadline - loop.time()
            if left <= 0:
                return False
            await asyncio.wait({changed}, timeout=left)
        return True

    # -- reading the log ---------------------------------------------------------------------------------------

    def fall_behind(self) -> None:
        """The log must be read."""
        self._behind = True
        if not self._catching and self.ready.is_set():
            self._catching = True
            self._node.supervisor.spawn(f"catch up {self.cid}", self._catch_up())

    async def load(self) -> None:
        """Find the log's end and the head, after the subscription was confirmed. Raises `NotFound`."""
        self._behind = False
        head = await self._node.store.head(self.cid)
        page = await self._node.store.read(self.cid, FAR, 1)
        if head is None or page is None:
            raise NotFound(f"no conversation {self.cid}")
        self.generation, self.place = page.generation, Place(*page.tip)
        # What is left of an earlier time does not join on to this place.
        self.ring.clear()
        self.set_head(head)
        self.ready.set()
        if self._behind:
            self.fall_behind()

    async def _catch_up(self) -> None:
        try:
            while self._behind and self.references:
                self._behind = False
                try:
                    await self._read_on()
                except ConvenerError as error:
                    log.info("cannot read the log, again", conversation_id=self.cid, error=str(error))
                    self._behind = True
                    await asyncio.sleep(0.2)
        finally:
            self._catching = False
        self.wake()

    async def _read_on(self) -> None:
        while True:
            page = await self._node.store.read(self.cid, Cursor(self.generation, self.place), PAGE)
            if page is None:
                self.stopped_reason = "deleted" if self.stopped_reason is None else self.stopped_reason
                return
            if page.resync:
                # The history was rolled back or made anew. Each feed finds out by its own cursor.
                self._node.metrics.resyncs.labels(reason="history").inc()
                self.generation, self.place = page.generation, Place(*page.tip)
                self.ring.clear()
                head = await self._node.store.head(self.cid)
                if head is not None:
                    self.set_head(head)
                return
            before = self.place
            for entry in page.entries:
                item = decode(entry, before, self.generation)
                before = item.place
                self.ring.append(item)
                self._show(item)
            self.place = before
            if self.place >= Place(*page.tip) or not page.entries:
                await self._look_for_owner()
                return
            self.wake()

    def ended_since(self, place: Place, turn: str) -> str | None:
        """How the first turn that ended after `place` ended (or `turn`, if it is given); None if none has."""
        for item in self.ring:
            if item.place > place and item.event.kind in SETTLING and (not turn or item.event.turn == turn):
                return item.event.kind
        return None

    async def _look_for_owner(self) -> None:
        """The log does not show a hibernation, and its publication may have been among what was missed."""
        if self.loaded:
            head = await self._node.store.head(self.cid)
            if head is not None and not head.owner:
                self._hibernated()

    def after(self, place: Place) -> list[Item] | None:
        """Ring items after `place`, None if the ring does not reach back that far."""
        if place == self.place:
            return []
        out: list[Item] = []
        for item in reversed(self.ring):
            out.append(item)
            if item.before == place:
                out.reverse()
                return out
        return None


class Views:
    """All views of the node, by reference count: runner, feeds, handles and waits each hold one."""

    def __init__(self, node: NodeContext) -> None:
        self._node = node
        self._views: dict[str, View] = {}
        self._locks: dict[str, asyncio.Lock] = {}

    def __iter__(self) -> Any:
        return iter(list(self._views.values()))

    def get(self, cid: str) -> View | None:
        """The view, if there is one."""
        return self._views.get(cid)

    async def acquire(self, cid: str) -> View:
        """A view whose subscription is confirmed and whose place was read after that. Give it back by `release`.

        Raises:
            NotFound: no such conversation.
            StoreUnavailable: it could not be subscribed or read.
        """
        view = self._views.get(cid)
        if view is None:
            view = self._views[cid] = View(self._node, cid)
            self._locks[cid] = asyncio.Lock()
        view.references += 1
        try:
            # One setup at a time; who comes meanwhile waits for its outcome or does it again.
            async with self._locks[cid]:
                if not view.ready.is_set():
                    await self._node.store.subscribe(view.channel, view.on_publication, view.on_gap)
                    await view.load()
        except BaseException:
            await asyncio.shield(self.release(view))
            raise
        return view

    async def release(self, view: View) -> None:
        """Give a reference back; the last one unsubscribes."""
        view.references -= 1
        if view.references > 0 or self._views.get(view.cid) is not view:
            return
        async with self._locks[view.cid]:
            if view.references or self._views.get(view.cid) is not view:
                return
            view.ready.clear()
            try:
                await self._node.store.unsubscribe(view.channel)
            finally:
                # Who came during the await waits for the lock, finds the view not ready and subscribes anew.
                if not view.references:
                    del self._views[view.cid]
                    del self._locks[view.cid]
