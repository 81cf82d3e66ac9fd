"""Conversations that are unloaded while nobody speaks: messages wake them, and clients hardly notice."""

from __future__ import annotations

import asyncio
import random

import pytest

from tests.cluster.checks import check_answered, opened
from tests.cluster.clients import Clients
from tests.cluster.talking import Api
from tests.support.cluster import Cluster
from tests.support.waiting import wait_until

# A quarter of that is how often a node looks, so conversations fall asleep between any two messages.
pytestmark = pytest.mark.cluster(hibernate_after=0.05)


async def test_a_sleeping_conversation_holds_no_slot_and_wakes_at_the_node_that_hears_for_it(
    cluster: Cluster, clients: Clients, api: Api
) -> None:
    stored = cluster.stored
    assert stored is not None
    guest = await clients.join(cluster.url(0), "sleeper", user_id="u")
    for node in (1, 2, 0):
        await wait_until(lambda: stored.slots("u") == {}, "it sleeps")
        assert stored.head("sleeper")["owner"] == ""
        await api.deliver("sleeper", f"hello from n{node}", url=cluster.url(node))
        await guest.wait_for(len(api.sent["sleeper"]))
    await wait_until(lambda: guest.named("status")[-1]["status"] == "hibernated", "the client knows that it sleeps")
    check_answered(guest.events, api.sent["sleeper"])
    assert {reason for _, reason in opened(guest.events[1:])} == {"wake"}
    assert [name for name, reason in opened(guest.events) if reason == "wake"] == ["n1", "n2", "n0"]
    assert guest.closes == []


async def test_conversations_that_fall_asleep_all_the_time_lose_nothing(
    cluster: Cluster, clients: Clients, api: Api, rng: random.Random
) -> None:
    cids = [f"nap-{number}" for number in range(6)]
    for number, cid in enumerate(cids):
        await api.start(cluster.url(number % 3), cid, f"user-{number}")
    guests = [
        await clients.join(cluster.url(rng.randrange(3)), cid, user_id=f"user-{number}")
        for number, cid in enumerate(cids)
    ]
    stored = cluster.stored
    assert stored is not None

    async def talk(cid: str) -> None:
        for number in range(15):
            await api.deliver(cid, f"line {number}")
            if rng.random() < 0.5:
                # The next message comes while it falls asleep, or after that.
                done = str(len(api.sent[cid]))
                await wait_until(lambda done=done: stored.head(cid)["done"] == done, "it is answered")
                if rng.random() < 0.5:
                    await wait_until(lambda: stored.head(cid)["owner"] == "", "it sleeps")

    await asyncio.gather(*(talk(cid) for cid in cids))
    for cid, guest in zip(cids, guests, strict=True):
        events = await api.answered(cid)
        check_answered(events, api.sent[cid])
        await guest.wait_seq(events[-1]["seq"])
        assert guest.events == events
        assert len(opened(events)) > 1
