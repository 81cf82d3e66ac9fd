"""`Link`: the connection that commands to one server take, made anew when it is lost.

It never repeats by itself what may have run: a command whose reply is lost ends with `StoreUnavailable`, outcome
unknown, and only its caller knows how to settle that. Commands that were never sent wait for the next connection
until their deadline. What the server refused without running it (`wire`), the link's owner decides.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

from convener.errors import ConfigurationError, StoreUnavailable
from convener.store.redis.endpoint import Argument, Target
from convener.store.redis.errors import AccessRefused, as_configuration
from convener.store.redis.history import INFO_SECTIONS, Identity, identify
from convener.store.redis.scripts import Script
from convener.store.redis.wire import Again, Call, Reply, Wire

_log = logging.getLogger(__name__)

MAX_IN_FLIGHT_BYTES: Final = 256 * 1024 * 1024
"""Bytes of commands that wait for their replies or for a connection; beyond it new ones are refused."""

_FIRST_PAUSE: Final = 0.05
_LONGEST_PAUSE: Final = 2.0


class Patience:
    """Deadlines of commands, looked at some twenty times per deadline: one timer, not one per command.

    They go by a clock that stands still while the event loop is blocked: what came in time is read before it counts
    as late, and what could not be sent gets the time that it was promised.

    Args:
        deadline: seconds that a command may take, the wait for a connection included.
        confirm: seconds that replicas get to confirm a write; 0: nobody waits for them.
    """

    def __init__(self, deadline: float, confirm: float = 0.0) -> None:
        self.deadline = deadline
        self.confirm = confirm
        self.now = 0.0
        self._pause = min(deadline / 20, 0.25)
        self._watched: list[Callable[[], None]] = []
        self._timer: asyncio.TimerHandle | None = None
        self._looked_at = 0.0

    def expiry(self) -> float:
        """When a command expires that begins now."""
        return self.now + self._pause + self.deadline

    def watch(self, look: Callable[[], None]) -> None:
        """Call `look` at each tick, from now on."""
        self._watched.append(look)
        if self._timer is None:
            loop = asyncio.get_running_loop()
            self._looked_at = loop.time()
            self._timer = loop.call_later(self._pause, self._tick, loop)

    def forget(self, look: Callable[[], None]) -> None:
        """Undo `watch`."""
        if look in self._watched:
            self._watched.remove(look)
        if not self._watched and self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _tick(self, loop: asyncio.AbstractEventLoop) -> None:
        now = loop.time()
        self.now += min(now - self._looked_at, 2 * self._pause)
        self._looked_at = now
        self._timer = loop.call_later(self._pause, self._tick, loop)
        for look in list(self._watched):
            look()


@dataclass(frozen=True, slots=True)
class LinkStatistics:
    """Counters of a `Link`, or of several together, since it was opened.

    Attributes:
        connected: whether there is a connection now, to every server.
        connects: connections that were made.
        in_flight: commands that wait for a reply or for a connection.
        expired: connections given up because a command was not answered in time.
        reloads: times the server had lost the scripts.
    """

    connected: bool
    connects: int
    in_flight: int
    expired: int
    reloads: int


class LinkOwner(Protocol):
    """Who is told what becomes of a link; all on the event loop, none may block or raise."""

    def connected(self, link: Link, identity: Identity) -> None:
        """There is a connection; what waited is sent next."""
        ...

    def lost(self, link: Link) -> None:
        """The connection is gone, and what was never sent waits again."""
        ...

    def refused(self, link: Link, again: list[Again], held: list[Call]) -> None:
        """The server refused some commands without running them; see `wire`."""
        ...


class Link:
    """A multiplexed connection to one server that comes back by itself.

    Args:
        patience: says how long commands may take. One that was sent and not answered by then ends the connection:
            the replies behind it would not come either.
        codes: of error replies after which a command may run again; see `wire`.
        max_in_flight: commands under way at once; more are refused.
        primary: whether a replica is no good.
    """

    def __init__(
        self,
        target: Target,
        patience: Patience,
        owner: LinkOwner,
        codes: frozenset[str],
        *,
        max_in_flight: int = 10_000,
        primary: bool = True,
    ) -> None:
        self.target = target
        self._patience = patience
        self._owner = owner
        self._codes = codes
        self._max_in_flight = max_in_flight
        self._primary = primary
        self._wire: Wire | None = None
        self._waiting: deque[Call] = deque()
        self._waiting_bytes = 0
        self._task: asyncio.Task[None] | None = None
        self._why = "the store is not open"
        self._open = False
        self._connects = self._expired = self._reloads = 0

    async def open(self) -> None:
        """Connect.

        Raises:
            StoreUnavailable: there is no server, or it does not answer, or it is no primary.
            ConfigurationError: it refuses the credentials.
        """
        self._loop = asyncio.get_running_loop()
        wire, identity = await self._connect()
        self._begin(wire, identity)

    def begin(self) -> None:
        """Connect in the background, again and again; commands wait for it."""
        self._loop = asyncio.get_running_loop()
        self._why = f"there is no connection to {self.target.place} yet"
        self._begin(None, None)

    def _begin(self, wire: Wire | None, identity: Identity | None) -> None:
        self._open = True
        if wire is not None and identity is not None:
            self._adopt(wire, identity)
        self._task = self._loop.create_task(self._keep(wire), name="convener-store-link")
        self._patience.watch(self._look)

    async def close(self) -> None:
        """Drop the connection; commands under way end with `StoreUnavailable`."""
        self._open = False
        self._why = "the store is closed"
        self._patience.forget(self._look)
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
        if self._wire is not None:
            self._wire.why = self._why
            await self._wire.release()
            self._reloads += self._wire.reloads
            self._waiting.extend(self._wire.take_unsent())
            self._wire = None
        self._drop_waiting(float("inf"))
        self._waiting_bytes = 0

    def retreat(self, calls: Sequence[Call], why: str) -> None:
        """Give the connection up. These commands did not run: they go to the next one, before those that come now."""
        if self._wire is not None:
            self._wire.end(why, calls)

    def call(self, script: Script, keys: Sequence[str], arguments: Sequence[Argument]) -> asyncio.Future[Reply]:
        """Run a script. Sent in the order of the calls; the reply is awaited on the future."""
        return self.submit(self._make(script, keys[0], ("EVALSHA", script.sha, len(keys), *keys, *arguments)))

    def execute(self, key: str, *parts: Argument) -> asyncio.Future[Reply]:
        """Run a command. Sent in the order of the calls; the reply is awaited on the future."""
        return self.submit(self._make(None, key, parts))

    def _make(self, script: Script | None, key: str, parts: Sequence[Argument]) -> Call:
        if not self._open:
            raise StoreUnavailable(self._why)
        return Call(self._loop.create_future(), script, key, parts, self._patience.expiry())

    def submit(self, call: Call) -> asyncio.Future[Reply]:
        """Take a command.

        Raises:
            StoreUnavailable: the link is closed or full.
        """
        if not self._open:
            raise StoreUnavailable(self._why)
        wire = self._wire
        if len(self._waiting) + (0 if wire is None else len(wire)) >= self._max_in_flight:
            raise StoreUnavailable(f"more than {self._max_in_flight} commands wait for the store; it was not sent")
        held = self._waiting_bytes + (0 if wire is None else wire.bytes_in_flight)
        if held + len(call.packed) > MAX_IN_FLIGHT_BYTES:
            raise StoreUnavailable("too much data waits for the store; it was not sent")
        if wire is None:
            self._waiting.append(call)
            self._waiting_bytes += len(call.packed)
        else:
            wire.send(call)
        return call.future

    def take_waiting(self, wanted: Callable[[Call], bool]) -> list[Call]:
        """Remove commands that wait for a connection, in order."""
        taken = [call for call in self._waiting if wanted(call)]
        if taken:
            self._waiting = deque(call for call in self._waiting if not wanted(call))
            self._count_waiting()
        return taken

    def _count_waiting(self) -> None:
        self._waiting_bytes = sum(len(call.packed) for call in self._waiting)

    def under_way(self) -> Iterable[Call]:
        """Commands at the present connection: sent, or held back during a stall."""
        return () if self._wire is None else self._wire.under_way()

    def stall(self) -> None:
        """Send nothing more until all replies have arrived; then the owner's `refused` is called."""
        if self._wire is not None:
            self._wire.stall()

    @property
    def place(self) -> str:
        """The server that the present connection goes to; empty without one."""
        return "" if self._wire is None else self._wire.place

    @property
    def connected(self) -> bool:
        """Whether there is a connection."""
        return self._wire is not None and not self._wire.closed.done()

    @property
    def idle(self) -> bool:
        """Whether nothing waits here for a reply or a connection."""
        return not self._waiting and not self._wire

    def statistics(self) -> LinkStatistics:
        """A snapshot of the counters."""
        wire = self._wire
        return LinkStatistics(
            connected=wire is not None,
            connects=self._connects,
            in_flight=len(self._waiting) + (0 if wire is None else len(wire)),
            expired=self._expired,
            reloads=self._reloads + (0 if wire is None else wire.reloads),
        )

    # -- the connection --------------------------------------------------------------------------------------

    async def _connect(self) -> tuple[Wire, Identity]:
        wire = Wire(self._codes, self._refused, self._patience.confirm)
        limit = self._patience.deadline
        await self.target.connect(wire, limit)
        try:
            # A server that is loading its data takes connections; the PING finds out.
            never = float("inf")
            ping, hello = wire.ask(never, "PING"), wire.ask(never, "HELLO", 2)
            info = wire.ask(never, "INFO", *INFO_SECTIONS)
            asked = [ping, hello, info, *wire.load_scripts(never)]
            async with asyncio.timeout(limit):
                await asyncio.wait([call.future for call in asked])
            self._check_ping(ping, wire.place)
            identity = identify(wire.place, _reply_of(hello), _reply_of(info))
            if self._primary and identity.role == "slave":
                raise StoreUnavailable(f"{wire.place} is a replica")
        except TimeoutError as error:
            await wire.release()
            raise StoreUnavailable(f"{wire.place} does not answer") from error
        except BaseException:
            await wire.release()
            raise
        return wire, identity

    @staticmethod
    def _check_ping(ping: Call, place: str) -> None:
        try:
            ping.future.result()
        except AccessRefused as error:
            if "NOPERM" not in str(error):
                raise as_configuration(str(error), place) from error

    def _refused(self, again: list[Again], held: list[Call]) -> None:
        self._owner.refused(self, again, held)

    def _adopt(self, wire: Wire, identity: Identity) -> None:
        self._wire = wire
        self._connects += 1
        self._owner.connected(self, identity)
        waiting, self._waiting, self._waiting_bytes = self._waiting, deque(), 0
        for call in waiting:
            # Whoever gave up before it was sent is told by that: nothing happened.
            if not call.future.done():
                wire.send(call)

    async def _keep(self, wire: Wire | None) -> None:
        """Supervise the connection until the link is closed."""
        while True:
            if wire is not None:
                await asyncio.shield(wire.closed)
                self._wire = None
                self._reloads += wire.reloads
                self._waiting.extendleft(reversed(wire.take_unsent()))
                self._count_waiting()
                await wire.release()
                _log.warning("%s (%s)", wire.why, wire.place)
                self._owner.lost(self)
            wire, identity = await self._reconnect()
            self._adopt(wire, identity)
            _log.info("connected to the store (%s)", wire.place)

    async def _reconnect(self) -> tuple[Wire, Identity]:
        pause = 0.0
        while True:
            await asyncio.sleep(pause * random.uniform(0.5, 1))
            try:
                return await self._connect()
            except (StoreUnavailable, ConfigurationError) as error:
                self._why = str(error)
                _log.debug("cannot reconnect: %s", error)
            except Exception:
                # A link that gave up would leave the node without a store for ever.
                _log.exception("unexpected error while reconnecting")
            pause = min(max(2 * pause, _FIRST_PAUSE), _LONGEST_PAUSE)

    def _look(self) -> None:
        wire, now = self._wire, self._patience.now
        if wire is not None and wire.oldest() <= now:
            self._expired += 1
            wire.why = f"the store did not answer within {self._patience.deadline:g} s"
            wire.abort()
        self._drop_waiting(now)

    def _drop_waiting(self, now: float) -> None:
        while self._waiting and self._waiting[0].expires <= now:
            call = self._waiting.popleft()
            self._waiting_bytes -= len(call.packed)
            call.fail(StoreUnavailable(f"{self._why}; the command was not sent"))


def _reply_of(call: Call) -> Reply:
    """The reply, None for an error."""
    return None if call.future.exception() is not None else call.future.result()
