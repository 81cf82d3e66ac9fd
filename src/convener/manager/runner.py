"""The loop of one conversation that this node owns: inbox in, turns one at a time, log out.

Entries are taken from the channel while they are dense; a hole, a reconnect, a resumption or a claim makes the
runner read the inbox instead, by the store's cursor (I8, I11). An input becomes a log entry at once; what happens
to it then is the business of `turns.py`.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Final, Literal

import msgspec
import structlog

from convener.core import wire
from convener.core.directory import LoopStatus
from convener.core.model import ClaimReason, InboxEntry, LogEntry, Meta, NewMessage
from convener.errors import ConvenerError, StoreUnavailable
from convener.manager.appender import Appender, Update
from convener.manager.base import SendResult
from convener.manager.clock import boottime, wall_ms
from convener.manager.context import NodeContext
from convener.manager.conversation import Conversation
from convener.manager.cutoff import CUT_OFF, STRUCK, after_cut_off
from convener.manager.host import EndReason, Host
from convener.manager.intake import Intake, chunks, is_answered, stop_reason, unanswered
from convener.manager.loops import LoopSession
from convener.manager.turns import Pending, Turns
from convener.manager.views import Publication, View

log = structlog.get_logger(__name__)

RETRY_PAUSE_S: Final = 0.1
SETTLE_S: Final = 5.0


class Runner:
    """One owned conversation. All methods run on the node's event loop."""

    def __init__(
        self, node: NodeContext, host: Host, view: View, meta: Meta, reason: ClaimReason, opened: LogEntry | None
    ) -> None:
        self._node = node
        self._host = host
        self.view = view
        self.cid = view.cid
        self.user = meta.user
        self.epoch = meta.epoch
        self.nonce = meta.nonce
        self.incarnation = node.incarnation
        self.metadata: Mapping[str, Any] = msgspec.json.decode(meta.metadata, type=dict[str, Any])
        self.status: LoopStatus = "starting"
        self.since = wall_ms()
        self.idle_since = boottime()
        self.reason: ClaimReason = reason
        self.meta = meta
        self._intake = Intake(meta.cursor)
        self._loaded = False
        self._stop: tuple[int, str] | None = None
        self._leaving = False
        self._suspended = False
        self._wake = asyncio.Event()
        self._ended = asyncio.Event()
        self._end: EndReason | None = None
        self._over = asyncio.Event()
        self._gone = asyncio.Event()
        # Batch ids are unique per epoch, so that a late copy of another owner's batch is never taken for ours.
        stem = secrets.token_hex(4)
        self.appender = Appender(node, self.cid, meta, opened, self, lambda seq: f"{stem}.{seq}")
        self.turns = Turns(node, self, self.appender, meta, self._may_start, self._reached, self._turned)
        self._session: LoopSession | None = None
        if node.traits.loop is not None:
            self._session = LoopSession(node, self, node.traits.loop, self._post, self.turns.state.copy)
            self.turns.answerer = self._session
        self._task = node.supervisor.spawn(f"run {self.cid}", self._run())

    # -- what the view hears -----------------------------------------------------------------------------------

    def heard(self, publication: Publication) -> None:
        """An inbox entry was published. The next one is taken at once; a hole reads the stream."""
        if self._leaving or self.appender.held:
            # Nothing is done under this epoch until the outcome of RELEASE is known; a refusal reads the inbox.
            self._intake.miss()
            return
        entry = self._intake.hear(publication)
        if entry is not None:
            self._take([entry], entry.position)
        elif self._intake.behind:
            self._wake.set()

    def missed(self) -> None:
        """Entries may have been missed."""
        self._intake.miss()
        self._wake.set()

    # -- what the appender says ----------------------------------------------------------------------------------

    def committed(self, entries: list[LogEntry]) -> None:
        """This node's own clients need not wait for the publication."""
        self.view.offer(entries)

    def fenced(self) -> None:
        """Somebody else owns the conversation."""
        self._finish("lost")

    def diverged(self) -> None:
        """The log is not what this owner has written: own it anew, from what the store has."""
        self._node.metrics.invariant_violations.labels(invariant="I4").inc()
        self.own_anew()

    def fell_back(self) -> None:
        """The store has lost what it had confirmed."""
        self._host.fell_back(self)

    def own_anew(self) -> None:
        """What the store has lost cannot be repaired: claim again, and go on from what it has."""
        self._finish("diverged")

    # -- life ----------------------------------------------------------------------------------------------------

    def _finish(self, why: EndReason) -> None:
        if self._end is None:
            self._end = why
            self._wake.set()
            self._over.set()
            # Whoever waits for something to be written need not wait for a lease that does not come back.
            self.appender.close()

    @property
    def over(self) -> bool:
        """Whether the runner has ended or is about to."""
        return self._end is not None

    @property
    def leaving(self) -> bool:
        """Whether it may have ended already, by a stop or a RELEASE whose outcome is not known here (I11)."""
        return self._leaving

    @property
    def acting(self) -> bool:
        """Whether the agent works: a turn is under way, and neither waits for a person nor stands at a step."""
        return self.turns.running and not self.turns.resting

    @property
    def busy(self) -> bool:
        """Whether a message is being answered or waits, or is still to be read."""
        return not self._loaded or self._intake.behind or self.turns.busy

    async def _run(self) -> None:
        try:
            await self._load()
            while self._end is None:
                self._wake.clear()
                if self._intake.behind and not self._leaving:
                    await self._read_inbox()
                if self._end is None and not self._intake.behind:
                    self._advance()
                if self._end is None and not self._wake.is_set():
                    await self._wake.wait()
        except Exception:
            log.exception("the loop of a conversation failed", conversation_id=self.cid)
            self._node.metrics.background_restarts.labels(task="conversation").inc()
            self._finish("diverged")
        finally:
            self.appender.close()
            await asyncio.shield(self._wind_up())

    async def _wind_up(self) -> None:
        await self._end_turn()
        if self.view.listener is self:
            self.view.listener = None
        self._ended.set()
        await self._host.runner_ended(self, self._end or "closed")
        self._gone.set()

    async def _load(self) -> None:
        """Read what a new owner must know; until that succeeds nothing is answered and nothing is lost."""
        while self._end is None:
            try:
                raw = await self._node.store.state(self.cid)
                replay = await unanswered(self._node.store, self.cid, self.meta)
                answered = await is_answered(self._node.store, self.cid, self.meta)
            except StoreUnavailable as error:
                log.info("cannot load, again", conversation_id=self.cid, error=str(error))
                await asyncio.sleep(RETRY_PAUSE_S)
                continue
            self.turns.state.load(raw)
            self.turns.load(replay, self.reason)
            if await self._may_go_on(answered):
                self._loaded = True
                self._begin_session()
            return

    def _begin_session(self) -> None:
        if self._session is not None and self._may_start():
            self._session.start()

    async def _end_turn(self) -> Pending | None:
        """End whatever runs of the agent. See `Turns.cancel`."""
        current = await self.turns.cancel()
        if self._session is not None:
            await self._session.stop()
        return current

    async def _post(self, message: NewMessage, known: bool) -> SendResult:
        return await self._host.post(self.cid, message, known)

    @property
    def armed(self) -> bool:
        """Whether the conversation's loop waits for its own time."""
        return self._session is not None and self._session.armed

    # -- after a crash -------------------------------------------------------------------------------------------

    async def _may_go_on(self, answered: bool) -> bool:
        """What becomes of a turn that was cut off when its node went down. False if the conversation is parked."""
        found = (self._node, self.conversation(), self.turns, self.meta, self.reason)
        verdict = await after_cut_off(*found, answered=answered, over=self._over)
        if self._end is not None:
            return False
        if verdict == "failed":
            await self._park("failed", "too_many_takeovers", STRUCK)
        elif verdict == "wait":
            await self._park("held", "", "")
        elif verdict == "fail":
            update = Update([])
            self.turns.give_up_head(update, "recovery_failed", CUT_OFF)
            self.appender.submit(update)
        return verdict in ("resume", "fail")

    async def _park(self, status: Literal["failed", "held"], code: str, message: str) -> None:
        """Leave the conversation to whoever says `resume`: nothing is started unasked."""
        update = Update([], closing=status)
        if status == "failed":
            self.turns.give_up_head(update, code, message)
        log.warning("the conversation waits for resume", conversation_id=self.cid, status=status)
        self._leaving = True
        try:
            await asyncio.shield(self.appender.submit(update).written)
        except ConvenerError:
            return
        self._finish(status)
        await self.view.announce("waiting" if status == "held" else "failed")

    # -- inbox ---------------------------------------------------------------------------------------------------

    async def _read_inbox(self) -> None:
        """Read by the store's cursor: what is under way must be settled first, or it would be taken in twice."""
        try:
            await self._lease_and_settle()
            if self._end is not None:
                return
            found = await self._intake.read(self._node.store, self.cid)
        except StoreUnavailable as error:
            log.info("cannot read the inbox, again", conversation_id=self.cid, error=str(error))
            await asyncio.sleep(RETRY_PAUSE_S)
            self._wake.set()
            return
        if self.appender.held:
            # It may be what a store says that has fallen back.
            self.missed()
            return
        if found is None or found[0].owner != self.incarnation or found[0].epoch != self.epoch:
            self._finish("lost")
            return
        _, entries, upto = found
        for piece in chunks(entries):
            self._take(piece, piece[-1].position)
        self._take([], upto)

    async def _lease_and_settle(self) -> None:
        while self._end is None:
            if not self._node.lease.valid():
                await asyncio.sleep(RETRY_PAUSE_S)
                if self._node.lease.ended:
                    self._finish("closed")
                continue
            if self.appender.quiet and not self.appender.held:
                return
            try:
                async with asyncio.timeout(1.0):
                    await self.appender.settled()
                    await self.appender.going_on()
            except TimeoutError:
                continue
            except ConvenerError:
                self._finish("lost")

    def _take(self, entries: list[InboxEntry], upto: int) -> None:
        """Make inputs of entries, in order, in one append together with the start of the next turn.

        Args:
            upto: the position that is reached with them.
        """
        update = Update([])
        before = self._intake.taken
        stop = self.turns.take_in(update, entries)
        if stop is not None:
            self._stop = self._stop or (stop.position, stop_reason(stop))
        self._intake.taken = max(upto, before)
        update.cursor = self._reached()
        started = self.turns.begin_next(update)
        if not self.turns.busy:
            # Intents have positions too: with nothing to answer, everything up to here is done.
            update.done = update.cursor
        if update.events or update.cursor > before:
            self.turns.launch(started, self.appender.submit(update))
        self._report()
        self._wake.set()

    def _reached(self) -> int:
        """The position up to which everything is taken in.

        A stop's own is passed by the batch that closes, never before: closing must not be lost.
        """
        return self._intake.taken if self._stop is None else min(self._intake.taken, self._stop[0] - 1)

    # -- turns ---------------------------------------------------------------------------------------------------

    def _advance(self) -> None:
        """Do what is next: obey a stop, start a turn, or be idle."""
        if self._stop is not None:
            if not self._leaving:
                self._leaving = True
                self._node.supervisor.spawn(f"stop {self.cid}", self._obey_stop(*self._stop))
        else:
            self.turns.advance()
        self._report()

    def _may_start(self) -> bool:
        """Whether a turn may be started."""
        return self._loaded and not self._suspended and not self._leaving and self._stop is None

    def _turned(self) -> None:
        """A turn has ended."""
        self._report()
        self._wake.set()

    # -- suspension ------------------------------------------------------------------------------------------------

    async def suspend(self) -> None:
        """The lease is not good: end the turn under way. Its input stays pending and is begun again (I7)."""
        if self._suspended:
            return
        self._suspended = True
        await self.turns.suspend()
        if self._session is not None:
            await self._session.stop()
        self._report()

    def resume(self) -> None:
        """The lease is good again: send what waits, read the inbox as after a reconnect, go on."""
        if self._suspended:
            self._suspended = False
            self._begin_session()
            self.appender.push()
            self.missed()

    # -- the end ---------------------------------------------------------------------------------------------------

    async def _obey_stop(self, position: int, reason: str) -> None:
        """Close the log: the running turn is interrupted, what is queued is given up, all in one append."""
        current = await self._end_turn()
        update = Update([], closing="stopped", ends_turn=True, cursor=position, done=position)
        if current is not None:
            self.turns.interrupted(update, current, reason)
        update.done = position
        update.base = self.appender.next_seq
        update.events.append(wire.stopped_event(reason, wall_ms()))
        self.turns.give_up()
        try:
            await asyncio.shield(self.appender.submit(update).written)
        except ConvenerError:
            return
        self._finish("stopped")

    async def hibernate(self) -> bool:
        """Release the conversation if it is idle. True if it is released, False if it is not idle.

        From sending RELEASE until its outcome is known this node does not act under the epoch (I13, model_wake).
        """
        if self._leaving or self._end is not None or self._stop is not None or self._intake.behind:
            return False
        if self.busy and not self.turns.waiting:
            return False
        if not self.appender.quiet or self.appender.held or not self._node.lease.valid():
            return False
        self._leaving = True
        # Shielded with all that follows from it: whoever asked may give up, the outcome counts all the same.
        return await asyncio.shield(self._release())

    async def _release(self) -> bool:
        # A turn that waits for a person is begun again when the answer has come.
        await self.turns.suspend()
        if self._session is not None:
            await self._session.stop()
        fallbacks = self._node.fallbacks
        while self._end is None:
            try:
                seq = self.appender.written_seq
                outcome = await self._node.store.release(self.cid, self.incarnation, self.epoch, seq)
            except StoreUnavailable:
                # Unknown: ask again. Somebody else or nobody as owner then means that it was released.
                await asyncio.sleep(RETRY_PAUSE_S)
                continue
            if outcome != "PENDING":
                # Not the owner: it was released, unless the store has forgotten that this node was it.
                self._finish("released" if fallbacks == self._node.fallbacks else "diverged")
                return True
            self._go_on()
            return False
        return False

    async def hand_over(self, take: Callable[[], Awaitable[object]]) -> bool:
        """Let another node own the conversation: stop acting, then ask it. A turn under way is cut off; it is begun
        again there. True if this node does not own it any more.

        From asking until the outcome is known this node does not act under the epoch (I7). `take` raises
        `OwnerUnavailable` with code ``not_taken`` if nothing was begun there; after any other error the conversation
        is owned anew, under an epoch that a late claim cannot match.
        """
        ready = self._loaded and self._node.lease.valid() and not self.appender.held
        if self._leaving or self._end is not None or self._stop is not None or not ready:
            return False
        self._leaving = True
        # Shielded with all that follows from it: whoever asked may give up, the outcome counts all the same.
        return await asyncio.shield(self._hand_over(take))

    async def _hand_over(self, take: Callable[[], Awaitable[object]]) -> bool:
        await self.turns.suspend()
        if self._session is not None:
            await self._session.stop()
        try:
            async with asyncio.timeout(SETTLE_S):
                await self.appender.settled()
            await take()
        except (TimeoutError, ConvenerError) as error:
            if self._end is not None:
                return False
            if isinstance(error, TimeoutError) or error.wire_code == "not_taken":
                self._go_on()
                return False
            log.info("whether it was handed over is not known", conversation_id=self.cid, error=str(error))
            self._finish("diverged")
            return False
        self._finish("moved")
        return True

    def _go_on(self) -> None:
        """Act again: nothing has moved."""
        self._leaving = False
        self._begin_session()
        self.missed()

    async def finish_turn(self, deadline: float) -> None:
        """Wait until nothing is under way and everything is committed, at most until `deadline` (of `boottime`).

        Messages that only wait do not count: whoever drains starts no more turns.
        """
        while self._end is None and (self.acting or self._intake.behind or not self._loaded or not self.appender.quiet):
            if boottime() > deadline:
                return
            await asyncio.sleep(0.02)

    def stop_at_step(self) -> None:
        """Let the turn under way go no further than its next step: what it does until then is not lost."""
        self.turns.stop_at_step()

    async def close(self) -> None:
        """End without giving anything back: the node goes, recovery takes what is left."""
        self._finish("closed")
        await self._ended.wait()

    async def wait_ended(self) -> None:
        """Return when it is over."""
        await self._ended.wait()

    async def wait_gone(self) -> None:
        """Return when it is over, and what that leaves to give back is given back."""
        await self._gone.wait()

    def _report(self) -> None:
        status: LoopStatus = "waiting" if self.turns.waiting else "running" if self.turns.busy else "idle"
        if self._suspended:
            status = "recovering"
        elif not self._loaded:
            status = "starting"
        if status in ("idle", "waiting") and self.status != status:
            self.idle_since = boottime()
        if status != self.status:
            self.status, self.since = status, wall_ms()
            self._host.runner_changed(self)

    def conversation(self) -> Conversation:
        """The conversation as its methods see it."""
        return Conversation(self._node, self)
