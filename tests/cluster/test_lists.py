"""The live list on real processes: whatever happens to nodes, it ends up as what a GET says."""

from __future__ import annotations

from typing import Any

from tests.cluster.talking import Api
from tests.gateway.sockets import Client, connected
from tests.support.cluster import Cluster
from tests.support.waiting import wait_until

USER = "lister"
TOLD = ("user_id", "status", "busy", "node", "epoch", "metadata", "created_at")
"""What a list tells every change of."""


def shown(client: Client) -> dict[str, dict[str, Any]]:
    """The list as the client has it."""
    rows: dict[str, dict[str, Any]] = {}
    for event in client.of("conversation"):
        if event["change"] == "deleted":
            rows.pop(event["conversation_id"], None)
        else:
            rows[event["conversation_id"]] = {name: event[name] for name in TOLD}
    return rows


async def listed(api: Api, url: str) -> dict[str, dict[str, Any]]:
    """The list as a GET says."""
    answer = await api.http.get(f"{url}/api/conversations", params={"user_id": USER})
    return {row["conversation_id"]: {name: row[name] for name in TOLD} for row in answer.json()["conversations"]}


async def agree(api: Api, url: str, *clients: Client) -> dict[str, dict[str, Any]]:
    """Wait until every list is what a GET says, and return that."""

    async def same() -> bool:
        wanted = await listed(api, url)
        return bool(wanted) and all(shown(client) == wanted for client in clients)

    await wait_until(same, "all lists are as they should be", 60)
    return shown(clients[0])


async def test_lists_on_other_nodes_follow_through_a_kill(cluster: Cluster, api: Api) -> None:
    follow: dict[str, Any] = {"user_id": USER}
    async with connected(cluster.url(1), follow) as one, connected(cluster.url(2), follow) as other:
        for number in range(3):
            await api.start(cluster.url(0), f"l{number}", USER, metadata={"number": number})
        await api.deliver("l0", "hello", url=cluster.url(2))
        rows = await agree(api, cluster.url(1), one, other)
        assert {row["node"] for row in rows.values()} == {"n0"}

        await api.http.patch(f"{cluster.url(2)}/api/conversations/l1", json={"metadata": {"title": "new"}})
        await api.http.post(f"{cluster.url(1)}/api/conversations/l2/stop")
        rows = await agree(api, cluster.url(1), one, other)
        assert (rows["l1"]["metadata"], rows["l2"]["status"]) == ({"title": "new"}, "stopped")

        await api.deliver("l0", "/sleep 3600", url=cluster.url(1))
        await wait_until(lambda: shown(one)["l0"]["status"] == "running", "the agent is at work")
        cluster.kill(0)
        # The one that was at work goes on elsewhere, the idle one is let go, and both lists say so.
        await wait_until(lambda: shown(one)["l0"]["node"] in ("n1", "n2"), "it was taken over", 60)
        await wait_until(lambda: shown(other)["l1"]["status"] == "hibernated", "the idle one has no node", 60)
        await agree(api, cluster.url(1), one, other)

        for number in range(3):
            await api.http.delete(f"{cluster.url(1 + number % 2)}/api/conversations/l{number}")
        await wait_until(lambda: shown(one) == shown(other) == {}, "nothing is left")
        assert {event["user_id"] for event in one.of("conversation")} == {USER}
