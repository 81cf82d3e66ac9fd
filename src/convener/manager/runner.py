"""The loop of one conversation that this node owns: inbox in, turns one at a time, log out.

Entries are taken from the channel while they are dense; a hole, a reconnect, a resumption or a claim makes the
runner read the inbox instead, by the store's cursor (I8, I11). An input becomes a log entry at once; its turn
starts when that was sent; what the turn writes is appended in one batch that also moves `done`.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal, Protocol

import msgspec
import structlog

from convener.core import wire
from convener.core.directory import LoopStatus
from convener.core.model import STRIKES, ClaimReason, InboxEntry, LogEntry, Meta
from convener.errors import ConvenerError, StoreUnavailable
from convener.manager.answering import State, call_agent
from convener.manager.appender import Appender, Update
from convener.manager.clock import boottime, wall_ms
from convener.manager.context import NodeContext
from convener.manager.intake import Intake, chunks, stop_reason, unanswered
from convener.manager.supervisor import cancel_and_wait
from convener.manager.turn import Conversation, Input, Reason, Turn, to_json
from convener.manager.views import Publication, View

log = structlog.get_logger(__name__)

RETRY_PAUSE_S: Final = 0.1
TURN_GRACE_S: Final = 5.0
"""How long a cancelled turn may take to end before it is abandoned."""

EndReason = Literal["released", "stopped", "lost", "diverged", "closed"]


@dataclass(slots=True)
class Pending:
    """A message that was taken in and is not answered. `seq` is the place of its `input` entry."""

    message: Input
    seq: int
    attempts: int = 0
    reason: Reason = "new"


class Host(Protocol):
    """The node's side of a runner."""

    def runner_changed(self, runner: Runner) -> None:
        """Status or activity changed."""
        ...

    async def runner_ended(self, runner: Runner, why: EndReason) -> None:
        """It is over: forget it, and give back what the reason leaves to give back."""
        ...


