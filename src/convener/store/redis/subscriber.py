"""Sharded pub/sub: subscriptions, each at the server that has its channel, and what becomes of them.

A channel lives where its hash slot lives. When that changes, it is subscribed at the new server, and what the old
one still sends is not handed over; when the new server has confirmed, `on_gap` is called. So it is after every
reconnect.
"""

from __future__ import annotations

import asyncio
import logging
import random
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from convener.errors import StoreUnavailable
from convener.store.clock import boottime_ns
from convener.store.redis.errors import CLUSTER_CODES, from_reply, redirect
from convener.store.redis.keys import Keys
from convener.store.redis.pubsub import Subscription
from convener.store.redis.station import Counters, Station, Timing
from convener.store.redis.topology import Topology, together

_log = logging.getLogger(__name__)

_AGAIN: Final = 0.2
"""Seconds until a subscription is tried again that a server refused for the time being."""


@dataclass(frozen=True, slots=True)
class SubscriberStatistics:
    """Counters of a `Subscriber` since it was opened.

    Attributes:
        connected: whether there is a connection now, to every server.
        connects: connections that were made.
        channels: channels that are subscribed to, or will be as soon as possible.
        received: publications handed to handlers.
        malformed: frames that were skipped.
        handler_errors: exceptions that handlers raised.
        probe_misses: canaries that did not come back.
        dropped: channels that a server dropped by itself.
        probe_age: seconds since anything was heard, where it is longest ago.
    """

    connected: bool
    connects: int
    channels: int
    received: int
    malformed: int
    handler_errors: int
    probe_misses: int
    dropped: int
    probe_age: float


