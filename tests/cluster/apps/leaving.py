"""An agent whose turns, steps and methods last as long as a test wants, in every attempt.

``/until FILE`` ends when the file exists, ``/steps FOLDER`` has a step for each of the files 0 to 3 of a folder, which
ends when its file exists, and notes each run of a step in its file ``calls``; ``/block FILE`` waits in a thread.
``/work COUNT SECONDS`` has so many steps of so many seconds, ``/stream TEXT`` answers word by word, ``/ask QUESTION``
asks, ``/alarm SECONDS`` lets an alarm answer later. Every turn ends with its own text as the reply.
"""

from __future__ import annotations

import asyncio
import re
import time
from pathlib import Path
from typing import Any

from convener import Convener, Conversation, Turn

app = Convener()

PARTS = 4


async def _exists(path: Path) -> None:
    while not path.exists():  # noqa: ASYNC110, ASYNC240 - a file is what another process can make
        await asyncio.sleep(0.01)


async def _part(folder: Path, number: int) -> int:
    with (folder / "calls").open("a") as calls:
        calls.write(f"{number}\n")
    await _exists(folder / str(number))
    return number


def _block(path: Path) -> None:
    while not path.exists():
        time.sleep(0.01)


@app.agent
async def work(turn: Turn) -> None:
    """Do what the message says."""
    command, _, rest = turn.text.partition(" ")
    turn.state["turns"] = turn.state.get("turns", 0) + 1
    if command == "/until":
        await _exists(Path(rest))
    elif command == "/steps":
        for number in range(PARTS):
            await turn.step("part", _part, Path(rest), number)
    elif command == "/work":
        count, seconds = rest.split()
        for _ in range(int(count)):
            await turn.step("work", asyncio.sleep, float(seconds))
    elif command == "/block":
        await turn.step("block", _block, Path(rest))
    elif command == "/ask":
        await turn.ask(rest)
    elif command == "/alarm":
        await turn.conversation.schedule(float(rest), {"text": f"alarm {turn.id}"})
    elif command == "/stream":
        for word in re.findall(r"\S+\s*", turn.text):
            await turn.stream(word)
            await asyncio.sleep(0.01)
        return
    await turn.reply({"text": turn.text})


@app.rpc("until")
async def until(conversation: Conversation, path: Any) -> str:
    """A call that says that it is under way, and ends when the file exists."""
    Path(path).with_suffix(".begun").touch()
    await _exists(Path(path))
    return conversation.id


@app.rpc("turns")
async def turns(conversation: Conversation, _: Any) -> int:
    """How many finished turns the conversation's history has."""
    return sum(entry["role"] == "user" for entry in await conversation.history())
