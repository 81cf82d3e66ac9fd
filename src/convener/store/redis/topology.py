"""Which server a key lives on. Here: always the same, be it fixed or the one that Sentinels name (`sentinel`); for
several servers that share the keys see `cluster`.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import Any, Final, Protocol

from convener.errors import ConfigurationError, StoreUnavailable
from convener.store.redis.address import refused
from convener.store.redis.connection import Link, LinkStatistics, Patience
from convener.store.redis.endpoint import Argument, Target
from convener.store.redis.errors import REPLICA_CODES, Redirect
from convener.store.redis.history import History, Identity, NewHistory
from convener.store.redis.scripts import Script
from convener.store.redis.wire import Again, Call, Reply

_log = logging.getLogger(__name__)

Told = Callable[[NewHistory], None]


class Topology(Protocol):
    """Takes commands to where their keys live, and says where channels are.

    A *place* names a server (a primary) that commands and subscriptions go to. Which place a hash slot has may
    change; watchers are told afterwards.
    """

    async def open(self) -> None:
        """Connect.

        Raises:
            StoreUnavailable: no server, or no answer.
            ConfigurationError: credentials are refused, or this is another kind of store than the URL says.
        """
        ...

    async def close(self) -> None:
        """Drop all connections; commands under way end with `StoreUnavailable`."""
        ...

    def call(self, script: Script, keys: tuple[str, ...], *arguments: Argument) -> asyncio.Future[Reply]:
        """Run a script where its keys live; all share one hash tag. Sent in the order of the calls."""
        ...

    def execute(self, key: str, *parts: Argument) -> asyncio.Future[Reply]:
        """Run a command where `key` lives; anywhere, if that is empty. Sent in the order of the calls."""
        ...

    def each(self, *parts: Argument) -> Sequence[asyncio.Future[Reply]]:
        """Run a command at every place, in the order of `places`."""
        ...

    def places(self) -> Sequence[str]:
        """Every place that has a slot."""
        ...

    def slot(self, key: str) -> int:
        """What decides where a key lives."""
        ...

    def place(self, slot: int) -> str | None:
        """Where a slot is now; None if nobody has it."""
        ...

    def targets(self) -> Mapping[str, Target]:
        """Every place, and how to connect to it."""
        ...

    def target(self, key: str) -> Target:
        """Where `key` lives, whichever that is at the time of each connection."""
        ...

    def reachable(self, place: str) -> bool:
        """Whether commands reach that place at present."""
        ...

    def redirected(self, redirect: Redirect) -> None:
        """A server said that a slot is elsewhere."""
        ...

    def doubt(self) -> None:
        """Something is not where it was: look again, soon."""
        ...

    def watch(self, changed: Callable[[], None]) -> None:
        """Call `changed` on the event loop after slots have changed their places, or a server is back."""
        ...

    def histories(self) -> Mapping[str, History]:
        """What is known of each place's data."""
        ...

    def statistics(self) -> LinkStatistics:
        """Counters of all links together."""
        ...


