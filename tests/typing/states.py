"""Agents whose state is a type of their own."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, assert_type

import msgspec
from pydantic import BaseModel

from convener import Convener, Loop, Turn


@dataclass
class Basket:
    items: list[str] = field(default_factory=list[str])


class Form(BaseModel):
    name: str = ""
    age: int | None = None


class Score(msgspec.Struct):
    points: int = 0


def older(version: int, data: dict[str, Any]) -> dict[str, Any]:
    return {"items": list(data)} if version == 0 else data


shop, office, game = Convener(), Convener(), Convener()


@shop.agent(state=Basket, version=2, migrate=older)
async def keeper(turn: Turn[Basket]) -> None:
    assert_type(turn.state, Basket)
    turn.state.items.append(turn.text)
    turn.state = Basket(items=turn.state.items[-10:])
    await turn.reply({"items": len(turn.state.items)})


@office.agent(state=Form)
def clerk(turn: Turn[Form]) -> None:
    assert_type(turn.state.age, int | None)
    turn.state.name = turn.text


@game.loop(state=Score)
async def play(loop: Loop[Score]) -> None:
    assert_type(loop.state, Score)
    async for turn in loop.turns():
        assert_type(turn.state, Score)
        turn.state.points += 1
