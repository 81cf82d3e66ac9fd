"""Questions of the agent, over HTTP and Socket.IO."""

from __future__ import annotations

import asyncio
import re
from typing import Any

import httpx
import pytest

from convener.gateway.auth import Identity
from tests.gateway.sockets import ALICE, Client, connected
from tests.gateway.support import COLOUR, Node, running, serving
from tests.gateway.test_http import answered, create, say
from tests.support.waiting import wait_until


async def asked(node: Node, cid: str = "c1", **headers: str) -> dict[str, Any]:
    """The question that waits."""

    async def look() -> dict[str, Any] | None:
        answer = await node.http.get(f"/api/conversations/{cid}/questions", headers=headers)
        found = answer.json()["questions"]
        return found[0] if found else None

    question = await wait_until(look, "the agent has asked")
    assert question is not None
    return question


async def reply(node: Node, ask_id: str, data: Any, cid: str = "c1", **body: Any) -> httpx.Response:
    return await node.http.post(f"/api/conversations/{cid}/answer", json={"ask_id": ask_id, "data": data} | body)


async def test_a_question_is_listed_answered_once_and_closed(node: Node) -> None:
    await create(node, user_id="alice")
    assert (await node.http.get("/api/conversations/c1/questions")).json() == {"questions": []}
    await say(node, {"text": "/ask"})
    question = await asked(node)
    assert question == {
        "ask_id": "t1.1",
        "prompt": {"text": "Which colour?"},
        "schema": COLOUR,
        "deadline": question["deadline"],
    }
    assert re.fullmatch(r"20\d\d-\d\d-\d\dT\d\d:\d\d:\d\d\.\d\d\dZ", question["deadline"])
    shown = (await node.http.get("/api/conversations/c1")).json()
    assert (shown["status"], shown["busy"]) == ("waiting", False)
    listed = await node.http.get("/api/conversations", params={"user_id": "alice", "status": "waiting"})
    assert [each["conversation_id"] for each in listed.json()["conversations"]] == ["c1"]

    unfit = await reply(node, "t1.1", "blue")
    assert (unfit.status_code, unfit.json()["code"]) == (400, "invalid_answer")
    assert "blue" in unfit.json()["detail"]
    first = await reply(node, "t1.1", "red", message_id="a1")
    assert (first.status_code, first.json()) == (
        202,
        {"status": "accepted", "message_id": "a1", "position": 2, "duplicate": False},
    )
    again = await reply(node, "t1.1", "red", message_id="a1")
    assert again.json() == first.json() | {"duplicate": True}
    late = await reply(node, "t1.1", "green")
    assert (late.status_code, late.json()["code"]) == (409, "ask_closed")
    await answered(node)
    events = (await node.http.get("/api/conversations/c1/events")).json()["events"]
    assert [event["data"] for event in events if event["kind"] == "reply"] == ["red"]
    assert (await node.http.get("/api/conversations/c1/questions")).json() == {"questions": []}


async def test_many_answers_at_once_are_one(node: Node) -> None:
    await create(node)
    await say(node, {"text": "/ask"})
    question = await asked(node)
    answers = await asyncio.gather(*(reply(node, question["ask_id"], "red") for _ in range(10)))
    assert sorted(answer.status_code for answer in answers) == [202] + [409] * 9


async def test_an_answer_to_a_conversation_that_was_stopped(node: Node) -> None:
    await create(node)
    await say(node, {"text": "/ask"})
    question = await asked(node)
    await node.http.post("/api/conversations/c1/stop")
    refused = await reply(node, question["ask_id"], "red")
    assert (refused.status_code, refused.json()["code"]) == (409, "conversation_stopped")


async def ask(client: Client) -> str:
    """Make the agent ask; returns the question's id as the log has it."""
    await client.call("message", {"data": {"text": "/ask"}})
    await wait_until(lambda: [e for e in client.of("event") if e["kind"] == "ask"], "the agent has asked")
    return [entry for entry in client.of("event") if entry["kind"] == "ask"][-1]["data"]["ask_id"]


