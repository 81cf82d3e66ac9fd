"""Frames as no stock client sends them."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Coroutine
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st
from socketio import packet

from convener.gateway.packets import MALFORMED, Codec, StrictPacket, filter_frames
from tests.gateway.sockets import ALICE, raw
from tests.gateway.support import Node
from tests.support.waiting import wait_until

DEEP = "[" * 20_000

# Frames that Engine.IO or python-socketio would die on, or misunderstand. None of them has an id to answer.
SKIPPED: tuple[str | bytes, ...] = (
    "",
    "4",
    "x",
    "7",
    "9",
    "0",
    "²",
    "b",
    "bAAAA",
    "b%%%",
    "4x",
    "47",
    "4²",
    "4" + DEEP,
    "2" + DEEP,
    "6{}",
    "1" * 40,
    b"",
    b"\x00\xff",
    b"4",
    "42",
    "42{",
    "42{}",
    "42null",
    "42[]",
    "42[1]",
    "42[null,{}]",
    '42[["message"],{}]',
    '42[{"a":1},{}]',
    "42" + DEEP,
    '42["message",' + DEEP,
    '42["message",{"data":NaN}]',
    '42["message",{"data":"\\ud800"}]',
    '42["message",{"data":1e999}]',
    '42["connect",{}]',
    '42["disconnect"]',
    '42["disconnect","x"]',
    '42["*",{}]',
    '42["__disconnect_final"]',
    '42["\\u0000malformed","x"]',
    '42/other,["message",{"data":1}]',
    "43",
    "431",
    "43{}",
    "431{}",
    '431["x"]',
    '43999999999["x"]',
    "44",
    '44{"message":"x"}',
    '451-["message",{"_placeholder":true,"num":0}]',
    '459999999999-["message",{"_placeholder":true,"num":0}]',
    "461-1[]",
    "45",
    "46",
    "42" + "9" * 200 + '["message",{"data":1}]',
    "42" + "1" * 5000,
    '402["again"]',
)

# Frames with an id that can be read: they are answered.
ANSWERED: tuple[str, ...] = (
    "427",
    "427{",
    "427{}",
    "427[]",
    "427[7]",
    '427["message",' + DEEP,
    '427["message",{"data":NaN}]',
    '427["message",{"data":"\\udc00"}]',
    '427["message",{"data":' + "[" * 150 + "]" * 150 + "}]",
    '427["connect",{}]',
    '427["disconnect"]',
    '427["*",{"data":1}]',
    '451-7["message",{"data":{"_placeholder":true,"num":0}}]',
)


async def test_every_bad_frame_is_passed_over(served: Node) -> None:
    async with raw(served.url) as socket:
        await socket.join(ALICE)
        for number, frame in enumerate(SKIPPED):
            await socket.send(frame)
            # The connection must be alive and in step after each of them.
            await socket.send(f'42{number}["rpc",{{"method":"double","params":{number}}}]')
            assert await socket.ack(number) == {"result": 2 * number}, frame[:60]
        # All but three are counted: acknowledgements that nobody waits for, and an event of another namespace,
        # have the right form.
        counted = served.metric("convener_malformed_total", where="socket")
        assert counted >= len(SKIPPED) - 6
        assert await served.is_ready()
    await wait_until(lambda: not served.sio.environ, "the transport is closed")


@pytest.mark.parametrize("frame", ANSWERED, ids=lambda frame: frame[:40])
async def test_a_bad_frame_with_an_id_is_answered(served: Node, frame: str) -> None:
    async with raw(served.url) as socket:
        await socket.join(ALICE)
        await socket.send(frame)
        answer = await socket.ack(7)
        assert (answer["status"], answer["code"]) == ("rejected", "invalid_request")
        assert answer["detail"]
        assert served.metric("convener_malformed_total", where="socket") == 1
        await socket.send('428["message",{"data":1}]')
        assert (await socket.ack(8))["position"] == 1
        assert await served.is_ready()


@pytest.mark.parametrize(
    ("hello", "code"),
    [
        *((hello, "invalid_request") for hello in ("40{", '40"c1"', "40NaN", '40{"conversation_id":"\\ud800"}')),
        ("40" + DEEP, "invalid_request"),
        # The library passes on nothing of these.
        ("40[]", "user_required"),
        ("407", "user_required"),
    ],
)
async def test_a_bad_hello_is_refused(served: Node, hello: str, code: str) -> None:
    async with raw(served.url) as socket:
        await socket.receive()
        await socket.send(hello)
        answer = await socket.receive()
        assert answer.startswith("44{"), answer
        assert json.loads(answer[2:])["data"]["code"] == code
        # The transport is still there for a better one.
        await socket.send("40" + json.dumps(ALICE))
        assert (await socket.receive()).startswith("40{")


async def test_events_before_the_hello_are_passed_over(served: Node) -> None:
    async with raw(served.url) as socket:
        await socket.receive()
        await socket.send('421["message",{"data":1}]')
        await socket.send("41")
        await socket.send('431["x"]')
        await socket.send("40" + json.dumps(ALICE))
        assert (await socket.receive()).startswith("40{")
    assert served.metric("convener_messages_total", result="accepted") == 0


async def test_a_second_hello_changes_nothing(served: Node) -> None:
    async with raw(served.url) as socket:
        await socket.join(ALICE)
        await socket.send('40{"conversation_id":"c2"}')
        await socket.send('421["message",{"data":1}]')
        assert (await socket.ack(1))["status"] == "accepted"
        assert len(served.gateway.context.sessions) == 1
    assert (await served.http.get("/api/conversations/c2")).status_code == 404
    await wait_until(lambda: len(served.gateway.context.sessions) == 0, "the only session is closed")


async def test_another_namespace_is_not_there(served: Node) -> None:
    async with raw(served.url) as socket:
        await socket.receive()
        await socket.send('40/admin,{"conversation_id":"c1"}')
        assert (await socket.receive()).startswith("44/admin,")


async def test_a_frame_above_all_bounds_ends_the_connection_and_nothing_else(served: Node) -> None:
    async with raw(served.url) as socket:
        await socket.join(ALICE)
        await socket.send('421["message",{"data":"' + "x" * served.gateway.context.body_limit + '"}]')
        await wait_until(lambda: not served.sio.environ, "the transport is closed")
    await wait_until(lambda: len(served.gateway.context.sessions) == 0, "the session is closed")
    assert await served.is_ready()


# --- without a connection ---------------------------------------------------------------------------------------


@given(st.text(max_size=60) | st.binary(max_size=20) | st.sampled_from([f for f in SKIPPED if len(f) < 1000]))
def test_whatever_comes_can_be_dispatched(frame: str | bytes) -> None:
    read = StrictPacket(encoded_packet=frame)
    kind, data = read.packet_type, read.data
    assert kind in (packet.CONNECT, packet.DISCONNECT, packet.EVENT, packet.ACK)
    assert read.attachment_count == 0
    if kind == packet.EVENT:
        assert isinstance(data, list)
        assert isinstance(data[0], str)
        assert data[0] == MALFORMED or data[0] not in ("connect", "disconnect", "*")
    if kind == packet.ACK:
        assert isinstance(data, list)


@given(st.lists(st.text(max_size=20) | st.none(), max_size=5))
def test_frames_that_pass_the_filter_can_be_decoded(texts: list[str | None]) -> None:
    from engineio import packet as engine

    for text in texts:
        if passes(text):
            assert engine.Packet(encoded_packet=text).packet_type in range(1, 7)


def passes(text: str | None) -> bool:
    """Whether the filter lets a frame through."""
    messages = deque[Any]([{"type": "websocket.receive", "text": text}, {"type": "websocket.disconnect"}])

    async def receive() -> Any:
        return messages.popleft()

    waiting = cast("Coroutine[Any, Any, Any]", filter_frames(receive, lambda: None)())
    try:
        waiting.send(None)
    except StopIteration as done:
        return done.value["type"] == "websocket.receive"
    raise AssertionError("it waited")


def test_the_codec_writes_what_stock_clients_read() -> None:
    value = {"a": [1, None, True, "Ä😀\u2028"], "b": 1.5}
    assert json.loads(Codec.dumps(value, separators=(",", ":"))) == value
    assert StrictPacket(packet.EVENT, ["event", value], id=5).encode() == "25" + Codec.dumps(["event", value])
