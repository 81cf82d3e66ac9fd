"""`TicketStore` inside one process; a ticket does not outlive it, nor needs to."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from convener.errors import StoreFull

MAX_TICKETS: Final = 10_000
"""Tickets that nobody has used yet, and that are not too old."""


class LocalTickets:
    """Small secrets that are fetched once.

    Args:
        clock: nanoseconds on a clock that does not jump.
    """

    def __init__(self, clock: Callable[[], int]) -> None:
        self._clock = clock
        self._kept: dict[str, tuple[int, bytes]] = {}

    async def keep(self, name: str, sealed: bytes, ttl: int) -> None:
        """Keep bytes for `ttl` ms. Raises `StoreFull`."""
        now = self._clock()
        if len(self._kept) >= MAX_TICKETS:
            self._kept = {key: kept for key, kept in self._kept.items() if kept[0] > now}
        if len(self._kept) >= MAX_TICKETS:
            raise StoreFull(f"{MAX_TICKETS} tickets are waiting to be used", retry_after=1.0)
        self._kept[name] = now + ttl * 1_000_000, sealed

    def names(self) -> list[str]:
        """Of all that are still good."""
        now = self._clock()
        return [name for name, (until, _) in self._kept.items() if until > now]

    async def take(self, name: str) -> bytes | None:
        """Fetch and forget."""
        until, sealed = self._kept.pop(name, (0, b""))
        return sealed if until > self._clock() else None
