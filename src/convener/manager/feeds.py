"""One client's way through one conversation: replay, `joined`, then live, at the client's own pace (I9).

A feed holds an exact place and nothing else of the log: live entries come from the view's ring, anything older from
the store. So its memory is bounded whatever the client does, and a client that is slow simply reads later.

The same goes for the answer that is being written: a feed knows how much of each part its client has, and whenever the
client has seen the log as far as the view has, sends it the rest as one piece. So a turn's pieces come between its
`turn_started` and its end, who joins late gets one piece for each part, and who is slow gets fewer and larger ones.
"""

from __future__ import annotations

import asyncio
from typing import Any, Final

import structlog

from convener.core import cursor as cursors
from convener.core.cursor import Cursor
from convener.core.live import Rest, Writing
from convener.core.model import Page
from convener.core.view import START, Place
from convener.core.wire import turn_id
from convener.errors import ConvenerError
from convener.manager.base import ClientSink
from convener.manager.context import NodeContext
from convener.manager.published import Item, decode
from convener.manager.views import View

log = structlog.get_logger(__name__)

MAX_PAGE: Final = 256
PAGE_BYTES: Final = 1 << 20
PIECE_BYTES: Final = 1 << 20
"""Of a part, so much at a time: a client takes what it could take as a log entry."""


