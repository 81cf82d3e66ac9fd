"""`RedisStore`: the parts behind one object, and what is found out about the server before it is used."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final, Self

from convener.errors import ConfigurationError, StoreFull
from convener.store.base import StoreInfo
from convener.store.redis.connection import Link, LinkStatistics, Topology
from convener.store.redis.conversations import RedisConversations
from convener.store.redis.endpoint import Credentials, Endpoint
from convener.store.redis.errors import AccessRefused, StoreCommandError
from convener.store.redis.heartbeat import HeartbeatLink
from convener.store.redis.keys import Keys
from convener.store.redis.nodes import RedisMembership, RedisNodes
from convener.store.redis.scripts import SCRIPTS
from convener.store.redis.subscriber import Subscriber, SubscriberStatistics
from convener.store.redis.timers import RedisTimers
from convener.store.redis.users import RedisIndex, RedisSlots

_log = logging.getLogger(__name__)

OLDEST: Final = (7, 0)
"""Sharded pub/sub, script flags and XADD's explicit ids of Redis 7 are what the protocol stands on."""


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What probing the server found; None is unknown, since an ACL or a managed store may hide it.

    Attributes:
        version: of Redis' interface, as (major, minor).
        counts_subscribers: whether a script may count subscribers, without which there is no fast burial.
        eviction: the eviction policy.
    """

    version: tuple[int, int] | None = None
    counts_subscribers: bool = False
    eviction: str | None = None


class RedisStore(RedisConversations, RedisTimers, RedisSlots, RedisMembership, RedisNodes, RedisIndex):
    """A `Store` in Redis (7.0 or later) or Valkey.

    Args:
        url: see `endpoint.Endpoint`.
        namespace: first part of every key; several clusters may share one server.
        credentials: asked for user name and password at each new connection.
        tls: ``ssl_*`` options of redis-py for ``rediss://`` and ``valkeys://``.
        deadline: seconds that a command may take.
        max_in_flight: commands under way at once; more are refused with `StoreUnavailable`.
        on_reconnect: called on the event loop after the connection of the commands was made anew.
        probe_interval: seconds between two canaries of the subscriber.
        count_interval: seconds between two comparisons of the number of subscriptions with the server's.
        silence: seconds without any sign after which the subscriber's connection is given up.

    Raises:
        ConfigurationError: URL or namespace cannot be used.
    """

    def __init__(
        self,
        url: str,
        *,
        namespace: str = "convener",
        credentials: Credentials | None = None,
        tls: dict[str, str] | None = None,
        deadline: float = 5.0,
        max_in_flight: int = 10_000,
        on_reconnect: Callable[[], None] | None = None,
        probe_interval: float = 1.0,
        count_interval: float = 30.0,
        silence: float = 5.0,
    ) -> None:
        self.keys = Keys(namespace)
        self._endpoint = Endpoint(url, credentials=credentials, tls=tls)
        self._link = Link(self._endpoint, deadline=deadline, max_in_flight=max_in_flight, on_reconnect=on_reconnect)
        self.topology = Topology(self._link)
        self._subscriber = Subscriber(
            self._endpoint,
            self.topology,
            self.keys,
            deadline=deadline,
            probe_interval=probe_interval,
            count_interval=count_interval,
            silence=silence,
        )
        self.capabilities = Capabilities()

    async def __aenter__(self) -> Self:
        await self.open()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def open(self) -> None:
        """Connect and probe; see `Store.open`."""
        try:
            await self._link.open()
            self.capabilities = await self._probe()
            await self._subscriber.open()
        except AccessRefused as error:
            await self.close()
            raise ConfigurationError(f"redis_url: {error}") from error
        except BaseException:
            await self.close()
            raise

    async def close(self) -> None:
        """Give everything back; see `Store.close`."""
        await self._subscriber.close()
        await self._link.close()

    def channel(self, kind: str, ident: str = "") -> str:
        """Name of a channel; see `Store.channel`.

        Raises:
            ValueError: there is no such kind.
        """
        match kind:
            case "c":
                return self.keys.channel(ident)
            case "n":
                return self.keys.node_channel(ident)
            case "sync":
                return self.keys.sync
            case _:
                raise ValueError(f"no channels of kind {kind!r}")

    def heartbeat_link(self, timeout: float = 0.4) -> HeartbeatLink:
        """A way to the store for the heartbeat thread."""
        return HeartbeatLink(self._endpoint, self.keys, timeout)

    def statistics(self) -> tuple[LinkStatistics, SubscriberStatistics]:
        """Snapshots of both connections' counters."""
        return self._link.statistics(), self._subscriber.statistics()

    # -- Bus -------------------------------------------------------------------------------------------------

    async def subscribe(self, channel: str, handler: Callable[[bytes], None], on_gap: Callable[[], None]) -> None:
        """Subscribe; see `Bus.subscribe`."""
        await self._subscriber.subscribe(channel, handler, on_gap)

    async def unsubscribe(self, channel: str) -> None:
        """Unsubscribe."""
        self._subscriber.unsubscribe(channel)

    async def publish(self, channel: str, payload: bytes) -> None:
        """Publish."""
        await self.topology.execute(channel, "SPUBLISH", channel, payload)

    def heard(self) -> float:
        """See `Bus.heard`."""
        return self._subscriber.heard()

    # -- the server ------------------------------------------------------------------------------------------

    async def info(self) -> StoreInfo:
        """What the server says of itself."""
        shown = await self._info()
        used, most = shown.get("used_memory", ""), shown.get("maxmemory", "")
        ratio = int(used) / int(most) if used.isdigit() and most.isdigit() and int(most) else None
        return StoreInfo(
            kind="valkey" if "valkey_version" in shown else "redis",
            version=shown.get("valkey_version") or shown.get("redis_version"),
            memory_ratio=ratio,
            eviction=shown.get("maxmemory_policy") or await self._policy(),
        )

    async def _info(self) -> Mapping[str, str]:
        try:
            text: bytes = await self.topology.execute("", "INFO")
        except (AccessRefused, StoreCommandError):
            return {}
        lines = (line.partition(":") for line in text.decode(errors="replace").splitlines())
        return {name: value for name, colon, value in lines if colon}

    async def _policy(self) -> str | None:
        try:
            reply = await self.topology.execute("", "CONFIG", "GET", "maxmemory-policy")
        except (AccessRefused, StoreCommandError):
            return None
        return reply[1].decode() if len(reply) == 2 else None

    async def _probe(self) -> Capabilities:
        shown = await self._info()
        if shown.get("cluster_enabled") == "1":
            raise ConfigurationError("redis_url: a Redis Cluster is not supported by this version")
        found = re.match(r"(\d+)\.(\d+)", shown.get("redis_version", ""))
        version = (int(found[1]), int(found[2])) if found else None
        if version is not None and version < OLDEST:
            raise ConfigurationError(f"redis_url: needs Redis 7.0 or later, this is {version[0]}.{version[1]}")
        eviction = shown.get("maxmemory_policy") or await self._policy()
        if eviction is not None and eviction.startswith("allkeys"):
            raise ConfigurationError(
                f"redis_url: maxmemory-policy is {eviction}: it deletes conversations; use noeviction"
            )
        counts = await self._try_scripts()
        if not counts:
            _log.warning("the store's scripts cannot count subscribers: fast burial is not possible")
        return Capabilities(version, counts, eviction)

    async def _try_scripts(self) -> bool:
        """Run a script like ours, and publish to each kind of channel; whether scripts count subscribers."""
        try:
            counts = await self.topology.call(SCRIPTS["probe"], (self.keys.version,), self.keys.live("probe"))
            for channel in (self.keys.channel("probe"), self.keys.node_channel("probe")):
                await self.topology.execute(channel, "SPUBLISH", channel, "")
        except StoreFull:
            raise
        except StoreCommandError as error:
            raise ConfigurationError(f"redis_url: the server cannot run convener's scripts: {error}") from error
        return counts == 1