class Single:
    """Everything lives on one server.

    Args:
        on_reconnect: called after each connection but the first.
        on_new_history: called if a connection finds other data than the one before it; before anything is sent.
    """

    def __init__(
        self,
        target: Target,
        patience: Patience,
        *,
        max_in_flight: int,
        on_reconnect: Callable[[], None] | None,
        on_new_history: Told | None,
    ) -> None:
        self._target = target
        self._link = Link(target, patience, self, REPLICA_CODES, max_in_flight=max_in_flight)
        self._on_reconnect = on_reconnect
        self._on_new_history = on_new_history
        self._watchers: list[Callable[[], None]] = []
        self._history: History | None = None
        self._mode: str | None = None

    async def open(self) -> None:
        """See `Topology.open`."""
        await self._link.open()
        if self._mode == "cluster":
            raise refused("this is a Redis Cluster: write redis+cluster://")
        if self._mode == "sentinel":
            raise refused("this is a Sentinel: write redis+sentinel://HOST/DB/NAME")

    async def close(self) -> None:
        """See `Topology.close`."""
        await self._link.close()

    def call(self, script: Script, keys: tuple[str, ...], *arguments: Argument) -> asyncio.Future[Reply]:
        """See `Topology.call`."""
        return self._link.call(script, keys, arguments)

    def execute(self, key: str, *parts: Argument) -> asyncio.Future[Reply]:
        """See `Topology.execute`."""
        return self._link.execute(key, *parts)

    def each(self, *parts: Argument) -> Sequence[asyncio.Future[Reply]]:
        """See `Topology.each`."""
        return [self._link.execute("", *parts)]

    def places(self) -> Sequence[str]:
        """See `Topology.places`."""
        return [""]

    def slot(self, key: str) -> int:
        """All the same."""
        return 0

    def place(self, slot: int) -> str | None:
        """Always the same, whichever server it is."""
        return ""

    def targets(self) -> Mapping[str, Target]:
        """The one."""
        return {"": self._target}

    def target(self, key: str) -> Target:
        """The one."""
        return self._target

    def reachable(self, place: str) -> bool:
        """True: whoever cannot reach the one server is deaf."""
        return True

    def redirected(self, redirect: Redirect) -> None:
        """Not by a server outside a cluster."""

    def doubt(self) -> None:
        """Nothing to look at: the next connection shows it."""

    def watch(self, changed: Callable[[], None]) -> None:
        """See `Topology.watch`."""
        self._watchers.append(changed)

    def _changed(self) -> None:
        for changed in self._watchers:
            call_hook("what was to be done after a change of the store", changed)

    def histories(self) -> Mapping[str, History]:
        """See `Topology.histories`."""
        return {} if self._history is None else {"": self._history}

    def statistics(self) -> LinkStatistics:
        """See `Topology.statistics`."""
        return self._link.statistics()

    # -- LinkOwner -------------------------------------------------------------------------------------------

    def connected(self, link: Link, identity: Identity) -> None:
        """Compare the data with those of the connection before."""
        old, self._history, self._mode = self._history, identity.history, identity.mode
        if old is None:
            return
        tell(self._on_new_history, old, identity.history)
        call_hook("on_reconnect", self._on_reconnect)
        self._changed()

    def lost(self, link: Link) -> None:
        """The link comes back by itself."""

    def refused(self, link: Link, again: list[Again], held: list[Call]) -> None:
        """The server is no primary any more: the next connection is made to whoever is."""
        link.retreat([*(one.call for one in again), *held], "the server is not the primary any more")


def tell(told: Told | None, old: History, new: History) -> None:
    """Say that the data may not be the same, if that is so."""
    if old.is_same(new):
        return
    _log.warning("the store may have lost what was written last: %s was %s", new, old)
    call_hook("on_new_history", told, NewHistory(old, new))


def call_hook(name: str, hook: Callable[..., None] | None, *arguments: object) -> None:
    """Call what the store was given, which must not keep the store from working."""
    if hook is not None:
        try:
            hook(*arguments)
        except Exception:
            _log.exception("%s failed", name)


async def together(parts: Sequence[Coroutine[Any, Any, None]]) -> None:
    """Do all at once, and to the end. Raises an error of one of them; what only the operator can mend, first."""
    results = await asyncio.gather(*parts, return_exceptions=True)
    errors = [result for result in results if result is not None]
    for error in sorted(errors, key=lambda error: not isinstance(error, ConfigurationError)):
        raise error


_TRIES: Final = 200_000
"""Names that are tried: enough to hit one of a server's few hash slots."""


def find_name(topology: Topology, place: str, name: Callable[[int], str], key: Callable[[str], str]) -> str:
    """A name whose key lives at a place: the first of `name(0)`, `name(1)`, … that does.

    Raises:
        StoreUnavailable: the place has no slot, or hardly any.
    """
    for number in range(_TRIES if place in topology.targets() else 0):
        found = name(number)
        if topology.place(topology.slot(key(found))) == place:
            return found
    raise StoreUnavailable(f"{place} has no hash slot")
