"""The node's machine room: runners, views and clients, and how they come and go.

Both managers are thin shells over one `Engine`; the clustered one adds what other nodes make necessary (heartbeat,
membership, recovery, calls, the listener). What is given back is given back in one order: claim, slot, record.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Collection, Mapping
from typing import Final, Protocol

import structlog

from convener.core.cursor import Cursor
from convener.core.directory import LoopStatus
from convener.core.model import ClaimReason, Created, LogEntry, Meta, NewMessage
from convener.errors import (
    ConvenerError,
    ConversationBusy,
    ConversationStopped,
    InboxFull,
    LimitExceeded,
    NotAuthorized,
    NotFound,
    OwnershipLost,
    OwnerUnavailable,
    StoreUnavailable,
)
from convener.ids import new_nonce
from convener.manager.admission import Admission, Hibernate
from convener.manager.base import ClientSink, SendResult, StopResult
from convener.manager.clock import boottime
from convener.manager.context import NodeContext
from convener.manager.feeds import ClientFeed
from convener.manager.host import EndReason
from convener.manager.intake import stop_reason
from convener.manager.intents import Intents, refuse
from convener.manager.jsontext import to_json
from convener.manager.records import Records
from convener.manager.retention import clear
from convener.manager.runner import Runner
from convener.manager.starter import Queued, Started, Starter
from convener.manager.supervisor import cancel_and_wait
from convener.manager.timers import ASK_TIMER
from convener.manager.verify import Verifier
from convener.manager.views import View, Views
from convener.manager.wakes import Wakes

log = structlog.get_logger(__name__)

PAUSE_S: Final = 0.25
STOP_TIMEOUT_S: Final = 10.0
REASON_BYTES: Final = 4096
RELEASED_AS: Final[Mapping[EndReason, LoopStatus]] = {"stopped": "stopped", "failed": "failed"}


class Elsewhere(Protocol):
    """The other nodes, as far as they can take work over."""

    async def hand_over(self, runner: Runner) -> bool:
        """Let another node own a conversation of this one. Raises `ConvenerError` if none has taken it."""
        ...

    def choose(self, cid: str) -> str | None:
        """Where a conversation is to start, None for here."""
        ...

    async def start(self, cid: str, node: str | None = None, source: str = "") -> Started:
        """Let another node start a conversation (`node`: this one, an incarnation), in the place of `source` (this
        node, or "" for nobody). Raises as a start.
        """
        ...

    def exists(self) -> bool:
        """Whether there is any."""
        ...


class Engine:
    """Everything that one node does with conversations, over any store."""

    def __init__(self, node: NodeContext, sink: ClientSink | None, publish: bool) -> None:
        self.node = node
        self.sink = sink
        self.views = Views(node)
        self.records = Records(node, publish)
        self.runners: dict[str, Runner] = {}
        self.feeds: dict[str, ClientFeed] = {}
        self.admission = Admission(node, self.records, self.hibernate_at)
        self.starter = Starter(node, self.views, self.records, self)
        self.admission.start = self.starter.ensure
        self.wakes = Wakes(self)
        self.intents = Intents(self)
        self.verifier = Verifier(self)
        self.records.stray = self.verifier.stray
        self.hibernate_elsewhere: Hibernate | None = None
        self.elsewhere: Elsewhere | None = None
        self._restarting = Counter[str]()

    def begin(self) -> None:
        """Start the background work that every node needs."""
        keep = self.node.supervisor.keep
        keep("records", self.records.run)
        keep("waiting starts", self.admission.run)
        keep("idle conversations", self._hibernate_idle)
        keep("owed wakes", self.wakes.run)
        self.verifier.begin()

    # -- runners -----------------------------------------------------------------------------------------------

    def runner(self, cid: str) -> Runner | None:
        """The loop of a conversation, if it runs here."""
        return self.runners.get(cid)

    def held(self) -> set[str]:
        """Conversations that this node owns, or may turn out to own."""
        return {*self.runners, *self.starter.claiming, *self._restarting}

    def is_held(self, cid: str) -> bool:
        """Whether it is one of `held`."""
        return cid in self.runners or cid in self.starter.claiming or cid in self._restarting

    def nowhere_to_go(self) -> bool:
        """Whether there is no other node that takes conversations."""
        return self.elsewhere is None or not self.elsewhere.exists()

    def adopt(self, view: View, meta: Meta, reason: ClaimReason, opened: LogEntry | None, fallbacks: int) -> Runner:
        """This node owns the conversation: run it. Takes over the caller's reference to the view."""
        runner = Runner(self.node, self, view, meta, reason, opened)
        self.runners[view.cid] = runner
        view.listener = runner
        self.admission.started(view.cid)
        log.info("conversation owned", conversation_id=view.cid, epoch=meta.epoch, reason=reason, strikes=meta.strikes)
        self.runner_changed(runner)
        if fallbacks != self.node.fallbacks:
            self.fell_back(runner)
        return runner

    def fell_back(self, runner: Runner) -> None:
        """See `Host`."""
        self.verifier.fell_back(runner)

    def runner_changed(self, runner: Runner) -> None:
        """See `Host`."""
        if self.runners.get(runner.cid) is runner and not runner.over:
            self.records.update(runner, runner.status)

    async def runner_ended(self, runner: Runner, why: EndReason) -> None:
        """See `Host`."""
        if self.runners.get(runner.cid) is runner:
            del self.runners[runner.cid]
        log.info("conversation left", conversation_id=runner.cid, epoch=runner.epoch, reason=why)
        self.verifier.left(runner, why)
        cid, user, nonce, incarnation = runner.cid, runner.user, runner.nonce, runner.incarnation
        if why == "diverged":
            self.node.supervisor.spawn(f"restart {cid}", self.restart(cid, user, nonce, incarnation))
        elif why == "moved":
            await self._forget(cid, nonce, incarnation)
        elif why != "closed":
            await self._give_back(cid, user, nonce, incarnation, RELEASED_AS.get(why, "hibernated"))
        await self.views.release(runner.view)

    async def post(self, cid: str, message: NewMessage, known: bool) -> SendResult:
        """See `Host`."""
        return await self.send(cid, message, known=known, reject_busy=False)

    async def _give_back(self, cid: str, user: str, nonce: str, incarnation: str, status: LoopStatus) -> None:
        """Slot, then record; until the store answers, since nobody else would do it."""
        while not (self.node.lease.ended or incarnation != self.node.incarnation):
            try:
                if user:
                    await self.admission.freed(await self.node.store.unreserve(user, cid, nonce))
                await self.records.end(cid, nonce, incarnation, status)
                return
            except StoreUnavailable:
                await asyncio.sleep(PAUSE_S)

    async def _forget(self, cid: str, nonce: str, incarnation: str) -> None:
        """Another node owns it, under its own slot value: only the record is left."""
        while not (self.node.lease.ended or incarnation != self.node.incarnation):
            try:
                await self.records.end(cid, nonce, incarnation, "hibernated")
                return
            except StoreUnavailable:
                await asyncio.sleep(PAUSE_S)

    async def restart(self, cid: str, user: str, nonce: str, incarnation: str) -> None:
        """See `Starts`. What was held under `nonce` is adopted by the new start, or given back if there is none."""
        self._restarting[cid] += 1
        try:
            await self._restart(cid, user, nonce, incarnation)
        finally:
            self._restarting -= Counter([cid])

    async def _restart(self, cid: str, user: str, nonce: str, incarnation: str) -> None:
        left_as: LoopStatus = "stopped"
        while not (self.node.lease.ended or incarnation != self.node.incarnation):
            await asyncio.sleep(PAUSE_S)
            try:
                meta = await self.node.store.head(cid)
                if meta is not None and meta.status == "stopping" and meta.owner == incarnation:
                    await self.finish_stop(cid, incarnation)
                elif (await self.starter.ensure(cid, "restart")).owner == incarnation:
                    return
                else:
                    left_as = "hibernated"
                    break
            except Queued:
                return
            except (NotFound, ConversationStopped):
                break
            except ConvenerError as error:
                log.info("cannot restart, again", conversation_id=cid, error=str(error))
        await self._give_back(cid, user, nonce, incarnation, left_as)

    async def make_room(self, user: str, cid: str, reason: ClaimReason, attempt: int) -> None:
        """See `Starts`."""
        await self.admission.make_room(user, cid, reason, attempt)

    def choose(self, cid: str) -> str | None:
        """See `Starts`."""
        return None if self.elsewhere is None else self.elsewhere.choose(cid)

    async def start_elsewhere(self, cid: str, node: str | None = None, source: str = "") -> Started:
        """See `Starts`."""
        if self.elsewhere is None:
            raise OwnerUnavailable("this node is leaving", retry_after=1.0)
        return await self.elsewhere.start(cid, node, source)

    async def keep_queued(self, cid: str, nonce: str) -> bool:
        """See `Starts`."""
        return await self.admission.keep(cid, nonce)

    # -- hibernation -------------------------------------------------------------------------------------------

    async def hibernate(self, cid: str) -> bool:
        """Release an idle conversation of this node; its clients stay. True when its slot is free."""
        runner = self.runners.get(cid)
        if runner is None or runner.armed or not self.node.traits.hibernates:
            return False
        if not await runner.hibernate():
            return False
        await runner.wait_ended()
        return True

    async def hibernate_at(self, cid: str, incarnation: str) -> bool:
        """Ask whoever owns it."""
        if self.node.owns(incarnation):
            return await self.hibernate(cid)
        if self.hibernate_elsewhere is None or incarnation in self.node.buried:
            return False
        return await self.hibernate_elsewhere(cid, incarnation)

    async def _hibernate_idle(self) -> None:
        after = self.node.options.hibernate_after
        while True:
            await asyncio.sleep(min(max(after / 4, 0.05), 5.0) if after else 60.0)
            if not after:
                continue
            for runner in list(self.runners.values()):
                if runner.status in ("idle", "waiting") and boottime() - runner.idle_since > after:
                    await self.hibernate(runner.cid)

    # -- start and send ----------------------------------------------------------------------------------------

    async def create(self, cid: str, user: str, metadata: str) -> Created:
        """The conversation's head; made if it is unknown, and then entered into the lists first."""
        meta = await self.node.store.head(cid)
        if meta is not None:
            return Created(meta, created=False)
        self.node.storage.check_conversation()
        await self.node.store.index(user, cid)
        created = await self.node.store.create(cid, user, metadata, new_nonce())
        if created.created:
            self.records.note(user, cid)
        elif created.meta.user != user:
            await self.node.store.unindex(user, cid)
            await self.node.store.index(created.meta.user, cid)
        return created

    async def start(self, cid: str, user: str | None, metadata: str) -> tuple[Created, Started | None]:
        """Create if unknown, and run. None as second if the start is queued.

        Raises as `ConversationManager.maybe_start_agent_loop`.
        """
        created = await self.create(cid, user or "", metadata)
        if user is not None and created.meta.user != user:
            raise NotAuthorized(f"conversation {cid} belongs to somebody else")
        try:
            return created, await self.starter.ensure(cid, "start")
        except Queued:
            return created, None
        except LimitExceeded:
            if created.created:
                await self._discard(cid, created.meta.user)
            raise

    async def _discard(self, cid: str, user: str) -> None:
        """A refused first start leaves nothing, unless somebody wrote to it or started it meanwhile."""
        if await self.node.store.erase(cid) == "OK":
            await self.node.store.unindex(user, cid)
            self.records.note(user, cid)

    async def send(self, cid: str, message: NewMessage, *, known: bool, reject_busy: bool) -> SendResult:
        """SEND, then make sure that somebody answers (I11). Only then is it acknowledged.

        Args:
            known: the id was chosen by the client, who may repeat it.
        """
        options = self.node.options
        self.node.storage.check_message()
        await self.node.not_suspended()
        sent = self.node.store.send(cid, message, max_pending=options.max_pending_messages, reject_busy=reject_busy)
        reply = await self.wakes.owing(cid, sent)
        refuse(cid, reply)
        if reply.outcome == "FULL":
            raise InboxFull(f"{options.max_pending_messages} messages wait for an answer", retry_after=1.0)
        if reply.outcome == "BUSY":
            raise ConversationBusy("a message is being answered", retry_after=1.0)
        await self.wakes.make_answered(cid, message, reply, "wake")
        return SendResult(message.message_id, reply.position, reply.outcome == "DUP" and known)

    def is_answering(self, cid: str, owner: str) -> bool:
        """Whether `owner` will answer: not nobody, not known to be buried, and not a former start of this node."""
        if not owner or owner in self.node.buried:
            return False
        return not self.node.owns(owner) or cid in self.runners

    # -- clients -----------------------------------------------------------------------------------------------

    async def join(
        self,
        cid: str,
        connection: str,
        sink: ClientSink,
        user: str | None,
        after: Cursor | None,
        tail: int | None,
        metadata: str,
        start: bool,
    ) -> tuple[View, Created | None, Started | None]:
        """Make a connection a client. Raises as `ConversationManager.join_conversation`."""
        if connection in self.feeds:
            await self.leave(connection)
        created: Created | None = None
        started: Started | None = None
        if start:
            try:
                created, started = await self.start(cid, user, metadata)
            except ConversationStopped:
                log.debug("joined to read: it is stopped", conversation_id=cid)
        view = await self.views.acquire(cid)
        while connection in self.feeds:
            # Another join of the same connection was quicker; the last one counts.
            await self.leave(connection)
        feed = ClientFeed(self.node, view, connection, sink, user or "", after, tail)
        self.feeds[connection] = feed
        view.feeds.add(feed)
        feed.task = self.node.supervisor.spawn(f"feed {connection}", feed.run())
        self.records.client_joined(connection, cid)
        return view, created, started

    async def leave(self, connection: str) -> None:
        """Forget a connection."""
        feed = self.feeds.pop(connection, None)
        if feed is None:
            return
        self.records.client_left(connection)
        feed.view.feeds.discard(feed)
        # Shielded: who disconnects is often cancelled for that very reason, and nobody would do this later.
        await asyncio.shield(self._end_feed(feed))

    async def _end_feed(self, feed: ClientFeed) -> None:
        await cancel_and_wait(feed.task)
        await self.views.release(feed.view)

    # -- stop --------------------------------------------------------------------------------------------------

    async def stop(self, cid: str, reason: str) -> StopResult:
        """STOP and await the outcome. Raises `NotFound`, `InvalidRequest`, `PayloadTooLarge` (the reason)."""
        to_json(reason, REASON_BYTES, "the reason")
        view = await self.views.acquire(cid)
        try:
            deadline = boottime() + STOP_TIMEOUT_S
            fallbacks, result = self.node.fallbacks, await self._stop_once(cid, reason)
            while result == "stopping" and boottime() < deadline:
                # The owner obeys a numbered inbox entry; if it is buried meanwhile, STOP again finishes here.
                await view.wait_for(lambda: view.stopped_reason is not None and not view.sent_away, 0.5)
                result = await self._stop_again(cid, reason, fallbacks)
            if result != "stopping":
                await self._free_stopped(cid)
            return result
        finally:
            await self.views.release(view)

    async def _free_stopped(self, cid: str) -> None:
        """Whoever asked for the stop may start another at once: do not wait for the owner to give the slot back.

        The slot is read before the head. If the conversation is stopped then, whoever holds that slot value can only
        give it back (CLAIM is refused); a start after a resume has stamped it anew, and freeing is by nonce (I6).
        """
        meta = await self.node.store.head(cid)
        if meta is None or not meta.user:
            return
        slot = await self.node.store.slot(meta.user, cid)
        meta = await self.node.store.head(cid)
        if slot is not None and meta is not None and meta.status == "stopped" and not meta.owner:
            await self.admission.freed(await self.node.store.unreserve(meta.user, cid, slot.nonce))

    async def _stop_again(self, cid: str, reason: str, fallbacks: int) -> StopResult:
        """Look how the stop goes. A second STOP would hit what was resumed, so not unless the first may be lost."""
        meta = await self.node.store.head(cid)
        lost = meta is not None and meta.status == "running" and fallbacks != self.node.fallbacks
        if meta is None or (meta.status != "stopping" and not lost):
            return "stopped"
        return await self._stop_once(cid, reason) if lost or self._is_gone(cid, meta.owner) else "stopping"

    async def _stop_once(self, cid: str, reason: str, buried: str | None = None) -> StopResult:
        meta = await self.node.store.head(cid)
        if meta is None:
            raise NotFound(f"no conversation {cid}")
        if buried is None:
            buried = meta.owner if self._is_gone(cid, meta.owner) else ""
        # A stop closes them, and their deadlines may be far away.
        asks = await self.node.store.asks(cid) if meta.asks else ()
        reply = await self.node.store.stop(cid, self.node.incarnation, reason, buried)
        if reply.outcome == "NOT_FOUND":
            raise NotFound(f"no conversation {cid}")
        for ask_id in asks:
            await self.node.store.clear_timer(cid, f"{ASK_TIMER}{ask_id}")
        if reply.outcome == "STOPPING":
            return "stopping"
        if reply.outcome == "ALREADY":
            return "already_stopped"
        self.records.note(reply.user, cid)
        if reply.user and reply.nonce:
            waiting = await self.node.store.unreserve(reply.user, cid, reply.nonce)
            await self.admission.freed(waiting)
        if reply.user:
            await self.node.store.dequeue(reply.user, cid)
        return "stopped"

    async def finish_stop(self, cid: str, owner: str) -> None:
        """Recovery found a stop whose owner is buried: finish it. Its reason is in the inbox (I15)."""
        reason = "stopped"
        found = await self.node.store.inbox(cid)
        for entry in found[1] if found is not None else ():
            if entry.kind == "stop":
                reason = stop_reason(entry)
        await self._stop_once(cid, reason, buried=owner)

    def _is_gone(self, cid: str, owner: str) -> bool:
        if not owner:
            return False
        if self.node.owns(owner):
            return cid not in self.runners and not self.starter.is_starting(cid)
        return owner in self.node.buried

    async def erase(self, cid: str, timers: Collection[str] = ()) -> None:
        """ERASE after a stop, then archive and lists. Raises `OwnershipLost` if it was resumed meanwhile.

        Args:
            timers: of the conversation, besides those of its alarms.
        """
        store = self.node.store
        meta, alarms = await store.head(cid), await store.alarms(cid)
        if meta is None:
            raise NotFound(f"no conversation {cid}")
        if await store.erase(cid) != "OK":
            raise OwnershipLost("the conversation is still being stopped; try again", retry_after=1.0)
        await clear(self, cid, meta.user, (*alarms, *timers))

    # -- suspension and the end ---------------------------------------------------------------------------------

    async def suspend(self) -> None:
        """The lease is not good: nothing of the agents runs until it is (I7)."""
        for runner in self.runners.values():
            runner.view.set_override("recovering")
        await asyncio.gather(*(r.suspend() for r in list(self.runners.values())))

    async def resume(self) -> None:
        """The lease is good again and this node was not buried: nothing has moved."""
        self.views.reconnected()
        for runner in list(self.runners.values()):
            runner.view.set_override(None)
            runner.resume()

    async def drop_all(self) -> None:
        """End every runner without giving anything back: this incarnation is buried."""
        self.views.reconnected()
        await self.starter.aclose()
        await asyncio.gather(*(r.close() for r in list(self.runners.values())))

    async def close_clients(self) -> None:
        """Forget every client of this node."""
        for connection in list(self.feeds):
            await self.leave(connection)
