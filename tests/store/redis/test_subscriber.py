"""The subscriber against a real server: confirmations, gaps, and each way of being deaf."""

from __future__ import annotations

import asyncio
import logging
import time
from contextlib import AsyncExitStack

import pytest

from convener.errors import StoreUnavailable
from convener.store.redis import HeartbeatLink, RedisStore
from convener.store.redis.endpoint import Endpoint, pack
from convener.store.redis.keys import Keys
from convener.store.redis.station import BATCH
from tests.support.proxy import Passage, Proxy
from tests.support.servers import Server
from tests.support.waiting import wait_until

# uvloop runs timers before it reads, asyncio reads first.
EVENT_LOOPS = [("asyncio", {"use_uvloop": False}), ("asyncio", {"use_uvloop": True})]


class Listener:
    """Keeps what its channel brings."""

    def __init__(self, store: RedisStore, ident: str = "c") -> None:
        self.store = store
        self.channel = store.channel("c", ident)
        self.heard: list[bytes] = []
        self.gaps = 0

    async def subscribe(self) -> Listener:
        await self.store.subscribe(self.channel, self.heard.append, self.gap)
        return self

    def gap(self) -> None:
        self.gaps += 1

    async def hears(self, text: bytes) -> None:
        """Whether a publication arrives that is sent now, once."""
        await self.store.publish(self.channel, text)
        await wait_until(lambda: text in self.heard, f"{text!r} is heard on {self.channel}")


def _subscribed(server: Server, *channels: str) -> int:
    reply = server.ask("PUBSUB", "SHARDNUMSUB", *channels)
    assert isinstance(reply, list)
    return sum(reply[1::2])  # pyright: ignore[reportUnknownArgumentType]


def _connects(store: RedisStore) -> int:
    return store.statistics()[1].connects


def _ears(passage: Passage) -> bool:
    return passage.subscribes


async def _through(
    stack: AsyncExitStack,
    server: Server,
    namespace: str,
    *,
    probe_interval: float = 1.0,
    count_interval: float = 30.0,
    silence: float = 5.0,
    deadline: float = 5.0,
) -> tuple[RedisStore, Proxy]:
    proxy = await stack.enter_async_context(Proxy(server.port))
    store = RedisStore(
        proxy.url,
        namespace=namespace,
        probe_interval=probe_interval,
        count_interval=count_interval,
        silence=silence,
        deadline=deadline,
    )
    return await stack.enter_async_context(store), proxy


# -- subscriptions -------------------------------------------------------------------------------------------------


async def test_whatever_is_published_after_subscribe_returns_is_heard(server: Server, store: RedisStore) -> None:
    for i in range(20):
        listener = await Listener(store, f"c{i}").subscribe()
        assert server.ask("SPUBLISH", listener.channel, "now") == 1
        await wait_until(lambda listener=listener: listener.heard == [b"now"], "it is heard")


async def test_publications_arrive_once_and_in_order(store: RedisStore) -> None:
    listener = await Listener(store).subscribe()
    texts = [b"%d" % i for i in range(3000)]
    await asyncio.gather(*(store.publish(listener.channel, text) for text in texts))
    await wait_until(lambda: len(listener.heard) >= len(texts), "all are heard")
    assert listener.heard == texts
    assert store.statistics()[1].received == len(texts)


async def test_many_channels_at_once(server: Server, store: RedisStore) -> None:
    listeners = [Listener(store, f"c{i}") for i in range(2 * BATCH + 7)]
    await asyncio.gather(*(listener.subscribe() for listener in listeners))
    channels = [listener.channel for listener in listeners]
    assert _subscribed(server, *channels) == len(channels)
    await asyncio.gather(*(store.unsubscribe(channel) for channel in channels))
    await wait_until(lambda: _subscribed(server, *channels) == 0, "all are unsubscribed")
    assert store.statistics()[1].channels == 1


