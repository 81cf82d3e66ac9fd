"""Everything that is decorated besides the agent, plain and async."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, assert_type

from convener import Convener, Conversation, Identity, Interrupted, Loop, Settings, Turn
from convener.manager.base import SendResult

app = Convener(Settings(auth="hook", max_concurrent_conversations=5, limit_policy="reject"))


@app.loop(hibernate=False)
async def worker(loop: Loop) -> None:
    async for turn in loop.turns(every=60):
        assert_type(turn, Turn[dict[str, Any]])
        await turn.reply(turn.data)
    assert_type(await loop.send({"text": "later"}, message_id="m1"), SendResult)


@app.rpc("title")
async def title(conversation: Conversation, params: Any) -> str:
    return f"{conversation.id}: {params}"


@app.rpc("double")
def double(conversation: Conversation, params: int) -> int:
    return 2 * params


@app.limit
def by_name(user_id: str) -> int | None:
    return 10 if user_id.startswith("staff-") else None


@app.authenticate
async def who(token: str | None, headers: Mapping[str, str]) -> Identity | None:
    if token is None:
        return None
    return Identity(user_id=token, service=headers.get("x-service") == "yes")


@app.authorize
async def may(identity: Identity, conversation_id: str, owner: str, action: str) -> bool | None:
    return True if action == "read" and identity.user_id == owner else None


@app.on_recover
def decide(interrupted: Interrupted) -> Literal["resume", "fail"] | None:
    return "fail" if "pay" in interrupted.steps else None


other = Convener()


@other.limit
async def from_a_database(user_id: str) -> int:
    return len(user_id)


@other.on_recover
async def ask_somebody(interrupted: Interrupted) -> Literal["resume", "wait", "fail"]:
    return "wait" if interrupted.attempt > 1 else "resume"


async def called_directly(conversation: Conversation, interrupted: Interrupted) -> None:
    """Decorators give back what they are given."""
    assert_type(double(conversation, 2), int)
    assert_type(await title(conversation, None), str)
    assert_type(by_name("alice"), int | None)
    assert_type(await from_a_database("alice"), int)
    assert_type(await who("t", {}), Identity | None)
    assert_type(decide(interrupted), Literal["resume", "fail"] | None)
