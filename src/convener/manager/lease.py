"""The lease as this process sees it: compared before each effect, written by the heartbeat's thread.

The deadline is one float, replaced as a whole: the thread writes, the loop reads, no lock is needed for that. What
waits on the loop is woken through `call_soon_threadsafe`.
"""

from __future__ import annotations

import asyncio
import contextlib
import math

from convener.core.lease import LeaseTerms
from convener.errors import OwnershipLost
from convener.manager.clock import boottime


class Lease:
    """When this incarnation may act (I7). `terms` None: the only process there is, which may always act."""

    def __init__(self, terms: LeaseTerms | None) -> None:
        self.terms = terms
        self._deadline = math.inf if terms is None else -math.inf
        self._ended = False
        self._renewed = asyncio.Event()
        self._loop = asyncio.get_running_loop()

    def renewed(self, sent: float) -> None:
        """A renewal that was sent at `sent` succeeded. Called from the heartbeat's thread."""
        assert self.terms is not None
        self._deadline = max(self._deadline, self.terms.deadline(sent))
        self._loop.call_soon_threadsafe(self._renewed.set)

    def end(self) -> None:
        """This incarnation is over: it never acts again."""
        self._ended = True
        self._deadline = -math.inf

    @property
    def ended(self) -> bool:
        """Whether `end` was called."""
        return self._ended

    def margin(self) -> float:
        """Seconds until this node must stop acting; negative when it must not act."""
        return self._deadline - boottime() if not self._ended else -math.inf

    def valid(self) -> bool:
        """Whether the node may act at this instant."""
        return not self._ended and boottime() < self._deadline

    async def wait_valid(self, timeout: float | None = None) -> None:
        """Return when the node may act.

        Raises:
            OwnershipLost: the incarnation has ended, or `timeout` seconds passed.
        """
        try:
            async with asyncio.timeout(timeout):
                while not self.valid():
                    if self._ended:
                        raise OwnershipLost("this incarnation of the node has ended")
                    self._renewed.clear()
                    await self._woken()
        except TimeoutError as error:
            raise OwnershipLost("this node is suspended: its lease is not good", retry_after=1.0) from error

    async def _woken(self) -> None:
        # `end` is not announced, so look again every second.
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(1.0):
                await self._renewed.wait()
