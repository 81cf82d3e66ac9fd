"""A conversation as its agent sees it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from typing import TYPE_CHECKING, Any, Final

from convener.core import cursor as cursors
from convener.core import wire
from convener.core.cursor import Cursor
from convener.core.directory import LoopStatus
from convener.core.model import MAX_ALARMS
from convener.core.view import START, Place
from convener.errors import ConversationStopped, InboxFull, InvalidRequest, NotFound
from convener.ids import new_id
from convener.manager.clock import wall_ms
from convener.manager.jsontext import to_json
from convener.manager.timers import ALARM_TIMER, SOON_MS, When, due_at, insist
from convener.manager.views import decode

if TYPE_CHECKING:
    from convener.manager.context import NodeContext
    from convener.manager.runner import Runner
    from convener.manager.turn import Turn

PAGE: Final = 256


class Conversation:
    """The conversation as its agent sees it."""

    def __init__(self, node: NodeContext, runner: Runner, turn: Turn[Any] | None = None) -> None:
        self._node = node
        self._runner = runner
        self._turn = turn
        self._before = None if turn is None else turn.input.position

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
            page = await self._node.logs.read(self.id, place, PAGE)
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

    async def schedule(self, when: When, data: Any) -> str:
        """Send this conversation a message at a time: once, late rather than never, whatever happens to the nodes.

        Within a turn it is a durable step: a turn that is repeated does not set the alarm again. The turn that answers
        the message has the reason "alarm".

        Args:
            when: a time with a zone, or how long from now (a timedelta, or seconds).
            data: of the message, any JSON value.

        Returns:
            the alarm's id, which is that of its message.

        Raises:
            InvalidRequest: the time or the data is not one.
            PayloadTooLarge: the data is above the limit.
            InboxFull: a thousand alarms are set.
            ConversationStopped: it is being stopped.
        """
        text = to_json(data, self._node.options.max_payload_bytes, "data")
        due = due_at(when)
        turn = self._turn
        if turn is None:
            return await self._set_alarm(f"{ALARM_TIMER}{new_id()}", due, text)

        async def set_alarm() -> str:
            # The same name in every attempt, so an alarm that has fired meanwhile is not set again.
            return await self._set_alarm(f"{ALARM_TIMER}{turn.id}.{turn.key.rpartition('/')[2]}", due, text)

        return await turn.step("convener.schedule", set_alarm)

    async def unschedule(self, alarm_id: str) -> bool:
        """Take an alarm back. False if it has fired, or was never set. Within a turn it is a durable step."""
        store = self._node.store
        if not alarm_id.startswith(ALARM_TIMER):
            # Deadlines of questions are in the same list.
            return False

        async def drop() -> bool:
            dropped = await insist(self._node, lambda: store.drop_alarm(self.id, alarm_id))
            await insist(self._node, lambda: store.clear_timer(self.id, alarm_id))
            return dropped

        return await (drop() if self._turn is None else self._turn.step("convener.unschedule", drop))

    async def _set_alarm(self, alarm_id: str, due: int, text: str) -> str:
        store = self._node.store

        async def enter() -> None:
            await insist(self._node, lambda: store.set_timer(self.id, alarm_id, due))

        # First when, then what it says: an alarm without a time would never fire, and never go.
        await enter()
        outcome = await insist(self._node, lambda: store.set_alarm(self.id, alarm_id, text))
        if outcome != "OK":
            await insist(self._node, lambda: store.clear_timer(self.id, alarm_id))
        elif due < wall_ms() + SOON_MS:
            # It may have come due before it said anything, and have been cleared away.
            await enter()
        if outcome == "NOT_FOUND":
            raise NotFound(f"no conversation {self.id}")
        if outcome == "CLOSED":
            raise ConversationStopped(f"conversation {self.id} was stopped")
        if outcome == "FULL":
            raise InboxFull(f"{MAX_ALARMS} alarms of the conversation are set")
        # One that has fired stays fired.
        return alarm_id

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
