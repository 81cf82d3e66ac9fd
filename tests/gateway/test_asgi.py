"""The gateway as an ASGI application: lifespan, mounting, limits, and faults that nobody foresaw."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, MutableMapping
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from starlette.applications import Starlette
from starlette.routing import Mount

from convener.errors import ConfigurationError, ConvenerError, StoreUnavailable
from convener.gateway import asgi
from convener.gateway.asgi import Gateway
from convener.gateway.auth import Identity
from convener.gateway.socketio import SocketGateway, make_server
from convener.manager.ops import Readiness
from convener.manager.standalone import StandaloneConversationManager
from convener.settings import Settings
from convener.telemetry.metrics import Metrics
from tests.gateway.sockets import ALICE, connected, raw
from tests.gateway.support import Node, listening, running, serving
from tests.gateway.test_http import create
from tests.support.waiting import wait_until


def bare() -> Gateway:
    """A gateway that nobody has started."""
    settings, metrics = Settings(), Metrics()
    sio = make_server(settings)
    manager = StandaloneConversationManager(sio=sio, metrics=metrics)
    return Gateway(manager, manager, settings, metrics, sio=sio)


class Lifespan:
    """The server's half of the lifespan protocol."""

    def __init__(self, app: Any) -> None:
        self._to_app: asyncio.Queue[Any] = asyncio.Queue()
        self._from_app: asyncio.Queue[Any] = asyncio.Queue()
        self._task = asyncio.create_task(app({"type": "lifespan"}, self._to_app.get, self._from_app.put))

    async def say(self, kind: str) -> MutableMapping[str, Any]:
        await self._to_app.put({"type": f"lifespan.{kind}"})
        return await asyncio.wait_for(self._from_app.get(), 20)

    async def ended(self) -> None:
        await asyncio.wait_for(self._task, 20)


# --- lifespan -------------------------------------------------------------------------------------------------


async def test_the_lifespan_starts_and_ends_the_node() -> None:
    gateway = bare()
    async with httpx.AsyncClient(transport=httpx.ASGITransport(gateway), base_url="http://127.0.0.1") as http:
        lifespan = Lifespan(gateway)
        assert await lifespan.say("startup") == {"type": "lifespan.startup.complete"}
        assert (await http.get("/readyz")).status_code == 200
        assert (await http.post("/api/conversations")).status_code == 201
        assert await lifespan.say("shutdown") == {"type": "lifespan.shutdown.complete"}
        await lifespan.ended()
        assert (await http.get("/readyz")).json() == {"status": "unready"}


async def test_a_node_that_does_not_run_says_so() -> None:
    gateway = bare()
    async with httpx.AsyncClient(transport=httpx.ASGITransport(gateway), base_url="http://127.0.0.1") as http:
        assert (await http.get("/livez")).status_code == 200
        ready = await http.get("/readyz?verbose")
        assert (ready.status_code, ready.json()["checks"]) == (503, {"gateway": "not running"})
        assert "convener_node_ready 0.0" in (await http.get("/metrics")).text
        for path in ("/api/conversations", "/api/nodes"):
            refused = await http.get(path)
            assert (refused.status_code, refused.json()["code"]) == (503, "owner_unavailable")
            assert refused.headers["retry-after"] == "1"


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (StoreUnavailable("no store at localhost:1"), "no store at localhost:1"),
        (RuntimeError("odd"), "RuntimeError: odd"),
    ],
)
@pytest.mark.parametrize("kind", ["startup", "shutdown"])
async def test_a_failed_lifespan_is_one_line(
    monkeypatch: pytest.MonkeyPatch, error: Exception, message: str, kind: str
) -> None:
    async def fail(*_: Any) -> Any:
        raise error

    gateway = bare()
    monkeypatch.setattr(StandaloneConversationManager, "_begin" if kind == "startup" else "_end", fail)
    lifespan = Lifespan(gateway)
    if kind == "shutdown":
        assert (await lifespan.say("startup"))["type"] == "lifespan.startup.complete"
    assert await lifespan.say(kind) == {"type": f"lifespan.{kind}.failed", "message": message}
    await lifespan.ended()


async def test_the_gateway_runs_again_after_its_end() -> None:
    gateway = bare()
    for _ in range(2):
        async with gateway.running():
            assert gateway.context.running
        assert gateway.context.closing


