"""Open sockets: what they may do, and when they are closed."""

from __future__ import annotations

import time
from typing import Any

import pytest

from convener.gateway.auth import Identity
from tests.gateway.issuer import SECRET, sign
from tests.gateway.sockets import ALICE, connected, forgotten, raw
from tests.gateway.support import Node, serving
from tests.support.waiting import wait_until


async def test_an_expired_token_cuts_the_client_off() -> None:
    async with serving(settings={"auth": "jwt", "jwt_secret": SECRET, "jwt_leeway": 0.0}) as node:
        lasting = sign(exp=int(time.time()) + 3600)
        short = sign(exp=int(time.time()) + 3600, sub="bob")
        async with (
            connected(node.url, {"conversation_id": "c1", "token": lasting}) as alice,
            connected(node.url, {"conversation_id": "c2", "token": short}) as bob,
        ):
            sessions = node.gateway.context.sessions
            for session in sessions.all():
                if session.conversation_id == "c2":
                    session.identity = Identity("bob", expires_at=time.time() - 1)
            await sessions.recheck()
            assert await bob.is_cut_off()
            assert alice.io.connected
            assert (await alice.call("message", {"data": 1}))["status"] == "accepted"
        await forgotten(node)


async def test_the_application_may_change_its_mind() -> None:
    banned: set[str | None] = set()
    down = False

    async def who(token: str | None, headers: Any) -> Identity | None:
        if down:
            raise ConnectionError("no directory")
        return None if token in banned else Identity(token)

    async with serving(settings={"auth": "hook"}, authenticate=who) as node:
        async with (
            connected(node.url, {"conversation_id": "c1", "token": "alice"}) as alice,
            connected(node.url, {"conversation_id": "c2", "token": "bob"}) as bob,
        ):
            sessions = node.gateway.context.sessions
            banned.add("bob")
            down = True
            await sessions.recheck()
            assert len(sessions) == 2, "an outage of the application must not end conversations"
            down = False
            await sessions.recheck()
            assert await bob.is_cut_off()
            assert alice.io.connected
        await forgotten(node)


async def test_clients_that_vanish_are_forgotten(served: Node) -> None:
    async with raw(served.url) as socket:
        await socket.join(ALICE)
        socket.socket.transport.abort()
    async with raw(served.url) as socket:
        await socket.join(ALICE)
        await socket.send("41")
        await wait_until(lambda: len(served.gateway.context.sessions) == 0, "the namespace is left")
    async with raw(served.url) as socket:
        await socket.join(ALICE)
        await socket.send("1")
    await forgotten(served)


async def test_a_transport_without_a_connection_is_swept(served: Node) -> None:
    sockets = served.gateway.sockets
    async with raw(served.url) as silent, connected(served.url, ALICE):
        await silent.receive()
        seen = await sockets.sweep(set())
        assert len(seen) == 1
        assert await sockets.sweep(seen) == set()
        await wait_until(lambda: len(served.sio.environ) == 1, "the silent transport is closed")
        assert len(served.gateway.context.sessions) == 1
    await forgotten(served)


async def test_the_application_decides_what_a_guest_may_do() -> None:
    allowed = {"read"}

    async def who(token: str | None, headers: Any) -> Identity | None:
        return Identity(token)

    async def rule(caller: Identity, cid: str, owner: str, action: str) -> bool | None:
        return action in allowed if caller.user_id == "guest" else None

    async with serving(settings={"auth": "hook"}, authenticate=who, authorize=rule) as node:
        sessions = node.gateway.context.sessions
        async with (
            connected(node.url, {"conversation_id": "c1", "token": "alice"}) as alice,
            connected(node.url, {"conversation_id": "c1", "token": "guest"}) as guest,
        ):
            await guest.until("joined")
            for event, payload in (("message", {"data": 1}), ("stop", {}), ("resume", {})):
                assert (await guest.call(event, payload))["code"] == "not_found"
            assert (await guest.call("rpc", {"method": "double"}))["error"]["code"] == "not_found"
            allowed.add("send")
            assert (await guest.call("message", {"data": "from the guest"}))["status"] == "accepted"
            assert (await alice.call("message", {"data": "from alice"}))["status"] == "accepted"
            log = await guest.answered(2)
            # Whoever speaks in somebody else's conversation speaks under their own name.
            said = [entry["data"]["user_id"] for entry in log if entry["kind"] == "input"]
            assert said == ["guest", "alice"]
            await sessions.recheck()
            assert len(sessions) == 2
            allowed.clear()
            await sessions.recheck()
            assert await guest.is_cut_off()
            assert alice.io.connected
        await forgotten(node)


@pytest.mark.parametrize(("settings", "token"), [({}, None), ({"auth": "token", "auth_tokens": {"ta": "alice"}}, "ta")])
async def test_what_cannot_change_is_not_asked_again(settings: dict[str, Any], token: str | None) -> None:
    async with serving(settings=settings) as node, connected(node.url, ALICE | {"token": token}) as client:
        await client.until("joined")
        await node.gateway.context.sessions.recheck()
        assert (await client.call("message", {"data": 1}))["status"] == "accepted"


async def test_a_client_that_cannot_be_forgotten_ends_nothing_else(
    served: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fail(connection_id: str) -> None:
        raise RuntimeError("odd")

    with monkeypatch.context() as patched:
        patched.setattr(served.manager, "disconnect_from_session", fail)
        async with connected(served.url, ALICE) as client:
            await client.until("joined")
        await wait_until(lambda: not served.sio.environ, "the transport is closed")
    assert len(served.gateway.context.sessions) == 0
    async with connected(served.url, ALICE) as client:
        assert (await client.call("message", {"data": 1}))["status"] == "accepted"
