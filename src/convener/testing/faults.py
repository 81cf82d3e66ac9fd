"""A store that fails on purpose: commands that never arrive, replies that get lost, delays, from one seed.

What a network can do to a caller, nothing that it cannot: a step is applied at most once per call, wholly or not at
all, and a lost reply looks like a lost command.
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Callable
from typing import Any, Final

from convener.errors import StoreUnavailable
from convener.store.base import Handler, Store

FAULTY: Final = frozenset(
    {"create", "send", "unsend", "claim", "resolve", "append", "release", "disown", "stop", "resume", "erase"}
    | {"head", "heads", "read", "inbox", "seen", "state", "slots", "slot", "reserve", "unreserve", "enqueue"}
    | {"dequeue", "waiting", "membership", "bury", "supersede", "reap", "put_record", "record", "drop_record", "flush"}
    | {"node_records", "drop_node", "index", "touch", "unindex", "interrupt", "answer", "asks", "add_pieces", "pieces"}
    | {"set_alarm", "fire", "alarms", "drop_alarm", "set_timer", "clear_timer", "due_timers"}
)


class FaultyStore:
    """Passes everything to `store`; while `rate` > 0, calls fail with that probability.

    Args:
        random: source of every decision, so that a seed replays a run (up to the scheduling of real time).
        rate: of calls, how many fail: half before they are applied, half after.
        delay: at most so many seconds before a call, for as many calls again.
        loss: of publications, how many do not arrive. Nobody is told before `mend`.
    """

    def __init__(
        self, store: Store, random: random.Random, rate: float = 0.0, delay: float = 0.0, loss: float = 0.0
    ) -> None:
        self._store = store
        self._random = random
        self.rate = rate
        self.delay = delay
        self.loss = loss
        self.failed: Counter[str] = Counter()
        self.lost = 0
        self._gaps: dict[str, Callable[[], None]] = {}

    async def subscribe(self, channel: str, handler: Handler, on_gap: Callable[[], None]) -> None:
        """As `Bus.subscribe`, over a connection that loses publications."""

        def hear(payload: bytes) -> None:
            if self.loss and self._random.random() < self.loss:
                self.lost += 1
            else:
                handler(payload)

        self._gaps[channel] = on_gap
        await self._store.subscribe(channel, hear, on_gap)

    async def unsubscribe(self, channel: str) -> None:
        """As `Bus.unsubscribe`."""
        self._gaps.pop(channel, None)
        await self._store.unsubscribe(channel)

    def mend(self) -> None:
        """Lose nothing more, and say that something may have been lost, as a connection does that was made again."""
        self.loss = 0.0
        for on_gap in list(self._gaps.values()):
            on_gap()

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._store, name)
        if name not in FAULTY:
            return value

        async def call(*args: Any, **kwargs: Any) -> Any:
            dice = self._random.random()
            if dice < self.rate / 2:
                self.failed[name] += 1
                raise StoreUnavailable("the command was lost")
            if self.delay and dice > 1 - self.rate:
                await asyncio.sleep(self._random.random() * self.delay)
            result = await value(*args, **kwargs)
            if self.rate / 2 <= dice < self.rate:
                self.failed[name] += 1
                raise StoreUnavailable("the reply was lost")
            return result

        return call
