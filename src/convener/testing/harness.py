"""What the contract suite needs of a kind of store: a way to open stores over the same data, and to see its keys."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Protocol

from convener.store.base import Store
from convener.store.local import LocalStore
from convener.store.memory import MemoryStore
from convener.store.sqlite import SQLiteStore


class Harness(Protocol):
    """One set of data, empty at first."""

    async def connect(self) -> Store:
        """Another open store over the data, with connections of its own; the harness closes it in the end."""
        ...

    async def keys(self) -> set[str]:
        """Names of all keys that hold anything, as in the protocol's table, without namespace and braces.

        For instance ``c:C:meta``, ``u:U:slots``, ``n:I:conversations``, ``i:5``, ``m:ver``.
        """
        ...


HarnessFactory = Callable[[], AbstractAsyncContextManager[Harness]]
"""Makes a fresh harness."""


class LocalHarness:
    """A harness over a local store and its peers."""

    def __init__(self, store: LocalStore, stack: AsyncExitStack) -> None:
        self._store = store
        self._stack = stack

    async def connect(self) -> Store:
        """A peer."""
        peer = self._store.peer()
        await peer.open()
        self._stack.push_async_callback(peer.close)
        return peer

    async def keys(self) -> set[str]:
        """Out of the tables."""
        return await self._store.keys()


@asynccontextmanager
async def local_harness(store: LocalStore) -> AsyncGenerator[LocalHarness, None]:
    """A harness over `store`, which is opened and closed."""
    async with AsyncExitStack() as stack:
        await store.open()
        stack.push_async_callback(store.close)
        yield LocalHarness(store, stack)


def memory_harness() -> AbstractAsyncContextManager[Harness]:
    """A harness over a fresh `MemoryStore`."""
    return local_harness(MemoryStore())


def sqlite_harness(directory: Path) -> AbstractAsyncContextManager[Harness]:
    """A harness over a fresh `SQLiteStore` in an empty directory."""
    return local_harness(SQLiteStore(directory))
