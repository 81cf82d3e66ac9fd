"""What people want of a turn: end it, answer its question, let it go on. Recorded first, then obeyed by the owner.

Each is an entry of the conversation's inbox, so whoever owns or takes over the conversation finds it (I8, I11). The
node that takes it makes sure that there is an owner, whatever the policy on starts: an intent is never refused for
want of a slot.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

import msgspec
import structlog

from convener.core.conversation import is_settled
from convener.core.model import InterruptReply, NewMessage, SendReply, Status
from convener.core.wire import json_text, turn_position
from convener.errors import (
    AskClosed,
    ConversationStopped,
    InboxFull,
    NotFound,
    OwnerUnavailable,
)
from convener.manager.asking import check_answer
from convener.manager.base import InterruptResult, Question, ResumeResult, SendResult
from convener.manager.starter import Queued, closed
from convener.manager.timers import ASK_TIMER, later, unset_until

if TYPE_CHECKING:
    from convener.manager.engine import Engine

log = structlog.get_logger(__name__)

INTERRUPT_S: Final = 2.0
CLOSED_AS: Final[Mapping[str, Status]] = {"CLOSED": "stopped", "FAILED": "failed", "HELD": "held"}


def refuse(cid: str, reply: SendReply | InterruptReply) -> None:
    """Raise what the store's refusal means to a caller; nothing for OK and DUP."""
    match reply.outcome:
        case "NOT_FOUND":
            raise NotFound(f"no conversation {cid}")
        case "CLOSED" | "FAILED" | "HELD":
            raise closed(cid, CLOSED_AS[reply.outcome])
        case "ASK_CLOSED":
            raise AskClosed("the question does not wait for an answer")
        case _:
            pass


