"""A `Convener` by itself and inside other applications, as a server runs them."""

from __future__ import annotations

import asyncio
import json
import signal
import sys
from collections.abc import AsyncGenerator, Generator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from starlette.applications import Starlette

from convener import Convener, Settings
from convener.errors import ConfigurationError
from tests.gateway.sockets import ALICE, connected
from tests.gateway.support import listening
from tests.support.processes import RunningProcess, convener, free_port
from tests.support.waiting import wait_until

AGENT = """
from convener import Convener, Turn

agents = Convener()


@agents.agent
async def answer(turn: Turn) -> None:
    await turn.reply({"text": turn.text})
"""

INSIDE_FASTAPI = (
    AGENT
    + """
from fastapi import FastAPI

app = FastAPI(lifespan=agents.lifespan)
agents.mount_on(app, path="/agents")


@app.get("/own")
async def own() -> dict[str, list[str]]:
    return {"running": sorted(await agents.manager.get_running_agent_loops())}
"""
)

INSIDE_STARLETTE = (
    AGENT
    + """
from contextlib import asynccontextmanager

from starlette.applications import Starlette
from starlette.responses import JSONResponse
from starlette.routing import Route


@asynccontextmanager
async def lifespan(app: Starlette):
    print("opened", flush=True)
    async with agents.lifespan(app):
        yield {"ours": 1}
    print("closed", flush=True)


async def own(request):
    assert request.state.ours == 1
    return JSONResponse({"running": sorted(await agents.manager.get_running_agent_loops())})


app = Starlette(lifespan=lifespan, routes=[Route("/own", own)])
agents.mount_on(app, path="/deep/agents")
"""
)

WITHOUT_LIFESPAN = INSIDE_FASTAPI.replace("lifespan=agents.lifespan", "")

KINDS = {
    "alone": (AGENT, "agents", ""),
    "in FastAPI": (INSIDE_FASTAPI, "app", "/agents"),
    "in Starlette, with a lifespan of its own": (INSIDE_STARLETTE, "app", "/deep/agents"),
}


@contextmanager
def served(source: str, name: str, directory: Path, *options: str) -> Generator[tuple[RunningProcess, str]]:
    """The application under plain uvicorn, as a process: its address."""
    (directory / "main.py").write_text(source, encoding="utf-8")
    port = free_port()
    command = [sys.executable, "-m", "uvicorn", f"main:{name}", "--port", str(port), "--ws", "websockets-sansio"]
    with RunningProcess([*command, *options], directory) as process:
        process.wait_for_error("Uvicorn running on", 60)
        yield process, f"http://127.0.0.1:{port}"


async def entries(http: httpx.AsyncClient, path: str, until: str) -> list[dict[str, Any]]:
    """Log entries from the event stream at `path`, up to the first of a kind."""
    found: list[dict[str, Any]] = []
    async with http.stream("GET", path) as stream:
        assert stream.headers["content-type"].startswith("text/event-stream")
        async for line in stream.aiter_lines():
            if line.startswith('data: {"seq"'):
                found.append(json.loads(line.removeprefix("data: ")))
                if found[-1]["kind"] == until:
                    break
    return found


async def used(url: str, prefix: str, directory: Path) -> None:
    """Everything works below the prefix: HTTP, streams, sockets, lists, health, the description, the commands."""
    async with httpx.AsyncClient(base_url=url, timeout=20) as http:
        assert (await http.get(f"{prefix}/readyz")).json() == {"status": "ready"}
        assert "convener_node_ready 1.0" in (await http.get(f"{prefix}/metrics")).text
        made = await http.post(f"{prefix}/api/conversations", json={**ALICE, "message": {"data": {"text": "hi"}}})
        assert made.status_code == 201, made.text
        log = await entries(http, f"{prefix}/api/conversations/c1/stream", "turn_done")
        assert [entry["data"] for entry in log if entry["kind"] == "reply"] == [{"text": "hi"}]
        lost = await http.get(f"{prefix}/api/nothing")
        assert (lost.status_code, lost.json()["code"]) == (404, "not_found")
        described = (await http.get(f"{prefix}/openapi.json")).json()
        assert "/api/conversations" in described["paths"]
        assert described.get("servers", []) == ([{"url": prefix}] if prefix else [])
        if prefix:
            assert (await http.get("/own")).json() == {"running": ["c1"]}
            assert (await http.get("/api/conversations/c1")).status_code == 404
    path = f"{prefix}/socket.io"
    async with (
        connected(url, ALICE, socketio_path=path) as client,
        connected(url, {"user_id": "alice"}, socketio_path=path) as follower,
    ):
        assert (await client.call("message", {"data": {"text": "ho"}}))["position"] == 2
        await client.answered(2)
        assert (await follower.until("conversation"))[0]["conversation_id"] == "c1"
    with convener("send", "c1", "from a terminal", "--url", f"{url}{prefix}", directory=directory) as command:
        assert await asyncio.to_thread(command.wait) == 0, command.errors
        assert command.output[0].startswith("accepted at position 3")


