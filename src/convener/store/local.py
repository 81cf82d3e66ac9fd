"""The store inside one process: the core's transitions, applied to tables in one transaction each.

`MemoryStore` and `SQLiteStore` differ in their tables and in the engine that runs the steps; what the steps
do is here, once. Several stores may share one engine (`peer`): an in-process cluster for tests, each with a
connection to the bus of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Self

from convener.core.membership import RenewReply
from convener.errors import StoreUnavailable
from convener.store.base import Fallback, Progress, StoreInfo
from convener.store.clock import boottime_ns
from convener.store.local_parts import (
    LocalConversations,
    LocalIndex,
    LocalMembership,
    LocalNodes,
    LocalSlots,
    LocalTimers,
    renew,
)
from convener.store.local_retention import LocalRetention
from convener.store.localbus import LocalBus
from convener.store.tables import Engine, channel_name
from convener.store.tickets import LocalTickets


class LocalLink:
    """The heartbeat thread's own way to the store; synchronous, for use from that thread.

    Args:
        timeout: seconds that a renewal may take, below the renew interval.
    """

    def __init__(self, engine: Engine, timeout: float) -> None:
        self._engine = engine
        self._timeout = timeout
        self._held: list[str] = []

    def renew(self, incarnation: str, info: str | None = None) -> RenewReply:
        """RENEW.

        Raises:
            StoreUnavailable: not done in time; the outcome is unknown.
        """
        return self._engine.run_from_thread(lambda t: renew(t, incarnation, info), self._timeout)

    def hold_live(self, incarnation: str) -> None:
        """Hold the incarnation's `live` channel: shows that the process lives, until `close`."""
        self._engine.hold_live(incarnation)
        self._held.append(incarnation)

    def ping_live(self) -> None:
        """Show that the way to the store works.

        Raises:
            StoreUnavailable: it does not, or nothing is held.
        """
        if not self._held:
            raise StoreUnavailable("no live channel is held")
        self._engine.run_from_thread(lambda t: None, self._timeout)

    def close(self) -> None:
        """Let go of the `live` channel."""
        while self._held:
            self._engine.drop_live(self._held.pop())


class LocalStore(LocalConversations, LocalRetention, LocalTimers, LocalSlots, LocalMembership, LocalNodes, LocalIndex):
    """A `Store` over an engine."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._tickets = LocalTickets(boottime_ns)
        self._bus: LocalBus = engine.connect()
        self._open = False

    async def open(self) -> None:
        if not self._open:
            await self._engine.open()
            self._bus = self._engine.connect()
            self._open = True

    async def close(self) -> None:
        if self._open:
            self._open = False
            self._bus.close()
            await self._engine.close()

    def peer(self) -> Self:
        """Another store over the same data with a bus connection of its own: what another node would have."""
        other = object.__new__(type(self))
        LocalStore.__init__(other, self._engine)
        other._tickets = self._tickets
        return other

    async def keep_ticket(self, name: str, sealed: bytes, ttl: int) -> None:
        await self._tickets.keep(name, sealed, ttl)

    async def take_ticket(self, name: str) -> bytes | None:
        return await self._tickets.take(name)

    def heartbeat_link(self, timeout: float = 0.4) -> LocalLink:
        """A way to the store for the heartbeat thread."""
        return LocalLink(self._engine, timeout)

    async def subscribe(self, channel: str, handler: Callable[[bytes], None], on_gap: Callable[[], None]) -> None:
        self._bus.subscribe(channel, handler, on_gap)

    async def unsubscribe(self, channel: str) -> None:
        self._bus.unsubscribe(channel)

    async def publish(self, channel: str, payload: bytes) -> None:
        if not self._open:
            raise StoreUnavailable("the store is not open")
        self._engine.publish(channel, payload)

    def heard(self) -> float:
        return self._bus.heard()

    def channel(self, kind: str, ident: str = "") -> str:
        """Name of a channel; see `Store.channel`.

        Raises:
            ValueError: there is no such kind.
        """
        if kind not in {"c", "n", "sync"}:
            raise ValueError(f"no channels of kind {kind!r}")
        return channel_name(kind, ident)

    def watch_fallbacks(self, told: Callable[[Fallback], None]) -> bool:
        """Never: what a process has written to its own memory or disk is there as long as it runs."""
        return False

    async def progress(self) -> Mapping[str, Progress]:
        """Nothing is replicated."""
        return {}

    def place_of(self, cid: str) -> str:
        """All are here."""
        return ""

    async def info(self) -> StoreInfo:
        return StoreInfo(kind=self._engine.kind, version=self._engine.version)

    async def keys(self) -> set[str]:
        """Names of all keys that hold anything; not part of `Store`, for leak checks."""
        return await self.run(lambda t: t.keys()) | {f"k:{name}" for name in self._tickets.names()}
