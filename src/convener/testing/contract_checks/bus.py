"""Publications: what is said, to whom, in which order, and what is not said."""

from __future__ import annotations

import asyncio
import json
from typing import Any

from convener.core.model import PUBLISH_LIMIT, NewMessage
from convener.core.wire import event, input_event, publish_inbox, publish_log, publish_pieces, publish_status
from convener.store.base import Store
from convener.store.clock import boottime_ns
from convener.testing.contract_checks.tools import (
    REPLY,
    answer,
    append,
    claim,
    head,
    made,
    owned,
    reply,
    send,
    take_in,
    until,
    waiting,
)
from convener.testing.harness import Harness


class Listener:
    """Keeps what a channel says."""

    def __init__(self) -> None:
        self.heard: list[bytes] = []
        self.gaps = 0

    def take(self, payload: bytes) -> None:
        """The handler."""
        self.heard.append(payload)

    def gap(self) -> None:
        """Publications may have been missed."""
        self.gaps += 1

    async def until(self, count: int) -> list[bytes]:
        """Wait for `count` publications; all so far."""

        async def look() -> list[bytes]:
            return self.heard

        return await until(look, lambda heard: len(heard) >= count, f"{count} publications were heard")

    async def texts(self, count: int) -> list[Any]:
        """The same as JSON values."""
        return [json.loads(payload) for payload in await self.until(count)]


async def listening(store: Store, channel: str) -> Listener:
    """Subscribe."""
    listener = Listener()
    await store.subscribe(channel, listener.take, listener.gap)
    return listener


async def flushed(store: Store, channel: str, listener: Listener) -> list[bytes]:
    """What was heard before a mark that is published now; so nothing else is on its way."""
    await store.publish(channel, b"mark")

    async def look() -> list[bytes]:
        return listener.heard

    heard = await until(look, lambda h: b"mark" in h, "the mark was heard")
    return heard[: heard.index(b"mark")]


async def check_everybody_hears_every_step(h: Harness) -> None:
    """Inbox entries, log entries, status; the publisher's own connection hears it too."""
    a, b = await h.connect(), await h.connect()
    await made(a)
    listeners = [await listening(s, s.channel("c", "c")) for s in (a, b)]
    await send(a, "m1")
    read = await a.inbox("c")
    assert read is not None
    entry = read[1][0]
    opened = (await claim(b, "a~1")).opened
    assert opened is not None
    await take_in(a)
    await answer(a, 1)
    m = await head(a)
    assert await a.release("c", "a~1", m.epoch, m.seq) == "OK"
    await a.stop("c", "b~1", "why", "")
    expected = [
        publish_inbox(entry),
        publish_log(m.epoch, 1, (opened.event,)),
        publish_log(m.epoch, 2, (input_event(entry),)),
        publish_log(m.epoch, 3, (event("turn_done", "t1", 1, "{}"),)),
        publish_status(m.epoch, "hibernated"),
    ]
    for listener in listeners:
        texts = await listener.texts(6)
        assert texts[:5] == [json.loads(text) for text in expected]
        assert [json.loads(e)["kind"] if isinstance(e, str) else e["kind"] for e in texts[5]["events"]] == [
            "open",
            "stopped",
        ]
        assert texts[5]["seq"] == 4
        assert listener.gaps == 0


