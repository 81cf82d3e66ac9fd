"""The HTTP API as it is meant to be used."""

from __future__ import annotations

import re
from typing import Any

import httpx
import pytest

from tests.gateway.support import MAX_PAYLOAD, Node, running
from tests.support.waiting import wait_until

JSON = {"Content-Type": "application/json"}


async def create(node: Node, cid: str = "c1", **body: Any) -> httpx.Response:
    return await node.http.post("/api/conversations", json={"conversation_id": cid} | body)


async def say(node: Node, data: Any, cid: str = "c1", **body: Any) -> httpx.Response:
    return await node.http.post(f"/api/conversations/{cid}/messages", json={"data": data} | body)


async def answered(node: Node, cid: str = "c1") -> dict[str, Any]:
    """The conversation, when nothing is left to be answered."""

    async def idle() -> dict[str, Any]:
        shown = (await node.http.get(f"/api/conversations/{cid}")).json()
        return {} if shown["busy"] or shown["status"] == "starting" else shown

    return await wait_until(idle, f"{cid} has answered everything")


# --- create ---------------------------------------------------------------------------------------------------


async def test_create_and_find(node: Node) -> None:
    made = await create(node, user_id="alice", metadata={"title": "Ä"})
    assert made.status_code == 201
    body = made.json()
    assert body == {
        "conversation_id": "c1",
        "user_id": "alice",
        "status": "idle",
        "node": "n1",
        "epoch": body["epoch"],
    }
    assert body["epoch"] > 0
    again = await create(node, user_id="alice", metadata={"title": "other"})
    assert (again.status_code, again.json()) == (200, body)
    assert (await node.http.get("/api/conversations/c1")).json()["metadata"] == {"title": "Ä"}


async def test_create_without_a_body_makes_a_fresh_id(node: Node) -> None:
    one, other = await node.http.post("/api/conversations"), await node.http.post("/api/conversations", json={})
    assert (one.status_code, other.status_code) == (201, 201)
    assert one.json()["conversation_id"] != other.json()["conversation_id"]


async def test_create_with_a_message(node: Node) -> None:
    message = {"message_id": "m1", "data": {"text": "hi"}}
    made = await create(node, message=message)
    assert made.status_code == 201
    assert made.json()["message"] == {
        "status": "accepted",
        "message_id": "m1",
        "position": 1,
        "duplicate": False,
    }
    again = await create(node, message=message)
    assert again.status_code == 200
    assert again.json()["message"] == made.json()["message"] | {"duplicate": True}


async def test_null_is_a_message_too(node: Node) -> None:
    assert (await create(node, message={"data": None})).json()["message"]["position"] == 1


async def test_a_stopped_conversation_is_found_but_takes_no_message(node: Node) -> None:
    await create(node)
    await node.http.post("/api/conversations/c1/stop")
    found = await create(node)
    assert (found.status_code, found.json()["status"]) == (200, "stopped")
    refused = await create(node, message={"data": 1})
    assert (refused.status_code, refused.json()["code"]) == (409, "conversation_stopped")


async def test_the_limit_names_what_runs() -> None:
    async with running(settings={"max_concurrent_conversations": 3, "limit_policy": "reject"}) as node:
        for number in range(3):
            assert (await create(node, f"c{number}", user_id="alice")).status_code == 201
        refused = await create(node, "c3", user_id="alice")
        assert refused.status_code == 429
        body = refused.json()
        assert (body["code"], body["limit"], body["current"]) == ("limit_exceeded", 3, 3)
        assert sorted(body["running"]) == ["c0", "c1", "c2"]
        assert (await node.http.get("/api/conversations/c3")).status_code == 404
        assert (await create(node, "c3", user_id="bob")).status_code == 201


# --- messages -------------------------------------------------------------------------------------------------


async def test_send_and_repeat(node: Node) -> None:
    await create(node)
    first = await say(node, {"text": "hi"}, message_id="m1")
    assert (first.status_code, first.json()) == (
        202,
        {"status": "accepted", "message_id": "m1", "position": 1, "duplicate": False},
    )
    again = await say(node, {"text": "hi"}, message_id="m1")
    assert (again.status_code, again.json()) == (202, first.json() | {"duplicate": True})
    unnamed = (await say(node, "x")).json()
    assert unnamed["position"] == 2
    assert re.fullmatch(r"[A-Za-z0-9._~:@-]{1,128}", unnamed["message_id"])
    assert node.metric("convener_messages_total", result="accepted") == 2
    assert node.metric("convener_messages_total", result="duplicate") == 1


