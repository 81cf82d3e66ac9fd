"""Starting, waking and taking over: reserve, subscribe, claim (protocol, section 5).

Two phases, since user and conversation live in different hash slots of the store. Every step is idempotent under
its nonce, so an unknown outcome is repeated or settled, never guessed; a start that fails leaves no claim, slot or
record behind, and what cannot be cleaned up now is cleaned up in the background (`_undo`).

The argument, await by await: between reading the head and CLAIM anything may happen; CLAIM compares owner and epoch
(I2, I5). Between reading the slot and RESERVE likewise; RESERVE adopts only the value that was read (I6). The record
is written before RESERVE and removed after UNRESERVE (I12). The subscription is confirmed before CLAIM, so every
entry after the claim's own reading is heard (I11).
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Final, Literal, Protocol, TypeVar

import structlog

from convener.core.admission import Slot
from convener.core.model import ClaimReason, ClaimRequest, LogEntry, Meta, Status
from convener.errors import (
    ConvenerError,
    ConversationFailed,
    ConversationHeld,
    ConversationStopped,
    LimitExceeded,
    NotFound,
    OwnershipLost,
    OwnerUnavailable,
    StoreFull,
    StoreUnavailable,
)
from convener.ids import new_nonce
from convener.manager.attempt import Attempt
from convener.manager.context import NodeContext
from convener.manager.records import Records
from convener.manager.runner import Runner
from convener.manager.views import View, Views

log = structlog.get_logger(__name__)

T = TypeVar("T")
PAUSE_S: Final = 0.05
SETTLE_S: Final = 0.5
SUSPENDED_S: Final = 3.0
"""How long a start waits for this node's lease to become good again."""


@dataclass(frozen=True, slots=True)
class Started:
    """Who owns the conversation now. `here`: this call made this node the owner."""

    owner: str
    epoch: int
    here: bool


def closed(cid: str, status: Status) -> ConversationStopped:
    """Why a conversation with this status is not started."""
    if status == "failed":
        return ConversationFailed(f"conversation {cid} was given up after too many crashes; resume it first")
    if status == "held":
        return ConversationHeld(f"a turn of conversation {cid} was cut off and waits; resume it first")
    return ConversationStopped(f"conversation {cid} was stopped; resume it first")


class Queued(OwnerUnavailable):
    """The start waits for one of the user's slots; accepted messages will be answered then."""

    code = "queued"


class Starts(Protocol):
    """The node's side of a start."""

    def runner(self, cid: str) -> Runner | None: ...

    def adopt(self, view: View, meta: Meta, reason: ClaimReason, opened: LogEntry | None, fallbacks: int) -> Runner: ...

    async def make_room(self, user: str, cid: str, reason: ClaimReason, attempt: int) -> None:
        """The limit was met for the `attempt`th time. Returns if it is worth trying again.

        Raises:
            LimitExceeded: the policy found no room.
            Queued: the conversation waits for a slot.
        """
        ...

    def choose(self, cid: str) -> str | None:
        """The node where a conversation is to start by the policy on placement, None for here."""
        ...

    async def start_elsewhere(self, cid: str, node: str | None = None, source: str = "") -> Started:
        """Let another node (`node`, if it is given) start the conversation, in the place of `source` if this node is
        leaving and still owns it. Raises as a start; `OwnerUnavailable` if none does.
        """
        ...

    async def keep_queued(self, cid: str, nonce: str) -> bool:
        """If the start of `cid` waits in this node's queue, put its record in the place of the one under `nonce`."""
        ...

    async def restart(self, cid: str, user: str, nonce: str, incarnation: str) -> None:
        """This node owns the conversation and does not run it: own it anew, or finish its stop; until that is done."""
        ...


