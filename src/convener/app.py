"""`Convener`: an application around an agent; itself an ASGI application.

::

    from convener import Convener, Turn

    app = Convener()

    @app.agent
    async def assistant(turn: Turn) -> None:
        await turn.reply({"text": f"You said: {turn.text}"})

``uvicorn app:app``, ``convener serve app:app`` and ``convener up app:app`` all run it. With a Redis URL in the settings
it is a node of a cluster, without one it stands alone.
"""

from __future__ import annotations

import asyncio
import dataclasses
import inspect
import signal
import threading
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator, Mapping, MutableMapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager
from types import FrameType, SimpleNamespace
from typing import Any, Protocol, TypeVar, overload

import structlog

from convener.assembly import make_archive, make_store, options_of
from convener.errors import ConfigurationError
from convener.gateway.access import AuthorizeHook
from convener.gateway.asgi import Gateway
from convener.gateway.auth import AuthenticateHook
from convener.gateway.problems import refuse
from convener.gateway.socketio import make_server
from convener.ids import check_id
from convener.manager.clustered import ClusteredConversationManager
from convener.manager.context import RecoveryMode
from convener.manager.conversation import Conversation
from convener.manager.loops import LoopFunction
from convener.manager.standalone import StandaloneConversationManager
from convener.manager.threads import run_in_thread
from convener.manager.traits import DictCodec, Interrupted, Migrate, ModelCodec, Traits
from convener.manager.turn import Turn
from convener.settings import Settings
from convener.telemetry.metrics import Metrics

log = structlog.get_logger(__name__)

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

AgentFunction = Callable[[Turn[Any]], Awaitable[None] | None]
RecoverFunction = Callable[[Interrupted], Awaitable[RecoveryMode | None] | RecoveryMode | None]
Method = Callable[[Conversation, Any], Any]
LimitFunction = Callable[[str], int | Awaitable[int | None] | None]

AgentT = TypeVar("AgentT", bound=AgentFunction)
LoopT = TypeVar("LoopT", bound=LoopFunction)
RecoverT = TypeVar("RecoverT", bound=RecoverFunction)
MethodT = TypeVar("MethodT", bound=Method)
LimitT = TypeVar("LimitT", bound=LimitFunction)
AuthenticateT = TypeVar("AuthenticateT", bound=AuthenticateHook)
AuthorizeT = TypeVar("AuthorizeT", bound=AuthorizeHook)


class _UserAgent:
    """The decorated functions, as the managers want them."""

    def __init__(self) -> None:
        self.function: AgentFunction | None = None
        self.traits = Traits()
        self.methods: dict[str, Callable[[Conversation, Any], Awaitable[Any]]] = {}
        self.limit_function: LimitFunction | None = None

    async def run(self, turn: Turn[Any]) -> None:
        """Answer one message; a plain function gets a thread, so that it cannot block the node."""
        function = self.function
        if function is None:
            raise ConfigurationError("the application has no agent: decorate a function with @app.agent")
        if inspect.iscoroutinefunction(function):
            await function(turn)
        else:
            result = await run_in_thread(function, turn)
            if inspect.isawaitable(result):
                await result

    async def limit(self, user_id: str) -> int | None:
        """The user's own limit."""
        if self.limit_function is None:
            return None
        limit = self.limit_function(user_id)
        return await limit if inspect.isawaitable(limit) else limit


class NotStarted(ConfigurationError):
    """The application is asked for something and does not run: nobody runs its lifespan, or that has ended."""

    code = "not_started"
    http_status = 503


class Mountable(Protocol):
    """An application that others can be mounted on: Starlette, FastAPI."""

    def mount(self, path: str, app: Any, name: str | None = None) -> None:
        """Serve `app` below `path`."""
        ...


