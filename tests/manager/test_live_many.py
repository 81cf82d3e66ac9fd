"""Many clients that come and go while an answer is written: each sees it once, to its end."""

from __future__ import annotations

import os
import random
from typing import Any

import pytest

from convener.core.cursor import Cursor, parse
from convener.testing.cluster import RecordingSink
from tests.manager.conftest import MakeCluster
from tests.manager.writing import Seen, Setting, end, set_up

pytestmark = pytest.mark.anyio

SEEDS = range(int(os.environ.get("CONVENER_TEST_SEED", "0")), int(os.environ.get("CONVENER_TEST_SEED", "0")) + 3)


class Visitor:
    """Joins and leaves at random nodes; keeps its cursor, and what it has put together of the answer."""

    def __init__(self, setting: Setting, name: str, rng: random.Random) -> None:
        self._setting = setting
        self._name = name
        self._rng = rng
        self._visits = 0
        self._cursor: Cursor | None = None
        self.manager: Any = None
        self.sink = RecordingSink()

    @property
    def is_here(self) -> bool:
        return self.manager is not None

    async def come(self) -> None:
        self._visits += 1
        self.sink = RecordingSink()
        self.manager = self._rng.choice(list(self._setting.cluster))
        connection = f"{self._name}.{self._visits}"
        options: dict[str, Any] = {"after": self._cursor}
        if self._cursor is None and self._rng.random() < 0.3:
            options = {"tail": self._rng.randrange(3)}
        await self.manager.join_conversation("c", connection, sink=self.sink, user_id="u", **options)
        self.manager.begin_replay(connection)

    async def go(self) -> None:
        await self.manager.disconnect_from_session(f"{self._name}.{self._visits}")
        self.manager = None
        Seen(self.sink.sent)
        if self.sink.events:
            self._cursor = parse(self.sink.events[-1]["cursor"])


@pytest.mark.parametrize("seed", SEEDS)
async def test_ten_clients_come_and_go_while_a_long_answer_is_written(make_cluster: MakeCluster, seed: int) -> None:
    print(f"seed {seed}: replay with CONVENER_TEST_SEED={seed}")
    rng = random.Random(seed)
    setting = await set_up(make_cluster)
    visitors = [Visitor(setting, f"v{number}", rng) for number in range(10)]
    for turn in ("t1", "t2"):
        pen = await setting.pen(turn)
        for number in range(150):
            data = f"{number} " * rng.choice((1, 1, 1, 5, 2500 if rng.random() < 0.1 else 1))
            await (pen.write([number], part="calls") if rng.random() < 0.1 else pen.write(data))
            if rng.random() < 0.4:
                visitor = rng.choice(visitors)
                await (visitor.go() if visitor.is_here else visitor.come())
        for visitor in visitors:
            if not visitor.is_here:
                await visitor.come()
        if turn == "t1":
            await setting.ask()
        await end(setting, pen, *(visitor.sink for visitor in visitors))


@pytest.mark.parametrize("seed", SEEDS)
async def test_clients_come_and_go_while_owners_die(make_cluster: MakeCluster, seed: int) -> None:
    print(f"seed {seed}: replay with CONVENER_TEST_SEED={seed}")
    rng = random.Random(seed)
    setting = await set_up(make_cluster)
    visitors = [Visitor(setting, f"v{number}", rng) for number in range(6)]
    for attempt in (1, 2):
        pen = await setting.pen(attempt=attempt)
        for number in range(60):
            await pen.write(f"{attempt}.{number} ")
            if rng.random() < 0.4:
                visitor = rng.choice(visitors)
                await (visitor.go() if visitor.is_here else visitor.come())
        if attempt == 1:
            doomed = setting.cluster[setting.owner]
            for visitor in visitors:
                if visitor.is_here and visitor.manager is doomed:
                    await visitor.go()
            await setting.cluster.kill(setting.owner)
    for visitor in visitors:
        if not visitor.is_here:
            await visitor.come()
    await end(setting, pen, *(visitor.sink for visitor in visitors))
