"""Conversations inside a FastAPI application that has routes of its own.

In this directory::

    $ pip install convener fastapi uvicorn
    $ uvicorn fastapi_app:api --port 8000

In a second terminal: a webhook of yours starts a conversation, and clients talk to it below `/agents`::

    $ curl -sS http://127.0.0.1:8000/orders/17 --json '{"status": "lost"}'
    {"position":1}
    $ export CONVENER_URL=http://127.0.0.1:8000/agents
    $ convener tail order-17 --no-follow -n 2
         4  14:23:26  reply             Order 17 is lost.
         5  14:23:26  turn_done         {"settles": [1]}
    $ convener send order-17 "What now?"
    accepted at position 2 as 4n5mBeiQvTTtsfwKWy7Jbw

`CONVENER_REDIS_URL=redis://…` in its environment makes it a node of a cluster; nothing else changes.
"""

from typing import Any

from fastapi import FastAPI, HTTPException

from convener import Convener, Turn
from convener.errors import ConvenerError

agents = Convener()
api = FastAPI(lifespan=agents.lifespan)
agents.mount_on(api, path="/agents")


@agents.agent
async def clerk(turn: Turn) -> None:
    """Answer whoever speaks: the webhook below, or a client."""
    match turn.data:
        case {"order": int(number), "status": str(status)}:
            turn.state |= {"order": number, "status": status}
        case _:
            pass
    await turn.reply({"text": f"Order {turn.state['order']} is {turn.state['status']}."})


@api.post("/orders/{number}", status_code=202)
async def order_changed(number: int, change: dict[str, Any]) -> dict[str, Any]:
    """A route of the application's own, which talks to an agent."""
    try:
        await agents.manager.maybe_start_agent_loop(f"order-{number}", user_id="shop")
        sent = await agents.manager.send_event_to_conversation(f"order-{number}", {"order": number, **change})
    except ConvenerError as error:
        raise HTTPException(error.http_status, error.detail) from error
    return {"position": sent.position}