@pytest.mark.parametrize("kind", KINDS)
async def test_under_a_server_until_its_signal(kind: str, tmp_path: Path) -> None:
    source, name, prefix = KINDS[kind]
    with served(source, name, tmp_path) as (process, url):
        await used(url, prefix, tmp_path)
        # Neither an open stream nor an open socket keeps it from ending.
        async with (
            httpx.AsyncClient(base_url=url, timeout=60) as http,
            http.stream("GET", f"{prefix}/api/conversations/c1/stream") as stream,
            connected(url, ALICE, socketio_path=f"{prefix}/socket.io") as client,
        ):
            lines = stream.aiter_lines()
            await anext(lines)
            await client.until("joined")
            process.signal(signal.SIGTERM)
            async for _ in lines:
                pass
            await wait_until(lambda: not client.io.connected, "the socket is closed")
        code = await asyncio.to_thread(process.wait)
        assert code in (0, -signal.SIGTERM)
        errors = "\n".join(process.errors)
        assert "Traceback" not in errors
        assert "Application shutdown complete" in errors
        if "Starlette" in kind:
            assert process.output[0] == "opened"
            assert process.output[-1] == "closed"


@pytest.mark.parametrize(
    ("source", "name", "prefix", "options"),
    [(WITHOUT_LIFESPAN, "app", "/agents", []), (AGENT, "agents", "", ["--lifespan", "off"])],
    ids=["mounted", "alone"],
)
async def test_without_its_lifespan_it_says_so(
    source: str, name: str, prefix: str, options: list[str], tmp_path: Path
) -> None:
    with served(source, name, tmp_path, *options) as (process, url):
        async with httpx.AsyncClient(base_url=url, timeout=20) as http:
            for method, path in (("GET", "/readyz"), ("GET", "/api/conversations"), ("POST", "/api/conversations")):
                refused = await http.request(method, prefix + path)
                assert (refused.status_code, refused.headers["content-type"]) == (503, "application/problem+json")
                document = refused.json()
                assert document["code"] == "not_started"
                assert "lifespan=app.lifespan" in document["detail"]
            headers = {
                "Connection": "Upgrade",
                "Upgrade": "websocket",
                "Sec-WebSocket-Version": "13",
                "Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ==",
            }
            upgrade = await http.get(f"{prefix}/socket.io/?EIO=4&transport=websocket", headers=headers)
            assert (upgrade.status_code, upgrade.json()["code"]) == (503, "not_started")
        process.signal(signal.SIGTERM)
        await asyncio.to_thread(process.wait)
        assert "Traceback" not in "\n".join(process.errors)
        told = [line for line in [*process.output, *process.errors] if "not started" in line]
        assert len(told) == 1, told


async def test_a_server_without_answers_to_websockets_closes_them() -> None:
    sent: list[Any] = []

    async def receive() -> Any:
        return {"type": "websocket.connect"}

    async def send(message: Any) -> None:
        sent.append(message)

    await Convener()({"type": "websocket", "path": "/socket.io/", "headers": []}, receive, send)
    assert sent == [{"type": "websocket.close", "code": 1011}]


# --- what cannot be -------------------------------------------------------------------------------------------


def test_it_is_mounted_once() -> None:
    app, one = Convener(Settings()), FastAPI()
    app.mount_on(one)
    for other in (one, Starlette()):
        with pytest.raises(ConfigurationError, match="mounted already, at /agents"):
            app.mount_on(other, path="/more")
    assert len([route for route in one.routes if getattr(route, "app", None) is app]) == 1


@pytest.mark.parametrize("path", ["", "agents"])
def test_a_path_begins_with_a_slash(path: str) -> None:
    app = Convener(Settings())
    with pytest.raises(ConfigurationError, match="path"):
        app.mount_on(Starlette(), path)
    app.mount_on(Starlette(), "/agents")


async def test_it_runs_once_at_a_time_and_again_after_its_end() -> None:
    app = Convener(Settings())
    for _ in range(2):
        async with app.lifespan(None):
            assert await app.manager.get_running_agent_loops() == set()
            with pytest.raises(ConfigurationError, match="runs already"):
                async with app.lifespan(None):
                    pass
            with pytest.raises(ConfigurationError, match="fixed"):
                app.configure(Settings())
        with pytest.raises(ConfigurationError, match="not started"):
            _ = app.manager


async def test_a_lifespan_that_fails_leaves_nothing_running() -> None:
    app = Convener(Settings(auth="hook"))
    with pytest.raises(ConfigurationError, match="authenticate"):
        async with app.lifespan(None):
            pass
    with pytest.raises(ConfigurationError, match="not started"):
        _ = app.manager


async def test_two_applications_with_one_node_each() -> None:
    """Two `Convener`s in one process are two nodes, each below its own path."""
    one, other = Convener(Settings()), Convener(Settings())

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncGenerator[None]:
        async with one.lifespan(app), other.lifespan(app):
            yield

    api = FastAPI()
    one.mount_on(api, "/one")
    other.mount_on(api, "/other/")
    async with lifespan(api), listening(api) as url:
        async with httpx.AsyncClient(base_url=url) as http:
            assert (await http.post("/one/api/conversations", json=ALICE)).status_code == 201
            assert (await http.get("/other/api/conversations/c1")).status_code == 404
            assert (await http.post("/other/api/conversations", json=ALICE)).status_code == 201
        for prefix in ("/one", "/other"):
            async with connected(url, ALICE, socketio_path=f"{prefix}/socket.io") as client:
                await client.until("joined")


async def test_at_the_root() -> None:
    app, api = Convener(Settings()), FastAPI()
    api.get("/own")(lambda: {"own": True})
    app.mount_on(api, "/")
    async with app.lifespan(api), listening(api) as url:
        async with httpx.AsyncClient(base_url=url) as http:
            assert (await http.get("/own")).json() == {"own": True}
            assert (await http.get("/readyz")).json() == {"status": "ready"}
        async with connected(url, ALICE) as client:
            await client.until("joined")
