"""How a gateway leaves: unready at once, nothing new after a while, then its clients go, then its requests end."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, MutableMapping
from typing import Any, Final

import structlog

from convener.errors import OwnerUnavailable
from convener.gateway.context import GatewayContext
from convener.gateway.farewell import say_farewell
from convener.manager.base import ClientSink

log = structlog.get_logger(__name__)

CONNECTION_CLOSE: Final = (b"connection", b"close")


class Departure:
    """The end of one gateway, and the requests that it still has to answer.

    Args:
        sink: where the events of clients go that have none of their own.
    """

    def __init__(self, context: GatewayContext, sink: ClientSink) -> None:
        self._context = context
        self._sink = sink
        self._hurried = asyncio.Event()
        self._requests: set[asyncio.Task[Any]] = set()
        self._cut: set[asyncio.Task[Any]] = set()
        self._noticed = False
        self._ending: asyncio.Task[None] | None = None

    def reset(self) -> None:
        """The gateway runs (again)."""
        self._hurried.clear()
        self._noticed = False

    @property
    def hurried(self) -> bool:
        """Whether it is to end at once."""
        return self._hurried.is_set()

    # -- the end -----------------------------------------------------------------------------------------------------

    async def drain(self) -> None:
        """Leave without dropping anything. Returns when that is done, within about `drain_timeout` after the delay."""
        loop, settings = asyncio.get_running_loop(), self._context.settings
        self._context.leaving = True
        await self._let_balancers_notice()
        end = loop.time() + settings.drain_timeout
        await self._context.operations.drained()
        await self._finish_requests(end)

    async def say_farewell(self, stays: Callable[[str], bool]) -> None:
        """See `Operations.on_drain`."""
        self._context.leaving = True
        await self._let_balancers_notice()
        self._context.closing = True
        await say_farewell(self._context.sessions, self._sink, stays)

    async def _let_balancers_notice(self) -> None:
        """For a while only `/readyz` shows that this node leaves."""
        if not self._noticed:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._context.settings.effective_shutdown_delay):
                    await self._hurried.wait()
            self._noticed = True

    def hurry(self) -> None:
        """End at once: what conversations do is left to others, clients are cut off, requests are refused."""
        self._hurried.set()
        self._context.leaving = self._context.closing = True
        self._context.operations.hurry()
        for task in list(self._requests):
            self._cut_off(task)
        self._ending = asyncio.create_task(self._context.sessions.close_all("sse"))

    # -- requests ----------------------------------------------------------------------------------------------------

    def enter(self, task: asyncio.Task[Any]) -> None:
        """A request is under way in this task, and its answer has not begun."""
        self._requests.add(task)

    def leave(self, task: asyncio.Task[Any]) -> None:
        """Its answer has begun, or it is over."""
        self._requests.discard(task)
        self._cut.discard(task)

    async def _finish_requests(self, end: float) -> None:
        """Wait for the answers of the requests that are under way; what takes longer is refused."""
        waits = {task for task in self._requests if task is not asyncio.current_task()}
        if not waits or self.hurried:
            return
        hurried = asyncio.ensure_future(self._hurried.wait())
        loop = asyncio.get_running_loop()
        while (waits & self._requests) and not hurried.done() and loop.time() < end:
            waits &= self._requests
            await asyncio.wait({hurried, *waits}, timeout=end - loop.time(), return_when=asyncio.FIRST_COMPLETED)
        hurried.cancel()
        for task in waits & self._requests:
            self._cut_off(task)

    def _cut_off(self, task: asyncio.Task[Any]) -> None:
        self._cut.add(task)
        task.cancel()

    def refusal(self, task: asyncio.Task[Any] | None) -> OwnerUnavailable | None:
        """What to answer instead, if the request in this task was cut off by this node; None if somebody else has
        cancelled it.
        """
        if task is None or task not in self._cut:
            return None
        self._cut.discard(task)
        task.uncancel()
        return OwnerUnavailable("this node has ended; ask another one, under the same ids", retry_after=1.0)

    def marked(self, message: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
        """The start of an answer; from a node that leaves, the last one on its connection: the next request is to go
        elsewhere.
        """
        if not self._context.leaving:
            return message
        headers = [header for header in message.get("headers", ()) if header[0].lower() != CONNECTION_CLOSE[0]]
        return {**message, "headers": [*headers, CONNECTION_CLOSE]}
