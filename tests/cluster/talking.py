"""Talking to nodes over HTTP as a careful client does: each message under its id until some node accepts it."""

from __future__ import annotations

import asyncio
import random
from collections import defaultdict
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterable, Sequence
from contextlib import asynccontextmanager
from typing import Any, Final

import httpx

from tests.support.cluster import Cluster
from tests.support.waiting import TIME_SCALE, wait_until

# What a node may answer while nodes or the store go away; the same message may be sent again.
PASSING: Final = frozenset(
    {"store_unavailable", "store_full", "owner_unavailable", "ownership_lost", "stale_epoch", "call_timeout"}
)


class Api:
    """Conversations over HTTP.

    Attributes:
        urls: of the nodes that may be asked now.
        sent: conversation → message id → text of everything that was accepted.
        accepted: how many that are.
        refused: every other answer to a message.
    """

    def __init__(self, http: httpx.AsyncClient, urls: Callable[[], Sequence[str]], rng: random.Random) -> None:
        self.http = http
        self.urls = urls
        self.sent: defaultdict[str, dict[str, str]] = defaultdict(dict)
        self.accepted = 0
        self.refused: list[dict[str, Any]] = []
        self._rng = rng

    async def start(self, url: str, cid: str, user: str = "", **body: Any) -> dict[str, Any]:
        """Create a conversation at one node, which then owns it."""
        wanted = {"conversation_id": cid, "user_id": user} if user else {"conversation_id": cid}
        answer = await self.http.post(f"{url}/api/conversations", json=wanted | body)
        assert answer.status_code == 201, answer.text
        return answer.json()

    async def post(self, url: str, cid: str, text: str, ident: str | None = None, **more: Any) -> httpx.Response:
        """Send one message to one node, once."""
        body: dict[str, Any] = {"data": {"text": text}} | more
        if ident is not None:
            body["message_id"] = ident
        return await self.http.post(f"{url}/api/conversations/{cid}/messages", json=body)

    async def deliver(self, cid: str, text: str, ident: str | None = None, url: str | None = None) -> dict[str, Any]:
        """Send a message, to any node or to one, again and again until it is accepted."""
        name = ident or f"{cid}.{len(self.sent[cid]) + 1}"
        self.sent[cid][name] = text

        async def attempt() -> dict[str, Any] | None:
            answer = await self.post(url or self._rng.choice(self.urls()), cid, text, name)
            if answer.status_code == 202:
                return answer.json()
            assert answer.json()["code"] in PASSING, answer.text
            self.refused.append(answer.json())
            return None

        accepted = await wait_until(attempt, f"{name} is accepted", 40, retry_on=httpx.TransportError)
        assert accepted is not None
        self.accepted += 1
        return accepted

    async def talk(self, cid: str, count: int) -> None:
        """Deliver `count` messages, one after the other."""
        for number in range(count):
            await self.deliver(cid, f"line {number} after {len(self.sent[cid])}")

    async def talk_until(self, cid: str, over: asyncio.Event) -> None:
        """Deliver messages, one after the other, until `over`, and one more."""
        while not over.is_set():
            await self.talk(cid, 1)
        await self.talk(cid, 1)

    async def show(self, cid: str, url: str | None = None) -> dict[str, Any]:
        """The conversation."""
        answer = await self.http.get(f"{url or self.urls()[0]}/api/conversations/{cid}")
        assert answer.status_code == 200, answer.text
        return answer.json()

    async def events(self, cid: str, url: str | None = None) -> list[dict[str, Any]]:
        """The whole log."""
        found: list[dict[str, Any]] = []
        after: str | int = 0
        while True:
            answer = await self.http.get(
                f"{url or self.urls()[0]}/api/conversations/{cid}/events", params={"after": after, "limit": 1000}
            )
            assert answer.status_code == 200, answer.text
            page = answer.json()
            if not page["events"]:
                return found
            found += page["events"]
            after = page["next"]

    async def answered(self, cid: str, limit: float = 40) -> list[dict[str, Any]]:
        """The log, when every message that was accepted has come to its end."""

        async def is_over() -> list[dict[str, Any]]:
            events = await self.events(cid)
            ended = sum(event["kind"] in ("turn_done", "turn_failed", "turn_interrupted") for event in events)
            return events if ended >= len(self.sent[cid]) else []

        return await wait_until(is_over, f"all of {cid} is answered", limit, retry_on=httpx.TransportError)


@asynccontextmanager
async def talking(urls: Callable[[], Sequence[str]], rng: random.Random | None = None) -> AsyncGenerator[Api]:
    """An `Api`. Its requests do not wait long: a frozen node answers nobody.

    No connection is kept: a node closes it after some seconds, perhaps while the next request is on its way.
    """
    limits = httpx.Limits(max_keepalive_connections=0)
    async with httpx.AsyncClient(trust_env=False, timeout=15 * TIME_SCALE, limits=limits) as http:
        yield Api(http, urls, rng or random.Random(0))


async def while_talking(api: Api, cids: Iterable[str], work: Coroutine[Any, Any, None]) -> None:
    """Run `work` while messages are delivered to all of these conversations."""
    over = asyncio.Event()

    async def guarded() -> None:
        try:
            await work
        finally:
            over.set()

    await asyncio.gather(guarded(), *(api.talk_until(cid, over) for cid in cids))


async def until_started(cluster: Cluster, cid: str, position: int) -> None:
    """Return when the turn of the message at `position` has begun."""
    stored = cluster.stored
    assert stored is not None
    await wait_until(
        lambda: any(e.kind == "turn_started" and e.turn == f"t{position}" for e in stored.log(cid)),
        f"turn {position} of {cid} has begun",
    )
