"""A whole cluster under faults, from one seed: first safety while things fail, then liveness when they heal."""

from __future__ import annotations

import asyncio
import os
import random
from typing import Any

import pytest

from convener.errors import ConvenerError
from convener.manager.turn import Turn
from convener.store.base import Store
from convener.testing.cluster import InProcessCluster, RecordingSink
from convener.testing.faults import FaultyStore
from tests.support.waiting import wait_until

pytestmark = pytest.mark.anyio

SEEDS = range(int(os.environ.get("CONVENER_TEST_SEED", "0")), int(os.environ.get("CONVENER_TEST_SEED", "0")) + 4)
CONVERSATIONS = 6
STEPS = 400


async def answer(turn: Turn) -> None:
    turn.state["answered"] = turn.state.get("answered", 0) + 1
    await asyncio.sleep(0)
    await turn.reply({"to": turn.input.message_id, "n": turn.state["answered"]})


class Workload:
    """Random users of a cluster whose stores fail."""

    def __init__(self, cluster: InProcessCluster, rng: random.Random) -> None:
        self.cluster = cluster
        self.rng = rng
        self.accepted: dict[str, set[str]] = {f"c{i}": set() for i in range(CONVERSATIONS)}
        self.tried: dict[str, set[str]] = {f"c{i}": set() for i in range(CONVERSATIONS)}
        self.sinks: list[tuple[str, RecordingSink]] = []
        self.counter = 0

    def user(self, cid: str) -> str:
        return f"u{int(cid[1:]) % 3}"

    async def step(self) -> None:
        cid = f"c{self.rng.randrange(CONVERSATIONS)}"
        manager = self.rng.choice(list(self.cluster))
        dice = self.rng.random()
        try:
            if dice < 0.1:
                await self.join(manager, cid)
            elif dice < 0.2:
                await manager.maybe_start_agent_loop(cid, user_id=self.user(cid))
            elif dice < 0.25:
                await manager.engine.hibernate(cid)
            else:
                await self.send(manager, cid)
        except ConvenerError:
            pass

    async def join(self, manager: Any, cid: str) -> None:
        sink = RecordingSink()
        self.counter += 1
        connection = f"s{self.counter}"
        await manager.join_conversation(cid, connection, user_id=self.user(cid), sink=sink)
        manager.begin_replay(connection)
        self.sinks.append((cid, sink))

    async def send(self, manager: Any, cid: str) -> None:
        self.counter += 1
        # Every fourth message is one that was sent before, under its id.
        known = sorted(self.tried[cid])
        ident = self.rng.choice(known) if known and self.rng.random() < 0.25 else f"m{self.counter}"
        self.tried[cid].add(ident)
        await manager.send_event_to_conversation(cid, {"text": ident}, user_id=self.user(cid), message_id=ident)
        self.accepted[cid].add(ident)


async def events_of(store: Store, cid: str) -> list[dict[str, Any]]:
    from convener.core.cursor import Cursor
    from convener.core.view import START, Place
    from convener.manager.views import decode

    cursor = Cursor()
    out: list[dict[str, Any]] = []
    while True:
        page = await store.read(cid, cursor, 500)
        if page is None or not page.entries:
            return out
        out += [decode(entry, START, page.generation).payload for entry in page.entries]
        last = page.entries[-1]
        cursor = Cursor(page.generation, Place(last.epoch, last.seq))


@pytest.mark.parametrize("seed", SEEDS)
async def test_nothing_is_lost_or_repeated_under_faults(seed: int) -> None:
    rng = random.Random(seed)
    print(f"seed {seed}: replay with CONVENER_TEST_SEED={seed}")
    stores: list[FaultyStore] = []

    def wrap(index: int, store: Store) -> Store:
        stores.append(FaultyStore(store, random.Random(f"{seed}.{index}"), rate=0.0, delay=0.02))
        return stores[-1]  # type: ignore[return-value]

    async with InProcessCluster(answer, limit=2, wrap=wrap) as cluster:
        work = Workload(cluster, rng)
        for _ in range(10):
            await work.step()
        for store in stores:
            store.rate = 0.25
        for round_ in range(STEPS // 8):
            await asyncio.gather(*(work.step() for _ in range(8)))
            if round_ in (STEPS // 24, STEPS // 12):
                await cluster.kill(rng.choice([i for i, m in enumerate(cluster.managers) if m is not None]))
                stores[await cluster.add()].rate = 0.25
        for store in stores:
            store.rate = 0.0
        failed = sum(sum(store.failed.values()) for store in stores)
        assert failed > STEPS // 4, "hardly anything failed: the run shows nothing"
        await settle(cluster, work)


async def settle(cluster: InProcessCluster, work: Workload) -> None:
    store = next(iter(cluster)).engine.node.store

    async def quiet() -> bool:
        for cid in work.accepted:
            meta = await store.head(cid)
            if meta is not None and (meta.position != meta.done or meta.cursor != meta.done):
                return False
        return True

    await wait_until(quiet, "every accepted message is answered", limit=30)
    for cid, accepted in work.accepted.items():
        events = await events_of(store, cid)
        assert [e["seq"] for e in events] == list(range(1, len(events) + 1))
        inputs = [e["data"]["message_id"] for e in events if e["kind"] == "input"]
        assert len(inputs) == len(set(inputs)), f"{cid}: a message twice in the log"
        assert accepted <= set(inputs), f"{cid}: accepted, not in the log: {accepted - set(inputs)}"
        answered = [e["data"]["to"] for e in events if e["kind"] == "reply"]
        assert sorted(answered) == sorted(inputs), f"{cid}: not one answer each"
        counts = [e["data"]["n"] for e in events if e["kind"] == "reply"]
        assert counts == list(range(1, len(counts) + 1)), f"{cid}: the state lost or repeated a turn"
    await check_views(cluster, work, store)
    report = await next(iter(cluster)).audit()
    assert report["violations"] == []


async def check_views(cluster: InProcessCluster, work: Workload, store: Store) -> None:
    alive = {feed.connection_id for m in cluster for feed in m.engine.feeds.values()}
    assert alive
    for cid, sink in work.sinks:
        seqs = [e["seq"] for e in sink.events]
        assert seqs == list(range(1, len(seqs) + 1)), f"{cid}: a client saw {seqs}"
