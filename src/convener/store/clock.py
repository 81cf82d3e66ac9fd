"""Clocks of the stores that live inside one process."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final

_BOOT_CLOCK: Final[int | None] = getattr(time, "CLOCK_BOOTTIME", None)


def boottime_ns() -> int:
    """Nanoseconds on a clock that never jumps and, on Linux, goes on while the machine sleeps."""
    return time.monotonic_ns() if _BOOT_CLOCK is None else time.clock_gettime_ns(_BOOT_CLOCK)


class WallClock:
    """Milliseconds since 1970 that never go back and never stand still.

    Leases need the right *rate*, readers of timestamps want the right *time*. So the boot-time clock counts
    on from an anchor; a wall clock that was set forward is followed (the grace period keeps that from burying
    anybody), one that was set back is not.
    """

    def __init__(self, wall_ns: Callable[[], int] = time.time_ns, boot_ns: Callable[[], int] = boottime_ns) -> None:
        self._wall_ns = wall_ns
        self._boot_ns = boot_ns
        self._offset = wall_ns() - boot_ns()

    def __call__(self) -> int:
        """The time in ms. Callers serialise their calls."""
        boot = self._boot_ns()
        self._offset = max(self._offset, self._wall_ns() - boot)
        return (boot + self._offset) // 1_000_000
