"""A chat with a model behind an OpenAI-compatible endpoint, streamed to every client as it is written.

In this directory; `OPENAI_BASE_URL` is for servers other than OpenAI's (vLLM, Ollama, llama.cpp, a gateway)::

    $ pip install convener openai
    $ export OPENAI_API_KEY=sk-…
    $ export OPENAI_BASE_URL=http://127.0.0.1:11434/v1
    $ export MODEL=llama3.2
    $ convener serve llm_stream:app

In a second terminal, with the same environment::

    $ convener send chat1 "Name a colour." --create --user alice
    accepted at position 1 as 4n5mBeiQvTTtsfwKWy7Jbw
    $ convener tail chat1 --no-follow
         1  14:23:26  open              epoch begins on …
         2  14:23:26  input             Name a colour.
         3  14:23:26  turn_started      {"attempt": 1, "reason": "new"}
         4  14:23:28  reply             …
         5  14:23:28  turn_done         {"settles": [1]}

`convener interrupt chat1` while it writes ends the answer, and the request to the model with it.
"""

import os
from typing import Any

from openai import AsyncOpenAI
from openai.types.chat import ChatCompletionMessageParam

from convener import Convener, Turn

MODEL = os.environ.get("MODEL", "gpt-5-mini")

app = Convener()
client = AsyncOpenAI()


def message(role: str, data: Any) -> ChatCompletionMessageParam:
    """What somebody said, as the model wants it: its text, else the JSON value itself."""
    match data:
        case {"text": str(text)}:
            content = text
        case _:
            content = str(data)
    return {"role": "user", "content": content} if role == "user" else {"role": "assistant", "content": content}


@app.agent
async def assistant(turn: Turn) -> None:
    """Answer one message. What is streamed becomes one `reply` in the log when the turn ends."""
    said = [message(m["role"], m["data"]) for m in await turn.conversation.history(limit=40)]
    stream = await client.chat.completions.create(
        model=MODEL,
        messages=[{"role": "system", "content": "You are brief."}, *said, message("user", turn.data)],
        stream=True,
    )
    # An interrupt arrives here as CancelledError: leaving the block closes the connection, and the model stops.
    async with stream:
        async for chunk in stream:
            if chunk.choices and (piece := chunk.choices[0].delta.content):
                await turn.stream(piece)
