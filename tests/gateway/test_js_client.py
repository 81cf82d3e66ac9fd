"""The stock JavaScript client against a node."""

from __future__ import annotations

import pytest

from tests.gateway.sockets import ALICE, connected
from tests.gateway.support import Node
from tests.gateway.writing import under_way
from tests.support.jsclient import javascript_client, missing

# Without Node.js there is no JavaScript client to test; `make test` installs both.
pytestmark = pytest.mark.skipif(missing() is not None, reason=missing() or "")


async def test_both_stock_clients_see_the_same(served: Node) -> None:
    async with (
        connected(served.url, ALICE) as python,
        javascript_client(served.url, "c1", "--user", "alice") as node,
    ):
        await node.until("joined", lambda: node.of("joined"))
        said = await node.call("message", {"message_id": "m1", "data": {"text": "Hällo 😀"}})
        assert said == {"status": "accepted", "message_id": "m1", "position": 1, "duplicate": False}
        assert await node.call("message", {"message_id": "m1", "data": 1}) == said | {"duplicate": True}
        assert (await python.call("message", {"data": "from Python"}))["position"] == 2
        log = await python.answered(2)
        await node.until("the whole log", lambda: len(node.of("event")) >= len(log))
        assert node.of("event") == log
        assert (await node.call("rpc", {"method": "double", "params": 4})) == {"result": 8}
        assert (await node.call("nonsense", {}))["code"] == "unknown_event"
        assert await node.close() == 0


async def test_resuming_and_ending_by_itself(served: Node) -> None:
    async with connected(served.url, ALICE) as python:
        await python.call("message", {"data": "one"})
        log = await python.answered()
    arguments = ("--user", "alice", "--after", log[1]["cursor"], "--count", str(len(log) - 2))
    async with javascript_client(served.url, "c1", *arguments) as node:
        assert await node.close() == 0
        assert node.of("event") == log[2:]


async def test_an_answer_while_it_is_written(served: Node) -> None:
    async with (
        connected(served.url, ALICE) as python,
        javascript_client(served.url, "c1", "--user", "alice") as node,
    ):
        await node.until("joined", lambda: node.of("joined"))
        await node.call("message", {"data": {"text": "/wait"}})
        pen = await under_way(served)
        written = ("Hällo ", "😀, ", "world")
        for number, piece in enumerate(written, start=1):
            await pen.write(piece)
            await node.until("the piece", lambda number=number: len(node.of("delta")) == number)
        assert [(delta["offset"], delta["data"]) for delta in node.of("delta")] == [
            (0, "Hällo "),
            # In code points: JavaScript counts two for the emoji.
            (6, "😀, "),
            (9, "world"),
        ]
        await python.until("delta")
        assert "".join(delta["data"] for delta in python.of("delta")) == "".join(written)
        async with connected(served.url, ALICE) as late:
            (whole,) = await late.until("delta")
            assert (whole["offset"], whole["data"]) == (0, "".join(written))
            names = [name for name, _ in late.heard]
            assert names.index("joined") < names.index("delta")
        served.agent.go.set()
        await python.answered()


async def test_a_refusal_and_a_stop(served: Node) -> None:
    async with javascript_client(served.url, "no id") as node:
        (told,) = await node.until("been refused", lambda: node.of("connect_error"))
        assert told["data"]["code"] == "invalid_id"
        assert told["message"] == told["data"]["detail"]
    async with javascript_client(served.url, "c1", "--user", "alice") as node:
        await node.until("joined", lambda: node.of("joined"))
        assert await node.call("stop", {}) == {"outcome": "stopped"}
        await node.until("been disconnected", lambda: node.of("disconnect"))
        # Sent away by the server, a stock client stays away.
        assert node.of("disconnect") == [{"reason": "io server disconnect"}]
        assert node.of("stopped") == [{"conversation_id": "c1", "reason": "stopped by the user"}]
        assert len(node.of("connect")) == 1