class Intents:
    """Interrupts, answers, resumption, for one node."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._node = engine.node

    # -- interrupt -----------------------------------------------------------------------------------------------

    async def interrupt(self, cid: str, turn: str) -> InterruptResult:
        """INTERRUPT, then the outcome awaited for a moment. Raises as `ConversationManager.interrupt`."""
        views = self._engine.views
        view = await views.acquire(cid)
        try:
            before = view.place
            reply = await self._engine.wakes.owing(cid, self._node.store.interrupt(cid, turn), "interrupt")
            refuse(cid, reply)
            if reply.outcome == "FULL":
                raise InboxFull("too many requests wait for the conversation's owner", retry_after=1.0)
            if reply.outcome in ("IDLE", "STALE"):
                return "idle" if reply.outcome == "IDLE" else "stale"
            await self._engine.wakes.make_owned(cid, reply.owner, "interrupt")
            ended: str | None = None

            def has_ended() -> bool:
                nonlocal ended
                ended = view.ended_since(before, turn)
                return ended is not None

            await view.wait_for(has_ended, INTERRUPT_S)
            return "interrupting" if ended is None else "interrupted" if ended == "turn_interrupted" else "stale"
        finally:
            await views.release(view)

    # -- questions -----------------------------------------------------------------------------------------------

    async def questions(self, cid: str) -> Sequence[Question]:
        """The open questions."""
        found = await self._node.store.asks(cid)
        # In the order in which they were asked: t5.10 comes after t5.9.
        return [_question(ask_id, found[ask_id]) for ask_id in sorted(found, key=lambda i: (len(i), i))]

    async def answer(self, cid: str, ask_id: str, message: NewMessage, data: Any, *, known: bool) -> SendResult:
        """ANSWER, after a look at the question's schema. Raises as `ConversationManager.answer`.

        The question may be closed between the look and the step: then the step refuses. Its schema never changes.
        """
        text = (await self._node.store.asks(cid)).get(ask_id)
        if text is not None:
            check_answer(_question(ask_id, text).schema, data)
        body = msgspec.json.encode({"ask_id": ask_id, "data": data}).decode()
        entry = NewMessage(message.message_id, message.user, body, "answer")
        reply = await self._put(cid, ask_id, entry)
        refuse(cid, reply)
        if reply.outcome == "FULL":
            raise InboxFull("too many requests wait for the conversation's owner", retry_after=1.0)
        await self._engine.wakes.make_answered(cid, entry, reply, "answer")
        return SendResult(message.message_id, reply.position, reply.outcome == "DUP" and known)

    async def expire(self, cid: str, ask_id: str, at: int) -> int:
        """A deadline has passed: that is an answer too, and the first one counts.

        Args:
            at: the deadline. It is entered before the question is asked, perhaps by an attempt that did not get so far:
                what counts is what the question says.

        Returns:
            when to come back, in ms since 1970; 0 if there is nothing left to do.
        """
        text = (await self._node.store.asks(cid)).get(ask_id)
        if text is not None:
            deadline = _question(ask_id, text).deadline
            if deadline is None or deadline > at:
                return deadline or 0
        body = json_text({"ask_id": ask_id, "expired": True})
        entry = NewMessage(f"{ASK_TIMER}{ask_id}", "", body, "answer")
        reply = await self._put(cid, ask_id, entry)
        if reply.outcome in ("OK", "DUP"):
            await self._engine.wakes.make_answered(cid, entry, reply, "answer")
            return 0
        if reply.outcome == "ASK_CLOSED" and not await self._may_be_asked(cid, ask_id):
            return 0
        return 0 if reply.outcome in ("NOT_FOUND", "CLOSED") else later()

    async def _may_be_asked(self, cid: str, ask_id: str) -> bool:
        """Whether the turn goes on that asks this, or is about to."""
        meta = await self._node.store.head(cid)
        return meta is not None and turn_position(ask_id.rpartition(".")[0]) > meta.done

    async def _put(self, cid: str, ask_id: str, entry: NewMessage) -> SendReply:
        return await self._engine.wakes.owing(cid, self._node.store.answer(cid, ask_id, entry), "answer")

    # -- alarms --------------------------------------------------------------------------------------------------

    async def fire(self, cid: str, alarm_id: str, at: int) -> int:
        """FIRE, then the wake.

        Args:
            at: its time. It is entered before what the alarm says, which may still be on its way.

        Returns:
            when to come back, in ms since 1970; 0 if there is nothing left to do.
        """
        most = self._node.options.max_pending_messages
        reply = await self._engine.wakes.owing(cid, self._node.store.fire(cid, alarm_id, max_pending=most), "alarm")
        if reply.outcome in ("FAILED", "HELD", "FULL"):
            return later()
        if reply.outcome == "OK":
            await self._engine.wakes.make_answered(cid, NewMessage(alarm_id, "", "", "alarm"), reply, "alarm")
        elif reply.outcome == "DUP":
            # Whoever fired it may have died before it woke anybody (I11).
            with contextlib.suppress(Queued, ConversationStopped):
                await self._engine.wakes.wake_if_owed(cid, "alarm")
            if not reply.position:
                return unset_until(at)
        return 0

    # -- resume --------------------------------------------------------------------------------------------------

    async def resume(self, cid: str) -> ResumeResult:
        """RESUME; what was accepted before and not answered goes on at once. Raises as `ConversationManager.resume`."""
        outcome = await self._engine.wakes.owing(cid, self._node.store.resume(cid), "resume")
        if outcome == "NOT_FOUND":
            raise NotFound(f"no conversation {cid}")
        if outcome == "BUSY":
            raise OwnerUnavailable("the conversation is still being stopped; try again", retry_after=1.0)
        view = self._engine.views.get(cid)
        if view is not None and outcome == "OK":
            view.resumed()
        meta = await self._engine.wakes.owing(cid, self._node.store.head(cid), "resume")
        if meta is not None:
            self._engine.records.note(meta.user, cid)
        if meta is not None and not is_settled(meta):
            # Also if it was resumed before: whoever did that may have died before it woke anybody (I11).
            await self._engine.wakes.make_owned(cid, meta.owner, "resume")
        return "running" if outcome == "RUNNING" else "resumed"


def _question(ask_id: str, text: str) -> Question:
    try:
        fields = msgspec.json.decode(text, type=dict[str, Any])
    except msgspec.MsgspecError:
        log.warning("an open question cannot be read", ask_id=ask_id)
        return Question(ask_id, None)
    return Question(ask_id, fields.get("prompt"), fields.get("schema"), fields.get("deadline"))
