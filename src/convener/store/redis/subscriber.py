"""Sharded pub/sub over a connection of its own, and the checks that keep it from being deaf unnoticed.

A subscription can die in three silent ways: the TCP connection is half open, the server has cut the
subscriber off, or the server has dropped a channel. Against them, none of them per conversation:

* PING, and a deadline: nothing at all heard for `silence` seconds ends the connection;
* a canary: a probe is published through the normal path once a second to a channel that this connection is
  subscribed to; two misses end the connection;
* the count: now and then the number of subscriptions is compared with the server's.

After every reconnect all channels are subscribed again; when the server has confirmed one, its `on_gap` is
called.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import secrets
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from typing import Any, Final, cast

import hiredis

from convener.errors import ConfigurationError, StoreUnavailable
from convener.store.clock import boottime_ns
from convener.store.redis.connection import Topology
from convener.store.redis.endpoint import Endpoint, pack
from convener.store.redis.errors import from_reply
from convener.store.redis.keys import Keys
from convener.store.redis.pubsub import Ear, Subscription

_log = logging.getLogger(__name__)

BATCH: Final = 500
"""Channels in one SSUBSCRIBE."""

_FIRST_PAUSE: Final = 0.05
_LONGEST_PAUSE: Final = 2.0


@dataclass(frozen=True, slots=True)
class SubscriberStatistics:
    """Counters of a `Subscriber` since it was opened.

    Attributes:
        connected: whether there is a connection now.
        connects: connections that were made.
        channels: channels that are subscribed to, or will be as soon as possible.
        received: publications handed to handlers.
        malformed: frames that were skipped.
        handler_errors: exceptions that handlers raised.
        probe_misses: canaries that did not come back.
        dropped: channels that the server dropped by itself.
        probe_age: seconds since anything was heard.
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


@dataclass(slots=True)
class _Counters:
    connects: int = 0
    received: int = 0
    malformed: int = 0
    handler_errors: int = 0
    probe_misses: int = 0
    dropped: int = 0


