"""The bus of one process: order, bounds, loss that is made known, threads."""

from __future__ import annotations

import asyncio
import threading

import pytest

from convener.errors import StoreUnavailable
from convener.store.localbus import Exchange, LocalBus
from tests.support.waiting import wait_until

pytestmark = pytest.mark.anyio


class Ear:
    def __init__(self) -> None:
        self.heard: list[bytes] = []
        self.gaps = 0

    def take(self, payload: bytes) -> None:
        self.heard.append(payload)

    def gap(self) -> None:
        self.gaps += 1
        self.heard.append(b"gap")


async def test_nothing_is_handed_over_inside_the_call() -> None:
    exchange = Exchange()
    bus, ear = LocalBus(exchange), Ear()
    bus.subscribe("x", ear.take, ear.gap)
    exchange.publish("x", b"1")
    assert ear.heard == []
    await wait_until(lambda: ear.heard == [b"1"], "it was heard")


async def test_order_is_kept_across_channels_of_a_connection() -> None:
    exchange = Exchange()
    bus, ear = LocalBus(exchange), Ear()
    for channel in ("x", "y"):
        bus.subscribe(channel, ear.take, ear.gap)
    sent = [b"%d" % i for i in range(1_000)]
    for i, payload in enumerate(sent):
        exchange.publish("xy"[i % 2], payload)
    await wait_until(lambda: ear.heard == sent, "all were heard in order")


async def test_a_long_queue_does_not_hold_the_loop() -> None:
    exchange = Exchange()
    bus, ear = LocalBus(exchange), Ear()
    bus.subscribe("x", ear.take, ear.gap)
    for i in range(2_000):
        exchange.publish("x", b"%d" % i)
    at_turns: list[int] = []
    while len(ear.heard) < 2_000:
        await asyncio.sleep(0)
        at_turns.append(len(ear.heard))
    assert len(at_turns) > 4


async def test_a_full_queue_is_lost_as_a_whole_and_every_channel_is_told() -> None:
    exchange = Exchange()
    bus, x, y = LocalBus(exchange, limit=10), Ear(), Ear()
    bus.subscribe("x", x.take, x.gap)
    bus.subscribe("y", y.take, y.gap)
    other, z = LocalBus(exchange), Ear()
    other.subscribe("x", z.take, z.gap)
    for i in range(13):
        exchange.publish("x", b"%d" % i)
    await wait_until(lambda: len(z.heard) == 13, "the other connection heard all")
    await wait_until(lambda: x.heard == [b"gap", b"10", b"11", b"12"], "the rest was heard after the gap")
    assert (x.gaps, y.gaps, z.gaps) == (1, 1, 0)


async def test_unsubscribing_drops_what_is_queued() -> None:
    exchange = Exchange()
    bus, ear, after = LocalBus(exchange), Ear(), Ear()
    bus.subscribe("x", ear.take, ear.gap)
    exchange.publish("x", b"1")
    bus.unsubscribe("x")
    bus.subscribe("x", after.take, after.gap)
    exchange.publish("x", b"2")
    await wait_until(lambda: after.heard == [b"2"], "the new handler heard what came after it")
    assert ear.heard == []


async def test_a_handler_may_unsubscribe_others() -> None:
    exchange = Exchange()
    bus, ear = LocalBus(exchange), Ear()
    bus.subscribe("x", lambda _: bus.unsubscribe("y"), lambda: None)
    bus.subscribe("y", ear.take, ear.gap)
    bus.subscribe("z", ear.take, ear.gap)
    for channel in "xyz":
        exchange.publish(channel, channel.encode())
    await wait_until(lambda: ear.heard == [b"z"], "only z was heard")


async def test_a_handler_that_raises_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    exchange = Exchange()
    bus, ear = LocalBus(exchange), Ear()

    def raising(_: bytes) -> None:
        raise RuntimeError("on purpose")

    bus.subscribe("x", raising, lambda: None)
    bus.subscribe("y", ear.take, ear.gap)
    exchange.publish("x", b"1")
    exchange.publish("y", b"2")
    await wait_until(lambda: ear.heard == [b"2"], "the next one was heard")
    assert "a subscriber's handler raised" in caplog.text


async def test_threads_may_publish() -> None:
    exchange = Exchange()
    bus, ear = LocalBus(exchange), Ear()
    bus.subscribe("x", ear.take, ear.gap)

    def publish() -> None:
        for i in range(100):
            exchange.publish("x", b"%d" % i)

    threads = [threading.Thread(target=publish) for _ in range(3)]
    for thread in threads:
        thread.start()
    await wait_until(lambda: len(ear.heard) == 300, "all were heard")
    for thread in threads:
        thread.join()
    assert sorted(ear.heard) == sorted(b"%d" % i for i in range(100) for _ in range(3))


async def test_closing_ends_everything() -> None:
    exchange = Exchange()
    bus, ear = LocalBus(exchange), Ear()
    bus.subscribe("x", ear.take, ear.gap)
    exchange.publish("x", b"1")
    bus.close()
    assert exchange.channels() == set()
    exchange.publish("x", b"2")
    with pytest.raises(StoreUnavailable):
        bus.subscribe("x", ear.take, ear.gap)
    await asyncio.sleep(0)
    assert ear.heard == []


def test_a_loop_that_ended_before_its_connection_hurts_nobody() -> None:
    exchange = Exchange()
    bus = LocalBus(exchange)

    async def subscribe() -> None:
        bus.subscribe("x", lambda _: None, lambda: None)

    asyncio.run(subscribe())
    exchange.publish("x", b"1")
    bus.close()
