"""Keys that nobody deletes: found by deleting everything, the way the cluster does it, and looking at what is left.

`watched` wraps a harness. What a test does through it is noted by name: conversations, users, nodes. When the test
is over, each of them is brought to its regular end (stopped, erased, taken off the lists, timers cleared, slots
freed, queue left, records dropped, node left and forgotten). Then the store must hold nothing but `SINGLETONS`.
"""

from __future__ import annotations

import inspect
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, Final, cast

from convener.core.model import ClaimRequest
from convener.store.base import Store
from convener.testing.harness import Harness

SINGLETONS: Final = frozenset({"m:ver", "m:pulse", "m:grace"})
"""Keys that stay: one number each, however long the cluster runs."""

_SHARDS: Final = 64


@dataclass(slots=True)
class Touched:
    """What calls have named."""

    cids: set[str] = field(default_factory=set[str])
    users: set[str] = field(default_factory=set[str])
    incarnations: set[str] = field(default_factory=set[str])
    timers: set[str] = field(default_factory=set[str])


class _Noting:
    """A store that notes the names in its calls and passes them on."""

    def __init__(self, store: Store, touched: Touched) -> None:
        self._store = store
        self._touched = touched

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._store, name)
        if not inspect.iscoroutinefunction(method):
            return method
        signature = inspect.signature(method)

        async def call(*args: Any, **kwargs: Any) -> Any:
            self._note(signature.bind(*args, **kwargs).arguments)
            return await method(*args, **kwargs)

        return call

    def _note(self, arguments: dict[str, Any]) -> None:
        touched = self._touched
        for name, value in arguments.items():
            match name:
                case "cid":
                    touched.cids.add(value)
                case "cids":
                    touched.cids.update(value)
                case "user":
                    touched.users.add(value)
                case "timer_id":
                    touched.timers.add(value)
                case "incarnation" | "me":
                    touched.incarnations.add(value)
                case "request" if isinstance(value, ClaimRequest):
                    touched.incarnations.add(value.me)
                case _:
                    pass


class NotingHarness:
    """A harness whose stores note what they are asked for."""

    def __init__(self, harness: Harness) -> None:
        self._harness = harness
        self.touched = Touched()

    async def connect(self) -> Store:
        """See `Harness`."""
        return cast("Store", _Noting(await self._harness.connect(), self.touched))

    async def keys(self) -> set[str]:
        """See `Harness`."""
        return await self._harness.keys()


async def delete_everything(store: Store, touched: Touched) -> None:
    """Bring whatever was named to its regular end.

    Raises:
        AssertionError: a step that has to succeed was refused.
    """
    for shard in range(_SHARDS):
        touched.cids.update(await store.list_all(shard, "", 10_000))
    for cid in touched.cids:
        head = await store.head(cid)
        if head is not None:
            touched.users.add(head.user)
            # Whoever owned it is at its end as well.
            await store.stop(cid, "leaks~1", "the test is over", head.owner)
            assert await store.erase(cid) == "OK", f"conversation {cid} cannot be erased: {await store.head(cid)}"
        for timer_id in touched.timers:
            await store.clear_timer(cid, timer_id)
    for user in touched.users:
        for cid in touched.cids:
            await store.unindex(user, cid)
        for cid, slot in (await store.slots(user)).items():
            touched.incarnations.add(slot.incarnation)
            await store.unreserve(user, cid, slot.nonce)
        for entry in await store.waiting(user):
            assert await store.dequeue(user, entry.conversation_id)
    membership = await store.membership()
    for name in {*touched.incarnations, *membership.members, *membership.dead}:
        for record in (await store.node_records(name))[1]:
            assert await store.drop_record(name, record.conversation_id, record.nonce)
        assert await store.drop_node(name)
        await store.leave(name)
        await store.forget(name, 0)


@asynccontextmanager
async def watched(harness: Harness) -> AsyncGenerator[NotingHarness, None]:
    """A harness to use instead of `harness`; when the block ends without an error, nothing may be left.

    Raises:
        AssertionError: keys are left that nobody deletes; names them.
    """
    noting = NotingHarness(harness)
    yield noting
    await delete_everything(await harness.connect(), noting.touched)
    left = await harness.keys() - SINGLETONS
    assert not left, f"nobody deletes {sorted(left)}"
