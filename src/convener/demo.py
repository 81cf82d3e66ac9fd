"""The demo agent: what `convener up` and `convener serve` run when they are given nothing else.

It answers the text ``T`` with ``{"text": T}``; streamed word by word if ``T`` begins with ``/stream ``. ``/sleep S``
waits ``S`` seconds in a durable step and answers ``slept``, ``/crash`` raises, ``/count`` answers how many messages
it has answered.
"""

from __future__ import annotations

import asyncio
import math
import re

from convener.app import Convener
from convener.manager.turn import Turn

app = Convener()


@app.agent
async def echo(turn: Turn) -> None:
    """Answer one message."""
    turn.state["answered"] = answered = turn.state.get("answered", 0) + 1
    command, _, rest = turn.text.partition(" ")
    if command == "/stream" and rest:
        for piece in re.findall(r"\S+\s*", rest):
            await turn.stream(piece)
    elif command == "/sleep":
        await turn.step("sleep", asyncio.sleep, _seconds(rest))
        await turn.reply({"text": "slept"})
    elif command == "/crash":
        raise RuntimeError("asked to crash")
    elif command == "/count":
        await turn.reply({"text": str(answered - 1)})
    else:
        await turn.reply({"text": turn.text})


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        return 0.0
    return min(max(seconds, 0.0), 3600.0) if math.isfinite(seconds) else 0.0
