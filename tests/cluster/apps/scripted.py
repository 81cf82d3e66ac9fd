"""An echo whose turns last as long as a test wants: once, since a turn that is begun again is answered at once.

``/hang`` never ends by itself; ``/until FILE`` ends when the file exists; ``/wedge FILE`` likewise, and nothing
else runs in the process meanwhile; ``/exit`` ends the process, each time that it is tried.
"""

from __future__ import annotations

import asyncio
import os
import time
from pathlib import Path

from convener import Convener, Turn

app = Convener()


@app.agent
async def echo(turn: Turn) -> None:
    """Answer one message with itself."""
    command, _, rest = turn.text.partition(" ")
    if turn.attempt == 1 and command == "/hang":
        await asyncio.Event().wait()
    if turn.attempt == 1 and command == "/until":
        while not Path(rest).exists():  # noqa: ASYNC110, ASYNC240 - a file is what another process can make
            await asyncio.sleep(0.01)
    if turn.attempt == 1 and command == "/wedge":
        while not Path(rest).exists():  # noqa: ASYNC240
            time.sleep(0.01)  # noqa: ASYNC251
    if command == "/exit":
        os._exit(1)
    await turn.reply({"text": turn.text})
