"""A harness for each kind of store, over real servers where there is one."""

from __future__ import annotations

import secrets
from collections.abc import AsyncGenerator, Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any, Protocol, cast

from convener.store.base import Store
from convener.store.redis import RedisStore
from convener.testing.harness import Harness, HarnessFactory, memory_harness, sqlite_harness
from tests.support.servers import Server


class Servers(Protocol):
    """One server, or several that are one store."""

    @property
    def url(self) -> str: ...

    def ask(self, *words: str) -> object:
        """The reply to a command; of several servers, all items of their replies."""
        ...


class RedisHarness:
    """A namespace of its own in a running store."""

    def __init__(self, server: Servers, stack: AsyncExitStack) -> None:
        self._server = server
        self._stack = stack
        self._namespace = f"t{secrets.token_hex(6)}"

    async def connect(self) -> Store:
        return await self._stack.enter_async_context(RedisStore(self._server.url, namespace=self._namespace))

    async def keys(self) -> set[str]:
        prefix = f"{{{self._namespace}:"
        found = cast("list[Any]", self._server.ask("KEYS", f"{prefix}*"))
        return {cast("bytes", key).decode().removeprefix(prefix).replace("}", "", 1) for key in found}


@asynccontextmanager
async def redis_harness(server: Servers) -> AsyncGenerator[RedisHarness, None]:
    async with AsyncExitStack() as stack:
        yield RedisHarness(server, stack)


def factory(kind: str, server: Callable[[str], Server], directory: Path) -> HarnessFactory:
    """The factory of a kind of store: ``memory``, ``sqlite``, ``valkey``, ``redis``."""

    def make() -> AbstractAsyncContextManager[Harness]:
        if kind == "memory":
            return memory_harness()
        if kind == "sqlite":
            return sqlite_harness(directory / secrets.token_hex(4))
        return redis_harness(server(kind))

    return make
