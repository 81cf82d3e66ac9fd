"""Publications inside one process, with the manners of a real bus.

A `LocalBus` is one connection: everything it hears is put into one bounded queue and handed over by its own
event loop, later, in order. So a handler is never called from inside the call that published, and who reads
too slowly loses publications and is told so, as with a server that cuts a slow subscriber off.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from convener.errors import StoreUnavailable
from convener.store.clock import boottime_ns

QUEUE_LIMIT: Final = 10_000
"""Publications that one connection may owe to its handlers."""

_BURST: Final = 256
"""Publications handed over before the event loop may do something else."""

_log = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class _Subscription:
    handler: Callable[[bytes], None]
    on_gap: Callable[[], None]
    active: bool = True


class Exchange:
    """Who listens to what: shared by all connections of one engine, usable from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._channels: dict[str, dict[LocalBus, _Subscription]] = {}

    def publish(self, channel: str, payload: bytes) -> None:
        """Hand `payload` to every connection that is subscribed now."""
        with self._lock:
            for bus, subscription in self._channels.get(channel, {}).items():
                bus.push(subscription, payload)

    def add(self, channel: str, bus: LocalBus, subscription: _Subscription) -> None:
        """Subscribe."""
        with self._lock:
            self._channels.setdefault(channel, {})[bus] = subscription

    def remove(self, channel: str, bus: LocalBus) -> None:
        """Unsubscribe."""
        with self._lock:
            held = self._channels.get(channel)
            if held is not None and held.pop(bus, None) is not None and not held:
                del self._channels[channel]

    def channels(self) -> set[str]:
        """Channels that somebody is subscribed to."""
        with self._lock:
            return set(self._channels)


class LocalBus:
    """One connection. Handlers run on the event loop that subscribed first."""

    def __init__(self, exchange: Exchange, limit: int = QUEUE_LIMIT) -> None:
        self._exchange = exchange
        self._limit = limit
        self._lock = threading.Lock()
        self._queue: deque[tuple[_Subscription, bytes]] = deque()
        self._subscriptions: dict[str, _Subscription] = {}
        self._loop: asyncio.AbstractEventLoop | None = None
        self._scheduled = False
        self._gap = False
        self._closed = False

    def subscribe(self, channel: str, handler: Callable[[bytes], None], on_gap: Callable[[], None]) -> None:
        """Subscribe; called on the event loop that is to run the handlers."""
        if self._closed:
            raise StoreUnavailable("the store is closed")
        self._loop = self._loop or asyncio.get_running_loop()
        self.unsubscribe(channel)
        subscription = _Subscription(handler, on_gap)
        self._subscriptions[channel] = subscription
        self._exchange.add(channel, self, subscription)

    def unsubscribe(self, channel: str) -> None:
        """Unsubscribe; what is queued for the channel is not delivered any more."""
        subscription = self._subscriptions.pop(channel, None)
        if subscription is not None:
            subscription.active = False
            self._exchange.remove(channel, self)

    def close(self) -> None:
        """Unsubscribe from everything."""
        self._closed = True
        for channel in list(self._subscriptions):
            self.unsubscribe(channel)
        with self._lock:
            self._queue.clear()

    def heard(self) -> float:
        """Now, on the boot-time clock: there is no connection that could be deaf."""
        return boottime_ns() / 1e9

    def push(self, subscription: _Subscription, payload: bytes) -> None:
        """Queue one publication, from any thread. A full queue is lost as a whole, which is made known."""
        with self._lock:
            if len(self._queue) >= self._limit:
                self._queue.clear()
                self._gap = True
            self._queue.append((subscription, payload))
            if self._scheduled or self._loop is None:
                return
            self._scheduled = True
        self._schedule(self._loop)

    def _schedule(self, loop: asyncio.AbstractEventLoop) -> None:
        try:
            same = asyncio.get_running_loop() is loop
        except RuntimeError:
            same = False
        try:
            if same:
                loop.call_soon(self._deliver)
            else:
                loop.call_soon_threadsafe(self._deliver)
        except RuntimeError:  # The loop was closed before its connection: nobody is left to hear.
            self._closed = True

    def _deliver(self) -> None:
        with self._lock:
            gap, self._gap = self._gap, False
            burst = [self._queue.popleft() for _ in range(min(_BURST, len(self._queue)))]
            self._scheduled = bool(self._queue)
            if self._scheduled and self._loop is not None:
                self._loop.call_soon(self._deliver)
        if gap:
            for subscription in list(self._subscriptions.values()):
                _call(subscription.on_gap)
        for subscription, payload in burst:
            if subscription.active:
                _call(subscription.handler, payload)


def _call(function: Callable[..., None], *args: bytes) -> None:
    """A handler must not raise; one that does must not make the connection deaf."""
    try:
        function(*args)
    except Exception:
        _log.exception("a subscriber's handler raised")
