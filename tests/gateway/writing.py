"""Answers that are written while clients look on, past the agent."""

from __future__ import annotations

from tests.gateway.support import Node
from tests.manager.writing import Pen
from tests.support.waiting import wait_until


async def under_way(node: Node, cid: str = "c1", turn: str = "t1") -> Pen:
    """Writes pieces of a turn, once that is under way."""
    engine = node.manager.engine

    def epoch() -> int:
        runner = engine.runner(cid)
        return runner.epoch if runner is not None else 0

    async def begun() -> bool:
        events = (await node.http.get(f"/api/conversations/{cid}/events")).json()["events"]
        return any(event["kind"] == "turn_started" and event["turn"] == turn for event in events)

    await wait_until(begun, f"{turn} is under way")
    return Pen(engine.node.store, cid, engine.node.incarnation, epoch(), turn, 1)
