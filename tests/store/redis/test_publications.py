"""What a subscriber hears is what was written, above 8 KiB the numbers alone."""

from __future__ import annotations

import json
from typing import Any

import pytest

from convener.core import wire
from convener.core.cursor import Cursor
from convener.core.model import PUBLISH_LIMIT, AppendRequest, ClaimRequest, InboxEntry, NewMessage
from convener.core.view import Place
from convener.store.redis import RedisStore
from tests.support.waiting import wait_until


async def _heard(store: RedisStore, cid: str) -> list[bytes]:
    heard: list[bytes] = []
    await store.subscribe(store.channel("c", cid), heard.append, lambda: None)
    return heard


def _text(size: int) -> str:
    """JSON text of `size` bytes, not of `size` characters."""
    filler = "é" * ((size - 2) // 2) + "x" * (size % 2)
    text = f'"{filler}"'
    assert len(text.encode()) == size
    return text


@pytest.mark.parametrize("size", [PUBLISH_LIMIT - 1, PUBLISH_LIMIT, PUBLISH_LIMIT + 1, 300_000])
async def test_messages(store: RedisStore, size: int) -> None:
    await store.create("c", "u", "{}", "g")
    heard = await _heard(store, "c")
    await store.send("c", NewMessage("m1", "u", _text(size)), max_pending=5)
    await wait_until(lambda: heard, "the message is heard")
    found = await store.inbox("c")
    assert found is not None
    (entry,) = found[1]
    assert entry == InboxEntry(1, "m1", "message", "u", entry.ts, _text(size))
    assert heard[0].decode() == wire.publish_inbox(entry)
    assert ("data" in json.loads(heard[0])) == (size <= PUBLISH_LIMIT)


@pytest.mark.parametrize("sizes", [(4096, 4096), (4096, 4097), (100_000, 2, 2)])
async def test_batches(store: RedisStore, sizes: tuple[int, ...]) -> None:
    await store.create("c", "u", "{}", "g")
    claimed = await store.claim("c", ClaimRequest("n~1", "x", "", 0, "start"))
    assert claimed.meta
    heard = await _heard(store, "c")
    events = tuple(_text(size) for size in sizes)
    epoch = claimed.meta.epoch
    await store.append("c", AppendRequest("n~1", epoch, 1, "b", 0, 0, 0, events))
    await wait_until(lambda: heard, "the batch is heard")
    assert heard[0].decode() == wire.publish_log(epoch, 2, events)
    message: dict[str, Any] = json.loads(heard[0])
    if sum(sizes) > PUBLISH_LIMIT:
        assert message == {"t": "log", "epoch": epoch, "seq": 2, "n": len(sizes)}
    page = await store.read("c", Cursor(place=Place(0, 1)), 10)
    assert page is not None
    assert tuple(entry.event for entry in page.entries) == events


async def test_free_text_survives_the_scripts(store: RedisStore) -> None:
    reason = 'a "reason" with \\ / \n \x1f é 😀'
    await store.create("c", "u", "{}", "g")
    heard = await _heard(store, "c")
    await store.stop("c", "n~1", reason, "")
    await wait_until(lambda: heard, "the stop is heard")
    page = await store.read("c", Cursor(), 10)
    assert page is not None
    assert json.loads(page.entries[-1].event)["data"] == {"reason": reason}
    assert json.loads(heard[0])["events"][-1]["data"] == {"reason": reason}
