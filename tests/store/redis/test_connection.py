"""The multiplexed connection against a real server, with a proxy in between where the network has to fail."""

from __future__ import annotations

import asyncio
import random
import time
from contextlib import AsyncExitStack
from typing import cast

import pytest

from convener.core.model import AppendReply, AppendRequest, ClaimRequest, NewMessage
from convener.errors import InvalidRequest, StoreFull, StoreUnavailable
from convener.store.redis import RedisStore
from convener.store.redis.errors import AccessRefused, StoreCommandError, from_reply
from convener.store.redis.scripts import SCRIPTS
from tests.support.proxy import Passage, Proxy
from tests.support.servers import Flavour, Server
from tests.support.waiting import wait_until

MESSAGE = NewMessage("m1", "u", "{}")


# uvloop runs timers before it reads, asyncio reads first.
EVENT_LOOPS = [("asyncio", {"use_uvloop": False}), ("asyncio", {"use_uvloop": True})]


def _commands(passage: Passage) -> bool:
    return not passage.subscribes


async def _through(
    stack: AsyncExitStack, server: Server, namespace: str, *, deadline: float = 5.0, max_in_flight: int = 10_000
) -> tuple[RedisStore, Proxy, list[None]]:
    """A store behind a proxy, and the list of its reconnects."""
    proxy = await stack.enter_async_context(Proxy(server.port))
    reconnects: list[None] = []
    store = RedisStore(
        proxy.url,
        namespace=namespace,
        deadline=deadline,
        max_in_flight=max_in_flight,
        on_reconnect=lambda: reconnects.append(None),
    )
    await stack.enter_async_context(store)
    return store, proxy, reconnects


async def _echo(store: RedisStore, text: str) -> str:
    return (await store.topology.execute("", "ECHO", text)).decode()


def _blocked_clients(server: Server) -> bool:
    return b"blocked_clients:0" not in cast("bytes", server.ask("INFO", "clients"))


async def _execute(store: RedisStore, *parts: str) -> object:
    return await store.topology.execute("", *parts)


async def _owned(store: RedisStore, cid: str) -> int:
    """A conversation of owner n~1; its epoch."""
    await store.create(cid, "u", "{}", "g")
    reply = await store.claim(cid, ClaimRequest("n~1", "x", "", 0, "start"))
    assert reply.meta is not None
    return reply.meta.epoch


def _batch(epoch: int, expected: int, kind: str = "reply", events: int = 1) -> AppendRequest:
    texts = tuple(f'{{"kind":"{kind}","n":{expected + i}}}' for i in range(1, events + 1))
    return AppendRequest("n~1", epoch, expected, f"b{expected}", 0, 0, 0, texts)


# -- order -----------------------------------------------------------------------------------------------------


async def test_replies_are_matched_in_order_while_callers_give_up(store: RedisStore) -> None:
    chance = random.Random(7)
    tasks: dict[asyncio.Task[str], str] = {}
    for round_ in range(40):
        for i in range(25):
            text = f"{round_}.{i}"
            tasks[asyncio.create_task(_echo(store, text))] = text
        for _ in range(chance.randrange(4)):
            await asyncio.sleep(0)
        for task in chance.sample(list(tasks)[-25:], 8):
            task.cancel()
    outcomes = await asyncio.gather(*tasks, return_exceptions=True)
    answered = [
        (outcome, text) for outcome, text in zip(outcomes, tasks.values(), strict=True) if isinstance(outcome, str)
    ]
    assert len(answered) > 300
    assert sum(isinstance(outcome, asyncio.CancelledError) for outcome in outcomes) > 100
    assert all(outcome == text for outcome, text in answered)
    assert store.statistics()[0].connects == 1


async def test_commands_of_one_tick_leave_in_one_write(server: Server, namespace: str, stack: AsyncExitStack) -> None:
    store, proxy, _ = await _through(stack, server, namespace)
    (passage,) = (p for p in proxy.passages if _commands(p))
    before = passage.pieces
    await asyncio.gather(*(_echo(store, str(i)) for i in range(200)))
    # The probe of the subscriber may fall in between.
    assert passage.pieces - before <= 3


async def test_chained_appends_arrive_in_the_order_of_the_calls(store: RedisStore) -> None:
    epoch = await _owned(store, "c")
    replies = await asyncio.gather(*(store.append("c", _batch(epoch, seq)) for seq in range(1, 400)))
    assert [reply.outcome for reply in replies] == ["OK"] * 399
    assert replies[-1] == AppendReply("OK", 400, "b399")


