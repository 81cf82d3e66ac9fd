"""Inside other applications, and the running manager as their routes use it."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import assert_type

from fastapi import FastAPI
from starlette.applications import Starlette

from convener import AgentLoopInfo, Convener, ConvenerError, StandaloneConversationManager
from convener.errors import AskClosed, LimitExceeded

agents = Convener()
api = FastAPI(lifespan=agents.lifespan)
agents.mount_on(api, path="/agents")

bare = Convener()
plain = Starlette(lifespan=bare.lifespan)
bare.mount_on(plain)


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncGenerator[None]:
    async with agents.lifespan(app):
        yield


composed = FastAPI(lifespan=lifespan)


@api.post("/orders/{number}")
async def order(number: int) -> dict[str, int]:
    manager = agents.manager
    assert_type(manager, StandaloneConversationManager)
    cid = f"order-{number}"
    try:
        info = await manager.maybe_start_agent_loop(cid, user_id="shop", metadata={"number": number})
        assert_type(info, AgentLoopInfo)
        sent = await manager.send_event_to_conversation(cid, {"text": "hi"}, message_id="m1", overlap="interrupt")
    except LimitExceeded as error:
        assert_type(error.running, tuple[str, ...])
        return {"limit": error.limit}
    except ConvenerError as error:
        assert_type((error.wire_code, error.http_status), tuple[str, int])
        return {}
    return {"position": sent.position}


async def approve(cid: str) -> None:
    manager = agents.manager
    for question in await manager.questions(cid):
        assert_type(question.ask_id, str)
        try:
            await manager.answer(cid, question.ask_id, {"approved": True}, user_id="boss")
        except AskClosed:
            continue
    total: int = await manager.call(cid, "total", {"currency": "EUR"}, timeout=5)
    if total and await manager.interrupt(cid) == "interrupted":
        await manager.close_session(cid, "approved")
