"""What an agent gets: one turn, and the conversation around it."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import random
import re
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Any, Final, Literal, cast

import msgspec

from convener.core import cursor as cursors
from convener.core import wire
from convener.core.cursor import Cursor
from convener.core.directory import LoopStatus
from convener.core.ledger import STEP, Ledger, Mismatch
from convener.core.view import START, Place
from convener.errors import ConvenerError, InvalidRequest, NotFound, OwnershipLost, PayloadTooLarge
from convener.ids import check_id
from convener.manager.appender import Ticket
from convener.manager.views import decode

if TYPE_CHECKING:
    from convener.manager.context import NodeContext
    from convener.manager.runner import Runner

Reason = Literal["new", "retry", "takeover", "handoff"]

RESERVED: Final = frozenset(
    {"open", "input", "turn_started", "step", "reply", "ask", "answer", "turn_done", "turn_failed"}
    | {"turn_interrupted", "stopped", "damaged"}
)
PAGE: Final = 256
MAX_DEPTH: Final = 200
"""Levels of a value: far below what any JSON decoder on its way takes, whatever is wrapped around it."""

_NO_BRACKET: Final = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"|[^][{}"]+')
_STEPS: Final = [1 if chr(byte) in "[{" else -1 for byte in range(256)]


def to_json(value: Any, limit: int, what: str) -> str:
    """JSON text of a value.

    Raises:
        InvalidRequest: it is not a JSON value, or nests too deep.
        PayloadTooLarge: the text is longer than `limit` bytes.
    """
    try:
        text = msgspec.json.encode(value)
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidRequest(f"{what} is not a JSON value: {error}") from error
    if len(text) > limit:
        raise PayloadTooLarge(f"{what} is {len(text)} bytes, the limit is {limit}")
    if text.count(b"[") + text.count(b"{") > MAX_DEPTH and _depth(text) > MAX_DEPTH:
        raise InvalidRequest(f"{what} nests deeper than {MAX_DEPTH} levels")
    return text.decode()


def _depth(text: bytes) -> int:
    """How deep JSON text nests. Strings are cut out first: they may hold brackets."""
    return max(accumulate(map(_STEPS.__getitem__, _NO_BRACKET.sub(b"", text))), default=0)


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


class Conversation:
    """The conversation as its agent sees it."""

    def __init__(self, node: NodeContext, runner: Runner, before: int | None = None) -> None:
        self._node = node
        self._runner = runner
        self._before = before

    @property
    def id(self) -> str:
        """The conversation's id."""
        return self._runner.cid

    @property
    def user_id(self) -> str:
        """Whose conversation it is; "" if nobody's."""
        return self._runner.user

    @property
    def epoch(self) -> int:
        """The current ownership's fencing token."""
        return self._runner.epoch

    @property
    def status(self) -> LoopStatus:
        """The loop's status."""
        return self._runner.status

    @property
    def metadata(self) -> Mapping[str, Any]:
        """The metadata as it was when this node took the conversation over."""
        return self._runner.metadata

    async def events(self, after: str | int | None = None) -> AsyncIterator[dict[str, Any]]:
        """Log entries after a cursor or number, in order, as clients get them: ``{seq, cursor, epoch, kind, …}``."""
        place = Cursor() if after is None else cursors.parse(after)
        if place is None:
            raise InvalidRequest("after is neither a cursor nor a number", code="invalid_cursor")
        while True:
            page = await self._node.store.read(self.id, place, PAGE)
            if page is None:
                raise NotFound(f"no conversation {self.id}")
            before = START
            for entry in page.entries:
                item = decode(entry, before, page.generation)
                before = item.place
                yield item.payload
            if not page.entries or before >= Place(*page.tip):
                return
            place = Cursor(page.generation, before)

    async def history(self, limit: int | None = None) -> list[dict[str, Any]]:
        """Finished turns as ``{role, data}``, oldest first; with `limit`, the last so many messages.

        The current input is not part of it, nor are messages that arrived meanwhile.
        """
        inputs: dict[str, Any] = {}
        replies: dict[str, list[Any]] = {}
        out: list[dict[str, Any]] = []
        async for event in self.events():
            kind, turn = event["kind"], event["turn"]
            if kind == "input":
                inputs[turn] = event["data"]["data"]
            elif kind == "reply":
                replies.setdefault(turn, []).append(event["data"])
            elif kind in ("turn_done", "turn_interrupted") and turn in inputs and self._is_before(turn):
                out.append({"role": "user", "data": inputs.pop(turn)})
                out += [{"role": "assistant", "data": data} for data in replies.pop(turn, [])]
        return out if limit is None else out[-limit:] if limit > 0 else []

    def _is_before(self, turn: str) -> bool:
        return self._before is None or wire.turn_position(turn) < self._before


def _joined(pieces: list[Any]) -> Any:
    """Pieces of one part as one value: text is joined, other pieces make a list."""
    return "".join(pieces) if all(isinstance(piece, str) for piece in pieces) else pieces


@dataclass(frozen=True, slots=True)
class Entry:
    """An entry that a turn writes: its kind, its data, and the data's JSON text."""

    kind: str
    data: Any
    text: str