# -- scripts that the server has lost ------------------------------------------------------------------------------


async def test_a_flush_between_chained_appends_is_invisible(server: Server, store: RedisStore) -> None:
    epoch = await _owned(store, "c")
    seq = 1
    for _ in range(20):
        server.ask("SCRIPT", "FLUSH")
        replies = await asyncio.gather(*(store.append("c", _batch(epoch, seq + i)) for i in range(8)))
        assert [reply.outcome for reply in replies] == ["OK"] * 8
        seq += 8
    assert store.statistics()[0].reloads == 20


async def test_what_overtook_a_lost_script_runs_again(server: Server, store: RedisStore) -> None:
    """The flush of another node, and that node's load, fall between two commands of a chain."""
    epoch = await _owned(store, "c")
    await store.send("c", MESSAGE, max_pending=5)
    server.ask("SCRIPT", "FLUSH")
    for name in ("append_final", "release", "send"):
        server.ask("SCRIPT", "LOAD", SCRIPTS[name].source)
    answer = AppendRequest("n~1", epoch, 2, "b2", 1, 1, 0, ('{"kind":"turn_done"}',))
    replies = await asyncio.gather(
        store.append("c", _batch(epoch, 1)),  # NOSCRIPT
        store.append("c", answer),  # finds a gap
        store.release("c", "n~1", epoch, 3),  # finds something unanswered
        store.head("c"),
    )
    assert replies[:3] == [AppendReply("OK", 2, "b1"), AppendReply("OK", 3, "b2"), "OK"]
    head = await store.head("c")
    assert head is not None
    assert (head.owner, head.seq, head.done) == ("", 3, 1)


async def test_commands_that_come_while_scripts_are_loaded_keep_their_order(
    server: Server, namespace: str, stack: AsyncExitStack
) -> None:
    store, proxy, _ = await _through(stack, server, namespace)
    epoch = await _owned(store, "c")
    server.ask("SCRIPT", "FLUSH")
    frozen = proxy.freeze(_commands)
    first = [asyncio.create_task(store.append("c", _batch(epoch, seq))) for seq in range(1, 4)]
    await wait_until(lambda: frozen[0].pieces, "the first ones are on their way")
    proxy.thaw()
    later: list[asyncio.Task[AppendReply]] = []
    while not all(task.done() for task in first):
        later.append(asyncio.create_task(store.append("c", _batch(epoch, 4 + len(later)))))
        await asyncio.sleep(0)
    outcomes = [reply.outcome for reply in await asyncio.gather(*first, *later)]
    assert outcomes == ["OK"] * len(outcomes)
    assert len(later) > 1


async def test_two_nodes_and_constant_flushes(server: Server, namespace: str, stack: AsyncExitStack) -> None:
    stores = [await stack.enter_async_context(RedisStore(server.url, namespace=namespace)) for _ in range(2)]
    epochs = [await _owned(store, f"c{i}") for i, store in enumerate(stores)]

    async def chain(i: int) -> None:
        for seq in range(1, 400, 8):
            batches = (stores[i].append(f"c{i}", _batch(epochs[i], seq + n)) for n in range(8))
            assert [reply.outcome for reply in await asyncio.gather(*batches)] == ["OK"] * 8

    async def flush(done: asyncio.Event) -> None:
        while not done.is_set():
            await asyncio.to_thread(server.ask, "SCRIPT", "FLUSH")

    done = asyncio.Event()
    flusher = asyncio.create_task(flush(done))
    try:
        await asyncio.gather(chain(0), chain(1))
    finally:
        done.set()
        await flusher
    assert sum(store.statistics()[0].reloads for store in stores) > 2


# -- a connection that is lost -------------------------------------------------------------------------------------


async def test_killed_with_commands_in_flight(server: Server, namespace: str, stack: AsyncExitStack) -> None:
    store, proxy, reconnects = await _through(stack, server, namespace)
    epoch = await _owned(store, "c")
    identity = await store.topology.execute("", "CLIENT", "ID")
    (frozen,) = proxy.freeze(_commands)
    before = frozen.pieces
    tasks = [asyncio.create_task(store.append("c", _batch(epoch, seq))) for seq in range(1, 9)]
    await wait_until(lambda: frozen.pieces > before, "the commands are on their way")
    server.ask("CLIENT", "KILL", "ID", identity)
    for outcome in await asyncio.gather(*tasks, return_exceptions=True):
        assert isinstance(outcome, StoreUnavailable), outcome
        assert "unknown" in str(outcome)
    # The link comes back by itself; nothing was repeated.
    assert await store.append("c", _batch(epoch, 1)) == AppendReply("OK", 2, "b1")
    assert reconnects == [None]


