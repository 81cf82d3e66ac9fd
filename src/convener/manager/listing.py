"""The live list: one client's view of all conversations of one user, wherever they run.

Nothing is copied from what nodes tell each other: a message only says that a conversation may have changed, and what
the client is told is read from its head then. So messages may come twice, late or in any order; and where one may be
missing, everything that the client knows is looked at again. A feed holds ids and a few words per conversation: a
client that reads slowly gets the latest state of each, however often that has changed meanwhile.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

import structlog

from convener.core.model import Meta
from convener.errors import ConvenerError
from convener.manager.base import AgentLoopInfo, ClientSink
from convener.manager.context import NodeContext
from convener.manager.queries import info_of_head
from convener.manager.supervisor import cancel_and_wait

log = structlog.get_logger(__name__)

NEWEST: Final = 100
"""Conversations of the user that a client is told at the beginning, besides those that are loaded."""
MAX_KNOWN: Final = 10_000
"""Conversations that a feed remembers; of those that it has forgotten it may tell once more what the client knows."""
MAX_DIRTY: Final = 100_000
"""Conversations that wait to be looked at; beyond that, only those that the feed knows are looked at again."""
PAGE: Final = 32
"""Heads that are read at a time."""
AT_ONCE: Final = 8
"""Feeds that read at a time: a reconnect makes all of them look again."""
PAUSE_S: Final = 0.05
"""Between two rounds of one feed: what changes many times a second is told at most so often."""
DOUBT_S: Final = 0.25
LONGEST_DOUBT_S: Final = 10.0

Change = Literal["snapshot", "created", "changed", "stopped", "deleted"]
Show = Callable[[AgentLoopInfo], Mapping[str, Any]]
"""Makes the payload of a conversation; `change` is added to it."""

_COMPARED: Final = frozenset({"running", "idle", "waiting"})
"""Statuses that head and directory both know; one of the two is a moment behind if they differ."""


@dataclass(frozen=True, slots=True)
class _Known:
    """What the client was told last of a conversation. `metadata` is a hash of it."""

    created: int
    status: str
    busy: bool
    node: str
    epoch: int
    metadata: int


class ListFeed:
    """Tells one connection of the conversations of `user`. `run` is its task; everything else only wakes it."""

    def __init__(
        self,
        node: NodeContext,
        connection_id: str,
        user: str,
        sink: ClientSink,
        show: Show,
        reading: asyncio.Semaphore,
    ) -> None:
        self._node = node
        self.connection_id = connection_id
        self.user = user
        self._sink = sink
        self._show = show
        self._reading = reading
        self._go = asyncio.Event()
        self._woken = asyncio.Event()
        self._listed = False
        self._begun = False
        self._first: set[str] = set()
        self._horizon = 0
        self._known: dict[str, _Known] = {}
        self._forgot = False
        self._dirty: dict[str, None] = {}
        self._doubtful: set[str] = set()
        self._doubt = DOUBT_S
        self._timer: asyncio.TimerHandle | None = None
        self.task: asyncio.Task[None] | None = None

    def begin(self) -> None:
        """Let the client be told."""
        self._go.set()

    def touch(self, cid: str) -> None:
        """A conversation of the user may have changed."""
        if len(self._dirty) >= MAX_DIRTY:
            self._dirty.clear()
            self._listed = False
        self._dirty[cid] = None
        self._woken.set()

    def relist(self) -> None:
        """Look at everything again: something may have been missed."""
        self._listed = False
        self._woken.set()

    def close(self) -> None:
        """The task ends; nothing wakes it any more."""
        if self._timer is not None:
            self._timer.cancel()

    async def run(self) -> None:
        """Tell until cancelled."""
        await self._go.wait()
        while True:
            try:
                await self._follow()
            except ConvenerError as error:
                log.info("a list waits for the store", user_id=self.user, error=str(error))
                await asyncio.sleep(DOUBT_S)
            except Exception:
                # It would stay connected and hear nothing more.
                log.exception("a client cannot be written to; sent away", connection_id=self.connection_id)
                await self._sink.disconnect(self.connection_id)
                return

    async def _follow(self) -> None:
        while True:
            self._woken.clear()
            if not self._listed:
                await self._list()
            todo = list(self._dirty)
            for start in range(0, len(todo), PAGE):
                await self._tell([cid for cid in todo[start : start + PAGE] if cid in self._dirty])
            if not self._woken.is_set():
                await self._woken.wait()
            await asyncio.sleep(PAUSE_S)

    async def _list(self) -> None:
        """Find what the client has to know of. What changes from here on is heard of, so nothing falls between."""
        self._listed = True
        try:
            async with self._reading:
                rows = await self._node.store.list_user(self.user, None, NEWEST)
                # What is loaded holds a slot.
                slots = await self._node.store.slots(self.user)
        except ConvenerError:
            self._listed = False
            raise
        found = dict.fromkeys([cid for cid, _ in rows] + list(slots))
        if not self._begun:
            self._begun = True
            self._first = set(found)
            self._horizon = rows[0][1] if rows else 0
        self._dirty = found | dict.fromkeys(self._known) | self._dirty

    async def _tell(self, cids: Sequence[str]) -> None:
        for cid in cids:
            del self._dirty[cid]
        try:
            async with self._reading:
                metas = await self._node.store.heads(cids)
        except BaseException:
            self._dirty = dict.fromkeys(cids) | self._dirty
            raise
        for cid, meta in zip(cids, metas, strict=True):
            await self._sink.ready(self.connection_id)
            if cid in self._dirty:
                # It changed while the client did not read: what was read of it is old.
                continue
            payload = self._look(cid, meta)
            if payload is not None:
                await self._sink.send(self.connection_id, "conversation", payload)

    # -- what to tell --------------------------------------------------------------------------------------------

    def _look(self, cid: str, meta: Meta | None) -> dict[str, Any] | None:
        """What the client has to be told of a conversation; None if it knows that already."""
        before = self._known.pop(cid, None)
        first = cid in self._first
        self._first.discard(cid)
        if meta is None or meta.user != self.user:
            self._doubtful.discard(cid)
            return None if before is None and not self._forgot else self._deleted(cid, before)
        info = info_of_head(self._node, cid, meta)
        self._check(cid, info)
        now = _Known(meta.created, info.status, info.busy, info.node, info.epoch, hash(meta.metadata))
        self._remember(cid, now)
        if now == before:
            return None
        return {**self._show(info), "change": "snapshot" if first else self._change(before, now)}

    def _change(self, before: _Known | None, now: _Known) -> Change:
        if (before is None and now.created >= self._horizon) or (before is not None and before.created != now.created):
            return "created"
        if now.status == "stopped" and (before is None or before.status != "stopped"):
            return "stopped"
        return "changed"

    def _deleted(self, cid: str, before: _Known | None) -> dict[str, Any]:
        info = AgentLoopInfo(
            conversation_id=cid,
            user_id=self.user,
            status="stopped",
            busy=False,
            node="",
            epoch=before.epoch if before is not None else 0,
        )
        return {**self._show(info), "change": "deleted"}

    def _remember(self, cid: str, known: _Known) -> None:
        self._known[cid] = known
        if len(self._known) > MAX_KNOWN:
            del self._known[next(iter(self._known))]
            self._forgot = True

    def _check(self, cid: str, info: AgentLoopInfo) -> None:
        """Look again soon if the directory says something else: its node may have told before the store had it."""
        found = self._node.directory.find(cid)
        if found is None or not {found[1].status, info.status} <= _COMPARED or found[1].status == info.status:
            self._doubtful.discard(cid)
            if not self._doubtful:
                self._doubt = DOUBT_S
            return
        self._doubtful.add(cid)
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(self._doubt, self._look_again)
            self._doubt = min(self._doubt * 2, LONGEST_DOUBT_S)

    def _look_again(self) -> None:
        self._timer = None
        for cid in self._doubtful:
            self.touch(cid)


class Lists:
    """All live lists of a node."""

    def __init__(self, node: NodeContext) -> None:
        self._node = node
        self._feeds: dict[str, ListFeed] = {}
        self._by_user: dict[str, set[ListFeed]] = {}
        self._reading = asyncio.Semaphore(AT_ONCE)
        node.directory.watchers.append(self.touch)

    def __len__(self) -> int:
        return len(self._feeds)

    def get(self, connection_id: str) -> ListFeed | None:
        """The feed of a connection."""
        return self._feeds.get(connection_id)

    def touch(self, user: str, cid: str) -> None:
        """A conversation may have changed."""
        for feed in self._by_user.get(user, ()):
            feed.touch(cid)

    def relist(self) -> None:
        """Changes may have been missed."""
        for feed in self._feeds.values():
            feed.relist()

    async def add(self, connection_id: str, user: str, sink: ClientSink, show: Show) -> None:
        """Make a connection follow the list of `user`; it is told from `ListFeed.begin` on."""
        await self.remove(connection_id)
        feed = ListFeed(self._node, connection_id, user, sink, show, self._reading)
        self._feeds[connection_id] = feed
        self._by_user.setdefault(user, set()).add(feed)
        feed.task = self._node.supervisor.spawn(f"list {connection_id}", feed.run())

    async def remove(self, connection_id: str) -> None:
        """Forget a connection, if it is known."""
        feed = self._feeds.pop(connection_id, None)
        if feed is None:
            return
        feeds = self._by_user[feed.user]
        feeds.discard(feed)
        if not feeds:
            del self._by_user[feed.user]
        feed.close()
        # Shielded: who disconnects is often cancelled for that very reason, and nobody would do this later.
        await asyncio.shield(cancel_and_wait(feed.task))

    async def close(self) -> None:
        """Forget all connections."""
        for connection_id in list(self._feeds):
            await self.remove(connection_id)