Recorder = Callable[[Sequence[Entry]], Ticket]
"""Writes entries of the running turn now, in one append; without entries, the ticket of the turn's start. Raises
`OwnershipLost` if the turn is not the current one any more."""


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
    """A step had failed in an earlier attempt of the turn, and that was recorded (``record_errors=True``)."""

    code = "step_failed"


_step_key: ContextVar[str] = ContextVar("convener_step_key", default="")


class Turn:
    """The processing of one message.

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
        state: dict[str, Any],
        ledger: Ledger,
        record: Recorder,
    ) -> None:
        self._node = node
        self._limit = node.options.max_payload_bytes
        self.id = wire.turn_id(message.position)
        self.input = message
        self.attempt = attempt
        self.reason: Reason = reason
        self.state = state
        self.conversation = Conversation(node, runner, before=message.position)
        self.fence = Fence(runner.cid, runner.epoch, self.id)
        self._ledger = ledger
        self._record = record
        self._entries: list[Entry] = []
        self._pieces: dict[str, list[Any]] = {}
        self._size = 0

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
        return _step_key.get()

    # -- output ----------------------------------------------------------------------------------------------------

    async def reply(self, data: Any) -> None:
        """Answer: a `reply` entry. Raises `PayloadTooLarge`, `InvalidRequest` (not JSON)."""
        self._pieces.clear()
        self._hold("reply", data)

    async def stream(self, piece: Any, part: str = "text", type: str = "text") -> None:  # noqa: A002 - the interface's name
        """Answer piece by piece. Pieces of one part are joined; at the end of the turn they become one `reply`,
        ``{part: joined}``, unless `reply` is called. Raises `PayloadTooLarge`.
        """
        check_id(part, "part")
        if type == "text" and not isinstance(piece, str):
            raise InvalidRequest("a piece of type text must be a string")
        self._count(to_json(piece, self._limit, "the piece"))
        self._pieces.setdefault(part, []).append(piece)

    async def emit(self, kind: str, data: Any) -> None:
        """Write an entry of a kind of your own. Raises `InvalidRequest` for a reserved or malformed kind."""
        check_id(kind, "kind")
        if kind in RESERVED:
            raise InvalidRequest(f"the kind {kind} is convener's own")
        self._hold(kind, data)

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

        Args:
            name: of the step; with the number of its occurrence in the turn it identifies the record.
            func: plain (run in a thread) or async; returns a JSON value. Between the end of `func` and its record a
                crash makes it run again: use `key` against services that can recognise a repetition.
            retry: how to try again when it raises; default not at all.
            record_errors: whether its final exception is recorded too, and raised as `StepFailed` in a repetition.

        Raises:
            OwnershipLost: the turn is not this node's any more.
            InvalidRequest, PayloadTooLarge: the result cannot be recorded.
            Exception: whatever `func` raised at last.
        """
        check_id(name, "name")
        number, recorded = self._ledger.ask(name)
        if recorded is not None:
            if recorded.error is not None:
                raise StepFailed(f"{recorded.error.get('type', 'Error')}: {recorded.error.get('message', '')}")
            return recorded.result
        # The turn's start must be committed before anything is done in its name; what was said before the step is
        # then in the log as well.
        held, self._entries = self._entries, []
        await asyncio.shield(self._record(held).written)
        token = _step_key.set(f"{self.fence.conversation_id}/{self.id}/{name}/{number}")
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
            _step_key.reset(token)
        text = to_json(data, self._limit, f"the result of step {name}")
        await asyncio.shield(self._record([Entry(STEP, data, text)]).written)
        if failure is not None:
            raise failure
        return data["result"]

    async def _run_step(self, func: Callable[..., Any], args: Sequence[Any], retry: Retry | None) -> Any:
        pauses = (retry or Retry(attempts=1)).pauses()
        while True:
            if not self._node.lease.valid():
                raise OwnershipLost("this node is suspended")
            try:
                if inspect.iscoroutinefunction(func):
                    return await func(*args)
                result = await asyncio.to_thread(func, *args)
                return await result if inspect.isawaitable(result) else result
            except Exception:
                pause = next(pauses, None)
                if pause is None:
                    raise
            await asyncio.sleep(pause * random.uniform(0.5, 1.0))

    # -- for the runner --------------------------------------------------------------------------------------------

    def interrupted(self) -> list[Entry]:
        """The turn was cancelled on purpose: what it has said and not written yet, the pieces as a partial reply."""
        if self._pieces:
            joined: dict[str, Any] = {part: _joined(pieces) for part, pieces in self._pieces.items()}
            joined["partial"] = True
            self._pieces = {}
            with contextlib.suppress(ConvenerError):
                self._hold("reply", joined)
        entries, self._entries = self._entries, []
        return entries

    def finish(self) -> list[Entry]:
        """The agent is done: the entries that are still held.

        Raises:
            InvalidRequest: the code does not fit what an earlier attempt of the turn has recorded.
        """
        if self._pieces:
            joined = {part: _joined(pieces) for part, pieces in self._pieces.items()}
            self._pieces = {}
            self._hold("reply", joined)
        try:
            self._ledger.finish()
        except Mismatch as error:
            raise InvalidRequest(str(error), code="turn_mismatch") from error
        return self._entries
