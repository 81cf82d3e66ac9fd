"""What an agent gets: one turn."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Generic, Literal, Protocol, Self, cast

import msgspec
from typing_extensions import TypeVar

from convener.core import wire
from convener.core.ledger import ASK, STEP, Ledger, Mismatch
from convener.errors import AskExpired, ConvenerError, InvalidRequest, OwnershipLost, PayloadTooLarge
from convener.ids import check_id
from convener.manager.appender import Ticket
from convener.manager.asking import Answers, Schema, check_schema
from convener.manager.clock import wall_ms
from convener.manager.conversation import Conversation
from convener.manager.jsontext import to_json
from convener.manager.streaming import TEXT, Streamer
from convener.manager.threads import run_in_thread
from convener.manager.timers import ASK_TIMER, insist

if TYPE_CHECKING:
    from convener.manager.context import NodeContext
    from convener.manager.runner import Runner

Reason = Literal["new", "retry", "takeover", "handoff", "alarm"]
S = TypeVar("S", default=dict[str, Any])

RESERVED: Final = frozenset(
    {"open", "input", "turn_started", "step", "reply", "ask", "answer", "turn_done", "turn_failed"}
    | {"turn_interrupted", "stopped", "damaged"}
)
MAX_ENTRIES: Final = 2000
"""What one append carries of a turn, between two of its steps: stores cap the arguments of a command."""
MAX_TIMEOUT_S: Final = 10 * 365 * 86_400.0


@dataclass(frozen=True, slots=True)
class Fence:
    """A fencing token for the agent's own stores and tools: refuse what comes with a lower epoch."""

    conversation_id: str
    epoch: int
    turn: str


@dataclass(frozen=True, slots=True)
class Input:
    """The message that a turn answers. `position` is its number in the inbox, `ts` ms since 1970."""

    position: int
    message_id: str
    user_id: str
    data: Any
    ts: int


@dataclass(frozen=True, slots=True)
class Entry:
    """An entry that a turn writes: its kind, its data, and the data's JSON text."""

    kind: str
    data: Any
    text: str


class Recorder(Protocol):
    """Writes entries of the running turn now, in one append; without entries, the ticket of the turn's start.

    `asks` are questions that are opened with them: id and JSON text. Raises `OwnershipLost` if the turn is not the
    current one any more.
    """

    def __call__(self, entries: Sequence[Entry], asks: Sequence[tuple[str, str]] = ()) -> Ticket: ...


@dataclass(frozen=True, slots=True)
class Retry:
    """How often and after which pauses a failing step is tried again.

    Attributes:
        attempts: how often it is run at most.
        wait: seconds before the second time; `factor` times as long before each further one, `longest` at most.
    """

    attempts: int = 3
    wait: float = 0.5
    factor: float = 2.0
    longest: float = 30.0

    def pauses(self) -> Iterator[float]:
        """Seconds before each further time."""
        pause = self.wait
        for _ in range(self.attempts - 1):
            yield min(pause, self.longest)
            pause *= self.factor


class StepFailed(ConvenerError):
    """A step has failed, in this attempt of the turn or in an earlier one, and that is recorded
    (``record_errors=True``). Its cause is the exception, in the attempt that ran the step.
    """

    code = "step_failed"

    @classmethod
    def of(cls, error: Mapping[str, str]) -> Self:
        """Of a recorded ``{type, message}``."""
        return cls(f"{error.get('type', 'Error')}: {error.get('message', '')}")


def _check_timeout(timeout: object) -> None:
    if timeout is None:
        return
    is_number = isinstance(timeout, int | float) and not isinstance(timeout, bool)
    if not (is_number and 0 < cast("float", timeout) <= MAX_TIMEOUT_S):
        raise InvalidRequest("timeout must be a number of seconds above 0, at most ten years")


# The turn whose step runs, and the step's key. The turn too: a task that is begun within a step, such as that of
# another conversation which the step sends something to, inherits the context and is not within the step.
_within: ContextVar[tuple[object, str]] = ContextVar("convener_step", default=(None, ""))


