"""Socket.IO: the only module of the gateway that knows it.

A client joins its conversation in the connect handler; the replay runs after that has returned. One that names none
follows the list of its user's conversations. Every event is answered, whatever it held.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Literal, TypeVar

import socketio
import structlog
from socketio.exceptions import ConnectionRefusedError as Refused

from convener.errors import (
    ConvenerError,
    InvalidRequest,
    NotAuthorized,
    NotFound,
    OwnerUnavailable,
    TooManyRequests,
)
from convener.gateway import schemas
from convener.gateway.access import Action, bearer_token, not_found
from convener.gateway.auth import Identity
from convener.gateway.context import GatewayContext, origin_allowed
from convener.gateway.events import parse_cursor
from convener.gateway.farewell import close_transport
from convener.gateway.hello import Hello, headers_of, read_hello
from convener.gateway.packets import MALFORMED, StrictPacket
from convener.gateway.problems import UNREADABLE, Problem, problem_of
from convener.gateway.sessions import Session
from convener.ids import check_id
from convener.manager.sockets import SocketIOSink
from convener.settings import Settings

log = structlog.get_logger(__name__)

Transport = Literal["websocket", "polling"]
Body = TypeVar("Body", bound=schemas.Body)

CONNECT_TIMEOUT: Final = 30.0
"""Seconds for a connect handler. Below Engine.IO's ping interval and time-out together (45 s): while the handler
runs, the client's pongs are not read."""
MAX_UNDER_WAY: Final = 128
"""Events of one connection that may be under way at a time; more are refused."""
ANSWER_TIMEOUT: Final = 15.0
"""Seconds that a disconnect waits for the answer to the client's own stop; a stop takes ten at most."""
GOING_TIMEOUT: Final = 5.0
"""Seconds that a client which is sent away may wait for the answers to what it has sent."""
_NAMESPACE: Final = "/"


class _Server(socketio.AsyncServer):
    """A server that asks before it disconnects a client."""

    before_disconnect: Callable[[str], Awaitable[None]] | None = None

    async def disconnect(self, sid: str, namespace: str | None = None, ignore_queue: bool = False) -> None:
        if self.before_disconnect is not None:
            await self.before_disconnect(sid)
        await super().disconnect(sid, namespace=namespace, ignore_queue=ignore_queue)  # pyright: ignore[reportUnknownMemberType]


def make_server(settings: Settings, transports: Sequence[Transport] = ("websocket",)) -> socketio.AsyncServer:
    """The Socket.IO server that the manager emits through and `SocketGateway` serves.

    Args:
        settings: for payload sizes and origins.
        transports: without `polling`, no load balancer needs sticky sessions.
    """

    def is_allowed(origin: str | None, environ: Mapping[str, Any]) -> bool:
        scheme, host = str(environ.get("wsgi.url_scheme", "")), str(environ.get("HTTP_HOST", ""))
        return origin_allowed(settings, origin, scheme, host)

    return _Server(
        async_mode="asgi",
        transports=list(transports),
        serializer=StrictPacket,
        cors_allowed_origins=is_allowed,
        # Refusing a payload is our answer to give; the transport only keeps absurd frames out of memory.
        max_http_buffer_size=3 * settings.max_payload_bytes + 65_536,
        logger=_quiet("convener.socketio"),
        engineio_logger=_quiet("convener.engineio"),
    )


def _quiet(name: str) -> Any:
    # Left to itself the library writes to standard error through handlers of its own.
    logger = logging.getLogger(name)
    if logger.level == logging.NOTSET:
        logger.setLevel(logging.ERROR)
    return logger


@dataclass(slots=True)
class _Client:
    """What handlers keep per connection.

    Attributes:
        conversation_id: "" for a client that follows the list of conversations.
        sender: whose messages its messages are; not always the conversation's own user.
        order: makes messages enter in the order in which they were sent.
        answered: set when the last of what it has sent is answered.
    """

    conversation_id: str
    sender: str | None
    order: asyncio.Lock = field(default_factory=asyncio.Lock)
    under_way: int = 0
    answered: asyncio.Event = field(default_factory=asyncio.Event)
    stops: int = 0
    stops_answered: asyncio.Event = field(default_factory=asyncio.Event)