async def test_a_server_that_does_not_answer_in_time(server: Server, namespace: str, stack: AsyncExitStack) -> None:
    store, proxy, reconnects = await _through(stack, server, namespace, deadline=1.5)
    (frozen,) = proxy.freeze(_commands)
    with pytest.raises(StoreUnavailable, match=r"did not answer within 1\.5 s"):
        await _echo(store, "x")
    assert store.statistics()[0].expired == 1
    # The half-open connection is given up, not waited for.
    assert await _echo(store, "y") == "y"
    assert not frozen.open.is_set()
    assert reconnects == [None]


@pytest.mark.parametrize("anyio_backend", EVENT_LOOPS)
async def test_a_blocked_event_loop_is_not_taken_for_a_dead_server(
    server: Server, namespace: str, stack: AsyncExitStack
) -> None:
    store = await stack.enter_async_context(RedisStore(server.url, namespace=namespace, deadline=1))
    channel, blocked = store.channel("c", "c"), asyncio.Event()

    def block(_: bytes) -> None:
        time.sleep(1.5)  # what a blocking tool call does
        blocked.set()

    await store.subscribe(channel, block, lambda: None)
    # Its answer comes while the event loop is blocked, and is read after the deadline.
    late = asyncio.create_task(_execute(store, "BLPOP", store.keys.inbox("none"), "0.5"))
    await wait_until(lambda: _blocked_clients(server), "the command waits in the server")
    server.ask("SPUBLISH", channel, "x")
    assert await late is None
    assert blocked.is_set()
    assert store.statistics()[0].connects == 1


async def test_commands_wait_for_the_connection_to_come_back(
    server: Server, namespace: str, stack: AsyncExitStack
) -> None:
    store, proxy, reconnects = await _through(stack, server, namespace)
    proxy.accepting = False
    proxy.cut()
    await wait_until(lambda: not store.statistics()[0].connected, "the loss is noticed")
    tasks = [asyncio.create_task(_echo(store, str(i))) for i in range(20)]
    await wait_until(lambda: store.statistics()[0].in_flight >= 20, "the commands wait")
    tasks[3].cancel()
    proxy.accepting = True
    outcomes = await asyncio.gather(*tasks, return_exceptions=True)
    assert [o for o in outcomes if isinstance(o, str)] == [str(i) for i in range(20) if i != 3]
    assert len(reconnects) == 1


async def test_commands_wait_no_longer_than_their_deadline(
    server: Server, namespace: str, stack: AsyncExitStack
) -> None:
    store, proxy, _ = await _through(stack, server, namespace, deadline=1)
    proxy.accepting = False
    proxy.cut()
    await wait_until(lambda: not store.statistics()[0].connected, "the loss is noticed")
    with pytest.raises(StoreUnavailable, match="was not sent"):
        await _echo(store, "x")
    # At most a probe of the subscriber waits, which came later.
    assert store.statistics()[0].in_flight <= 1


async def test_the_number_of_commands_under_way_is_bounded(
    server: Server, namespace: str, stack: AsyncExitStack
) -> None:
    store, proxy, _ = await _through(stack, server, namespace, max_in_flight=50)
    proxy.freeze(_commands)
    room = 50 - store.statistics()[0].in_flight
    tasks = [asyncio.create_task(_echo(store, str(i))) for i in range(room)]
    await wait_until(lambda: store.statistics()[0].in_flight >= 50, "the link is full")
    with pytest.raises(StoreUnavailable, match="more than 50 commands wait"):
        await _echo(store, "x")
    proxy.thaw()
    assert await asyncio.gather(*tasks) == [str(i) for i in range(room)]
    assert await _echo(store, "x") == "x"


