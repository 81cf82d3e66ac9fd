"""The owner's only way to write: chained, fenced appends (I1, I2, I3, I4).

Up to `CHAIN` batches are under way, each expecting the end of the one before; what is submitted meanwhile is
gathered into the next. A pending batch is retried unchanged under its id, never replaced: after lost replies the
store's last batch id tells which of them were written, and all before it count as written too. Nothing is sent
while the lease is not good (I7); what was already sent is fenced by the store.

A store that has fallen back refuses what follows on entries that it has lost. The appender then holds still until its
owner has verified the conversation and repaired it out of the `tail`; what flies is sent again after that.
"""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final, Protocol

import structlog

from convener.core.model import AppendReply, AppendRequest, Closing, LogEntry, Meta
from convener.errors import OwnershipLost, StaleEpoch, StoreUnavailable
from convener.manager.clock import boottime
from convener.manager.context import NodeContext
from convener.manager.tail import Tail

log = structlog.get_logger(__name__)

CHAIN: Final = 8
BATCH_EVENTS: Final = 500
BATCH_BYTES: Final = 512 << 10
RETRY_PAUSE_S: Final = 0.1


@dataclass(slots=True)
class Ticket:
    """What becomes of a submitted update: `sent` when it went to the store, `written` when it is committed."""

    sent: asyncio.Future[None]
    written: asyncio.Future[None]


@dataclass(slots=True)
class Update:
    """Events and marks that are written together or not at all."""

    events: list[str]
    cursor: int = 0
    done: int = 0
    base: int = 0
    state: bytes | None = None
    closing: Closing = ""
    halted: int = 0
    asks: tuple[tuple[str, str], ...] = ()
    ends_turn: bool = False
    begins_turn: bool = False
    tickets: list[Ticket] = field(default_factory=list[Ticket])

    def size(self) -> int:
        """Bytes, roughly."""
        return sum(map(len, self.events)) + len(self.state or b"")

    def takes(self, other: Update) -> bool:
        """Whether `other` may be written in the same batch."""
        if self.closing or len(self.events) + len(other.events) > BATCH_EVENTS:
            return False
        return self.size() + other.size() <= BATCH_BYTES

    def add(self, other: Update) -> None:
        """Write `other` together with this one."""
        self.events += other.events
        self.cursor, self.done = max(self.cursor, other.cursor), max(self.done, other.done)
        self.base = max(self.base, other.base)
        self.state = self.state if other.state is None else other.state
        self.closing = other.closing
        self.halted = max(self.halted, other.halted)
        # What the store does first in a batch is to close the questions of the turn that ends in it.
        self.asks = other.asks if other.ends_turn else self.asks + other.asks
        self.ends_turn |= other.ends_turn
        self.begins_turn |= other.begins_turn
        self.tickets += other.tickets


@dataclass(slots=True)
class Batch:
    """A batch under way."""

    request: AppendRequest
    tickets: list[Ticket]

    @property
    def end(self) -> int:
        """The log's seq after it."""
        return self.request.expected + len(self.request.events)


class Owner(Protocol):
    """Who is told how it went."""

    def committed(self, entries: list[LogEntry]) -> None: ...

    def fenced(self) -> None: ...

    def diverged(self) -> None: ...

    def fell_back(self) -> None: ...


