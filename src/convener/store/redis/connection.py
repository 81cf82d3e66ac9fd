"""The connection that commands take, and the topology: the one module that knows which server a key lives on.

Today there is one server, so `Topology.execute` has one `Link`; the key that routes is an argument already.

A `Link` multiplexes one connection. Commands issued within one turn of the event loop leave in one write, in
the order of the calls; replies are matched in order. It never repeats a command by itself: a command whose
reply is lost ends with `StoreUnavailable`, outcome unknown, and only its caller knows how to settle that.

The exception is NOSCRIPT, an answer that is known: the script did not run. Somebody flushed the server's
scripts. Then nothing more is sent until every reply under way has arrived; the scripts are loaded, what did
not run runs in its old order, and with it what was refused only because an earlier call of the same group had
not run (the second of two chained appends finds a gap). Callers do not notice.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, cast

import hiredis

from convener.errors import ConfigurationError, ConvenerError, InvalidRequest, StoreUnavailable
from convener.store.redis.endpoint import NOT_YET, Argument, Attached, Endpoint, pack
from convener.store.redis.errors import AccessRefused, as_configuration, from_reply
from convener.store.redis.scripts import SCRIPTS, Script

_log = logging.getLogger(__name__)

MAX_IN_FLIGHT_BYTES: Final = 256 * 1024 * 1024
"""Bytes of commands that wait for their replies or for a connection; beyond it new ones are refused."""

_FIRST_PAUSE: Final = 0.05
_LONGEST_PAUSE: Final = 2.0
_REFUSALS: Final = (b"GAP", b"PENDING", b"CONFLICT", b"REFUSED")

Reply = Any
"""bytes, int, None or a list of these: what it is, the script's header says."""


class _Call:
    """A command, from the call to the reply."""

    __slots__ = ("by_text", "expires", "future", "key", "packed", "parts", "script")

    def __init__(
        self,
        future: asyncio.Future[Reply],
        script: Script | None,
        key: str,
        parts: tuple[Argument, ...],
        expires: float,
    ) -> None:
        self.future = future
        self.script = script
        self.key = key
        self.parts = parts
        self.expires = expires
        self.by_text = False
        try:
            self.packed: bytes = pack(parts)
        except UnicodeEncodeError as error:
            raise InvalidRequest("text with half a surrogate pair cannot be stored") from error

    @property
    def name(self) -> str:
        return self.script.name if self.script is not None else str(self.parts[0]).lower()

    def send_text(self) -> None:
        """Name the script by its text from now on, which the server cannot lack."""
        assert self.script is not None
        self.by_text = True
        self.packed = pack(("EVAL", self.script.source, *self.parts[2:]))

    def succeed(self, reply: Reply) -> None:
        if not self.future.done():
            self.future.set_result(reply)

    def fail(self, error: ConvenerError) -> None:
        if not self.future.done():
            self.future.set_exception(error)


