"""READ by number finds its place by bisection; a model that scans finds it too."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from convener.core.cursor import Cursor
from convener.core.model import LogEntry, Page
from convener.core.view import Place
from convener.store.redis import RedisStore
from tests.support.servers import Server

# Lengths of epochs and the gaps between them; epochs are as far apart as clocks make them.
LOGS = st.lists(st.tuples(st.integers(1, 6), st.integers(1, 2**40)), min_size=1, max_size=12)


def _entries(shape: list[tuple[int, int]], first: int) -> list[LogEntry]:
    entries: list[LogEntry] = []
    epoch, seq = 1_700_000_000_000, first
    for length, gap in shape:
        epoch += gap
        for _ in range(length):
            entries.append(LogEntry(epoch, seq, f'{{"n":{seq}}}'))
            seq += 1
    return entries


async def _write(store: RedisStore, cid: str, entries: list[LogEntry]) -> None:
    key = store.keys.log(cid)
    await store.erase(cid)
    await store.create(cid, "u", "{}", "g")
    for entry in entries:
        await store.topology.execute(key, "XADD", key, f"{entry.epoch}-{entry.seq}", "e", entry.event)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    shape=LOGS,
    first=st.sampled_from([1, 1, 5]),
    limit=st.integers(0, 30),
    numbers=st.lists(st.integers(0, 80), min_size=3, max_size=8),
)
async def test_bare_numbers(
    store: RedisStore, shape: list[tuple[int, int]], first: int, limit: int, numbers: list[int]
) -> None:
    entries = _entries(shape, first)
    await _write(store, "c", entries)
    tip = entries[-1].epoch, entries[-1].seq
    for number in numbers:
        after = number % (tip[1] + 3)
        expected = tuple(e for e in entries if e.seq > after)[:limit]
        page = await store.read("c", Cursor(place=Place(0, after)), limit)
        assert page == Page("g", tip, expected, first=first)


async def test_exact_cursors(store: RedisStore) -> None:
    entries = _entries([(3, 10), (2, 7), (1, 1)], 1)
    await _write(store, "c", entries)
    tip = entries[-1].epoch, entries[-1].seq
    for i, entry in enumerate(entries):
        page = await store.read("c", Cursor("g", Place(entry.epoch, entry.seq)), 100)
        assert page == Page("g", tip, tuple(entries[i + 1 :]))
    everything = tuple(entries)
    assert await store.read("c", Cursor("g"), 100) == Page("g", tip, everything)
    for wrong in (
        Cursor("other", Place(*tip)),
        Cursor("other"),
        Cursor("g", Place(tip[0] + 1, tip[1])),
        Cursor("g", Place(entries[3].epoch, entries[2].seq)),
        Cursor("g", Place(tip[0], tip[1] + 1)),
    ):
        assert await store.read("c", wrong, 100) == Page("g", tip, everything, resync=True), wrong


async def test_a_log_without_entries_and_no_conversation(store: RedisStore) -> None:
    assert await store.read("c", Cursor(), 10) is None
    await store.create("c", "u", "{}", "g")
    assert await store.read("c", Cursor(), 10) == Page("g", (0, 0))
    assert await store.read("c", Cursor(place=Place(0, 5)), 10) == Page("g", (0, 0))
    assert await store.read("c", Cursor("g", Place(5, 1)), 10) == Page("g", (0, 0), resync=True)


@pytest.mark.parametrize("epochs", [3000])
async def test_the_number_of_looks_grows_with_the_logarithm(server: Server, store: RedisStore, epochs: int) -> None:
    entries = _entries([(1, 977)] * epochs, 1)
    await _write(store, "c", entries)

    def looks() -> int:
        with server.client(decode_responses=True) as client:
            shown = client.info("commandstats")  # pyright: ignore[reportUnknownMemberType]
        return sum(shown.get(f"cmdstat_{name}", {}).get("calls", 0) for name in ("xrange", "xrevrange"))

    before = looks()
    page = await store.read("c", Cursor(place=Place(0, 777)), 2)
    assert page is not None
    assert [entry.seq for entry in page.entries] == [778, 779]
    # One or two looks per halving of the numbers between the first and the last epoch.
    assert looks() - before <= 2 * 2 * (977 * epochs).bit_length()