class Subscriber:
    """Subscriptions over a connection to each server, that come back by themselves.

    Args:
        topology: says which server has a channel; takes probes, and questions for the count.
        deadline: seconds that a connection or a confirmation may take.
        probe_interval: seconds between two canaries.
        count_interval: seconds between two comparisons of the number of subscriptions.
        silence: seconds without a sign of life after which a connection is given up.
    """

    def __init__(
        self,
        topology: Topology,
        keys: Keys,
        *,
        deadline: float = 5.0,
        probe_interval: float = 1.0,
        count_interval: float = 30.0,
        silence: float = 5.0,
    ) -> None:
        self._topology = topology
        self._keys = keys
        self._timing = Timing(deadline, probe_interval, count_interval, silence)
        self._counters = Counters()
        self._subscriptions: dict[bytes, Subscription] = {}
        self._stations: dict[str, Station] = {}
        self._closing: set[asyncio.Task[None]] = set()
        self._timers: set[asyncio.TimerHandle] = set()
        self._open = False
        topology.watch(self._follow)

    async def open(self) -> None:
        """Connect to every server.

        Raises:
            StoreUnavailable: no connection, or no confirmation in time.
            ConfigurationError: a server refuses the credentials or the channel.
        """
        for place in self._topology.targets():
            self._stations[place] = self._station(place)
        try:
            await together([station.open() for station in self._stations.values()])
        except BaseException:
            await self.close()
            raise
        self._open = True
        self._follow()

    async def close(self) -> None:
        """Drop the connections. Who waits for a confirmation gets `StoreUnavailable`."""
        self._open = False
        for timer in self._timers:
            timer.cancel()
        self._timers.clear()
        stations, self._stations = list(self._stations.values()), {}
        for station in stations:
            await station.close()
        await asyncio.gather(*self._closing)
        for subscription in self._subscriptions.values():
            subscription.fail(StoreUnavailable("the store is closed"))
        self._subscriptions.clear()

    def _station(self, place: str) -> Station:
        ident = secrets.token_hex(8)
        return Station(
            place,
            self._topology.targets()[place],
            self._topology,
            self,
            lambda number: self._keys.probe(f"{ident}{number or ''}"),
            self._timing,
            self._counters,
        )

    async def subscribe(self, channel: str, handler: Callable[[bytes], None], on_gap: Callable[[], None]) -> None:
        """Subscribe, and wait until the confirmation has been read. Again: the handlers are replaced.

        Raises:
            StoreUnavailable: not confirmed in time; there is no subscription then.
        """
        if not self._open:
            raise StoreUnavailable("the store is not open")
        name = channel.encode()
        subscription = self._subscriptions.get(name)
        if subscription is not None:
            subscription.handler, subscription.on_gap = handler, on_gap
            if subscription.confirmed:
                return
        else:
            subscription = Subscription(name, handler, on_gap, self._topology.slot(channel))
            self._subscriptions[name] = subscription
            self._settle(subscription)
        try:
            await subscription.confirmation(self._timing.deadline)
        except BaseException:
            # Unless somebody else took the channel over meanwhile.
            if self._subscriptions.get(name) is subscription and subscription.handler is handler:
                self._leave(subscription)
            raise

    def unsubscribe(self, channel: str) -> None:
        """Unsubscribe; nothing of the channel is handed over any more."""
        subscription = self._subscriptions.get(channel.encode())
        if subscription is not None:
            self._leave(subscription)
            subscription.fail(StoreUnavailable("unsubscribed meanwhile"))

    def heard(self) -> float:
        """Seconds on the boot-time clock when a publication or a probe arrived last, where that is longest ago.

        A server that commands do not reach either does not count: nobody can hear anything there, and nothing
        happens there.
        """
        heard = [s.heard_at for s in self._stations.values() if self._topology.reachable(s.place)]
        return min(heard, default=boottime_ns()) / 1e9

    def statistics(self) -> SubscriberStatistics:
        """A snapshot of the counters."""
        c, stations = self._counters, list(self._stations.values())
        oldest = min((station.heard_at for station in stations), default=boottime_ns())
        return SubscriberStatistics(
            connected=all(station.connected for station in stations),
            connects=c.connects,
            channels=len(self._subscriptions) + len(stations),
            received=c.received,
            malformed=c.malformed,
            handler_errors=c.handler_errors,
            probe_misses=c.probe_misses,
            dropped=c.dropped,
            probe_age=(boottime_ns() - oldest) / 1e9,
        )

    # -- where subscriptions are -----------------------------------------------------------------------------

    def _settle(self, subscription: Subscription) -> None:
        """Subscribe where the channel lives, or look again later."""
        place = self._topology.place(subscription.slot)
        station = None if place is None else self._stations.get(place)
        if station is None:
            self._topology.doubt()
            self._later(subscription)
        else:
            station.join(subscription)

    def _later(self, subscription: Subscription) -> None:
        subscription.place = None
        self._after_a_while(
            lambda: (
                self._settle(subscription)
                if subscription.place is None and self._subscriptions.get(subscription.channel) is subscription
                else None
            )
        )

    def _after_a_while(self, do: Callable[[], None]) -> None:
        def now() -> None:
            self._timers.discard(timer)
            do()

        timer = asyncio.get_running_loop().call_later(_AGAIN * random.uniform(0.5, 1), now)
        self._timers.add(timer)

    def _leave(self, subscription: Subscription) -> None:
        del self._subscriptions[subscription.channel]
        station = self._stations.get(subscription.place or "")
        if station is not None:
            station.leave(subscription)

    def _follow(self) -> None:
        """Move what lives elsewhere now."""
        if not self._open:
            return
        places = self._topology.targets()
        for place in places:
            if place not in self._stations:
                station = self._stations[place] = self._station(place)
                station.begin()
        for station in self._stations.values():
            station.move_probe()
            station.look()
        for subscription in self._subscriptions.values():
            place = self._topology.place(subscription.slot)
            if place is not None and place != subscription.place:
                former = self._stations.get(subscription.place or "")
                if former is not None:
                    # Not unsubscribed: that server drops it by itself, and would refuse to.
                    former.forget(subscription)
                self._settle(subscription)
        for place, station in list(self._stations.items()):
            if place not in places and station.lonely:
                del self._stations[place]
                task = asyncio.get_running_loop().create_task(station.close(), name="convener-subscriber-close")
                self._closing.add(task)
                task.add_done_callback(self._closing.discard)

    # -- StationOwner ----------------------------------------------------------------------------------------

    def message(self, station: Station, channel: bytes, payload: bytes) -> None:
        """See `StationOwner`."""
        subscription = self._subscriptions.get(channel)
        if subscription is not None and subscription.place == station.place:
            self._counters.received += 1
            self._run(subscription.handler, payload)

    def joined(self, station: Station, subscription: Subscription) -> None:
        """See `StationOwner`."""
        again, subscription.heard_of = subscription.heard_of, True
        subscription.confirm()
        if again:
            self._run(subscription.on_gap)

    def dropped(self, station: Station, channel: bytes) -> None:
        """The hash slot moves, or the server is a replica now: ask again, then say so."""
        subscription = self._subscriptions.get(channel)
        if channel == station.probe.channel:
            subscription = station.probe
        if subscription is None or subscription.place != station.place:
            return
        self._topology.doubt()
        station.forget(subscription)
        if subscription is station.probe:
            station.join(subscription)
        else:
            subscription.confirmed = False
            self._settle(subscription)

    def refused(self, station: Station, subscription: Subscription, text: str) -> None:
        """See `StationOwner`."""
        station.forget(subscription)
        if subscription is station.probe:
            subscription.fail(from_reply(text, "subscribe"))
            self._topology.doubt()
            self._after_a_while(station.renew_probe)
            return
        if self._subscriptions.get(subscription.channel) is not subscription:
            return
        if text.partition(" ")[0] in CLUSTER_CODES:
            elsewhere = redirect(text, station.place.rpartition(":")[0])
            if elsewhere is not None and self._topology.place(subscription.slot) == station.place:
                self._topology.redirected(elsewhere)
            if subscription.place == station.place:
                # Not moved by that: the server is not what it was, and the topology does not know it yet.
                self._topology.doubt()
                self._later(subscription)
            return
        if not subscription.heard_of:
            del self._subscriptions[subscription.channel]
        subscription.fail(from_reply(text, "subscribe"))

    def _run(self, function: Callable[..., None], *arguments: object) -> None:
        try:
            function(*arguments)
        except Exception:
            self._counters.handler_errors += 1
            _log.exception("a handler of publications failed")
