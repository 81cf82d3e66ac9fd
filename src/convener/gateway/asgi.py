"""The gateway as an ASGI application: lifespan, routing, limits, and the last line of defence."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, MutableMapping
from contextlib import asynccontextmanager
from typing import Any, Final

import socketio
import structlog

from convener.errors import ConvenerError, InvalidRequest, NotAuthorized, PayloadTooLarge
from convener.gateway.access import Access, AuthorizeHook
from convener.gateway.auth import AuthenticateHook, make_authenticator
from convener.gateway.context import GatewayContext
from convener.gateway.departure import Departure
from convener.gateway.farewell import CLOSED
from convener.gateway.http import make_api, make_health
from convener.gateway.operations import Operations
from convener.gateway.opsport import ops_port
from convener.gateway.packets import filter_frames
from convener.gateway.problems import UNREADABLE, problem_of
from convener.gateway.sessions import INTERVAL, Sessions
from convener.gateway.socketio import SocketGateway
from convener.manager.base import ConversationManager
from convener.manager.sockets import SocketIOSink
from convener.manager.supervisor import Supervisor
from convener.settings import Settings
from convener.settings_checks import is_loopback_or_name
from convener.telemetry.metrics import Metrics

log = structlog.get_logger(__name__)

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

SOCKET_PATH: Final = "/socket.io"


class Gateway:
    """One node's doors, as an ASGI application.

    Its lifespan enters and exits the manager; inside another application, use `running` in that one's lifespan.

    Args:
        manager: not entered yet.
        operations: usually the manager as well.
        sio: the server that the manager emits through (`convener.gateway.socketio.make_server`).
        authenticate: the application's own function, for auth=hook.
        authorize: the application's own rule of who may do what.
        prefix: path under which a proxy passes everything on, without removing it. (Mounted in another
            application, the path is known from the request.)

    Raises:
        ConfigurationError: `authenticate` and settings do not fit together.
    """

    def __init__(
        self,
        manager: ConversationManager,
        operations: Operations,
        settings: Settings,
        metrics: Metrics,
        *,
        sio: socketio.AsyncServer,
        authenticate: AuthenticateHook | None = None,
        authorize: AuthorizeHook | None = None,
        prefix: str = "",
    ) -> None:
        access = Access(manager, make_authenticator(settings, authenticate), authorize)
        self.context = GatewayContext(manager, operations, settings, metrics, access, Sessions(access, metrics))
        self.api = make_api(self.context)
        self._sio: Any = sio
        self.sockets = SocketGateway(sio, self.context)
        self._departure = Departure(self.context, SocketIOSink(sio))
        self._prefix = prefix.rstrip("/")

    # -- life --------------------------------------------------------------------------------------------------

    @asynccontextmanager
    async def running(self) -> AsyncGenerator[None]:
        """Run manager and background work; raises what the manager's start raises."""
        try:
            settings = self.context.settings
            health = ops_port(make_health(self.context), settings.host, settings.ops_port)
            # The port first: a node that cannot be watched must not have joined.
            async with health, self.context.manager:
                supervisor = Supervisor(self._count_restart)
                supervisor.keep("recheck", self._recheck)
                self.context.running, self.context.closing, self.context.leaving = True, False, False
                self._departure.reset()
                self.context.operations.on_drain(self._departure.say_farewell)
                self.context.operations.on_kick(self.context.sessions.recheck)
                try:
                    yield
                finally:
                    await self.begin_shutdown()
                    self.context.running = False
                    await supervisor.aclose()
        finally:
            # After the manager has said farewell through it.
            await self._sio.shutdown()

    def _count_restart(self, name: str) -> None:
        self.context.metrics.background_restarts.labels(task=name).inc()

    async def drain(self) -> None:
        """Leave without dropping anything: unready at once; after `shutdown_delay` nothing new comes in; conversations
        hibernate or move, and their clients are sent away; requests under way are answered. Returns when that is done,
        within about `drain_timeout`.

        Whoever takes the signal has to call this: a server by itself would cut the sockets first, wait for open
        responses, and end the lifespan last.
        """
        await self._departure.drain()

    def hurry(self) -> None:
        """End at once, no worse than a crash; `drain` returns then."""
        self._departure.hurry()

    @property
    def hurried(self) -> bool:
        """Whether `hurry` was called."""
        return self._departure.hurried

    async def begin_shutdown(self) -> None:
        """Be unready from now on, take no new connections, end the event streams. A second time does nothing."""
        self.context.leaving = self.context.closing = True
        await self.context.sessions.close_all("sse")

    async def _recheck(self) -> None:
        silent: set[str] = set()
        while True:
            await asyncio.sleep(INTERVAL)
            await self.context.sessions.recheck()
            silent = await self.sockets.sweep(silent)

    # -- requests ----------------------------------------------------------------------------------------------

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI 3."""
        if scope["type"] == "lifespan":
            await self._lifespan(receive, send)
        elif scope["type"] in ("http", "websocket"):
            await self._guard(scope, receive, send)

    async def _guard(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer what nobody foresaw, if there still can be an answer."""
        begun, task = False, asyncio.current_task()

        async def noted(message: MutableMapping[str, Any]) -> None:
            nonlocal begun
            begun = True
            if message["type"] == "http.response.start":
                message = self._departure.marked(message)
                if task is not None:
                    self._departure.leave(task)
            await send(message)

        if task is not None and scope["type"] == "http":
            self._departure.enter(task)
        try:
            await self._route(scope, receive, noted)
        except asyncio.CancelledError:
            refusal = None if begun else self._departure.refusal(task)
            if refusal is None:
                raise
            await problem_of(refusal).response()(scope, receive, noted)
        except Exception as error:
            problem = problem_of(error, path=scope["path"])
            if problem.status in UNREADABLE:
                self.context.metrics.malformed.labels(where="http").inc()
            if begun:
                # The server must see a broken response, or the client would take it for a whole one.
                raise
            if scope["type"] == "http":
                await problem.response()(scope, receive, noted)
            else:
                await send({"type": "websocket.close", "code": 1011})
        finally:
            if task is not None:
                self._departure.leave(task)

    def _refuse_unsafe(self, scope: Scope) -> None:
        """Under a server that we did not start, only the request shows on which address it listens."""
        server = scope.get("server")
        if self.context.settings.auth == "none" and server and not is_loopback_or_name(str(server[0])):
            raise NotAuthorized(
                "auth=none serves loopback addresses only; set CONVENER_AUTH to token, jwt or hook",
                code="unsafe_address",
            )

    async def _route(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._refuse_unsafe(scope)
        scope = self._unprefixed(scope)
        path = _local_path(scope)
        if path == SOCKET_PATH or path.startswith(SOCKET_PATH + "/"):
            await self._serve_socket(scope, receive, send)
        elif scope["type"] == "websocket":
            await receive()
            await send({"type": "websocket.close", "code": 1008, "reason": "sockets are served at /socket.io/"})
        else:
            await self.api(scope, _capped(scope, receive, self.context.body_limit), send)

    async def _serve_socket(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket" and self.context.closing:
            # Not accepted: a refusal by Socket.IO would keep the client away for good.
            await receive()
            await send(dict(CLOSED))
            return
        if scope["type"] == "websocket":
            receive = filter_frames(receive, self.sockets.count_malformed)
        elif "polling" not in self._sio.eio.transports:
            raise InvalidRequest("sockets use the WebSocket transport here: set transports to ['websocket']")
        await self._sio.handle_request(scope, receive, send)

    def _unprefixed(self, scope: Scope) -> Scope:
        if not self._prefix or not scope["path"].startswith(self._prefix + "/"):
            return scope
        return {**scope, "root_path": self._prefix}

    async def _lifespan(self, receive: Receive, send: Send) -> None:
        await receive()
        begun = False
        try:
            async with self.running():
                begun = True
                await send({"type": "lifespan.startup.complete"})
                await receive()
        except Exception as error:
            message = error.detail if isinstance(error, ConvenerError) else f"{type(error).__name__}: {error}"
            if begun or not isinstance(error, ConvenerError):
                log.exception("the node did not end well" if begun else "the node cannot start")
            kind = "shutdown" if begun else "startup"
            await send({"type": f"lifespan.{kind}.failed", "message": message})
            return
        await send({"type": "lifespan.shutdown.complete"})


def _local_path(scope: Scope) -> str:
    """The path below the place where this application is mounted."""
    path, root = str(scope["path"]), str(scope.get("root_path", "")).rstrip("/")
    return path[len(root) :] if root and path.startswith(root + "/") else path


def _capped(scope: Scope, receive: Receive, limit: int) -> Receive:
    """An ASGI `receive` that refuses a body of more than `limit` bytes, before or while it arrives.

    Raises:
        PayloadTooLarge: from here for an announced length, else from the returned function.
    """
    too_large = PayloadTooLarge(f"the body has more than {limit} bytes")
    for name, value in scope["headers"]:
        if name == b"content-length" and value.isdigit() and int(value) > limit:
            raise too_large
    received = 0

    async def capped() -> MutableMapping[str, Any]:
        nonlocal received
        message = await receive()
        received += len(message.get("body", b""))
        if received > limit:
            raise too_large
        return message

    return capped