class Convener:
    """The application.

    Args:
        settings: default `Settings()`, read from environment and ``convener.toml`` when the application starts.
    """

    def __init__(self, settings: Settings | None = None) -> None:
        self._settings = settings
        self._agent = _UserAgent()
        self._authenticate: AuthenticateHook | None = None
        self._authorize: AuthorizeHook | None = None
        self._gateway: Gateway | None = None
        self._manager: StandaloneConversationManager | None = None
        self._mounted_at: str | None = None
        self._refused = False

    # -- decorators ----------------------------------------------------------------------------------------------

    @overload
    def agent(self, function: AgentT, /) -> AgentT: ...

    @overload
    def agent(
        self, /, *, state: type[Any] | None = None, version: int = 1, migrate: Migrate | None = None
    ) -> Callable[[AgentT], AgentT]: ...

    def agent(
        self,
        function: AgentT | None = None,
        /,
        *,
        state: type[Any] | None = None,
        version: int = 1,
        migrate: Migrate | None = None,
    ) -> AgentT | Callable[[AgentT], AgentT]:
        """The agent: one call per message, in order, one at a time per conversation. A plain function is run in a
        thread. ``@app.agent``, or with the form of its state: ``@app.agent(state=Basket, version=2, migrate=older)``.

        Args:
            state: a msgspec struct, a dataclass or a pydantic model that can be made without arguments; default a
                dict. The agent then takes a ``Turn[Basket]``.
            version: of that form; 0 is what was written without one.
            migrate: ``f(version, data)`` gives the data of an older version in the present form.

        Raises:
            ConfigurationError: there is an agent already, or the state is none of these.
        """
        codec = DictCodec() if state is None else ModelCodec(state, version, migrate)

        def decorate(function: AgentT) -> AgentT:
            self._check_vacant()
            self._agent.function = function
            self._agent.traits = dataclasses.replace(self._agent.traits, codec=codec)
            return function

        return decorate if function is None else decorate(function)

    @overload
    def loop(self, function: LoopT, /) -> LoopT: ...

    @overload
    def loop(
        self,
        /,
        *,
        hibernate: bool = True,
        state: type[Any] | None = None,
        version: int = 1,
        migrate: Migrate | None = None,
    ) -> Callable[[LoopT], LoopT]: ...

    def loop(
        self,
        function: LoopT | None = None,
        /,
        *,
        hibernate: bool = True,
        state: type[Any] | None = None,
        version: int = 1,
        migrate: Migrate | None = None,
    ) -> LoopT | Callable[[LoopT], LoopT]:
        """An agent that acts by itself: ``async f(loop)`` runs as long as a conversation is loaded, on its one owner,
        and takes its turns from ``loop.turns()``. It is begun again after whatever cut it off.

        Args:
            hibernate: False to keep idle conversations in memory (they hold their slots).
            state, version, migrate: as for `agent`.

        Raises:
            ConfigurationError: there is an agent already, the function is not async, or the state is none.
        """
        codec = DictCodec() if state is None else ModelCodec(state, version, migrate)

        def decorate(function: LoopT) -> LoopT:
            self._check_vacant()
            if not inspect.iscoroutinefunction(function):
                raise ConfigurationError("a loop must be an async function")
            self._agent.traits = dataclasses.replace(
                self._agent.traits, codec=codec, loop=function, hibernates=hibernate, keeps_running=True
            )
            return function

        return decorate if function is None else decorate(function)

    def _check_vacant(self) -> None:
        if self._agent.function is not None or self._agent.traits.loop is not None:
            raise ConfigurationError("the application has an agent already")

    def on_recover(self, function: RecoverT) -> RecoverT:
        """What becomes of a turn that was cut off when its node went down: ``f(interrupted)``, plain or async, returns
        "resume" (repeat it; finished steps are not run again), "wait" (until somebody says `resume`), "fail" (give it
        up), or None for the setting `recovery`. It is asked on the node that has taken the conversation over.
        """

        async def recover(interrupted: Interrupted) -> RecoveryMode | None:
            mode = function(interrupted)
            return await mode if inspect.isawaitable(mode) else mode

        self._agent.traits = dataclasses.replace(self._agent.traits, recover=recover)
        return function

    def rpc(self, name: str) -> Callable[[MethodT], MethodT]:
        """A method that can be called from anywhere and runs where the conversation is:
        ``f(conversation, params)``, plain or async; it returns a JSON value.
        """
        check_id(name, "name")

        def decorate(function: MethodT) -> MethodT:
            if name in self._agent.methods:
                raise ConfigurationError(f"the application has a method {name} already")

            async def run(conversation: Conversation, params: Any) -> Any:
                if inspect.iscoroutinefunction(function):
                    return await function(conversation, params)
                return await run_in_thread(function, conversation, params)

            self._agent.methods[name] = run
            return function

        return decorate

    def limit(self, function: LimitT) -> LimitT:
        """A user's own limit: ``f(user_id)`` returns a number, or None for the configured one."""
        self._agent.limit_function = function
        return function

    def authenticate(self, function: AuthenticateT) -> AuthenticateT:
        """Who calls, for ``auth=hook``: ``async f(token, headers)`` returns an `Identity`, or None for a stranger."""
        self._authenticate = function
        return function

    def authorize(self, function: AuthorizeT) -> AuthorizeT:
        """Who may do what: ``async f(identity, conversation_id, owner, action)`` returns True, False, or None to
        leave it to the default (everybody their own).
        """
        self._authorize = function
        return function

    # -- settings ------------------------------------------------------------------------------------------------

    def configure(self, settings: Settings) -> None:
        """Use these settings. Raises `ConfigurationError` once the application runs."""
        if self._gateway is not None:
            raise ConfigurationError("the application runs already; its settings are fixed")
        self._settings = settings

    @property
    def settings(self) -> Settings:
        """The settings in force."""
        if self._settings is None:
            self._settings = Settings()
        return self._settings

    @property
    def manager(self) -> StandaloneConversationManager:
        """The running conversation manager. Raises `NotStarted` before the application has started."""
        if self._manager is None:
            raise NotStarted("the application has not started")
        return self._manager

    # -- ASGI ----------------------------------------------------------------------------------------------------

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one ASGI connection, the lifespan included."""
        if scope["type"] == "lifespan":
            await self._serve_lifespan(receive, send)
            return
        if self._gateway is None:
            await self._refuse(scope, receive, send)
        else:
            await self._gateway(scope, receive, send)

    def lifespan(self, app: Any) -> AbstractAsyncContextManager[None]:
        """Start and end with another application: ``FastAPI(lifespan=app.lifespan)``, or
        ``async with app.lifespan(other):`` around the ``yield`` of a lifespan of its own.

        Args:
            app: that application; only there because frameworks give it.

        Raises:
            ConfigurationError: the settings cannot work, or the application runs already.
            StoreUnavailable: the store cannot be reached.
        """
        return self._running()

    def mount_on(self, other: Mountable, path: str = "/agents") -> None:
        """Mount on a Starlette or FastAPI application, whose lifespan has to run `lifespan`: those of mounted
        applications do not run by themselves. Everything is then below `path`, Socket.IO at ``path/socket.io/``.

        Raises:
            ConfigurationError: `path` does not begin with a slash, or the application is mounted already.
        """
        if not path.startswith("/"):
            raise ConfigurationError(f"path: {path!r} does not begin with a slash")
        if self._mounted_at is not None:
            raise ConfigurationError(f"the application is mounted already, at {self._mounted_at}; it runs once")
        self._mounted_at = path
        other.mount(path, self)

    async def _refuse(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request that comes while nothing runs: the lifespan was forgotten, or has ended."""
        error = NotStarted(
            "convener does not run here: give its lifespan to the application that it is mounted on, as in "
            "FastAPI(lifespan=app.lifespan), or serve it with its lifespan on"
        )
        if not self._refused:
            self._refused = True
            log.error("asked for something, and not started", path=scope["path"], detail=error.detail)
        await refuse(error, scope, receive, send)

    @asynccontextmanager
    async def _running(self) -> AsyncGenerator[None]:
        if self._gateway is not None:
            raise ConfigurationError("the application runs already")
        settings = self.settings
        metrics, sio = Metrics(), make_server(settings)
        manager = self._make_manager(settings, metrics, sio)
        gateway = Gateway(
            manager,
            manager,
            settings,
            metrics,
            sio=sio,
            authenticate=self._authenticate,
            authorize=self._authorize,
        )
        self._gateway, self._manager = gateway, manager
        try:
            async with gateway.running():
                with _first_to_hear_of_the_end(gateway):
                    yield
        finally:
            self._gateway = self._manager = None

    async def _serve_lifespan(self, receive: Receive, send: Send) -> None:
        await receive()
        running = self._running()
        try:
            await running.__aenter__()
        except Exception as error:
            await send({"type": "lifespan.startup.failed", "message": str(error)})
            return
        await send({"type": "lifespan.startup.complete"})
        await receive()
        try:
            await running.__aexit__(None, None, None)
        except Exception as error:
            await send({"type": "lifespan.shutdown.failed", "message": str(error)})
            return
        await send({"type": "lifespan.shutdown.complete"})

    def _make_manager(self, settings: Settings, metrics: Metrics, sio: Any) -> StandaloneConversationManager:
        options = options_of(settings)
        shared: Mapping[str, Any] = {
            "sio": sio,
            "config": SimpleNamespace(max_concurrent_conversations=settings.max_concurrent_conversations),
            "agent": self._agent,
            "options": options,
            "metrics": metrics,
            "archive": make_archive(settings),
        }
        store = make_store(settings)
        if settings.redis_url is not None:
            return ClusteredConversationManager(store=store, **shared)
        return StandaloneConversationManager(store=store, **shared)


