"""Emptying nodes, moving conversations, checking connections: for admins, on every node."""

from __future__ import annotations

from typing import Any

import pytest

from tests.gateway.sockets import ALICE, connected
from tests.gateway.support import Node, serving
from tests.gateway.test_http import create, say
from tests.support.waiting import wait_until

pytestmark = pytest.mark.anyio

ADMIN = {"Authorization": "Bearer admin-secret"}
TOKENS: dict[str, Any] = {"auth": "token", "auth_tokens": {"a": "alice", "b": "bob"}, "admin_token": "admin-secret"}


async def test_a_drained_node_is_empty_and_says_how_far_it_is(served: Node) -> None:
    async with connected(served.url, ALICE) as client:
        await client.until("joined")
        await say(served, "c1", "/wait")
        first = (await served.http.post("/api/nodes/n1/drain", json={"timeout": 60})).json()
        assert (first["node"], first["state"], first["remaining"]) == ("n1", "draining", 1)
        assert first["deadline"]
        assert served.metric("convener_drain_remaining_conversations") == 1
        served.agent.go.set()
        await client.until("goaway")
        await client.is_cut_off()

    async def is_drained() -> bool:
        answer = (await served.http.post("/api/nodes/n1/drain")).json()
        return answer["state"] == "drained" and answer["remaining"] == 0

    await wait_until(is_drained, "it is drained")
    assert not await served.is_ready()
    assert (await served.http.get("/api/conversations/c1")).json()["status"] == "hibernated"


async def test_there_has_to_be_such_a_node(served: Node) -> None:
    for path, body in (("/api/nodes/none/drain", {}), ("/api/conversations/c1/move", {"node": "none"})):
        answer = await served.http.post(path, json=body)
        assert (answer.status_code, answer.json()["code"]) == (404, "node_not_found")
    assert (await served.http.post("/api/conversations/c1/move", json={"node": "n1"})).json()["code"] == "not_found"
    await create(served, "c1")
    moved = await served.http.post("/api/conversations/c1/move", json={"node": "n1"})
    assert moved.json() == {"outcome": "there"}
    for timeout in (-1, 1e9, "x"):
        answer = await served.http.post("/api/nodes/n1/drain", json={"timeout": timeout})
        assert answer.status_code == 400


async def test_only_admins_operate() -> None:
    async with serving(settings=TOKENS) as node:
        for path, body in (("/nodes/n1/drain", {}), ("/conversations/c1/move", {"node": "n1"}), ("/kick", {})):
            for headers, status in (({"Authorization": "Bearer a"}, 403), ({}, 401)):
                answer = await node.http.post("/api" + path, json=body, headers=headers)
                assert answer.status_code == status, path
        assert (await node.http.post("/api/kick", headers=ADMIN)).json() == {"checked": 0, "closed": 0}


async def test_a_kick_closes_what_has_lost_its_right_and_nothing_else() -> None:
    banned: set[str] = set()

    async def rule(identity: Any, conversation_id: str, owner: str | None, action: str) -> bool | None:
        return False if identity.user_id in banned else None

    async with serving(settings=TOKENS, authorize=rule) as node:
        alice = {"conversation_id": "c1", "token": "a"}
        bob = {"conversation_id": "c2", "token": "b"}
        async with connected(node.url, alice) as one, connected(node.url, bob) as other:
            await one.until("joined")
            await other.until("joined")
            kicked = await node.http.post("/api/kick", json={"user_id": "alice"}, headers=ADMIN)
            assert kicked.json() == {"checked": 1, "closed": 0}
            banned.update({"alice", "bob"})
            kicked = await node.http.post("/api/kick", json={"user_id": "alice"}, headers=ADMIN)
            assert kicked.json() == {"checked": 1, "closed": 1}
            await one.is_cut_off()
            assert other.io.connected
            kicked = await node.http.post("/api/kick", json={"conversation_id": "c2"}, headers=ADMIN)
            assert kicked.json() == {"checked": 1, "closed": 1}
            await other.is_cut_off()


async def test_metrics_tell_how_many_messages_wait_and_how_long_they_did(node: Node) -> None:
    await create(node)
    for text in ("/wait", "two", "three"):
        await say(node, text)
    await wait_until(lambda: node.metric("convener_inbox_pending") == 3, "three messages wait")
    assert node.metric("convener_message_wait_seconds_count") == 1
    node.agent.go.set()
    await wait_until(lambda: node.metric("convener_message_wait_seconds_count") == 3, "all three were begun")
    await wait_until(lambda: node.metric("convener_inbox_pending") == 0, "none waits")
    assert node.metric("convener_message_wait_seconds_bucket", le="600.0") == 3