class Runner:
    """One owned conversation. All methods run on the node's event loop."""

    def __init__(self, node: NodeContext, host: Host, view: View, meta: Meta, reason: ClaimReason) -> None:
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
        self._meta = meta
        self._intake = Intake(meta.cursor)
        self._done = meta.done
        self._pending: deque[Pending] = deque()
        self._turn: asyncio.Task[None] | None = None
        self._current: Pending | None = None
        self._state = State(node.options.max_payload_bytes)
        self._loaded = False
        self._stop: tuple[int, str] | None = None
        self._leaving = False
        self._suspended = False
        self._wake = asyncio.Event()
        self._ended = asyncio.Event()
        self._end: EndReason | None = None
        # Batch ids are unique per epoch, so that a late copy of another owner's batch is never taken for ours.
        stem = secrets.token_hex(4)
        self._appender = Appender(node, self.cid, meta.epoch, meta.seq, self, lambda seq: f"{stem}.{seq}")
        self._task = node.supervisor.spawn(f"run {self.cid}", self._run())

    # -- what the view hears -----------------------------------------------------------------------------------

    def heard(self, publication: Publication) -> None:
        """An inbox entry was published. The next one is taken at once; a hole reads the stream."""
        if self._leaving:
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
        """The store's history was rolled back under us: own it anew, from what the store has."""
        self._node.metrics.invariant_violations.labels(invariant="I4").inc()
        self._finish("diverged")

    # -- life ----------------------------------------------------------------------------------------------------

    def _finish(self, why: EndReason) -> None:
        if self._end is None:
            self._end = why
            self._wake.set()

    @property
    def over(self) -> bool:
        """Whether the runner has ended or is about to."""
        return self._end is not None

    @property
    def leaving(self) -> bool:
        """Whether it may have ended already, by a stop or a RELEASE whose outcome is not known here (I11)."""
        return self._leaving

    @property
    def busy(self) -> bool:
        """Whether a message is being answered or waits, or is still to be read."""
        return not self._loaded or self._intake.behind or self._turn is not None or bool(self._pending)

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
            self._appender.close()
            await asyncio.shield(self._wind_up())

    async def _wind_up(self) -> None:
        turn, self._turn = self._turn, None
        await cancel_and_wait(turn, TURN_GRACE_S)
        if self.view.listener is self:
            self.view.listener = None
        self._ended.set()
        await self._host.runner_ended(self, self._end or "closed")

    async def _load(self) -> None:
        """Read what a new owner must know; until that succeeds nothing is answered and nothing is lost."""
        while self._end is None:
            try:
                raw = await self._node.store.state(self.cid)
                await self._replay()
            except StoreUnavailable as error:
                log.info("cannot load, again", conversation_id=self.cid, error=str(error))
                await asyncio.sleep(RETRY_PAUSE_S)
                continue
            self._state.load(raw)
            self._loaded = True
            return

    async def _replay(self) -> None:
        """Find the unanswered inputs and how often each was begun."""
        replay = await unanswered(self._node.store, self.cid, self._meta)
        self._done = replay.done
        again: Reason = "takeover" if self.reason in ("takeover", "restart") else "retry"
        self._pending = deque(
            Pending(
                Input(b.position, b.message_id, b.user_id, b.data, b.ts),
                b.seq,
                b.attempts,
                again if b.attempts else "new",
            )
            for b in replay.unanswered()
        )

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
            if self._appender.quiet:
                return
            try:
                async with asyncio.timeout(1.0):
                    await self._appender.settled()
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
        seq = self._appender.next_seq
        before = self._intake.taken
        for entry in entries:
            if entry.kind == "stop":
                self._stop = self._stop or (entry.position, stop_reason(entry))
                continue
            try:
                data: Any = msgspec.json.decode(entry.data)
            except msgspec.MsgspecError:
                self._node.metrics.malformed.labels(where="inbox").inc()
                log.exception("damaged inbox entry skipped", conversation_id=self.cid, position=entry.position)
                continue
            update.events.append(wire.input_event(entry))
            message = Input(entry.position, entry.message_id, entry.user, data, entry.ts)
            self._pending.append(Pending(message, seq + len(update.events)))
        self._intake.taken = max(upto, before)
        if self._stop is None:
            # The stop's own position is passed by the batch that closes, never before: closing must not be lost.
            update.cursor = self._intake.taken
            started = self._begin_next(update)
        else:
            update.cursor = min(self._intake.taken, self._stop[0] - 1)
            started = None
        if update.events or update.cursor > before:
            ticket = self._appender.submit(update)
            if started is not None:
                self._start(started, ticket.sent)
        self._report()
        self._wake.set()

    # -- turns ---------------------------------------------------------------------------------------------------

    def _advance(self) -> None:
        """Do what is next: obey a stop, start a turn, or be idle."""
        if self._stop is not None:
            if not self._leaving:
                self._leaving = True
                self._node.supervisor.spawn(f"stop {self.cid}", self._obey_stop(*self._stop))
        elif self._turn is None and not self._suspended and not self._leaving:
            update = Update([])
            started = self._begin_next(update)
            if started is not None:
                self._start(started, self._appender.submit(update).sent)
        self._report()

    def _begin_next(self, update: Update) -> Pending | None:
        """Add the start of the next turn to `update` if none runs."""
        if self._turn is not None or not self._pending or not self._loaded or self._suspended:
            return None
        if self._stop is not None or self._leaving or self._node.draining:
            return None
        pending = self._pending[0]
        if self._is_struck(pending):
            self._pending.popleft()
            message = "the turn was given up: three nodes in a row went down while it ran"
            self._settle(update, pending, "turn_failed", {"message": message, "code": "too_many_takeovers"})
            return self._begin_next(update)
        pending.attempts += 1
        data = to_json({"attempt": pending.attempts, "reason": pending.reason}, 1 << 10, "the start")
        update.events.append(wire.event("turn_started", self._turn_id(pending), wall_ms(), data))
        return pending

    def _is_struck(self, pending: Pending) -> bool:
        meta = self._meta
        return meta.strikes >= STRIKES and meta.struck == pending.message.position and pending.attempts > 0

    @staticmethod
    def _turn_id(pending: Pending) -> str:
        return wire.turn_id(pending.message.position)

    def _settle(self, update: Update, pending: Pending, kind: str, data: dict[str, Any]) -> None:
        """Add the end of a turn to `update`. `base` moves to before the next unanswered input."""
        position = pending.message.position
        data = {**data, "settles": [position]}
        update.events.append(wire.event(kind, self._turn_id(pending), wall_ms(), to_json(data, 1 << 20, "the end")))
        update.done = self._done = max(position, self._done)
        others = [p.seq for p in self._pending if p is not pending]
        update.base = min(others) - 1 if others else self._appender.next_seq
        self._node.metrics.turns.labels(outcome=kind.removeprefix("turn_")).inc()

    def _start(self, pending: Pending, sent: asyncio.Future[None]) -> None:
        self._current = pending
        self._turn = self._node.supervisor.spawn(f"turn {self.cid}", self._answer(pending, sent))

    async def _answer(self, pending: Pending, sent: asyncio.Future[None]) -> None:
        """Run one turn; its end is appended in the same step as the start of the next one."""
        try:
            await asyncio.shield(sent)
        except ConvenerError:
            return
        began = time.monotonic()
        turn = Turn(self._node, self, pending.message, pending.attempts, pending.reason, self._state.copy())
        update = Update([])
        if self._meta.strikes > 1 and self._meta.struck == pending.message.position:
            # From the second strike on, one at a time: if it takes this node down as well, it goes alone.
            async with self._node.struck:
                failure = await call_agent(self._node.agent, turn, self._state.error, self._node.options.turn_timeout)
        else:
            failure = await call_agent(self._node.agent, turn, self._state.error, self._node.options.turn_timeout)
        if self._current is not pending:
            # Cancelled and went on all the same: abandoned, whatever it has to say.
            return
        if failure is None:
            try:
                events = turn.finished_events(wall_ms())
                update.state = self._state.take(turn.state)
                update.events += events
            except ConvenerError as error:
                failure = {"message": error.detail, "code": error.wire_code}
        self._node.metrics.turn_duration.observe(time.monotonic() - began)
        # From here on nothing awaits, so nobody cancels between the end of the turn and its record.
        if self._pending and self._pending[0] is pending:
            self._pending.popleft()
        if failure is None:
            self._settle(update, pending, "turn_done", {})
        else:
            self._settle(update, pending, "turn_failed", failure)
        self._turn = self._current = None
        started = self._begin_next(update)
        ticket = self._appender.submit(update)
        if started is not None:
            self._start(started, ticket.sent)
        self._report()
        self._wake.set()

    # -- suspension ------------------------------------------------------------------------------------------------

    async def suspend(self) -> None:
        """The lease is not good: end the turn under way. Its input stays pending and is begun again (I7)."""
        if self._suspended:
            return
        self._suspended = True
        turn, current = self._turn, self._current
        self._turn = self._current = None
        if turn is not None and current is not None:
            current.reason = "retry"
            await cancel_and_wait(turn, TURN_GRACE_S)
        self._report()

    def resume(self) -> None:
        """The lease is good again: send what waits, read the inbox as after a reconnect, go on."""
        if self._suspended:
            self._suspended = False
            self._appender.push()
            self.missed()

    # -- the end ---------------------------------------------------------------------------------------------------

    async def _obey_stop(self, position: int, reason: str) -> None:
        """Close the log: the running turn is interrupted, what is queued is given up, all in one append."""
        turn, current = self._turn, self._current
        self._turn = self._current = None
        await cancel_and_wait(turn, TURN_GRACE_S)
        update = Update([], stopped=True, cursor=position, done=position)
        if current is not None:
            self._settle(update, current, "turn_interrupted", {"reason": reason})
        update.done = position
        update.base = self._appender.next_seq
        update.events.append(wire.stopped_event(reason, wall_ms()))
        self._pending.clear()
        try:
            await asyncio.shield(self._appender.submit(update).written)
        except ConvenerError:
            return
        self._finish("stopped")

    async def hibernate(self) -> bool:
        """Release the conversation if it is idle. True if it is released, False if it is not idle.

        From sending RELEASE until its outcome is known this node does not act under the epoch (I13, model_wake).
        """
        if self.busy or self._leaving or self._end is not None or self._stop is not None:
            return False
        if not self._appender.quiet or not self._node.lease.valid():
            return False
        self._leaving = True
        # Shielded with all that follows from it: whoever asked may give up, the outcome counts all the same.
        return await asyncio.shield(self._release())

    async def _release(self) -> bool:
        while self._end is None:
            try:
                seq = self._appender.written_seq
                outcome = await self._node.store.release(self.cid, self.incarnation, self.epoch, seq)
            except StoreUnavailable:
                # Unknown: ask again. Somebody else or nobody as owner then means that it was released.
                await asyncio.sleep(RETRY_PAUSE_S)
                continue
            if outcome != "PENDING":
                self._finish("released")
                return True
            self._leaving = False
            self.missed()
            return False
        return False

    async def finish_turn(self, timeout: float) -> None:
        """Wait until nothing is under way and everything is committed, at most `timeout` seconds.

        Messages that only wait do not count: whoever drains starts no more turns.
        """
        deadline = boottime() + timeout
        while self._end is None and (
            self._turn is not None or self._intake.behind or not self._loaded or not self._appender.quiet
        ):
            if boottime() > deadline:
                return
            await asyncio.sleep(0.02)

    async def close(self) -> None:
        """End without giving anything back: the node goes, recovery takes what is left."""
        self._finish("closed")
        await self._ended.wait()

    async def wait_ended(self) -> None:
        """Return when it is over."""
        await self._ended.wait()

    def _report(self) -> None:
        status: LoopStatus = "running" if self._turn is not None or self._pending else "idle"
        if self._suspended:
            status = "recovering"
        elif not self._loaded:
            status = "starting"
        if status == "idle" and self.status != "idle":
            self.idle_since = boottime()
        if status != self.status:
            self.status, self.since = status, wall_ms()
            self._host.runner_changed(self)

    def conversation(self) -> Conversation:
        """The conversation as its methods see it."""
        return Conversation(self._node, self)
