"""One connection for commands: what is written and not yet answered, and in which order it takes effect.

Commands issued within one turn of the event loop leave in one write, in the order of the calls; replies are
matched in order. A command whose reply is lost ends with `StoreUnavailable`, outcome unknown.

Some answers are known: the server refused before anything ran (the script was flushed, the hash slot is
elsewhere, the server is a replica now). Such a command can be run again, but what was sent after it is on its
way already. So the wire *stalls*: nothing more is sent until every reply under way has arrived. Then the refused
commands are handed back in their old order, and with them what was answered differently only because of that:

* a refusal of a later command of the same group (the second of two chained appends finds a gap), and a later
  read, are run again too;
* if a later command of the group took effect, the refused one must not come after it: it fails.
"""

from __future__ import annotations

import asyncio
import logging
from binascii import crc_hqx
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol, cast

import hiredis

from convener.errors import ConvenerError, InvalidRequest, StoreUnavailable
from convener.store.redis.confirm import UNCONFIRMED, Confirmation
from convener.store.redis.endpoint import NOT_YET, Argument, Attached, pack
from convener.store.redis.errors import NotRun, StoreCommandError, from_reply
from convener.store.redis.scripts import SCRIPTS, Script

_log = logging.getLogger(__name__)

READ_COMMANDS: Final = frozenset(
    {"get", "hget", "hgetall", "hmget", "hscan", "xrange", "zmscore", "zrange", "zrangebylex", "zscore"}
)
_READS: Final = "#!lua flags=no-writes\n"
_REFUSALS: Final = (b"GAP", b"PENDING", b"CONFLICT", b"REFUSED")

Reply = Any
"""bytes, int, None or a list of these: what it is, the script's header says."""


def tag_of(key: str) -> str:
    """The group of a key: what stands in its first braces, else the key."""
    start = key.find("{")
    end = key.find("}", start + 1)
    return key[start + 1 : end] if 0 <= start < end - 1 else key


def slot_of(key: str) -> int:
    """The hash slot of a key, as every Redis Cluster computes it."""
    return crc_hqx(tag_of(key).encode(), 0) & 16383


class Call:
    """A command, from the call to the reply.

    Attributes:
        key: names its group; empty for a command that belongs to none.
        alone: whoever made it has nothing else of its group under way, and runs it again himself.
        asking: allowed at a server that the hash slot is just moved to.
        slot: the hash slot, where that matters.
    """

    __slots__ = (
        *("alone", "asking", "by_text", "confirmation", "expires", "future", "key", "packed", "parts", "script"),
        "slot",
    )

    def __init__(
        self,
        future: asyncio.Future[Reply],
        script: Script | None,
        key: str,
        parts: Sequence[Argument],
        expires: float,
        slot: int = -1,
    ) -> None:
        self.future = future
        self.script = script
        self.key = key
        self.parts = parts
        self.expires = expires
        self.slot = slot
        self.by_text = self.alone = self.asking = False
        self.confirmation: Confirmation | None = None
        try:
            self.packed: bytes = pack(tuple(parts))
        except UnicodeEncodeError as error:
            raise InvalidRequest("text with half a surrogate pair cannot be stored") from error

    @property
    def name(self) -> str:
        """The script's or the command's name."""
        return self.script.name if self.script is not None else str(self.parts[0]).lower()

    @property
    def reads(self) -> bool:
        """Whether it changes nothing. The server holds a script to that."""
        if self.script is not None:
            return self.script.source.startswith(_READS)
        return self.name in READ_COMMANDS

    @property
    def to_confirm(self) -> bool:
        """Whether it counts only when a replica has it, if the store is to be replicated."""
        return bool(self.key) and self.name not in UNCONFIRMED and not self.reads

    def attempt(self, *, asking: bool) -> Call:
        """The same command once more, with an outcome of its own."""
        call = Call(self.future.get_loop().create_future(), self.script, self.key, self.parts, self.expires, self.slot)
        call.alone, call.asking = True, asking
        if self.by_text:
            call.send_text()
        return call

    def send_text(self) -> None:
        """Name the script by its text from now on, which the server cannot lack."""
        assert self.script is not None
        self.by_text = True
        self.packed = pack(("EVAL", self.script.source, *self.parts[2:]))

    def succeed(self, reply: Reply) -> None:
        """It was answered: tell the caller, now or when that is confirmed."""
        if self.confirmation is None:
            self.deliver(reply)
        else:
            self.confirmation.keep(self, reply)

    def deliver(self, reply: Reply) -> None:
        """Hand the reply to the caller, if he still waits."""
        if not self.future.done():
            self.future.set_result(reply)

    def fail(self, error: ConvenerError) -> None:
        """Tell the caller, if he still waits."""
        if not self.future.done():
            self.future.set_exception(error)


@dataclass(slots=True)
class Again:
    """A command that is to run again. `refusal` is the server's word, or empty: it was answered by `reply`, but out
    of order.
    """

    call: Call
    refusal: str
    reply: Reply = None


