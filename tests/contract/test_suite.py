"""The suite itself: a store that breaks its word is found out, and so is a key that nobody deletes."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import replace
from typing import Any

import pytest

from convener.core.admission import Slot
from convener.core.model import AlarmOutcome, AppendReply, AppendRequest, NewMessage, ReleaseOutcome, SendReply
from convener.store.localbus import Exchange
from convener.store.memory import MemoryStore, MemoryTables
from convener.testing import contract
from convener.testing.contract_checks.tools import made, owned, send
from convener.testing.harness import Harness, local_harness, memory_harness
from convener.testing.leaks import SINGLETONS, watched

pytestmark = pytest.mark.anyio


class Forgetful(MemoryStore):
    """Takes every message for a new one."""

    async def send(self, cid: str, message: NewMessage, *, max_pending: int, reject_busy: bool = False) -> SendReply:
        message = replace(message, message_id=secrets.token_hex(4))
        return await super().send(cid, message, max_pending=max_pending, reject_busy=reject_busy)


class Generous(MemoryStore):
    """Lets one more start than it may."""

    async def reserve(self, user: str, cid: str, slot: Slot, *, raised_limit: int, read: Slot | None) -> Any:
        return await super().reserve(user, cid, slot, raised_limit=raised_limit + 1, read=read)


class Careless(MemoryStore):
    """Releases without looking at the seq."""

    async def release(self, cid: str, owner: str, epoch: int, seq: int) -> ReleaseOutcome:
        head = await self.head(cid)
        return await super().release(cid, owner, epoch, head.seq if head else seq)


class Gullible(MemoryStore):
    """Leaves a question open that was answered."""

    async def answer(self, cid: str, ask_id: str, message: NewMessage) -> SendReply:
        reply = await super().answer(cid, ask_id, message)
        if reply.outcome == "OK":
            await self.run(lambda t: t.open_ask(cid, ask_id, "{}"))
        return reply


class Hoarding(MemoryStore):
    """Keeps what was streamed when its turn ends."""

    async def append(self, cid: str, request: AppendRequest) -> AppendReply:
        kept = await self.pieces(cid)
        reply = await super().append(cid, request)
        if request.ends_turn and reply.outcome == "OK":
            await self.run(lambda t: t.add_pieces(cid, kept))
        return reply


class Ringing(MemoryStore):
    """Sets an alarm that has fired."""

    async def set_alarm(self, cid: str, alarm_id: str, data: str) -> AlarmOutcome:
        outcome = await super().set_alarm(cid, alarm_id, data)
        if outcome == "DUP":
            await self.run(lambda t: t.add_alarm(cid, alarm_id, data))
        return "OK" if outcome == "DUP" else outcome


class Untidy(MemoryStore):
    """Tells what is due in any order."""

    async def due_timers(self, shard: int, limit: int) -> Sequence[tuple[str, str, int]]:
        return list(reversed(await super().due_timers(shard, limit)))


class Hasty(MemoryStore):
    """Calls handlers from inside the call that publishes."""

    async def subscribe(self, channel: str, handler: Callable[[bytes], None], on_gap: Callable[[], None]) -> None:
        self.hasty: dict[str, Callable[[bytes], None]] = {**getattr(self, "hasty", {}), channel: handler}

    async def unsubscribe(self, channel: str) -> None:
        self.hasty.pop(channel, None)

    async def send(self, cid: str, message: NewMessage, *, max_pending: int, reject_busy: bool = False) -> SendReply:
        reply = await super().send(cid, message, max_pending=max_pending, reject_busy=reject_busy)
        await self.publish(self.channel("c", cid), b"{}")
        return reply

    async def publish(self, channel: str, payload: bytes) -> None:
        if channel in self.hasty:
            self.hasty[channel](payload)


def over(kind: type[MemoryStore]) -> AbstractAsyncContextManager[Harness]:
    return local_harness(kind())


@pytest.mark.parametrize(
    ("kind", "check"),
    [
        (Forgetful, "send_numbers_and_remembers"),
        (Forgetful, "many_senders"),
        (Generous, "the_limit_is_exact"),
        (Generous, "reserve"),
        (Careless, "release"),
        (Gullible, "of_many_answers_one_counts"),
        (Gullible, "an_answer_closes_its_question"),
        (Hoarding, "pieces_end_with_their_attempt"),
        (Ringing, "a_repeated_turn_sets_no_alarm_twice"),
        (Untidy, "timers"),
        (Hasty, "handlers_are_called_by_the_loop"),
    ],
)
async def test_a_store_that_breaks_its_word_is_found_out(kind: type[MemoryStore], check: str) -> None:
    (chosen,) = [c for c in contract.CHECKS if contract.name(c) == check]
    await contract.run(chosen, memory_harness)
    with pytest.raises(AssertionError):
        await contract.run(chosen, lambda: over(kind))


async def test_a_publication_that_is_lost_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    counts: list[int] = []
    publish = Exchange.publish

    def every_second(self: Exchange, channel: str, payload: bytes) -> None:
        counts.append(1)
        if len(counts) % 2:
            publish(self, channel, payload)

    monkeypatch.setattr(Exchange, "publish", every_second)
    monkeypatch.setattr("convener.testing.contract_checks.bus.until", _at_once)
    (chosen,) = [c for c in contract.CHECKS if contract.name(c) == "nothing_is_lost_after_the_subscription"]
    with pytest.raises(AssertionError):
        await contract.run(chosen, memory_harness)


async def _at_once(look: Any, good: Any, what: str, limit: float = 20) -> Any:
    """`until` with little patience."""
    from convener.testing.contract_checks.tools import until

    return await until(look, good, what, 0.2)


async def test_a_key_that_nobody_deletes_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    erase = MemoryTables.erase

    def leaky(self: MemoryTables, cid: str) -> None:
        meta = self.meta(cid)
        erase(self, cid)
        if meta is not None:
            self.put_record("leftover~1", _record(cid))

    monkeypatch.setattr(MemoryTables, "erase", leaky)

    async def use(harness: Harness) -> None:
        async with watched(harness) as noting:
            store = await noting.connect()
            await owned(store)
            await send(store, "m1")

    async with memory_harness() as harness:
        with pytest.raises(AssertionError, match=r"nobody deletes .*n:leftover~1:conversations"):
            await use(harness)


def _record(cid: str) -> Any:
    from convener.core.directory import Record

    return Record(cid, "u", "idle", 1, "n", 1)


async def test_what_a_test_names_is_noted_and_deleted() -> None:
    async with memory_harness() as harness:
        async with watched(harness) as noting:
            store = await noting.connect()
            await made(store)
            assert noting.touched.cids == {"c"}
            assert noting.touched.users == {"u"}
        assert await harness.keys() - SINGLETONS == set()


async def test_an_error_of_the_test_is_not_hidden_by_the_leak_check() -> None:
    async def use(harness: Harness) -> None:
        async with watched(harness) as noting:
            await made(await noting.connect())
            raise ValueError("the test's own")

    async with memory_harness() as harness:
        with pytest.raises(ValueError, match="the test's own"):
            await use(harness)


def test_every_promise_of_the_store_is_checked() -> None:
    assert len(contract.CHECKS) == len({contract.name(c) for c in contract.CHECKS}) > 85