@pytest.mark.parametrize("data", [None, 0, "", [], {}, {"text": 1}, [[[1.5]]], "Ä\u2028😀\u0000", 10**30])
async def test_data_is_any_json_value(node: Node, data: Any) -> None:
    await create(node)
    assert (await say(node, data)).status_code == 202
    await answered(node)
    events = (await node.http.get("/api/conversations/c1/events")).json()["events"]
    assert [event["data"] for event in events if event["kind"] == "reply"] == [data]


async def test_overlap_reject_and_a_full_inbox() -> None:
    async with running(settings={"max_pending_messages": 2}) as node:
        await create(node)
        await say(node, {"text": "/wait"})
        busy = await say(node, "x", overlap="reject")
        assert (busy.status_code, busy.json()["code"]) == (409, "conversation_busy")
        assert (await say(node, "x")).status_code == 202
        full = await say(node, "x")
        assert (full.status_code, full.json()["code"]) == (429, "inbox_full")
        assert node.metric("convener_messages_total", result="inbox_full") == 1
        assert node.metric("convener_messages_total", result="conversation_busy") == 1
        node.agent.go.set()
        await answered(node)


async def test_overlap_interrupt_ends_what_is_being_answered(node: Node) -> None:
    await create(node)
    await say(node, {"text": "/wait"})
    await say(node, "queued")
    assert (await say(node, "now", overlap="interrupt")).status_code == 202
    await answered(node)
    events = (await node.http.get("/api/conversations/c1/events")).json()["events"]
    ends = [(event["turn"], event["kind"]) for event in events if event["kind"] in ("turn_interrupted", "turn_done")]
    assert ends == [("t1", "turn_interrupted"), ("t2", "turn_interrupted"), ("t3", "turn_done")]
    assert [event["data"] for event in events if event["kind"] == "reply"] == ["now"]


@pytest.mark.parametrize("policy", ["enqueue", "reject", "interrupt"])
async def test_a_message_without_overlap_goes_by_the_nodes_policy(policy: str) -> None:
    async with running(settings={"overlap_policy": policy}) as node:
        await create(node)
        await say(node, {"text": "/wait"})
        assert (await say(node, "x")).status_code == (409 if policy == "reject" else 202)
        assert (await say(node, "x", overlap="enqueue")).status_code == 202
        node.agent.go.set()
        await answered(node)
        events = (await node.http.get("/api/conversations/c1/events")).json()["events"]
        assert any(event["kind"] == "turn_interrupted" for event in events) == (policy == "interrupt")


