"""Whatever comes in, the documented error goes out: nothing is lost, nodes stay ready, conversations go on."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import AsyncGenerator
from typing import Any, Final

import httpx
import pytest

from tests.cluster.checks import check_answered
from tests.cluster.clients import Client, Clients
from tests.cluster.talking import Api
from tests.gateway.sockets import Raw, raw
from tests.support.cluster import Cluster
from tests.support.waiting import wait_until

LIMIT: Final = 4096
BIG: Final = "x" * (LIMIT + 1)
HUGE: Final = "x" * (200 * LIMIT)
JSON: Final = {"Content-Type": "application/json"}
pytestmark = pytest.mark.cluster(max_payload_bytes=LIMIT)

C, NONE, BAD = "/api/conversations/steady", "/api/conversations/unknown", "/api/conversations/b%20d"
Case = tuple[str, str, dict[str, Any], int, str]

# Method, path, what httpx is told, status, code.
REQUESTS: Final[tuple[Case, ...]] = (
    ("GET", "/api/nothing", {}, 404, "not_found"),
    ("PUT", "/api/conversations", {}, 405, "method_not_allowed"),
    ("POST", "/api/conversations", {"content": "{", "headers": JSON}, 400, "invalid_request"),
    ("POST", "/api/conversations", {"content": b"\xff\xfe", "headers": JSON}, 400, "invalid_request"),
    ("POST", "/api/conversations", {"content": "conversation_id=x"}, 400, "invalid_request"),
    ("POST", "/api/conversations", {"json": []}, 400, "invalid_request"),
    ("POST", "/api/conversations", {"json": {"conversation_id": 7}}, 400, "invalid_request"),
    ("POST", "/api/conversations", {"json": {"conversation_id": "b d"}}, 400, "invalid_id"),
    ("POST", "/api/conversations", {"json": {"conversation_id": "x", "user_id": ""}}, 400, "invalid_id"),
    ("POST", "/api/conversations", {"json": {"conversation_id": "x", "colour": 1}}, 400, "invalid_request"),
    ("POST", "/api/conversations", {"json": {"conversation_id": "x", "message": {}}}, 400, "invalid_request"),
    ("POST", "/api/conversations", {"json": {"metadata": {"a": BIG}}}, 413, "payload_too_large"),
    ("POST", "/api/conversations", {"json": {"conversation_id": "steady", "user_id": "w"}}, 404, "not_found"),
    ("GET", "/api/conversations?limit=0", {}, 400, "invalid_request"),
    ("GET", "/api/conversations?cursor=x", {}, 400, "invalid_request"),
    ("GET", "/api/conversations?status=asleep", {}, 400, "invalid_request"),
    ("GET", NONE, {}, 404, "not_found"),
    ("GET", BAD, {}, 400, "invalid_id"),
    ("PATCH", C, {"json": {}}, 400, "invalid_request"),
    ("PATCH", C, {"json": {"metadata": {"a": BIG}}}, 413, "payload_too_large"),
    ("PATCH", NONE, {"json": {"metadata": {}}}, 404, "not_found"),
    ("PATCH", BAD, {"json": {"metadata": {}}}, 400, "invalid_id"),
    ("DELETE", NONE, {}, 404, "not_found"),
    ("DELETE", BAD, {}, 400, "invalid_id"),
    ("POST", C + "/messages", {}, 400, "invalid_request"),
    ("POST", C + "/messages", {"content": '{"data":NaN}', "headers": JSON}, 400, "invalid_request"),
    ("POST", C + "/messages", {"content": '{"data":"\\ud800"}', "headers": JSON}, 400, "invalid_request"),
    ("POST", C + "/messages", {"content": "[" * 50_000, "headers": JSON}, 400, "invalid_request"),
    ("POST", C + "/messages", {"json": {"message_id": "m"}}, 400, "invalid_request"),
    ("POST", C + "/messages", {"json": {"message_id": 7, "data": 1}}, 400, "invalid_request"),
    ("POST", C + "/messages", {"json": {"message_id": "", "data": 1}}, 400, "invalid_id"),
    ("POST", C + "/messages", {"json": {"data": 1, "overlap": "sometimes"}}, 400, "invalid_request"),
    ("POST", C + "/messages", {"json": {"data": BIG}}, 413, "payload_too_large"),
    ("POST", C + "/messages", {"json": {"data": HUGE}}, 413, "payload_too_large"),
    ("POST", NONE + "/messages", {"json": {"data": 1}}, 404, "not_found"),
    ("POST", BAD + "/messages", {"json": {"data": 1}}, 400, "invalid_id"),
    ("GET", C + "/events?after=x", {}, 400, "invalid_cursor"),
    ("GET", C + "/events?before=0", {}, 400, "invalid_request"),
    ("GET", C + "/events?limit=1001", {}, 400, "invalid_request"),
    ("GET", NONE + "/events", {}, 404, "not_found"),
    ("GET", C + "/stream?tail=x", {}, 400, "invalid_request"),
    ("GET", C + "/stream", {"headers": {"Last-Event-ID": "x y"}}, 400, "invalid_cursor"),
    ("GET", NONE + "/stream", {}, 404, "not_found"),
    ("POST", C + "/stop", {"json": {"reason": "x"}}, 400, "invalid_request"),
    ("POST", C + "/stop", {"content": "nonsense", "headers": JSON}, 400, "invalid_request"),
    ("POST", NONE + "/stop", {}, 404, "not_found"),
    ("POST", BAD + "/stop", {}, 400, "invalid_id"),
    ("POST", C + "/resume", {"json": [1]}, 400, "invalid_request"),
    ("POST", NONE + "/resume", {}, 404, "not_found"),
    ("POST", C + "/rpc/nothing", {}, 404, "method_not_found"),
    ("POST", C + "/rpc/nothing", {"json": {"timeout": -1}}, 400, "invalid_request"),
    ("POST", C + "/rpc/nothing", {"json": {"params": BIG}}, 413, "payload_too_large"),
    ("POST", C + "/rpc/b%20d", {}, 400, "invalid_id"),
    ("POST", NONE + "/rpc/nothing", {}, 404, "not_found"),
    ("GET", "/api/audit?conversation_id=b%20d", {}, 400, "invalid_id"),
    ("POST", "/api/nodes", {}, 405, "method_not_allowed"),
    ("GET", "/socket.io/?EIO=4&transport=polling", {}, 400, "invalid_request"),
)

# Event, arguments, code.
EVENTS: Final[tuple[tuple[str, tuple[Any, ...], str], ...]] = (
    ("message", (), "invalid_request"),
    ("message", ("text",), "invalid_request"),
    ("message", ([],), "invalid_request"),
    ("message", ({},), "invalid_request"),
    ("message", ({"message_id": "m"},), "invalid_request"),
    ("message", ({"message_id": 7, "data": 1},), "invalid_request"),
    ("message", ({"message_id": "b d", "data": 1},), "invalid_id"),
    ("message", ({"data": 1, "overlap": "sometimes"},), "invalid_request"),
    ("message", ({"data": 1, "colour": "red"},), "invalid_request"),
    ("message", ({"data": 1}, {"data": 2}), "invalid_request"),
    ("message", ({"data": BIG},), "payload_too_large"),
    ("message", ({"data": BIG * 3},), "payload_too_large"),
    ("stop", ({"reason": "x"},), "invalid_request"),
    ("stop", (7,), "invalid_request"),
    ("resume", ([],), "invalid_request"),
    ("rpc", (), "invalid_request"),
    ("rpc", ({},), "invalid_request"),
    ("rpc", ({"method": 7},), "invalid_request"),
    ("rpc", ({"method": "nothing"},), "method_not_found"),
    ("rpc", ({"method": "nothing", "timeout": 0},), "invalid_request"),
    ("rpc", ({"method": "nothing", "params": BIG},), "payload_too_large"),
    ("nonsense", ({"data": 1},), "unknown_event"),
)

# The auth object, code.
HELLOS: Final[tuple[tuple[Any, str], ...]] = (
    (None, "user_required"),
    ({}, "user_required"),
    ([], "user_required"),
    ("steady", "invalid_request"),
    ({"conversation_id": 7}, "invalid_request"),
    ({"conversation_id": ""}, "invalid_id"),
    ({"conversation_id": "b d"}, "invalid_id"),
    ({"conversation_id": "steady", "user_id": 7}, "invalid_request"),
    ({"conversation_id": "steady", "user_id": "b d"}, "invalid_id"),
    ({"conversation_id": "steady", "user_id": "w"}, "not_found"),
    ({"conversation_id": "steady", "user_id": "u", "after": "x"}, "invalid_cursor"),
    ({"conversation_id": "steady", "user_id": "u", "after": -1}, "invalid_cursor"),
    ({"conversation_id": "steady", "user_id": "u", "tail": "many"}, "invalid_request"),
    ({"conversation_id": "steady", "user_id": "u", "tail": -1}, "invalid_request"),
)

# Frames that no stock client sends and that have no answer.
FRAMES: Final[tuple[str | bytes, ...]] = (
    *("", "4", "x", "9", "bAAAA", "47", "42", "42{", "42[]", "42[1]", "43", "45", "461-1[]", b"", b"\x00\xff"),
    *('42["message",{"data":NaN}]', '42["connect",{}]', '42["disconnect"]', '42["*",{}]', '402["again"]'),
    *("42" + "[" * 20_000, "42" + "9" * 300 + '["message",{"data":1}]', '42/other,["message",{"data":1}]'),
    '451-["message",{"_placeholder":true,"num":0}]',
)


@pytest.fixture
async def bystanders(cluster: Cluster, clients: Clients, api: Api) -> AsyncGenerator[list[Client]]:
    """Clients of the conversation `steady`, which goes on while bad things happen, and has lost nothing at the end."""
    await api.start(cluster.url(0), "steady", "u")
    made = [await clients.join(cluster.url(node), "steady", user_id="u") for node in (1, 2)]
    yield made
    await api.deliver("steady", "the last word")
    events = await api.answered("steady")
    check_answered(events, api.sent["steady"])
    for client in made:
        await client.wait_seq(events[-1]["seq"])
        assert client.events == events
        assert client.closes == []
    assert cluster.stored is not None
    assert cluster.stored.conversations() == {"steady"}, "nothing was made of bad input"
    for index in range(3):
        answer = await api.http.get(f"{cluster.url(index)}/readyz?verbose")
        assert answer.json()["status"] == "ready", answer.text


async def _malformed(api: Api, url: str, where: str) -> float:
    text = (await api.http.get(f"{url}/metrics")).text
    lines = [line for line in text.splitlines() if line.startswith(f'convener_malformed_total{{where="{where}"}}')]
    return float(lines[0].rpartition(" ")[2]) if lines else 0.0


async def test_every_route_answers_bad_requests_as_documented(
    cluster: Cluster, bystanders: list[Client], api: Api, rng: random.Random
) -> None:
    for number, (method, path, options, status, code) in enumerate(rng.sample(REQUESTS, len(REQUESTS))):
        answer: httpx.Response = await api.http.request(method, cluster.url(rng.randrange(3)) + path, **options)
        assert (answer.status_code, answer.json()["code"]) == (status, code), (method, path, options, answer.text)
        assert answer.headers["content-type"] == "application/problem+json"
        assert answer.json()["status"] == status
        assert answer.json()["detail"]
        if number % 10 == 0:
            await api.deliver("steady", f"after {method} {path}")


async def test_every_event_answers_bad_payloads_as_documented(
    cluster: Cluster, bystanders: list[Client], api: Api, rng: random.Random
) -> None:
    for event, arguments, code in rng.sample(EVENTS, len(EVENTS)):
        client = rng.choice(bystanders)
        answer = await client.call(event, arguments if len(arguments) != 1 else arguments[0])
        error = answer["error"] if event == "rpc" else answer
        assert error["code"] == code, (event, arguments, answer)
        assert error["detail"]
        assert event == "rpc" or answer["status"] == "rejected"
        accepted = await client.say(f"after a bad {event}")
        api.sent["steady"][accepted["message_id"]] = f"after a bad {event}"


async def test_a_hello_that_says_nothing_sensible_is_refused(
    cluster: Cluster, bystanders: list[Client], api: Api, rng: random.Random
) -> None:
    for hello, code in rng.sample(HELLOS, len(HELLOS)):
        async with raw(cluster.url(rng.randrange(3))) as socket:
            answer = await socket.join(hello)
            assert answer.startswith("44"), (hello, answer)
            refusal = json.loads(answer[2:])
            assert refusal["data"]["code"] == code, (hello, answer)
            assert refusal["data"]["detail"]
    await api.deliver("steady", "after bad hellos")


async def test_malformed_frames_are_passed_over(
    cluster: Cluster, bystanders: list[Client], api: Api, rng: random.Random
) -> None:
    url = cluster.url(rng.randrange(3))
    before = await _malformed(api, url, "socket")
    async with raw(url) as socket:
        await socket.join({"conversation_id": "steady", "user_id": "u"})
        for number, frame in enumerate(rng.sample(FRAMES, len(FRAMES))):
            await socket.send(frame)
            await _say(socket, api, number, f"after frame {number}")
    # Nearly all are counted: what has the form of an event in another namespace is not malformed.
    assert await _malformed(api, url, "socket") >= before + len(FRAMES) - 2


async def _say(socket: Raw, api: Api, number: int, text: str) -> None:
    body = {"message_id": f"raw.{number}", "data": {"text": text}}
    await socket.send(f"42{number}" + json.dumps(["message", body]))
    answer = await socket.ack(number)
    assert answer["status"] == "accepted", answer
    api.sent["steady"][f"raw.{number}"] = text


async def test_garbage_on_the_bus_is_counted_and_skipped(cluster: Cluster, bystanders: list[Client], api: Api) -> None:
    server, stored = cluster.server, cluster.stored
    assert server is not None
    assert stored is not None
    owner = stored.head("steady")["owner"]
    channels = {
        "sync": "{convener:m}:sync",
        "conversation": "{convener:c:steady}",
        "node": f"{{convener:n:{owner}}}",
    }
    garbage = ("", "{", "null", "[]", "7", '{"t":7}', '{"t":"log","events":{}}', "\xff\xfe", "x" * 100_000, '{"seq":1}')
    before = {where: await _malformed(api, cluster.url(0), where) for where in channels}
    for text in garbage:
        for channel in channels.values():
            await asyncio.to_thread(server.ask, "SPUBLISH", channel, text.encode("latin-1"))
        await api.deliver("steady", f"after {text[:20]!r}")
    for where, count in before.items():

        async def is_counted(where: str = where, count: float = count) -> bool:
            return await _malformed(api, cluster.url(0), where) >= count + 8

        await wait_until(is_counted, f"garbage is counted as {where}")


async def test_a_state_message_without_sense_harms_nobody(cluster: Cluster, bystanders: list[Client], api: Api) -> None:
    """Well-formed batches with nonsense in them, as a broken node might send."""
    server = cluster.server
    assert server is not None
    messages: list[dict[str, Any]] = [
        {},
        {"type": "status_update"},
        {"type": "status_update", "conversation_id": "steady", "source_node": "ghost"},
        {"type": "status_update", "conversation_id": 7, "source_node": "ghost", "new_status": "idle"},
        {"type": "status_update", "conversation_id": "steady", "source_node": "g", "new_status": "idle", "epoch": "x"},
        {"type": "explosion", "conversation_id": "steady", "source_node": "ghost"},
        {"type": "new_conversation", "conversation_id": "steady", "source_node": [], "new_status": "idle"},
    ]
    before = await _malformed(api, cluster.url(1), "sync")
    for message in messages:
        batch = {"t": "state", "node": "ghost", "ver": 1, "messages": [message]}
        await asyncio.to_thread(server.ask, "SPUBLISH", "{convener:m}:sync", json.dumps(batch))

    async def is_counted() -> bool:
        return await _malformed(api, cluster.url(1), "sync") >= before + len(messages)

    await wait_until(is_counted, "every one of them is counted")
    await api.deliver("steady", "after nonsense")