class Appender:
    """Writes one conversation's log under one epoch.

    Args:
        mine: the head as it was when the ownership began.
        opened: the `open` entry, None if it is not known.
        name: of a batch, by the seq before it.
    """

    def __init__(
        self,
        node: NodeContext,
        cid: str,
        mine: Meta,
        opened: LogEntry | None,
        owner: Owner,
        name: Callable[[int], str],
    ) -> None:
        self._node = node
        self._cid = cid
        self._epoch = mine.epoch
        self.tail = Tail(node.tails, mine, opened, boottime())
        self._me = node.incarnation
        self._lease = node.lease
        self._owner = owner
        self._name = name
        self._waiting: deque[Update] = deque()
        self._flying: deque[Batch] = deque()
        self._under_way = 0
        self._landed = asyncio.Event()
        self._retrying = False
        self._lapsed = False
        self._closed = False
        self._exchanges: set[asyncio.Task[None]] = set()
        self._going = asyncio.Event()
        self._going.set()
        self.sent_seq = mine.seq
        """The seq after everything that was sent."""
        self.written_seq = mine.seq
        self.next_seq = mine.seq
        """The seq after everything that was submitted."""

    @property
    def quiet(self) -> bool:
        """Whether everything that was submitted is committed."""
        return not self._waiting and not self._flying

    def submit(self, update: Update) -> Ticket:
        """Queue an update; it is sent in this tick if the chain has room and the lease is good."""
        loop = asyncio.get_running_loop()
        ticket = Ticket(loop.create_future(), loop.create_future())
        update.tickets.append(ticket)
        if self._closed:
            self._fail([ticket])
            return ticket
        self.next_seq += len(update.events)
        if self._waiting and self._waiting[-1].takes(update):
            self._waiting[-1].add(update)
        else:
            self._waiting.append(update)
        self.push()
        return ticket

    def push(self) -> None:
        """Send what waits, as far as chain and lease allow. Called again when either improves."""
        while self._waiting and len(self._flying) < CHAIN and not (self._retrying or self._closed or self.held):
            if not self._lease.valid():
                self._wait_for_lease()
                return
            update = self._waiting.popleft()
            request = AppendRequest(
                owner=self._me,
                epoch=self._epoch,
                expected=self.sent_seq,
                batch=self._name(self.sent_seq),
                cursor=update.cursor,
                done=update.done,
                base=update.base,
                events=tuple(update.events),
                state=update.state,
                closing=update.closing,
                halted=update.halted,
                asks=update.asks,
                ends_turn=update.ends_turn,
                begins_turn=update.begins_turn,
            )
            batch = Batch(request, update.tickets)
            self.sent_seq = batch.end
            self._flying.append(batch)
            self._send(batch)

    def _wait_for_lease(self) -> None:
        """Push again when the lease is good. A lapse may be too short for the node to notice and suspend, and then
        nobody else would.
        """
        if not self._lapsed and not self._lease.ended:
            self._lapsed = True
            self._node.supervisor.spawn(f"await the lease {self._cid}", self._push_when_valid())

    async def _push_when_valid(self) -> None:
        try:
            await self._lease.wait_valid()
        except OwnershipLost:
            return
        finally:
            self._lapsed = False
        self.push()

    def _send(self, batch: Batch) -> None:
        self._under_way += 1
        self._landed.clear()
        exchange = self._node.supervisor.spawn(f"append {self._cid}", self._exchange(batch))
        self._exchanges.add(exchange)
        exchange.add_done_callback(self._ended)
        for ticket in batch.tickets:
            if not ticket.sent.done():
                ticket.sent.set_result(None)

    def _finishing(self, batch: Batch) -> bool:
        """Whether a turn cannot end before this batch is written. Its content stays what it was."""
        place = self._flying.index(batch) if batch in self._flying else len(self._flying)
        later = [each.request for each in itertools.islice(self._flying, place + 1, None)]
        return any(each.ends_turn or each.closing for each in (*later, *self._waiting))

    def _ended(self, exchange: asyncio.Task[None]) -> None:
        self._exchanges.discard(exchange)
        self._under_way -= 1
        if not self._under_way:
            self._landed.set()

    async def _exchange(self, batch: Batch) -> None:
        request = batch.request
        if self._finishing(batch):
            request = dataclasses.replace(request, finishing=True)
        try:
            reply = await self._node.store.append(self._cid, request)
        except StoreUnavailable as error:
            self._node.metrics.store_errors.labels(kind=error.wire_code).inc()
            reply = None
        except asyncio.CancelledError:
            if not self.held:
                raise
            # Given up by `withhold`: sent or not, it is sent again.
            reply = None
        if self._closed:
            return
        if reply is None:
            self._retry()
        else:
            self._take(batch, reply)
        self.push()

    def _take(self, batch: Batch, reply: AppendReply) -> None:
        if self._has_fallen_back(reply):
            self.hold()
            self._owner.fell_back()
        elif reply.outcome == "FENCED":
            self._node.metrics.fenced_appends.inc()
            self.close()
            self._owner.fenced()
        elif reply.outcome == "OK":
            self._settle(batch)
        elif batch in self._flying:
            self._explain(batch, reply)

    def _has_fallen_back(self, reply: AppendReply) -> bool:
        """Whether the store knows less than it has confirmed: neither epochs nor seqs go back otherwise."""
        if reply.outcome == "FENCED":
            return reply.epoch < self._epoch
        return reply.outcome == "GAP" and reply.seq < self.written_seq

    def _explain(self, batch: Batch, reply: AppendReply) -> None:
        """GAP: find out from the last batch id what was written although its reply was lost."""
        for written in self._flying:
            if reply.outcome == "GAP" and written.request.batch == reply.batch and written.end == reply.seq:
                self._settle(written)
                break
        if batch not in self._flying:
            return
        first = self._flying[0].request.expected
        if reply.outcome == "GAP" and reply.seq == first:
            self._retry()
        else:
            log.warning(
                "the log is not what this owner wrote",
                conversation_id=self._cid,
                outcome=reply.outcome,
                seq=reply.seq,
                expected=first,
            )
            self.close()
            self._owner.diverged()

    def _settle(self, upto: Batch) -> None:
        """`upto` and every batch before it are written."""
        while self._flying and upto in self._flying:
            batch = self._flying.popleft()
            request = batch.request
            self.written_seq = batch.end
            self.tail.keep(request, boottime())
            for ticket in batch.tickets:
                if not ticket.written.done():
                    ticket.written.set_result(None)
            entries = [
                LogEntry(request.epoch, request.expected + i, text) for i, text in enumerate(request.events, start=1)
            ]
            self._owner.committed(entries)

    def _retry(self) -> None:
        if not self._retrying:
            self._retrying = True
            self._node.supervisor.spawn(f"append again {self._cid}", self._again())

    async def _again(self) -> None:
        """Send all that flies once more, unchanged and in order, when every earlier attempt has its outcome."""
        await asyncio.sleep(RETRY_PAUSE_S)
        await self.landed()
        while not self._closed and (self.held or not self._lease.valid()):
            if self._lease.ended:
                return
            await asyncio.sleep(RETRY_PAUSE_S)
        self._retrying = False
        if not self._closed:
            for batch in list(self._flying):
                self._send(batch)
            self.push()

    def hold(self) -> None:
        """Send nothing until `go_on`: the store may have fallen back, and nothing may be done under an ownership that
        was not verified.
        """
        self._going.clear()

    @property
    def held(self) -> bool:
        """Whether nothing is sent until the conversation was verified."""
        return not self._going.is_set()

    async def going_on(self) -> None:
        """Wait until the conversation was verified."""
        await self._going.wait()

    def withhold(self) -> None:
        """The same, also of what was not sent yet because there was no connection."""
        self.hold()
        for exchange in self._exchanges:
            exchange.cancel()

    def unconfirmed(self) -> tuple[int, list[str]]:
        """How far in the inbox that goes which is not confirmed, and its events."""
        updates = [*(batch.request for batch in self._flying), *self._waiting]
        return max((u.cursor for u in updates), default=0), [text for u in updates for text in u.events]

    async def landed(self) -> None:
        """Wait until every command under way has its outcome."""
        if self._under_way:
            await self._landed.wait()

    def go_on(self) -> None:
        """The store has all that it has confirmed: send what flies again, then what waits."""
        if self.held:
            self._going.set()
            if self._flying:
                self._retry()
            self.push()

    def close(self) -> None:
        """Send nothing more; what is not known to be written fails with `StaleEpoch`."""
        self._closed = True
        self._going.set()
        self.tail.clear()
        for batch in self._flying:
            self._fail(batch.tickets)
        for update in self._waiting:
            self._fail(update.tickets)
        self._flying.clear()
        self._waiting.clear()

    @staticmethod
    def _fail(tickets: list[Ticket]) -> None:
        for ticket in tickets:
            for future in (ticket.sent, ticket.written):
                if not future.done():
                    future.set_exception(StaleEpoch("this node does not own the conversation any more"))
                    future.exception()

    async def settled(self) -> None:
        """Wait until everything that was submitted is committed. Raises `OwnershipLost` if that cannot be."""
        while not self.quiet:
            last = self._waiting[-1].tickets if self._waiting else self._flying[-1].tickets
            if not last:
                await asyncio.sleep(RETRY_PAUSE_S)
                continue
            await asyncio.shield(last[-1].written)
        if self._closed:
            raise OwnershipLost("this node does not own the conversation any more")
