"""The demo agent: what `convener up` and `convener serve` run when they are given nothing else.

It answers the text ``T`` with ``{"text": T}``; streamed word by word if ``T`` begins with ``/stream ``. ``/sleep S``
waits ``S`` seconds in a durable step and answers ``slept``, ``/ask Q`` asks ``Q`` and answers with the answer,
``/crash`` raises, ``/count`` answers how many messages it has answered.
"""

from __future__ import annotations

import asyncio
import json
import math
import re
from typing import Any, Final, cast

from convener.app import Convener
from convener.manager.turn import Turn

WORD_S: Final = 0.02
"""Between two words of a streamed answer: slow enough to be seen, as a language model's are."""

app = Convener()


@app.agent
async def echo(turn: Turn) -> None:
    """Answer one message."""
    turn.state["answered"] = answered = turn.state.get("answered", 0) + 1
    command, _, rest = turn.text.partition(" ")
    if command == "/stream" and rest:
        for word in re.findall(r"\s*\S+\s*", turn.text):
            await turn.stream(word)
            await asyncio.sleep(WORD_S)
    elif command == "/sleep":
        await turn.step("sleep", asyncio.sleep, _seconds(rest))
        await turn.reply({"text": "slept"})
    elif command == "/ask":
        await turn.reply({"text": _text(await turn.ask(rest))})
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


def _text(answer: Any) -> str:
    """An answer as text: a string, an object with a ``text``, or the JSON of anything else."""
    if isinstance(answer, dict):
        answer = cast("dict[str, Any]", answer).get("text", answer)
    return answer if isinstance(answer, str) else json.dumps(answer, ensure_ascii=False)