@contextmanager
def _first_to_hear_of_the_end(gateway: Gateway) -> Generator[None]:
    """Drain when the signal comes, then hand the signal on to the server's own handler; at once if it comes twice.

    A server by itself would cut sockets, wait for open responses, and end the lifespan last, and an event stream has
    no end of its own.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    loop = asyncio.get_running_loop()
    ending: set[asyncio.Task[None]] = set()
    previous = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def hand_on(number: int) -> None:
        handler = previous[signal.Signals(number)]
        if callable(handler):
            handler(number, None)

    async def leave(number: int) -> None:
        try:
            await gateway.drain()
        finally:
            hand_on(number)

    def begin(number: int) -> None:
        if not ending:
            ending.add(loop.create_task(leave(number)))
        elif not gateway.hurried:
            # Asked twice: whoever asks wants the end now. The first signal is handed on as soon as that is under way.
            gateway.hurry()
        else:
            hand_on(number)

    def heard(number: int, _: FrameType | None) -> None:
        loop.call_soon_threadsafe(begin, number)

    # Only where a server listens for the signal: without one, its default action must stay.
    taken = [number for number, handler in previous.items() if callable(handler)]
    for number in taken:
        signal.signal(number, heard)
    try:
        yield
    finally:
        for number in taken:
            if signal.getsignal(number) is heard:
                signal.signal(number, previous[number])
