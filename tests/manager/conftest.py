"""Clusters inside the test process, over every kind of store."""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack
from typing import Any, cast

import pytest
import structlog
from blockbuster import blockbuster_ctx

from convener.testing.cluster import InProcessCluster, RecordingSink
from tests.support.servers import FLAVOURS, Flavour, Server, binary
from tests.support.waiting import wait_until

MakeCluster = Callable[..., Any]


@pytest.fixture(scope="session", params=["memory", *FLAVOURS])
def store_url(request: pytest.FixtureRequest) -> Iterator[str | None]:
    """Where the shared store is; None for one in memory."""
    kind = str(request.param)
    if kind == "memory":
        yield None
        return
    if binary(cast("Flavour", kind)) is None:
        pytest.skip(f"no {kind} server is installed on this machine")
    with Server(cast("Flavour", kind)) as server:
        yield server.url


@pytest.fixture(autouse=True)
def no_blocking_calls() -> Iterator[None]:
    """A call of ours that would block the event loop fails the test."""
    # A traceback for people reads source files; that is the log's business, not the managers'.
    structlog.configure(processors=[structlog.processors.add_log_level, structlog.processors.LogfmtRenderer()])
    with blockbuster_ctx("convener.manager"):
        yield
    structlog.reset_defaults()


@pytest.fixture
async def make_cluster(store_url: str | None) -> AsyncIterator[MakeCluster]:
    """Makes clusters. At the end of the test the auditor must find nothing in each; then they end."""
    async with AsyncExitStack() as stack:

        async def make(agent: Any = None, **options: Any) -> InProcessCluster:
            namespace = f"t{secrets.token_hex(4)}"
            cluster = InProcessCluster(agent, url=store_url, namespace=namespace, **options)
            await stack.enter_async_context(cluster)
            stack.push_async_callback(audit, cluster)
            return cluster

        yield make


async def audit(cluster: InProcessCluster) -> None:
    """The auditor's word on whatever the test did; and no background task has crashed, which would only be logged."""
    for manager in cluster:
        assert not manager.engine.node.supervisor.restarts
    for manager in cluster:
        report = await manager.audit()
        assert report["violations"] == []
        return


async def join(cluster: InProcessCluster, node: int, cid: str, connection: str, **options: Any) -> RecordingSink:
    """A client of `cid` on a node, live."""
    sink = RecordingSink()
    options.setdefault("user_id", "u")
    await cluster[node].join_conversation(cid, connection, sink=sink, **options)
    cluster[node].begin_replay(connection)
    return sink


async def swept(cluster: InProcessCluster, times: int) -> None:
    """Return when the first node's sweep has looked at conversations more than so often."""
    store = cast("Any", cluster[0].engine.node.store)
    looks, heads = 0, store.heads

    async def noted(cids: Any) -> Any:
        nonlocal looks
        looks += 1
        return await heads(cids)

    store.heads = noted
    await wait_until(lambda: looks > times, "the sweep has looked often enough")
    del store.heads
