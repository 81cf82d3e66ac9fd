"""A socket without a conversation: the live list of its user's conversations."""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from typing import Any

import pytest

from convener.gateway.auth import Identity
from tests.gateway.issuer import SECRET, sign
from tests.gateway.sockets import ALICE, Client, connected, forgotten, raw, refusal
from tests.gateway.support import Node, serving
from tests.gateway.test_http import answered, create, say
from tests.support.waiting import wait_until

LIST: dict[str, Any] = {"user_id": "alice"}


async def rows(node: Node, **headers: str) -> dict[str, dict[str, Any]]:
    """What GET lists, by id."""
    params = {} if headers else {"user_id": "alice"}
    listed = (await node.http.get("/api/conversations", params=params, headers=headers)).json()["conversations"]
    return {row["conversation_id"]: row for row in listed}


def shown(client: Client) -> dict[str, dict[str, Any]]:
    """What a user interface would show that follows the list."""
    found: dict[str, dict[str, Any]] = {}
    for event in client.of("conversation"):
        row = {key: value for key, value in event.items() if key != "change"}
        if event["change"] == "deleted":
            found.pop(row["conversation_id"], None)
        else:
            found[row["conversation_id"]] = row
    return found


async def until(client: Client, **wanted: Any) -> dict[str, Any]:
    """Wait for an event that says this."""

    def look() -> dict[str, Any] | None:
        hits = [e for e in client.of("conversation") if all(e[key] == value for key, value in wanted.items())]
        return hits[-1] if hits else None

    event = await wait_until(look, f"the list says {wanted}")
    assert event is not None
    return event


async def test_the_list_begins_with_what_is_there_and_follows(served: Node) -> None:
    for cid in ("c1", "c2"):
        await create(served, cid, user_id="alice", metadata={"title": cid})
    await create(served, "other", user_id="bob")
    async with connected(served.url, LIST) as client:
        await client.until("conversation", 2)
        assert {event["change"] for event in client.of("conversation")} == {"snapshot"}
        assert shown(client) == await rows(served)
        assert served.metric("convener_connections", transport="websocket") == 1

        await create(served, "c3", user_id="alice")
        await until(client, conversation_id="c3", change="created")
        await served.http.patch("/api/conversations/c1", json={"metadata": {"title": "new"}})
        await until(client, conversation_id="c1", change="changed", metadata={"title": "new"})
        await say(served, {"text": "/wait"}, "c2")
        await until(client, conversation_id="c2", status="running", busy=True)
        served.agent.go.set()
        await answered(served, "c2")
        await wait_until(lambda: shown(client)["c2"]["status"] == "idle", "c2 is idle again")
        await served.http.post("/api/conversations/c3/stop")
        await until(client, conversation_id="c3", change="stopped", status="stopped")
        await served.http.post("/api/conversations/c3/resume")
        await until(client, conversation_id="c3", change="changed", status="hibernated")
        await served.http.delete("/api/conversations/c3")
        gone = await until(client, conversation_id="c3", change="deleted")
        assert set(gone) == {*shown(client)["c1"], "change"}
        assert shown(client) == await rows(served)
        assert {event["user_id"] for event in client.of("conversation")} == {"alice"}
        assert {name for name, _ in client.heard} == {"conversation"}
    await forgotten(served)


async def test_what_happens_while_it_connects_is_not_missed(served: Node) -> None:
    made = 0

    async def busy() -> None:
        nonlocal made
        for made in range(40):
            await create(served, f"c{made}", user_id="alice")
            await served.http.patch(f"/api/conversations/c{made // 2}", json={"metadata": {"n": made}})
            if made % 5 == 4:
                await served.http.delete(f"/api/conversations/c{made - 1}")

    work = asyncio.create_task(busy())
    clients = [Client() for _ in range(5)]
    for number, client in enumerate(clients):
        await wait_until(lambda n=number: made >= 6 * n, "it is time for the next client")
        await client.open(served.url, LIST)
    await work
    wanted = {cid: row["metadata"] for cid, row in (await rows(served)).items()}
    for client in clients:
        await wait_until(
            lambda c=client: {cid: row["metadata"] for cid, row in shown(c).items()} == wanted, "it shows what is there"
        )
        await client.io.disconnect()
    await forgotten(served)


