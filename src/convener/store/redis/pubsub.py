"""One connection in pub/sub mode: what was asked on it, and the frames that it brings."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import hiredis

from convener.errors import StoreUnavailable
from convener.store.redis.endpoint import NOT_YET, Attached, pack

_log = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class Subscription:
    """One channel.

    Attributes:
        slot: decides which server has it.
        place: the server that it is subscribed at, or is to be; None while it is nowhere.
        heard_of: a server has confirmed it once, so that from then on loss is a gap.
    """

    channel: bytes
    handler: Callable[[bytes], None]
    on_gap: Callable[[], None]
    slot: int = 0
    place: str | None = None
    confirmed: bool = False
    heard_of: bool = False
    waiters: list[asyncio.Future[None]] = field(default_factory=list[asyncio.Future[None]])

    def confirm(self) -> None:
        """The server has it: let those go on who wait for that."""
        self.confirmed = True
        waiters, self.waiters = self.waiters, []
        for waiter in waiters:
            if not waiter.done():
                waiter.set_result(None)

    async def confirmation(self, limit: float) -> None:
        """Wait until the server has it.

        Raises:
            StoreUnavailable: not within `limit` seconds, or refused.
        """
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.waiters.append(waiter)
        try:
            async with asyncio.timeout(limit):
                await waiter
        except TimeoutError as error:
            raise StoreUnavailable("the store did not confirm a subscription in time") from error
        finally:
            if waiter in self.waiters:
                self.waiters.remove(waiter)

    def fail(self, error: Exception) -> None:
        """It will not come: tell those who wait for it."""
        waiters, self.waiters = self.waiters, []
        for waiter in waiters:
            if not waiter.done():
                waiter.set_exception(error)


class Command:
    """An SSUBSCRIBE or SUNSUBSCRIBE under way: confirmed channel by channel, or refused as a whole."""

    __slots__ = ("joins", "left", "subscriptions")

    def __init__(self, joins: bool, subscriptions: Sequence[Subscription]) -> None:
        self.joins = joins
        self.subscriptions = subscriptions
        self.left = len(subscriptions)


class Ear(Attached):
    """One connection in pub/sub mode: sends what its subscriber asks, hands frames up."""

    def __init__(self, frame: Callable[[Ear, Any], None]) -> None:
        super().__init__()
        self._frame = frame
        self.commands: deque[Command] = deque()
        self.client_id = 0
        self.why = "the subscriber's connection was lost"
        self.answers: deque[asyncio.Future[Any]] = deque()
        self.silent_for = 0.0
        """Seconds since anything was heard, as its subscriber counts them."""

    def data_received(self, data: bytes) -> None:
        self.silent_for = 0.0
        self.reader.feed(data)
        try:
            while (frame := self.reader.gets()) is not NOT_YET:
                if self.answers:
                    answer = self.answers.popleft()
                    if not answer.done():
                        answer.set_result(frame)
                else:
                    self._frame(self, frame)
        except hiredis.ProtocolError as error:
            _log.error("unexpected data from the store, subscriber reconnects: %r", error)
            self.end("the store sent what is not its protocol")

    def ask(self, *parts: str) -> asyncio.Future[Any]:
        """A command before the first subscription: afterwards the connection takes only subscriptions."""
        answer = asyncio.get_running_loop().create_future()
        self.answers.append(answer)
        self.write(pack(parts))
        return answer

    def send(self, joins: bool, subscriptions: Sequence[Subscription]) -> None:
        """Subscribe to, or leave, several channels."""
        self.commands.append(Command(joins, subscriptions))
        name = b"SSUBSCRIBE" if joins else b"SUNSUBSCRIBE"
        self.write(pack((name, *(s.channel for s in subscriptions))))

    def settle(self, joins: bool, channel: bytes) -> Subscription | None:
        """The subscription whose confirmation this is; None if nobody asked."""
        if not self.commands or self.commands[0].joins != joins:
            return None
        command = self.commands[0]
        subscription = command.subscriptions[len(command.subscriptions) - command.left]
        if subscription.channel != channel:
            return None
        command.left -= 1
        if command.left == 0:
            self.commands.popleft()
        return subscription

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        while self.answers:
            answer = self.answers.popleft()
            if not answer.done():
                answer.set_exception(StoreUnavailable(self.why))

    def end(self, why: str) -> None:
        """Give the connection up."""
        self.why = why
        self.abort()
