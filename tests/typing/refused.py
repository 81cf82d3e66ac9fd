"""What the types refuse. Each comment must be needed: a line that is accepted one day fails the test."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI

from convener import Convener, Conversation, Identity, Interrupted, Loop, Retry, Settings, Turn

app = Convener()


@app.agent  # pyright: ignore[reportArgumentType, reportUntypedFunctionDecorator]
async def without_a_turn() -> None: ...


@app.agent  # pyright: ignore[reportArgumentType, reportUntypedFunctionDecorator]
async def with_a_text(text: str) -> None: ...


@app.agent  # pyright: ignore[reportArgumentType, reportUntypedFunctionDecorator]
async def with_a_result(turn: Turn) -> str:
    return turn.text


@app.loop  # pyright: ignore[reportArgumentType, reportUntypedFunctionDecorator]
def plain_loop(loop: Loop) -> None: ...


@app.rpc  # pyright: ignore[reportArgumentType]
async def without_a_name(conversation: Conversation, params: Any) -> None: ...


@app.rpc("short")  # pyright: ignore[reportArgumentType, reportUntypedFunctionDecorator]
async def without_params(conversation: Conversation) -> None: ...


@app.limit  # pyright: ignore[reportArgumentType, reportUntypedFunctionDecorator]
def in_words(user_id: str) -> str:
    return user_id


@app.authenticate  # pyright: ignore[reportArgumentType, reportUntypedFunctionDecorator]
def not_async(token: str | None, headers: Mapping[str, str]) -> Identity | None:
    return None


@app.authenticate  # pyright: ignore[reportArgumentType, reportUntypedFunctionDecorator]
async def by_name(token: str | None, headers: Mapping[str, str]) -> str:
    return token or ""


@app.authorize  # pyright: ignore[reportArgumentType, reportUntypedFunctionDecorator]
async def too_few(identity: Identity, conversation_id: str, action: str) -> bool:
    return True


@app.on_recover  # pyright: ignore[reportArgumentType, reportUntypedFunctionDecorator]
def never(interrupted: Interrupted) -> str:
    return "never"


class Basket:
    items: list[str]


async def misused(turn: Turn, typed: Turn[Basket]) -> None:
    turn.reply({"text": "not awaited"})  # pyright: ignore[reportUnusedCoroutine]
    await turn.reply()  # pyright: ignore[reportCallIssue]
    await turn.step(len, turn.text)  # pyright: ignore[reportArgumentType]
    await turn.step("search")  # pyright: ignore[reportCallIssue]
    await turn.step("search", "not a function")  # pyright: ignore[reportArgumentType]
    await turn.step("search", len, "x", retry=3)  # pyright: ignore[reportArgumentType]
    await turn.ask("?", schema="string")  # pyright: ignore[reportArgumentType]
    await turn.ask("?", timeout="soon")  # pyright: ignore[reportArgumentType]
    await turn.emit({"kind": "mine"})  # pyright: ignore[reportCallIssue]
    turn.state.colour = 1  # pyright: ignore[reportAttributeAccessIssue]
    turn.state = None  # pyright: ignore[reportAttributeAccessIssue]
    typed.state["items"]  # pyright: ignore[reportIndexIssue]
    typed.state.colour = 1  # pyright: ignore[reportAttributeAccessIssue]
    turn.text = "other"  # pyright: ignore[reportAttributeAccessIssue]
    turn.delete()  # pyright: ignore[reportAttributeAccessIssue, reportUnknownMemberType]


async def outside() -> None:
    await app.manager.send_event_to_conversation("c1", {}, overlap="queue")  # pyright: ignore[reportArgumentType]
    await app.manager.send_event_to_conversation({}, "c1")  # pyright: ignore[reportArgumentType]
    await app.manager.answer("c1", "red")  # pyright: ignore[reportCallIssue]
    await app.manager.call("c1", "double", timeout="5")  # pyright: ignore[reportArgumentType]


Settings(limit_policy="evict")  # pyright: ignore[reportArgumentType]
Settings(colour="red")  # pyright: ignore[reportCallIssue]
Retry(attempts="3")  # pyright: ignore[reportArgumentType]
Convener({"auth": "none"})  # pyright: ignore[reportArgumentType]
app.mount_on(object())  # pyright: ignore[reportArgumentType]
app.mount_on(FastAPI(), 8000)  # pyright: ignore[reportArgumentType]
FastAPI(lifespan=app.lifespan(None))  # pyright: ignore[reportArgumentType]