class Turn(Generic[S]):
    """The processing of one message. `S` is the type of the agent's state.

    What a turn writes is held until it ends and then appended as one batch together with `state`: a turn that dies
    in between is repeated whole, with `attempt` one higher, and leaves nothing behind. Durable steps (`step`) are the
    exception: once one is recorded it is not run again, and what was written before a step is in the log.
    """

    def __init__(
        self,
        node: NodeContext,
        runner: Runner,
        message: Input,
        attempt: int,
        reason: Reason,
        state: S,
        ledger: Ledger,
        record: Recorder,
        answers: Answers,
    ) -> None:
        self._node = node
        self._limit = node.options.max_payload_bytes
        self.id = wire.turn_id(message.position)
        self.input = message
        self.attempt = attempt
        self.reason: Reason = reason
        self.state = state
        self.conversation = Conversation(node, runner, self)
        self.fence = Fence(runner.cid, runner.epoch, self.id)
        self._ledger = ledger
        self._record = record
        self._verified = runner.appender.going_on
        self._answers = answers
        self._entries: list[Entry] = []
        self._streamer = Streamer(node, runner.cid, runner.epoch, self.id, attempt, record(()))
        self._size = 0
        self._streamed = 0
        self._steps = 0
        self._go_no_further = False
        self._held_up = 0

    @property
    def data(self) -> Any:
        """The message's data, any JSON value."""
        return self.input.data

    @property
    def text(self) -> str:
        """The message's ``text`` if its data is an object with one, the data itself if it is a string, else ""."""
        data = self.input.data
        if isinstance(data, str):
            return data
        text = cast(dict[str, Any], data).get("text") if isinstance(data, dict) else None
        return text if isinstance(text, str) else ""

    @property
    def key(self) -> str:
        """Inside a step: its idempotency key, the same in every attempt, for tools and services outside; else ""."""
        turn, key = _within.get()
        return key if turn is self else ""

    # -- output ----------------------------------------------------------------------------------------------------

    async def reply(self, data: Any) -> None:
        """Answer: a `reply` entry. Raises `PayloadTooLarge`, `InvalidRequest` (not JSON, or within a step)."""
        self._not_within_step("reply")
        self._hold("reply", data)
        self._streamer.replace()

    async def stream(self, piece: Any, part: str = "text", type: str = "text") -> None:  # noqa: A002 - the interface's name
        """Answer piece by piece: clients get each piece as it comes, and all of them at the end as one `reply`,
        ``{part: joined}``, unless `reply` is called. A slow client never holds the agent up.

        Args:
            piece: a string for the type "text", whose pieces are joined; any JSON value for other types, whose pieces
                make a list.
            part: which part of the answer it belongs to ("text", "reasoning", …); a part has one type.

        Raises:
            InvalidRequest: the piece does not fit the type, or the part has another.
            PayloadTooLarge: more than `max_payload_bytes` were streamed.
        """
        check_id(part, "part")
        check_id(type, "type")
        if type == TEXT and not isinstance(piece, str):
            raise InvalidRequest("a piece of type text must be a string")
        self._streamed += len(to_json(piece, self._limit, "the piece"))
        if self._streamed > self._limit:
            raise PayloadTooLarge(f"the turn has streamed more than {self._limit} bytes")
        self._streamer.add(piece, part, type)

    async def emit(self, kind: str, data: Any) -> None:
        """Write an entry of a kind of your own. Raises `InvalidRequest` for a reserved or malformed kind, and within a
        step.
        """
        self._not_within_step("emit")
        check_id(kind, "kind")
        if kind in RESERVED:
            raise InvalidRequest(f"the kind {kind} is convener's own")
        self._hold(kind, data)

    def _not_within_step(self, what: str) -> None:
        # A turn that is repeated does not run a recorded step: what was written within it would be missed in this
        # attempt, and what comes after it taken for that.
        if self.key:
            raise InvalidRequest(f"{what} within a step (of the key {self.key}): only stream is possible there")

    def _hold(self, kind: str, data: Any) -> None:
        text = to_json(data, self._limit, f"the {kind}")
        try:
            if not self._ledger.write(kind):
                return
        except Mismatch as error:
            raise InvalidRequest(str(error), code="turn_mismatch") from error
        self._count(text)
        self._entries.append(Entry(kind, data, text))

    def _count(self, text: str) -> None:
        # One append carries what is held; this bounds it.
        if len(self._entries) >= MAX_ENTRIES:
            raise PayloadTooLarge(f"the turn has written more than {MAX_ENTRIES} entries without a step between them")
        self._size += len(text)
        if self._size > 4 * self._limit:
            raise PayloadTooLarge(f"the turn has written more than {4 * self._limit} bytes")

    # -- steps -----------------------------------------------------------------------------------------------------

    async def step(
        self,
        name: str,
        func: Callable[..., Any],
        *args: Any,
        retry: Retry | None = None,
        record_errors: bool = False,
    ) -> Any:
        """Run ``func(*args)`` once, whatever happens to this node: its result is recorded when it is done, and given
        back instead of a second run when the turn is repeated. Steps may run at the same time.

        What comes back is what the record has, in every attempt: a tuple is a list, a dataclass a dict. Within a step
        there is nothing of the turn but `stream` and `key`: nothing else could be matched when it is repeated.

        Args:
            name: of the step; with the number of its occurrence in the turn it identifies the record.
            func: plain (run in a thread) or async; returns a JSON value. Between the end of `func` and its record a
                crash makes it run again: use `key` against services that can recognise a repetition.
            retry: how to try again when it raises; default not at all.
            record_errors: whether its final exception is recorded too, and raised as `StepFailed`.

        Raises:
            OwnershipLost: the turn is not this node's any more.
            InvalidRequest, PayloadTooLarge: the result cannot be recorded; or this is called within a step.
            StepFailed: `func` has raised, and that is recorded.
            Exception: whatever `func` raised at last.
        """
        self._not_within_step(f"step {name}")
        check_id(name, "name")
        number, recorded = self._ledger.ask(name)
        if recorded is not None:
            if recorded.error is not None:
                raise StepFailed.of(recorded.error)
            return recorded.result
        if self._go_no_further:
            # The node is leaving: the turn is cut off here, and goes on with this step elsewhere.
            self._held_up += 1
            await asyncio.get_running_loop().create_future()
        # The turn's start must be committed before anything is done in its name; what was said before the step is
        # then in the log as well.
        held, self._entries = self._entries, []
        await asyncio.shield(self._record(held).written)
        self._steps += 1
        self._answers.changed()
        token = _within.set((self, f"{self.fence.conversation_id}/{self.id}/{name}/{number}"))
        data: dict[str, Any] = {"name": name, "number": number}
        failure: Exception | None = None
        try:
            data["result"] = await self._run_step(func, args, retry)
        except Exception as error:
            if not record_errors or isinstance(error, OwnershipLost):
                raise
            failure = error
            data["error"] = {"type": error.__class__.__name__, "message": str(error)}
        finally:
            self._steps -= 1
            _within.reset(token)
            self._answers.changed()
        text = to_json(data, self._limit, f"the result of step {name}")
        await asyncio.shield(self._record([Entry(STEP, data, text)]).written)
        if failure is not None:
            raise StepFailed.of(data["error"]) from failure
        # Not the object itself: where the two differ, the agent would go wrong after a crash only.
        return msgspec.json.decode(text, type=dict[str, Any])["result"]

    async def _run_step(self, func: Callable[..., Any], args: Sequence[Any], retry: Retry | None) -> Any:
        pauses = (retry or Retry(attempts=1)).pauses()
        while True:
            # Over in a moment, or the turn is cancelled: that is no reason to fail it.
            await self._node.lease.wait_valid()
            # What a store has lost that fell back may be another's by now.
            await self._verified()
            try:
                if inspect.iscoroutinefunction(func):
                    return await func(*args)
                result = await run_in_thread(func, *args)
                return await result if inspect.isawaitable(result) else result
            except Exception:
                pause = next(pauses, None)
                if pause is None:
                    raise
            await asyncio.sleep(pause * random.uniform(0.5, 1.0))

    # -- people ----------------------------------------------------------------------------------------------------

    async def ask(self, prompt: Any, schema: Schema | None = None, timeout: float | None = None) -> Any:
        """Ask the user, and wait for the answer as long as it takes: through crashes, deploys and days.

        While it waits the conversation may leave memory, and then holds none of the user's slots. The turn is begun
        again when the answer comes: put what must not be done twice into steps. What is asked must be the same in
        every attempt: put what makes the prompt into a step, if it is not.

        Args:
            prompt: any JSON value; shown by clients.
            schema: a JSON Schema (draft 2020-12) that the answer must fit.
            timeout: seconds after which nobody may answer any more.

        Returns:
            the answer's data.

        Raises:
            AskExpired: nobody has answered in time.
            InvalidRequest: the prompt, the schema or the timeout is not one; or this is called within a step.
            PayloadTooLarge: prompt and schema are above the limit.
        """
        self._not_within_step("ask")
        check_schema(schema)
        _check_timeout(timeout)
        asked_for = to_json({"prompt": prompt, "schema": schema}, self._limit, "the question")
        question = msgspec.json.decode(asked_for, type=dict[str, Any])
        asked = self._ledger.question(question["prompt"], question["schema"])
        ask_id = await self._open(question, timeout) if asked is None else asked.ask_id
        known = self._answers.has(ask_id)
        answer = await self._answers.wait(ask_id)
        if answer.expired:
            raise AskExpired("nobody has answered the question in time")
        if timeout is not None and not known:
            self._node.supervisor.spawn(f"deadline {ask_id}", self._clear_deadline(ask_id))
        return answer.data

    async def _clear_deadline(self, ask_id: str) -> None:
        # Not needed for anything: left over, it is taken for what it is when it is due.
        with contextlib.suppress(ConvenerError):
            await self._node.store.clear_timer(self.conversation.id, f"{ASK_TIMER}{ask_id}")

    async def _open(self, question: dict[str, Any], timeout: float | None) -> str:
        ask_id = f"{self.id}.{self._ledger.next_question()}"
        deadline = None if timeout is None else wall_ms() + int(timeout * 1000)
        if deadline is not None:
            # Before the question: a deadline without one does no harm.
            cid = self.conversation.id
            await insist(self._node, lambda: self._node.store.set_timer(cid, f"{ASK_TIMER}{ask_id}", deadline))
        data = {"ask_id": ask_id, **question, "deadline": deadline}
        text = to_json(data, 2 * self._limit, "the question")
        held, self._entries = self._entries, []
        ticket = self._record([*held, Entry(ASK, data, text)], [(ask_id, text)])
        await asyncio.shield(ticket.written)
        return ask_id

    # -- for the runner --------------------------------------------------------------------------------------------

    @property
    def waiting(self) -> bool:
        """Whether the turn waits for a person, and nothing else that it does would be lost if it were cut off."""
        return self._answers.waiting and not self._steps

    @property
    def at_step(self) -> bool:
        """Whether it was stopped before a step, and none is under way."""
        return self._held_up > 0 and not self._steps

    @property
    def stopped(self) -> bool:
        """Whether it goes no further than its next step: the node is leaving."""
        return self._go_no_further

    def stop_at_step(self) -> None:
        """Go no further than the next step."""
        self._go_no_further = True

    def close(self) -> None:
        """The attempt is over: show nothing more of it, let nobody wait for an answer to it."""
        self._streamer.close()
        self._answers.close()

    def interrupted(self) -> list[Entry]:
        """The turn was cancelled on purpose: what it has said and not written yet, the pieces as a partial reply."""
        if self._streamer:
            joined = {**self._streamer.joined(), "partial": True}
            with contextlib.suppress(ConvenerError):
                self._hold("reply", joined)
        entries, self._entries = self._entries, []
        return entries

    def finish(self) -> list[Entry]:
        """The agent is done: the entries that are still held.

        Raises:
            InvalidRequest: the code does not fit what an earlier attempt of the turn has recorded.
        """
        if self._streamer:
            self._hold("reply", self._streamer.joined())
        try:
            self._ledger.finish()
        except Mismatch as error:
            raise InvalidRequest(str(error), code="turn_mismatch") from error
        return self._entries
