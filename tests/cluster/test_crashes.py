"""Nodes that go down with much on them, all at once, or only seem to; and their names, which come back.

``TEST_CONVERSATIONS`` is how many conversations a node has that is killed; how long they stood still is printed.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from statistics import mean
from typing import Any, Final

import pytest

from tests.cluster.agents import SCRIPTED
from tests.cluster.checks import attempts, check_explained, opened
from tests.cluster.clients import Client
from tests.cluster.leaving import Scene, scene, user_of
from tests.cluster.silence import percentiles
from tests.support.servers import Server
from tests.support.waiting import wait_until

CONVERSATIONS: Final = int(os.environ.get("TEST_CONVERSATIONS", "200"))
AT_ONCE: Final = 16
LONG: Final = 120
"""A lease that no test waits for."""


async def for_each(items: Sequence[Any], work: Callable[[Any], Awaitable[None]]) -> None:
    """Do something for each, some at a time."""
    todo = iter(items)

    async def worker() -> None:
        for item in todo:
            await work(item)

    await asyncio.gather(*(worker() for _ in range(AT_ONCE)))


async def explained(here: Scene, cid: str, node: int, events: Sequence[dict[str, Any]]) -> list[str]:
    """How those were buried whose conversation was taken over; all of its history is explained."""
    why = await asyncio.to_thread(here.cluster.get, node, f"/conversations/{cid}/why")
    check_explained(why, events)
    return [o["buried"]["kind"] for o in why["ownerships"] if o["reason"] == "takeover"]


# --- much on one node -------------------------------------------------------------------------------------------------


class Crowd:
    """Conversations of one node, each with a client at one of the others; some have a turn under way."""

    def __init__(self, here: Scene, count: int) -> None:
        self.here = here
        self.cids = [f"crowd-{number:04}" for number in range(count)]
        self.working = set(self.cids[::5])
        self.clients: dict[str, Client] = {}

    async def gather(self) -> None:
        """Let the first node run them all, and clients join."""
        await for_each(self.cids, lambda cid: self.here.start(cid, 0))
        await for_each(self.cids, self._join)
        await for_each(sorted(self.working), self._work)

    async def _join(self, cid: str) -> None:
        node = 1 + self.cids.index(cid) % 2
        self.clients[cid] = await self.here.clients.join(self.here.cluster.url(node), cid, user_id=user_of(cid))

    async def _work(self, cid: str) -> None:
        await self.here.api.deliver(cid, "/hang", f"{cid}.hanging", self.here.cluster.url(0))
        await self.clients[cid].wait_for(1, "turn_started")

    async def speak(self, cid: str) -> None:
        """Its client says something."""
        await self.clients[cid].say("are you there?", f"{cid}.said")
        self.here.api.sent[cid][f"{cid}.said"] = "are you there?"

    def since(self, moment: float, kind: str, cids: Sequence[str]) -> list[float]:
        """How long after a moment each client was shown the last entry of a kind."""
        found: list[float] = []
        for client in (self.clients[cid] for cid in cids):
            shown = zip(client.shown, client.times, strict=True)
            found.append(max(at for (name, data), at in shown if name == "event" and data["kind"] == kind) - moment)
        return found


@pytest.mark.slow
@pytest.mark.timeout(180 + CONVERSATIONS)
async def test_a_killed_node_with_many_conversations() -> None:
    """Open turns go first, whoever has clients of a conversation takes it, and nobody waits for long."""
    async with scene(app=SCRIPTED, lease_ttl=10, rebalance=False, hibernate_after=3600) as here:
        crowd = Crowd(here, CONVERSATIONS)
        await crowd.gather()
        here.cluster.kill(0)
        killed = time.monotonic()
        for cid in crowd.cids:
            await crowd.clients[cid].wait_for(2, "open", 60)
        for cid in crowd.working:
            await crowd.clients[cid].wait_for(1, "reply", 60)
        idle = [cid for cid in crowd.cids if cid not in crowd.working]
        print(f"a node with {len(crowd.cids)} conversations was killed")
        print(f"taken over, with an open turn, after {percentiles(crowd.since(killed, 'open', sorted(crowd.working)))}")
        print(f"taken over, with clients only, after {percentiles(crowd.since(killed, 'open', idle))}")
        taken = {cid: crowd.clients[cid].of_kind("open")[1] for cid in crowd.cids}
        assert {event["data"]["reason"] for event in taken.values()} == {"takeover"}
        spread = Counter(event["data"]["node"].rpartition("~")[0] for event in taken.values())
        assert min(spread[node] for node in ("n1", "n2")) > CONVERSATIONS // 4, "both take their share"
        for node in spread:
            # An epoch is not below the time of its claim, so the order of epochs is that of the claims.
            mine = {c: e["epoch"] for c, e in taken.items() if e["data"]["node"].startswith(f"{node}~")}
            first, then = ([epoch for cid, epoch in mine.items() if (cid in crowd.working) is x] for x in (True, False))
            assert mean(first) < mean(then), f"open turns go first on {node}"
        await asyncio.to_thread(here.cluster.restart, 0)
        for cid in crowd.cids[:: max(CONVERSATIONS // 20, 1)]:
            assert await explained(here, cid, 0, await here.check(cid, crowd.clients[cid])) == ["silent"]


@pytest.mark.slow
@pytest.mark.timeout(180 + CONVERSATIONS)
async def test_a_killed_node_whose_people_all_speak_at_once() -> None:
    async with scene(app=SCRIPTED, lease_ttl=10, rebalance=False, hibernate_after=3600) as here:
        crowd = Crowd(here, CONVERSATIONS)
        await crowd.gather()
        here.cluster.kill(0)
        killed = time.monotonic()
        await asyncio.gather(*(crowd.speak(cid) for cid in crowd.cids))
        for cid in crowd.cids:
            await crowd.clients[cid].wait_for(1 + (cid in crowd.working), "turn_done", 60)
        print(f"a node with {len(crowd.cids)} conversations was killed, and all of their people spoke at once")
        print(f"answered after {percentiles(crowd.since(killed, 'turn_done', crowd.cids))}")
        await for_each(crowd.cids, lambda cid: _checked(here, cid, crowd.clients[cid]))


async def _checked(here: Scene, cid: str, client: Client) -> None:
    events = await here.check(cid, client)
    assert [reason for _, reason in opened(events)] == ["start", "takeover"]


# --- all at once ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("also_the_store", [False, True], ids=["nodes", "nodes-and-store"])
async def test_a_killed_cluster_goes_on_when_it_is_started_again(also_the_store: bool) -> None:
    """At once, long before any lease ends: nodes that come back under their names bury who they were."""
    with Server("valkey", persistence="aof") as server:
        async with scene(app=SCRIPTED, lease_ttl=LONG, server=server) as here:
            cids = [f"c{number}" for number in range(6)]
            for number, cid in enumerate(cids):
                await here.start(cid, number % 3)
                await here.api.talk(cid, 2)
            guests = {cid: await here.python(cid, number % 3) for number, cid in enumerate(cids[:4])}
            for cid in cids[2:]:
                await here.api.deliver(cid, "/hang", f"{cid}.hanging")
                await here.begun(cid, 3)
            former = here.stored.members()
            for node in range(3):
                here.cluster.kill(node)
            if also_the_store:
                server.kill()
                server.start()
            began = time.monotonic()
            await asyncio.to_thread(here.cluster.heal)
            print(f"all nodes are ready again after {time.monotonic() - began:.1f} s")
            # Without being asked for: recovery alone ends what was under way.
            for cid in cids[2:]:
                await here.api.answered(cid)
            print(f"what was under way is answered after {time.monotonic() - began:.1f} s")
            for number, cid in enumerate(cids):
                await here.api.deliver(cid, "are you there?", url=here.cluster.url(number % 3))
            for cid in cids:
                events = await here.check(cid, *([guests[cid]] if cid in guests else []))
                kinds = await explained(here, cid, 0, events)
                assert set(kinds) <= {"superseded", "silent"}
                assert cid in cids[:2] or kinds, "what was under way was taken over"
                if cid in cids[2:]:
                    assert attempts(events, f"{cid}.hanging") == [(1, "new"), (2, "takeover")]
            assert former <= here.stored.buried()


# --- names ------------------------------------------------------------------------------------------------------------


async def test_a_frozen_node_is_superseded_by_one_that_is_started_under_its_name(tmp_path: Path) -> None:
    """It holds its connections and its lease is long, so nothing else would bury it. When it goes on there are two
    processes of one name, by mistake; they live side by side, and say so.
    """
    gate = tmp_path / "gate"
    async with scene(app=SCRIPTED, lease_ttl=LONG) as here:
        cluster = here.cluster
        await here.start("c", 0)
        guest = await here.clients.join(cluster.url(1), "c", user_id=user_of("c"))
        await here.api.deliver("c", f"/until {gate}", "gated", cluster.url(1))
        await here.begun("c", 1)
        (old,) = cluster.incarnations(0)
        cluster.kill(2)
        cluster.nodes[2].name = "n0"
        cluster.stop(0)
        await asyncio.to_thread(cluster.restart, 2)
        await wait_until(lambda: old in here.stored.buried(), "the frozen node is superseded")
        await guest.wait_for(1, "reply")
        written = [entry for entry in here.stored.log("c") if entry.epoch == here.stored.log("c")[0].epoch]
        gate.touch()
        cluster.cont(0)
        said = "another process runs under this node's name"
        await wait_until(lambda: any(said in line for line in cluster.nodes[0].log()), "the mistake is told")
        lives, buried = len(cluster.incarnations(0)), here.stored.buried()
        assert lives == 2
        for number in range(12):
            await here.api.deliver("c", f"line {number}", url=cluster.url(number % 3))
        events = await here.check("c", guest)
        assert await explained(here, "c", 1, events) == ["superseded"]
        assert [entry for entry in here.stored.log("c") if entry.epoch == events[0]["epoch"]] == written
        assert here.stored.buried() == buried, "they do not fight"


async def test_a_node_whose_event_loop_is_blocked_loses_its_conversations(tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    async with scene(app=SCRIPTED, lease_ttl=4) as here:
        cluster = here.cluster
        guests: dict[str, Client] = {}
        for cid in ("wedged", "beside"):
            await here.start(cid, 0)
            guests[cid] = await here.clients.join(cluster.url(1), cid, user_id=user_of(cid))
        (old,) = cluster.incarnations(0)
        await here.api.deliver("wedged", f"/wedge {gate}", "wedging", cluster.url(1))
        await here.begun("wedged", 1)
        await here.api.deliver("beside", "are you there?", url=cluster.url(2))
        for guest in guests.values():
            await guest.wait_for(1, "reply")
        assert old in here.stored.buried()
        assert cluster.nodes[0].running
        assert any("the event loop is stuck" in line for line in cluster.nodes[0].log())
        gate.touch()
        await wait_until(lambda: cluster.incarnations(0), "it has joined as a new incarnation")
        await asyncio.to_thread(cluster.wait_ready, 0)
        await here.api.deliver("wedged", "to the one that was blocked", url=cluster.url(0))
        for cid, guest in guests.items():
            events = await here.check(cid, guest)
            assert await explained(here, cid, 0, events) == ["reaped"]
        assert attempts(await here.api.events("wedged"), "wedging") == [(1, "new"), (2, "takeover")]


async def test_a_turn_that_takes_nodes_down_as_soon_as_it_is_begun_is_given_up() -> None:
    """Its start was on the way to the store before the agent had the word: else nobody would ever count it."""
    async with scene(app=SCRIPTED, lease_ttl=4) as here:
        cluster = here.cluster
        await here.start("c", 0)
        await here.start("other", 1)
        accepted = await here.api.post(cluster.url(0), "c", "/exit", "poison")
        assert accepted.status_code == 202
        await here.api.deliver("other", "are you there?")

        async def given_up() -> bool:
            await asyncio.to_thread(cluster.respawn)
            return any(entry.kind == "turn_failed" for entry in here.stored.log("c"))

        await wait_until(given_up, "it is given up", 60)
        await asyncio.to_thread(cluster.heal)
        events = await here.api.events("c")
        assert [e["data"]["code"] for e in events if e["kind"] == "turn_failed"] == ["too_many_takeovers"]
        assert attempts(events, "poison") == [(1, "new"), (2, "takeover"), (3, "takeover")]
        assert here.stored.head("c")["status"] == "failed"
        await here.check("other")


async def test_a_store_whose_clock_was_set_back_still_buries(tmp_path: Path) -> None:
    """By an hour: then all times that it has written lie an hour ahead, also the last renewal of who is gone."""
    async with scene(app=SCRIPTED, lease_ttl=4) as here:
        await here.start("c", 0)
        await here.api.deliver("c", f"/until {tmp_path / 'gate'}", "gated")
        await here.begun("c", 1)
        (old,) = here.cluster.incarnations(0)
        here.cluster.kill(0)
        here.stored.shift_membership(3_600_000)
        await wait_until(lambda: old in here.stored.buried(), "it is buried", 30)
        events = await here.check("c")
        assert attempts(events, "gated") == [(1, "new"), (2, "takeover")]
        assert len(here.stored.members()) == 2, "and nobody else is"
