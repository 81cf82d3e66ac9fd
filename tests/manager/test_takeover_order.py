"""What a node does first when another one is gone, and how much of it at a time (protocol, section 8)."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from convener.manager.recovery import AT_ONCE
from convener.manager.turn import Turn
from convener.store.base import Store
from tests.manager.conftest import MakeCluster, join
from tests.support.waiting import wait_until

pytestmark = pytest.mark.anyio

OPEN, WATCHED = AT_ONCE + 10, 20


class Gated:
    """A store whose claims wait at a gate.

    Attributes:
        waiting: claims that are under way.
        most: as many as there ever were at a time.
        claimed: conversations, in the order in which their claims came.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self.gate = asyncio.Event()
        self.gate.set()
        self.waiting = self.most = 0
        self.claimed: list[str] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    async def claim(self, cid: str, request: Any) -> Any:
        self.claimed.append(cid)
        self.waiting += 1
        self.most = max(self.most, self.waiting)
        try:
            await self.gate.wait()
            return await self._store.claim(cid, request)
        finally:
            self.waiting -= 1


async def test_open_turns_are_taken_over_first_and_not_all_at_a_time(make_cluster: MakeCluster) -> None:
    gated: list[Gated] = []

    def wrap(_: int, store: Store) -> Any:
        gated.append(Gated(store))
        return gated[-1]

    begun: set[str] = set()

    async def agent(turn: Turn) -> None:
        if turn.attempt == 1:
            begun.add(turn.conversation.id)
            await asyncio.Event().wait()
        await turn.reply(turn.data)

    cluster = await make_cluster(agent, nodes=2, wrap=wrap)
    busy = [f"z-open-{number:03}" for number in range(OPEN)]
    watched = [f"a-watched-{number:03}" for number in range(WATCHED)]
    for cid in (*busy, *watched):
        await cluster[0].maybe_start_agent_loop(cid, user_id=f"user-of-{cid}")
    for cid in watched:
        await join(cluster, 1, cid, f"client-of-{cid}", user_id=f"user-of-{cid}")
    for cid in busy:
        await cluster[1].send_event_to_conversation(cid, {"text": "work"})
    await wait_until(lambda: len(begun) == OPEN, "all work")
    survivor = gated[1]
    survivor.claimed.clear()
    survivor.gate.clear()
    survivor.most = 0
    await cluster.kill(0)
    await wait_until(lambda: survivor.waiting == AT_ONCE, "as many are taken over as may be at a time")
    assert set(survivor.claimed) <= set(busy), "those first for whose answer somebody waits"
    survivor.gate.set()
    runners = cluster[1].engine.runners
    await wait_until(lambda: set(runners) >= {*busy, *watched}, "all are taken over", 40)
    assert survivor.most == AT_ONCE

    async def answered() -> bool:
        heads = await cluster[1].engine.node.store.heads(busy)
        return all(head is not None and head.position == head.done for head in heads)

    await wait_until(answered, "all that was under way is answered")