async def test_nothing_comes_before_the_answer_to_connect(served: Node) -> None:
    await create(served, user_id="alice")
    for _ in range(20):
        async with raw(served.url) as socket:
            assert (await socket.join(LIST)).startswith('40{"sid":')
            assert (await socket.receive()).startswith('42["conversation",{"conversation_id":"c1",')


async def test_the_query_string_will_do(served: Node) -> None:
    await create(served, user_id="alice")
    async with connected(served.url, None, "user_id=alice") as client:
        await until(client, conversation_id="c1", change="snapshot")


async def test_a_list_is_no_conversation(served: Node) -> None:
    async with connected(served.url, LIST) as client:
        payload = {"data": 1}
        for event in ("message", "answer", "interrupt", "stop", "resume"):
            refused = await client.call(event, payload)
            assert (refused["status"], refused["code"]) == ("rejected", "not_joined")
        assert (await client.call("rpc", {"method": "double"}))["error"]["code"] == "not_joined"
        assert (await client.call("nonsense"))["code"] == "unknown_event"
        assert await served.is_ready()


async def test_whose_list_it_is() -> None:
    settings = {"auth": "token", "auth_tokens": {"ta": "alice"}, "service_tokens": ("ts",), "admin_token": "root"}
    async with serving(settings=settings) as node:
        alice = {"Authorization": "Bearer ta"}
        await node.http.post("/api/conversations", json={"conversation_id": "c1"}, headers=alice)
        for auth in ({"token": "ta"}, {"token": "ts", "user_id": "alice"}, {"token": "root", "user_id": "alice"}):
            async with connected(node.url, auth) as client:
                await until(client, conversation_id="c1", change="snapshot")
        async with connected(node.url, headers=alice) as client:
            await until(client, conversation_id="c1", change="snapshot")
        for auth in ({"token": "ts"}, {"token": "root"}):
            assert (await refusal(node.url, auth))["data"]["code"] == "user_required"
        assert (await refusal(node.url, {"token": "ta", "user_id": "bob"}))["data"]["code"] == "not_authorized"
        assert (await refusal(node.url, {"token": "wrong"}))["data"]["code"] == "not_authenticated"
        assert (await refusal(node.url, {}))["data"]["code"] == "not_authenticated"
        await forgotten(node)


async def test_an_expired_token_ends_the_list() -> None:
    async with serving(settings={"auth": "jwt", "jwt_secret": SECRET, "jwt_leeway": 0.0}) as node:
        token = sign(exp=int(time.time()) + 3600)
        async with connected(node.url, {"token": token}) as client:
            (session,) = node.gateway.context.sessions.all()
            await node.gateway.context.sessions.recheck()
            assert client.io.connected
            session.identity = Identity("alice", expires_at=time.time() - 1)
            await node.gateway.context.sessions.recheck()
            assert await client.is_cut_off()
        await forgotten(node)


async def test_the_application_may_change_its_mind() -> None:
    banned: set[str | None] = set()

    async def who(token: str | None, headers: Any) -> Identity | None:
        return None if token in banned else Identity(token)

    async def rule(caller: Identity, cid: str, owner: str, action: str) -> bool | None:
        assert cid, "a list is no conversation: the rule is not asked"
        return None

    async with serving(settings={"auth": "hook"}, authenticate=who, authorize=rule) as node:
        async with connected(node.url, {"token": "alice"}) as alice, connected(node.url, {"token": "bob"}) as bob:
            banned.add("bob")
            await node.gateway.context.sessions.recheck()
            assert await bob.is_cut_off()
            assert alice.io.connected
        await forgotten(node)


