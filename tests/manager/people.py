"""Conversations in which somebody is asked: agents, and what tests look at."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import Any, cast

from redis.asyncio import Redis

from convener.core.model import AppendRequest, Meta
from convener.manager.base import Question
from convener.manager.conversation import Conversation
from convener.manager.traits import Traits
from convener.manager.turn import Turn
from convener.store.base import Store
from convener.store.tables import TIMER_SHARDS
from convener.testing.cluster import FunctionAgent, InProcessCluster, RecordingSink
from tests.manager.test_faults import events_of
from tests.support.waiting import wait_until


async def ask(turn: Turn[Any]) -> None:
    """Asks what the message says, if it says something to ask, and tells the answer."""
    said, data = None, turn.data
    if "ask" in data:
        said = await turn.ask(data["ask"], data.get("schema"), data.get("timeout"))
    await turn.reply({"said": said, "attempt": turn.attempt, "reason": turn.reason})


class TraitedAgent(FunctionAgent):
    """An agent out of functions that says something of itself."""

    def __init__(
        self,
        answer: Callable[[Turn[Any]], Awaitable[None]],
        traits: Traits,
        methods: Mapping[str, Callable[[Conversation, Any], Awaitable[Any]]] | None = None,
    ) -> None:
        super().__init__(answer, methods)
        self.traits = traits


def store_of(cluster: InProcessCluster) -> Store:
    """The store of some node that is there."""
    return next(iter(cluster)).engine.node.store


async def head_of(cluster: InProcessCluster, cid: str) -> Meta:
    """The conversation's head."""
    head = await store_of(cluster).head(cid)
    assert head is not None
    return head


async def log_of(cluster: InProcessCluster, cid: str) -> list[dict[str, Any]]:
    """The conversation's log, as clients get it."""
    return await events_of(store_of(cluster), cid)


async def kinds_of(cluster: InProcessCluster, cid: str, turn: str) -> list[str]:
    """Kinds of the log entries of one turn."""
    return [e["kind"] for e in await log_of(cluster, cid) if e["turn"] == turn]


async def replies_of(cluster: InProcessCluster, cid: str) -> list[Any]:
    """Data of all replies in the log."""
    return [e["data"] for e in await log_of(cluster, cid) if e["kind"] == "reply"]


async def asked(cluster: InProcessCluster, cid: str, count: int = 1) -> list[Question]:
    """The open questions, as soon as there are exactly so many."""
    questions: list[Question] = []

    async def are_open() -> bool:
        questions[:] = await next(iter(cluster)).questions(cid)
        return len(questions) == count

    await wait_until(are_open, f"{count} questions of {cid} are open")
    return questions


async def settled(cluster: InProcessCluster, cid: str) -> Meta:
    """The head, as soon as everything that was accepted is taken in and answered."""

    async def is_settled() -> bool:
        head = await head_of(cluster, cid)
        return head.position == head.done == head.cursor

    await wait_until(is_settled, f"{cid} is settled")
    return await head_of(cluster, cid)


async def unowned(cluster: InProcessCluster, cid: str, user: str = "u") -> None:
    """Return when nobody owns the conversation, it holds no slot, and no node has a record of it."""

    async def is_free() -> bool:
        store = store_of(cluster)
        head = await head_of(cluster, cid)
        if head.owner or cid in await store.slots(user):
            return False
        membership = await store.membership()
        for name in (*membership.members, *membership.dead):
            if await store.record(name, cid) is not None:
                return False
        return True

    await wait_until(is_free, f"{cid} is given back wholly")


async def waits(cluster: InProcessCluster, cid: str) -> int:
    """The number of the node on which the conversation does nothing but wait for a person, as soon as one does."""

    def found() -> int | None:
        for index, manager in enumerate(cluster.managers):
            runner = None if manager is None else manager.engine.runner(cid)
            if runner is not None and runner.status == "waiting":
                return index + 1
        return None

    return (await wait_until(found, f"{cid} waits for a person") or 0) - 1


async def recorded(cluster: InProcessCluster, node: int, cid: str, status: str) -> None:
    """Return when the node has said in the store that the conversation has this status: what is known if it dies."""
    incarnation = cluster[node].engine.node.incarnation

    async def is_known() -> bool:
        record = await store_of(cluster).record(incarnation, cid)
        return record is not None and record.status == status

    await wait_until(is_known, f"the record of {cid} says {status}")


async def hibernated(cluster: InProcessCluster, cid: str) -> None:
    """Hibernate the conversation, which waits or is idle."""

    async def release() -> bool:
        for manager in cluster:
            if await manager.engine.hibernate(cid):
                return True
        return False

    await wait_until(release, f"{cid} is released")
    await unowned(cluster, cid)


def asks(cid: str, request: AppendRequest) -> bool:
    """Which appends open a question."""
    return bool(request.asks)


def ends_turn(cid: str, request: AppendRequest) -> bool:
    """Which appends end a turn."""
    return request.ends_turn


async def no_timer_is_due(cluster: InProcessCluster, cid: str) -> None:
    """Return when nothing of the conversation is due; what was, was done or cleared away."""

    async def is_clear() -> bool:
        store = store_of(cluster)
        due = [entry for shard in range(TIMER_SHARDS) for entry in await store.due_timers(shard, 1000)]
        return all(entry[0] != cid for entry in due)

    await wait_until(is_clear, f"nothing of {cid} is due")


async def keys_of(cluster: InProcessCluster) -> set[str]:
    """Names of all keys that hold anything of conversations, their users and their timers."""
    url = cluster._url  # pyright: ignore[reportPrivateUsage]
    if url is None:
        names = await cluster._memory.keys()  # pyright: ignore[reportPrivateUsage]
    else:
        prefix = f"{{{cluster._namespace}:"  # pyright: ignore[reportPrivateUsage]
        async with cast("Any", Redis).from_url(url, decode_responses=True) as client:
            found = [str(key) async for key in client.scan_iter(f"{prefix}*", count=1000)]
        names = {key.removeprefix(prefix).replace("}", "", 1) for key in found}
    return {name for name in names if name.startswith(("c:", "u:", "i:", "t:"))}


def ends(sink: RecordingSink) -> list[tuple[str, str]]:
    """Turns and how they ended, as a client saw it."""
    return [
        (e["turn"], e["kind"]) for e in sink.events if e["kind"] in ("turn_done", "turn_failed", "turn_interrupted")
    ]