# --- readiness ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("found", "status", "state"),
    [
        (Readiness(True, checks={"lease": "ok"}), 200, "ready"),
        (Readiness(True, degraded=True, checks={"lease": "store away"}), 200, "degraded"),
        (Readiness(False, checks={"lease": "over"}), 503, "unready"),
        (Readiness(False, degraded=True, checks={"lease": "over"}), 503, "unready"),
    ],
)
async def test_readiness_is_the_managers_word(
    node: Node, monkeypatch: pytest.MonkeyPatch, found: Readiness, status: int, state: str
) -> None:
    monkeypatch.setattr(node.manager, "readiness", lambda: found)
    plain, verbose = await node.http.get("/readyz"), await node.http.get("/readyz?verbose=1")
    assert (plain.status_code, plain.json()) == (status, {"status": state})
    assert (verbose.status_code, verbose.json()) == (status, {"status": state, "checks": dict(found.checks)})
    await node.http.get("/metrics")
    assert node.metric("convener_node_ready") == (status == 200)


# --- mounting -------------------------------------------------------------------------------------------------


async def used_at(url: str, prefix: str) -> None:
    """Everything works below a prefix, and nothing above it."""
    async with httpx.AsyncClient(base_url=url) as http:
        assert (await http.get(f"{prefix}/readyz")).status_code == 200
        assert (await http.post(f"{prefix}/api/conversations", json=ALICE)).status_code in (200, 201)
        assert (await http.get("/api/conversations/c1")).status_code == 404
        assert (await http.get(f"{prefix}/nope")).json()["code"] == "not_found"
    async with connected(url, ALICE, socketio_path=f"{prefix}/socket.io") as client:
        assert (await client.call("message", {"data": "hi"}))["status"] == "accepted"
        await client.answered()


@pytest.mark.parametrize("kind", [FastAPI, Starlette])
async def test_mounted_in_another_application(kind: type[Starlette]) -> None:
    async with running() as node:
        other = kind(routes=[Mount("/agents", app=node.gateway)])
        async with listening(other) as url:
            await used_at(url, "/agents")


async def test_mounted_twice_as_deep() -> None:
    async with running() as node:
        other = Starlette(routes=[Mount("/a", routes=[Mount("/b", app=node.gateway)])])
        async with listening(other) as url:
            await used_at(url, "/a/b")


async def test_with_the_lifespan_of_another_application() -> None:
    gateway = bare()

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncGenerator[None]:
        async with gateway.running():
            yield

    other = FastAPI(lifespan=lifespan)
    other.mount("/agents", gateway)
    started = Lifespan(other)
    assert (await started.say("startup"))["type"] == "lifespan.startup.complete"
    async with listening(other) as url:
        await used_at(url, "/agents")
    assert (await started.say("shutdown"))["type"] == "lifespan.shutdown.complete"
    await started.ended()


async def test_behind_a_proxy_that_keeps_the_prefix() -> None:
    async with serving(prefix="/agents/") as node:
        async with connected(node.url, ALICE, socketio_path="/agents/socket.io") as client:
            assert (await client.call("message", {"data": "hi"}))["status"] == "accepted"
        assert (await node.http.get("/agents/readyz")).status_code == 200
        # Health checks and the like come past the proxy.
        assert (await node.http.get("/readyz")).status_code == 200
        assert (await node.http.get("/agentsreadyz")).status_code == 404


# --- faults ---------------------------------------------------------------------------------------------------


