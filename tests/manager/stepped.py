"""Clusters whose stores can be stopped at a call, and what is asked of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

from convener.manager import ClusteredConversationManager
from convener.store.base import Store
from convener.testing.cluster import InProcessCluster
from convener.testing.steps import StepStore
from tests.manager.conftest import MakeCluster
from tests.manager.test_cluster import echo
from tests.support.waiting import wait_until


class Steps:
    """Wraps a cluster's stores: `stores[i]` is that of node i, which `prepare` sees before the node does."""

    def __init__(self) -> None:
        self.stores: list[StepStore] = []
        self.prepare: Callable[[StepStore], object] = lambda store: None

    def wrap(self, index: int, store: Store) -> Store:
        """`InProcessCluster`'s option."""
        self.stores.append(StepStore(store))
        self.prepare(self.stores[-1])
        return cast("Store", self.stores[-1])


class Stepped(Steps):
    """Makes clusters whose stores are wrapped so."""

    def __init__(self, make_cluster: MakeCluster) -> None:
        super().__init__()
        self._make = make_cluster

    async def start(self, agent: Any = echo, **options: Any) -> InProcessCluster:
        """A cluster; the options are `InProcessCluster`'s."""
        return await self._make(agent, wrap=self.wrap, **options)


async def position(cluster: InProcessCluster, cid: str) -> int:
    """The last inbox position given out."""
    head = await next(iter(cluster)).engine.node.store.head(cid)
    return 0 if head is None else head.position


async def answered(cluster: InProcessCluster, cid: str, count: int) -> bool:
    """Whether exactly `count` messages were accepted and all are settled."""
    head = await next(iter(cluster)).engine.node.store.head(cid)
    return head is not None and head.position == head.done == count


async def idle(manager: ClusteredConversationManager, cid: str) -> None:
    """Return when the conversation's runner on this node could be released."""

    def is_idle() -> bool:
        runner = manager.engine.runner(cid)
        return runner is not None and not runner.busy and runner.appender.quiet

    await wait_until(is_idle, f"{cid} is idle")


async def reborn(manager: ClusteredConversationManager) -> None:
    """Let a node begin a new life, as after its burial, and return when it may act."""
    old = manager.engine.node.incarnation
    manager._rebirth.set()  # pyright: ignore[reportPrivateUsage]
    await wait_until(lambda: manager.engine.node.incarnation != old, "a new life begins")

    def may_act() -> bool:
        # Each life has a lease of its own.
        return manager.engine.node.lease.valid()

    await wait_until(may_act, "it may act")