async def test_nothing_is_handed_over_after_unsubscribe(store: RedisStore) -> None:
    listener = await Listener(store).subscribe()
    other = await Listener(store, "other").subscribe()
    await store.unsubscribe(listener.channel)
    await store.unsubscribe(listener.channel)
    await store.publish(listener.channel, b"x")
    await other.hears(b"y")
    assert listener.heard == []


async def test_subscribing_anew_at_once_waits_for_its_own_confirmation(store: RedisStore) -> None:
    for i in range(30):
        listener = await Listener(store).subscribe()
        await store.unsubscribe(listener.channel)
        again = await Listener(store).subscribe()
        assert not listener.gaps
        assert not again.gaps
        await again.hears(b"%d" % i)
        assert not listener.heard
        await store.unsubscribe(again.channel)


async def test_subscribing_twice_replaces_the_handlers(store: RedisStore) -> None:
    first, second = Listener(store), Listener(store)
    await asyncio.gather(first.subscribe(), second.subscribe())
    await second.hears(b"x")
    await first.subscribe()
    await first.hears(b"y")
    assert (first.heard, second.heard) == ([b"y"], [b"x"])


async def test_a_subscription_that_is_not_confirmed_in_time_is_none(
    server: Server, namespace: str, stack: AsyncExitStack
) -> None:
    store, proxy = await _through(stack, server, namespace, deadline=1, silence=60, probe_interval=60)
    proxy.freeze(_ears)
    with pytest.raises(StoreUnavailable, match="confirm"):
        await Listener(store).subscribe()
    assert store.statistics()[1].channels == 1
    cancelled = asyncio.create_task(Listener(store, "d").subscribe())
    await wait_until(lambda: store.statistics()[1].channels == 2, "it waits")
    cancelled.cancel()
    await asyncio.gather(cancelled, return_exceptions=True)
    assert store.statistics()[1].channels == 1
    proxy.thaw()
    listener = await Listener(store).subscribe()
    await listener.hears(b"x")
    await wait_until(lambda: _subscribed(server, store.channel("c", "d")) == 0, "what was given up is gone")


async def test_closing_ends_those_who_wait(server: Server, namespace: str, stack: AsyncExitStack) -> None:
    store, proxy = await _through(stack, server, namespace)
    proxy.freeze(_ears)
    task = asyncio.create_task(Listener(store).subscribe())
    await wait_until(lambda: store.statistics()[1].channels == 2, "it waits")
    await store.close()
    with pytest.raises(StoreUnavailable, match="closed"):
        await task
    with pytest.raises(StoreUnavailable, match="not open"):
        await Listener(store).subscribe()


async def test_a_channel_that_the_access_list_forbids(server: Server, namespace: str, stack: AsyncExitStack) -> None:
    user = f"u{namespace}"
    server.ask("ACL", "SETUSER", user, "on", ">pw", "~*", "+@all", "resetchannels", f"&{{{namespace}:*")
    stack.callback(server.ask, "ACL", "DELUSER", user)
    url = server.url.replace("redis://", f"redis://{user}:pw@")
    store = await stack.enter_async_context(RedisStore(url, namespace=namespace))
    listener = await Listener(store).subscribe()
    with pytest.raises(StoreUnavailable, match="refuses"):
        await store.subscribe("{elsewhere}", lambda _: None, lambda: None)
    await listener.hears(b"x")
    assert store.statistics()[1].channels == 2
    link = store.heartbeat_link()
    link.hold_live("n~1")
    link.close()
    with pytest.raises(StoreUnavailable, match="refuses"):
        HeartbeatLink(Endpoint(url), Keys("other"), 5).hold_live("n~1")


# -- handlers and frames -------------------------------------------------------------------------------------------