class ClientFeed:
    """Sends one connection what it has to see. `run` is its task; everything else only wakes it."""

    def __init__(
        self,
        node: NodeContext,
        view: View,
        connection_id: str,
        sink: ClientSink,
        user_id: str,
        after: Cursor | None,
        tail: int | None,
    ) -> None:
        self._node = node
        self.view = view
        self.connection_id = connection_id
        self.user_id = user_id
        self._sink = sink
        self._after = after if after is not None else Cursor()
        self._tail = tail
        self._generation = self._after.generation
        self._place = self._after.place
        self._has_some = after is not None
        """Whether the client has anything that it would have to forget at a resync."""
        self._page = 64
        self._woken = asyncio.Event()
        self._go = asyncio.Event()
        self._joined = False
        self._status: tuple[str, bool] | None = None
        self._writing: Writing | None = None
        self._got: dict[str, int] = {}
        self.task: asyncio.Task[None] | None = None

    def begin(self) -> None:
        """Let the replay run."""
        self._go.set()

    def wake(self) -> None:
        """Something changed in the view."""
        self._woken.set()

    async def run(self) -> None:
        """Replay, then follow until cancelled or stopped."""
        await self._go.wait()
        while True:
            try:
                if await self._follow():
                    return
            except ConvenerError as error:
                # The store is away: the client keeps its place and waits with us.
                log.info("feed waits for the store", conversation_id=self.view.cid, error=str(error))
                await asyncio.sleep(0.25)
            except Exception:
                # It would stay connected and hear nothing more.
                log.exception("a client cannot be written to; sent away", conversation_id=self.view.cid)
                await self._sink.disconnect(self.connection_id)
                return

    async def _follow(self) -> bool:
        if not self._joined:
            await self._start_place()
        while True:
            self._woken.clear()
            stopped = await self._drain()
            if not self._joined:
                await self._join()
            elif stopped is not None:
                await self._say_stopped(stopped)
                return True
            else:
                await self._tell_status()
            await self._tell_pieces()
            if not self._woken.is_set():
                await self._woken.wait()

    async def _start_place(self) -> None:
        if self._tail is None:
            return
        seq = max(self.view.place.seq - self._tail, 0)
        self._generation, self._place, self._tail = "", Place(0, seq), None

    async def _drain(self) -> str | None:
        """Send what is there. Returns the reason if the conversation was stopped while the client was live."""
        stopped: str | None = None
        while True:
            items = self.view.after(self._place) if self._is_exact() else None
            if items is None:
                items = await self._read()
                if items is None:
                    return "deleted" if self._joined else None
            if not items:
                return self.view.stopped_reason if stopped is None and self.view.sent_away else stopped
            for item in items:
                await self._send("event", item.payload)
                self._place, self._has_some = item.place, True
                if item.event.kind == "stopped":
                    stopped = str(item.event.field("reason") or "")
                elif item.event.kind == "open":
                    stopped = None

    def _is_exact(self) -> bool:
        """Whether the place may be compared with the view's: same log, and not a bare number."""
        return self._generation == self.view.generation and (self._place == START or self._place.epoch > 0)

    async def _read(self) -> list[Item] | None:
        """The next page of the store, [] at the end, None if the conversation is gone."""
        page = await self._node.logs.read(self.view.cid, Cursor(self._generation, self._place), self._page)
        if page is None:
            return None
        if page.resync:
            if self._has_some:
                self._node.metrics.resyncs.labels(reason="cursor").inc()
                await self._send("resync", {"conversation_id": self.view.cid})
            self._place, self._writing = START, None
        self._adapt(page)
        self._generation = page.generation
        if not page.entries and self._place.epoch == 0:
            # A bare number at or beyond the end: the end is where it goes on.
            self._place = Place(*page.tip)
        items: list[Item] = []
        before = self._place
        for entry in page.entries:
            item = decode(entry, before, page.generation)
            before = item.place
            items.append(item)
        return items

    def _adapt(self, page: Page) -> None:
        """Pages of about a mebibyte, so that large entries do not make a replay a spike in memory."""
        size = sum(len(e.event) for e in page.entries)
        if size > PAGE_BYTES:
            self._page = max(self._page // 2, 1)
        elif len(page.entries) == self._page and size < PAGE_BYTES // 2:
            self._page = min(self._page * 2, MAX_PAGE)

    async def _send(self, event: str, payload: dict[str, Any]) -> None:
        await self._sink.ready(self.connection_id)
        await self._sink.send(self.connection_id, event, payload)

    async def _join(self) -> None:
        self._joined = True
        view = self.view
        self._status = (view.status, view.busy)
        node = view.owner.rpartition("~")[0]
        payload = {
            "conversation_id": view.cid,
            "status": view.status,
            "busy": view.busy,
            "last_seq": self._place.seq,
            "cursor": cursors.at(self._generation, self._place.epoch, self._place.seq),
            "node": node,
        }
        await self._send("joined", payload)
        view.follow_pieces()

    async def _tell_status(self) -> None:
        now = (self.view.status, self.view.busy)
        if now != self._status:
            self._status = now
            payload = {"conversation_id": self.view.cid, "status": now[0], "busy": now[1]}
            await self._send("status", payload)

    # -- the answer that is being written -------------------------------------------------------------------------

    def _may_see(self) -> bool:
        """Whether the client has seen the log exactly as far as the view has, and an answer is being written there."""
        view = self.view
        if self._place != view.place or self._generation != view.generation or view.answer.writing is None:
            return False
        if view.answer.writing != self._writing:
            self._writing, self._got = view.answer.writing, {}
        return True

    async def _tell_pieces(self) -> None:
        """Send of each part what there is beyond what the client has."""
        answer = self.view.answer
        if not self._may_see() or not answer.more(self._got):
            return
        for part in answer.parts():
            # Looked at again after each wait: a slow client then gets all that has come meanwhile.
            await self._sink.ready(self.connection_id)
            if not self._may_see():
                return
            rest = self.view.answer.rest(part, self._got.get(part, 0), PIECE_BYTES)
            if rest is not None:
                await self._send_piece(rest)
        if self._may_see() and self.view.answer.more(self._got):
            self._woken.set()

    async def _send_piece(self, rest: Rest) -> None:
        position, attempt, _ = self._writing or (0, 0, 0)
        self._got[rest.part] = rest.offset + len(rest.data)
        payload = {
            "turn": turn_id(position),
            "attempt": attempt,
            "part": rest.part,
            "type": rest.type,
            "offset": rest.offset,
            "data": rest.data,
        }
        await self._send("delta", payload)

    async def _say_stopped(self, reason: str) -> None:
        await self._send("status", {"conversation_id": self.view.cid, "status": "stopped", "busy": False})
        await self._send("stopped", {"conversation_id": self.view.cid, "reason": reason})
        await self._sink.disconnect(self.connection_id)
