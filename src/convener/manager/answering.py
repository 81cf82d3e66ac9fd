"""Calling the agent: whatever it does ends in an answer or in a failure that clients may be told of."""

from __future__ import annotations

import asyncio
from typing import Any

import structlog

from convener.errors import ConvenerError
from convener.manager.context import Agent
from convener.manager.turn import Turn

log = structlog.get_logger(__name__)


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
    else:
        return None
    return {"message": "the agent failed", "code": "agent_error"}