class _Wire(Attached):
    """One connection: what is written and not yet answered."""

    def __init__(self) -> None:
        super().__init__()
        self._loop = asyncio.get_running_loop()
        self.in_flight: deque[_Call] = deque()
        self.bytes_in_flight = 0
        self.reloads = 0
        self.why = "the connection to the store was lost"
        self._out: list[bytes] = []
        self._replay: list[_Call] | None = None
        self._held: list[_Call] = []
        self._broken: set[str] = set()

    def send(self, call: _Call) -> None:
        """Write at the end of this turn of the event loop, or keep it until that is possible again."""
        self.bytes_in_flight += len(call.packed)
        if self._replay is None and not self.closed.done():
            self._put(call)
        else:
            self._held.append(call)

    def _put(self, call: _Call) -> None:
        self.in_flight.append(call)
        if not self._out:
            self._loop.call_soon(self._flush)
        self._out.append(call.packed)

    def _flush(self) -> None:
        out, self._out = self._out, []
        self.write(out[0] if len(out) == 1 else b"".join(out))

    def __len__(self) -> int:
        return len(self.in_flight) + len(self._held) + len(self._replay or ())

    def oldest(self) -> float:
        """When the first of the commands under way expires; infinite without any."""
        first = self.in_flight[0].expires if self.in_flight else float("inf")
        return min(first, self._replay[0].expires) if self._replay else first

    def data_received(self, data: bytes) -> None:
        self.reader.feed(data)
        gets, in_flight = self.reader.gets, self.in_flight
        try:
            while (reply := gets()) is not NOT_YET:
                call = in_flight.popleft()
                if self._replay is None and type(reply) is not hiredis.ReplyError:
                    self.bytes_in_flight -= len(call.packed)
                    if not call.future.done():
                        call.future.set_result(reply)
                else:
                    self._unusual(call, reply)
        except (hiredis.ProtocolError, IndexError) as error:
            self.why = "the store sent what nobody asked for"
            _log.error("unexpected data from the store, reconnecting: %r", error)
            self.abort()

    def _unusual(self, call: _Call, reply: Reply) -> None:
        """An error reply, or any reply while scripts are being loaded."""
        if isinstance(reply, hiredis.ReplyError):
            text = str(reply)
            if text.startswith("NOSCRIPT") and call.script is not None and not call.by_text:
                if self._replay is None:
                    self._replay = []
                self._replay.append(call)
                self._broken.add(call.key)
            else:
                self.bytes_in_flight -= len(call.packed)
                call.fail(from_reply(text, call.name))
        elif call.key in self._broken and call.script is not None and _is_refusal(reply):
            assert self._replay is not None
            self._replay.append(call)
        else:
            self.bytes_in_flight -= len(call.packed)
            call.succeed(reply)
        if self._replay is not None and not self.in_flight:
            self._run_again(self._replay)

    def _run_again(self, calls: list[_Call]) -> None:
        held, self._held, self._replay = self._held, [], None
        self._broken.clear()
        self.reloads += 1
        self.load_scripts(calls[0].expires)
        for call in calls:
            self.bytes_in_flight -= len(call.packed)
            call.send_text()
            self.bytes_in_flight += len(call.packed)
            self._put(call)
        for call in held:
            self._put(call)

    def load_scripts(self, expires: float) -> list[_Call]:
        """Send SCRIPT LOAD for all; where that is not allowed, each goes by its text when it is needed."""
        return [self.ask(expires, "SCRIPT", "LOAD", script.source) for script in SCRIPTS.values()]

    def ask(self, expires: float, *parts: Argument) -> _Call:
        """A command of the connection's own; nobody need look at its outcome."""
        call = _Call(self._loop.create_future(), None, "", parts, expires)
        call.future.add_done_callback(_forget_error)
        self._put(call)
        self.bytes_in_flight += len(call.packed)
        return call

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        text = f"{self.why}; the outcome of the command is unknown"
        for call in (*self.in_flight, *(self._replay or ())):
            call.fail(StoreUnavailable(text))
        self.in_flight.clear()
        self._replay = None

    def take_unsent(self) -> list[_Call]:
        """Commands that were never written, after the connection is lost."""
        held, self._held = self._held, []
        return held


def _is_refusal(reply: Reply) -> bool:
    """Whether a reply says that nothing was done: run again later, it is as if it had come later."""
    parts = cast("list[Reply]", reply) if isinstance(reply, list) else [reply]
    return bool(parts) and parts[0] in _REFUSALS


def _forget_error(future: asyncio.Future[Reply]) -> None:
    if not future.cancelled():
        future.exception()