async def test_an_unforeseen_fault_is_answered_and_tells_nothing(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    async def fail(*_: Any, **__: Any) -> Any:
        raise RuntimeError("password=secret")

    await create(node)
    monkeypatch.setattr(node.manager, "describe", fail)
    answer = await node.http.get("/api/conversations/c1")
    assert (answer.status_code, answer.headers["content-type"]) == (500, "application/problem+json")
    assert answer.json()["code"] == "internal"
    assert "secret" not in answer.text
    assert await node.is_ready()


async def test_a_fault_outside_of_all_routes_is_answered_too(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    async def fail(*_: Any) -> None:
        raise RuntimeError("password=secret")

    monkeypatch.setattr(node.gateway, "api", fail)
    answer = await node.http.get("/api/conversations/c1")
    assert (answer.status_code, answer.json()["code"]) == (500, "internal")
    assert "secret" not in answer.text


async def test_a_fault_in_the_middle_of_an_answer_breaks_it_off(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    async def fail(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        raise RuntimeError("half-way")

    monkeypatch.setattr(node.gateway, "api", fail)
    with pytest.raises(RuntimeError, match="half-way"):
        await node.http.get("/api/conversations/c1")


@pytest.mark.parametrize("status", sorted({cls.http_status for cls in ConvenerError.__subclasses__()}))
async def test_every_status_reaches_the_client(node: Node, monkeypatch: pytest.MonkeyPatch, status: int) -> None:
    (kind, *_) = [cls for cls in ConvenerError.__subclasses__() if cls.http_status == status]

    async def fail(*_: Any, **__: Any) -> Any:
        raise kind("as it is")

    monkeypatch.setattr(node.manager, "list_conversations", fail)
    answer = await node.http.get("/api/conversations")
    assert (answer.status_code, answer.json()["code"]) == (status, kind.code)


async def test_a_websocket_elsewhere_is_refused_politely(served: Node) -> None:
    async with httpx.AsyncClient() as http:
        headers = {
            "Connection": "Upgrade",
            "Upgrade": "websocket",
            "Sec-WebSocket-Version": "13",
            "Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ==",
        }
        for path in ("/", "/api/conversations", "/socket.iox"):
            assert (await http.get(served.url + path, headers=headers)).status_code == 403
    assert await served.is_ready()


async def test_a_fault_before_a_websocket_is_accepted(served: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    async def fail(*_: Any) -> None:
        raise RuntimeError("odd")

    monkeypatch.setattr(served.sio, "handle_request", fail)
    with pytest.raises(Exception, match="403"):
        async with raw(served.url):
            pass
    assert await served.is_ready()


async def test_an_announced_length_is_refused_before_the_body_is_read(node: Node) -> None:
    sent: list[Any] = []

    async def receive() -> Any:
        raise AssertionError("it reads the body")

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {
        "type": "http",
        "method": "POST",
        "path": "/api/conversations",
        "query_string": b"",
        "headers": [(b"content-length", b"99999999999"), (b"content-type", b"application/json")],
    }
    await node.gateway(scope, receive, send)
    assert sent[0]["status"] == 413
    assert json.loads(sent[1]["body"])["code"] == "payload_too_large"


async def test_hook_without_a_function_is_refused_at_once() -> None:
    settings, metrics = Settings(auth="hook"), Metrics()
    sio = make_server(settings)
    manager = StandaloneConversationManager(sio=sio, metrics=metrics)
    with pytest.raises(ConfigurationError):
        Gateway(manager, manager, settings, metrics, sio=sio)


# --- background work ------------------------------------------------------------------------------------------


async def test_open_connections_are_looked_at_again_and_again(monkeypatch: pytest.MonkeyPatch) -> None:
    assert asgi.INTERVAL == 10
    monkeypatch.setattr(asgi, "INTERVAL", 0.01)
    banned: set[str | None] = set()

    async def who(token: str | None, headers: Any) -> Identity | None:
        return None if token in banned else Identity(token)

    async def spare(self: SocketGateway, seen: set[str]) -> set[str]:
        # At this pace a client that is slow to say hello would be cut off for that.
        return set()

    monkeypatch.setattr(SocketGateway, "sweep", spare)

    async with (
        serving(settings={"auth": "hook"}, authenticate=who) as node,
        connected(node.url, {"conversation_id": "c1", "token": "alice"}) as client,
    ):
        await client.until("joined")
        banned.add("alice")
        assert await client.is_cut_off()


async def test_a_transport_that_never_says_hello_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(asgi, "INTERVAL", 0.01)
    async with serving() as node, raw(node.url):
        await wait_until(lambda: not node.sio.environ, "the silent transport is closed")


async def test_a_crash_of_the_background_work_is_survived_and_counted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(asgi, "INTERVAL", 0.001)
    async with running() as node:
        rounds = 0

        async def recheck() -> None:
            nonlocal rounds
            rounds += 1
            if rounds == 2:
                raise RuntimeError("odd")

        monkeypatch.setattr(node.gateway.context.sessions, "recheck", recheck)
        await wait_until(lambda: rounds > 3, "it goes on after the crash")
        assert node.metric("convener_background_restarts_total", task="recheck") == 1


@pytest.mark.parametrize(("address", "status"), [("127.0.0.1", 200), ("::1", 200), ("/run/s", 200), ("10.0.0.5", 403)])
async def test_auth_none_answers_on_loopback_addresses_only(address: str, status: int) -> None:
    gateway = bare()
    async with gateway.running():
        sent: list[MutableMapping[str, Any]] = []

        async def send(message: MutableMapping[str, Any]) -> None:
            sent.append(message)

        async def receive() -> MutableMapping[str, Any]:
            return {"type": "http.request", "body": b""}

        scope = {"type": "http", "method": "GET", "path": "/livez", "raw_path": b"/livez", "query_string": b""}
        scope |= {"headers": [], "server": (address, 8000), "scheme": "http", "http_version": "1.1", "root_path": ""}
        await gateway(scope, receive, send)
        assert sent[0]["status"] == status
        assert status == 200 or b"unsafe_address" in sent[1]["body"]
