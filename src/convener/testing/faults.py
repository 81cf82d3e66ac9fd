"""A store that fails on purpose: commands that never arrive, replies that get lost, delays, from one seed.

What a network can do to a caller, nothing that it cannot: a step is applied at most once per call, wholly or not at
all, and a lost reply looks like a lost command.
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from typing import Any, Final

from convener.errors import StoreUnavailable
from convener.store.base import Store

FAULTY: Final = frozenset(
    {"create", "send", "unsend", "claim", "resolve", "append", "release", "disown", "stop", "resume", "erase"}
    | {"head", "heads", "read", "inbox", "seen", "state", "slots", "slot", "reserve", "unreserve", "enqueue"}
    | {"dequeue", "waiting", "membership", "bury", "reap", "put_record", "record", "drop_record", "flush"}
    | {"node_records", "drop_node", "index", "touch", "unindex", "interrupt", "answer", "asks", "add_pieces", "pieces"}
    | {"set_alarm", "fire", "alarms", "drop_alarm", "set_timer", "clear_timer", "due_timers"}
)


class FaultyStore:
    """Passes everything to `store`; while `rate` > 0, calls fail with that probability.

    Args:
        random: source of every decision, so that a seed replays a run (up to the scheduling of real time).
        rate: of calls, how many fail: half before they are applied, half after.
        delay: at most so many seconds before a call, for as many calls again.
    """

    def __init__(self, store: Store, random: random.Random, rate: float = 0.0, delay: float = 0.0) -> None:
        self._store = store
        self._random = random
        self.rate = rate
        self.delay = delay
        self.failed: Counter[str] = Counter()

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
