"""What this node knows of conversations that it owns or has clients in: one channel, one place, one ring each.

A view follows its log by the emit rule (`convener.core.view`): what follows its place exactly goes into the ring
and wakes the feeds; anything else makes it read the log. Feeds (`feeds.py`) read from the ring by their own exact
place and fall back to the store, so nothing here can lose or repeat an entry for a client (I9).
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Final, Protocol, cast

import structlog

from convener.core.cursor import Cursor
from convener.core.directory import LoopStatus
from convener.core.live import Live, Piece
from convener.core.model import LogEntry, Page
from convener.core.replay import SETTLING
from convener.core.view import START, Place, accept
from convener.core.wire import publish_status
from convener.errors import ConvenerError, NotFound, StoreUnavailable
from convener.manager.context import NodeContext
from convener.manager.live import LivePieces
from convener.manager.published import Item, Publication, decode, decode_publication
from convener.manager.standing import GIVEN_UP, Standing, resting

__all__ = ["Item", "Publication", "View", "Views", "decode"]

log = structlog.get_logger(__name__)

RING: Final = 256
"""Entries that a view keeps in memory; a client further behind reads the store."""
PAGE: Final = 128
RESTING: Final = frozenset({"hibernated", "waiting", "failed"})
"""Statuses of a conversation that nobody owns, as they are published."""
FAR: Final = Cursor(place=Place(0, 10**14))


class InboxListener(Protocol):
    """The runner of a conversation that this node owns."""

    def heard(self, publication: Publication) -> None: ...

    def missed(self) -> None: ...


class Feed(Protocol):
    """A client's way through the conversation."""

    def wake(self) -> None: ...


