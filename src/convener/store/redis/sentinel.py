"""One primary, named by Sentinels.

All Sentinels are asked; the answer with the highest configuration epoch counts, so one that is cut off or behind
cannot send us back. The server has to say itself that it is a primary, on every new connection. Besides, the
Sentinels are asked every second or so: a former primary that can still be reached would take writes that nobody
keeps.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, cast

from redis.exceptions import NoPermissionError, ResponseError

from convener.errors import ConfigurationError, StoreUnavailable
from convener.store.redis.address import Host, refused
from convener.store.redis.connection import Patience
from convener.store.redis.endpoint import Argument, Attached, Endpoint, SyncConnection
from convener.store.redis.history import identify, pairs
from convener.store.redis.topology import Single, Told

_log = logging.getLogger(__name__)

WATCH_INTERVAL: Final = 1.0
"""Seconds between two looks at what the Sentinels say."""


@dataclass(frozen=True, slots=True, order=True)
class Named:
    """A Sentinel's answer. `epoch` of the configuration is -1 where an access list hides it."""

    epoch: int
    host: Host


def newest(found: Sequence[Named], known: Named | None) -> Named:
    """Which answer counts: that of the newest configuration, and among those what most say; never one that is older
    than what is known.
    """
    epoch = max(named.epoch for named in found)
    best = Counter(named for named in found if named.epoch == epoch).most_common(1)[0][0]
    return best if known is None or best.epoch >= known.epoch else known


class Primary:
    """The primary that the Sentinels name: a `Target`.

    Args:
        sentinels: at least one.
        server: the credentials and options for servers.
        service: the Sentinels' name of the primary.
    """

    def __init__(self, sentinels: Sequence[Endpoint], server: Endpoint, service: str) -> None:
        self._sentinels = tuple(sentinels)
        self._order = tuple(sentinels)
        self._server = server
        self._service = service
        self.known: Named | None = None
        """The answer that counts until there is a newer one."""
        self._failed: Named | None = None

    @property
    def place(self) -> str:
        """The primary named last, or the service's name before the first answer."""
        return self._service if self.known is None else "{}:{}".format(*self.known.host)

    def redirect(self, host: str, port: int) -> None:
        """Only the Sentinels say where the primary is."""

    async def connect(self, attached: Attached, limit: float) -> None:
        """See `Target.connect`."""
        named = await self.ask(limit)
        try:
            async with asyncio.timeout(limit):
                await self._server.at(*named.host).connect(attached, limit, _IsPrimary())
        except TimeoutError as error:
            self._failed = named
            raise StoreUnavailable(f"cannot connect to the primary {self.place} in time") from error
        except StoreUnavailable:
            self._failed = named
            raise

    def connect_sync(self, timeout: float) -> tuple[SyncConnection, str]:
        """See `Target.connect_sync`. One Sentinel is enough, if it knows what is known already."""
        named = self._ask_sync(timeout)
        try:
            return self._server.at(*named.host).connect_sync(timeout, _IsPrimary())
        except StoreUnavailable:
            self._failed = named
            raise

    # -- what Sentinels say ----------------------------------------------------------------------------------

    def _question(self) -> tuple[Sequence[Argument], ...]:
        return (
            ("SENTINEL", "GET-MASTER-ADDR-BY-NAME", self._service),
            ("SENTINEL", "MASTER", self._service),
        )

    async def ask(self, limit: float) -> Named:
        """Ask all; wait until most have answered, or all that can.

        Raises:
            StoreUnavailable: nobody answers within half of `limit`.
            ConfigurationError: nobody knows the name, or all refuse the credentials.
        """
        tasks = [asyncio.ensure_future(s.ask(limit / 4, *self._question())) for s in self._sentinels]
        found: list[Named] = []
        errors: list[Exception] = []
        try:
            for done in asyncio.as_completed(tasks):
                try:
                    found.append(self._read(await done))
                except (StoreUnavailable, ConfigurationError) as error:
                    errors.append(error)
                if len(found) > len(self._sentinels) // 2:
                    break
        finally:
            for task in tasks:
                task.cancel()
            with contextlib.suppress(Exception):
                await asyncio.gather(*tasks, return_exceptions=True)
        return self._take(found, errors)

    def _take(self, found: list[Named], errors: list[Exception]) -> Named:
        if not found:
            bad = [error for error in errors if isinstance(error, ConfigurationError)]
            if len(bad) == len(errors):
                raise bad[0]
            raise StoreUnavailable(f"no Sentinel of {self._service} answers: {errors[0]}")
        # Sentinels that were set up anew count from the beginning. Most of them are believed when what was known leads
        # nowhere; one alone may have been cut off.
        anew = self._failed is not None and self._failed == self.known and len(found) > len(self._sentinels) // 2
        self.known = newest(found, None if anew else self.known)
        return self.known

    def _ask_sync(self, timeout: float) -> Named:
        errors: list[Exception] = []
        for sentinel in self._order:
            try:
                named = self._read(sentinel.ask_sync(timeout / 2, *self._question()))
            except (StoreUnavailable, ConfigurationError) as error:
                errors.append(error)
            else:
                if self.known is None or named.epoch >= self.known.epoch:
                    self.known = named
                    return named
                errors.append(StoreUnavailable(f"{sentinel} is behind"))
            # Whoever did not help is asked last next time.
            self._order = (*(other for other in self._order if other is not sentinel), sentinel)
        raise StoreUnavailable(f"no Sentinel of {self._service} helps: {errors[0]}")

    def _read(self, replies: Sequence[Any]) -> Named:
        where, master = replies
        if isinstance(where, NoPermissionError):
            raise refused(f"the Sentinels refuse to answer: {where}")
        if isinstance(where, ResponseError):
            raise refused(f"this is no Sentinel: {where}")
        if not where:
            raise refused(f"the Sentinels know no primary called {self._service!r}")
        return Named(int(pairs(master).get("config-epoch", -1)), (where[0].decode(), int(where[1])))


