"""The wall clock of the local stores."""

from __future__ import annotations

import time

from convener.store.clock import WallClock, boottime_ns

MS = 1_000_000


class Clocks:
    """A wall clock that can be set, and a boot-time clock that cannot."""

    def __init__(self) -> None:
        self.boot = 5_000 * MS
        self.offset = 1_700_000_000_000 * MS

    def clock(self) -> WallClock:
        return WallClock(lambda: self.boot + self.offset, lambda: self.boot)


def test_it_shows_the_wall_clocks_time() -> None:
    clocks = Clocks()
    clock = clocks.clock()
    assert clock() == 1_700_000_005_000
    clocks.boot += 250 * MS
    assert clock() == 1_700_000_005_250


def test_it_neither_goes_back_nor_stands_still_when_the_wall_clock_is_set_back() -> None:
    clocks = Clocks()
    clock = clocks.clock()
    clocks.offset -= 3_600_000 * MS
    assert clock() == 1_700_000_005_000
    clocks.boot += 7 * MS
    assert clock() == 1_700_000_005_007


def test_it_follows_a_wall_clock_that_is_set_forward() -> None:
    clocks = Clocks()
    clock = clocks.clock()
    clocks.offset += 1_000 * MS
    assert clock() == 1_700_000_006_000
    clocks.offset -= 1_000 * MS
    clocks.boot += 1 * MS
    assert clock() == 1_700_000_006_001


def test_the_real_one_is_right() -> None:
    before = time.time_ns() // MS
    now = WallClock()()
    assert before - 1 <= now
    assert boottime_ns() <= boottime_ns()
