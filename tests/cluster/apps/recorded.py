"""An agent that tells somebody outside of its every step, and waits there wherever it may be held.

Its message is a script, ``{"port": …, "ops": […]}``: steps (several of one operation run at the same time), notes,
pieces of an answer. Between two operations, and after each piece, it asks whether it may go on.
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
from collections import Counter
from typing import Any

from convener import Convener, Turn

app = Convener()


class Outside:
    """The recorder, as one attempt of a turn speaks to it."""

    def __init__(self, port: int, turn: Turn) -> None:
        self._address = ("127.0.0.1", port)
        self._turn = turn
        self._numbers = Counter[str]()
        self._who = {
            "cid": turn.conversation.id,
            "turn": turn.id,
            "attempt": turn.attempt,
            "epoch": turn.fence.epoch,
            "pid": os.getpid(),
        }

    def _line(self, what: dict[str, Any]) -> bytes:
        return json.dumps(self._who | what).encode() + b"\n"

    async def ask(self, **what: Any) -> Any:
        """Say what is done now; the answer comes when it may go on."""
        reader, writer = await asyncio.open_connection(*self._address)
        try:
            writer.write(self._line(what))
            return json.loads(await reader.readline())
        finally:
            writer.close()

    def ask_in_thread(self, **what: Any) -> Any:
        """The same, for a step that is a plain function."""
        with socket.create_connection(self._address) as link, link.makefile("rwb") as stream:
            stream.write(self._line(what))
            stream.flush()
            return json.loads(stream.readline())

    async def step(self, name: str) -> Any:
        """A durable step: its result is what the recorder answers."""
        self._numbers[name] += 1
        number = self._numbers[name]

        async def run() -> Any:
            return await self.ask(what="step", name=name, number=number, key=self._turn.key)

        def run_in_thread() -> Any:
            return self.ask_in_thread(what="step", name=name, number=number, key=self._turn.key)

        return await self._turn.step(name, run_in_thread if name == "fetch" else run)


@app.agent
async def recorded(turn: Turn) -> None:
    """Do what the message says."""
    script = json.loads(turn.text)
    outside = Outside(script["port"], turn)
    turn.state["turns"] = turns = turn.state.get("turns", 0) + 1
    results: list[Any] = []
    streamed = 0
    for place, (what, *rest) in enumerate(script["ops"]):
        if what == "steps":
            results += await asyncio.gather(*(outside.step(name) for name in rest))
        elif what == "note":
            await turn.emit("note", {"place": place, "turns": turns, "results": results})
        else:
            for piece in rest:
                await turn.stream(piece)
                streamed += len(piece)
                await outside.ask(what="flow", offset=streamed)
        await outside.ask(what="point", place=place)
