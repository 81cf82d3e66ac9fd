"""Commands of groups whose hash slot is on the move: one after the other, until things are settled.

Commands of one group are sent in the order of the calls without waiting for replies, and take effect in that
order as long as one server has the slot. While it changes hands, the first may be refused at the old server and a
later one, sent to the new server, be faster. So a group in trouble has a *lane*: each command is sent when the one
before it has its outcome. As soon as one is answered by the server that has the slot, without a detour, the rest
goes in one go as usual.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Final, Protocol

from convener.errors import StoreUnavailable
from convener.store.redis.address import Host
from convener.store.redis.connection import Link, Patience
from convener.store.redis.errors import NotRun, Redirect, redirect
from convener.store.redis.wire import Call, tag_of

_log = logging.getLogger(__name__)

_FIRST_PAUSE: Final = 0.005
_LONGEST_PAUSE: Final = 0.1
_AT_ONCE: Final = 3
"""Redirections that are followed without a pause."""

_NOBODY: Final = "CLUSTERDOWN Hash slot not served"


@dataclass(frozen=True, slots=True)
class Stopped:
    """A command that is to run again, or for the first time.

    Attributes:
        refusal: why it did not run yet; empty if it was not tried, or because of its turn only.
        host: of the server that refused it.
    """

    call: Call
    refusal: str = ""
    host: str = ""


class Router(Protocol):
    """Knows the servers."""

    def route(self, call: Call) -> None:
        """Send a command to where its slot is. What fails at once fails its future."""
        ...

    def home(self, slot: int) -> Link | None:
        """The link to the server that has a slot."""
        ...

    def link_to(self, host: Host) -> Link:
        """The link to a server."""
        ...

    def redirected(self, redirect: Redirect) -> None:
        """A server said that a slot is elsewhere."""
        ...

    def doubt(self) -> None:
        """A server is not what it should be."""
        ...


@dataclass(slots=True, eq=False)
class _Lane:
    queue: deque[Stopped] = field(default_factory=deque[Stopped])
    behind: Link | None = None
    """The former server, while it still has commands of the group under way."""
    task: asyncio.Task[None] | None = None


class Lanes:
    """All lanes, by group.

    Args:
        most: commands in all lanes together; more are refused.
    """

    def __init__(self, router: Router, patience: Patience, most: int) -> None:
        self._router = router
        self._patience = patience
        self._most = most
        self._lanes: dict[str, _Lane] = {}

    def __bool__(self) -> bool:
        return bool(self._lanes)

    def __len__(self) -> int:
        return sum(len(lane.queue) for lane in self._lanes.values())

    def take(self, call: Call) -> bool:
        """Whether the group has a lane, which has taken the command.

        Raises:
            StoreUnavailable: too many wait.
        """
        lane = self._lanes.get(tag_of(call.key))
        if lane is None:
            return False
        if len(self) >= self._most:
            raise StoreUnavailable(f"more than {self._most} commands wait for the store; it was not sent")
        lane.queue.append(Stopped(call))
        return True

    def has(self, tag: str) -> bool:
        """Whether a group has a lane."""
        return tag in self._lanes

    def put_first(self, tag: str, stopped: Sequence[Stopped]) -> None:
        """Commands that were made before those in the lane, which is made if there is none."""
        lane = self._lanes.setdefault(tag, _Lane())
        lane.queue.extendleft(reversed(stopped))
        self._start(tag, lane)

    def put_behind(self, tags: Iterable[str], link: Link) -> None:
        """Groups that may not go elsewhere until `link` has answered what it was sent."""
        for tag in tags:
            lane = self._lanes.setdefault(tag, _Lane())
            if lane.task is None:
                lane.behind = link

    def answered(self, link: Link) -> None:
        """Nothing of any group is under way on `link`."""
        for tag, lane in self._lanes.items():
            if lane.behind is link:
                lane.behind = None
                self._start(tag, lane)

    async def close(self) -> None:
        """End; what waits fails with `StoreUnavailable`."""
        lanes, self._lanes = self._lanes, {}
        for lane in lanes.values():
            if lane.task is not None:
                lane.task.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await lane.task
            for stopped in lane.queue:
                stopped.call.fail(StoreUnavailable("the store is closed; the command was not sent"))

    def _start(self, tag: str, lane: _Lane) -> None:
        if lane.task is None and lane.behind is None:
            lane.task = asyncio.get_running_loop().create_task(self._walk(tag, lane), name="convener-store-lane")

    async def _walk(self, tag: str, lane: _Lane) -> None:
        try:
            settled = False
            while lane.queue and not settled:
                settled = await self._settle(lane.queue.popleft())
        except Exception:
            _log.exception("unexpected error while a hash slot moved")
        if self._lanes.get(tag) is lane:
            del self._lanes[tag]
            for stopped in lane.queue:
                self._router.route(stopped.call)

    async def _settle(self, stopped: Stopped) -> bool:
        """Run a command to its outcome; whether the group is out of trouble."""
        call, refusal, host = stopped.call, stopped.refusal, stopped.host
        pause = _FIRST_PAUSE
        try:
            for tries in count():
                detour = self._understand(refusal, host)
                if refusal and (detour is None or tries >= _AT_ONCE):
                    await asyncio.sleep(pause * random.uniform(0.5, 1))
                    pause = min(2 * pause, _LONGEST_PAUSE)
                if call.future.done():
                    # Whoever gave up before it ran is told by that: nothing happened.
                    return False
                if call.expires <= self._patience.now:
                    raise NotRun(refusal or "TRYAGAIN", call.name)
                asking = detour is not None and detour.asking
                link = self._router.link_to((detour.host, detour.port)) if detour and asking else None
                link = link or self._router.home(call.slot)
                if link is None:
                    refusal, host = _NOBODY, ""
                    continue
                try:
                    # The attempt has waited for whatever the call has to wait for.
                    call.deliver(await link.submit(call.attempt(asking=asking)))
                except NotRun as error:
                    refusal, host = error.refusal, link.target.place.rpartition(":")[0]
                else:
                    return not asking
        except StoreUnavailable as error:
            call.fail(error)
        except BaseException:
            call.fail(StoreUnavailable("the outcome of the command is unknown"))
            raise
        return False

    def _understand(self, refusal: str, host: str) -> Redirect | None:
        """Where a refusal points. What it says of the cluster is passed on."""
        detour = redirect(refusal, host)
        if detour is not None and not detour.asking:
            self._router.redirected(detour)
        elif detour is None and refusal and not refusal.startswith("TRYAGAIN"):
            self._router.doubt()
        return detour