async def test_clients_that_vanish_are_forgotten(served: Node) -> None:
    await create(served, user_id="alice")
    async with raw(served.url) as socket:
        await socket.join(LIST)
        socket.socket.transport.abort()
    async with raw(served.url) as socket:
        await socket.join(LIST)
        await socket.send("41")
        await wait_until(lambda: len(served.gateway.context.sessions) == 0, "the namespace is left")
    await forgotten(served)
    # Nobody is told any more, and nothing fails for it.
    await served.http.patch("/api/conversations/c1", json={"metadata": {"a": 1}})
    assert served.metric("convener_background_restarts_total", task="list") == 0


async def test_a_client_that_does_not_read_gets_the_latest() -> None:
    """When the socket's buffers are full nothing is queued any more; what is read in the end is how things are."""
    count, turns = 10, 40
    async with serving(settings={"max_payload_bytes": 100_000}) as node:
        for number in range(count):
            await create(node, f"c{number}", user_id="alice", metadata={"n": 0})
        async with raw(node.url) as slow, connected(node.url, LIST) as quick:
            await slow.join(LIST)
            slow.socket.transport.pause_reading()
            await quick.until("conversation", count)
            for turn in range(1, turns + 1):
                # Fresh each time: sockets compress, and would make nothing of what repeats.
                filler = secrets.token_urlsafe(60_000)
                for number in range(count):
                    metadata = {"n": turn, "filler": f"{filler}{number}"}
                    await node.http.patch(f"/api/conversations/c{number}", json={"metadata": metadata})
                # Else the server would find many changes at once, whatever the client does.
                last = {"n": turn, "filler": f"{filler}{count - 1}"}
                await until(quick, conversation_id=f"c{count - 1}", metadata=last)
            slow.socket.transport.resume_reading()
            latest: dict[str, int] = {}
            events = 0
            while len(latest) < count or set(latest.values()) != {turns}:
                frame = await slow.receive()
                if frame.startswith('42["conversation",'):
                    row = json.loads(frame[2:])[1]
                    latest[row["conversation_id"]] = row["metadata"]["n"]
                    events += 1
            assert events < count * turns / 2
            assert len(quick.of("conversation")) > events
        await forgotten(node)


async def test_two_lists_and_a_conversation_of_one_user(served: Node) -> None:
    async with (
        connected(served.url, LIST) as one,
        connected(served.url, LIST) as other,
        connected(served.url, ALICE) as client,
    ):
        await client.until("joined")
        for each in (one, other):
            await until(each, conversation_id="c1", status="idle")
        assert client.of("conversation") == []
        await one.io.disconnect()
        await served.http.patch("/api/conversations/c1", json={"metadata": {"a": 1}})
        await until(other, conversation_id="c1", metadata={"a": 1})
    await forgotten(served)


async def test_a_node_that_leaves_sends_lists_away_like_everybody() -> None:
    async with serving() as node, connected(node.url, LIST) as client:
        await create(node, user_id="alice")
        await until(client, conversation_id="c1", status="idle")
        await node.http.post("/api/nodes/n1/drain")
        await client.until("goaway")
        assert await client.is_cut_off()
        await forgotten(node)


async def test_a_kick_reaches_lists() -> None:
    banned: set[str | None] = set()

    async def who(token: str | None, headers: Any) -> Identity | None:
        return None if token in banned else Identity(token)

    async with serving(settings={"auth": "hook", "admin_token": "root"}, authenticate=who) as node:
        root = {"Authorization": "Bearer root"}
        async with connected(node.url, {"token": "alice"}) as alice, connected(node.url, {"token": "bob"}) as bob:
            banned |= {"alice", "bob"}
            kicked = await node.http.post("/api/kick", json={"user_id": "bob"}, headers=root)
            assert kicked.json() == {"checked": 1, "closed": 1}
            assert await bob.is_cut_off()
            assert alice.io.connected
        await forgotten(node)


async def test_a_list_that_cannot_be_followed_leaves_nothing(served: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    async def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("secret")

    monkeypatch.setattr(served.manager, "follow_list", fail)
    told = await refusal(served.url, LIST)
    assert told["data"]["code"] == "internal"
    assert "secret" not in json.dumps(told)
    await forgotten(served)
