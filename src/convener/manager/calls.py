"""Requests between nodes over each node's own channel: calls to a conversation's owner, asks to hibernate or start.

A request carries an id, the asker, and the time left; an answer comes back over the asker's channel. Publications
may be lost, so a lost request or answer is a timed-out one: at most once, never queued for later. When the asked
node is buried its askers fail at once; when an asker gives up the work is cancelled.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Final, cast

import msgspec
import structlog

from convener import errors
from convener.errors import CallTimeout, ConvenerError, LimitExceeded, OwnerUnavailable, RemoteError
from convener.ids import new_id
from convener.manager.context import NodeContext
from convener.version import OLDEST_PROTOCOL, PROTOCOL

log = structlog.get_logger(__name__)

MAX_SERVED: Final = 1000
"""Requests that a node works on at once; more are refused at once, with a code that says so."""

Service = Callable[[Mapping[str, Any]], Awaitable[Any]]


class Envelope(msgspec.Struct, omit_defaults=True):
    """A message of a node's channel. `t` is ``req``, ``rep`` or ``cancel``; `left` is seconds; of an error, `kind`
    is its class's code and `code` its own, `retry` its `retry_after` (0 for none), and `body` its `extra`. `v` is the
    sender's protocol; 0.1.0 does not say it.
    """

    t: str
    id: str
    asker: str = ""
    method: str = ""
    left: float = 0.0
    body: Any = None
    kind: str = ""
    code: str = ""
    detail: str = ""
    retry: float = 0.0
    v: int = 1


_decoder = msgspec.json.Decoder(Envelope)
_encoder = msgspec.json.Encoder()

_BY_CODE: Final[Mapping[str, type[ConvenerError]]] = {
    kind.code: kind
    for kind in vars(errors).values()
    if isinstance(kind, type) and issubclass(kind, ConvenerError) and not issubclass(kind, LimitExceeded)
}


def error_of(answer: Envelope) -> ConvenerError:
    """The error that an answer stands for."""
    retry_after = answer.retry or None
    raw: Any = answer.body
    extra = cast("dict[str, Any]", raw) if isinstance(raw, dict) else {}
    if answer.kind == LimitExceeded.code:
        limit, running = extra.get("limit"), extra.get("running")
        return LimitExceeded(
            answer.detail,
            limit=limit if isinstance(limit, int) else 0,
            running=[str(cid) for cid in cast("list[object]", running)] if isinstance(running, list) else (),
            retry_after=retry_after,
        )
    kind = _BY_CODE.get(answer.kind, RemoteError)
    return kind(answer.detail, code=answer.code, retry_after=retry_after, extra=extra)


class Calls:
    """Asks other nodes and serves them."""

    def __init__(self, node: NodeContext) -> None:
        self._node = node
        self._channel = ""
        self._services: dict[str, Service] = {}
        self._asked: dict[str, tuple[str, asyncio.Future[Any]]] = {}
        self._served: dict[str, asyncio.Task[None]] = {}

    def serve(self, method: str, service: Service) -> None:
        """Answer requests of `method` by `service(body)`."""
        self._services[method] = service

    @property
    def serving(self) -> int:
        """Requests that are being worked on here."""
        return len(self._served)

    async def open(self) -> None:
        """Listen on this incarnation's channel."""
        self._channel = self._node.store.channel("n", self._node.incarnation)
        await self._node.store.subscribe(self._channel, self._on_message, lambda: None)

    async def close(self) -> None:
        """Stop listening; what waits for an answer fails, what is being served is cancelled."""
        for _, future in list(self._asked.values()):
            if not future.done():
                future.set_exception(OwnerUnavailable("this node is leaving"))
        for task in list(self._served.values()):
            task.cancel()
        with contextlib.suppress(ConvenerError):
            await self._node.store.unsubscribe(self._channel)

    # -- asking ----------------------------------------------------------------------------------------------------

    async def ask(self, incarnation: str, method: str, body: Mapping[str, Any], timeout: float) -> Any:
        """Ask a node.

        Raises:
            CallTimeout: no answer in `timeout` seconds (the work is cancelled there).
            OwnerUnavailable: the node is buried, or was while we waited.
            ConvenerError: as the service raised it.
        """
        if incarnation in self._node.buried:
            raise OwnerUnavailable("the node that was to answer is gone", retry_after=0.5)
        ident = new_id()
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._asked[ident] = incarnation, future
        request = Envelope("req", ident, self._node.incarnation, method, timeout, body)
        try:
            async with asyncio.timeout(timeout):
                await self._publish(incarnation, request)
                return await future
        except TimeoutError as error:
            raise CallTimeout(f"{method} was not answered within {timeout:g} s") from error
        finally:
            del self._asked[ident]
            if not future.done() or future.cancelled():
                cancel = Envelope("cancel", ident, self._node.incarnation)
                self._node.supervisor.spawn("cancel call", self._publish(incarnation, cancel))

    def fail(self, incarnation: str) -> None:
        """The node is buried: whoever waits for it need not wait for the deadline."""
        for asked, future in list(self._asked.values()):
            if asked == incarnation and not future.done():
                future.set_exception(OwnerUnavailable("the node that was to answer is gone", retry_after=0.5))

    async def _publish(self, incarnation: str, envelope: Envelope) -> None:
        envelope.v = PROTOCOL
        await self._node.store.publish(self._node.store.channel("n", incarnation), _encoder.encode(envelope))

    # -- serving ---------------------------------------------------------------------------------------------------

    def _on_message(self, raw: bytes) -> None:
        try:
            envelope = _decoder.decode(raw)
        except msgspec.MsgspecError:
            self._node.metrics.malformed.labels(where="node").inc()
            log.warning("malformed request skipped", size=len(raw))
            return
        if envelope.v < OLDEST_PROTOCOL:
            self._node.metrics.malformed.labels(where="node").inc()
            log.warning("a message of an older protocol skipped", protocol=envelope.v)
            return
        if envelope.t == "rep":
            self._on_answer(envelope)
        elif envelope.t == "cancel":
            task = self._served.get(envelope.id)
            if task is not None:
                task.cancel()
        elif envelope.t == "req" and envelope.id not in self._served:
            task = self._node.supervisor.spawn("serve call", self._serve(envelope))
            self._served[envelope.id] = task
            task.add_done_callback(lambda _: self._served.pop(envelope.id, None))

    def _on_answer(self, envelope: Envelope) -> None:
        _, future = self._asked.get(envelope.id, ("", None))
        if future is None or future.done():
            return
        if envelope.code:
            future.set_exception(error_of(envelope))
        else:
            future.set_result(envelope.body)

    async def _serve(self, request: Envelope) -> None:
        answer = Envelope("rep", request.id)
        service = self._services.get(request.method)
        try:
            if len(self._served) > MAX_SERVED:
                raise OwnerUnavailable("the node answers too many calls already", code="overloaded", retry_after=1.0)
            if service is None:
                raise OwnerUnavailable(f"the node does not know {request.method}", code="unknown_method")
            async with asyncio.timeout(request.left):
                raw: Any = request.body
                body = cast(dict[str, Any], raw) if isinstance(raw, dict) else {}
                answer.body = await service(body)
        except TimeoutError:
            return
        except ConvenerError as error:
            answer.kind, answer.code, answer.detail = error.code, error.wire_code, error.detail
            answer.retry, answer.body = error.retry_after or 0.0, error.extra or None
        except Exception as error:
            log.exception("a service failed", method=request.method)
            answer.kind = answer.code = RemoteError.code
            answer.detail = f"{type(error).__name__}: {error}"
        await self._publish(request.asker, answer)