async def test_a_payload_of_just_the_allowed_size(node: Node) -> None:
    await create(node)
    assert (await say(node, "x" * (MAX_PAYLOAD - 2))).status_code == 202
    # Written as escapes it is three times as long on the wire, and just as long for us.
    body = '{"data":"' + "\\u00e9" * ((MAX_PAYLOAD - 2) // 2) + '"}'
    sent = await node.http.post(
        "/api/conversations/c1/messages", content=body, headers={"Content-Type": "application/json"}
    )
    assert sent.status_code == 202


# --- show, change, stop, resume, delete -----------------------------------------------------------------------


async def test_show(node: Node) -> None:
    await create(node, user_id="alice", metadata={"a": 1})
    await say(node, "hi")
    shown = await answered(node)
    assert shown == {
        "conversation_id": "c1",
        "user_id": "alice",
        "status": "idle",
        "busy": False,
        "node": "n1",
        "epoch": shown["epoch"],
        "last_seq": 5,
        "connections": 0,
        "metadata": {"a": 1},
        "created_at": shown["created_at"],
        "updated_at": shown["updated_at"],
    }
    for field in ("created_at", "updated_at"):
        assert re.fullmatch(r"20\d\d-\d\d-\d\dT\d\d:\d\d:\d\d\.\d\d\dZ", shown[field])
    assert shown["created_at"] <= shown["updated_at"]


async def test_patch_replaces_the_metadata(node: Node) -> None:
    await create(node, metadata={"a": 1})
    changed = await node.http.patch("/api/conversations/c1", json={"metadata": {"b": [2]}})
    assert (changed.status_code, changed.json()["metadata"]) == (200, {"b": [2]})
    assert (await node.http.get("/api/conversations/c1")).json()["metadata"] == {"b": [2]}


async def test_stop_and_resume(node: Node) -> None:
    await create(node)
    outcomes = [
        (await node.http.post(f"/api/conversations/c1/{action}", content=body, headers=JSON)).json()
        for action, body in (("stop", ""), ("stop", "{}"), ("resume", "{}"), ("resume", ""))
    ]
    assert outcomes == [
        {"outcome": "stopped"},
        {"outcome": "already_stopped"},
        {"outcome": "resumed"},
        {"outcome": "running"},
    ]
    assert (await say(node, "again")).status_code == 202


async def test_delete_leaves_nothing(node: Node) -> None:
    await create(node, user_id="alice")
    await say(node, "hi")
    gone = await node.http.delete("/api/conversations/c1")
    assert (gone.status_code, gone.content) == (204, b"")
    for path in ("", "/events", "/stream"):
        assert (await node.http.get(f"/api/conversations/c1{path}")).status_code == 404
    listed = await node.http.get("/api/conversations", params={"user_id": "alice"})
    assert listed.json() == {"conversations": [], "next": None}
    assert (await create(node, user_id="bob")).status_code == 201


# --- lists ----------------------------------------------------------------------------------------------------


async def listed(at: Node, **parameters: Any) -> tuple[list[str], str | None]:
    answer = await at.http.get("/api/conversations", params=parameters)
    assert answer.status_code == 200, answer.text
    body = answer.json()
    return [each["conversation_id"] for each in body["conversations"]], body["next"]


async def test_the_list_is_the_users_own_newest_first_and_whole(node: Node) -> None:
    for number in range(5):
        await create(node, f"c{number}", user_id="alice")
    await create(node, "other", user_id="bob")
    await node.http.post("/api/conversations/c4/stop")
    whole, following = await listed(node, user_id="alice")
    assert sorted(whole) == ["c0", "c1", "c2", "c3", "c4"]
    assert following is None
    paged: list[str] = []
    cursor: dict[str, str] = {}
    while True:
        page, following = await listed(node, user_id="alice", limit=2, **cursor)
        assert len(page) <= 2
        paged += page
        if following is None:
            break
        cursor = {"cursor": following}
    assert paged == whole
    assert await listed(node, user_id="alice", status="stopped") == (["c4"], None)
    assert await listed(node, user_id="carol") == ([], None)


async def test_the_filter_by_status_fills_pages(node: Node) -> None:
    for number in range(6):
        await create(node, f"c{number}")
        if number % 2:
            await node.http.post(f"/api/conversations/c{number}/stop")
    first, following = await listed(node, status="stopped", limit=2)
    assert following is not None
    rest, following = await listed(node, status="stopped", limit=2, cursor=following)
    assert sorted(first + rest) == ["c1", "c3", "c5"]


async def test_the_cluster_lists_what_is_loaded(node: Node) -> None:
    for number in range(3):
        await create(node, f"c{number}", user_id="alice")
    await create(node, "d0", user_id="bob")

    async def all_four() -> bool:
        return await listed(node, scope="cluster") == (["c0", "c1", "c2", "d0"], None)

    await wait_until(all_four, "the directory has all four")
    assert await listed(node, scope="cluster", user_id="bob") == (["d0"], None)
    assert await listed(node, scope="cluster", node="n1", limit=2) == (["c0", "c1"], "c1")
    assert await listed(node, scope="cluster", limit=2, cursor="c1") == (["c2", "d0"], None)
    assert await listed(node, scope="cluster", node="n2") == ([], None)
    assert await listed(node, scope="cluster", status="draining") == ([], None)
    row = (await node.http.get("/api/conversations", params={"scope": "cluster"})).json()["conversations"][0]
    assert (row["user_id"], row["node"], row["created_at"]) == ("alice", "n1", None)


# --- the log --------------------------------------------------------------------------------------------------


async def log(node: Node, **parameters: Any) -> dict[str, Any]:
    answer = await node.http.get("/api/conversations/c1/events", params=parameters)
    assert answer.status_code == 200, answer.text
    return answer.json()


def seqs(page: dict[str, Any]) -> list[int]:
    return [event["seq"] for event in page["events"]]


async def with_log(node: Node) -> int:
    """A conversation with a log; returns its last seq."""
    await create(node)
    for text in ("one", "two", "three"):
        await say(node, text)
    return (await answered(node))["last_seq"]


async def test_the_log_in_pages(node: Node) -> None:
    last = await with_log(node)
    whole = await log(node)
    assert seqs(whole) == list(range(1, last + 1))
    assert set(whole["events"][0]) == {"seq", "cursor", "epoch", "kind", "turn", "data", "ts"}
    assert not whole["resync"]
    paged: list[Any] = []
    page = await log(node, limit=4)
    while page["events"]:
        paged += page["events"]
        page = await log(node, limit=4, after=page["next"])
    assert paged == whole["events"]
    # At the end the cursor stays where it is, ready for what comes.
    assert page["next"] == whole["next"] == whole["events"][-1]["cursor"]


async def test_reading_on_from_cursor_and_from_number(node: Node) -> None:
    last = await with_log(node)
    whole = await log(node)
    for event in whole["events"]:
        expected = list(range(event["seq"] + 1, last + 1))
        assert seqs(await log(node, after=event["cursor"])) == expected
        assert seqs(await log(node, after=event["seq"])) == expected
    assert seqs(await log(node, after=0)) == seqs(whole)
    beyond = await log(node, after=last + 100)
    assert (beyond["events"], beyond["next"]) == ([], whole["next"])


async def test_reading_backwards(node: Node) -> None:
    last = await with_log(node)
    page = await log(node, before=last + 1, limit=4)
    assert seqs(page) == list(range(last - 3, last + 1))
    found = page["events"]
    while page["next"] is not None:
        page = await log(node, before=page["next"], limit=4)
        found = page["events"] + found
    assert [event["seq"] for event in found] == list(range(1, last + 1))
    assert seqs(await log(node, before=10**14, limit=2)) == [last - 1, last]
    assert await log(node, before=1) == {"events": [], "next": None, "resync": False}
    assert seqs(await log(node, before=4)) == [1, 2, 3]


async def test_reading_between(node: Node) -> None:
    await with_log(node)
    assert seqs(await log(node, after=2, before=6)) == [3, 4, 5]
    assert await log(node, after=4, before=5) == {"events": [], "next": "4", "resync": False}


async def test_a_cursor_of_another_log_is_noticed(node: Node) -> None:
    last = await with_log(node)
    page = await log(node, after="othergeneration.1.3")
    assert page["resync"]
    assert seqs(page) == list(range(1, last + 1))


async def test_a_conversation_that_waits_for_its_slot_has_an_empty_log() -> None:
    async with running(settings={"max_concurrent_conversations": 1, "limit_policy": "queue"}) as node:
        await create(node, "c0", user_id="alice")
        await create(node, "c1", user_id="alice")
        empty = await log(node)
        assert (empty["events"], empty["resync"]) == ([], False)
        # Its cursor is good for what will come.
        assert (await log(node, after=empty["next"])) == empty
        assert await log(node, after="othergeneration.1.1") == empty | {"resync": True}
        assert await log(node, before=5) == empty | {"next": None}
        await node.http.post("/api/conversations/c0/stop")

        async def begun() -> list[Any]:
            return (await log(node, after=empty["next"]))["events"]

        (opened,) = await wait_until(begun, "c1 has got the slot")
        assert (opened["seq"], opened["kind"]) == (1, "open")


# --- calls ----------------------------------------------------------------------------------------------------


async def call(node: Node, method: str, **body: Any) -> httpx.Response:
    return await node.http.post(f"/api/conversations/c1/rpc/{method}", json=body)


async def test_calls(node: Node) -> None:
    await create(node)
    assert (await call(node, "double", params=[1])).json() == {"result": [1, 1]}
    assert (await call(node, "double", params=2, timeout=1)).json() == {"result": 4}
    crashed = await call(node, "crash")
    assert (crashed.status_code, crashed.json()["code"]) == (502, "remote_error")
    assert "asked to crash" in crashed.json()["detail"]
    unknown = await call(node, "nope")
    assert (unknown.status_code, unknown.json()["code"]) == (404, "method_not_found")
    late = await call(node, "wait", timeout=0.05)
    assert (late.status_code, late.json()["code"]) == (504, "call_timeout")


# --- operators ------------------------------------------------------------------------------------------------


async def test_health(node: Node) -> None:
    for path in ("/livez", "/healthz"):
        assert (await node.http.get(path)).json() == {"status": "alive"}
    assert (await node.http.get("/readyz")).json() == {"status": "ready"}
    verbose = (await node.http.get("/readyz?verbose")).json()
    assert verbose["status"] == "ready"
    assert set(verbose["checks"].values()) == {"ok"}


async def test_metrics(node: Node) -> None:
    answer = await node.http.get("/metrics")
    assert answer.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    assert "convener_node_ready 1.0" in answer.text


async def test_nodes(node: Node) -> None:
    await create(node)
    (only,) = (await node.http.get("/api/nodes")).json()["nodes"]
    assert (only["name"], only["state"], only["conversations"]) == ("n1", "live", 1)


async def test_audit(node: Node) -> None:
    await with_log(node)
    await create(node, "c2")
    everything = (await node.http.get("/api/audit")).json()
    assert (everything["violations"], everything["conversations"]) == ([], 2)
    assert everything["checked"] > 0
    some = await node.http.get("/api/audit", params={"conversation_id": ["c1"]})
    assert some.json()["conversations"] == 1
