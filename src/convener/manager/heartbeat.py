"""Renewals, from a thread of their own with a connection of their own (protocol, section 4).

A heartbeat on the event loop dies with the first blocking tool call, and one that never looks at the loop keeps a
wedged node alive. So the thread renews only while the loop has ticked within `loop_lag_limit` and the subscriber
hears: a wedged or deaf node must lose its conversations, a busy one must not.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import Final

import structlog

from convener.errors import ConvenerError
from convener.manager.clock import boottime
from convener.manager.context import NodeContext
from convener.store.base import HeartbeatLink

log = structlog.get_logger(__name__)

DEAF_S: Final = 8.0
JOIN_S: Final = 5.0
AGAIN_S: Final = 10.0
"""Time between two lines of the log that say the same."""


class Complaint:
    """What is wrong at every beat and is said at once, then from time to time, and once more when it is over."""

    def __init__(self, event: str, over: str) -> None:
        self._event = event
        self._over = over
        self._times = 0
        self._due = 0.0

    def say(self, **fields: object) -> None:
        """It is wrong now."""
        self._times += 1
        if boottime() >= self._due:
            self._due = boottime() + AGAIN_S
            log.warning(self._event, times=self._times, **fields)

    def over(self) -> None:
        """It is not."""
        if self._times:
            log.info(self._over, times=self._times)
            self._times, self._due = 0, 0.0


class Heartbeat:
    """Renews one incarnation's lease until it is stopped or told that it is buried."""

    def __init__(
        self,
        node: NodeContext,
        make_link: Callable[[], HeartbeatLink],
        info: Callable[[], str],
        on_version: Callable[[int], None],
        on_dead: Callable[[], None],
    ) -> None:
        self._node = node
        self._incarnation = node.incarnation
        self._lease = node.lease
        self.make_link = make_link
        self._info = info
        self._told_info: str | None = None
        self._on_version = on_version
        self._on_dead = on_dead
        self._loop = asyncio.get_running_loop()
        self._stop = threading.Event()
        self.last_tick = boottime()
        self._version = -1
        self._link: HeartbeatLink | None = None
        self._renew_link = threading.Event()
        self._failed = Complaint("renewal failed", "renewals succeed again")
        self._stuck = Complaint("no renewal: the event loop is stuck", "the event loop runs again")
        self._deaf = Complaint("no renewal: the subscriber is deaf", "the subscriber hears again")
        self._thread = threading.Thread(target=self._run, name=f"heartbeat {node.options.name}", daemon=True)

    def start(self) -> None:
        """Begin renewing."""
        self._thread.start()

    async def stop(self) -> None:
        """End the thread and its connections."""
        self._stop.set()
        await asyncio.to_thread(self._thread.join, JOIN_S)

    def refresh_link(self) -> None:
        """Make the connections anew at the next renewal: credentials or addresses have changed."""
        self._renew_link.set()

    def tick(self) -> None:
        """Show the thread that the event loop runs."""
        self.last_tick = boottime()

    # -- the thread ----------------------------------------------------------------------------------------------

    def _run(self) -> None:
        interval = self._node.options.renew_interval
        due = boottime()
        while not self._stop.wait(max(due - boottime(), 0.0)):
            # From now, not from the last due time: after a pause there is nothing to catch up with.
            due = boottime() + interval
            if not self.may_renew():
                continue
            try:
                if self._renew_link.is_set():
                    self._renew_link.clear()
                    self._drop_link()
                if not self._beat():
                    break
                self._failed.over()
            except ConvenerError as error:
                self._node.metrics.store_errors.labels(kind=error.wire_code).inc()
                self._failed.say(node=self._incarnation, error=str(error))
                self._drop_link()
                # Soon again: the acting window is only two intervals long.
                due = boottime() + interval / 4
            except Exception:
                log.exception("the heartbeat failed; it goes on", node=self._incarnation)
                self._drop_link()
        self._drop_link()

    def may_renew(self) -> bool:
        """Whether the event loop runs and the subscriber hears."""
        lag = boottime() - self.last_tick
        if lag > self._node.options.loop_lag_limit:
            self._stuck.say(seconds=round(lag, 2))
            return False
        self._stuck.over()
        deaf = boottime() - self._node.store.heard()
        if deaf > DEAF_S:
            self._deaf.say(seconds=round(deaf, 2))
            return False
        self._deaf.over()
        return True

    def _beat(self) -> bool:
        """One renewal. False if this incarnation is buried."""
        if self._link is None:
            self._link = self.make_link()
            self._link.hold_live(self._incarnation)
        info = self._info()
        sent = boottime()
        reply = self._link.renew(self._incarnation, None if info == self._told_info else info)
        if reply.outcome == "DEAD":
            log.warning("this node was buried while it was silent", node=self._incarnation)
            self._call(self._on_dead)
            return False
        self._told_info = info
        self._lease.renewed(sent)
        if reply.version != self._version:
            self._version = reply.version
            self._call(lambda: self._on_version(reply.version))
        self._link.ping_live()
        return True

    def _call(self, what: Callable[[], None]) -> None:
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(what)

    def _drop_link(self) -> None:
        link, self._link = self._link, None
        if link is not None:
            link.close()
