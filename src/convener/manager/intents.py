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

from convener.core.model import InterruptReply, NewMessage, SendReply, Status
from convener.core.wire import json_text
from convener.errors import (
    AskClosed,
    InboxFull,
    NotFound,
    OwnerUnavailable,
)
from convener.manager.asking import check_answer
from convener.manager.base import InterruptResult, Question, ResumeResult, SendResult
from convener.manager.starter import Queued, closed
from convener.manager.timers import ASK_TIMER

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
            reply = await self._node.store.interrupt(cid, turn)
            refuse(cid, reply)
            if reply.outcome == "FULL":
                raise InboxFull("too many requests wait for the conversation's owner", retry_after=1.0)
            if reply.outcome in ("IDLE", "STALE"):
                return "idle" if reply.outcome == "IDLE" else "stale"
            if not self._engine.is_answering(cid, reply.owner):
                with contextlib.suppress(Queued):
                    await self._engine.starter.ensure(cid, "interrupt")
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
        return [_question(ask_id, text) for ask_id, text in sorted(found.items())]

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
        await self._engine.make_answered(cid, entry, reply, "answer")
        return SendResult(message.message_id, reply.position, reply.outcome == "DUP" and known)

    async def expire(self, cid: str, ask_id: str) -> bool:
        """The question's deadline has passed: that is an answer too, and the first one counts. True if that is done."""
        body = json_text({"ask_id": ask_id, "expired": True})
        entry = NewMessage(f"{ASK_TIMER}{ask_id}", "", body, "answer")
        reply = await self._put(cid, ask_id, entry)
        if reply.outcome in ("FULL", "HELD", "FAILED"):
            return False
        if reply.outcome in ("OK", "DUP"):
            await self._engine.make_answered(cid, entry, reply, "answer")
        return True

    async def _put(self, cid: str, ask_id: str, entry: NewMessage) -> SendReply:
        return await self._engine.owing(cid, self._node.store.answer(cid, ask_id, entry))

    # -- resume --------------------------------------------------------------------------------------------------

    async def resume(self, cid: str) -> ResumeResult:
        """RESUME; what was accepted before and not answered goes on at once. Raises as `ConversationManager.resume`."""
        outcome = await self._node.store.resume(cid)
        if outcome == "NOT_FOUND":
            raise NotFound(f"no conversation {cid}")
        if outcome == "BUSY":
            raise OwnerUnavailable("the conversation is still being stopped; try again", retry_after=1.0)
        if outcome == "RUNNING":
            return "running"
        view = self._engine.views.get(cid)
        if view is not None:
            view.resumed()
        meta = await self._node.store.head(cid)
        if meta is not None:
            self._engine.records.note(meta.user, cid)
        if meta is not None and meta.position > meta.done:
            with contextlib.suppress(Queued):
                await self._engine.starter.ensure(cid, "resume")
        return "resumed"


def _question(ask_id: str, text: str) -> Question:
    try:
        fields = msgspec.json.decode(text, type=dict[str, Any])
    except msgspec.MsgspecError:
        log.warning("an open question cannot be read", ask_id=ask_id)
        return Question(ask_id, None)
    return Question(ask_id, fields.get("prompt"), fields.get("schema"), fields.get("deadline"))
