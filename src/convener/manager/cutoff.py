"""What becomes of a turn that was cut off when its node went down (protocol, sections 6 and 8)."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Final, Literal

import structlog

from convener.core.model import ClaimReason, Meta
from convener.manager.context import NodeContext, RecoveryMode
from convener.manager.traits import Interrupted

if TYPE_CHECKING:
    from convener.manager.conversation import Conversation
    from convener.manager.turns import Pending, Turns

log = structlog.get_logger(__name__)

DECIDE_S: Final = 30.0
STRUCK: Final = "the turn was given up: three nodes in a row went down while it ran"
CUT_OFF: Final = "the turn was cut off by a crash and is not repeated"


async def after_cut_off(
    node: NodeContext, conversation: Conversation, turns: Turns, meta: Meta, reason: ClaimReason
) -> Literal["resume", "wait", "fail", "failed"]:
    """What a new owner does with the turn at the head of the queue.

    Returns:
        "resume" to go on, repeating it if it was begun; "wait" for somebody to say so; "fail" to give it up and go on
        with the next; "failed" if it has taken too many nodes down, so that nothing more is started unasked.
    """
    head = turns.head
    # A turn that waits for a person is not cut off: it would have been begun again anyway.
    if reason != "takeover" or head is None or not head.attempts or meta.asks:
        return "resume"
    if turns.is_struck:
        return "failed"
    return await _mode(node, conversation, head)


async def _mode(node: NodeContext, conversation: Conversation, head: Pending) -> RecoveryMode:
    """The application's own decision, else the setting. A decision that fails must not lose the conversation."""
    mode = node.options.recovery
    if node.traits.recover is None:
        return mode
    steps = tuple(step.name for step in head.record.steps)
    cut = Interrupted(conversation, head.turn, head.message, head.attempts, steps)
    try:
        async with asyncio.timeout(DECIDE_S):
            return await node.traits.recover(cut) or mode
    except Exception:
        log.exception("on_recover failed; the setting decides", conversation_id=conversation.id, turn=head.turn)
        return mode
