"""Clocks. `boottime` counts while the machine sleeps, which is what a lease needs: a suspended laptop must find its
lease over, not paused. Where the platform has no such clock, the monotonic one has to do.
"""

from __future__ import annotations

import time

_BOOT = getattr(time, "CLOCK_BOOTTIME", None)


def boottime() -> float:
    """Seconds since boot, including suspension; never goes back."""
    return time.monotonic() if _BOOT is None else time.clock_gettime(_BOOT)


def wall_ms() -> int:
    """Milliseconds since 1970. For people and event times; no decision of the protocol depends on it."""
    return time.time_ns() // 1_000_000
