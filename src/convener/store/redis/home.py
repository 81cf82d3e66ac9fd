"""The server of a cluster that has one hash slot at the time."""

from __future__ import annotations

from typing import Protocol

from convener.errors import StoreUnavailable
from convener.store.redis.address import Host
from convener.store.redis.endpoint import Attached, Endpoint, SyncConnection
from convener.store.redis.slots import name_of


class Whereabouts(Protocol):
    """What is known of a cluster. Everything may be called from any thread."""

    @property
    def server(self) -> Endpoint:
        """Credentials and options for all servers."""
        ...

    @property
    def version(self) -> int:
        """Counts changes of the map."""
        ...

    def host(self, slot: int) -> Host | None:
        """Where a slot is."""
        ...

    def others(self) -> list[Host]:
        """Known servers in no order."""
        ...

    def tell_doubt(self) -> None:
        """The map seems to be wrong."""
        ...


class Home:
    """A `Target`, mostly for the heartbeat's thread."""

    def __init__(self, cluster: Whereabouts, slot: int) -> None:
        self._cluster = cluster
        self._slot = slot
        self._told: tuple[int, Host] | None = None

    def _host(self) -> Host:
        # What a server said counts until the map changes.
        if self._told is not None and self._told[0] == self._cluster.version:
            return self._told[1]
        host = self._cluster.host(self._slot)
        if host is None:
            raise StoreUnavailable("no server has the hash slot")
        return host

    @property
    def place(self) -> str:
        """Host and port."""
        return name_of(self._host())

    def redirect(self, host: str, port: int) -> None:
        """See `Target.redirect`."""
        self._told = self._cluster.version, (host, port)
        self._cluster.tell_doubt()

    async def connect(self, attached: Attached, limit: float) -> None:
        """See `Target.connect`."""
        await self._cluster.server.at(*self._host()).connect(attached, limit)

    def connect_sync(self, timeout: float) -> tuple[SyncConnection, str]:
        """See `Target.connect_sync`. If the server is gone, any other will say where the slot is."""
        try:
            return self._cluster.server.at(*self._host()).connect_sync(timeout)
        except StoreUnavailable:
            for host in [host for host in self._cluster.others() if host != self._host()][:1]:
                self._cluster.tell_doubt()
                return self._cluster.server.at(*host).connect_sync(timeout)
            raise