async def test_a_client_answers(served: Node) -> None:
    async with connected(served.url, ALICE) as client, connected(served.url, ALICE) as other:
        ask_id = await ask(client)
        unfit = await client.call("answer", {"ask_id": ask_id, "data": "blue"})
        assert (unfit["status"], unfit["code"]) == ("rejected", "invalid_answer")
        answer = await client.call("answer", {"ask_id": ask_id, "data": "green", "message_id": "a1"})
        assert answer == {"status": "accepted", "message_id": "a1", "position": 2, "duplicate": False}
        late = await other.call("answer", {"ask_id": ask_id, "data": "red"})
        assert (late["status"], late["code"]) == ("rejected", "ask_closed")
        log = await other.answered()
        (given,) = [entry["data"] for entry in log if entry["kind"] == "answer"]
        assert (given["ask_id"], given["message_id"], given["user_id"], given["data"]) == (
            ask_id,
            "a1",
            "alice",
            "green",
        )
        assert [entry["data"] for entry in log if entry["kind"] == "reply"] == ["green"]


BAD_ANSWERS: tuple[tuple[Any, str], ...] = (
    (None, "invalid_request"),
    ({}, "invalid_request"),
    ({"ask_id": "t1.1"}, "invalid_request"),
    ({"data": 1}, "invalid_request"),
    ({"ask_id": 1, "data": 1}, "invalid_request"),
    ({"ask_id": "a b", "data": 1}, "invalid_id"),
    ({"ask_id": "t1.1", "data": 1, "message_id": "a b"}, "invalid_id"),
    ({"ask_id": "t1.1", "data": 1, "turn": "t1"}, "invalid_request"),
    ({"ask_id": "t1.1", "data": "x" * 5000}, "payload_too_large"),
    ({"ask_id": "t9.1", "data": "red"}, "ask_closed"),
)


async def test_malformed_answers_change_nothing(served: Node) -> None:
    async with connected(served.url, ALICE) as client:
        ask_id = await ask(client)
        for payload, code in BAD_ANSWERS:
            answer = await client.call("answer", payload)
            assert (answer["status"], answer["code"]) == ("rejected", code), payload
        assert (await client.call("answer", {"ask_id": ask_id, "data": "red"}))["status"] == "accepted"
        await client.answered()


async def test_who_may_answer_is_the_applications_to_say() -> None:
    allowed = {"read"}

    async def who(token: str | None, headers: Any) -> Identity | None:
        return Identity(token)

    async def rule(caller: Identity, cid: str, owner: str, action: str) -> bool | None:
        return action in allowed if caller.user_id == "guest" else None

    options: dict[str, Any] = {"settings": {"auth": "hook"}, "authenticate": who, "authorize": rule}
    async with serving(**options) as node:
        bearer = {"Authorization": "Bearer guest"}
        async with (
            connected(node.url, {"conversation_id": "c1", "token": "alice"}) as alice,
            connected(node.url, {"conversation_id": "c1", "token": "guest"}) as guest,
        ):
            body = {"ask_id": await ask(alice), "data": "red"}
            assert (await guest.call("answer", body))["code"] == "not_found"
            refused = await node.http.post("/api/conversations/c1/answer", json=body, headers=bearer)
            assert refused.status_code == 404
            assert (await asked(node, **bearer))["ask_id"] == body["ask_id"]
            allowed.add("answer")
            assert (await guest.call("answer", body))["status"] == "accepted"
            (given,) = [e["data"] for e in await alice.answered() if e["kind"] == "answer"]
            assert given["user_id"] == "guest"
            allowed.clear()
            hidden = await node.http.get("/api/conversations/c1/questions", headers=bearer)
            assert hidden.status_code == 404


@pytest.mark.parametrize("token", ["tb", None])
async def test_strangers_see_and_answer_nothing(token: str | None) -> None:
    settings = {"auth": "token", "auth_tokens": {"ta": "alice", "tb": "bob"}}
    async with running(settings=settings) as node:
        alice = {"Authorization": "Bearer ta"}
        message = {"data": {"text": "/ask"}}
        made = {"conversation_id": "c1", "message": message}
        assert (await node.http.post("/api/conversations", json=made, headers=alice)).status_code == 201
        question = await asked(node, **alice)
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        body = {"ask_id": question["ask_id"], "data": "red"}
        for answer in (
            await node.http.get("/api/conversations/c1/questions", headers=headers),
            await node.http.post("/api/conversations/c1/answer", json=body, headers=headers),
        ):
            assert answer.status_code == (404 if token else 401)
        assert await asked(node, **alice) == question
