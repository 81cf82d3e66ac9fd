"""Nodes with the least rights, and with less than that, where managed stores hide things."""

from __future__ import annotations

import asyncio
import json
import sys

import pytest

from tests.cluster.checks import check_answered, opened
from tests.cluster.clients import Clients
from tests.cluster.talking import Api, while_talking
from tests.support.cluster import Cluster
from tests.support.servers import FLAVOURS
from tests.support.topologies import tell
from tests.support.waiting import wait_until

on_valkey = pytest.mark.parametrize("flavour", FLAVOURS[:1], indirect=True)


async def _story(cluster: Cluster, clients: Clients, api: Api) -> None:
    """Talk at all nodes, follow, interrupt nothing; kill an owner, stop, resume, delete."""
    guest = await clients.join(cluster.url(1), "chat", user_id="u")
    for index in range(3):
        await api.deliver("chat", f"hello {index}", url=cluster.url(index))
    await guest.wait_for(3, "turn_done")
    await api.start(cluster.url(0), "doomed", "v")
    await api.deliver("doomed", "/sleep 0.5", url=cluster.url(2))
    await api.deliver("doomed", "and then", url=cluster.url(1))
    await asyncio.to_thread(cluster.kill, 0)
    events = await api.answered("doomed")
    check_answered(events, api.sent["doomed"], answer=lambda text: "slept" if text.startswith("/sleep") else text)
    assert [reason for _, reason in opened(events)] == ["start", "takeover"]
    for what in ("stop", "resume"):
        answer = await api.http.post(f"{cluster.url(2)}/api/conversations/chat/{what}")
        assert answer.status_code == 200, answer.text
    await api.deliver("chat", "again", url=cluster.url(1))
    check_answered(await api.answered("chat"), api.sent["chat"])


@pytest.mark.cluster(rights=())
async def test_what_doctor_prints_is_enough(cluster: Cluster, clients: Clients, api: Api) -> None:
    assert cluster.server is not None
    server = cluster.server
    await asyncio.to_thread(server.ask, "ACL", "LOG", "RESET")
    await _story(cluster, clients, api)
    await asyncio.to_thread(cluster.restart, 0)
    log = await asyncio.to_thread(tell, server, "ACL", "LOG")
    # What nodes can do without they ask for all the same, once, when they start.
    assert {entry[entry.index(b"object") + 1] for entry in log} <= {b"config|get"}


@on_valkey
@pytest.mark.cluster(rights=("-info", "-config", "-client", "-role", "-wait", "-script", "-select"), lease_ttl=4)
async def test_what_managed_stores_hide_is_not_needed(cluster: Cluster, clients: Clients, api: Api) -> None:
    await _story(cluster, clients, api)
    text = cluster.http.get(f"{cluster.url(1)}/metrics").text
    assert "convener_store_memory_ratio NaN" in text
    assert "convener_store_evicts 0.0" in text


@on_valkey
@pytest.mark.cluster(rights=("-pubsub|shardnumsub",), lease_ttl=4)
async def test_nobody_is_buried_fast_where_subscribers_cannot_be_counted(
    cluster: Cluster, clients: Clients, api: Api
) -> None:
    """But when the lease has ended."""
    await _story(cluster, clients, api)
    assert cluster.stored is not None
    stored = cluster.stored
    await wait_until(lambda: len(stored.buried()) >= 1, "the killed node was buried")
    assert [line for node in cluster.nodes for line in node.log() if "process is gone" in line] == []


@on_valkey
@pytest.mark.cluster(rights=())
async def test_doctor_finds_nothing_wrong_with_a_cluster_at_work(cluster: Cluster, api: Api) -> None:
    """Steps that are half done while it looks are not taken for what is left over."""
    server = cluster.server
    assert server is not None
    for number in range(3):
        await api.start(cluster.url(number), f"busy-{number}", f"user-{number}")

    async def come_and_go(over: asyncio.Event) -> None:
        number = 0
        while not over.is_set():
            number += 1
            await api.start(cluster.url(number % 3), f"passing-{number}", "visitor", message={"data": {"text": "x"}})
            answer = await api.http.delete(f"{cluster.url((number + 1) % 3)}/api/conversations/passing-{number}")
            assert answer.status_code == 204, answer.text

    async def examine() -> None:
        over = asyncio.Event()
        traffic = asyncio.create_task(come_and_go(over))
        command = (sys.executable, "-m", "convener", "doctor", "--redis", server.url, "--watch", "0", "--json")
        try:
            for _ in range(2):
                done = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
                out, _ = await done.communicate()
                found = {each["check"]: each for each in json.loads(out)["findings"]}
                assert found["keys"]["verdict"] == "safe", found["keys"]
                assert found["rights"]["verdict"] == "safe"
                assert found["members"]["verdict"] == "safe"
                assert all(f"n{number} (" in found["members"]["says"] for number in range(3))
        finally:
            over.set()
            await traffic

    await while_talking(api, [f"busy-{number}" for number in range(3)], examine())
    for number in range(3):
        check_answered(await api.answered(f"busy-{number}"), api.sent[f"busy-{number}"])
