"""The smallest application that `convener serve` and `convener up` can run: it knows nothing of convener."""

from __future__ import annotations

import json
import os
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


async def app(scope: Message, receive: Receive, send: Send) -> None:
    """Answers every request with what a test wants to know about this process."""
    if scope["type"] == "lifespan":
        await _lifespan(receive, send)
        return
    about = {
        "pid": os.getpid(),
        "path": scope["path"],
        "node_name": os.environ.get("CONVENER_NODE_NAME"),
        "redis_url": os.environ.get("CONVENER_REDIS_URL"),
    }
    headers = [(b"content-type", b"application/json")]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": json.dumps(about).encode()})


async def _lifespan(receive: Receive, send: Send) -> None:
    while True:
        message = await receive()
        if message["type"] == "lifespan.startup":
            print("plain application starts", flush=True)
        await send({"type": f"{message['type']}.complete"})
        if message["type"] == "lifespan.shutdown":
            print("plain application ends", flush=True)
            return