async def test_a_handler_that_raises_harms_nobody(store: RedisStore, caplog: pytest.LogCaptureFixture) -> None:
    def fails(_: bytes) -> None:
        raise ValueError("bad news")

    channel = store.channel("c", "bad")
    await store.subscribe(channel, fails, lambda: None)
    good = await Listener(store, "good").subscribe()
    with caplog.at_level(logging.ERROR):
        await store.publish(channel, b"x")
        await good.hears(b"y")
    assert store.statistics()[1].handler_errors == 1
    assert "bad news" in caplog.text
    assert _connects(store) == 1


async def test_malformed_frames_are_counted_and_skipped(server: Server, namespace: str, stack: AsyncExitStack) -> None:
    store, proxy = await _through(stack, server, namespace)
    listener = await Listener(store).subscribe()
    (ear,) = (p for p in proxy.passages if p.subscribes)
    junk = [b":7\r\n", b"*0\r\n", b"*2\r\n$3\r\nfoo\r\n$-1\r\n", b"*3\r\n$10\r\nssubscribe\r\n:1\r\n:2\r\n", b"$-1\r\n"]
    for frame in junk:
        ear.to_client(frame)
    await listener.hears(b"x")
    assert store.statistics()[1].malformed == len(junk)
    assert _connects(store) == 1


async def test_what_is_no_protocol_at_all_makes_a_new_connection(
    server: Server, namespace: str, stack: AsyncExitStack
) -> None:
    store, proxy = await _through(stack, server, namespace)
    listener = await Listener(store).subscribe()
    (ear,) = (p for p in proxy.passages if p.subscribes)
    ear.to_client(b"\x00garbage\r\n")
    await wait_until(lambda: listener.gaps == 1, "the gap is told")
    await listener.hears(b"x")


# -- reconnects ----------------------------------------------------------------------------------------------------


async def test_after_a_reconnect_every_channel_is_back_before_its_gap_is_told(
    server: Server, namespace: str, stack: AsyncExitStack
) -> None:
    store, proxy = await _through(stack, server, namespace)
    at_gap: list[tuple[str, int]] = []
    heard: list[bytes] = []
    channels = [store.channel("c", f"c{i}") for i in range(BATCH + 3)]

    async def subscribe(number: int, channel: str) -> None:
        def gap() -> None:
            # Asking takes a while, so only some do.
            at_gap.append((channel, _subscribed(server, channel) if number % 50 == 0 else 1))

        await store.subscribe(channel, heard.append, gap)

    await asyncio.gather(*(subscribe(number, channel) for number, channel in enumerate(channels)))
    proxy.cut(_ears)
    await wait_until(lambda: len(at_gap) >= len(channels), "every gap is told")
    assert sorted(at_gap) == sorted((channel, 1) for channel in channels)
    await asyncio.gather(*(store.publish(channel, channel.encode()) for channel in channels))
    await wait_until(lambda: len(heard) == len(channels), "all is heard again")
    assert _connects(store) == 2


async def test_a_subscription_begun_while_disconnected_succeeds_without_a_gap(
    server: Server, namespace: str, stack: AsyncExitStack
) -> None:
    store, proxy = await _through(stack, server, namespace)
    proxy.accepting = False
    proxy.cut(_ears)
    await wait_until(lambda: not store.statistics()[1].connected, "the loss is noticed")
    listener = Listener(store)
    task = asyncio.create_task(listener.subscribe())
    await wait_until(lambda: store.statistics()[1].channels == 2, "it waits")
    proxy.accepting = True
    await task
    await listener.hears(b"x")
    assert listener.gaps == 0


async def test_a_channel_dropped_by_the_server_is_subscribed_again(
    server: Server, namespace: str, stack: AsyncExitStack
) -> None:
    """As when a hash slot moves: the server says `sunsubscribe` and nobody asked for it."""
    store, proxy = await _through(stack, server, namespace)
    listener, other = await Listener(store).subscribe(), await Listener(store, "other").subscribe()
    (ear,) = (p for p in proxy.passages if p.subscribes)
    ear.to_server(pack(("SUNSUBSCRIBE", listener.channel)))
    await wait_until(lambda: listener.gaps == 1, "the gap is told")
    await listener.hears(b"x")
    assert other.gaps == 0
    statistics = store.statistics()[1]
    assert (statistics.dropped, statistics.connects) == (1, 1)


