"""What comes in broken: every route gives the documented answer, and the node is as ready as before."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any

import httpx
import pytest

from tests.gateway.support import MAX_PAYLOAD, Node, running

JSON = {"Content-Type": "application/json"}
BIG = "x" * (MAX_PAYLOAD + 1)
HUGE = "x" * (3 * MAX_PAYLOAD + 65_537)
DEEP = "[" * 200 + "]" * 200

CREATE = "/api/conversations"
C1 = "/api/conversations/c1"
BAD_IDS = ("a b", "a%2Fb", "%00", "x" * 129, "{c1}", "%C3%A4")

BAD_JSON = ("{", "", "NaN", '{"data": NaN}', '{"data": 1e999}', '{"data": "\\ud800"}', '{"data": ' + DEEP + "}", "\xff")
BAD_MESSAGES: tuple[Any, ...] = (
    None,
    [],
    "text",
    1,
    {},
    {"message_id": "m"},
    {"data": 1, "colour": "red"},
    {"data": 1, "message_id": 7},
    {"data": 1, "message_id": None, "overlap": 1},
    {"data": 1, "overlap": "never"},
    {"data": 1, "user_id": "bob"},
)
BAD_ANSWERS: tuple[tuple[Any, str], ...] = (
    ([], "body"),
    ({}, "ask_id"),
    ({"ask_id": "t1.1"}, "data"),
    ({"data": 1}, "ask_id"),
    ({"ask_id": None, "data": 1}, "ask_id"),
    ({"ask_id": 1, "data": 1}, "ask_id"),
    ({"ask_id": "t1.1", "data": 1, "message_id": 7}, "message_id"),
    ({"ask_id": "t1.1", "data": 1, "overlap": "reject"}, "overlap"),
)


@pytest.fixture(scope="module")
async def node() -> AsyncGenerator[Node]:
    """One node for all of them: if one of these broke it, the next would notice."""
    async with running() as started:
        assert (await started.http.post(CREATE, json={"conversation_id": "c1"})).status_code == 201
        yield started


async def refused(node: Node, request: httpx.Request, status: int, code: str) -> dict[str, Any]:
    """Send it, and expect a problem and a node that has not noticed."""
    before = node.metric("convener_malformed_total", where="http")
    answer = await node.http.send(request)
    counted = node.metric("convener_malformed_total", where="http") - before
    assert counted == (1 if status in (400, 413) else 0)
    assert (answer.status_code, answer.headers["content-type"]) == (status, "application/problem+json"), answer.text
    document = answer.json()
    assert document["code"] == code, document
    assert document["status"] == status
    assert document["detail"]
    assert await node.is_ready()
    assert (await node.http.get(f"{C1}/events")).json()["events"][0]["kind"] == "open"
    return document


def request(node: Node, method: str, path: str, **options: Any) -> httpx.Request:
    return node.http.build_request(method, path, **options)


# --- routes ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/nope", "/api", "/api/", "/api/nope", C1 + "/nope", C1 + "/", "/console/", "/"])
async def test_there_is_no_such_route(node: Node, path: str) -> None:
    await refused(node, request(node, "GET", path), 404, "not_found")


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("PUT", CREATE, "POST"),
        ("POST", C1, "GET"),
        ("GET", C1 + "/messages", "POST"),
        ("GET", C1 + "/stop", "POST"),
        ("POST", C1 + "/events", "GET"),
        ("DELETE", "/readyz", "GET"),
        ("BREW", "/api/nodes", "GET"),
    ],
)
async def test_the_wrong_method(node: Node, method: str, path: str, allowed: str) -> None:
    await refused(node, request(node, method, path), 405, "method_not_allowed")
    answer = await node.http.send(request(node, method, path))
    assert allowed in answer.headers["allow"]


# --- ids ------------------------------------------------------------------------------------------------------

ON_A_CONVERSATION: tuple[tuple[str, str, Any], ...] = (
    ("GET", "", None),
    ("PATCH", "", {"metadata": {}}),
    ("DELETE", "", None),
    ("POST", "/messages", {"data": 1}),
    ("GET", "/questions", None),
    ("POST", "/answer", {"ask_id": "t1.1", "data": 1}),
    ("GET", "/events", None),
    ("GET", "/events?before=5", None),
    ("GET", "/stream", None),
    ("POST", "/stop", {}),
    ("POST", "/resume", {}),
    ("POST", "/rpc/double", {"params": 1}),
)


@pytest.mark.parametrize(("method", "suffix", "body"), ON_A_CONVERSATION)
async def test_an_unknown_conversation(node: Node, method: str, suffix: str, body: Any) -> None:
    await refused(node, request(node, method, CREATE + "/unknown" + suffix, json=body), 404, "not_found")


@pytest.mark.parametrize("cid", [cid for cid in BAD_IDS if cid != "a%2Fb"])
@pytest.mark.parametrize(("method", "suffix", "body"), ON_A_CONVERSATION)
async def test_a_malformed_id_in_the_path(node: Node, method: str, suffix: str, body: Any, cid: str) -> None:
    await refused(node, request(node, method, f"{CREATE}/{cid}{suffix}", json=body), 400, "invalid_id")


@pytest.mark.parametrize("cid", ["", "a b", "a/b", "\0", "x" * 129, "ä"])
async def test_a_malformed_id_in_the_body(node: Node, cid: str) -> None:
    for body in (
        {"conversation_id": cid},
        {"user_id": cid},
        {"conversation_id": "c1", "message": {"message_id": cid, "data": 1}},
    ):
        await refused(node, request(node, "POST", CREATE, json=body), 400, "invalid_id")
    await refused(node, request(node, "POST", C1 + "/messages", json={"message_id": cid, "data": 1}), 400, "invalid_id")
    answer = {"ask_id": "t1.1", "data": 1}
    for wrong in ({"ask_id": cid}, {"message_id": cid}):
        await refused(node, request(node, "POST", C1 + "/answer", json=answer | wrong), 400, "invalid_id")
    await refused(node, request(node, "GET", "/api/audit", params={"conversation_id": cid}), 400, "invalid_id")


# --- bodies ---------------------------------------------------------------------------------------------------

WITH_BODY = (
    ("POST", CREATE),
    ("PATCH", C1),
    ("POST", C1 + "/messages"),
    ("POST", C1 + "/answer"),
    ("POST", C1 + "/stop"),
    ("POST", C1 + "/resume"),
    ("POST", C1 + "/rpc/double"),
)


@pytest.mark.parametrize("text", [text for text in BAD_JSON if text])
@pytest.mark.parametrize(("method", "path"), WITH_BODY)
async def test_bodies_that_are_not_json(node: Node, method: str, path: str, text: str) -> None:
    sent = request(node, method, path, content=text.encode("latin-1"), headers=JSON)
    document = await refused(node, sent, 400, "invalid_request")
    assert "not valid JSON" in document["detail"]


@pytest.mark.parametrize("media_type", [None, "text/plain", "application/x-www-form-urlencoded", "json", ""])
@pytest.mark.parametrize(("method", "path"), WITH_BODY)
async def test_bodies_of_another_type(node: Node, method: str, path: str, media_type: str | None) -> None:
    headers = {} if media_type is None else {"Content-Type": media_type}
    sent = request(node, method, path, content=b'{"data":1}', headers=headers)
    document = await refused(node, sent, 400, "invalid_request")
    assert "application/json" in document["detail"]


@pytest.mark.parametrize("body", BAD_MESSAGES, ids=json.dumps)
async def test_malformed_messages(node: Node, body: Any) -> None:
    await refused(node, request(node, "POST", C1 + "/messages", json=body), 400, "invalid_request")
    if body is not None:
        wrapped = {"conversation_id": "c1", "message": body}
        await refused(node, request(node, "POST", CREATE, json=wrapped), 400, "invalid_request")


@pytest.mark.parametrize(("body", "field"), BAD_ANSWERS)
async def test_malformed_answers(node: Node, body: Any, field: str) -> None:
    document = await refused(node, request(node, "POST", C1 + "/answer", json=body), 400, "invalid_request")
    assert field in {each["field"] for each in document["errors"]}


async def test_an_answer_to_nothing(node: Node) -> None:
    for ask_id in ("t1.1", "other"):
        sent = request(node, "POST", C1 + "/answer", json={"ask_id": ask_id, "data": 1})
        await refused(node, sent, 409, "ask_closed")


async def test_a_message_without_a_body(node: Node) -> None:
    document = await refused(node, request(node, "POST", C1 + "/messages"), 400, "invalid_request")
    assert document["detail"] == "body: field required"


@pytest.mark.parametrize(
    ("method", "path", "body", "field"),
    [
        ("POST", CREATE, [], "body"),
        ("POST", CREATE, {"conversation_id": 1}, "conversation_id"),
        ("POST", CREATE, {"user_id": []}, "user_id"),
        ("POST", CREATE, {"metadata": []}, "metadata"),
        ("POST", CREATE, {"metadata": "x"}, "metadata"),
        ("POST", CREATE, {"message": []}, "message"),
        ("POST", CREATE, {"colour": 1}, "colour"),
        ("PATCH", C1, {}, "metadata"),
        ("PATCH", C1, {"metadata": None}, "metadata"),
        ("PATCH", C1, {"metadata": [1]}, "metadata"),
        ("PATCH", C1, {"metadata": {}, "status": "stopped"}, "status"),
        ("POST", C1 + "/stop", {"reason": "x"}, "reason"),
        ("POST", C1 + "/stop", [1], "body"),
        ("POST", C1 + "/resume", {"x": 1}, "x"),
        ("POST", C1 + "/rpc/double", {"timeout": 0}, "timeout"),
        ("POST", C1 + "/rpc/double", {"timeout": -1}, "timeout"),
        ("POST", C1 + "/rpc/double", {"timeout": 301}, "timeout"),
        ("POST", C1 + "/rpc/double", {"timeout": "1"}, "timeout"),
        ("POST", C1 + "/rpc/double", {"timeout": True}, "timeout"),
        ("POST", C1 + "/rpc/double", {"args": []}, "args"),
    ],
)
async def test_the_field_is_named(node: Node, method: str, path: str, body: Any, field: str) -> None:
    document = await refused(node, request(node, method, path, json=body), 400, "invalid_request")
    assert field in {each["field"] for each in document["errors"]}
    assert field in document["detail"]


@pytest.mark.parametrize("method_name", ["a b", "x" * 129, "%00"])
async def test_malformed_method_names(node: Node, method_name: str) -> None:
    await refused(node, request(node, "POST", f"{C1}/rpc/{method_name}", json={}), 400, "invalid_id")


# --- queries --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "parameters", "code"),
    [
        (CREATE, {"limit": 0}, "invalid_request"),
        (CREATE, {"limit": 1001}, "invalid_request"),
        (CREATE, {"limit": "many"}, "invalid_request"),
        (CREATE, {"status": "asleep"}, "invalid_request"),
        (CREATE, {"scope": "world"}, "invalid_request"),
        (CREATE, {"node": "n1"}, "invalid_request"),
        (CREATE, {"cursor": "x"}, "invalid_request"),
        (CREATE, {"cursor": "1"}, "invalid_id"),
        (CREATE, {"cursor": "1.a b"}, "invalid_id"),
        (CREATE, {"cursor": "-1.c1"}, "invalid_request"),
        (CREATE, {"cursor": "9" * 20 + ".c1"}, "invalid_request"),
        (CREATE, {"user_id": "a b"}, "invalid_id"),
        (C1 + "/events", {"limit": 0}, "invalid_request"),
        (C1 + "/events", {"limit": 1001}, "invalid_request"),
        (C1 + "/events", {"after": "x"}, "invalid_cursor"),
        (C1 + "/events", {"after": "-1"}, "invalid_cursor"),
        (C1 + "/events", {"after": "1" * 16}, "invalid_cursor"),
        (C1 + "/events", {"after": "g.1"}, "invalid_cursor"),
        (C1 + "/events", {"before": 0}, "invalid_request"),
        (C1 + "/events", {"before": "g.1.2"}, "invalid_request"),
        (C1 + "/stream", {"after": "x"}, "invalid_cursor"),
        (C1 + "/stream", {"tail": -1}, "invalid_request"),
        (C1 + "/stream", {"tail": "x"}, "invalid_request"),
    ],
)
async def test_malformed_queries(node: Node, path: str, parameters: dict[str, Any], code: str) -> None:
    await refused(node, request(node, "GET", path, params=parameters), 400, code)


async def test_a_malformed_last_event_id(node: Node) -> None:
    sent = request(node, "GET", C1 + "/stream", headers={"Last-Event-ID": "x y"})
    await refused(node, sent, 400, "invalid_cursor")


# --- sizes ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("POST", C1 + "/messages", {"data": BIG}),
        ("POST", C1 + "/answer", {"ask_id": "t1.1", "data": BIG}),
        ("POST", CREATE, {"conversation_id": "c1", "message": {"data": BIG}}),
        ("POST", CREATE, {"conversation_id": "big", "metadata": {"a": BIG}}),
        ("PATCH", C1, {"metadata": {"a": BIG}}),
        ("POST", C1 + "/rpc/double", {"params": BIG}),
    ],
)
@pytest.mark.parametrize("text", [BIG, HUGE], ids=["payload", "body"])
async def test_oversized(node: Node, method: str, path: str, body: Any, text: str) -> None:
    content = json.dumps(body).replace(BIG, text)
    sent = request(node, method, path, content=content, headers=JSON)
    await refused(node, sent, 413, "payload_too_large")


async def test_a_body_without_a_length_is_cut_off_as_it_arrives(node: Node) -> None:
    pieces = 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal pieces
        yield b'{"data":"'
        while True:
            pieces += 1
            assert pieces < 100, "it goes on reading"
            yield b"x" * 16_384

    sent = request(node, "POST", C1 + "/messages", content=endless(), headers=JSON)
    await refused(node, sent, 413, "payload_too_large")


async def test_nothing_of_all_this_was_accepted(node: Node) -> None:
    events = (await node.http.get(f"{C1}/events", params={"limit": 1000})).json()["events"]
    assert [event["kind"] for event in events if event["kind"] == "input"] == []
    assert (await node.http.get(C1)).json()["metadata"] == {}
    listed = (await node.http.get(CREATE, params={"limit": 1000})).json()["conversations"]
    assert [each["conversation_id"] for each in listed] == ["c1"]
    assert (await node.http.get("/api/nodes")).json()["nodes"][0]["conversations"] == 1
