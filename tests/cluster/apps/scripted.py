"""An echo whose turns last as long as a test wants: once, since a turn that is begun again is answered at once.

``/hang`` never ends by itself; ``/until FILE`` ends when the file exists.
"""

from __future__ import annotations

import asyncio
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
    await turn.reply({"text": turn.text})