# -- deafness ------------------------------------------------------------------------------------------------------


async def test_the_canary_notices_a_frozen_subscriber(server: Server, namespace: str, stack: AsyncExitStack) -> None:
    store, proxy = await _through(stack, server, namespace, probe_interval=0.3, silence=600)
    listener = await Listener(store).subscribe()
    before = store.heard()
    await wait_until(lambda: store.heard() > before, "probes come back")
    proxy.freeze(_ears)
    await store.publish(listener.channel, b"lost")
    await wait_until(lambda: listener.gaps == 1, "the deafness is noticed and mended")
    await listener.hears(b"x")
    assert listener.heard == [b"x"]
    assert store.statistics()[1].probe_misses >= 2
    assert store.statistics()[0].connects == 1, "the connection of the commands was well"


async def test_silence_is_noticed_when_no_probe_can_be_sent(
    server: Server, namespace: str, stack: AsyncExitStack
) -> None:
    store, proxy = await _through(stack, server, namespace, probe_interval=0.2, silence=1, deadline=60)
    listener = await Listener(store).subscribe()
    proxy.freeze()
    await wait_until(lambda: listener.gaps == 1, "a new connection is made")
    assert store.statistics()[0].connects == 1, "commands still wait for their deadline"


@pytest.mark.parametrize("anyio_backend", EVENT_LOOPS)
async def test_a_blocked_event_loop_is_not_taken_for_a_dead_server(
    server: Server, namespace: str, stack: AsyncExitStack
) -> None:
    store, _ = await _through(stack, server, namespace, probe_interval=0.5, silence=1)
    listener = await Listener(store).subscribe()
    for i in range(2):
        time.sleep(1.5)  # noqa: ASYNC251  # what a blocking tool call does
        await listener.hears(b"%d" % i)
    assert (_connects(store), listener.gaps) == (1, 0)


async def test_a_lively_connection_is_left_alone(server: Server, namespace: str, stack: AsyncExitStack) -> None:
    store, _ = await _through(stack, server, namespace, probe_interval=0.5, silence=3, count_interval=0.05)
    listener = await Listener(store).subscribe()
    before = store.heard()
    await wait_until(lambda: store.heard() > before + 2, "several probes have come back")
    assert (_connects(store), listener.gaps) == (1, 0)
    assert store.statistics()[1].received == 0


async def test_a_wrong_number_of_subscriptions_is_noticed(
    server: Server, namespace: str, stack: AsyncExitStack
) -> None:
    store, proxy = await _through(stack, server, namespace, count_interval=0.1)
    listener = await Listener(store).subscribe()
    (ear,) = (p for p in proxy.passages if p.subscribes)
    ear.to_server(pack(("SSUBSCRIBE", "{nobody}")))
    await wait_until(lambda: listener.gaps == 1, "the connection is made anew")
    await listener.hears(b"x")
    assert _subscribed(server, "{nobody}") == 0


async def test_a_hidden_count_is_no_mismatch(server: Server, namespace: str, stack: AsyncExitStack) -> None:
    user = f"u{namespace}"
    server.ask("ACL", "SETUSER", user, "on", ">pw", "~*", "&*", "+@all", "-client")
    stack.callback(server.ask, "ACL", "DELUSER", user)
    store = RedisStore(
        server.url.replace("redis://", f"redis://{user}:pw@"),
        namespace=namespace,
        count_interval=0.05,
        probe_interval=0.5,
    )
    await stack.enter_async_context(store)
    listener = await Listener(store).subscribe()
    before = store.heard()
    await wait_until(lambda: store.heard() > before + 1, "several rounds have passed")
    assert (_connects(store), listener.gaps) == (1, 0)