class Starter:
    """Makes somebody own a conversation; single-flight per conversation on this node."""

    def __init__(self, node: NodeContext, views: Views, records: Records, host: Starts) -> None:
        self._node = node
        self._views = views
        self._records = records
        self._host = host
        self._flights: dict[str, asyncio.Task[Started]] = {}
        self._chosen: set[str] = set()
        self._acted: set[str] = set()
        # Conversations of which attempts are under way or still to be settled; those for which a CLAIM was sent.
        self.claiming = Counter[str]()
        self._sent: set[str] = set()

    def is_starting(self, cid: str) -> bool:
        """Whether a start of this conversation is under way here."""
        return cid in self._flights

    async def ensure(self, cid: str, reason: ClaimReason) -> Started:
        """Make sure that a node that is not buried owns the conversation.

        Args:
            reason: why; recorded in the `open` entry if this node claims it.

        Raises:
            NotFound, ConversationStopped, LimitExceeded, StoreUnavailable.
            Queued: the user's limit is met; the start waits in the user's queue and will be tried again.
            OwnerUnavailable: not settled within `start_timeout`.
            OwnershipLost: this node may not act, or its life has ended meanwhile.
        """
        return await self._join_flight(cid, reason, "")

    async def take_over(self, cid: str, *, acted: bool) -> Started:
        """The same, for what a buried node has left.

        Args:
            acted: whether the open turn did something there besides waiting for a person: then it may be what took the
                node down.
        """
        if acted:
            self._acted.add(cid)
        try:
            return await self._join_flight(cid, "takeover", "")
        finally:
            self._acted.discard(cid)

    async def ensure_here(self, cid: str, reason: ClaimReason) -> Started:
        """The same, but if nobody owns it, then here: another node has chosen this one. Not passed on again."""
        self._chosen.add(cid)
        try:
            return await self._join_flight(cid, reason, "")
        finally:
            self._chosen.discard(cid)

    async def take(self, cid: str, source: str) -> Started:
        """Own a conversation in the place of `source`, a live node that asks for that and does nothing under its
        epoch until it knows the outcome.

        Raises:
            OwnerUnavailable: a start is under way here already, the conversation runs here, or this node is leaving:
                nothing was begun. Else as `ensure`.
        """
        if cid in self._flights or self._host.runner(cid) is not None or self._node.draining:
            raise OwnerUnavailable("this node does not take the conversation", code="not_taken")
        return await self._join_flight(cid, "handoff", source)

    async def _join_flight(self, cid: str, reason: ClaimReason, source: str) -> Started:
        flight = self._flights.get(cid)
        if flight is None:
            flight = asyncio.get_running_loop().create_task(self._fly(cid, reason, source), name=f"start {cid}")
            self._flights[cid] = flight
            flight.add_done_callback(lambda done: self._landed(cid, done))
        try:
            # Shielded: a caller that goes away must not cut a start in half.
            return await asyncio.shield(flight)
        except asyncio.CancelledError as error:
            task = asyncio.current_task()
            if not flight.cancelled() or task is None or task.cancelling():
                raise
            # Not the caller was cancelled but the start, by `aclose`: no reason to end who waits for it.
            raise OwnershipLost("this life of the node has ended; try again", retry_after=1.0) from error

    def _landed(self, cid: str, flight: asyncio.Task[Started]) -> None:
        if self._flights.get(cid) is flight:
            del self._flights[cid]
            self._sent.discard(cid)
        if not flight.cancelled():
            flight.exception()

    async def aclose(self) -> None:
        """Cancel the starts under way and await their clean-up."""
        flights = list(self._flights.values())
        for flight in flights:
            flight.cancel()
        if flights:
            await asyncio.wait(flights)

    async def _fly(self, cid: str, reason: ClaimReason, source: str) -> Started:
        try:
            async with asyncio.timeout(self._node.options.start_timeout):
                rooms = 0
                while True:
                    outcome = await self._once(cid, reason, source)
                    if isinstance(outcome, Started):
                        return outcome
                    if isinstance(outcome, Meta):
                        rooms += 1
                        await self._host.make_room(outcome.user, cid, reason, rooms)
                        continue
                    await asyncio.sleep(PAUSE_S * random.uniform(0.5, 1.5))
        except TimeoutError as error:
            raise OwnerUnavailable("no node could take the conversation in time", retry_after=1.0) from error

    async def _once(self, cid: str, reason: ClaimReason, source: str) -> Started | Meta | None:
        """One attempt. A `Meta` means that its user's limit was met; None that it is worth looking again."""
        runner = self._host.runner(cid)
        if runner is not None and not runner.over and not runner.leaving:
            return Started(runner.incarnation, runner.epoch, here=False)
        # The slot first, then the head: RESERVE then adopts exactly what was read before the owner was (I6).
        meta = await self._node.store.head(cid)
        slot = await self._node.store.slot(meta.user, cid) if meta is not None and meta.user else None
        meta = await self._node.store.head(cid)
        if meta is None:
            raise NotFound(f"no conversation {cid}")
        if meta.status != "running":
            raise closed(cid, meta.status)
        if self._is_live(meta.owner) and meta.owner != source:
            return Started(meta.owner, meta.epoch, here=False)
        if runner is not None:
            return None
        if self._node.draining:
            return await self._elsewhere(cid, meta, source)
        if not self._node.lease.valid():
            # Often over in a moment; what was read before the pause is read again.
            await self._node.lease.wait_valid(SUSPENDED_S)
            return None
        if not source and reason not in ("takeover", "restart") and cid not in self._chosen:
            placed = await self._place(cid)
            if placed is not None:
                return placed
        return await self._attempt(meta, cid, slot, reason, source)

    async def _place(self, cid: str) -> Started | None:
        """Let the node start it that the policy names. None if that is this one, or the other did not do it."""
        node = self._host.choose(cid)
        if node is None:
            return None
        try:
            return await self._host.start_elsewhere(cid, node)
        except (NotFound, ConversationStopped, LimitExceeded, Queued):
            raise
        except ConvenerError as error:
            log.info("started here instead of elsewhere", conversation_id=cid, node=node, error=str(error))
            return None

    async def _elsewhere(self, cid: str, meta: Meta, source: str) -> Started | None:
        """This node is leaving."""
        if source:
            # Whoever asks may go on acting only if no claim can have touched the epoch, not even to be cancelled.
            code = None if cid in self._sent else "not_taken"
            raise OwnerUnavailable("this node is leaving too", code=code)
        if cid in self.claiming:
            # What an attempt may still bring has to be known first.
            return None
        return await self._host.start_elsewhere(cid, source=meta.owner if self._node.owns(meta.owner) else "")

    def _is_live(self, owner: str) -> bool:
        """Whether `owner` counts as owner. One that is this node, without a runner, is a start to finish."""
        return bool(owner) and owner not in self._node.buried and not self._node.owns(owner)

    async def _attempt(
        self, meta: Meta, cid: str, read: Slot | None, reason: ClaimReason, source: str
    ) -> Started | Meta | None:
        attempt = Attempt(cid, meta, new_nonce(), self._node.incarnation, self._node.fallbacks, source, read)
        self.claiming[cid] += 1
        try:
            return await self._undertake(attempt, read, reason)
        finally:
            self.claiming -= Counter([cid])

    async def _undertake(self, attempt: Attempt, read: Slot | None, reason: ClaimReason) -> Started | Meta | None:
        cid, meta = attempt.cid, attempt.meta
        try:
            await self._records.begin(cid, meta.user, meta.epoch, attempt.nonce)
            if meta.user:
                outcome = await self._reserve(attempt, read)
                if outcome != "OK":
                    await self._give_up(attempt)
                    return meta if outcome == "LIMIT" else None
            attempt.view = await self._views.acquire(cid)
            return await self._claim(attempt, reason)
        except BaseException as error:
            await asyncio.shield(self._clean(attempt, error))
            raise

    async def _clean(self, attempt: Attempt, error: BaseException) -> None:
        """Give back what a failed attempt holds: now if the store answers, else in the background until it does."""
        if not isinstance(error, StoreUnavailable | asyncio.CancelledError):
            with contextlib.suppress(ConvenerError):
                await self._give_up(attempt)
                return
        self._settle_later(attempt)

    async def _reserve(self, attempt: Attempt, read: Slot | None) -> Literal["OK", "LIMIT", "HELD"]:
        """RESERVE. A slot of a live node that is not this one means that a start is under way there."""
        if read is not None and self._is_live(read.incarnation) and read.incarnation != attempt.source:
            return await self._held(attempt, read)
        slot = Slot(attempt.nonce, attempt.incarnation)
        limit = await self._raised_limit(attempt.meta.user)
        attempt.slot = True
        reply = await self._repeat(
            lambda: self._node.store.reserve(attempt.meta.user, attempt.cid, slot, raised_limit=limit, read=read)
        )
        if reply.outcome != "OK":
            attempt.slot = False
        return reply.outcome

    async def _held(self, attempt: Attempt, held: Slot) -> Literal["OK", "HELD"]:
        """A slot without an owner behind it and without a record is left over from a start that died half-way."""
        if attempt.meta.owner:
            return "HELD"
        record = await self._node.store.record(held.incarnation, attempt.cid)
        if record is None or record.nonce != held.nonce:
            await self._node.store.unreserve(attempt.meta.user, attempt.cid, held.nonce)
        return "HELD"

    async def _raised_limit(self, user: str) -> int:
        own = await self._node.agent.limit(user)
        return self._node.options.raised_limit if own is None else own + 1

    async def _claim(self, attempt: Attempt, reason: ClaimReason) -> Started | None:
        """CLAIM until it is decided. Losing to nobody or to a buried owner begins again under the same slot."""
        meta = attempt.meta
        while True:
            if not self._node.lease.valid() or attempt.incarnation != self._node.incarnation:
                raise OwnerUnavailable("this node is suspended", retry_after=1.0)
            if self._node.draining or attempt.fallbacks != self._node.fallbacks:
                # Another node is to claim it; or what was reserved may be lost, and is begun again.
                await self._give_up(attempt)
                return None
            # RESOLVE must name the epoch of the claim that may be on its way, not of the first one.
            attempt.meta = meta
            request = ClaimRequest(
                me=attempt.incarnation,
                nonce=attempt.nonce,
                owner=meta.owner,
                epoch=meta.epoch,
                reason=await self._reason(meta, reason, attempt),
                user=meta.user,
                generation=meta.generation,
                acted=attempt.cid in self._acted,
            )
            self._sent.add(attempt.cid)
            try:
                reply = await self._node.store.claim(attempt.cid, request)
            except StoreFull:
                raise
            except StoreUnavailable:
                owned = await self._resolve(attempt)
                if owned is None:
                    return None
                return self._owned(attempt, owned, request.reason, None)
            if reply.outcome == "OK" and reply.meta is not None:
                return self._owned(attempt, reply.meta, request.reason, reply.opened)
            if reply.outcome == "CLOSED":
                raise closed(attempt.cid, "stopped" if reply.meta is None else reply.meta.status)
            if reply.outcome == "NOT_FOUND" or reply.meta is None:
                raise NotFound(f"no conversation {attempt.cid}")
            meta = reply.meta
            if self._is_live(meta.owner):
                # Also if it is the node that hands it over: it has given that up and gone on under a new epoch.
                await self._give_up(attempt)
                return Started(meta.owner, meta.epoch, here=False)

    async def _reason(self, meta: Meta, reason: ClaimReason, attempt: Attempt) -> ClaimReason:
        if meta.owner in self._node.buried:
            record = await self._node.store.record(meta.owner, attempt.cid)
            # A node that left and could not give it up has ended its turn before it said so: that is no crash.
            return "handoff" if record is not None and record.status == "draining" else "takeover"
        if meta.owner and meta.owner == attempt.source:
            return "handoff"
        if meta.owner:
            return "restart"
        return "start" if meta.epoch == 0 else reason if reason != "start" else "wake"

    async def _resolve(self, attempt: Attempt) -> Meta | None:
        """Settle a claim whose outcome is unknown: owned, or never to be. None if it did not succeed."""
        epoch = attempt.meta.epoch
        reply = await self._repeat(
            lambda: self._node.store.resolve(attempt.cid, attempt.incarnation, attempt.nonce, epoch)
        )
        if reply.outcome == "OWNED":
            return reply.meta
        await self._give_up(attempt)
        return None

    def _owned(self, attempt: Attempt, meta: Meta, reason: ClaimReason, opened: LogEntry | None) -> Started:
        view, attempt.view = attempt.view, None
        assert view is not None
        self._node.metrics.claims.labels(reason=reason).inc()
        runner = self._host.adopt(view, meta, reason, opened, attempt.fallbacks)
        return Started(runner.incarnation, runner.epoch, here=True)

    # -- giving back -----------------------------------------------------------------------------------------------

    async def _repeat(self, step: Callable[[], Awaitable[T]]) -> T:
        """Repeat an idempotent step until the store answers; the start's own deadline ends it."""
        while True:
            try:
                return await step()
            except StoreFull:
                raise
            except StoreUnavailable as error:
                self._node.metrics.store_errors.labels(kind=error.wire_code).inc()
                await asyncio.sleep(PAUSE_S)

    async def _give_up(self, attempt: Attempt) -> None:
        """Undo now. What must wait for another node's doing is undone in the background."""
        if not await self._undo(attempt):
            self._settle_later(attempt)

    async def _undo(self, attempt: Attempt) -> bool:
        """Give slot, record and view back after a start that did not end in ownership. False if it is too early.

        The slot of a conversation whose owner is buried stays (recovery goes on under it), and so does the record,
        since the hash must name every slot of the node (I12). When recovery or a stop is done with the conversation
        the slot has another nonce, or nobody but this node would ever free it.
        """
        await self._let_view_go(attempt)
        if attempt.slot:
            meta = await self._node.store.head(attempt.cid)
            if meta is not None and meta.owner == attempt.incarnation and meta.nonce == attempt.nonce:
                return False
            if meta is not None and meta.owner in self._node.buried:
                return False
            await self._let_slot_go(attempt, meta)
            attempt.slot = False
        if not await self._host.keep_queued(attempt.cid, attempt.nonce):
            await self._records.end(attempt.cid, attempt.nonce, attempt.incarnation, "hibernated")
        return True

    async def _let_slot_go(self, attempt: Attempt, meta: Meta | None) -> None:
        """Free the slot; after a handoff that failed, give it back to the node that still owns the conversation (I6).
        Both by nonce: whoever has stamped it anew meanwhile keeps it.
        """
        user, cid = attempt.meta.user, attempt.cid
        if attempt.read is not None and meta is not None and meta.owner and meta.owner == attempt.source:
            mine = Slot(attempt.nonce, attempt.incarnation)
            slot = await self._node.store.slot(user, cid)
            if slot == mine:
                await self._node.store.reserve(user, cid, attempt.read, raised_limit=0, read=mine)
        else:
            await self._node.store.unreserve(user, cid, attempt.nonce)

    async def _let_view_go(self, attempt: Attempt) -> None:
        view, attempt.view = attempt.view, None
        if view is not None:
            await self._views.release(view)

    def _settle_later(self, attempt: Attempt) -> None:
        self.claiming[attempt.cid] += 1
        self._node.supervisor.spawn(f"settle {attempt.cid}", self._undo_later(attempt))

    async def _undo_later(self, attempt: Attempt) -> None:
        """The same, until the store answers. A claim may be on its way: it is settled first, for good."""
        try:
            await self._let_view_go(attempt)
            await self._settle(attempt)
        finally:
            self.claiming -= Counter([attempt.cid])

    async def _settle(self, attempt: Attempt) -> None:
        while not self._node.lease.ended and attempt.incarnation == self._node.incarnation:
            try:
                reply = await self._node.store.resolve(
                    attempt.cid, attempt.incarnation, attempt.nonce, attempt.meta.epoch
                )
                if reply.outcome == "OWNED":
                    # It landed after all: this node owns it, so it runs it.
                    await self._host.restart(attempt.cid, attempt.meta.user, attempt.nonce, attempt.incarnation)
                    return
                if await self._undo(attempt):
                    return
            except ConvenerError as error:
                log.info("a start is still to be settled", conversation_id=attempt.cid, error=str(error))
            await asyncio.sleep(SETTLE_S)
