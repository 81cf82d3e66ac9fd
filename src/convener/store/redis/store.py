"""`RedisStore`: the parts behind one object, and what is found out about the server before it is used."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Final, Literal, Self, TypedDict

from convener.errors import ConfigurationError, StoreUnavailable
from convener.store.base import Fallback, Progress, StoreInfo
from convener.store.redis.address import parse
from convener.store.redis.cluster import Cluster
from convener.store.redis.connection import LinkStatistics, Patience
from convener.store.redis.conversations import RedisConversations
from convener.store.redis.endpoint import Credentials, Endpoint
from convener.store.redis.errors import AccessRefused
from convener.store.redis.heartbeat import HeartbeatLink
from convener.store.redis.history import History, NewHistory, progress_of
from convener.store.redis.keys import Keys
from convener.store.redis.lint import judge, version_of
from convener.store.redis.nodes import RedisMembership, RedisNodes
from convener.store.redis.probe import HIDDEN, look, look_again, need_replicas, probe, refused, shown
from convener.store.redis.retention import RedisRetention
from convener.store.redis.sentinel import Primary, UnderSentinels
from convener.store.redis.subscriber import Subscriber, SubscriberStatistics
from convener.store.redis.tickets import RedisTickets
from convener.store.redis.timers import RedisTimers
from convener.store.redis.topology import Single, Topology, call_hook
from convener.store.redis.users import RedisIndex, RedisSlots

_log = logging.getLogger(__name__)


CONFIRM_S: Final = 1.0
"""Seconds that replicas get to confirm a write."""

DurabilityMode = Literal["memory", "replicated", "managed"]


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
        durability: when a write counts: ``memory``, when the primary has it; ``replicated``, when a replica has
            confirmed it (else `NotConfirmed`); ``managed``, when it is answered: the service replicates before that.
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
        durability: DurabilityMode = "memory",
        on_reconnect: Callable[[], None] | None = None,
        on_new_history: Callable[[NewHistory], None] | None = None,
        probe_interval: float = 1.0,
        count_interval: float = 30.0,
        silence: float = 5.0,
    ) -> None:
        self.keys = Keys(namespace)
        self._confirm = min(CONFIRM_S, deadline / 4) if durability == "replicated" else 0.0
        self.topology = make_topology(
            url,
            credentials,
            tls,
            Patience(deadline, self._confirm),
            max_in_flight=max_in_flight,
            on_reconnect=on_reconnect,
            on_new_history=self._fell_back,
        )
        self._on_new_history = on_new_history
        self._watchers: list[Callable[[Fallback], None]] = []
        self._seen: dict[str, History] = {}
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
            raise refused(error, self.keys) from error
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

    # -- Durability ------------------------------------------------------------------------------------------

    def watch_fallbacks(self, told: Callable[[Fallback], None]) -> bool:
        """See `Durability.watch_fallbacks`."""
        self._watchers.append(told)
        return True

    def _fell_back(self, change: NewHistory) -> None:
        call_hook("on_new_history", self._on_new_history, change)
        fallback = change.fallback(self._seen.pop(change.old.place, None))
        for told in self._watchers:
            call_hook("what was to be done after the store has fallen back", told, fallback)

    async def progress(self) -> Mapping[str, Progress]:
        """See `Durability.progress`. Where INFO is hidden, nothing is known."""
        places = self.topology.places()
        replies = await asyncio.gather(*self.topology.each("INFO", "replication"), return_exceptions=True)
        found: dict[str, Progress] = {}
        for place, reply in zip(places, replies, strict=True):
            if isinstance(reply, HIDDEN) or not isinstance(reply, StoreUnavailable):
                found[place] = progress_of(shown(reply))
                self._note(place, found[place])
        return found

    def _note(self, place: str, now: Progress) -> None:
        """Remember the furthest that any line was seen: what a replica that takes over lacks is measured by that."""
        if now.line is not None and now.offset is not None:
            host = self.topology.histories().get(place)
            if host is not None and host.line == now.line:
                self._seen[host.place] = replace(host, offset=now.offset)

    def place_of(self, cid: str) -> str:
        """See `Durability.place_of`."""
        return self.topology.place(self.topology.slot(self.keys.meta(cid))) or ""

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
        facts = await look_again(self.topology)
        versions = {v for of in facts if (v := of.info.get("valkey_version") or of.info.get("redis_version"))}
        policies = [of.policy for of in facts if of.policy is not None]
        return StoreInfo(
            kind="valkey" if any("valkey_version" in of.info for of in facts) else "redis",
            version=min(versions, key=version_of, default=None),
            memory_ratio=max((ratio for of in facts if (ratio := of.ratio()) is not None), default=None),
            counts_subscribers=self.capabilities.counts_subscribers,
            eviction=next((policy for policy in policies if policy.startswith("allkeys")), next(iter(policies), None)),
        )

    async def _probe(self) -> Capabilities:
        """Find out what the servers are and allow; log what is not as it should be.

        Raises:
            ConfigurationError: too old, deletes conversations, or forbids what nodes cannot do without.
        """
        facts = await look(self.topology)
        for finding in judge(facts, 1.0):
            if finding.verdict == "refused" and finding.check in ("version", "eviction"):
                raise ConfigurationError(f"redis_url: {finding.check}: {finding.says}; {finding.advice}")
            # How full it is, is looked at all the time by who has a mark for it.
            if finding.verdict in ("refused", "reduced") and finding.check != "memory":
                _log.warning("the store, %s: %s; %s", finding.check, finding.says, finding.advice)
        rights = await probe(self.topology, self.keys)
        if self._confirm:
            await need_replicas(self.topology, rights, self._confirm)
        if not rights.counts_subscribers:
            _log.warning("the store's scripts cannot count subscribers: fast burial is not possible")
        versions = [version_of(of.info["redis_version"]) for of in facts if "redis_version" in of.info]
        policies = [of.policy for of in facts if of.policy is not None]
        return Capabilities(
            min(versions, default=None), rights.counts_subscribers, next(iter(policies), None), rights.waits
        )


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
