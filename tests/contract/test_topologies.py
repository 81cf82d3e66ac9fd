"""The contract, on a primary that Sentinels name, and on a Redis Cluster."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any, cast

import pytest

from convener.testing import contract
from convener.testing.contract_checks import bus
from tests.contract.harnesses import redis_harness
from tests.support.servers import Flavour, binary
from tests.support.topologies import RedisCluster, SentinelGroup, role, tell

# In one worker, so that each group of servers is started once.
pytestmark = [pytest.mark.anyio, pytest.mark.xdist_group("topologies")]


class Group:
    """Several servers as one store."""

    def __init__(self, group: SentinelGroup | RedisCluster) -> None:
        self._group = group

    @property
    def url(self) -> str:
        return self._group.url

    def ask(self, *words: str) -> object:
        replies = [tell(server, *words) for server in self._group.servers if role(server) == "master"]
        return [item for reply in replies for item in cast("list[Any]", reply)]


@pytest.fixture(scope="module")
def groups() -> Iterator[Callable[[str], Group]]:
    """Gives the servers of a ``kind-flavour``, started at the first use."""
    with ExitStack() as stack:
        running: dict[str, Group] = {}

        def get(name: str) -> Group:
            kind, _, flavour = name.partition("-")
            if name not in running:
                if binary(cast("Flavour", flavour)) is None:
                    pytest.skip(f"no {flavour} server is installed on this machine")
                make = SentinelGroup if kind == "sentinel" else RedisCluster
                running[name] = Group(stack.enter_context(make(cast("Flavour", flavour))))
            return running[name]

        yield get


# What differs between the flavours in a cluster is pub/sub.
CASES = [
    *(("sentinel-redis", check) for check in contract.CHECKS),
    *(("cluster-valkey", check) for check in contract.CHECKS),
    *(("cluster-redis", check) for check in contract.CHECKS if check.__module__ == bus.__name__),
]


@pytest.mark.parametrize(("kind", "check"), CASES, ids=[f"{kind}-{contract.name(check)}" for kind, check in CASES])
async def test_contract(kind: str, check: contract.Check, groups: Callable[[str], Group]) -> None:
    servers = groups(kind)
    await contract.run(check, lambda: redis_harness(servers))
