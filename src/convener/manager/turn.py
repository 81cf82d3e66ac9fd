"""What an agent gets: one turn, and the conversation around it."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Any, Final, Literal, cast

import msgspec

from convener.core import cursor as cursors
from convener.core import wire
from convener.core.cursor import Cursor
from convener.core.directory import LoopStatus
from convener.core.view import START, Place
from convener.errors import InvalidRequest, NotFound, PayloadTooLarge
from convener.ids import check_id
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


class Turn:
    """The processing of one message.

    What a turn writes is held until it ends and then appended as one batch together with `state`: a turn that dies
    in between is repeated whole, with `attempt` one higher, and leaves nothing behind.
    """

    def __init__(
        self,
        node: NodeContext,
        runner: Runner,
        message: Input,
        attempt: int,
        reason: Reason,
        state: dict[str, Any],
    ) -> None:
        self._limit = node.options.max_payload_bytes
        self.id = wire.turn_id(message.position)
        self.input = message
        self.attempt = attempt
        self.reason: Reason = reason
        self.state = state
        self.conversation = Conversation(node, runner, before=message.position)
        self.fence = Fence(runner.cid, runner.epoch, self.id)
        self._events: list[tuple[str, str]] = []
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
        self._count(text)
        self._events.append((kind, text))

    def _count(self, text: str) -> None:
        # One append carries the whole turn; this bounds it.
        self._size += len(text)
        if self._size > 4 * self._limit:
            raise PayloadTooLarge(f"the turn has written more than {4 * self._limit} bytes")

    def finished_events(self, ts: int) -> list[str]:
        """The turn's entries as log events, in order. For the runner."""
        held = list(self._events)
        if self._pieces:
            joined = {
                part: "".join(pieces) if all(isinstance(p, str) for p in pieces) else pieces
                for part, pieces in self._pieces.items()
            }
            held.append(("reply", to_json(joined, 8 * self._limit, "the reply")))
        return [wire.event(kind, self.id, ts, text) for kind, text in held]
