"""The turns of one owned conversation: one at a time, in the order of their messages, each ended in one append.

A turn starts when its input was *sent* to the store, a step of it when that was *confirmed*. What a turn writes is
held until its end, or, once it has a durable step, until the next step begins; the append that ends it also moves
`done`, writes the agent's state and starts the next turn. So a crash repeats a turn whole, but for what its steps
have recorded.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, cast

import msgspec
import structlog

from convener.core import wire
from convener.core.ledger import ANSWER, Answer, Ledger, Record
from convener.core.model import STRIKES, ClaimReason, InboxEntry, Meta
from convener.core.replay import Replay
from convener.errors import ConvenerError, OwnershipLost
from convener.manager.answering import Answerer, State, call_agent
from convener.manager.appender import Appender, Ticket, Update
from convener.manager.asking import Answers
from convener.manager.clock import wall_ms
from convener.manager.context import NodeContext
from convener.manager.jsontext import to_json
from convener.manager.supervisor import cancel_and_wait
from convener.manager.turn import Entry, Input, Reason, Recorder, Turn

if TYPE_CHECKING:
    from convener.manager.runner import Runner

log = structlog.get_logger(__name__)

TURN_GRACE_S: Final = 5.0
"""How long a cancelled turn may take to end before it is abandoned."""
END_BYTES: Final = 1 << 20
INTERRUPTED: Final = "interrupted by the user"
AGAIN: Final[Mapping[ClaimReason, Reason]] = {"takeover": "takeover", "restart": "takeover", "handoff": "handoff"}
"""Why a turn is begun again that a former owner had begun; else "retry"."""


@dataclass(slots=True)
class Pending:
    """A message that was taken in and is not answered. `seq` is the place of its `input` entry; `record` what its
    turn has written so far.
    """

    message: Input
    seq: int
    attempts: int = 0
    reason: Reason = "new"
    record: Record = field(default_factory=Record)
    interrupted: bool = False

    @property
    def turn(self) -> str:
        """The id of the turn that answers it."""
        return wire.turn_id(self.message.position)


class Alone:
    """A lock that may be given back before the end of its block; without one, nothing."""

    def __init__(self, lock: asyncio.Lock | None) -> None:
        self._lock = lock
        self._held = False

    async def __aenter__(self) -> None:
        if self._lock is not None:
            await self._lock.acquire()
            self._held = True

    async def __aexit__(self, *error: object) -> None:
        self.leave()

    def leave(self) -> None:
        """Give it back, if it is held."""
        if self._held and self._lock is not None:
            self._held = False
            self._lock.release()


class Turns:
    """Starts, runs, ends and cancels turns.

    Args:
        may_start: whether a turn may be started now: not while loading, suspended, stopping, leaving.
        reached: the inbox position up to which everything is taken in.
        ended: called when a turn has ended, or begins or ends to wait for a person.
    """

    def __init__(
        self,
        node: NodeContext,
        runner: Runner,
        appender: Appender,
        meta: Meta,
        may_start: Callable[[], bool],
        reached: Callable[[], int],
        ended: Callable[[], None],
    ) -> None:
        self._node = node
        self._runner = runner
        self._appender = appender
        self._meta = meta
        self._may_start = may_start
        self._reached = reached
        self._ended = ended
        self._pending: deque[Pending] = deque()
        self._task: asyncio.Task[None] | None = None
        self._current: Pending | None = None
        self._turn: Turn[Any] | None = None
        self._answers: Answers | None = None
        self._alone = Alone(None)
        self._struck = 0
        self.halted = 0
        self.answerer: Answerer = node.agent
        self._cancelling = asyncio.Lock()
        self.state = State(node.options.max_payload_bytes, node.traits.codec)

    @property
    def unanswered(self) -> int:
        """Messages that were taken in and are not settled."""
        return len(self._pending)

    @property
    def running(self) -> bool:
        """Whether a turn is under way."""
        return self._task is not None

    @property
    def busy(self) -> bool:
        """Whether a turn is under way or a message waits for one."""
        return self._task is not None or bool(self._pending)

    @property
    def waiting(self) -> bool:
        """Whether the turn under way does nothing but wait for a person."""
        return self._task is not None and self._turn is not None and self._turn.waiting

    @property
    def resting(self) -> bool:
        """Whether cutting the turn off now would lose nothing: it waits for a person, or was stopped at a step."""
        return self._task is not None and self._turn is not None and (self._turn.waiting or self._turn.at_step)

    def stop_at_step(self) -> None:
        """Let the turn under way go no further than its next step."""
        if self._turn is not None:
            self._turn.stop_at_step()

    @property
    def head(self) -> Pending | None:
        """The message that is answered now, or next."""
        return self._pending[0] if self._pending else None

    # -- messages --------------------------------------------------------------------------------------------------

    def load(self, replay: Replay, reason: ClaimReason) -> None:
        """Take over what a former owner has left unanswered."""
        again: Reason = AGAIN.get(reason, "retry")
        self._pending = deque(
            Pending(
                Input(b.position, b.message_id, b.user_id, b.data, b.ts),
                b.seq,
                b.attempts,
                again if b.attempts else "alarm" if b.alarm else "new",
                b.record,
                interrupted=b.position <= self._meta.halted,
            )
            for b in replay.unanswered()
        )
        # Strikes are counted for the first unanswered position, which may be one that was taken back.
        if self._meta.struck == self._meta.done + 1:
            self._struck = self._meta.strikes

    @property
    def is_struck(self) -> bool:
        """Whether the turn at the head has taken too many nodes down."""
        head = self.head
        return self._struck >= STRIKES and head is not None and head.attempts > 0

    def take_in(self, update: Update, entries: Sequence[InboxEntry]) -> InboxEntry | None:
        """Add the log events of inbox entries to `update`, and do what they say. Returns the first stop.

        In their order: an interrupt must not hit a message that was sent after it.
        """
        seq = self._appender.next_seq
        stop: InboxEntry | None = None
        for entry in entries:
            if entry.kind == "stop":
                stop = stop or entry
                continue
            try:
                data: Any = msgspec.json.decode(entry.data)
            except msgspec.MsgspecError:
                self._node.metrics.malformed.labels(where="inbox").inc()
                log.exception("damaged inbox entry skipped", conversation_id=self._runner.cid, position=entry.position)
                continue
            if entry.kind == "interrupt":
                self.press(str(data))
            elif entry.kind == "answer":
                self._take_answer(update, entry, data)
            else:
                if entry.kind == "interrupting":
                    self.halt(entry.position)
                update.events.append(wire.input_event(entry))
                message = Input(entry.position, entry.message_id, entry.user, data, entry.ts)
                self.add(message, seq + len(update.events), "alarm" if entry.kind == "alarm" else "new")
        update.halted = self.halted
        return stop

    def _take_answer(self, update: Update, entry: InboxEntry, data: Any) -> None:
        """Log an answer under the turn that asked, and let that turn go on."""
        fields = cast("dict[str, Any]", data) if isinstance(data, dict) else {}
        ask_id = str(fields.get("ask_id", ""))
        answer = Answer(fields.get("data"), fields.get("expired") is True)
        if answer.expired:
            logged: dict[str, Any] = {"ask_id": ask_id, "expired": True}
        else:
            logged = {
                "ask_id": ask_id,
                "message_id": entry.message_id,
                "user_id": entry.user,
                "data": answer.data,
            }
        text = msgspec.json.encode(logged).decode()
        update.events.append(wire.event(ANSWER, ask_id.rpartition(".")[0], entry.ts, text))
        self.answered(ask_id, answer)

    def add(self, message: Input, seq: int, reason: Reason = "new") -> None:
        """A message was taken in; its `input` entry is at `seq`."""
        self._pending.append(Pending(message, seq, reason=reason))

    def answered(self, ask_id: str, answer: Answer) -> None:
        """An answer was taken in: the turn that asked goes on, if it is under way; else it finds it in its record."""
        turn = ask_id.rpartition(".")[0]
        for pending in self._pending:
            if pending.turn == turn:
                pending.record.answers.setdefault(ask_id, answer)
        if self._answers is not None and self._turn is not None and self._turn.id == turn:
            self._answers.come(ask_id, answer)

    def give_up(self) -> None:
        """Forget what waits: the conversation is being closed."""
        self._pending.clear()

    # -- starting --------------------------------------------------------------------------------------------------

    def advance(self) -> None:
        """Start the next turn, if none runs and there is one."""
        update = Update([])
        started = self.begin_next(update)
        if update.events:
            self.launch(started, self._appender.submit(update))

    def begin_next(self, update: Update) -> Pending | None:
        """Add the start of the next turn to `update`; then `launch` it with the update's ticket."""
        while self._pending and self._may_begin():
            pending = self._pending[0]
            if pending.interrupted:
                self.interrupted(update, pending, INTERRUPTED)
                continue
            pending.attempts += 1
            if pending.attempts == 1:
                waited = max(wall_ms() - pending.message.ts, 0)
                self._node.metrics.message_wait.observe(waited / 1000)
            data = to_json({"attempt": pending.attempts, "reason": pending.reason}, END_BYTES, "the start")
            update.events.append(wire.event("turn_started", pending.turn, wall_ms(), data))
            update.begins_turn = True
            return pending
        return None

    def give_up_head(self, update: Update, code: str, message: str) -> None:
        """Add the failed end of the turn at the head, which is not begun again."""
        pending = self._pending[0]
        self._end(update, pending, "turn_failed", {"message": message, "code": code})

    def _may_begin(self) -> bool:
        # While a turn is being cancelled its place is taken: what it has said is written before anything else.
        free = self._task is None and not self._cancelling.locked()
        return free and self._may_start() and not self._node.draining

    def launch(self, pending: Pending | None, ticket: Ticket) -> None:
        """Run the turn whose start was submitted."""
        if pending is not None:
            self._current = pending
            work = self._answer(pending, pending.attempts, ticket)
            self._task = self._node.supervisor.spawn(f"turn {self._runner.cid}", work)

    def _is_current(self, pending: Pending, attempt: int) -> bool:
        """Whether this very attempt is under way. One that was cancelled and goes on all the same is abandoned: it
        has no say any more, also when its turn was begun again since.
        """
        return self._current is pending and pending.attempts == attempt

    # -- running ---------------------------------------------------------------------------------------------------

    async def _answer(self, pending: Pending, attempt: int, ticket: Ticket) -> None:
        """Run one turn; its end is appended in the same step as the start of the next one."""
        try:
            await asyncio.shield(ticket.sent)
        except ConvenerError:
            return
        # Commands of one round of the loop share a write, which the next round begins with. An agent that never gives
        # the loop back, or ends the process, must not come before it: no node would ever know that the turn was begun,
        # so its takeovers would not be counted.
        await asyncio.sleep(0)
        began = time.monotonic()
        answers = Answers(pending.record.answers, self._waits_or_not)
        turn: Turn[Any] = Turn(
            self._node,
            self._runner,
            pending.message,
            attempt,
            pending.reason,
            self.state.copy(),
            Ledger(pending.record),
            self._recorder(pending, attempt, ticket),
            answers,
        )
        self._turn, self._answers = turn, answers
        struck, self._struck = self._struck, 0
        # From the second strike on, one at a time: if it takes this node down as well, it goes alone.
        self._alone = Alone(self._node.struck if struck > 1 else None)
        try:
            async with self._alone:
                error, timeout = self.state.error, self._node.options.turn_timeout
                failure = await call_agent(self.answerer, turn, error, timeout, answers)
        finally:
            turn.close()
        if not self._is_current(pending, attempt):
            return
        self._node.metrics.turn_duration.observe(time.monotonic() - began)
        self._finish(turn, pending, failure)

    def _waits_or_not(self) -> None:
        """The turn under way begins or ends to wait for a person."""
        if self.waiting:
            # It has not taken this node down, and may wait for days.
            self._alone.leave()
        self._ended()

    def _finish(self, turn: Turn[Any], pending: Pending, failure: dict[str, Any] | None) -> None:
        """Append the end. Nothing awaits here, so nobody cancels between the end of a turn and its record."""
        update = Update([])
        if failure is None:
            try:
                entries = turn.finish()
                update.state = self.state.take(turn.state)
                update.events += [self._event(pending, entry) for entry in entries]
            except ConvenerError as error:
                failure = {"message": error.detail, "code": error.wire_code}
        self._end(update, pending, "turn_done" if failure is None else "turn_failed", failure or {})
        self._task = self._current = self._turn = self._answers = None
        started = self.begin_next(update)
        self.launch(started, self._appender.submit(update))
        self._ended()

    def _end(self, update: Update, pending: Pending, kind: str, data: dict[str, Any]) -> None:
        """Add the end of a turn to `update`. `base` moves to before the next unanswered input."""
        position = pending.message.position
        text = to_json({**data, "settles": [position]}, END_BYTES, "the end")
        update.events.append(wire.event(kind, pending.turn, wall_ms(), text))
        update.ends_turn = True
        if self._pending and self._pending[0] is pending:
            self._pending.popleft()
        # Intents between the messages are done with them.
        update.done = self._pending[0].message.position - 1 if self._pending else max(self._reached(), position)
        update.base = self._pending[0].seq - 1 if self._pending else self._appender.next_seq
        self._node.metrics.turns.labels(outcome=kind.removeprefix("turn_")).inc()

    @staticmethod
    def _event(pending: Pending, entry: Entry) -> str:
        return wire.event(entry.kind, pending.turn, wall_ms(), entry.text)

    def _recorder(self, pending: Pending, attempt: int, started: Ticket) -> Recorder:
        """How a turn writes before its end: entries of this turn, as long as this attempt is the current one.

        The returned function raises `OwnershipLost` when it is not.
        """

        def record(entries: Sequence[Entry], asks: Sequence[tuple[str, str]] = ()) -> Ticket:
            if not self._is_current(pending, attempt):
                raise OwnershipLost("the turn was cancelled")
            if not entries:
                return started
            for entry in entries:
                # Submitted counts as recorded for a repetition in this process: it is written before what follows.
                pending.record.note(entry.kind, entry.data)
            events = [self._event(pending, entry) for entry in entries]
            return self._appender.submit(Update(events, asks=tuple(asks)))

        return record

    # -- cancelling ------------------------------------------------------------------------------------------------

    async def cancel(self) -> Pending | None:
        """End the turn under way, if there is one; its message stays at the head of the queue.

        Returns:
            the message whose turn was begun and has no end in the log yet: cancelled by this call, or by an earlier
            one that is not to write the end any more.
        """
        async with self._cancelling:
            task = self._task
            self._task = self._current = None
            await cancel_and_wait(task, TURN_GRACE_S)
            # What is abandoned now must neither show anything more nor keep others waiting.
            self._alone.leave()
            if self._turn is not None:
                self._turn.close()
        head = self._pending[0] if self._pending else None
        begun = head is not None and self._turn is not None and self._turn.id == head.turn
        return head if begun else None

    async def suspend(self) -> None:
        """The lease is not good: end the turn; it is begun again when the lease is (I7)."""
        current = self._current
        for begun in (current, await self.cancel()):
            if begun is not None:
                begun.reason = "retry"

    def interrupted(self, update: Update, pending: Pending, reason: str) -> None:
        """Add the end of a cancelled turn that is not begun again, with what it has said so far."""
        turn, self._turn = self._turn, None
        if turn is not None and turn.id == pending.turn:
            update.events += [self._event(pending, entry) for entry in turn.interrupted()]
        self._end(update, pending, "turn_interrupted", {"reason": reason})

    def press(self, turn: str) -> None:
        """Somebody wants the turn at the head to end. A press meant for another turn is stale and does nothing."""
        pending = self.head
        if pending is not None and turn in ("", pending.turn):
            self.halt(pending.message.position)

    def halt(self, upto: int) -> None:
        """Every turn up to this position is to end. `halted` goes into the head with the intent's own position, so
        that it is not lost with this owner.
        """
        for pending in self._pending:
            if pending.message.position > upto or pending.interrupted:
                continue
            pending.interrupted = True
            self.halted = pending.message.position
            if self._current is pending:
                self._node.supervisor.spawn(f"interrupt {self._runner.cid}", self._interrupt(pending))

    async def _interrupt(self, pending: Pending) -> None:
        """Cancel the turn, keep what it has said, go on with the queue."""
        if self._current is not pending:
            return
        await self.cancel()
        # Ended otherwise meanwhile (a stop), or to be ended by whoever may start turns again.
        if not self._pending or self._pending[0] is not pending or not self._may_start():
            self._ended()
            return
        update = Update([])
        self.interrupted(update, pending, INTERRUPTED)
        started = self.begin_next(update)
        self.launch(started, self._appender.submit(update))
        self._ended()
