"""An agent that acts without clients: it watches a feed and tells about every item of it, once.

In this directory::

    $ convener serve background_worker:app

In a second terminal, with the same environment; the first message starts the loop, and everything else it does alone::

    $ convener send watch1 start --create --user alice
    accepted at position 1 as 4n5mBeiQvTTtsfwKWy7Jbw
    $ echo "It rains in Rome." >> feed.txt
    $ convener tail watch1 --no-follow -n 5
         6  14:23:28  input             alice: {"item": 1, "said": "It rains in Rome."}
         7  14:23:28  turn_started      {"attempt": 1, "reason": "new"}
         8  14:23:28  step              {"name": "summarise", "number": 1, "result": "4 words"}
         9  14:23:28  reply             item 1: 4 words
        10  14:23:28  turn_done         {"settles": [2]}
"""

import asyncio
from pathlib import Path

from convener import Convener, Loop, Turn
from convener.errors import ConvenerError

FEED = Path("feed.txt")
PAUSE_S = 1.0

app = Convener()


def items() -> list[str]:
    """Stands in for a feed of the outside world: everything that it has, oldest first."""
    return FEED.read_text(encoding="utf-8").splitlines() if FEED.exists() else []


async def summarise(said: str) -> str:
    """Stands in for work that costs money."""
    return f"{len(said.split())} words"


async def watch(loop: Loop) -> None:
    """Send what is new to the conversation. An item has its own message id: sent again, it is not taken in again."""
    while True:
        seen = loop.state.get("seen", 0)
        try:
            for number, said in enumerate((await asyncio.to_thread(items))[seen:], seen + 1):
                await loop.send({"item": number, "said": said}, message_id=f"item-{number}")
        except ConvenerError:
            pass  # a full inbox, a store that is away: the rest is sent at the next look
        await asyncio.sleep(PAUSE_S)


async def tell(turn: Turn) -> None:
    """Answer one message. The reply and how far the feed was read are saved together, in one append."""
    match turn.data:
        case {"item": int(number), "said": str(said)}:
            summary = await turn.step("summarise", summarise, said)
            turn.state["seen"] = number
            await turn.reply({"text": f"item {number}: {summary}"})
        case _:
            await turn.reply({"text": f"I have seen {turn.state.get('seen', 0)} items."})


# Without hibernate=False an idle conversation would leave memory, and nobody would watch.
@app.loop(hibernate=False)
async def worker(loop: Loop) -> None:
    """Runs on one node as long as the cluster lives: after a crash it is begun again on another one."""
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(watch(loop))
        async for turn in loop.turns():
            await tell(turn)
