"""What callers ask of a conversation: the same on every manager, whoever owns the conversation."""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

from convener.core.model import NewMessage
from convener.errors import InvalidRequest, NotFound
from convener.ids import check_id, new_id
from convener.manager import queries
from convener.manager.base import (
    ConversationManager,
    InterruptResult,
    Overlap,
    Question,
    ResumeResult,
    SendResult,
    StopResult,
)
from convener.manager.engine import Engine
from convener.manager.jsontext import to_json
from convener.manager.timers import ASK_TIMER
from convener.telemetry.metrics import Metrics


class Requests(ConversationManager):
    """Messages, answers, interrupts, ends."""

    metrics: Metrics

    @property
    @abstractmethod
    def engine(self) -> Engine:
        """The running node. Raises `ConfigurationError` before it was entered."""

    # -- messages ------------------------------------------------------------------------------------------------

    async def send_to_event_stream(
        self,
        connection_id: str,
        data: Any,
        *,
        message_id: str | None = None,
        overlap: Overlap | None = None,
    ) -> SendResult:
        """See `ConversationManager`."""
        feed = self.engine.feeds.get(connection_id)
        if feed is None:
            raise NotFound(f"no connection {connection_id}")
        return await self.send_event_to_conversation(
            feed.view.cid, data, user_id=feed.user_id or None, message_id=message_id, overlap=overlap
        )

    async def send_event_to_conversation(
        self,
        conversation_id: str,
        data: Any,
        *,
        user_id: str | None = None,
        message_id: str | None = None,
        overlap: Overlap | None = None,
    ) -> SendResult:
        """See `ConversationManager`."""
        cid = check_id(conversation_id, "conversation_id")
        if overlap not in (None, "enqueue", "reject", "interrupt"):
            raise InvalidRequest("overlap must be enqueue, reject or interrupt")
        policy = self.engine.node.options.overlap_policy if overlap is None else overlap
        message = self._message(data, queries.checked_user(user_id), message_id)
        if policy == "interrupt":
            message = dataclasses.replace(message, kind="interrupting")
        result = await self.engine.send(cid, message, known=message_id is not None, reject_busy=policy == "reject")
        self.metrics.messages.labels(result="duplicate" if result.duplicate else "accepted").inc()
        return result

    # -- intents ---------------------------------------------------------------------------------------------

    async def close_session(self, conversation_id: str, reason: str = "stopped by the user") -> StopResult:
        """See `ConversationManager`."""
        return await self.engine.stop(check_id(conversation_id, "conversation_id"), reason)

    async def answer(
        self,
        conversation_id: str,
        ask_id: str,
        data: Any,
        *,
        message_id: str | None = None,
        user_id: str | None = None,
    ) -> SendResult:
        """See `ConversationManager`."""
        cid = check_id(conversation_id, "conversation_id")
        check_id(ask_id, "ask_id")
        message = self._message(data, queries.checked_user(user_id), message_id)
        return await self.engine.intents.answer(cid, ask_id, message, data, known=message_id is not None)

    async def questions(self, conversation_id: str) -> Sequence[Question]:
        """See `ConversationManager`."""
        return await self.engine.intents.questions(check_id(conversation_id, "conversation_id"))

    async def interrupt(self, conversation_id: str, turn: str | None = None) -> InterruptResult:
        """See `ConversationManager`."""
        cid = check_id(conversation_id, "conversation_id")
        return await self.engine.intents.interrupt(cid, "" if turn is None else check_id(turn, "turn"))

    async def resume(self, conversation_id: str) -> ResumeResult:
        """See `ConversationManager`."""
        return await self.engine.intents.resume(check_id(conversation_id, "conversation_id"))

    async def delete(self, conversation_id: str, reason: str = "deleted by the user") -> None:
        """See `ConversationManager`."""
        cid = check_id(conversation_id, "conversation_id")
        # Before the stop, which closes them.
        questions = await self.engine.intents.questions(cid)
        await self.engine.stop(cid, reason)
        await self.engine.erase(cid, [f"{ASK_TIMER}{question.ask_id}" for question in questions])

    # -- input ---------------------------------------------------------------------------------------------------

    def _message(self, data: Any, user: str | None, message_id: str | None) -> NewMessage:
        ident = new_id() if message_id is None else check_id(message_id, "message_id")
        return NewMessage(ident, user or "", to_json(data, self.engine.node.options.max_payload_bytes, "data"))

    def _metadata(self, settings: Any, metadata: Mapping[str, Any] | None) -> str:
        merged = dict(metadata or {}) | ({} if settings is None else {"settings": settings})
        return to_json(merged, self.engine.node.options.max_payload_bytes, "metadata")