@dataclass(frozen=True, slots=True)
class LinkStatistics:
    """Counters of a `Link` since it was opened.

    Attributes:
        connected: whether there is a connection now.
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


class Link:
    """A multiplexed connection to one server that comes back by itself.

    Args:
        deadline: seconds that a command may take, the wait for a connection included. A command that was sent
            and not answered by then ends the connection: the replies behind it would not come either.
        max_in_flight: commands under way at once; more are refused.
        on_reconnect: called on the event loop after each connection but the first.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        *,
        deadline: float = 5.0,
        max_in_flight: int = 10_000,
        on_reconnect: Callable[[], None] | None = None,
    ) -> None:
        self.endpoint = endpoint
        self._deadline = deadline
        self._max_in_flight = max_in_flight
        self._on_reconnect = on_reconnect
        self._wire: _Wire | None = None
        self._waiting: deque[_Call] = deque()
        self._waiting_bytes = 0
        self._task: asyncio.Task[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._why = "the store is not open"
        self._open = False
        self._clock = 0.0
        self._pause = min(deadline / 20, 0.25)
        self._looked_at = 0.0
        self._connects = self._expired = self._reloads = 0

    async def open(self) -> None:
        """Connect.

        Raises:
            StoreUnavailable: there is no server, or it does not answer.
            ConfigurationError: it refuses the credentials.
        """
        self._loop = asyncio.get_running_loop()
        wire = await self._connect()
        self._open = True
        self._adopt(wire)
        self._task = self._loop.create_task(self._keep(wire), name="convener-store-link")
        self._looked_at = self._loop.time()
        self._watch()

    async def close(self) -> None:
        """Drop the connection; commands under way end with `StoreUnavailable`."""
        self._open = False
        self._why = "the store is closed"
        if self._timer is not None:
            self._timer.cancel()
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

    def call(self, script: Script, keys: tuple[str, ...], arguments: tuple[Argument, ...]) -> asyncio.Future[Reply]:
        """Run a script. Sent in the order of the calls; the reply is awaited on the future."""
        return self._submit(script, keys[0], ("EVALSHA", script.sha, len(keys), *keys, *arguments))

    def execute(self, *parts: Argument) -> asyncio.Future[Reply]:
        """Run a command. Sent in the order of the calls; the reply is awaited on the future."""
        return self._submit(None, "", parts)

    def _submit(self, script: Script | None, key: str, parts: tuple[Argument, ...]) -> asyncio.Future[Reply]:
        if not self._open:
            raise StoreUnavailable(self._why)
        wire = self._wire
        if len(self._waiting) + (0 if wire is None else len(wire)) >= self._max_in_flight:
            raise StoreUnavailable(f"more than {self._max_in_flight} commands wait for the store; it was not sent")
        call = _Call(self._loop.create_future(), script, key, parts, self._clock + self._pause + self._deadline)
        held = self._waiting_bytes + (0 if wire is None else wire.bytes_in_flight)
        if held + len(call.packed) > MAX_IN_FLIGHT_BYTES:
            raise StoreUnavailable("too much data waits for the store; it was not sent")
        if wire is None:
            self._waiting.append(call)
            self._waiting_bytes += len(call.packed)
        else:
            wire.send(call)
        return call.future

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

    async def _connect(self) -> _Wire:
        wire = _Wire()
        await self.endpoint.connect(wire, self._deadline)
        try:
            # A server that is loading its data takes connections; the PING finds out.
            never = float("inf")
            asked = [wire.ask(never, "PING"), *wire.load_scripts(never)]
            async with asyncio.timeout(self._deadline):
                await asyncio.wait([call.future for call in asked])
            asked[0].future.result()
        except AccessRefused as error:
            if "NOPERM" not in str(error):
                await wire.release()
                raise as_configuration(str(error), str(self.endpoint)) from error
        except TimeoutError as error:
            await wire.release()
            raise StoreUnavailable(f"{self.endpoint} does not answer") from error
        except BaseException:
            await wire.release()
            raise
        return wire

    def _adopt(self, wire: _Wire) -> None:
        self._wire = wire
        self._connects += 1
        waiting, self._waiting, self._waiting_bytes = self._waiting, deque(), 0
        for call in waiting:
            # Whoever gave up before it was sent is told by that: nothing happened.
            if not call.future.done():
                wire.send(call)
        if self._connects > 1 and self._on_reconnect is not None:
            try:
                self._on_reconnect()
            except Exception:
                _log.exception("on_reconnect failed")

    async def _keep(self, wire: _Wire) -> None:
        """Supervise the connection until the link is closed."""
        while True:
            await asyncio.shield(wire.closed)
            self._wire = None
            self._reloads += wire.reloads
            self._waiting.extendleft(reversed(wire.take_unsent()))
            self._waiting_bytes = sum(len(call.packed) for call in self._waiting)
            await wire.release()
            _log.warning("%s (%s)", wire.why, self.endpoint)
            wire = await self._reconnect()
            self._adopt(wire)
            _log.info("connected to the store again (%s)", self.endpoint)

    async def _reconnect(self) -> _Wire:
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

    def _watch(self) -> None:
        """Look at the oldest commands, some twenty times per deadline: one timer, not one per command.

        Deadlines go by a clock that stands still while the event loop is blocked: what came in time is read before
        it counts as late, and what could not be sent gets the time that it was promised.
        """
        now = self._loop.time()
        self._clock += min(now - self._looked_at, 2 * self._pause)
        self._looked_at = now
        wire = self._wire
        if wire is not None and wire.oldest() <= self._clock:
            self._expired += 1
            wire.why = f"the store did not answer within {self._deadline:g} s"
            wire.abort()
        self._drop_waiting(self._clock)
        self._timer = self._loop.call_later(self._pause, self._watch)

    def _drop_waiting(self, now: float) -> None:
        while self._waiting and self._waiting[0].expires <= now:
            call = self._waiting.popleft()
            self._waiting_bytes -= len(call.packed)
            call.fail(StoreUnavailable(f"{self._why}; the command was not sent"))


class Topology:
    """Which link a key takes: here always the same."""

    def __init__(self, link: Link) -> None:
        self.link = link

    def call(self, script: Script, keys: tuple[str, ...], *arguments: Argument) -> asyncio.Future[Reply]:
        """Run a script where its keys live; all share one hash tag."""
        return self.link.call(script, keys, arguments)

    def execute(self, key: str, *parts: Argument) -> asyncio.Future[Reply]:
        """Run a command where `key` lives."""
        return self.link.execute(*parts)
