"""Real servers, one of each kind per session; every test has a namespace of its own in them."""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack
from typing import cast

import pytest

from convener.store.redis import RedisStore
from convener.store.redis.keys import kind_of
from tests.support.servers import FLAVOURS, Flavour, Server, binary

MakeStore = Callable[..., RedisStore]


@pytest.fixture(scope="session", params=FLAVOURS)
def server(request: pytest.FixtureRequest) -> Iterator[Server]:
    """A server that tests share: they neither stop it nor change its configuration."""
    flavour = cast("Flavour", request.param)
    if binary(flavour) is None:
        pytest.skip(f"no {flavour} server is installed on this machine")
    with Server(flavour) as running:
        yield running


@pytest.fixture
def namespace(server: Server) -> Iterator[str]:
    """A fresh namespace. Afterwards every key in it is of a known kind, has its type, and never expires."""
    name = f"t{secrets.token_hex(4)}"
    yield name
    with server.client(decode_responses=True) as client:
        for key in cast("list[str]", client.keys(f"{{{name}:*")):  # pyright: ignore[reportUnknownMemberType]
            kind = kind_of(key, name)
            assert kind is not None, f"{key} is of no known kind"
            assert client.type(key) == kind.type, f"{key} is not a {kind.type}"
            assert client.ttl(key) == -1, f"{key} would expire"
        leftovers = cast("list[str]", client.keys("*"))  # pyright: ignore[reportUnknownMemberType]
        assert all(key.startswith("{t") for key in leftovers), "a key without hash tag"


@pytest.fixture
async def store(server: Server, namespace: str) -> AsyncIterator[RedisStore]:
    """An open store."""
    async with RedisStore(server.url, namespace=namespace) as opened:
        yield opened


@pytest.fixture
async def stack() -> AsyncIterator[AsyncExitStack]:
    """Closes what a test opens."""
    async with AsyncExitStack() as opened:
        yield opened
