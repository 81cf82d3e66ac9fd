"""Work on a store while its servers change: what was acknowledged, what was heard, and whether that holds."""

from __future__ import annotations

import asyncio
import json
import secrets
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import TypeVar

from convener.core.cursor import Cursor, Place
from convener.core.model import AppendReply, AppendRequest, ClaimRequest, NewMessage
from convener.errors import StoreUnavailable
from convener.store.redis import RedisStore
from convener.store.redis.scripts import Script
from tests.support.waiting import wait_until

T = TypeVar("T")

ME = "n~1"
CHAIN = 8
PUSH = Script("push", "#!lua\nreturn redis.call('RPUSH', KEYS[1], ARGV[1])\n")


async def insist(make: Callable[[], Awaitable[T]], what: str) -> T:
    """Repeat a call until the store is there."""
    done: list[T] = []

    async def attempt() -> bool:
        done.append(await make())
        return True

    await wait_until(attempt, what, 60, retry_on=StoreUnavailable)
    return done[0]


@dataclass
class Work:
    """One conversation under way.

    Attributes:
        acknowledged: seq → text of the entries that were acknowledged.
        sent: message ids that were acknowledged.
        heard: seqs in the order in which they were heard, and None for each gap that was told.
        failed: calls that ended with `StoreUnavailable`.
    """

    store: RedisStore
    cid: str
    epoch: int = 0
    seq: int = 0
    acknowledged: dict[int, str] = field(default_factory=dict[int, str])
    sent: set[str] = field(default_factory=set[str])
    heard: list[int | None] = field(default_factory=list[int | None])
    failed: int = 0
    stopping: bool = False

    async def begin(self) -> None:
        """Make the conversation, own it, and listen to it."""
        await self.store.subscribe(self.store.channel("c", self.cid), self._hear, lambda: self.heard.append(None))
        await self.store.create(self.cid, "u", "{}", "g")
        reply = await self.store.claim(self.cid, ClaimRequest(ME, "x", "", 0, "start"))
        assert reply.meta is not None
        self.epoch, self.seq = reply.meta.epoch, reply.meta.seq

    def _hear(self, payload: bytes) -> None:
        said = json.loads(payload)
        if said["t"] == "log":
            self.heard += range(said["seq"], said["seq"] + len(said["events"]))

    async def append(self) -> None:
        """Chains of appends, until told to stop; after a failure go on from what the store has."""
        while not self.stopping:
            requests = [self._request(self.seq + i) for i in range(CHAIN)]
            replies = await asyncio.gather(
                *(self.store.append(self.cid, request) for request in requests), return_exceptions=True
            )
            good = self._take(requests, replies)
            if not good:
                head = await insist(lambda: self.store.head(self.cid), f"the head of {self.cid} can be read")
                assert head is not None
                assert (head.owner, head.epoch) == (ME, self.epoch)
                self.seq = head.seq

    def _request(self, expected: int) -> AppendRequest:
        text = json.dumps({"kind": "reply", "n": expected + 1, "x": secrets.token_hex(4)})
        return AppendRequest(ME, self.epoch, expected, f"b{expected}", 0, 0, 0, (text,))

    def _take(self, requests: Sequence[AppendRequest], replies: Sequence[AppendReply | BaseException]) -> bool:
        good = True
        for request, reply in zip(requests, replies, strict=True):
            if isinstance(reply, StoreUnavailable):
                self.failed += 1
                good = False
            elif isinstance(reply, BaseException):
                raise reply
            elif reply.outcome == "OK":
                self.seq = request.expected + 1
                self.acknowledged[self.seq] = request.events[0]
            else:
                # Something before it in the chain failed, or came late.
                assert reply.outcome == "GAP", reply
                good = False
        return good

    async def send(self) -> None:
        """Messages, one after the other, each repeated under its id until it is acknowledged."""
        while not self.stopping:
            message = NewMessage(secrets.token_hex(8), "u", "{}")
            reply = await insist(
                lambda message=message: self.store.send(self.cid, message, max_pending=10**6), "a message is taken"
            )
            assert reply.outcome in ("OK", "DUP")
            self.sent.add(message.message_id)

    async def check(self, *, lost: bool = False) -> None:
        """The log is dense and in order, and has what was acknowledged; every publication was heard, or a gap told.

        Args:
            lost: whether the store may have lost what was acknowledged last.
        """
        seen = len(self.heard)

        async def hears_again() -> bool:
            await self._one_more()
            return any(seq is not None for seq in self.heard[seen:])

        await wait_until(hears_again, f"new entries of {self.cid} are heard", retry_on=StoreUnavailable)
        last = await self._one_more()
        page = await self.store.read(self.cid, Cursor("", Place(0, 0)), 10**6)
        assert page is not None
        assert [entry.seq for entry in page.entries] == list(range(1, last + 1))
        assert {entry.epoch for entry in page.entries} == {self.epoch}
        if not lost:
            texts = {entry.seq: entry.event for entry in page.entries}
            assert {seq: texts.get(seq) for seq in self.acknowledged} == self.acknowledged
            positions = await self.store.all_seen(self.cid)
            assert self.sent <= set(positions)
            inbox = await self.store.inbox(self.cid)
            assert inbox is not None
            assert [entry.position for entry in inbox[1]] == list(range(1, len(inbox[1]) + 1))
            assert self.sent <= {entry.message_id for entry in inbox[1]}
        self._check_heard()

    async def _one_more(self) -> int:
        head = await self.store.head(self.cid)
        assert head is not None
        reply = await self.store.append(self.cid, self._request(head.seq))
        assert reply.outcome == "OK"
        return reply.seq

    def _check_heard(self) -> None:
        last, gap = self.heard[0], False
        for seq in self.heard[1:]:
            if seq is None:
                gap = True
                continue
            assert last is None or seq == last + 1 or gap, f"{self.cid}: heard {seq} after {last}, and of no gap"
            last, gap = seq, False


