"""The manager of one process, over an in-memory or SQLite store. The clustered one extends it."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import dataclasses
import secrets
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from types import SimpleNamespace, TracebackType
from typing import Any, ClassVar, Final, Self

import structlog

from convener.core.cursor import Cursor
from convener.core.directory import LISTED
from convener.core.lease import LeaseTerms
from convener.core.model import Page
from convener.errors import (
    CallTimeout,
    ConfigurationError,
    ConvenerError,
    InvalidRequest,
    NotFound,
    OwnerUnavailable,
    RemoteError,
    StoreUnavailable,
)
from convener.ids import check_id, new_id, new_incarnation
from convener.manager import queries
from convener.manager.archiving import Archiving
from convener.manager.base import (
    AgentLoopInfo,
    ClientSink,
    ConversationHandle,
    ListedConversation,
    MoveResult,
)
from convener.manager.clock import boottime
from convener.manager.context import Agent, NodeContext, NodeOptions, RecordOnly
from convener.manager.draining import Drain
from convener.manager.engine import Engine
from convener.manager.health import Health
from convener.manager.jsontext import to_json
from convener.manager.lease import Lease
from convener.manager.listing import Lists, Show
from convener.manager.members import Members
from convener.manager.operating import Operating, Recheck
from convener.manager.recovery import Recovery
from convener.manager.requests import Requests
from convener.manager.retention import Sweep, clear, was_left
from convener.manager.sockets import SocketIOSink
from convener.manager.storage import Storage
from convener.manager.supervisor import Supervisor
from convener.manager.timers import Timers
from convener.manager.traits import traits_of
from convener.manager.views import View
from convener.store.archive import Archive, LogReader
from convener.store.base import Store
from convener.store.memory import MemoryStore
from convener.telemetry.metrics import Metrics
from convener.version import ARCHIVES

DEFAULT_LIMIT: Final = 3
MAX_CALL_S: Final = 3600.0
BURY_S: Final = 5.0
"""Time that a node which leaves waits for its store, all in all, to say so."""
LAST_TRY_S: Final = 0.5

log = structlog.get_logger(__name__)


"""Checks open connections of a user, of a conversation: how many were looked at, how many closed."""


@dataclass(eq=False)
class StandaloneConversationManager(Requests, Operating):
    """Runs conversations in this process.

    Args:
        sio: a python-socketio `AsyncServer` whose sockets are the clients; None if every join brings a sink.
        config: anything with `max_concurrent_conversations` (default 3); it is copied, never changed.
        server_config, file_store: kept for the application, not used here.
        agent: what answers messages; None to only record them.
        store: default a `MemoryStore`.
        options: settings of the node; the limit in them is taken from `config`.
        archive: where old log entries go; None to keep all of them in the store.
    """

    sio: Any = None
    config: Any = None
    file_store: Any = None
    server_config: Any = None
    agent: Agent | None = None
    store: Store | None = None
    options: NodeOptions | None = None
    archive: Archive | None = None
    metrics: Metrics = field(default_factory=Metrics)

    publishes: ClassVar[bool] = False
    _engine: Engine | None = field(default=None, init=False, repr=False)
    _lists: Lists = field(init=False, repr=False)
    _members: Members = field(init=False, repr=False)
    _recovery: Recovery = field(init=False, repr=False)
    _health: Health = field(init=False, repr=False)
    _drain: Drain = field(init=False, repr=False)
    _buried: bool = field(default=False, init=False, repr=False)
    _burying: float = field(default=0.0, init=False, repr=False)
    _recheck: Recheck | None = field(default=None, init=False, repr=False)
    _handles: dict[str, View] = field(default_factory=dict[str, View], init=False, repr=False)

    def __post_init__(self) -> None:
        """Raise this manager's own copy of the limit by one: registration comes first and counts itself (I6)."""
        own = SimpleNamespace(max_concurrent_conversations=DEFAULT_LIMIT) if self.config is None else self.config
        own = copy.copy(own)
        limit = getattr(own, "max_concurrent_conversations", None)
        if limit is None:
            limit = DEFAULT_LIMIT
        if isinstance(limit, bool) or not isinstance(limit, int) or limit < 1:
            raise ConfigurationError(f"max_concurrent_conversations must be a positive number, not {limit!r}")
        # A frozen copy is still only ours.
        object.__setattr__(own, "max_concurrent_conversations", limit + 1)
        self.config = own

    # -- life ----------------------------------------------------------------------------------------------------

    @property
    def engine(self) -> Engine:
        """The running node. Raises `ConfigurationError` before it was entered."""
        if self._engine is None:
            raise ConfigurationError("the manager is not running: enter it with `async with`")
        return self._engine

    @property
    def raised_limit(self) -> int:
        """The configured limit plus one."""
        return self.config.max_concurrent_conversations

    def _options(self) -> NodeOptions:
        options = self.options or NodeOptions(name=f"node-{secrets.token_hex(4)}")
        return dataclasses.replace(options, raised_limit=self.raised_limit)

    def _terms(self, options: NodeOptions) -> LeaseTerms | None:
        """None: the only process there is may always act."""
        return None

    def _make_store(self) -> Store:
        return MemoryStore()

    async def __aenter__(self) -> Self:
        if self._engine is not None:
            raise ConfigurationError("the manager is running already")
        store = self.store if self.store is not None else self._make_store()
        await store.open()
        options = self._options()
        metrics = self.metrics
        node = NodeContext(
            store=store,
            options=options,
            metrics=metrics,
            agent=self.agent if self.agent is not None else RecordOnly(),
            traits=traits_of(self.agent),
            supervisor=Supervisor(lambda name: metrics.background_restarts.labels(task=name.split(" ")[0]).inc()),
            lease=Lease(self._terms(options)),
            incarnation=new_incarnation(options.name),
            storage=Storage(options.store_high_watermark),
            logs=LogReader(store, self.archive),
        )
        self._engine = Engine(node, SocketIOSink(self.sio) if self.sio is not None else None, self.publishes)
        self._drain, self._buried, self._burying = Drain(self._engine, self._bury), False, BURY_S
        self._lists = Lists(node)
        try:
            await self._begin()
        except BaseException:
            engine, self._engine = self._engine, None
            await engine.node.supervisor.aclose()
            await store.close()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        engine = self._engine
        if engine is None:
            return
        try:
            await self._drain.run(engine.node.options.drain_timeout)
            await self._end()
        finally:
            await engine.close_clients()
            await engine.node.supervisor.aclose()
            await engine.node.store.close()
            self._engine = None
            self._handles.clear()

    async def _begin(self) -> None:
        """Become the only member, then finish what a former process left behind."""
        engine = self.engine
        self._members = Members(engine.node)
        self._recovery = Recovery(engine, self._members)
        await self._members.join()
        self._watch_health()
        engine.begin()
        await self._members.refresh()

    def _watch_health(self) -> None:
        node = self.engine.node
        self._health = Health(self.engine, self._members, node.options.ready_without_store)
        node.supervisor.keep("gauges", self._health.run)
        node.supervisor.keep("store's room", lambda: node.storage.watch(node.store, node.metrics))
        node.supervisor.keep("timers", Timers(self.engine, self._members.live).run)
        allowed = partial(self._members.all_speak, ARCHIVES)
        if self.archive is not None:
            archiving = Archiving(self.engine, self.archive, allowed)
            node.supervisor.keep("archive", archiving.run)
        if self.archive is not None or node.options.retention is not None:
            node.supervisor.keep("sweep", Sweep(self.engine, self._members.live, allowed).run)

    async def _end(self) -> None:
        """Nothing is owned any more, or recovery takes it."""
        await self.engine.starter.aclose()
        await self._drain.leave_behind()
        await self.engine.drop_all()
        await self._bury()

    async def _bury(self) -> None:
        """A clean exit buries itself. A second time does nothing, unless the store was away the first time.

        The waiting is bounded over all times: whoever ends this process kills it if it takes too long, and the others
        bury it all the same.
        """
        engine, begun = self.engine, boottime()
        if self._buried:
            return
        try:
            async with asyncio.timeout(max(self._burying, LAST_TRY_S)):
                with contextlib.suppress(StoreUnavailable):
                    await engine.records.flush()
                engine.records.close()
                with contextlib.suppress(StoreUnavailable):
                    await self._members.leave()
                    self._buried = True
        except TimeoutError:
            if self._burying > 0:
                log.warning("the store is away: others have to notice that this node has left")
        self._burying -= boottime() - begun
        engine.records.close()
        engine.node.lease.end()

    # -- starting ------------------------------------------------------------------------------------------------

    async def maybe_start_agent_loop(
        self,
        conversation_id: str,
        settings: Any = None,
        user_id: str | None = None,
        initial_user_msg: Any = None,
        *,
        metadata: Mapping[str, Any] | None = None,
        message_id: str | None = None,
    ) -> AgentLoopInfo:
        """See `ConversationManager`."""
        cid, user = check_id(conversation_id, "conversation_id"), queries.checked_user(user_id)
        text = self._metadata(settings, metadata)
        message = None if initial_user_msg is None else self._message(initial_user_msg, user, message_id)
        created, started = await self.engine.start(cid, user, text)
        if message is not None:
            await self.engine.send(cid, message, known=message_id is not None, reject_busy=False)
        info = await self.describe(cid)
        here = started is not None and started.here
        return dataclasses.replace(info, started_here=here, created=created.created)

    async def join_conversation(
        self,
        conversation_id: str,
        connection_id: str,
        settings: Any = None,
        user_id: str | None = None,
        after: Cursor | None = None,
        *,
        tail: int | None = None,
        sink: ClientSink | None = None,
        start: bool = True,
    ) -> AgentLoopInfo:
        """See `ConversationManager`."""
        cid, user = check_id(conversation_id, "conversation_id"), queries.checked_user(user_id)
        out = sink if sink is not None else self.engine.sink
        if out is None:
            raise ConfigurationError("the manager has no Socket.IO server and the connection brought no sink")
        text = self._metadata(settings, None)
        _, created, started = await self.engine.join(cid, connection_id, out, user, after, tail, text, start)
        info = await self.describe(cid)
        return dataclasses.replace(
            info,
            started_here=started is not None and started.here,
            created=created is not None and created.created,
        )

    def begin_replay(self, connection_id: str) -> None:
        """See `ConversationManager`."""
        feed = self.engine.feeds.get(connection_id) or self._lists.get(connection_id)
        if feed is not None:
            feed.begin()

    async def attach_to_conversation(
        self, conversation_id: str, user_id: str | None = None
    ) -> ConversationHandle | None:
        """See `ConversationManager`."""
        try:
            view = await self.engine.views.acquire(check_id(conversation_id, "conversation_id"))
        except NotFound:
            return None
        handle = ConversationHandle(view.cid, user_id or "", new_id())
        self._handles[handle.token] = view
        return handle

    async def detach_from_conversation(self, conversation: ConversationHandle) -> None:
        """See `ConversationManager`."""
        view = self._handles.pop(conversation.token, None)
        if view is not None:
            await self.engine.views.release(view)

    # -- the directory -------------------------------------------------------------------------------------------

    async def is_agent_loop_running(self, conversation_id: str) -> bool:
        """See `ConversationManager`."""
        found = self.engine.node.directory.find(conversation_id)
        return found is not None and found[1].status in LISTED

    async def get_running_agent_loops(
        self, user_id: str | None = None, filter_to_sids: Collection[str] | None = None
    ) -> set[str]:
        """See `ConversationManager`."""
        found = queries.listed(self.engine.node.directory, user_id, filter_to_sids)
        return {record.conversation_id for _, record in found}

    async def get_connections(
        self, user_id: str | None = None, filter_to_sids: Collection[str] | None = None
    ) -> dict[str, str]:
        """See `ConversationManager`."""
        return queries.connections(self.engine.node.directory, user_id, filter_to_sids)

    async def get_agent_loop_info(
        self, user_id: str | None = None, filter_to_sids: Collection[str] | None = None
    ) -> list[AgentLoopInfo]:
        """See `ConversationManager`."""
        directory = self.engine.node.directory
        found = queries.listed(directory, user_id, filter_to_sids)
        return [queries.info_of_record(directory, node, record) for node, record in found]

    # -- calls ---------------------------------------------------------------------------------------------------

    async def call(self, conversation_id: str, method: str, params: Any = None, timeout: float = 30.0) -> Any:
        """See `ConversationManager`."""
        cid, name = check_id(conversation_id, "conversation_id"), check_id(method, "method")
        if not 0 < timeout <= MAX_CALL_S:
            raise InvalidRequest(f"timeout must be above 0 and at most {MAX_CALL_S:.0f} seconds")
        to_json(params, self.engine.node.options.max_payload_bytes, "params")
        began, outcome = time.monotonic(), "ok"
        try:
            async with asyncio.timeout(timeout):
                return await self._call_owner(cid, name, params, timeout)
        except TimeoutError as error:
            outcome = "call_timeout"
            raise CallTimeout(f"{name} did not answer within {timeout:g} s") from error
        except ConvenerError as error:
            outcome = error.wire_code
            raise
        finally:
            self.metrics.rpc_duration.labels(outcome=outcome).observe(time.monotonic() - began)

    async def _call_owner(self, cid: str, method: str, params: Any, timeout: float) -> Any:
        """Here: the owner is this process, or nobody yet."""
        if self.engine.runner(cid) is None:
            await self.engine.starter.ensure(cid, "wake")
        return await self._serve_call(cid, method, params)

    async def _serve_call(self, cid: str, method: str, params: Any) -> Any:
        """Run a method of a conversation that this node owns.

        Raises:
            OwnerUnavailable: it does not (any more).
            NotFound: the agent has no such method.
            RemoteError: the method raised, or returned what is not JSON.
        """
        runner = self.engine.runner(cid)
        if runner is None or runner.over or not self.engine.node.lease.valid():
            raise OwnerUnavailable("the conversation has just moved; try again", retry_after=0.5)
        if runner.appender.held:
            raise OwnerUnavailable("whether this node still owns it is being verified; try again", retry_after=0.5)
        run = self.engine.node.agent.methods.get(method)
        if run is None:
            raise NotFound(f"the agent has no method {method}", code="method_not_found")
        try:
            result = await run(runner.conversation(), params)
            to_json(result, self.engine.node.options.max_payload_bytes, "the result")
        except Exception as error:
            detail = error.detail if isinstance(error, ConvenerError) else f"{type(error).__name__}: {error}"
            raise RemoteError(detail) from error
        return result

    async def request_llm_completion(
        self, conversation_id: str, service_id: str, messages: Sequence[Mapping[str, Any]], timeout: float = 60.0
    ) -> Any:
        """See `ConversationManager`."""
        params = {"service_id": service_id, "messages": list(messages)}
        return await self.call(conversation_id, "llm_completion", params, timeout)

    # -- ends ----------------------------------------------------------------------------------------------------

    async def disconnect_from_session(self, connection_id: str) -> None:
        """See `ConversationManager`."""
        await self.engine.leave(connection_id)
        await self._lists.remove(connection_id)

    async def move(self, conversation_id: str, node: str, *, cut: bool = False) -> MoveResult:
        """See `ConversationManager`. There is one node."""
        self._check_name(node)
        await self.describe(conversation_id)
        return "there"

    def get_agent_session(self, conversation_id: str) -> Any | None:
        """See `ConversationManager`."""
        return self.engine.runner(conversation_id)

    @classmethod
    def get_instance(
        cls, sio: Any, config: Any = None, file_store: Any = None, server_config: Any = None, **options: Any
    ) -> Self:
        """See `ConversationManager`."""
        return cls(sio=sio, config=config, file_store=file_store, server_config=server_config, **options)

    # -- what the gateway needs ----------------------------------------------------------------------------------

    async def describe(self, conversation_id: str) -> AgentLoopInfo:
        """See `ConversationManager`."""
        meta = await self.engine.node.store.head(check_id(conversation_id, "conversation_id"))
        if meta is None:
            raise NotFound(f"no conversation {conversation_id}")
        return queries.info_of_head(self.engine.node, conversation_id, meta)

    async def list_conversations(
        self, user_id: str, before: tuple[int, str] | None, limit: int
    ) -> Sequence[ListedConversation]:
        """See `ConversationManager`."""
        store = self.engine.node.store
        while True:
            rows = await store.list_user(user_id, before, limit)
            heads = await store.heads([cid for cid, _ in rows])
            found = [
                ListedConversation(queries.info_of_head(self.engine.node, cid, meta), activity)
                for (cid, activity), meta in zip(rows, heads, strict=True)
                if meta is not None
            ]
            for (cid, activity), meta in zip(rows, heads, strict=True):
                if meta is None and was_left(activity):
                    # Erased by a node that did not finish: nobody else knows whose list has it.
                    self.engine.node.supervisor.spawn(f"clear {cid}", clear(self.engine, cid, user_id))
            # Entered before creation, so an entry may be without a head; an empty page must still mean the end.
            if found or not rows:
                return found
            before = (rows[-1][1], rows[-1][0])

    async def set_metadata(self, conversation_id: str, metadata: Mapping[str, Any]) -> AgentLoopInfo:
        """See `ConversationManager`."""
        cid = check_id(conversation_id, "conversation_id")
        meta = await self.engine.node.store.set_metadata(cid, self._metadata(None, metadata))
        if meta is None:
            raise NotFound(f"no conversation {cid}")
        self.engine.records.note(meta.user, cid)
        return queries.info_of_head(self.engine.node, cid, meta)

    async def follow_list(
        self,
        user_id: str,
        connection_id: str,
        show: Show,
        *,
        sink: ClientSink | None = None,
    ) -> None:
        """See `ConversationManager`."""
        out = sink if sink is not None else self.engine.sink
        if out is None:
            raise ConfigurationError("the manager has no Socket.IO server and the connection brought no sink")
        await self._lists.add(connection_id, check_id(user_id, "user_id"), out, show)

    async def read_log(self, conversation_id: str, after: Cursor, limit: int) -> Page:
        """See `ConversationManager`."""
        page = await self.engine.node.logs.read(check_id(conversation_id, "conversation_id"), after, limit)
        if page is None:
            raise NotFound(f"no conversation {conversation_id}")
        return page
