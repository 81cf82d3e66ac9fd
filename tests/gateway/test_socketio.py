"""Socket.IO as stock clients use it."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from websockets.exceptions import ConnectionClosed

from convener.gateway import socketio as doors
from tests.gateway.sockets import ALICE, Raw, connected, forgotten, raw, refusal
from tests.gateway.support import MAX_PAYLOAD, Node, serving
from tests.gateway.test_http import answered, create, say
from tests.support.waiting import wait_until

# --- coming ---------------------------------------------------------------------------------------------------


async def test_joining_creates_the_conversation_and_replays_it(served: Node) -> None:
    async with connected(served.url, ALICE) as client:
        (joined,) = await client.until("joined")
        assert [name for name, _ in client.heard] == ["event", "joined"]
        (opened,) = client.of("event")
        assert (opened["seq"], opened["kind"]) == (1, "open")
        assert joined == {
            "conversation_id": "c1",
            "status": "idle",
            "busy": False,
            "last_seq": 1,
            "cursor": opened["cursor"],
            "node": "n1",
        }
        shown = (await served.http.get("/api/conversations/c1")).json()
        assert (shown["user_id"], shown["connections"]) == ("alice", 1)
        assert served.metric("convener_connections", transport="websocket") == 1
    await forgotten(served)
    assert (await served.http.get("/api/conversations/c1")).json()["connections"] == 0


async def test_messages_are_acknowledged_and_seen_by_everybody_in_one_order(served: Node) -> None:
    async with connected(served.url, ALICE) as one, connected(served.url, ALICE) as other:
        answer = await one.call("message", {"message_id": "m1", "data": {"text": "hi"}})
        assert answer == {"status": "accepted", "message_id": "m1", "position": 1, "duplicate": False}
        again = await other.call("message", {"message_id": "m1", "data": {"text": "hi"}})
        assert again == answer | {"duplicate": True}
        assert (await other.call("message", {"data": None, "overlap": "enqueue"}))["position"] == 2
        log = await one.answered(2)
        assert await other.answered(2) == log
        assert [entry["seq"] for entry in log] == list(range(1, len(log) + 1))
        assert [entry["data"]["user_id"] for entry in log if entry["kind"] == "input"] == ["alice", "alice"]
        assert (await served.http.get("/api/conversations/c1/events")).json()["events"] == log


async def test_many_messages_at_once_keep_their_order(served: Node) -> None:
    async with connected(served.url, ALICE) as client:
        answers = await asyncio.gather(*(client.call("message", {"message_id": f"m{n}", "data": n}) for n in range(60)))
        assert [answer["position"] for answer in answers] == list(range(1, 61))
        log = await client.answered(60)
        assert [entry["data"] for entry in log if entry["kind"] == "reply"] == list(range(60))


async def test_resuming(served: Node) -> None:
    async with connected(served.url, ALICE) as client:
        await client.call("message", {"data": "one"})
        log = await client.answered()
    for number, entry in enumerate(log, start=1):
        for after in (entry["cursor"], entry["seq"], str(entry["seq"])):
            # What the client remembers goes before the tail that it was opened with.
            async with connected(served.url, ALICE | {"after": after, "tail": 1}) as client:
                await client.until("joined")
                assert client.of("event") == log[number:]
    for tail in (2, "2"):
        async with connected(served.url, ALICE | {"tail": tail}) as client:
            await client.until("joined")
            assert client.of("event") == log[-2:]
    async with connected(served.url, ALICE | {"after": "other.1.1"}) as client:
        await client.until("joined")
        assert [name for name, _ in client.heard] == ["resync", *["event"] * len(log), "joined"]
    await forgotten(served)


async def test_the_query_string_will_do(served: Node) -> None:
    query = "conversation_id=c1&user_id=alice"
    async with connected(served.url, None, query) as client:
        await client.call("message", {"data": "one"})
        log = await client.answered()
    async with connected(served.url, None, f"{query}&after={log[1]['cursor']}") as client:
        await client.until("joined")
        assert client.of("event") == log[2:]
    async with connected(served.url, None, f"{query}&after=&tail=1") as client:
        await client.until("joined")
        assert client.of("event") == log[-1:]
    # What the auth object says goes first; null says nothing.
    async with connected(served.url, {"tail": 0, "after": None}, f"{query}&tail=2") as client:
        await client.until("joined")
        assert client.of("event") == []


async def test_nothing_comes_before_the_answer_to_connect(served: Node) -> None:
    await create(served, user_id="alice")
    await say(served, "hi")
    await answered(served)
    for _ in range(20):
        async with raw(served.url) as socket:
            first = await socket.join(ALICE)
            assert first.startswith('40{"sid":'), first
            assert (await socket.receive()).startswith('42["event",{"seq":1,')


# --- refusals -------------------------------------------------------------------------------------------------


EMPTY: dict[str, Any] = {}
BAD_HELLOS: tuple[tuple[Any, str, str, str], ...] = (
    (None, "", "user_required", "conversation_id"),
    ({}, "", "user_required", "conversation_id"),
    ({"conversation_id": None}, "", "user_required", "conversation_id"),
    ({"user_id": ""}, "", "invalid_id", "user_id"),
    ({"user_id": "alice", "after": 3}, "", "invalid_request", "conversation_id is missing"),
    ({"user_id": "alice", "tail": 0}, "", "invalid_request", "conversation_id is missing"),
    ({"conversation_id": ""}, "", "invalid_id", "conversation_id"),
    ({"conversation_id": 7}, "", "invalid_request", "conversation_id"),
    ({"conversation_id": ["c1"]}, "", "invalid_request", "conversation_id"),
    ({"conversation_id": "a b"}, "", "invalid_id", "conversation_id"),
    ({"conversation_id": "x" * 129}, "", "invalid_id", "conversation_id"),
    (ALICE | {"user_id": 7}, "", "invalid_request", "user_id"),
    (ALICE | {"user_id": "a b"}, "", "invalid_id", "user_id"),
    (ALICE | {"token": EMPTY}, "", "invalid_request", "token"),
    (ALICE | {"after": "x y"}, "", "invalid_cursor", "after"),
    (ALICE | {"after": -1}, "", "invalid_cursor", "after"),
    (ALICE | {"after": True}, "", "invalid_cursor", "after"),
    (ALICE | {"after": EMPTY}, "", "invalid_cursor", "after"),
    (ALICE | {"tail": -1}, "", "invalid_request", "tail"),
    (ALICE | {"tail": "x"}, "", "invalid_request", "tail"),
    (ALICE | {"tail": True}, "", "invalid_request", "tail"),
    (ALICE | {"tail": 1.5}, "", "invalid_request", "tail"),
    ("c1", "", "invalid_request", "object"),
    (["c1"], "", "invalid_request", "object"),
    (7, "", "user_required", "conversation_id"),
    (None, "conversation_id=c1&token=t", "invalid_request", "token"),
    (None, "conversation_id=a%20b", "invalid_id", "conversation_id"),
)


@pytest.mark.parametrize(("auth", "query", "code", "word"), BAD_HELLOS)
async def test_a_connection_that_cannot_be(served: Node, auth: Any, query: str, code: str, word: str) -> None:
    told = await refusal(served.url, auth, query)
    assert word in told["message"]
    assert told["data"] == {"code": code, "detail": told["message"]}
    assert served.metric("convener_malformed_total", where="socket") == 1
    assert await served.is_ready()
    assert (await served.http.get("/api/conversations")).json()["conversations"] == []
    await forgotten(served)


async def test_the_limit_refuses_connections_too() -> None:
    async with serving(settings={"max_concurrent_conversations": 1, "limit_policy": "reject"}) as node:
        async with connected(node.url, ALICE):
            told = await refusal(node.url, {"conversation_id": "c2", "user_id": "alice"})
            data = told["data"]
            assert (data["code"], data["limit"], data["running"]) == ("limit_exceeded", 1, ["c1"])
        await forgotten(node)


async def test_tokens() -> None:
    settings = {"auth": "token", "auth_tokens": {"ta": "alice", "tb": "bob"}, "service_tokens": ("ts",)}
    async with serving(settings=settings) as node:
        for auth in ({"conversation_id": "c1"}, {"conversation_id": "c1", "token": "wrong"}):
            assert (await refusal(node.url, auth))["data"]["code"] == "not_authenticated"
        async with connected(node.url, {"conversation_id": "c1", "token": "ta"}) as client:
            await client.call("message", {"data": "hi"})
            (said,) = [entry for entry in await client.answered() if entry["kind"] == "input"]
            assert said["data"]["user_id"] == "alice"
        told = await refusal(node.url, {"conversation_id": "c1", "token": "tb"})
        assert told["data"] == {"code": "not_found", "detail": "conversation c1 does not exist"}
        told = await refusal(node.url, {"conversation_id": "c2", "token": "tb", "user_id": "alice"})
        assert told["data"]["code"] == "not_authorized"
        # Programs may send the header instead.
        async with connected(node.url, {"conversation_id": "c1"}, headers={"Authorization": "Bearer ta"}) as client:
            await client.until("joined")
        async with connected(node.url, {"conversation_id": "c3", "token": "ts", "user_id": "carol"}) as client:
            await client.until("joined")
        listed = await node.http.get(
            "/api/conversations", params={"user_id": "carol"}, headers={"Authorization": "Bearer ts"}
        )
        assert [each["conversation_id"] for each in listed.json()["conversations"]] == ["c3"]
        await forgotten(node)


async def test_a_manager_that_fails_is_answered(served: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    async def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("secret")

    monkeypatch.setattr(served.manager, "join_conversation", fail)
    told = await refusal(served.url, ALICE)
    assert told["data"]["code"] == "internal"
    assert "secret" not in json.dumps(told)
    await forgotten(served)


async def test_a_start_that_hangs_has_a_deadline(served: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    async def hang(*_: Any, **__: Any) -> None:
        await asyncio.Event().wait()

    monkeypatch.setattr(doors, "CONNECT_TIMEOUT", 0.05)
    monkeypatch.setattr(served.manager, "join_conversation", hang)
    assert (await refusal(served.url, ALICE))["data"]["code"] == "owner_unavailable"
    await forgotten(served)


async def test_a_node_that_shuts_down_takes_nobody(served: Node) -> None:
    await served.gateway.begin_shutdown()
    # Not by a refusal of Socket.IO, after which a stock client would not try again.
    with pytest.raises(Exception, match="rejected"):
        async with raw(served.url):
            pass


async def until_closed(socket: Raw) -> None:
    while True:
        await socket.receive()


async def test_a_node_that_leaves_sends_its_clients_away_so_that_they_come_back(served: Node) -> None:
    reasons: list[str] = []
    async with raw(served.url) as socket, connected(served.url, ALICE) as client:
        client.io.on("disconnect", reasons.append)
        assert (await socket.join({**ALICE, "conversation_id": "c2"})).startswith("40")
        assert (await client.call("message", {"data": {"text": "/wait"}}))["status"] == "accepted"
        await client.until("joined")
        draining = asyncio.create_task(served.gateway.drain())
        await wait_until(lambda: served.gateway.context.closing, "the node is closing")
        assert not await served.is_ready()
        assert client.io.connected, "while its turn runs, a client stays"
        served.agent.go.set()
        await client.until("goaway")
        await draining
        await client.is_cut_off()
        await wait_until(lambda: reasons, "the client was told why")
        assert reasons == ["transport error"], "as if the connection were lost: a stock client reconnects"
        assert [e["kind"] for e in client.of("event")][-2:] == ["reply", "turn_done"], "nothing is missing"
        with pytest.raises(ConnectionClosed) as closed:
            await until_closed(socket)
        assert closed.value.rcvd is not None
        assert closed.value.rcvd.code == 1012
    await forgotten(served)


async def test_pages_of_other_sites_are_refused() -> None:
    async with serving(settings={"cors_origins": ("https://chat.example",)}) as node:
        for origin in ("https://chat.example", node.url):
            async with raw(node.url, origin) as socket:
                assert (await socket.join(ALICE)).startswith("40")
        with pytest.raises(Exception, match="rejected"):
            async with raw(node.url, "https://evil.example"):
                pass


# --- events ---------------------------------------------------------------------------------------------------


async def test_stop_and_resume(served: Node) -> None:
    async with connected(served.url, ALICE) as client, connected(served.url, ALICE) as other:
        await client.until("joined")
        assert await client.call("stop", {}) == {"outcome": "stopped"}
        for each in (client, other):
            assert await each.is_cut_off()
            assert each.of("stopped") == [{"conversation_id": "c1", "reason": "stopped by the user"}]
    async with connected(served.url, ALICE) as client:
        assert (await client.until("joined"))[0]["status"] == "stopped"
        refused = await client.call("message", {"data": 1})
        assert (refused["status"], refused["code"]) == ("rejected", "conversation_stopped")
        assert await client.call("resume") == {"outcome": "resumed"}
        assert (await client.call("message", {"data": 1}))["status"] == "accepted"
        await client.answered()
        assert await client.call("resume", {}) == {"outcome": "running"}
    assert served.metric("convener_messages_total", result="conversation_stopped") == 1
    await forgotten(served)


async def test_calls(served: Node) -> None:
    async with connected(served.url, ALICE) as client:
        assert await client.call("rpc", {"method": "double", "params": [1]}) == {"result": [1, 1]}
        assert (await client.call("rpc", {"method": "crash"}))["error"]["code"] == "remote_error"
        assert (await client.call("rpc", {"method": "nope"}))["error"]["code"] == "method_not_found"
        late = await client.call("rpc", {"method": "wait", "timeout": 0.05})
        assert late["error"]["code"] == "call_timeout"
        # A call that takes its time holds nothing else up.
        slow = asyncio.create_task(client.call("rpc", {"method": "wait"}))
        assert (await client.call("message", {"data": 1}))["status"] == "accepted"
        served.agent.go.set()
        assert await slow == {"result": "waited"}


async def test_too_much_at_once_is_refused_and_nothing_lost(served: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doors, "MAX_UNDER_WAY", 4)
    async with connected(served.url, ALICE) as client:
        calls = [asyncio.create_task(client.call("rpc", {"method": "wait"})) for _ in range(6)]
        await wait_until(lambda: sum(task.done() for task in calls) == 2, "two calls were refused")
        for task in calls:
            if task.done():
                assert (await task)["error"]["code"] == "too_many_requests"
        refused = await client.call("message", {"data": 1})
        assert (refused["code"], refused["retry_after"]) == ("too_many_requests", 1.0)
        served.agent.go.set()
        assert sum("result" in answer for answer in await asyncio.gather(*calls)) == 4
        assert (await client.call("message", {"data": 1}))["status"] == "accepted"


NO_OBJECT: tuple[tuple[Any, ...], ...] = (
    (),
    (None,),
    ("text",),
    (7,),
    ([],),
    ([{"data": 1}],),
    ({"data": 1}, {"data": 2}),
    (True,),
)
BAD_PAYLOADS: tuple[tuple[str, tuple[Any, ...], str], ...] = (
    *((event, arguments, "invalid_request") for event in ("message", "rpc") for arguments in NO_OBJECT),
    ("message", ({},), "invalid_request"),
    ("message", ({"message_id": "m"},), "invalid_request"),
    ("message", ({"data": 1, "message_id": 7},), "invalid_request"),
    ("message", ({"data": 1, "message_id": "a b"},), "invalid_id"),
    ("message", ({"data": 1, "message_id": ""},), "invalid_id"),
    ("message", ({"data": 1, "overlap": "never"},), "invalid_request"),
    ("message", ({"data": 1, "conversation_id": "c2"},), "invalid_request"),
    ("message", ({"data": "x" * (MAX_PAYLOAD + 1)},), "payload_too_large"),
    ("message", ({"data": "x" * (2 * MAX_PAYLOAD + 65_536)},), "payload_too_large"),
    ("stop", ("now",), "invalid_request"),
    ("stop", ({"reason": "x"},), "invalid_request"),
    ("resume", ([],), "invalid_request"),
    ("resume", ({"x": 1},), "invalid_request"),
    ("rpc", ({},), "invalid_request"),
    ("rpc", ({"method": 7},), "invalid_request"),
    ("rpc", ({"method": ""},), "invalid_request"),
    ("rpc", ({"method": "a b"},), "invalid_id"),
    ("rpc", ({"method": "double", "timeout": 0},), "invalid_request"),
    ("rpc", ({"method": "double", "timeout": "soon"},), "invalid_request"),
    ("rpc", ({"method": "double", "timeout": 1e9},), "invalid_request"),
    ("rpc", ({"method": "double", "params": "x" * (MAX_PAYLOAD + 1)},), "payload_too_large"),
    ("interrupted", ({},), "unknown_event"),
    ("Message", ({"data": 1},), "unknown_event"),
    ("", ({},), "unknown_event"),
    ("x" * 10_000, ({},), "unknown_event"),
    ("ä😀", (), "unknown_event"),
)


async def test_malformed_events_are_answered_and_nothing_else(served: Node) -> None:
    async with connected(served.url, ALICE) as client:
        await client.until("joined")
        for number, (event, arguments, code) in enumerate(BAD_PAYLOADS, start=1):
            answer = await client.call(event, *arguments)
            error = answer["error"] if event == "rpc" else answer
            assert error["code"] == code, (event, arguments, answer)
            assert error["detail"]
            assert event == "rpc" or answer["status"] == "rejected"
            assert served.metric("convener_malformed_total", where="socket") == number, (event, arguments)
        assert await served.is_ready()
        assert (await client.call("message", {"data": "still here"}))["position"] == 1
        log = await client.answered()
        assert [entry["data"]["data"] for entry in log if entry["kind"] == "input"] == ["still here"]


# --- polling --------------------------------------------------------------------------------------------------


async def test_polling_is_off(served: Node) -> None:
    answer = await served.http.get("/socket.io/?EIO=4&transport=polling")
    assert (answer.status_code, answer.json()["code"]) == (400, "invalid_request")
    assert "WebSocket" in answer.json()["detail"]


async def test_polling_works_where_it_is_on() -> None:
    async with serving(transports=("websocket", "polling")) as node:
        # By hand: a stock client that leaves waits for its last poll to time out.
        opened = await node.http.get("/socket.io/?EIO=4&transport=polling")
        path = f"/socket.io/?EIO=4&transport=polling&sid={json.loads(opened.text[1:])['sid']}"
        await node.http.post(path, content="40" + json.dumps(ALICE))
        assert node.metric("convener_connections", transport="polling") == 1
        await node.http.post(path, content='427["message",{"data":"hi"}]')
        frames: list[str] = []
        while not any(frame.startswith("437[") for frame in frames):
            frames += (await node.http.get(path)).text.split("\x1e")
        assert frames[0].startswith('40{"sid":')
        (ack,) = [json.loads(frame[3:]) for frame in frames if frame.startswith("437[")]
        assert ack[0]["status"] == "accepted"
        await node.http.post(path, content="1")
        async with connected(node.url, ALICE, transports=["polling", "websocket"]) as client:
            assert (await client.call("message", {"data": "ho"}))["status"] == "accepted"
            await client.answered(2)
        await wait_until(lambda: len(node.gateway.context.sessions) == 0, "all sessions are closed")
        assert node.metric("convener_connections", transport="polling") == 0
        assert node.metric("convener_connections", transport="websocket") == 0


async def test_a_client_that_leaves_while_it_joins_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    async with serving(transports=("polling",)) as node:
        joining, go = asyncio.Event(), asyncio.Event()
        join = node.manager.join_conversation

        async def slow(*arguments: Any, **options: Any) -> Any:
            joining.set()
            await go.wait()
            return await join(*arguments, **options)

        monkeypatch.setattr(node.manager, "join_conversation", slow)
        opened = await node.http.get("/socket.io/?EIO=4&transport=polling")
        path = f"/socket.io/?EIO=4&transport=polling&sid={json.loads(opened.text[1:])['sid']}"
        hello = asyncio.create_task(node.http.post(path, content="40" + json.dumps(ALICE)))
        await asyncio.wait_for(joining.wait(), 20)
        await node.http.post(path, content="1")
        go.set()
        await hello
        await forgotten(node)
