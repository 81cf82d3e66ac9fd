"""Agents: what a turn offers, under strict type checking."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any, TypedDict, assert_type

from convener import Convener, Retry, StepFailed, Turn
from convener.errors import AskExpired

app = Convener()


class Hit(TypedDict):
    title: str
    score: float


async def search(query: str, limit: int = 10) -> list[Hit]:
    await asyncio.sleep(0)
    found: list[Hit] = [{"title": query, "score": 1.0}]
    return found[:limit]


def slow_sum(*numbers: int) -> int:
    return sum(numbers)


@app.agent
async def assistant(turn: Turn) -> None:
    assert_type(turn.text, str)
    assert_type(turn.id, str)
    assert_type(turn.attempt, int)
    assert_type(turn.state, dict[str, Any])
    assert_type(turn.conversation.user_id, str)
    assert_type(turn.conversation.metadata, Mapping[str, Any])
    assert_type((turn.fence.conversation_id, turn.fence.epoch, turn.fence.turn), tuple[str, int, str])
    if turn.reason == "takeover" and turn.key:
        return

    hits: list[Hit] = await turn.step("search", search, turn.text)
    total: int = await turn.step("sum", slow_sum, 1, 2, 3, retry=Retry(attempts=2, wait=0.1), record_errors=True)
    both: tuple[list[Hit], int] = await asyncio.gather(
        turn.step("one", search, "a", 5), turn.step("two", lambda: slow_sum(4))
    )
    try:
        colour: str = await turn.ask({"text": "Which colour?"}, schema={"enum": ["red", "green"]}, timeout=3600)
    except (AskExpired, StepFailed) as error:
        colour = error.detail
    turn.state["asked"] = turn.state.get("asked", 0) + 1

    async for entry in turn.conversation.events():
        assert_type(entry, dict[str, Any])
    history = await turn.conversation.history(limit=20)
    assert_type(history, list[dict[str, Any]])

    await turn.stream(hits[0]["title"])
    await turn.stream({"tool": "search", "hits": len(both[0])}, part="tools", type="tool")
    await turn.emit("coloured", {"colour": colour, "total": total})
    await turn.reply({"text": colour, "messages": len(history)})


plain = Convener()


@plain.agent
def answered_in_a_thread(turn: Turn) -> None:
    print(turn.text)


async def called_directly(turn: Turn) -> None:
    """Decorators give back what they are given: a function stays what it is, for tests and for other functions."""
    answered_in_a_thread(turn)
    await assistant(turn)
