"""Calling the agent: whatever it does ends in an answer or in a failure that clients may be told of."""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec
import structlog

from convener.errors import ConvenerError, InvalidRequest
from convener.manager.context import Agent
from convener.manager.turn import Turn, to_json

log = structlog.get_logger(__name__)


class State:
    """The agent's durable state, kept as text: what an agent goes on doing to its dict must not reach the next turn.

    Attributes:
        error: why it cannot be read, None if it can.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._text = b"{}"
        self.error: str | None = None

    def load(self, raw: bytes | None) -> None:
        """Take what the store has."""
        try:
            msgspec.json.decode(raw or b"{}", type=dict[str, Any])
        except msgspec.MsgspecError as error:
            self.error = str(error)
        else:
            self._text = raw or b"{}"

    def copy(self) -> dict[str, Any]:
        """The state for one turn."""
        return msgspec.json.decode(self._text, type=dict[str, Any])

    def take(self, state: object) -> bytes | None:
        """Take what a turn has made of it; None if that is what it was.

        Raises:
            InvalidRequest: it is not a JSON object.
            PayloadTooLarge: it is above the limit.
        """
        if not isinstance(state, dict):
            raise InvalidRequest("the state must be a JSON object")
        text = to_json(state, self._limit, "the state").encode()
        if text == self._text:
            return None
        self._text = text
        return text


async def call_agent(agent: Agent, turn: Turn, state_error: str | None, timeout: float | None) -> dict[str, Any] | None:
    """Run one turn.

    Args:
        state_error: why the agent's durable state cannot be read; no turn can be run then.
        timeout: seconds that the turn may take.

    Returns:
        None if the agent is done; else what clients are told, ``{message, code}``. The traceback, which may hold
        secrets, stays in this server's log.
    """
    cid = turn.conversation.id
    if state_error is not None:
        log.error("the state cannot be read", conversation_id=cid, error=state_error)
        return {"message": "the agent's state cannot be read", "code": "bad_state"}
    limit = asyncio.timeout(timeout)
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
    return {"message": "the agent failed", "code": "agent_error"}
