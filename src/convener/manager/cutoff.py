"""What becomes of a turn that was cut off when its node went down (protocol, sections 6 and 8)."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Final, Literal

import structlog

from convener.core.model import ClaimReason, Meta
from convener.manager.context import NodeContext, RecoveryMode
from convener.manager.supervisor import cancel_and_wait
from convener.manager.traits import Interrupted

if TYPE_CHECKING:
    from convener.manager.conversation import Conversation
    from convener.manager.turns import Pending, Turns

log = structlog.get_logger(__name__)

DECIDE_S: Final = 30.0
GRACE_S: Final = 5.0
MODES: Final = ("resume", "wait", "fail", None)
STRUCK: Final = "the turn was given up: three nodes in a row went down while it ran"
CUT_OFF: Final = "the turn was cut off by a crash and is not repeated"


async def after_cut_off(
    node: NodeContext,
    conversation: Conversation,
    turns: Turns,
    meta: Meta,
    reason: ClaimReason,
    *,
    answered: bool,
    over: asyncio.Event,
) -> Literal["resume", "wait", "fail", "failed"]:
    """What a new owner does with the turn at the head of the queue.

    Args:
        answered: whether the inbox holds an answer that the former owner did not take in.
        over: set when this ownership has ended: nobody need decide any more.

    Returns:
        "resume" to go on, repeating it if it was begun; "wait" for somebody to say so; "fail" to give it up and go on
        with the next; "failed" if it has taken too many nodes down, so that nothing more is started unasked.
    """
    head = turns.head
    # One that somebody has interrupted is not begun again.
    if reason != "takeover" or head is None or not head.attempts or head.interrupted:
        return "resume"
    if turns.is_struck:
        return "failed"
    # A turn that waits for a person is not cut off: it would have been begun again anyway.
    if meta.asks or answered:
        return "resume"
    mode = await _decision(node, conversation, head, over)
    return node.options.recovery if mode is None else mode


async def _decision(
    node: NodeContext, conversation: Conversation, head: Pending, over: asyncio.Event
) -> RecoveryMode | None:
    """What the application says, None for the setting. A decision that fails must not lose the conversation."""
    recover = node.traits.recover
    if recover is None:
        return None
    steps = tuple(step.name for step in head.record.steps)
    cut = Interrupted(conversation, head.turn, head.message, head.attempts, steps)

    async def decide() -> RecoveryMode | None:
        return await recover(cut)

    loop = asyncio.get_running_loop()
    decision, end = loop.create_task(decide()), loop.create_task(over.wait())
    try:
        done, _ = await asyncio.wait({decision, end}, timeout=DECIDE_S, return_when=asyncio.FIRST_COMPLETED)
        if decision not in done:
            raise TimeoutError("nothing was decided in time")
        mode = decision.result()
        if mode not in MODES:
            raise ValueError(f"on_recover must return one of {MODES}, not {mode!r}")
    except Exception:
        log.exception("on_recover failed; the setting decides", conversation_id=conversation.id, turn=head.turn)
        return None
    else:
        return mode
    finally:
        end.cancel()
        await cancel_and_wait(decision, GRACE_S)