class View(Standing):
    """One conversation on this node."""

    def __init__(self, node: NodeContext, cid: str) -> None:
        super().__init__(node)
        self.cid = cid
        self.channel = node.store.channel("c", cid)
        self.generation = ""
        self.place = START
        self.ring: deque[Item] = deque(maxlen=RING)
        self.volume = 0
        """Characters of all events that it has taken."""
        self.feeds: set[Feed] = set()
        self.listener: InboxListener | None = None
        self.references = 0
        self.ready = asyncio.Event()
        self._live = LivePieces(node, cid)
        self._behind = False
        self._catching = False
        self._waiters: list[Callable[[], None]] = []

    # -- status ----------------------------------------------------------------------------------------------

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

    async def announce(self, status: LoopStatus) -> None:
        """Say on the channel what no entry says: the status in which its owner, this node, has left the conversation.

        Who does not hear it reads it in the head, as after any gap.
        """
        try:
            await self._node.store.publish(self.channel, publish_status(self.epoch, status).encode())
        except StoreUnavailable as error:
            log.info("cannot say in which status it is", conversation_id=self.cid, status=status, error=str(error))

    # -- input -----------------------------------------------------------------------------------------------

    def on_publication(self, raw: bytes) -> None:
        """Take one message of the channel; a malformed one is counted and treated like a missed one."""
        publication = decode_publication(raw)
        if publication is None:
            self._node.metrics.malformed.labels(where="conversation").inc()
            log.warning("malformed publication skipped", conversation_id=self.cid, size=len(raw))
            self.on_gap()
            return
        match publication.t:
            case "in":
                if self.listener is not None:
                    self.listener.heard(publication)
            case "log":
                self._on_log(publication)
            case "piece":
                self._on_pieces(publication)
            case "status":
                self._on_status(publication)
            case _:
                log.debug("unknown publication", conversation_id=self.cid, kind=publication.t)

    def _on_status(self, publication: Publication) -> None:
        if not self.ready.is_set():
            self._behind = True
        elif publication.epoch >= self.epoch:
            if publication.status in RESTING:
                self.unloaded(cast(LoopStatus, publication.status))
                if not self.sent_away:
                    # It is also what RESUME says of a conversation that was stopped.
                    self.stopped_reason = None
            self.wake()

    def _on_pieces(self, publication: Publication) -> None:
        if not self.feeds or not self.ready.is_set():
            self._live.forget()
        elif not self._live.hear(publication, keep=self._catching):
            self.wake()
        elif self._wants_pieces():
            self._begin_catching()
        else:
            # Of a turn that the log as it is known here has not begun.
            self.fall_behind()

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
        self._live.missing = True
        self.fall_behind()
        if self.listener is not None:
            self.listener.missed()

    def offer(self, entries: Sequence[LogEntry]) -> None:
        """Take committed entries, from the channel or from the owner's own append."""
        if self._catching or not self.ready.is_set():
            self._behind = True
            return
        good, _, missing = accept(self.place, entries)
        self._take(good, heard=True)
        if missing:
            self.fall_behind()
        elif self._behind or self._wants_pieces():
            self._begin_catching()
        elif good:
            self.wake()

    def _take(self, entries: Sequence[LogEntry], *, heard: bool) -> None:
        before = self.place
        for entry in entries:
            item = decode(entry, before, self.generation)
            self.place = before = item.place
            self.volume += len(entry.event)
            self.ring.append(item)
            self.show(item)
            self._live.show(item.event, heard=heard)
            if heard and item.event.kind == "turn_failed" and item.event.field("code") == GIVEN_UP:
                self._behind = True

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
        self._begin_catching()

    def _begin_catching(self) -> None:
        if not self._catching and self.ready.is_set():
            self._catching = True
            self._node.supervisor.spawn(f"catch up {self.cid}", self._catch_up())

    def follow_pieces(self) -> None:
        """A client is live: what it may see of the answer that is being written has to be known."""
        if self._wants_pieces():
            self._begin_catching()

    def _wants_pieces(self) -> bool:
        return self._live.wanted and bool(self.feeds)

    @property
    def answer(self) -> Live:
        """The answer that is being written, as of `place`."""
        return self._live.answer

    async def load(self) -> None:
        """Find the log's end and the head, after the subscription was confirmed. Raises `NotFound`."""
        self._behind = False
        page = await self._node.logs.read(self.cid, FAR, 1)
        if page is None:
            raise NotFound(f"no conversation {self.cid}")
        # What is left of an earlier time does not join on to this place.
        await self._begin(page)
        self.ready.set()
        if self._behind:
            self.fall_behind()

    async def _begin(self, page: Page) -> None:
        """Follow from the end of the log as `page` tells it. The head is read after it: what it says of turns that
        have ended is then true of everything before that end, and what it knows too early, the log says again.
        """
        head = await self._node.store.head(self.cid)
        if head is None:
            raise NotFound(f"no conversation {self.cid}")
        asks = await self._node.store.asks(self.cid) if head.asks else ()
        self.generation, self.place = page.generation, Place(*page.tip)
        self.ring.clear()
        self.set_head(head, asks)
        self._live.set_head(head)

    async def _catch_up(self) -> None:
        try:
            while (self._behind or self._wants_pieces()) and self.references:
                behind, self._behind = self._behind, False
                try:
                    await self._read_on(behind)
                except ConvenerError as error:
                    log.info("cannot read the log, again", conversation_id=self.cid, error=str(error))
                    self._behind = True
                    await asyncio.sleep(0.2)
                self.wake()
        finally:
            self._catching = False

    async def _read_on(self, behind: bool) -> None:
        """Read what there is of the live answer, if it is wanted, and then the log to its end."""
        pieces: Sequence[Piece] = ()
        try:
            if self._wants_pieces():
                pieces = await self._live.read(self.generation, self.place)
            if await self._read_log() or behind:
                await self._look_for_owner()
        except ConvenerError:
            self._live.failed()
            raise
        self._live.take(pieces)

    async def _read_log(self) -> bool:
        """Read on to the end of the log. True if anything was read."""
        found = False
        while True:
            page = await self._node.logs.read(self.cid, Cursor(self.generation, self.place), PAGE)
            if page is None:
                self.stopped_reason = "deleted" if self.stopped_reason is None else self.stopped_reason
                self.answer.closed()
                return False
            if page.resync:
                # The history was rolled back or made anew. Each feed finds out by its own cursor.
                self._node.metrics.resyncs.labels(reason="history").inc()
                await self._begin(page)
                return False
            self._take(page.entries, heard=False)
            found = found or bool(page.entries)
            if self.place >= Place(*page.tip) or not page.entries:
                return found
            self.wake()

    def ended_since(self, place: Place, turn: str) -> str | None:
        """How the first turn that ended after `place` ended (or `turn`, if it is given); None if none has."""
        for item in self.ring:
            if item.place > place and item.event.kind in SETTLING and (not turn or item.event.turn == turn):
                return item.event.kind
        return None

    async def _look_for_owner(self) -> None:
        """The log does not show that a conversation was released or given up, and its publication may have been among
        what was missed.
        """
        if self.loaded or self._resting != "hibernated":
            head = await self._node.store.head(self.cid)
            if head is not None and not head.owner:
                self.unloaded(resting(head))

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
        self._cut_off: set[View] = set()

    def __iter__(self) -> Any:
        return iter(list(self._views.values()))

    def get(self, cid: str) -> View | None:
        """The view, if there is one."""
        return self._views.get(cid)

    def cut_off(self) -> None:
        """This node can do nothing for its clients, the others most likely neither: all are told."""
        for view in self._views.values():
            if view.listener is None and view.loaded and view.override is None:
                view.set_override("recovering")
                self._cut_off.add(view)

    def reconnected(self) -> None:
        """The end of `cut_off`: the log tells again what is going on, or a later word of the owner."""
        for view in self._cut_off:
            if view.override == "recovering":
                view.set_override(None)
        self._cut_off.clear()

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
