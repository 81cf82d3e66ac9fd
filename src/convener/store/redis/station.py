"""The subscriber's connection to one server, and the checks that keep it from being deaf unnoticed.

A subscription can die in three silent ways: the TCP connection is half open, the server has cut the
subscriber off, or the server has dropped a channel. Against them, none of them per conversation:

* PING, and a deadline: nothing at all heard for `silence` seconds ends the connection;
* a canary: a probe is published through the normal path once a second to a channel that this connection is
  subscribed to; two misses end the connection;
* the count: now and then the number of subscriptions is compared with the server's.

After every reconnect all channels are subscribed again.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from typing import Any, Final, Protocol, cast

import hiredis

from convener.errors import ConfigurationError, StoreUnavailable
from convener.store.clock import boottime_ns
from convener.store.redis.endpoint import Target, pack
from convener.store.redis.pubsub import Ear, Subscription
from convener.store.redis.topology import Topology, find_name

_log = logging.getLogger(__name__)

BATCH: Final = 500
"""Channels in one SSUBSCRIBE, all of one hash slot."""

_FIRST_PAUSE: Final = 0.05
_LONGEST_PAUSE: Final = 2.0


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds: see `subscriber.Subscriber`."""

    deadline: float
    probe_interval: float
    count_interval: float
    silence: float


@dataclass(slots=True)
class Counters:
    """See `subscriber.SubscriberStatistics`."""

    connects: int = 0
    received: int = 0
    malformed: int = 0
    handler_errors: int = 0
    probe_misses: int = 0
    dropped: int = 0


class StationOwner(Protocol):
    """Has the subscriptions, and knows where each belongs."""

    def message(self, station: Station, channel: bytes, payload: bytes) -> None:
        """A publication."""
        ...

    def joined(self, station: Station, subscription: Subscription) -> None:
        """The server has confirmed it."""
        ...

    def dropped(self, station: Station, channel: bytes) -> None:
        """The server has dropped a channel by itself."""
        ...

    def refused(self, station: Station, subscription: Subscription, text: str) -> None:
        """The server does not take it."""
        ...