async def check_answers_pieces_and_alarms_are_said(h: Harness) -> None:
    """Answers and alarms as inbox entries, pieces as pieces (large ones by number), waiting as a status."""
    a, b = await h.connect(), await h.connect()
    m = await waiting(a, "t1.1")
    heard = await listening(b, b.channel("c", "c"))
    assert await a.add_pieces("c", "a~1", m.epoch, 1, ['{"data":"é"}', "2"]) == "OK"
    large = json.dumps("é" * (PUBLISH_LIMIT // 2), ensure_ascii=False)
    assert await a.add_pieces("c", "a~1", m.epoch, 1, ["1", large]) == "OK"
    assert await a.release("c", "a~1", m.epoch, m.seq) == "OK"
    await reply(a, "t1.1", "r1")
    await a.set_alarm("c", "alarm/1", "1")
    await a.fire("c", "alarm/1", max_pending=9)
    await claim(a, "b~1", reason="answer")
    await append(a, cursor=3, closing="held")
    await a.resume("c")
    texts = await heard.texts(7)
    answered, alarmed = ({name: text[name] for name in ("ts", "data")} for text in texts[3:5])
    assert texts == [
        json.loads(publish_pieces(m.epoch, ['{"data":"é"}', "2"])),
        {"t": "piece", "epoch": m.epoch, "n": 2},
        json.loads(publish_status(m.epoch, "waiting")),
        {"t": "in", "pos": 2, "id": "r1", "kind": "answer", "user": "u", **answered},
        {"t": "in", "pos": 3, "id": "alarm/1", "kind": "alarm", "user": "u", **alarmed},
        texts[5],
        {"t": "status", "epoch": texts[5]["epoch"], "status": "hibernated"},
    ]
    assert (answered["data"], alarmed["data"]) == ({"ask_id": "t1.1", "data": "yes"}, 1)


async def check_what_is_refused_is_not_said(h: Harness) -> None:
    """Nor is what says nothing: metadata, state alone, a slot."""
    s = await h.connect()
    m = await owned(s)
    await send(s, "m1")
    channel = s.channel("c", "c")
    listener = await listening(s, channel)
    await send(s, "m1")
    await send(s, "m2", max_pending=1)
    await send(s, "m2", reject_busy=True)
    await claim(s, "b~1", owner="")
    await append(s, REPLY, epoch=m.epoch - 1)
    await append(s, REPLY, expected=0)
    await append(s, state=b"x")
    await s.release("c", "a~1", m.epoch, m.seq)
    await s.resume("c")
    await s.set_metadata("c", "{}")
    await s.answer("c", "t1.1", NewMessage("r1", "u", "1", "answer"))
    await s.add_pieces("c", "a~1", m.epoch, 0, ["late"])
    await s.add_pieces("c", "b~1", m.epoch, 1, ["not the owner's"])
    await s.add_pieces("c", "a~1", m.epoch, 1, [])
    await s.set_alarm("c", "alarm/1", "1")
    await s.fire("c", "alarm/1", max_pending=1)
    await s.fire("c", "alarm/2", max_pending=9)
    await s.drop_alarm("c", "alarm/1")
    await s.set_timer("c", "alarm/1", 1)
    await append(s, REPLY, closing="stopped")
    assert await flushed(s, channel, listener) == []


async def check_large_data_is_not_published(h: Harness) -> None:
    """Above the limit only the numbers: a slow subscriber must not fill the store."""
    s = await h.connect()
    await owned(s)
    listener = await listening(s, s.channel("c", "c"))
    small = '"' + "x" * (PUBLISH_LIMIT - 2) + '"'
    await send(s, "m1", data=small)
    await send(s, "m2", data=small[:-1] + 'x"')
    small_event = event("reply", "t1", 1, '"' + "x" * (PUBLISH_LIMIT - len(event("reply", "t1", 1, '""'))) + '"')
    assert len(small_event) == PUBLISH_LIMIT
    await append(s, small_event)
    await append(s, REPLY, small_event)
    texts = await listener.texts(4)
    assert texts[0]["data"] == json.loads(small)
    assert "data" not in texts[1]
    assert texts[1]["pos"] == 2
    assert texts[2]["events"] == [json.loads(small_event)]
    assert ("events" in texts[3], texts[3]["n"], texts[3]["seq"]) == (False, 2, 3)


async def check_channels_are_separate(h: Harness) -> None:
    """A conversation's channel is not another's; any bytes pass."""
    a, b = await h.connect(), await h.connect()
    node, other, sync = a.channel("n", "b~1"), a.channel("n", "c~1"), a.channel("sync")
    listeners = [await listening(b, channel) for channel in (node, other, sync)]
    payload = bytes(range(256)) * 40
    await a.publish(node, payload)
    await a.publish(sync, b"")
    assert await listeners[0].until(1) == [payload]
    assert await listeners[2].until(1) == [b""]
    assert await flushed(a, other, listeners[1]) == []


async def check_nothing_is_lost_after_the_subscription(h: Harness) -> None:
    """`subscribe` returns when the confirmation was read: whatever comes later is heard, in order."""
    a, b = await h.connect(), await h.connect()
    for round_ in range(20):
        channel = a.channel("n", f"x~{round_}")
        listener = await listening(b, channel)
        await asyncio.gather(*(a.publish(channel, b"%d" % i) for i in range(20)))
        assert await listener.until(20) == [b"%d" % i for i in range(20)]
        await b.unsubscribe(channel)


async def check_unsubscribe_ends_it(h: Harness) -> None:
    """And the channel can be subscribed again."""
    s = await h.connect()
    channel = s.channel("n", "a~1")
    first = await listening(s, channel)
    await s.publish(channel, b"1")
    await first.until(1)
    await s.unsubscribe(channel)
    await s.unsubscribe(channel)
    await s.publish(channel, b"2")
    second = await listening(s, channel)
    await s.publish(channel, b"3")
    assert await second.until(1) == [b"3"]
    assert first.heard == [b"1"]


async def check_handlers_are_called_by_the_loop(h: Harness) -> None:
    """Never from inside the call that published, so a handler may change what the caller is working on."""
    s = await h.connect()
    await made(s)
    callers: list[asyncio.Task[Any] | None] = []
    await s.subscribe(s.channel("c", "c"), lambda _: callers.append(asyncio.current_task()), lambda: None)
    await send(s, "m1")
    await s.publish(s.channel("c", "c"), b"{}")

    async def look() -> int:
        return len(callers)

    await until(look, lambda count: count == 2, "both were heard")
    assert asyncio.current_task() not in callers


async def check_a_handler_that_raises_makes_nobody_deaf(h: Harness) -> None:
    """It must not; and if it does, the connection goes on."""
    s = await h.connect()
    bad, good = s.channel("n", "bad~1"), s.channel("n", "good~1")
    heard: list[bytes] = []

    def raising(payload: bytes) -> None:
        heard.append(payload)
        raise RuntimeError("a handler that raises, on purpose")

    await s.subscribe(bad, raising, lambda: None)
    listener = await listening(s, good)
    for payload in (b"1", b"2"):
        await s.publish(bad, payload)
        await s.publish(good, payload)
    assert await listener.until(2) == [b"1", b"2"]

    async def look() -> list[bytes]:
        return heard

    await until(look, lambda found: found == [b"1", b"2"], "the bad handler was called again")


async def check_a_healthy_bus_is_not_deaf(h: Harness) -> None:
    """`heard` keeps up with the boot-time clock."""
    s = await h.connect()
    await listening(s, s.channel("sync"))
    since = boottime_ns() / 1e9

    async def look() -> float:
        return s.heard()

    await until(look, lambda at: at >= since, "something was heard since")
    assert s.heard() <= boottime_ns() / 1e9
