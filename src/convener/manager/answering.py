"""Calling the agent: whatever it does ends in an answer or in a failure that clients may be told of."""

from __future__ import annotations

import asyncio
from typing import Any, Protocol

import structlog

from convener.errors import ConvenerError
from convener.manager.asking import Answers
from convener.manager.traits import Codec
from convener.manager.turn import Turn

log = structlog.get_logger(__name__)


class Answerer(Protocol):
    """What a turn is given to: the agent, or the loop of a conversation."""

    async def run(self, turn: Turn[Any]) -> None: ...


class State:
    """The agent's durable state, kept as text: what an agent goes on doing to its state must not reach the next turn.

    Attributes:
        error: why `copy` could not read it, None if it could.
    """

    def __init__(self, limit: int, codec: Codec) -> None:
        self._limit = limit
        self._codec = codec
        self._text: bytes | None = None
        self.error: str | None = None

    def load(self, raw: bytes | None) -> None:
        """Take what the store has. It is kept as it is, also if it cannot be read."""
        self._text = raw

    def copy(self) -> Any:
        """The state for one turn; None if it cannot be read."""
        self.error = None
        try:
            return self._codec.decode(self._text)
        except Exception as error:
            self.error = f"{type(error).__name__}: {error}"
            return None

    def take(self, state: object) -> bytes | None:
        """Take what a turn has made of it; None if that is what it was.

        Raises:
            InvalidRequest: it is not of the agent's form.
            PayloadTooLarge: it is above the limit.
        """
        text = self._codec.encode(state, self._limit)
        before = self._text
        if before is None:
            before = self._codec.encode(self._codec.decode(None), self._limit)
        if text == before:
            return None
        self._text = text
        return text


async def call_agent(
    agent: Answerer, turn: Turn[Any], state_error: str | None, timeout: float | None, answers: Answers
) -> dict[str, Any] | None:
    """Run one turn.

    Args:
        state_error: why the agent's durable state cannot be read; no turn can be run then.
        timeout: seconds that the turn may take, not counting those in which it waits for a person.

    Returns:
        None if the agent is done; else what clients are told, ``{message, code}``. The traceback, which may hold
        secrets, stays in this server's log.
    """
    cid = turn.conversation.id
    if state_error is not None:
        log.error("the state cannot be read", conversation_id=cid, error=state_error)
        return {"message": "the agent's state cannot be read", "code": "bad_state"}
    limit = answers.limit = asyncio.timeout(timeout)
    try:
        async with limit:
            await agent.run(turn)
    except TimeoutError:
        if limit.expired():
            log.warning("turn timed out", conversation_id=cid, turn=turn.id)
            return {"message": "the turn took too long", "code": "turn_timeout"}
        log.exception("turn failed", conversation_id=cid, turn=turn.id)
    except ConvenerError as error:
        log.exception("turn failed", conversation_id=cid, turn=turn.id)
        return {"message": error.detail, "code": error.wire_code}
    except Exception:
        log.exception("turn failed", conversation_id=cid, turn=turn.id)
    except asyncio.CancelledError:
        task = asyncio.current_task()
        if task is None or task.cancelling():
            raise
        # Nobody has cancelled the turn: something was cancelled that the agent awaited.
        log.exception("turn failed", conversation_id=cid, turn=turn.id)
    else:
        return None
    finally:
        answers.limit = None
    return {"message": "the agent failed", "code": "agent_error"}