class Station:
    """A connection to one server for subscriptions, that comes back by itself.

    Args:
        place: what the topology calls the server.
        make_probe: makes a channel for the canary out of a number; the first that lives at `place` is used.
    """

    def __init__(
        self,
        place: str,
        target: Target,
        topology: Topology,
        owner: StationOwner,
        make_probe: Callable[[int], str],
        timing: Timing,
        counters: Counters,
    ) -> None:
        self.place = place
        self._target = target
        self._topology = topology
        self._owner = owner
        self._make_probe = make_probe
        self._timing = timing
        self._counters = counters
        self.subscriptions: dict[bytes, Subscription] = {}
        self._ear: Ear | None = None
        self._outbox: list[tuple[bool, Subscription]] = []
        self._tasks: list[asyncio.Task[None]] = []
        self.heard_at = boottime_ns()
        """Boot-time clock, in ns, when anything was heard last."""
        self._changes = 0
        self._hurry = asyncio.Event()
        self.probe = Subscription(b"", self._probe_came, _nothing)
        self._probes_sent = self._probes_back = 0

    async def open(self) -> None:
        """Connect and subscribe to the canary's channel.

        Raises:
            StoreUnavailable: no connection, or no confirmation in time.
            ConfigurationError: the server refuses the credentials or the channel.
        """
        ear = await self._connect()
        self._choose_probe()
        self._adopt(ear)
        self._start(ear)
        await self.probe.confirmation(self._timing.deadline)

    def begin(self) -> None:
        """Connect in the background, again and again."""
        self._choose_probe()
        self._start(None)

    def _start(self, ear: Ear | None) -> None:
        loop = asyncio.get_running_loop()
        self._tasks = [
            loop.create_task(self._keep(ear), name="convener-subscriber"),
            loop.create_task(self._guard("canary", self._canary), name="convener-subscriber-canary"),
            loop.create_task(self._guard("ping", self._ping), name="convener-subscriber-ping"),
            loop.create_task(self._guard("count", self._compare), name="convener-subscriber-count"),
        ]

    async def close(self) -> None:
        """Drop the connection."""
        for task in self._tasks:
            task.cancel()
        for task in self._tasks:
            with contextlib.suppress(asyncio.CancelledError):
                await task
        self._tasks.clear()
        if self._ear is not None:
            await self._ear.release()
            self._ear = None
        self.probe.fail(StoreUnavailable("the store is closed"))

    @property
    def connected(self) -> bool:
        """Whether there is a connection."""
        return self._ear is not None

    @property
    def lonely(self) -> bool:
        """Whether nothing but the canary is subscribed."""
        return all(subscription is self.probe for subscription in self.subscriptions.values())

    # -- subscriptions ---------------------------------------------------------------------------------------

    def join(self, subscription: Subscription) -> None:
        """Subscribe here. `StationOwner.joined` or `.refused` tells what became of it."""
        subscription.place, subscription.confirmed = self.place, False
        self.subscriptions[subscription.channel] = subscription
        self._queue(True, subscription)

    def leave(self, subscription: Subscription) -> None:
        """Unsubscribe here."""
        if self.subscriptions.get(subscription.channel) is subscription:
            del self.subscriptions[subscription.channel]
            self._queue(False, subscription)

    def forget(self, subscription: Subscription) -> None:
        """It is not subscribed here: the server has said so."""
        if self.subscriptions.get(subscription.channel) is subscription:
            del self.subscriptions[subscription.channel]
            self._changes += 1

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
        if self._ear is not None:
            _send(self._ear, outbox)

    def _choose_probe(self) -> None:
        """The canary's channel has to live at this server."""
        channel = find_name(self._topology, self.place, self._make_probe, str)
        slot = self._topology.slot(channel)
        self.probe = Subscription(channel.encode(), self._probe_came, _nothing, slot, self.place)
        self.subscriptions[self.probe.channel] = self.probe

    def move_probe(self) -> None:
        """Choose another channel for the canary if its hash slot has gone elsewhere."""
        if self._topology.place(self.probe.slot) != self.place:
            self.forget(self.probe)
            with contextlib.suppress(StoreUnavailable):
                self._choose_probe()
                self._probes_back = self._probes_sent
                self.join(self.probe)

    def look(self) -> None:
        """Something has changed. If the connection is lost, try again at once; if it goes to a server that has not the
        duty any more, make it anew.
        """
        self._hurry.set()
        if self._ear is not None and self._ear.place != self._target.place:
            self._ear.end(f"{self._target.place} is the primary now")

    def renew_probe(self) -> None:
        """Subscribe to the canary's channel again, which the server refused."""
        self.move_probe()
        if self._tasks and self.probe.channel not in self.subscriptions:
            self.join(self.probe)

    # -- frames ----------------------------------------------------------------------------------------------

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
                if ear.settle(False, channel) is None:
                    self._counters.dropped += 1
                    self._owner.dropped(self, channel)
            case [b"pong", _] | [b"PONG"]:
                pass
            case [hiredis.ReplyError() as error]:
                self._refused(ear, str(error))
            case _:
                self._counters.malformed += 1
                _log.warning("skipped a malformed frame from the store: %.200r", parts)

    def _message(self, channel: bytes, payload: bytes) -> None:
        self.heard_at = boottime_ns()
        if channel == self.probe.channel:
            self._probe_came(payload)
        else:
            self._owner.message(self, channel, payload)

    def _joined(self, ear: Ear, channel: bytes) -> None:
        subscription = ear.settle(True, channel)
        if subscription is None or self.subscriptions.get(channel) is not subscription:
            return
        self.heard_at = boottime_ns()
        self._owner.joined(self, subscription)

    def _refused(self, ear: Ear, text: str) -> None:
        if not ear.commands:
            _log.error("the store refused on the subscriber's connection: %s", text)
            return
        command = ear.commands.popleft()
        if command.joins:
            for subscription in command.subscriptions:
                if self.subscriptions.get(subscription.channel) is subscription:
                    self._owner.refused(self, subscription, text)

    # -- the connection --------------------------------------------------------------------------------------

    async def _connect(self) -> Ear:
        ear = Ear(self._frame)
        await self._target.connect(ear, self._timing.deadline)
        try:
            async with asyncio.timeout(self._timing.deadline):
                identity = await ear.ask("CLIENT", "ID")
        except TimeoutError as error:
            await ear.release()
            raise StoreUnavailable(f"{ear.place} does not answer") from error
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
        _send(ear, [(True, s) for s in sorted(self.subscriptions.values(), key=lambda s: s.slot)])

    async def _keep(self, ear: Ear | None) -> None:
        """Supervise the connection until the station is closed."""
        while True:
            if ear is not None:
                await asyncio.shield(ear.closed)
                self._ear = None
                self._changes += 1
                for subscription in self.subscriptions.values():
                    subscription.confirmed = False
                await ear.release()
                _log.warning("%s (%s); publications may be lost", ear.why, ear.place)
                self._topology.doubt()
            ear = await self._reconnect()
            self._adopt(ear)

    async def _reconnect(self) -> Ear:
        pause = 0.0
        while True:
            self._hurry.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(pause * random.uniform(0.5, 1)):
                    await self._hurry.wait()
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
                await asyncio.sleep(self._timing.probe_interval)
            except Exception:
                _log.exception("the subscriber's %s check failed", what)
                await asyncio.sleep(self._timing.probe_interval)

    def _probe_came(self, payload: bytes) -> None:
        if payload.isdigit():
            self._probes_back = max(self._probes_back, int(payload))

    async def _canary(self) -> None:
        """Publish a probe, give it one interval, and judge the connection."""
        ear, number, probe = self._ear, self._probes_sent + 1, self.probe
        confirmed, channel = probe.confirmed, probe.channel.decode()
        await self._topology.execute(channel, "SPUBLISH", channel, number)
        counts = confirmed and ear is not None and self._ear is ear and self.probe is probe
        if counts:
            self._probes_sent = number
        await _pause(self._timing.probe_interval)
        if ear is None or not counts or self._ear is not ear or self.probe is not probe:
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
        silence = self._timing.silence
        period, time = min(self._timing.probe_interval, silence / 4), asyncio.get_running_loop().time
        ear, begun = self._ear, time()
        if ear is not None:
            ear.write(pack(("PING",)))
        await _pause(period)
        if ear is not None and ear is self._ear:
            ear.silent_for += min(time() - begun, 2 * period)
            if ear.silent_for > silence:
                ear.end(f"nothing was heard for {silence:g} s")
            else:
                self.look()

    async def _compare(self) -> None:
        """Compare the number of subscriptions with the server's, if nothing changed in between."""
        await asyncio.sleep(self._timing.count_interval)
        ear, changes, channel = self._ear, self._changes, self.probe.channel.decode()
        if ear is None or not ear.client_id or ear.commands or self._outbox:
            return
        reply: object = await self._topology.execute(channel, "CLIENT", "LIST", "ID", str(ear.client_id))
        count = _field(reply, "ssub")
        if count is None or changes != self._changes or self._ear is not ear or ear.commands:
            return
        if count != len(self.subscriptions):
            ear.end(f"the store counts {count} subscriptions instead of {len(self.subscriptions)}")


def _send(ear: Ear, orders: list[tuple[bool, Subscription]]) -> None:
    """Subscribe and unsubscribe; a command takes channels of one hash slot only."""
    run: list[Subscription] = []
    for i, (joins, subscription) in enumerate(orders):
        run.append(subscription)
        following = orders[i + 1] if i + 1 < len(orders) else None
        if len(run) == BATCH or following is None or following[0] != joins or following[1].slot != subscription.slot:
            ear.send(joins, run)
            run = []


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
