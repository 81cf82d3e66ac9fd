"""Nothing is done under an ownership that the store may have lost, before it was verified (protocol, section 8).

When a server is there again that may lack what it had acknowledged, every appender of this node holds still. Then
owner, epoch and status in the conversation, the slot in its user's slots and the record in the node's hash are read,
and written again where they are missing. Lost log entries are repaired out of the owner's memory (`tail`); where that
does not reach, the conversation is owned anew, from what the store has. What this node had given back a moment ago may
name it again: that is finished once more.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import structlog

from convener.core.admission import Slot
from convener.core.cursor import Cursor
from convener.core.model import MESSAGES, Meta
from convener.core.repair import standing
from convener.core.view import Place
from convener.errors import NotConfirmed, OwnershipLost, StoreUnavailable
from convener.manager.clock import boottime
from convener.manager.host import EndReason
from convener.manager.losses import Losses
from convener.manager.runner import Runner
from convener.manager.tail import NODE_BYTES, Tail, inputs
from convener.store.base import Fallback

if TYPE_CHECKING:
    from convener.manager.engine import Engine

log = structlog.get_logger(__name__)

ABREAST: Final = 64
"""Conversations that are verified at once."""
PAUSE_S: Final = 0.1
LEFT_S: Final = 30.0
"""Seconds for which what was given back is remembered: a replica is hardly ever further behind."""
LEFT: Final = 10_000
TRIES: Final = 20
"""Looks at a conversation that changes under them."""
FAR: Final = Cursor(place=Place(0, 10**14))


@dataclass(frozen=True, slots=True)
class Left:
    """A conversation that this node has given back. `epoch`, `seq`: where its log ended; `at`: boot-time clock."""

    cid: str
    user: str
    epoch: int
    seq: int
    at: float


@dataclass(frozen=True, slots=True)
class Owned:
    """A runner, as far as its tail is concerned."""

    runner: Runner

    @property
    def cid(self) -> str:
        """The conversation."""
        return self.runner.cid

    @property
    def tail(self) -> Tail:
        """What it may write again."""
        return self.runner.appender.tail


class Verifier:
    """Verifies what one node owns."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._node = engine.node
        self.losses = Losses(engine.node, self._owned)
        self.membership: Callable[[], Awaitable[None]] | None = None
        """Makes membership and burials what they were; None where there are no other nodes."""
        self.on_fallback: Callable[[], None] | None = None
        self._told_at = -LEFT_S
        self._left: deque[Left] = deque(maxlen=LEFT)
        self._due = asyncio.Event()
        self._under_way: set[Runner] = set()
        self._limit = asyncio.Semaphore(ABREAST)

    def _owned(self) -> Iterator[Owned]:
        return (Owned(runner) for runner in list(self._engine.runners.values()))

    def begin(self) -> None:
        """Start the background work, if anything can be lost in this store."""
        if self._node.store.watch_fallbacks(self.told):
            self._node.tails.total = NODE_BYTES
            self._node.supervisor.keep("verify", self.run)
            self._node.supervisor.keep("replication", self.losses.run)

    # -- what is told --------------------------------------------------------------------------------------------

    def told(self, fallback: Fallback) -> None:
        """A server is there again that may lack what it had acknowledged; nothing was sent to it yet."""
        self.losses.told(fallback, len(self._engine.runners))
        self.suspect()

    def suspect(self) -> None:
        """The store may have fallen back: nothing is done before everything was looked at."""
        self._node.fallbacks += 1
        self._told_at = boottime()
        if self.on_fallback is not None:
            self.on_fallback()
        for runner in self._engine.runners.values():
            runner.appender.withhold()
        self._due.set()

    def fell_back(self, runner: Runner) -> None:
        """A conversation is not what it was."""
        runner.appender.hold()
        self._node.supervisor.spawn(f"verify {runner.cid}", self._one(runner))

    def left(self, runner: Runner, why: EndReason) -> None:
        """A runner has ended; what it leaves is given back, unless somebody else has it."""
        if why in ("lost", "diverged", "closed"):
            return
        now = boottime()
        while self._left and now - self._left[0].at > LEFT_S:
            self._left.popleft()
        if self._node.tails.total:
            self._left.append(Left(runner.cid, runner.user, runner.epoch, runner.appender.written_seq, now))
            if now - self._told_at < LEFT_S:
                # It may have been given back to a store that has lost that since, after this was looked for.
                self._due.set()

    # -- all -----------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Verify everything whenever a server has fallen back."""
        while True:
            await self._due.wait()
            self._due.clear()
            try:
                if self.membership is not None:
                    await self._insist(self.membership)
                await asyncio.gather(*(self._one(runner) for runner in list(self._engine.runners.values())))
                await self._insist(self._strays)
            except Exception:
                # Whoever is held still is not let go by anything else.
                self._due.set()
                raise
            if not self._due.is_set():
                self.losses.verified()

    async def _insist(self, step: Callable[[], Awaitable[None]]) -> None:
        """Repeat a step until the store answers, as long as this life of the node lasts."""
        incarnation = self._node.incarnation
        while incarnation == self._node.incarnation and not self._node.lease.ended:
            try:
                await step()
            except OwnershipLost:
                break
            except StoreUnavailable as error:
                log.info("cannot verify, again", error=str(error))
                await asyncio.sleep(PAUSE_S)
            else:
                break

    # -- one conversation ----------------------------------------------------------------------------------------

    async def _one(self, runner: Runner) -> None:
        """Verify until that is done; then the runner goes on, or is over."""
        runner.appender.hold()
        if runner in self._under_way:
            return
        self._under_way.add(runner)
        try:
            async with self._limit:
                fallbacks = -1
                while fallbacks != self._node.fallbacks:
                    fallbacks = self._node.fallbacks
                    await self._insist(lambda: self._verify(runner))
        except Exception:
            # It would be held still for ever.
            runner.own_anew()
            raise
        finally:
            self._under_way.discard(runner)
        if not runner.over and runner.incarnation == self._node.incarnation:
            runner.appender.go_on()
            runner.missed()

    async def _verify(self, runner: Runner) -> None:
        for number in range(TRIES):
            if runner.over or await self._is_settled(runner, first=number == 0):
                return
        runner.own_anew()

    async def _is_settled(self, runner: Runner, *, first: bool) -> bool:
        """One look. False if it has to be looked at again. Raises `StoreUnavailable`, `OwnershipLost`."""
        store, cid, appender = self._node.store, runner.cid, runner.appender
        await self._node.lease.wait_valid()
        await appender.landed()
        head = await store.head(cid)
        page = await store.read(cid, FAR, 0)
        tip = (0, 0) if page is None else page.tip
        verdict = standing(head, tip, runner.meta, appender.written_seq)
        if verdict == "good" and head is not None and not await self._has_its_place(runner, head):
            # Nothing that was confirmed is lost by that, and what the inbox has is read.
            runner.own_anew()
            return True
        if verdict == "good":
            # What no replica confirms is there all the same; if it is lost once more, that is noticed once more.
            with contextlib.suppress(NotConfirmed):
                await self._write_slot(runner)
            with contextlib.suppress(NotConfirmed):
                await self._engine.records.write(cid)
            with contextlib.suppress(NotConfirmed):
                await store.index(runner.user, cid)
            return True
        if verdict == "lost":
            runner.fenced()
            return True
        if first:
            self.losses.lost(cid, max(appender.written_seq - tip[1], 0))
        request = appender.tail.missing(head, tip)
        if request is None:
            self.losses.given_up(cid)
            runner.own_anew()
            return True
        outcome = await store.repair(cid, request)
        if outcome == "OK":
            self.losses.repaired(cid, len(request.events))
        elif outcome != "GAP":
            runner.fenced()
            return True
        return False

    async def _has_its_place(self, runner: Runner, head: Meta) -> bool:
        """Whether the inbox still has what the owner has taken in and not written yet. The store may have lost that it
        was accepted, and have given its positions to others, which that append would count as taken in (I8).
        """
        reached, events = runner.appender.unconfirmed()
        if reached <= head.cursor:
            return True
        found = await self._node.store.inbox(runner.cid)
        if found is None or reached > found[0].position:
            return False
        meta, mine = found[0], inputs(events)
        there = {e.position: e.message_id for e in found[1] if e.kind in MESSAGES and e.position <= reached}
        return there == {position: name for position, name in mine.items() if position > meta.cursor}

    async def _write_slot(self, runner: Runner) -> None:
        """The slot of what this node owns (I6). Another node stamps it only to take the conversation from this one,
        which then is leaving.
        """
        mine = Slot(runner.nonce, runner.incarnation)
        held = await self._node.store.slot(runner.user, runner.cid) if runner.user else mine
        if held != mine and not runner.leaving:
            # It was there before, so it is not counted anew.
            await self._node.store.reserve(runner.user, runner.cid, mine, raised_limit=0, read=held)

    # -- what was given back -------------------------------------------------------------------------------------

    async def _strays(self) -> None:
        """Give back once more what names this node again, and own anew what has no owner but a buried one."""
        await self._node.lease.wait_valid()
        incarnation = self._node.incarnation
        _, records, _ = await self._node.store.node_records(incarnation)
        users = {left.cid: left.user for left in self._left}
        users |= {r.conversation_id: r.user for r in records if self._engine.records.held(r.conversation_id) is None}
        for left in list(self._left):
            await self._count(left)
        for cid, user in users.items():
            await self.stray(cid, user)

    async def _count(self, left: Left) -> None:
        """What this node had written before it gave a conversation back may be lost too."""
        head = await self._node.store.head(left.cid)
        # Without a head nobody knows whether it was deleted.
        if head is not None and head.epoch <= left.epoch and head.seq < left.seq:
            with contextlib.suppress(ValueError):
                # Forgotten meanwhile.
                self._left.remove(left)
            self.losses.lost(left.cid, left.seq - head.seq)
            self.losses.given_up(left.cid)

    async def stray(self, cid: str, user: str) -> None:
        """A record or a slot may name this node, which knows nothing of the conversation. Raises `StoreUnavailable`."""
        node, store = self._node, self._node.store
        if self._engine.is_held(cid):
            return
        incarnation = node.incarnation
        record = await store.record(incarnation, cid)
        meta = await store.head(cid)
        if meta is not None and (node.owns(meta.owner) or meta.owner in node.buried):
            nonce = record.nonce if record is not None else meta.nonce
            node.supervisor.spawn(f"restart {cid}", self._engine.restart(cid, user, nonce, incarnation))
            return
        slot = await store.slot(user, cid) if user else None
        if self._engine.is_held(cid):
            return
        if slot is not None and node.owns(slot.incarnation):
            await self._engine.admission.freed(await store.unreserve(user, cid, slot.nonce))
        if record is not None:
            await store.drop_record(incarnation, cid, record.nonce)
