"""Who may reach what, through HTTP; sockets use the same rules (`test_socketio.py`)."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping
from typing import Any

import httpx
import pytest

from convener.gateway.auth import Identity
from tests.gateway.support import Node, running
from tests.gateway.test_refusals import ON_A_CONVERSATION
from tests.support.waiting import wait_until

TOKENS: dict[str, Any] = {
    "auth": "token",
    "auth_tokens": {"ta": "alice", "tb": "bob"},
    "service_tokens": ("ts",),
    "admin_token": "root",
}


@pytest.fixture
async def node() -> AsyncGenerator[Node]:
    async with running(settings=TOKENS) as started:
        made = await ask(started, "POST", "/api/conversations", "ta", json={"conversation_id": "c1"})
        assert (made.status_code, made.json()["user_id"]) == (201, "alice")
        yield started


async def ask(node: Node, method: str, path: str, token: str | None, **options: Any) -> httpx.Response:
    headers = {} if token is None else {"Authorization": f"Bearer {token}"}
    return await node.http.request(method, path, headers=headers, **options)


@pytest.mark.parametrize(
    "header", [None, "Bearer", "Bearer ", "Bearer wrong", "Basic dGE6", "ta", "Bearer ta tb", "Bearer \xe4"]
)
async def test_without_a_token_that_holds_there_is_nothing(node: Node, header: str | None) -> None:
    headers = httpx.Headers({} if header is None else {"Authorization": header}, encoding="latin-1")
    for method, path in (
        ("GET", "/api/conversations"),
        ("POST", "/api/conversations"),
        ("GET", "/api/conversations/c1"),
        ("GET", "/api/conversations/c1/stream"),
        ("GET", "/api/nodes"),
        ("GET", "/api/audit"),
    ):
        answer = await node.http.request(method, path, headers=headers)
        assert (answer.status_code, answer.json()["code"]) == (401, "not_authenticated")
        assert answer.headers["www-authenticate"] == "Bearer"


async def test_health_and_metrics_need_no_token(node: Node) -> None:
    for path in ("/livez", "/healthz", "/readyz", "/metrics", "/openapi.json"):
        assert (await ask(node, "GET", path, None)).status_code == 200


@pytest.mark.parametrize("scheme", ["Bearer", "bearer", "BEARER"])
async def test_the_scheme_has_no_case(node: Node, scheme: str) -> None:
    answer = await node.http.get("/api/conversations/c1", headers={"Authorization": f"{scheme} ta"})
    assert answer.status_code == 200


@pytest.mark.parametrize(("method", "suffix", "body"), ON_A_CONVERSATION)
async def test_somebody_elses_conversation_looks_like_none(node: Node, method: str, suffix: str, body: Any) -> None:
    theirs = await ask(node, method, "/api/conversations/c1" + suffix, "tb", json=body)
    none = await ask(node, method, "/api/conversations/c9" + suffix, "tb", json=body)
    assert theirs.status_code == none.status_code == 404
    assert theirs.text.replace("c1", "c9") == none.text
    assert theirs.headers == none.headers
    mine = await ask(node, "GET", "/api/conversations/c1", "ta")
    assert mine.json()["status"] == "idle"


async def test_an_id_that_somebody_has_cannot_be_created(node: Node) -> None:
    answer = await ask(node, "POST", "/api/conversations", "tb", json={"conversation_id": "c1"})
    assert (answer.status_code, answer.json()["code"]) == (404, "not_found")


async def test_a_user_cannot_be_somebody_else(node: Node) -> None:
    for method, path, options in (
        ("POST", "/api/conversations", {"json": {"user_id": "alice"}}),
        ("GET", "/api/conversations", {"params": {"user_id": "alice"}}),
    ):
        answer = await ask(node, method, path, "tb", **options)
        assert (answer.status_code, answer.json()["code"]) == (403, "not_authorized")
    answer = await ask(node, "POST", "/api/conversations", "tb", json={"user_id": "bob"})
    assert answer.json()["user_id"] == "bob"


async def test_a_user_lists_what_is_theirs(node: Node) -> None:
    await ask(node, "POST", "/api/conversations", "tb", json={"conversation_id": "b1"})
    for token, expected in (("ta", ["c1"]), ("tb", ["b1"])):
        listed = (await ask(node, "GET", "/api/conversations", token)).json()["conversations"]
        assert [each["conversation_id"] for each in listed] == expected


@pytest.mark.parametrize("token", ["ts", "root"])
async def test_services_and_admins_act_for_anybody(node: Node, token: str) -> None:
    created = await ask(node, "POST", "/api/conversations", token, json={"conversation_id": "b1", "user_id": "bob"})
    assert created.json()["user_id"] == "bob"
    again = await ask(node, "POST", "/api/conversations", token, json={"conversation_id": "c1"})
    assert (again.status_code, again.json()["user_id"]) == (200, "alice")
    wrong = await ask(node, "POST", "/api/conversations", token, json={"conversation_id": "c1", "user_id": "bob"})
    assert wrong.status_code == 404
    listed = await ask(node, "GET", "/api/conversations", token, params={"user_id": "alice"})
    assert [each["conversation_id"] for each in listed.json()["conversations"]] == ["c1"]
    assert (await ask(node, "GET", "/api/conversations", token)).json()["code"] == "invalid_request"
    sent = await ask(node, "POST", "/api/conversations/c1/messages", token, json={"data": "hi"})
    assert sent.status_code == 202


@pytest.mark.parametrize("path", ["/api/nodes", "/api/audit", "/api/conversations?scope=cluster"])
async def test_the_admin_api_is_the_admins(node: Node, path: str) -> None:
    for token in ("ta", "ts"):
        answer = await ask(node, "GET", path, token)
        assert (answer.status_code, answer.json()["code"]) == (403, "not_authorized")
    assert (await ask(node, "GET", path, "root")).status_code == 200


async def test_the_sender_of_a_message_is_in_the_log(node: Node) -> None:
    await ask(node, "POST", "/api/conversations/c1/messages", "ta", json={"data": "hi"})

    async def senders() -> list[Any]:
        events = (await ask(node, "GET", "/api/conversations/c1/events", "ta")).json()["events"]
        return [event["data"]["user_id"] for event in events if event["kind"] == "input"]

    assert await wait_until(senders, "the message is in the log") == ["alice"]


# --- the application's own rules --------------------------------------------------------------------------------


async def who(token: str | None, headers: Mapping[str, str]) -> Identity | None:
    return Identity(token) if token else None


async def test_the_authorize_hook_opens_and_closes() -> None:
    seen: list[tuple[str | None, str, str, str]] = []

    async def rule(caller: Identity, cid: str, owner: str, action: str) -> bool | None:
        seen.append((caller.user_id, cid, owner, action))
        if caller.user_id == "guest":
            return action == "read"
        return False if action == "delete" else None

    async with running(settings={"auth": "hook"}, authenticate=who, authorize=rule) as node:
        await ask(node, "POST", "/api/conversations", "alice", json={"conversation_id": "c1"})
        assert seen == [("alice", "c1", "alice", "create")]
        # The guest may read it, which is more than usual, and do nothing else.
        assert (await ask(node, "GET", "/api/conversations/c1", "guest")).status_code == 200
        assert (await ask(node, "GET", "/api/conversations/c1/events", "guest")).status_code == 200
        sent = await ask(node, "POST", "/api/conversations/c1/messages", "guest", json={"data": 1})
        assert (sent.status_code, sent.json()["code"]) == (404, "not_found")
        # Nobody may create or delete here, not even what is their own; others see nothing as ever.
        refused = await ask(node, "POST", "/api/conversations", "guest", json={"conversation_id": "c2"})
        assert (refused.status_code, refused.json()["code"]) == (403, "not_authorized")
        refused = await ask(node, "DELETE", "/api/conversations/c1", "alice")
        assert (refused.status_code, refused.json()["code"]) == (403, "not_authorized")
        assert (await ask(node, "GET", "/api/conversations/c1", "bob")).status_code == 404
        assert seen[-1] == ("bob", "c1", "alice", "read")


async def test_an_authorize_hook_that_fails_lets_nobody_in() -> None:
    async def rule(caller: Identity, cid: str, owner: str, action: str) -> bool | None:
        raise RuntimeError("secret")

    async with running(settings={"auth": "hook"}, authenticate=who, authorize=rule) as node:
        answer = await ask(node, "POST", "/api/conversations", "alice")
        assert (answer.status_code, answer.json()["code"]) == (503, "auth_unavailable")
        assert "secret" not in answer.text


# --- pages of other sites -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("origin", "allowed"),
    [
        (None, True),
        ("http://127.0.0.1", True),
        ("https://chat.example", True),
        ("http://evil.example", False),
        ("https://chat.example.evil.example", False),
        ("http://127.0.0.1:9", False),
        ("null", False),
    ],
)
async def test_without_authentication_foreign_pages_may_not_act(origin: str | None, allowed: bool) -> None:
    headers = {} if origin is None else {"Origin": origin}
    async with running(settings={"cors_origins": ("https://chat.example",)}) as node:
        answer = await node.http.post("/api/conversations", headers=headers)
        assert answer.status_code == (201 if allowed else 403)
        read = await node.http.get("/api/conversations", headers=headers)
        cross = origin == "https://chat.example"
        assert read.headers.get("access-control-allow-origin") == (origin if cross else None)


async def test_preflight_requests_of_allowed_origins() -> None:
    async with running(settings={"cors_origins": ("https://chat.example",)}) as node:
        for origin, status in (("https://chat.example", 200), ("https://evil.example", 400)):
            answer = await node.http.options(
                "/api/conversations/c1/messages",
                headers={
                    "Origin": origin,
                    "Access-Control-Request-Method": "POST",
                    "Access-Control-Request-Headers": "authorization,content-type",
                },
            )
            assert answer.status_code == status