class SocketGateway:
    """The handlers of section "Socket.IO" of the reference.

    Args:
        sio: made by `make_server`; the handlers are registered on it.
    """

    def __init__(self, sio: socketio.AsyncServer, context: GatewayContext) -> None:
        self._sio: Any = sio
        self._sink = SocketIOSink(sio)
        self._context = context
        self._clients: dict[str, _Client] = {}
        self._handlers: Mapping[str, Callable[[str, _Client, Any], Awaitable[dict[str, Any]]]] = {
            "message": self._message,
            "answer": self._answer,
            "interrupt": self._interrupt,
            "stop": self._stop,
            "resume": self._resume,
            "rpc": self._rpc,
        }
        self._sio.on("connect", self._connect)
        self._sio.on("disconnect", self._disconnect)
        self._sio.on("*", self._event)
        self._sio.before_disconnect = self._let_stops_be_answered

    def count_malformed(self) -> None:
        """Count a frame that could not be read."""
        self._context.metrics.malformed.labels(where="socket").inc()

    # -- coming and going ------------------------------------------------------------------------------------

    async def _connect(self, sid: str, environ: Mapping[str, Any], auth: object = None) -> None:
        """Must raise nothing but `Refused`: anything else leaves the client without an answer."""
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT):
                await self._join(sid, environ, auth)
        except Exception as error:
            if self._context.leaving and isinstance(error, ConvenerError) and error.retryable:
                # Another node will do; a refusal would keep the client away for good.
                await close_transport(environ)
            problem = problem_of(error, frame="connect")
            if problem.status in UNREADABLE:
                self.count_malformed()
            raise Refused(problem.detail, problem.members()) from None
        # The library queues the CONNECT packet after this handler, in the same task and without suspending, so
        # a callback of the loop runs after that: nothing of the replay can be sent before it.
        asyncio.get_running_loop().call_soon(self._context.manager.begin_replay, sid)

    async def _join(self, sid: str, environ: Mapping[str, Any], auth: object) -> None:
        context = self._context
        if context.closing or not context.running:
            raise OwnerUnavailable("this node is shutting down", retry_after=1.0)
        headers = headers_of(environ)
        hello = read_hello(environ, auth)
        token = hello.token if hello.token is not None else bearer_token(headers)
        caller = await context.access.identify(token, headers)
        if hello.conversation_id is None:
            user = context.access.follower(caller, hello.user_id)
            await context.manager.follow_list(user, sid, schemas.conversation)
        else:
            await self._join_conversation(sid, caller, hello, hello.conversation_id)
        eio_sid = self._sio.manager.eio_sid_from_sid(sid, _NAMESPACE)
        if eio_sid not in self._sio.environ:
            # Gone in the meantime; its disconnect found nothing to undo.
            await context.manager.disconnect_from_session(sid)
            raise OwnerUnavailable("the connection is gone")
        if context.closing:
            await context.manager.disconnect_from_session(sid)
            raise OwnerUnavailable("this node is shutting down", retry_after=1.0)
        transport = str(self._sio.transport(sid, _NAMESPACE))
        cid = hello.conversation_id or ""
        self._clients[sid] = _Client(cid, context.access.user(caller, hello.user_id) or None)
        context.sessions.add(
            Session(
                sid,
                cid,
                transport,
                caller,
                token,
                headers,
                close=lambda: self._close(sid),
                go_away=lambda: self._go_away(sid, eio_sid),
            )
        )

    async def _join_conversation(self, sid: str, caller: Identity, hello: Hello, conversation_id: str) -> None:
        access, manager = self._context.access, self._context.manager
        cid = check_id(conversation_id, "conversation_id")
        after = parse_cursor(hello.after, "after")
        user = await access.starter(caller, cid, hello.user_id)
        tail = hello.tail if after is None else None
        try:
            await manager.join_conversation(cid, sid, None, user, after, tail=tail)
        except NotAuthorized:
            raise not_found(cid) from None

    async def _close(self, sid: str) -> None:
        try:
            await self._sio.disconnect(sid, namespace=_NAMESPACE)
        except Exception:
            log.exception("cannot disconnect a client", connection_id=sid)

    async def _go_away(self, sid: str, eio_sid: str) -> None:
        """Close the transport below Socket.IO, so that a stock client reconnects; first what it has asked is answered,
        and it gets everything that was said to it.
        """
        client = self._clients.get(sid)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(GOING_TIMEOUT):
                if client is not None and client.under_way:
                    await client.answered.wait()
                await self._sink.flushed(sid)
        if not await close_transport(self._sio.environ.get(eio_sid, {})):
            await self._sio.eio.disconnect(eio_sid)

    async def _disconnect(self, sid: str, reason: str) -> None:
        self._clients.pop(sid, None)
        self._context.sessions.remove(sid)
        try:
            await self._context.manager.disconnect_from_session(sid)
        except Exception:
            log.exception("cannot forget a connection", connection_id=sid)

    async def sweep(self, seen: set[str]) -> set[str]:
        """Cut off transports that were without a Socket.IO connection at the last sweep and still are.

        Args:
            seen: what the last sweep returned.
        """
        silent = {
            eio_sid
            for eio_sid in list(self._sio.environ)
            if self._sio.manager.sid_from_eio_sid(eio_sid, _NAMESPACE) is None
        }
        for eio_sid in silent & seen:
            await self._sio.eio.disconnect(eio_sid)
        return silent - seen

    # -- events ----------------------------------------------------------------------------------------------

    async def _event(self, event: str, sid: str, *arguments: Any) -> dict[str, Any]:
        """Answer any event; what is returned is the acknowledgement."""
        try:
            return await self._dispatch(event, sid, arguments)
        except Exception as error:
            problem = problem_of(error, frame=event)
            if problem.status in UNREADABLE:
                self.count_malformed()
            if event == "message":
                self._context.metrics.messages.labels(result=problem.code).inc()
            return {"error": problem.members()} if event == "rpc" else _rejected(problem)

    async def _dispatch(self, event: str, sid: str, arguments: Sequence[Any]) -> dict[str, Any]:
        if event == MALFORMED:
            raise InvalidRequest(str(arguments[0]))
        if not self._context.running:
            raise OwnerUnavailable("this node is shutting down", retry_after=1.0)
        handler = self._handlers.get(event)
        if handler is None:
            raise InvalidRequest(f"there is no event {event[:64]!r}", code="unknown_event")
        client = self._clients.get(sid)
        if client is None:
            raise NotFound("this connection is not open (any more)")
        if not client.conversation_id:
            raise InvalidRequest("this connection follows a list and is in no conversation", code="not_joined")
        if len(arguments) > 1:
            raise InvalidRequest(f"{event} takes one payload, not {len(arguments)}")
        if client.under_way >= MAX_UNDER_WAY:
            raise TooManyRequests(f"{MAX_UNDER_WAY} events of this connection are under way", retry_after=1.0)
        client.under_way += 1
        client.answered.clear()
        try:
            return await handler(sid, client, arguments[0] if arguments else None)
        finally:
            client.under_way -= 1
            if not client.under_way:
                # Who waits for it goes on in a later round of the loop, and the library queues the answer in this one.
                client.answered.set()

    async def _message(self, sid: str, client: _Client, payload: Any) -> dict[str, Any]:
        body = _parse(schemas.MessageBody, payload)
        async with client.order:
            await self._allowed(sid, client, "send")
            result = await self._context.manager.send_event_to_conversation(
                client.conversation_id,
                body.data,
                user_id=client.sender,
                message_id=body.message_id,
                overlap=body.overlap,
            )
        return schemas.accepted(result)

    async def _answer(self, sid: str, client: _Client, payload: Any) -> dict[str, Any]:
        body = _parse(schemas.AnswerBody, payload)
        await self._allowed(sid, client, "answer")
        result = await self._context.manager.answer(
            client.conversation_id, body.ask_id, body.data, message_id=body.message_id, user_id=client.sender
        )
        return schemas.accepted(result)

    async def _interrupt(self, sid: str, client: _Client, payload: Any) -> dict[str, Any]:
        body = _parse(schemas.Interrupt, {} if payload is None else payload)
        await self._allowed(sid, client, "interrupt")
        return {"outcome": await self._context.manager.interrupt(client.conversation_id, body.turn)}

    async def _stop(self, sid: str, client: _Client, payload: Any) -> dict[str, Any]:
        _parse(schemas.Nothing, {} if payload is None else payload)
        await self._allowed(sid, client, "stop")
        client.stops += 1
        client.stops_answered.clear()
        try:
            return {"outcome": await self._context.manager.close_session(client.conversation_id)}
        finally:
            client.stops -= 1
            if not client.stops:
                # Who waits for it goes on in a later round of the loop, and the library queues the answer in this one.
                client.stops_answered.set()

    async def _let_stops_be_answered(self, sid: str) -> None:
        """Who is sent away by their own stop gets its answer first: stock clients hear nothing after a disconnect."""
        client = self._clients.get(sid)
        if client is not None and client.stops:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(ANSWER_TIMEOUT):
                    await client.stops_answered.wait()

    async def _resume(self, sid: str, client: _Client, payload: Any) -> dict[str, Any]:
        _parse(schemas.Nothing, {} if payload is None else payload)
        await self._allowed(sid, client, "resume")
        return {"outcome": await self._context.manager.resume(client.conversation_id)}

    async def _rpc(self, sid: str, client: _Client, payload: Any) -> dict[str, Any]:
        body = _parse(schemas.SocketCall, payload)
        await self._allowed(sid, client, "call")
        result = await self._context.manager.call(client.conversation_id, body.method, body.params, body.timeout)
        return {"result": result}

    async def _allowed(self, sid: str, client: _Client, action: Action) -> None:
        session = self._context.sessions.find(sid)
        if session is None:
            raise NotFound("this connection is not open (any more)")
        await self._context.access.allowed(session.identity, client.conversation_id, action)


def _rejected(problem: Problem) -> dict[str, Any]:
    return {"status": "rejected"} | problem.members()


def _parse(model: type[Body], payload: Any) -> Body:
    if not isinstance(payload, dict):
        raise InvalidRequest("the payload must be an object")
    return model.model_validate(payload)
