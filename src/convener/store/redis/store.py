"""`RedisStore`: the parts behind one object, and what is found out about the server before it is used."""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Self, TypedDict

from convener.errors import ConfigurationError, StoreFull
from convener.store.base import StoreInfo
from convener.store.redis.address import parse
from convener.store.redis.cluster import Cluster
from convener.store.redis.connection import LinkStatistics, Patience
from convener.store.redis.conversations import RedisConversations
from convener.store.redis.endpoint import Credentials, Endpoint
from convener.store.redis.errors import AccessRefused, StoreCommandError
from convener.store.redis.heartbeat import HeartbeatLink
from convener.store.redis.history import History, NewHistory, lines
from convener.store.redis.keys import Keys
from convener.store.redis.nodes import RedisMembership, RedisNodes
from convener.store.redis.retention import RedisRetention
from convener.store.redis.scripts import SCRIPTS
from convener.store.redis.sentinel import Primary, UnderSentinels
from convener.store.redis.subscriber import Subscriber, SubscriberStatistics
from convener.store.redis.tickets import RedisTickets
from convener.store.redis.timers import RedisTimers
from convener.store.redis.topology import Single, Topology, find_name
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
        waits: whether WAIT may be used, without which it is unknown what replicas have.
    """

    version: tuple[int, int] | None = None
    counts_subscribers: bool = False
    eviction: str | None = None
    waits: bool = False


class RedisStore(
    RedisConversations,
    RedisRetention,
    RedisTimers,
    RedisSlots,
    RedisMembership,
    RedisNodes,
    RedisIndex,
    RedisTickets,
):
    """A `Store` in Redis (7.0 or later) or Valkey.

    Args:
        url: one server, Sentinels, or a cluster; see `address`.
        namespace: first part of every key; several clusters may share one server.
        credentials: asked for user name and password at each new connection to a server.
        tls: ``ssl_*`` options of redis-py for TLS.
        deadline: seconds that a command may take.
        max_in_flight: commands under way at once; more are refused with `StoreUnavailable`.
        on_reconnect: called on the event loop after a connection of the commands was made anew.
        on_new_history: called on the event loop when a server comes back with other data than it had (a restart, a
            fail-over), so that what was acknowledged last may be missing; before anything is sent to it.
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
        on_new_history: Callable[[NewHistory], None] | None = None,
        probe_interval: float = 1.0,
        count_interval: float = 30.0,
        silence: float = 5.0,
    ) -> None:
        self.keys = Keys(namespace)
        self.topology = make_topology(
            url,
            credentials,
            tls,
            Patience(deadline),
            max_in_flight=max_in_flight,
            on_reconnect=on_reconnect,
            on_new_history=on_new_history,
        )
        self._subscriber = Subscriber(
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
            await self.topology.open()
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
        await self.topology.close()

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
        return HeartbeatLink(self.topology.target(self.keys.lease), self.keys, timeout)

    def statistics(self) -> tuple[LinkStatistics, SubscriberStatistics]:
        """Snapshots of both kinds of connections' counters."""
        return self.topology.statistics(), self._subscriber.statistics()

    @property
    def history(self) -> Mapping[str, History]:
        """What each server says of its data: which run, which line of replication, how far."""
        return self.topology.histories()

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
        """What the servers say of themselves; of several, what is worst."""
        shown = await self._infos()
        ratios: list[float] = []
        for of in shown:
            used, most = of.get("used_memory", ""), of.get("maxmemory", "")
            if used.isdigit() and most.isdigit() and int(most):
                # Buffers of replicas and of the append-only file do not count towards the limit.
                spared = of.get("mem_not_counted_for_evict", "")
                ratios.append((int(used) - int(spared if spared.isdigit() else 0)) / int(most))
        versions = {version for of in shown if (version := of.get("valkey_version") or of.get("redis_version"))}
        policies = await self._policies(shown)
        return StoreInfo(
            kind="valkey" if any("valkey_version" in of for of in shown) else "redis",
            version=min(versions, key=_numbers, default=None),
            memory_ratio=max(ratios, default=None),
            eviction=next((policy for policy in policies if policy.startswith("allkeys")), next(iter(policies), None)),
        )

    async def _infos(self) -> Sequence[Mapping[str, str]]:
        replies = await asyncio.gather(*self.topology.each("INFO"), return_exceptions=True)
        return [lines(_shown(reply)) for reply in replies]

    async def _policies(self, shown: Sequence[Mapping[str, str]]) -> Sequence[str]:
        """The eviction policies that can be seen."""
        if all("maxmemory_policy" in of for of in shown):
            return [of["maxmemory_policy"] for of in shown]
        asked = self.topology.each("CONFIG", "GET", "maxmemory-policy")
        replies = [_shown(reply) for reply in await asyncio.gather(*asked, return_exceptions=True)]
        return [reply[1].decode() for reply in replies if reply is not None and len(reply) == 2]

    async def _probe(self) -> Capabilities:
        shown = await self._infos()
        versions = [_numbers(of["redis_version"]) for of in shown if "redis_version" in of]
        version = min(versions, default=None)
        if version is not None and version < OLDEST:
            raise ConfigurationError(f"redis_url: needs Redis 7.0 or later, this is {version[0]}.{version[1]}")
        policies = await self._policies(shown)
        for policy in policies:
            if policy.startswith("allkeys"):
                raise ConfigurationError(
                    f"redis_url: maxmemory-policy is {policy}: it deletes conversations; use noeviction"
                )
        counts = await self._try_scripts()
        if not counts:
            _log.warning("the store's scripts cannot count subscribers: fast burial is not possible")
        waits = await asyncio.gather(self.topology.execute(self.keys.version, "WAIT", 0, 1), return_exceptions=True)
        return Capabilities(version, counts, next(iter(policies), None), isinstance(_shown(waits[0]), int))

    async def _try_scripts(self) -> bool:
        """Run a script like ours, and publish to each kind of channel; then on every server. Whether scripts count
        subscribers where the membership is.
        """
        k = self.keys
        try:
            counts = await self.topology.call(SCRIPTS["probe"], (k.version,), k.live("probe"))
            for channel in (k.channel("probe"), k.node_channel("probe")):
                await self.topology.execute(channel, "SPUBLISH", channel, "")
            for place in self.topology.targets():
                there = find_name(self.topology, place, lambda number: f"probe{number}", k.node_channel)
                await self.topology.call(SCRIPTS["probe"], (k.records(there),), k.node_channel(there))
        except StoreFull:
            raise
        except StoreCommandError as error:
            raise ConfigurationError(f"redis_url: the server cannot run convener's scripts: {error}") from error
        return counts == 1


def make_topology(
    url: str,
    credentials: Credentials | None,
    tls: dict[str, str] | None,
    patience: Patience,
    *,
    max_in_flight: int,
    on_reconnect: Callable[[], None] | None,
    on_new_history: Callable[[NewHistory], None] | None,
) -> Topology:
    """What the URL names.

    Raises:
        ConfigurationError: it cannot be used.
    """
    address = parse(url)
    server = Endpoint(address.server_url, credentials=credentials, tls=tls)
    options: _Options = {
        "max_in_flight": max_in_flight,
        "on_reconnect": on_reconnect,
        "on_new_history": on_new_history,
    }
    match address.kind:
        case "single":
            return Single(server, patience, **options)
        case "sentinel":
            sentinel = Endpoint(address.sentinel_url, tls=tls)
            primary = Primary([sentinel.at(*host) for host in address.hosts], server, address.service)
            return UnderSentinels(primary, patience, **options)
        case "cluster":
            return Cluster(address.hosts, server, patience, **options)


class _Options(TypedDict):
    max_in_flight: int
    on_reconnect: Callable[[], None] | None
    on_new_history: Callable[[NewHistory], None] | None


def _shown(reply: Any) -> Any:
    """A reply; None where an access list forbids the command, or the server does not know it.

    Raises: every other error.
    """
    if isinstance(reply, AccessRefused | StoreCommandError):
        return None
    if isinstance(reply, BaseException):
        raise reply
    return reply


def _numbers(version: str) -> tuple[int, int]:
    found = re.match(r"(\d+)\.(\d+)", version)
    return (int(found[1]), int(found[2])) if found else OLDEST