@asynccontextmanager
async def working(store: RedisStore, cids: Sequence[str]) -> AsyncGenerator[list[Work]]:
    """Work on several conversations; at the end it has stopped."""
    works = [Work(store, cid) for cid in cids]
    await asyncio.gather(*(work.begin() for work in works))
    tasks = [asyncio.create_task(part()) for work in works for part in (work.append, work.send)]
    try:
        yield works
    finally:
        for work in works:
            work.stopping = True
        for task in asyncio.as_completed(tasks):
            await task


async def progress(works: Sequence[Work], entries: int = 50) -> None:
    """Wait until every conversation has got further."""
    before = [len(work.acknowledged) for work in works]
    await wait_until(
        lambda: all(len(work.acknowledged) >= n + entries for work, n in zip(works, before, strict=True)),
        "every conversation gets on",
        60,
    )


async def push_in_order(store: RedisStore, key: str, stop: Callable[[], bool]) -> tuple[list[int], list[int]]:
    """Numbers pushed to a list, many at a time, by scripts and by plain commands in turn, until told to stop.

    Returns those that were acknowledged, and those that failed.
    """
    under_way: dict[int, asyncio.Future[int]] = {}
    number = 0
    good: list[int] = []
    bad: list[int] = []
    while not stop() or under_way:
        if not stop():
            for _ in range(20):
                number += 1
                try:
                    if number % 3:
                        under_way[number] = store.topology.call(PUSH, (key,), number)
                    else:
                        under_way[number] = store.topology.execute(key, "RPUSH", key, number)
                except StoreUnavailable:
                    bad.append(number)
        await asyncio.wait(under_way.values(), return_when=asyncio.FIRST_COMPLETED) if under_way else None
        for n in [n for n, future in under_way.items() if future.done()]:
            (bad if under_way.pop(n).exception() else good).append(n)
        await asyncio.sleep(0)
    return good, bad


async def check_order(store: RedisStore, key: str, good: list[int], bad: list[int]) -> None:
    """What was acknowledged is there once, in the order of the calls; what failed is there at most once."""
    found = [int(n) for n in await store.topology.execute(key, "LRANGE", key, 0, -1)]
    kept = [n for n in found if n not in set(bad)]
    assert kept == sorted(good)
    assert len(found) == len(set(found))
    await store.topology.execute(key, "DEL", key)
