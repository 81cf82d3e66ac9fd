"""What can become of the store, done to a running cluster and undone again.

A `Fault` strikes a `Site`, lasts until it has had its effect, and is healed. What has to be true meanwhile and
afterwards is the same for all of them: `tests/cluster/test_faults_of_the_store.py`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import httpx

from tests.cluster.clients import Client
from tests.cluster.talking import Api
from tests.support.cluster import Cluster
from tests.support.proxy import ProxyThread
from tests.support.servers import Server, free_port
from tests.support.waiting import TIME_SCALE, wait_until

SOME: Final = 9
"""Messages that have to be accepted before a fault that does not stop them is over."""


@dataclass(eq=False)
class Site:
    """A cluster that reaches its store through a proxy, and who talks to it.

    Attributes:
        guests: Socket.IO clients, by conversation, each at another node than the owner.
        accepted, refused, told: how far `api` and `guests` were when the fault struck.
        struck_at: monotonic clock.
    """

    cluster: Cluster
    server: Server
    proxy: ProxyThread
    api: Api
    guests: Mapping[str, Client]
    accepted: int = 0
    refused: int = 0
    told: Mapping[str, int] | None = None
    struck_at: float = 0.0

    def mark(self) -> None:
        """The fault strikes now."""
        self.accepted, self.refused = self.api.accepted, len(self.api.refused)
        self.told = {cid: len(guest.shown) for cid, guest in self.guests.items()}
        self.struck_at = time.monotonic()

    def statuses(self, cid: str) -> list[str]:
        """What the guest of a conversation was told of its status since then."""
        assert self.told is not None
        return [told["status"] for event, told in self.guests[cid].shown[self.told[cid] :] if event == "status"]

    def refusals(self) -> Sequence[Mapping[str, Any]]:
        """Messages that were refused since then."""
        return self.api.refused[self.refused :]

    async def checks(self) -> list[Mapping[str, Any]]:
        """What `/readyz?verbose` says at each node."""
        urls = [node.url for node in self.cluster.nodes]
        return [(await self.api.http.get(f"{url}/readyz?verbose")).json() for url in urls]


Step = Callable[[Site], Awaitable[None]]


@dataclass(frozen=True)
class Fault:
    """One thing that can happen.

    Attributes:
        strike, heal: do it and undo it.
        until: whether it has had its effect.
        refuses: whether messages are refused meanwhile; else none may be.
    """

    strike: Step
    until: Callable[[Site], Awaitable[bool]]
    heal: Step
    refuses: bool = False


def _told(*words: str) -> Step:
    """Tell the server something."""

    async def tell(site: Site) -> None:
        await asyncio.to_thread(site.server.ask, *words)

    return tell


def _set(name: str, value: str) -> Step:
    return _told("CONFIG", "SET", name, value)


async def _nothing(site: Site) -> None:
    """It heals by itself."""


# -- until ---------------------------------------------------------------------------------------------------------


async def talked(site: Site) -> bool:
    """Conversations go on all the same."""
    return site.api.accepted >= site.accepted + SOME


async def suspended(site: Site) -> bool:
    """No node acts, all clients have been told, and who writes is told when to try again."""
    if not all("recovering" in site.statuses(cid) for cid in site.guests):
        return False
    if any(each["checks"]["lease"] == "ok" for each in await site.checks()):
        return False
    asked = [site.api.post(node.url, "nobody", "anybody there?") for node in site.cluster.nodes]
    for answer in await asyncio.gather(*asked):
        assert (answer.status_code, answer.json()["code"]) == (503, "store_unavailable"), answer.text
        assert answer.json()["retry_after"] > 0
    return True


async def _a_moment(site: Site) -> bool:
    return time.monotonic() >= site.struck_at + 0.25 * TIME_SCALE


async def _refused_as_full(site: Site) -> bool:
    return len([refusal for refusal in site.refusals() if refusal["code"] == "store_full"]) >= len(site.guests)


async def _distrusted(site: Site) -> bool:
    found = await site.checks()
    return all(each["status"] == "degraded" and "allkeys-lru" in each["checks"]["store"] for each in found)


# -- strike and heal -----------------------------------------------------------------------------------------------


async def _freeze(site: Site) -> None:
    site.server.freeze()


async def _thaw(site: Site) -> None:
    site.server.resume()


async def _kill(site: Site) -> None:
    await asyncio.to_thread(site.server.kill)


async def _start(site: Site) -> None:
    await asyncio.to_thread(site.server.start)


async def _start_empty(site: Site) -> None:
    await asyncio.to_thread(site.server.forget)
    await asyncio.to_thread(site.server.start)


async def _kill_and_start(site: Site) -> None:
    await _kill(site)
    await _start(site)


async def _demote(site: Site) -> None:
    """A fail-over took its place; the new primary cannot be reached, so it keeps what it has."""
    await asyncio.to_thread(site.server.ask, "REPLICAOF", "127.0.0.1", free_port())


def _delayed(seconds: float) -> Step:
    async def slow_down(site: Site) -> None:
        site.proxy.do(lambda proxy: setattr(proxy, "delay", seconds))

    return slow_down


async def _swallow(site: Site) -> None:
    site.proxy.do(lambda proxy: proxy.freeze())


async def _shut(site: Site) -> None:
    def shut(proxy: Any) -> None:
        proxy.accepting = False
        proxy.cut()

    site.proxy.do(shut)


async def _behave(site: Site) -> None:
    site.proxy.behave()


async def _again_and_again(site: Site, *commands: tuple[str, ...]) -> None:
    """Some times, each after some messages more."""
    for number in range(4):
        for command in commands:
            await asyncio.to_thread(site.server.ask, *command)
        goal = site.api.accepted + (3 if number < 3 else 0)
        await wait_until(lambda goal=goal: site.api.accepted >= goal, "messages are accepted", 40)


async def _kill_connections(site: Site) -> None:
    await _again_and_again(site, ("CLIENT", "KILL", "TYPE", "normal"), ("CLIENT", "KILL", "TYPE", "pubsub"))


async def _flush_scripts(site: Site) -> None:
    await _again_and_again(site, ("SCRIPT", "FLUSH"))


FAULTS: Final[Mapping[str, Fault]] = {
    "a short pause": Fault(_freeze, _a_moment, _thaw),
    "a long pause": Fault(_freeze, suspended, _thaw, refuses=True),
    "no connection": Fault(_shut, suspended, _behave, refuses=True),
    "restarted with its data": Fault(_kill_and_start, talked, _nothing, refuses=True),
    "away, then back with its data": Fault(_kill, suspended, _start, refuses=True),
    "full": Fault(_set("maxmemory", "1"), _refused_as_full, _set("maxmemory", "0"), refuses=True),
    "a replica": Fault(_demote, suspended, _told("REPLICAOF", "NO", "ONE"), refuses=True),
    "too few replicas": Fault(
        _set("min-replicas-to-write", "1"), suspended, _set("min-replicas-to-write", "0"), refuses=True
    ),
    "slow": Fault(_delayed(0.05), talked, _behave, refuses=True),
    "too slow for renewals": Fault(_delayed(0.6), suspended, _behave, refuses=True),
    "half-open connections": Fault(_swallow, talked, _behave, refuses=True),
    "every connection killed": Fault(_kill_connections, talked, _nothing, refuses=True),
    "scripts forgotten": Fault(_flush_scripts, talked, _nothing),
    "an evicting policy": Fault(
        _set("maxmemory-policy", "allkeys-lru"), _distrusted, _set("maxmemory-policy", "noeviction")
    ),
}
"""After each of them everything goes on where it was, under the same ownership."""

LOST: Final = Fault(_kill, suspended, _start_empty, refuses=True)
"""The store comes back without anything."""


async def undo(site: Site) -> None:
    """Whatever happened in between: have the store as it was."""
    site.server.resume()
    if not site.server.running:
        await _start(site)
    site.proxy.behave()
    for words in (
        ("REPLICAOF", "NO", "ONE"),
        ("CONFIG", "SET", "maxmemory", "0"),
        ("CONFIG", "SET", "maxmemory-policy", "noeviction"),
        ("CONFIG", "SET", "min-replicas-to-write", "0"),
    ):
        await asyncio.to_thread(site.server.ask, *words)


NOT_YET: Final = (httpx.TransportError,)
