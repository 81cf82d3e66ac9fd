"""The store's room, looked at every few seconds: new work stops before the store is full.

At the store's memory limit ordinary steps are refused, and whoever would have to begin something to end something
could do neither. So new conversations are refused earlier, from `store_high_watermark` on, and what runs has the rest
to finish in. A store whose eviction policy was changed to `allkeys-*` refuses nothing at its limit: it deletes
conversations. Then nodes refuse messages too, from the same mark on.
"""

from __future__ import annotations

import asyncio
import math
from dataclasses import dataclass
from typing import Final

import structlog

from convener.errors import ConvenerError, StoreFull
from convener.store.base import Store, StoreInfo
from convener.telemetry.metrics import Metrics

log = structlog.get_logger(__name__)

LOOK_S: Final = 2.0


@dataclass(slots=True)
class Storage:
    """What one node knows of the store's memory.

    Attributes:
        high_watermark: part of the store's memory that new conversations may fill, 0 to 1.
        ratio: part of it that is used; None if the store has no limit or does not say.
        evicting: the eviction policy, if it is one that deletes conversations; else "".
    """

    high_watermark: float = 0.8
    ratio: float | None = None
    evicting: str = ""

    @property
    def full(self) -> bool:
        """Whether the mark is reached."""
        return self.ratio is not None and self.ratio >= self.high_watermark

    def check_conversation(self) -> None:
        """Raise `StoreFull` if no new conversation may be made."""
        if self.full:
            raise StoreFull("the store's memory is nearly full: no new conversations for now")

    def check_message(self) -> None:
        """Raise `StoreFull` if no message may be taken."""
        if self.full and self.evicting:
            raise StoreFull("the store's memory is nearly full, and then it would delete conversations")

    def problem(self) -> str:
        """What the store is set to that it must not be, in a few words; "" if that is nothing."""
        return f"maxmemory-policy is {self.evicting}: the store deletes conversations" if self.evicting else ""

    def take(self, info: StoreInfo) -> None:
        """Learn what the store says of itself, and log what has changed."""
        before = self.full, self.evicting
        self.ratio = info.memory_ratio
        policy = info.eviction or ""
        self.evicting = policy if policy.startswith("allkeys") else ""
        if self.full and not before[0]:
            log.warning("the store is nearly full: new conversations are refused", ratio=round(self.ratio or 0.0, 3))
        elif before[0] and not self.full:
            log.info("the store has room again", ratio=None if self.ratio is None else round(self.ratio, 3))
        if self.evicting and not before[1]:
            log.error("the store deletes conversations when it is full; set noeviction", policy=self.evicting)
        elif before[1] and not self.evicting:
            log.info("the store deletes nothing any more", policy=policy)

    async def watch(self, store: Store, metrics: Metrics) -> None:
        """Look for ever. What the store hides, and a limit that it has not, is NaN in the metric."""
        while True:
            try:
                self.take(await store.info())
            except ConvenerError as error:
                log.debug("the store does not say how full it is", error=str(error))
            metrics.store_memory_ratio.set(math.nan if self.ratio is None else self.ratio)
            metrics.store_evicts.set(1 if self.evicting else 0)
            await asyncio.sleep(LOOK_S)