class Refused(Protocol):
    """Takes what a wire hands back after a stall: commands to run again, and after them those never sent."""

    def __call__(self, again: list[Again], held: list[Call], /) -> None: ...


class Wire(Attached):
    """One connection.

    Args:
        codes: of error replies that mean "not here, not now": nothing ran, and it may run again.
        refused: called at the end of a stall for another reason than lost scripts.
        confirm: seconds that replicas get to confirm what is to be confirmed; 0: nothing is.
    """

    def __init__(self, codes: frozenset[str], refused: Refused, confirm: float = 0.0) -> None:
        super().__init__()
        self._loop = asyncio.get_running_loop()
        self._codes = codes
        self._refused = refused
        self.in_flight: deque[Call] = deque()
        self.bytes_in_flight = 0
        self.reloads = 0
        self.why = "the connection to the store was lost"
        self._confirm = confirm
        self._batch: Confirmation | None = None
        self._confirming = False
        self._out: list[bytes] = []
        self._again: list[Again] | None = None
        """What runs again after the stall; None unless there is one."""
        self._moving = self._ended = False
        self._held: list[Call] = []
        self._broken: set[str] = set()

    def send(self, call: Call) -> None:
        """Write at the end of this turn of the event loop, or keep it until that is possible again."""
        self.bytes_in_flight += len(call.packed)
        if self._again is None and not self._ended and not self.closed.done():
            self._put(call)
        else:
            self._held.append(call)

    def end(self, why: str, unsent: Sequence[Call] = ()) -> None:
        """Give the connection up. `unsent` are kept with what is sent from now on, before it, for `take_unsent`."""
        self.why = why
        self._ended = True
        self._held[:0] = unsent
        self.bytes_in_flight += sum(len(call.packed) for call in unsent)
        self.abort()

    def _put(self, call: Call) -> None:
        if not self._out:
            self._loop.call_soon(self._flush)
        if call.asking:
            asked = Call(self._loop.create_future(), None, "", ("ASKING",), call.expires)
            asked.future.add_done_callback(forget_error)
            self.bytes_in_flight += len(asked.packed)
            self.in_flight.append(asked)
            self._out.append(asked.packed)
        call.confirmation = None
        if self._confirm and call.to_confirm:
            if self._batch is None:
                self._batch = Confirmation(tag_of(call.key), self._confirm)
            call.confirmation = self._batch
            self._batch.expires = max(self._batch.expires, call.expires)
        self.in_flight.append(call)
        self._out.append(call.packed)

    def _flush(self) -> None:
        if self._batch is not None and not self._confirming and not self.closed.done():
            self._ask_replicas(self._batch)
        out, self._out = self._out, []
        self.write(out[0] if len(out) == 1 else b"".join(out))

    def _ask_replicas(self, batch: Confirmation) -> None:
        """Behind whatever was sent. One WAIT at a time: the server does nothing for this connection meanwhile."""
        self._batch, self._confirming = None, True
        marker = self.ask(batch.expires, "EVAL", SCRIPTS["waited"].source, 1, batch.key)
        wait = self.ask(batch.expires, "WAIT", 1, round(1000 * batch.seconds))
        wait.future.add_done_callback(lambda done: self._confirmed(batch, marker.future, done))

    def _confirmed(self, batch: Confirmation, marker: asyncio.Future[Reply], wait: asyncio.Future[Reply]) -> None:
        batch.settle(marker, wait)
        self._confirming = False
        if self._batch is not None and not self._out and not self.closed.done():
            self._ask_replicas(self._batch)

    def __len__(self) -> int:
        return len(self.in_flight) + len(self._held) + len(self._again or ())

    def oldest(self) -> float:
        """When the first of the commands under way expires; infinite without any."""
        first = self.in_flight[0].expires if self.in_flight else float("inf")
        return min(first, self._again[0].call.expires) if self._again else first

    def under_way(self) -> Iterable[Call]:
        """Commands that are sent or held."""
        yield from self.in_flight
        yield from (again.call for again in self._again or ())
        yield from self._held

    def data_received(self, data: bytes) -> None:
        self.reader.feed(data)
        gets, in_flight = self.reader.gets, self.in_flight
        try:
            while (reply := gets()) is not NOT_YET:
                call = in_flight.popleft()
                if self._again is None and type(reply) is not hiredis.ReplyError:
                    self.bytes_in_flight -= len(call.packed)
                    if call.confirmation is not None:
                        call.confirmation.keep(call, reply)
                    elif not call.future.done():
                        call.future.set_result(reply)
                else:
                    self._unusual(call, reply)
        except (hiredis.ProtocolError, IndexError) as error:
            self.why = "the store sent what nobody asked for"
            _log.error("unexpected data from the store, reconnecting: %r", error)
            self.abort()

    # -- stalls ----------------------------------------------------------------------------------------------

    def stall(self) -> None:
        """Send nothing more until all replies have arrived; then `refused` gets what was kept."""
        self._moving = True
        if self._again is None:
            self._again = []
        if not self.in_flight:
            self._drained(self._again)

    def _unusual(self, call: Call, reply: Reply) -> None:
        """An error reply, or any reply during a stall."""
        if isinstance(reply, hiredis.ReplyError):
            self._error(call, str(reply))
        elif call.key and tag_of(call.key) in self._broken:
            self._out_of_order(call, reply)
        else:
            self.bytes_in_flight -= len(call.packed)
            call.succeed(reply)
        if self._again is not None and not self.in_flight:
            self._drained(self._again)

    def _error(self, call: Call, text: str) -> None:
        code = text.partition(" ")[0]
        lost = code == "NOSCRIPT" and call.script is not None and not call.by_text
        if call.alone and lost:
            self.bytes_in_flight -= len(call.packed)
            call.send_text()
            self.bytes_in_flight += len(call.packed)
            self._put(call)
        elif (lost or code in self._codes) and call.key and not call.alone:
            if self._again is None:
                self._again = []
            self._moving |= not lost
            self._again.append(Again(call, text))
            self._broken.add(tag_of(call.key))
        else:
            self.bytes_in_flight -= len(call.packed)
            error = NotRun(text, call.name) if call.alone and code in self._codes else from_reply(text, call.name)
            call.fail(error)
            if isinstance(error, StoreCommandError) and call.key:
                # It may have run half-way.
                self._overtaken(tag_of(call.key))

    def _out_of_order(self, call: Call, reply: Reply) -> None:
        assert self._again is not None
        if call.reads or _is_refusal(reply):
            self._again.append(Again(call, "", reply))
        else:
            self.bytes_in_flight -= len(call.packed)
            call.succeed(reply)
            # A publication changes nothing that the refused commands would find.
            if call.name != "spublish":
                self._overtaken(tag_of(call.key))

    def _overtaken(self, tag: str) -> None:
        """What the server refused would come after what has just taken effect."""
        if tag not in self._broken or self._again is None:
            return
        kept: list[Again] = []
        for again in self._again:
            if tag_of(again.call.key) != tag:
                kept.append(again)
                continue
            self.bytes_in_flight -= len(again.call.packed)
            _end(again, f"{again.call.name}: it did not run, and what was called after it did")
        self._again = kept
        self._broken.discard(tag)

    def _drained(self, again: list[Again]) -> None:
        held, moving = self._held, self._moving
        self._held, self._again, self._moving = [], None, False
        self._broken.clear()
        for one in again:
            self.bytes_in_flight -= len(one.call.packed)
            if one.refusal.startswith("NOSCRIPT"):
                one.call.send_text()
        if moving:
            self.bytes_in_flight -= sum(len(call.packed) for call in held)
            self._refused(again, held)
            return
        if again:
            self.reloads += 1
            self.load_scripts(again[0].call.expires)
        for one in again:
            self.bytes_in_flight += len(one.call.packed)
            self._put(one.call)
        for call in held:
            self._put(call)

    # -- the connection's own commands -----------------------------------------------------------------------

    def load_scripts(self, expires: float) -> list[Call]:
        """Send SCRIPT LOAD for all; where that is not allowed, each goes by its text when it is needed."""
        return [self.ask(expires, "SCRIPT", "LOAD", script.source) for script in SCRIPTS.values()]

    def ask(self, expires: float, *parts: Argument) -> Call:
        """A command of the connection's own; nobody need look at its outcome."""
        call = Call(self._loop.create_future(), None, "", parts, expires)
        call.future.add_done_callback(forget_error)
        self._put(call)
        self.bytes_in_flight += len(call.packed)
        return call

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        text = f"{self.why}; the outcome of the command is unknown"
        for again in self._again or ():
            _end(again, text)
        for call in self.in_flight:
            call.fail(StoreUnavailable(text))
        self.in_flight.clear()
        self._again = None
        if self._batch is not None:
            self._batch.end(confirmed=False)
            self._batch = None

    def take_unsent(self) -> list[Call]:
        """Commands that were never written, after the connection is lost."""
        held, self._held = self._held, []
        return held


def _end(again: Again, why: str) -> None:
    """Not to be run again after all: what the server said before holds."""
    if again.refusal:
        again.call.fail(StoreUnavailable(why))
    else:
        again.call.succeed(again.reply)


def _is_refusal(reply: Reply) -> bool:
    """Whether a reply says that nothing was done: run again later, it is as if it had come later."""
    parts = cast("list[Reply]", reply) if isinstance(reply, list) else [reply]
    return bool(parts) and parts[0] in _REFUSALS


def forget_error(future: asyncio.Future[Reply]) -> None:
    """Nobody looks at this outcome."""
    if not future.cancelled():
        future.exception()
