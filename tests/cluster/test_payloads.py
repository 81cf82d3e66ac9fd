"""Small and large messages in one conversation: above some kilobytes only their numbers are published."""

from __future__ import annotations

import asyncio
import random

from tests.cluster.checks import check_answered
from tests.cluster.clients import Clients
from tests.cluster.talking import Api
from tests.support.cluster import Cluster

KIB = 1024


async def test_messages_of_all_sizes_reach_everybody_in_order(
    cluster: Cluster, clients: Clients, api: Api, rng: random.Random
) -> None:
    cid = "sizes"
    await api.start(cluster.url(0), cid, "u")
    guests = [await clients.join(cluster.url(node), cid, user_id="u") for node in range(3)]
    # About the size above which a publication holds no data (8 KiB), and up to near the limit (1 MiB).
    sizes = [0, 1, 4 * KIB, *range(8 * KIB - 300, 8 * KIB + 300, 150), 64 * KIB, 500 * KIB, KIB * KIB - 2 * KIB] * 2
    rng.shuffle(sizes)

    async def say(speaker: int, mine: list[int]) -> None:
        for number, size in enumerate(mine):
            text = f"{number} " + chr(rng.randrange(97, 123)) * size
            ident = f"{cid}.{speaker}.{number}"
            api.sent[cid][ident] = text
            await guests[speaker].say(text, ident)

    await asyncio.gather(*(say(speaker, sizes[speaker::3]) for speaker in range(3)))
    for guest in guests:
        await guest.wait_for(len(sizes), "turn_done", 60)
        assert guest.events == guests[0].events
        assert guest.closes == []
    check_answered(guests[0].events, api.sent[cid])
    late = await clients.join(cluster.url(1), cid, user_id="u")
    assert late.events == guests[0].events


async def test_a_message_that_may_not_wait_is_refused_while_another_is_answered(cluster: Cluster, api: Api) -> None:
    await api.start(cluster.url(0), "impatient", "u")
    await api.deliver("impatient", "/sleep 600", "nap")
    refused = await api.post(cluster.url(1), "impatient", "now or never", "m", overlap="reject")
    assert (refused.status_code, refused.json()["code"]) == (409, "conversation_busy")
    assert refused.json()["retry_after"] > 0
    stopped = await api.http.post(f"{cluster.url(2)}/api/conversations/impatient/stop")
    assert stopped.json() == {"outcome": "stopped"}
    await api.http.post(f"{cluster.url(2)}/api/conversations/impatient/resume")
    accepted = await api.post(cluster.url(1), "impatient", "now or never", "m", overlap="reject")
    assert (accepted.status_code, accepted.json()["duplicate"]) == (202, False)
    api.sent["impatient"]["m"] = "now or never"
    check_answered(await api.answered("impatient"), api.sent["impatient"], given_up=["nap"])