class _IsPrimary:
    """The server has to be a primary; one that hides what it is, is believed."""

    commands: Sequence[Sequence[Argument]] = (("ROLE",), ("HELLO", 2))

    def judge(self, place: str, replies: Sequence[Any]) -> None:
        """See `Check.judge`."""
        role, hello = replies
        shown = cast("list[Any]", role) if isinstance(role, list) else []
        said: str | None = shown[0].decode() if shown else identify(place, hello, None).role
        if said not in ("master", None):
            raise StoreUnavailable(f"{place} is no primary: {said}")


class UnderSentinels(Single):
    """Everything lives on the primary that Sentinels name. Arguments: as `Single`."""

    def __init__(
        self,
        primary: Primary,
        patience: Patience,
        *,
        max_in_flight: int,
        on_reconnect: Callable[[], None] | None,
        on_new_history: Told | None,
    ) -> None:
        super().__init__(
            primary,
            patience,
            max_in_flight=max_in_flight,
            on_reconnect=on_reconnect,
            on_new_history=on_new_history,
        )
        self._primary = primary
        self._limit = patience.deadline
        self._task: asyncio.Task[None] | None = None

    async def open(self) -> None:
        """See `Topology.open`."""
        await super().open()
        self._task = asyncio.get_running_loop().create_task(self._follow(), name="convener-store-sentinels")

    async def close(self) -> None:
        """See `Topology.close`."""
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
        await super().close()

    async def _follow(self) -> None:
        """Leave a former primary that does not know of it: first let it answer, then without."""
        left = ""
        while True:
            await asyncio.sleep(WATCH_INTERVAL * random.uniform(0.75, 1.25))
            try:
                await self._primary.ask(self._limit)
            except (StoreUnavailable, ConfigurationError) as error:
                _log.debug("the Sentinels do not answer: %s", error)
            except Exception:
                _log.exception("unexpected error while Sentinels were asked")
            here, primary = self._link.place, self._primary.place
            if here in ("", primary):
                left = ""
            elif here == left:
                self._link.retreat((), f"{primary} is the primary now")
            else:
                _log.warning("the Sentinels name %s as primary, not %s", primary, here)
                left = here
                self._link.stall()
                self._changed()
