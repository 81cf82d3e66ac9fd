"""The manager of a cluster: every node runs one, over Redis or Valkey.

What it adds to the standalone one: a lease that is renewed from a thread, other nodes and their burials, recovery
of what they leave, calls between nodes, and the listener that keeps the directory.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, ClassVar, Final, Self, cast

import structlog

from convener.core.directory import LISTED, LoopStatus, Record
from convener.core.lease import LeaseTerms
from convener.errors import (
    ConfigurationError,
    ConvenerError,
    NotFound,
    OwnershipLost,
    OwnerUnavailable,
    StoreUnavailable,
)
from convener.ids import check_id, new_incarnation
from convener.manager.base import MoveResult
from convener.manager.calls import Calls
from convener.manager.clock import boottime, wall_ms
from convener.manager.context import LAPSE_S, NodeOptions
from convener.manager.heartbeat import Heartbeat
from convener.manager.lease import Lease
from convener.manager.members import Members
from convener.manager.moving import Moves
from convener.manager.ops import DrainStatus
from convener.manager.recovery import Recovery
from convener.manager.standalone import StandaloneConversationManager
from convener.manager.sync import Sync
from convener.store.base import Store

log = structlog.get_logger(__name__)

TICK_S: Final = 0.1
HIBERNATE_TIMEOUT_S: Final = 2.0
START_TIMEOUT_S: Final = 15.0
KICK_TIMEOUT_S: Final = 5.0
STOP_NOTICE_S: Final = 2.0

OVERRIDES: Final = frozenset({"waiting", "recovering", "draining", "failed"})
"""Statuses that the log does not show."""


@dataclass(eq=False)
class ClusteredConversationManager(StandaloneConversationManager):
    """Runs conversations in a cluster; extends the standalone manager.

    Args:
        redis_url: the store; default `config`'s or `server_config`'s attribute of that name, then
            ``CONVENER_REDIS_URL``. Not needed if `store` is given.
        namespace: prefix of every key, so that several clusters can share a store.
    """

    redis_url: str | None = None
    namespace: str = "convener"

    publishes: ClassVar[bool] = True
    _calls: Calls = field(init=False, repr=False)
    _sync: Sync = field(init=False, repr=False)
    _moves: Moves = field(init=False, repr=False)
    _heartbeat: Heartbeat | None = field(default=None, init=False, repr=False)
    _rebirth: asyncio.Event = field(init=False, repr=False)

    # -- life ----------------------------------------------------------------------------------------------------

    def _terms(self, options: NodeOptions) -> LeaseTerms | None:
        terms = LeaseTerms(options.lease_ttl, options.renew_interval, options.fast_burial)
        if not terms.are_sound():
            raise ConfigurationError("lease_ttl less 2 s must be at least 4 renew_interval")
        return terms

    def _make_store(self) -> Store:
        url = self.redis_url
        for source in (self.config, self.server_config):
            url = url or getattr(source, "redis_url", None)
        url = url or os.environ.get("CONVENER_REDIS_URL")
        if not url:
            raise ConfigurationError("a clustered manager needs redis_url (or CONVENER_REDIS_URL)")
        # Imported here, so that a process without Redis does not load its client.
        from convener.store.redis import RedisStore

        return RedisStore(str(url), namespace=self.namespace)

    async def __aenter__(self) -> Self:
        """Join the cluster, then start all background work."""
        try:
            return await super().__aenter__()
        except BaseException:
            # Else its thread would go on renewing the lease of a node that is not there.
            if self._engine is None:
                await self._stop_heartbeat()
            raise

    async def _begin(self) -> None:
        engine = self.engine
        node, keep = engine.node, engine.node.supervisor.keep
        self._rebirth = asyncio.Event()
        self._members = Members(node)
        self._sync = Sync(node, self._members)
        self._recovery = Recovery(engine, self._members)
        self._calls = Calls(node)
        self._moves = engine.elsewhere = Moves(engine, self._members, self._calls)
        self._moves.drain_here = lambda timeout: self.drain(None, timeout)
        self._drain.others_wait = lambda: self._calls.serving
        self._serve()
        self._members.on_buried.append(self._on_buried)
        self._members.on_dead = self._rebirth.set
        self._sync.on_missed.append(self._lists.relist)
        engine.admission.poke = self._poke
        engine.hibernate_elsewhere = self._ask_to_hibernate
        engine.verifier.membership, engine.verifier.on_fallback = self._members.verify, self._members.fell_back
        self._watch_health()
        keep("event loop tick", self._tick)
        await self._live()
        keep("state listener", self._redis_subscribe)
        async with asyncio.timeout(node.options.start_timeout):
            await self._sync.subscribed.wait()
        await self._sync.read_all()
        engine.begin()
        keep("directory reader", self._sync.read_forever)
        keep("directory check", self._sync.reconcile_forever)
        keep("own records", engine.records.sweep_forever)
        keep("reaper", self._members.reap_forever)
        keep("forgetting", self._members.forget_forever)
        keep("lease watch", self._watch_lease)
        keep("new life", self._be_reborn)
        if node.options.rebalance:
            keep("balance", self._moves.balance.run)
        if node.options.fast_burial and (await node.store.info()).counts_subscribers:
            # Others may be able to, so this node acts no longer than if it could bury as well.
            keep("burial watch", self._members.look_forever)

    async def _live(self) -> None:
        """Join as the incarnation that the context names, and renew it."""
        node = self.engine.node
        await self._calls.open()
        await self._members.join()
        # Who renews before it is a member would be told that it is dead.
        self._start_heartbeat()
        await node.lease.wait_valid(node.options.start_timeout)
        await self._members.refresh()
        node.supervisor.spawn("supersede", self._members.supersede())

    def _start_heartbeat(self) -> None:
        node = self.engine.node
        heartbeat = Heartbeat(node, node.store.heartbeat_link, self._members.info, self._on_version, self._rebirth.set)
        self._heartbeat = heartbeat
        heartbeat.start()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Give everything back, bury this incarnation, end all background work."""
        try:
            await super().__aexit__(kind, error, trace)
        finally:
            await self._stop_heartbeat()

    async def _stop_heartbeat(self) -> None:
        heartbeat, self._heartbeat = self._heartbeat, None
        if heartbeat is not None:
            await heartbeat.stop()

    async def _end(self) -> None:
        self.engine.node.draining = True
        await super()._end()
        await self._stop_heartbeat()
        await self._calls.close()

    async def _bury(self) -> None:
        await super()._bury()
        if self._buried:
            await self._stop_heartbeat()

    async def _tick(self) -> None:
        """Show the heartbeat's thread that the event loop runs, and measure how late it does."""
        metrics = self.engine.node.metrics
        while True:
            due = boottime() + TICK_S
            await asyncio.sleep(TICK_S)
            metrics.event_loop_lag.set(max(boottime() - due, 0.0))
            metrics.lease_margin.set(max(self.engine.node.lease.margin(), 0.0))
            if self._heartbeat is not None:
                self._heartbeat.tick()

    def _on_version(self, version: int) -> None:
        if version != self._members.state.version:
            self.engine.node.supervisor.spawn("read members", self._read_members())

    async def _read_members(self) -> None:
        """Read them until that succeeds: nobody tells of a version twice, and an unknown burial breaks I11."""
        while True:
            try:
                return await self._members.refresh()
            except ConvenerError as error:
                log.info("cannot read the members, again", error=str(error))
                await asyncio.sleep(0.5)

    def _on_buried(self, incarnation: str) -> None:
        self._calls.fail(incarnation)
        for view in self.engine.views:
            if view.owner == incarnation:
                view.wake()

    async def _watch_lease(self) -> None:
        """Suspend when the lease is not good, resume when it is again and nothing was taken (I7)."""
        engine = self.engine
        while True:
            lease = engine.node.lease
            if lease.valid():
                await asyncio.sleep(min(max(lease.margin() / 2, 0.02), 0.25))
                continue
            if lease.ended:
                # A new life has a new one; a node that has left has none.
                await asyncio.sleep(0.25)
                continue
            log.warning("suspended: the lease is not good", node=engine.node.incarnation)
            await engine.suspend()
            await self._until_valid(lease)
            if lease is engine.node.lease and lease.valid():
                log.info("the lease is good again", node=engine.node.incarnation)
                await engine.resume()
            else:
                await asyncio.sleep(0.05)

    async def _until_valid(self, lease: Lease) -> None:
        """Return when the lease is good, or over. What takes longer is told the clients of all conversations."""
        with contextlib.suppress(OwnershipLost):
            await lease.wait_valid(LAPSE_S)
        if not (lease.valid() or lease.ended):
            self.engine.views.cut_off()
            with contextlib.suppress(OwnershipLost):
                await lease.wait_valid()

    async def _be_reborn(self) -> None:
        """This incarnation was buried: end everything of it, and await that, then join as a new one."""
        node = self.engine.node
        while True:
            await self._rebirth.wait()
            if await self._was_lost():
                continue
            old, alive = node.incarnation, False
            if node.draining:
                node.lease.end()
            else:
                log.warning("buried: a new life begins", node=old)
            try:
                while not (alive or node.draining):
                    await self._end_life()
                    alive = await self._try_to_live(old)
            except Exception:
                # Half-way between two lives nothing else would ever bring this node back.
                self._rebirth.set()
                raise
            self._recovery.walk(old)
            if node.draining:
                self._rebirth.clear()

    async def _was_lost(self) -> bool:
        """Whether this node is no member only because the store has fallen back to before it joined: then it is one
        again. Who is buried stays so (I10); a burial that was lost as well is written again by whoever remembers it.
        """
        node = self.engine.node
        if node.draining or node.lease.ended:
            return False
        try:
            state = await node.store.membership()
            if node.incarnation in state.dead or node.incarnation in state.members:
                return False
            log.warning("the store has lost that this node is a member", node=node.incarnation)
            self._rebirth.clear()
            self.engine.verifier.suspect()
            await self._stop_heartbeat()
            await self._members.join()
        except OwnershipLost:
            self._rebirth.set()
            return False
        except ConvenerError as error:
            log.info("cannot join again", node=node.incarnation, error=str(error))
            await asyncio.sleep(0.2)
            self._rebirth.set()
            return True
        self._start_heartbeat()
        return True

    async def _end_life(self) -> None:
        """End everything of this incarnation, then be another one."""
        node = self.engine.node
        node.lease.end()
        await self._stop_heartbeat()
        await self.engine.drop_all()
        await self._calls.close()
        node.directory.forget(node.incarnation)
        node.incarnation = new_incarnation(node.options.name)
        # Heartbeat and membership both tell of a burial; until here they meant the old life.
        self._rebirth.clear()
        node.lease = Lease(self._terms(node.options))
        self.engine.records.new_life()
        self.engine.admission.new_life()

    async def _try_to_live(self, old: str) -> bool:
        """Join. A failed try ends that life too: by the time that it is repeated it may be buried for ever (I10)."""
        try:
            # A store that fell back may know neither that nor the member; nobody would recover what it owned (I11).
            await self.engine.node.store.rebury([old])
            await self._live()
        except ConvenerError as error:
            log.info("cannot join, again", node=self.engine.node.incarnation, error=str(error))
            with contextlib.suppress(ConvenerError):
                await self._members.leave()
            await asyncio.sleep(0.5)
            return False
        return True

    @property
    def heartbeat(self) -> Heartbeat | None:
        """The thread that renews the lease; None before it was started."""
        return self._heartbeat

    # -- the three methods that its own background tasks use ---------------------------------------------------------

    async def _redis_subscribe(self) -> None:
        """Subscribe to the state channel and listen until cancelled."""
        await self._sync.listen(self._process_message)

    async def _process_message(self, message: dict[str, Any]) -> None:
        """Handle one state message of another node.

        Args:
            message: ``type`` (``status_update``, ``conversation_stopped``, ``new_conversation``,
                ``conversation_changed``: it has no record, or nothing that a record shows), ``conversation_id``,
                ``source_node``, and with a status ``new_status``; from convener's own nodes also ``user_id``,
                ``epoch``, ``nonce``, ``since``. Malformed ones are counted and skipped.
        """
        kind, cid, source = message.get("type"), message.get("conversation_id"), message.get("source_node")
        if not (isinstance(kind, str) and isinstance(cid, str) and isinstance(source, str)):
            self._skip(message)
            return
        if self.engine.node.owns(source):
            return
        if kind == "conversation_stopped":
            self.engine.node.directory.drop(source, cid)
            epoch: Any = message.get("epoch")
            self._stopped_elsewhere(cid, str(message.get("reason", "")), epoch if isinstance(epoch, int) else None)
        elif kind in ("status_update", "new_conversation"):
            self._status_elsewhere(kind, cid, source, message)
        elif kind != "conversation_changed":
            self._skip(message)
            return
        # Its record may never have been told of, or be gone; lists must look at it all the same.
        self.engine.node.directory.announce(str(message.get("user_id", "")), cid)

    def _skip(self, message: Mapping[str, Any]) -> None:
        self.metrics.malformed.labels(where="sync").inc()
        log.warning("malformed state message skipped", type=str(message.get("type"))[:64])

    def _status_elsewhere(self, kind: str, cid: str, source: str, message: Mapping[str, Any]) -> None:
        status = message.get("new_status", "idle" if kind == "new_conversation" else None)
        epoch, since = message.get("epoch"), message.get("since", wall_ms())
        if not isinstance(status, str) or not isinstance(epoch, int | None) or not isinstance(since, int):
            self._skip(message)
            return
        directory = self.engine.node.directory
        known = directory.find(cid)
        if status not in LISTED and status != "starting":
            directory.drop(source, cid)
        else:
            user = message.get("user_id", known[1].user if known is not None else "")
            at = epoch if epoch is not None else known[1].epoch if known is not None else 0
            record = Record(cid, str(user), cast(LoopStatus, status), at, str(message.get("nonce", "")), since)
            directory.put(source, record)
        view = self.engine.views.get(cid)
        if view is None:
            return
        if epoch is not None and epoch > view.epoch and status in LISTED:
            # An owner that this node has not heard of: its `open` entry was missed.
            view.fall_behind()
        elif epoch is None or status in OVERRIDES:
            view.set_override(cast(LoopStatus, status))
        elif view.override is not None:
            view.set_override(None)

    def _stopped_elsewhere(self, cid: str, reason: str, epoch: int | None) -> None:
        view = self.engine.views.get(cid)
        if view is not None and view.feeds:
            view.fall_behind()
            self.engine.node.supervisor.spawn(f"stopped {cid}", self._disconnect_clients(cid, reason, epoch))

    async def _disconnect_clients(self, cid: str, reason: str, epoch: int | None) -> None:
        """The `stopped` entry of the log sends clients away in order; who is still there after a while goes too.

        Args:
            epoch: which ownership was stopped, if that is known: news may be older than a resumption.
        """
        try:
            view = await self.engine.views.acquire(cid)
        except (NotFound, StoreUnavailable):
            return
        try:
            if await view.wait_for(lambda: not view.feeds, STOP_NOTICE_S):
                return
            head = None if epoch is None else await self.engine.node.store.head(cid)
            if head is not None and (head.status != "stopped" or head.epoch > (epoch or 0)):
                return
            if view.stopped_reason is None:
                view.force_stopped(reason)
        except StoreUnavailable as error:
            log.info("cannot look whether it is stopped still", conversation_id=cid, error=str(error))
        finally:
            await self.engine.views.release(view)

    async def _update_state_in_redis(self) -> None:
        """Write the changed state of the conversations owned here to the node's hash and publish the notifications.

        Raises:
            StoreUnavailable: the outcome is unknown; nothing is forgotten, the next call writes it again.
        """
        await self.engine.records.flush()

    # -- between nodes -----------------------------------------------------------------------------------------------

    def _serve(self) -> None:
        self._calls.serve("hibernate", self._serve_hibernate)
        self._calls.serve("start", self._serve_start)
        self._calls.serve("kick", self._serve_kick)
        self._calls.serve("call", self._serve_remote_call)

    async def _serve_hibernate(self, body: Mapping[str, Any]) -> bool:
        return await self.engine.hibernate(str(body.get("conversation_id")))

    async def _serve_start(self, body: Mapping[str, Any]) -> bool:
        await self.engine.admission.retry(str(body.get("conversation_id")))
        return True

    async def _serve_remote_call(self, body: Mapping[str, Any]) -> Any:
        return await self._serve_call(str(body.get("conversation_id")), str(body.get("method")), body.get("params"))

    async def _ask_to_hibernate(self, cid: str, incarnation: str) -> bool:
        try:
            body = {"conversation_id": cid}
            return await self._calls.ask(incarnation, "hibernate", body, HIBERNATE_TIMEOUT_S) is True
        except OwnerUnavailable:
            return False

    async def kick(self, user_id: str | None, conversation_id: str | None) -> tuple[int, int]:
        """See `Operations`."""
        body = {"user_id": user_id, "conversation_id": conversation_id}
        others = [name for name in self._members.state.members if not self.engine.node.owns(name)]
        asked = [self._calls.ask(name, "kick", body, KICK_TIMEOUT_S) for name in others]
        answers = await asyncio.gather(super().kick(user_id, conversation_id), *asked, return_exceptions=True)
        # A node that does not answer looks at its connections by itself, every few seconds.
        good = [(answer[0], answer[1]) for answer in answers if isinstance(answer, tuple | list)]
        return sum(checked for checked, _ in good), sum(closed for _, closed in good)

    async def _serve_kick(self, body: Mapping[str, Any]) -> tuple[int, int]:
        return await super().kick(body.get("user_id"), body.get("conversation_id"))

    async def drain(self, node: str | None = None, timeout: float | None = None) -> DrainStatus:
        """See `Operations`."""
        if node in (None, self.engine.node.options.name, self.engine.node.incarnation):
            return await super().drain(None, timeout)
        return await self._moves.drain(str(node), timeout)

    async def move(self, conversation_id: str, node: str, *, cut: bool = False) -> MoveResult:
        """See `ConversationManager`."""
        return await self._moves.move(check_id(conversation_id, "conversation_id"), node, cut=cut)

    async def _poke(self, waiting: Any) -> None:
        body = {"conversation_id": waiting.conversation_id}
        self.engine.node.supervisor.spawn("poke", self._ask_to_start(waiting.incarnation, body))

    async def _ask_to_start(self, incarnation: str, body: Mapping[str, Any]) -> None:
        # Lost or refused: every node tries its waiting starts again by itself.
        with contextlib.suppress(ConvenerError):
            await self._calls.ask(incarnation, "start", body, START_TIMEOUT_S)

    async def _call_owner(self, cid: str, method: str, params: Any, timeout: float) -> Any:
        if self.engine.runner(cid) is not None:
            return await self._serve_call(cid, method, params)
        meta = await self.engine.node.store.head(cid)
        owner, epoch = ("", 0) if meta is None else (meta.owner, meta.epoch)
        if not self.engine.is_answering(cid, owner):
            started = await self.engine.starter.ensure(cid, "wake")
            owner, epoch = started.owner, started.epoch
        if self.engine.node.owns(owner):
            return await self._serve_call(cid, method, params)
        body = {"conversation_id": cid, "method": method, "params": params, "epoch": epoch}
        return await self._calls.ask(owner, "call", body, timeout)