class Subscriber:
    """A connection to one server for subscriptions, that comes back by itself.

    Args:
        topology: where probes are published and the server's count is asked.
        deadline: seconds that a connection or a confirmation may take.
        probe_interval: seconds between two canaries.
        count_interval: seconds between two comparisons of the number of subscriptions.
        silence: seconds without a sign of life after which the connection is given up.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        topology: Topology,
        keys: Keys,
        *,
        deadline: float = 5.0,
        probe_interval: float = 1.0,
        count_interval: float = 30.0,
        silence: float = 5.0,
    ) -> None:
        self._endpoint = endpoint
        self._topology = topology
        self._deadline = deadline
        self._probe_interval = probe_interval
        self._count_interval = count_interval
        self._silence = silence
        self._subscriptions: dict[bytes, Subscription] = {}
        self._counters = _Counters()
        self._ear: Ear | None = None
        self._outbox: list[tuple[bool, Subscription]] = []
        self._tasks: list[asyncio.Task[None]] = []
        self._heard_at = boottime_ns()
        self._changes = 0
        self._open = False
        self._probe_channel = keys.probe(secrets.token_hex(8))
        self._probe = Subscription(self._probe_channel.encode(), self._probe_came, _nothing)
        self._probes_sent = self._probes_back = 0

    async def open(self) -> None:
        """Connect and subscribe to the canary's channel.

        Raises:
            StoreUnavailable: no connection, or no confirmation in time.
            ConfigurationError: the server refuses the credentials or the channel.
        """
        ear = await self._connect()
        self._open = True
        loop = asyncio.get_running_loop()
        self._subscriptions[self._probe.channel] = self._probe
        self._adopt(ear)
        self._tasks = [
            loop.create_task(self._keep(ear), name="convener-subscriber"),
            loop.create_task(self._guard("canary", self._canary), name="convener-subscriber-canary"),
            loop.create_task(self._guard("ping", self._ping), name="convener-subscriber-ping"),
            loop.create_task(self._guard("count", self._compare), name="convener-subscriber-count"),
        ]
        try:
            await self._confirmation(self._probe)
        except StoreUnavailable:
            await self.close()
            raise

    async def close(self) -> None:
        """Drop the connection. Who waits for a confirmation gets `StoreUnavailable`."""
        self._open = False
        for task in self._tasks:
            task.cancel()
        for task in self._tasks:
            with contextlib.suppress(asyncio.CancelledError):
                await task
        self._tasks.clear()
        if self._ear is not None:
            await self._ear.release()
            self._ear = None
        for subscription in self._subscriptions.values():
            subscription.fail(StoreUnavailable("the store is closed"))
        self._subscriptions.clear()

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
            subscription = self._subscriptions[name] = Subscription(name, handler, on_gap)
            self._queue(True, subscription)
        try:
            await self._confirmation(subscription)
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
        """Seconds on the boot-time clock when a publication or a probe arrived last."""
        return self._heard_at / 1e9

    def statistics(self) -> SubscriberStatistics:
        """A snapshot of the counters."""
        c = self._counters
        return SubscriberStatistics(
            connected=self._ear is not None,
            connects=c.connects,
            channels=len(self._subscriptions),
            received=c.received,
            malformed=c.malformed,
            handler_errors=c.handler_errors,
            probe_misses=c.probe_misses,
            dropped=c.dropped,
            probe_age=(boottime_ns() - self._heard_at) / 1e9,
        )

    # -- subscriptions ---------------------------------------------------------------------------------------

    async def _confirmation(self, subscription: Subscription) -> None:
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        subscription.waiters.append(waiter)
        try:
            async with asyncio.timeout(self._deadline):
                await waiter
        except TimeoutError as error:
            raise StoreUnavailable("the store did not confirm a subscription in time") from error
        finally:
            if waiter in subscription.waiters:
                subscription.waiters.remove(waiter)

    def _leave(self, subscription: Subscription) -> None:
        del self._subscriptions[subscription.channel]
        self._queue(False, subscription)

    def _queue(self, joins: bool, subscription: Subscription) -> None:
        """Send at the end of this turn of the event loop, with the others, in order."""
        self._changes += 1
        if self._ear is None:
            return
        if not self._outbox:
            asyncio.get_running_loop().call_soon(self._flush)
        self._outbox.append((joins, subscription))

    def _flush(self) -> None:
        outbox, self._outbox = self._outbox, []
        ear = self._ear
        if ear is None:
            return
        run: list[Subscription] = []
        for i, (joins, subscription) in enumerate(outbox):
            run.append(subscription)
            if len(run) == BATCH or i + 1 == len(outbox) or outbox[i + 1][0] != joins:
                ear.send(joins, run)
                run = []

    def _frame(self, ear: Ear, frame: Any) -> None:
        """One frame of the connection: a publication, a confirmation, an answer to PING, or an error."""
        parts = cast("list[Any]", frame) if isinstance(frame, list) else [frame]
        if len(parts) == 3 and parts[0] == b"smessage":
            self._message(parts[1], parts[2])
            return
        match parts:
            case [b"ssubscribe", bytes() as channel, int()]:
                self._joined(ear, channel)
            case [b"sunsubscribe", bytes() as channel, int()]:
                self._left(ear, channel)
            case [b"pong", _] | [b"PONG"]:
                pass
            case [hiredis.ReplyError() as error]:
                self._refused(ear, str(error))
            case _:
                self._counters.malformed += 1
                _log.warning("skipped a malformed frame from the store: %.200r", parts)

    def _message(self, channel: bytes, payload: bytes) -> None:
        self._heard_at = boottime_ns()
        subscription = self._subscriptions.get(channel)
        if subscription is None:
            return
        if subscription is not self._probe:
            self._counters.received += 1
        self._run(subscription.handler, payload)

    def _run(self, function: Callable[..., None], *arguments: object) -> None:
        try:
            function(*arguments)
        except Exception:
            self._counters.handler_errors += 1
            _log.exception("a handler of publications failed")

    def _joined(self, ear: Ear, channel: bytes) -> None:
        subscription = ear.settle(True, channel)
        if subscription is None or self._subscriptions.get(channel) is not subscription:
            return
        self._heard_at = boottime_ns()
        again, subscription.heard_of = subscription.heard_of, True
        subscription.confirm()
        if again:
            self._run(subscription.on_gap)

    def _left(self, ear: Ear, channel: bytes) -> None:
        if ear.settle(False, channel) is not None:
            return
        subscription = self._subscriptions.get(channel)
        if subscription is not None:
            # The server dropped it, because the hash slot moves or it is a replica now: ask again, then say
            # so.
            self._counters.dropped += 1
            subscription.confirmed = False
            self._queue(True, subscription)

    def _refused(self, ear: Ear, text: str) -> None:
        if not ear.commands:
            _log.error("the store refused on the subscriber's connection: %s", text)
            return
        command = ear.commands.popleft()
        for subscription in command.subscriptions:
            if command.joins and self._subscriptions.get(subscription.channel) is subscription:
                if not subscription.heard_of:
                    del self._subscriptions[subscription.channel]
                subscription.fail(from_reply(text, "subscribe"))

    # -- the connection --------------------------------------------------------------------------------------

    async def _connect(self) -> Ear:
        ear = Ear(self._frame)
        await self._endpoint.connect(ear, self._deadline)
        try:
            async with asyncio.timeout(self._deadline):
                identity = await ear.ask("CLIENT", "ID")
        except TimeoutError as error:
            await ear.release()
            raise StoreUnavailable(f"{self._endpoint} does not answer") from error
        except BaseException:
            await ear.release()
            raise
        # Hidden by the ACL or not: it is only needed for the count.
        ear.client_id = identity if isinstance(identity, int) else 0
        return ear

    def _adopt(self, ear: Ear) -> None:
        self._ear = ear
        self._counters.connects += 1
        self._outbox.clear()
        self._probes_back = self._probes_sent
        everything = list(self._subscriptions.values())
        for first in range(0, len(everything), BATCH):
            ear.send(True, everything[first : first + BATCH])

    async def _keep(self, ear: Ear) -> None:
        """Supervise the connection until the subscriber is closed."""
        while True:
            await asyncio.shield(ear.closed)
            self._ear = None
            self._changes += 1
            for subscription in self._subscriptions.values():
                subscription.confirmed = False
            await ear.release()
            _log.warning("%s (%s); publications may be lost", ear.why, self._endpoint)
            ear = await self._reconnect()
            self._adopt(ear)

    async def _reconnect(self) -> Ear:
        pause = 0.0
        while True:
            await asyncio.sleep(pause * random.uniform(0.5, 1))
            try:
                return await self._connect()
            except (StoreUnavailable, ConfigurationError) as error:
                _log.debug("the subscriber cannot reconnect: %s", error)
            except Exception:
                _log.exception("unexpected error while the subscriber reconnected")
            pause = min(max(2 * pause, _FIRST_PAUSE), _LONGEST_PAUSE)

    # -- checks ----------------------------------------------------------------------------------------------

    async def _guard(self, what: str, check: Callable[[], Awaitable[None]]) -> None:
        """Repeat a check; one that fails is reported and goes on."""
        while True:
            try:
                await check()
            except StoreUnavailable as error:
                _log.debug("%s check put off: %s", what, error)
                await asyncio.sleep(self._probe_interval)
            except Exception:
                _log.exception("the subscriber's %s check failed", what)
                await asyncio.sleep(self._probe_interval)

    def _probe_came(self, payload: bytes) -> None:
        if payload.isdigit():
            self._probes_back = max(self._probes_back, int(payload))

    async def _canary(self) -> None:
        """Publish a probe, give it one interval, and judge the connection."""
        ear, number, confirmed = self._ear, self._probes_sent + 1, self._probe.confirmed
        await self._topology.execute(self._probe_channel, "SPUBLISH", self._probe_channel, number)
        counts = confirmed and ear is not None and self._ear is ear
        if counts:
            self._probes_sent = number
        await _pause(self._probe_interval)
        if ear is None or not counts or self._ear is not ear:
            return
        missed = self._probes_sent - self._probes_back
        if missed > 0:
            self._counters.probe_misses += 1
        if missed >= 2:
            ear.end("the subscriber is deaf: two probes did not come back")

    async def _ping(self) -> None:
        """Ask for a sign of life; needs nothing but this connection.

        A time in which the event loop was blocked counts little: then it has neither asked nor read.
        """
        period, time = min(self._probe_interval, self._silence / 4), asyncio.get_running_loop().time
        ear, begun = self._ear, time()
        if ear is not None:
            ear.write(pack(("PING",)))
        await _pause(period)
        if ear is not None and ear is self._ear:
            ear.silent_for += min(time() - begun, 2 * period)
            if ear.silent_for > self._silence:
                ear.end(f"nothing was heard for {self._silence:g} s")

    async def _compare(self) -> None:
        """Compare the number of subscriptions with the server's, if nothing changed in between."""
        await asyncio.sleep(self._count_interval)
        ear, changes = self._ear, self._changes
        if ear is None or not ear.client_id or ear.commands or self._outbox:
            return
        reply: object = await self._topology.execute(self._probe_channel, "CLIENT", "LIST", "ID", str(ear.client_id))
        count = _field(reply, "ssub")
        if count is None or changes != self._changes or self._ear is not ear or ear.commands:
            return
        if count != len(self._subscriptions):
            ear.end(f"the store counts {count} subscriptions instead of {len(self._subscriptions)}")


async def _pause(seconds: float) -> None:
    """Sleep, and let what has arrived be read before anybody judges: timers may run first after a blocked loop."""
    await asyncio.sleep(seconds)
    for _ in range(3):
        await asyncio.sleep(0)


def _field(reply: object, name: str) -> int | None:
    """A number out of a CLIENT LIST line, None if it is not shown."""
    words: Iterable[str] = reply.decode().split() if isinstance(reply, bytes) else ()
    for word in words:
        key, _, value = word.partition("=")
        if key == name and value.isdigit():
            return int(value)
    return None


def _nothing() -> None:
    """The canary's channel needs no repair after a gap."""