async def test_the_data_under_way_is_bounded(
    server: Server, namespace: str, stack: AsyncExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, proxy, _ = await _through(stack, server, namespace)
    monkeypatch.setattr("convener.store.redis.connection.MAX_IN_FLIGHT_BYTES", 1_000_000)
    for lose in (False, True):
        if lose:
            proxy.accepting = False
            proxy.cut()
            await wait_until(lambda: not store.statistics()[0].connected, "the loss is noticed")
        else:
            proxy.freeze(_commands)
        task = asyncio.create_task(_echo(store, "x" * 900_000))
        await asyncio.sleep(0)
        with pytest.raises(StoreUnavailable, match="too much data"):
            await _echo(store, "y" * 200_000)
        proxy.accepting = True
        proxy.thaw()
        assert len(await task) == 900_000
        assert await _echo(store, "y" * 200_000) == "y" * 200_000


async def test_closing_ends_what_is_under_way(server: Server, namespace: str, stack: AsyncExitStack) -> None:
    store, proxy, _ = await _through(stack, server, namespace)
    proxy.freeze(_commands)
    task = asyncio.create_task(_echo(store, "x"))
    await asyncio.sleep(0)
    await store.close()
    with pytest.raises(StoreUnavailable, match="closed"):
        await task
    with pytest.raises(StoreUnavailable, match="closed"):
        await _echo(store, "x")


@pytest.mark.parametrize("flavour", ["valkey", "redis"])
async def test_a_server_that_crashes_and_comes_back_with_its_data(flavour: Flavour) -> None:
    with Server(flavour, persistence="aof") as server:
        async with RedisStore(server.url) as store:
            epoch = await _owned(store, "c")
            server.kill()
            await wait_until(lambda: not store.statistics()[0].connected, "the loss is noticed")
            waiting = asyncio.create_task(store.append("c", _batch(epoch, 1)))
            await asyncio.to_thread(server.start)
            assert await waiting == AppendReply("OK", 2, "b1")


# -- errors --------------------------------------------------------------------------------------------------------


async def test_an_unexpected_error_is_told_and_harms_nobody_else(store: RedisStore) -> None:
    key = store.keys.meta("c")
    await store.topology.execute(key, "SET", key, "x")
    replies = await asyncio.gather(
        _echo(store, "1"),
        store.head("c"),
        _echo(store, "2"),
        store.send("c", MESSAGE, max_pending=5),
        return_exceptions=True,
    )
    await store.topology.execute(key, "DEL", key)
    assert replies[0::2] == ["1", "2"]
    assert isinstance(replies[1], StoreCommandError)
    assert str(replies[1]).startswith("hmget: WRONGTYPE")
    assert isinstance(replies[3], StoreCommandError)
    assert str(replies[3]).startswith("send: ")


@pytest.mark.parametrize(
    ("reply", "kind"),
    [
        ("OOM command not allowed when used memory > 'maxmemory'.", StoreFull),
        *(
            (f"{code} for some reason", StoreUnavailable)
            for code in (
                "READONLY",
                "LOADING",
                "MASTERDOWN",
                "CLUSTERDOWN",
                "TRYAGAIN",
                "NOREPLICAS",
                "MISCONF",
                "BUSY",
            )
        ),
        ("NOPERM this user has no permissions", AccessRefused),
        ("NOAUTH Authentication required.", AccessRefused),
        ("ERR The user executing the script can't run this command: ACL failure in script", AccessRefused),
        ("WRONGTYPE Operation against a key", StoreCommandError),
        ("ERR user_script:3: attempt to index a nil value", StoreCommandError),
    ],
)
def test_what_error_replies_mean(reply: str, kind: type[StoreUnavailable]) -> None:
    error = from_reply(reply, "send")
    assert type(error) is kind
    assert str(error).startswith("send: ")


async def test_a_hook_that_raises_does_not_keep_the_link_from_coming_back(
    server: Server, namespace: str, stack: AsyncExitStack, caplog: pytest.LogCaptureFixture
) -> None:
    def fails() -> None:
        raise ValueError("no good")

    proxy = await stack.enter_async_context(Proxy(server.port))
    store = await stack.enter_async_context(RedisStore(proxy.url, namespace=namespace, on_reconnect=fails))
    proxy.cut(_commands)
    await wait_until(lambda: store.statistics()[0].connects == 2, "the link is back")
    assert await _echo(store, "x") == "x"
    assert "on_reconnect failed" in caplog.text


async def test_text_that_is_not_unicode_is_refused_before_it_is_sent(store: RedisStore) -> None:
    replies = await asyncio.gather(_echo(store, "1"), _echo(store, "\ud800"), _echo(store, "2"), return_exceptions=True)
    assert replies[0::2] == ["1", "2"]
    assert isinstance(replies[1], InvalidRequest)


async def test_data_that_nobody_asked_for_ends_the_connection(
    server: Server, namespace: str, stack: AsyncExitStack
) -> None:
    store, proxy, reconnects = await _through(stack, server, namespace)
    for junk in (b"+what\r\n", b"\x00\x01junk\r\n"):
        count = len(reconnects)
        (passage,) = (p for p in proxy.passages if _commands(p))
        passage.to_client(junk)
        await wait_until(lambda count=count: len(reconnects) > count, "the link has reconnected")
    assert await _echo(store, "x") == "x"
