"""A real node for the gateway's tests: a standalone manager over a memory store behind a `Gateway`.

`running` gives it without a server, for plain HTTP; `serving` puts uvicorn before it, for sockets and streams.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator, Mapping
from contextlib import asynccontextmanager, contextmanager, nullcontext
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import httpx
import uvicorn
from prometheus_client.parser import text_string_to_metric_families

from convener.gateway.access import AuthorizeHook
from convener.gateway.asgi import Gateway
from convener.gateway.auth import AuthenticateHook
from convener.gateway.operations import Operations
from convener.gateway.socketio import Transport, make_server
from convener.manager.context import NodeOptions
from convener.manager.conversation import Conversation
from convener.manager.standalone import StandaloneConversationManager
from convener.manager.turn import Turn
from convener.settings import Settings
from convener.store.memory import MemoryStore
from convener.telemetry.metrics import Metrics

MAX_PAYLOAD = 4096


COLOUR: dict[str, Any] = {"enum": ["red", "green"]}
"""What `/ask` takes for an answer."""


class Echo:
    """Answers with what it was told; `/wait` is answered when `go` is set, `/ask` with the answer to a question."""

    def __init__(self) -> None:
        self.go = asyncio.Event()

    async def run(self, turn: Turn) -> None:
        if turn.text == "/wait":
            await self.go.wait()
        if turn.text == "/ask":
            await turn.reply(await turn.ask({"text": "Which colour?"}, schema=COLOUR, timeout=3600))
        else:
            await turn.reply(turn.data)

    @property
    def methods(self) -> Mapping[str, Callable[[Conversation, Any], Awaitable[Any]]]:
        return {"double": self._double, "crash": self._crash, "wait": self._wait}

    async def limit(self, user_id: str) -> int | None:
        return None

    async def _double(self, conversation: Conversation, params: Any) -> Any:
        return params * 2

    async def _crash(self, conversation: Conversation, params: Any) -> Any:
        raise RuntimeError("asked to crash")

    async def _wait(self, conversation: Conversation, params: Any) -> Any:
        await self.go.wait()
        return "waited"


@dataclass
class Node:
    """One running node and the ways to it. `http` needs no server; `url` is set where there is one."""

    gateway: Gateway
    manager: StandaloneConversationManager
    metrics: Metrics
    agent: Echo
    sio: Any
    http: httpx.AsyncClient
    url: str = ""

    def metric(self, name: str, **labels: str) -> float:
        """The value of a sample, 0 if it does not exist yet."""
        for family in text_string_to_metric_families(self.metrics.render().decode()):
            for sample in family.samples:
                if sample.name == name and sample.labels == labels:
                    return sample.value
        return 0.0

    async def is_ready(self) -> bool:
        """Whether /readyz says so."""
        return (await self.http.get("/readyz")).json() == {"status": "ready"}


@asynccontextmanager
async def running(
    *,
    settings: Mapping[str, Any] | None = None,
    operations: Callable[[StandaloneConversationManager], Operations] | None = None,
    authenticate: AuthenticateHook | None = None,
    authorize: AuthorizeHook | None = None,
    transports: tuple[Transport, ...] = ("websocket",),
    prefix: str = "",
) -> AsyncGenerator[Node]:
    """A node without a server."""
    values: dict[str, Any] = {"max_payload_bytes": MAX_PAYLOAD, **(settings or {})}
    chosen = Settings(**values)
    metrics, sio, agent = Metrics(), make_server(chosen, transports), Echo()
    manager = StandaloneConversationManager(
        sio=sio,
        config=SimpleNamespace(max_concurrent_conversations=chosen.max_concurrent_conversations),
        agent=agent,
        store=MemoryStore(),
        options=NodeOptions(
            name="n1",
            max_payload_bytes=chosen.max_payload_bytes,
            max_pending_messages=chosen.max_pending_messages,
            limit_policy=chosen.limit_policy,
            overlap_policy=chosen.overlap_policy,
            drain_timeout=1.0,
        ),
        metrics=metrics,
    )
    gateway = Gateway(
        manager,
        operations(manager) if operations is not None else manager,
        chosen,
        metrics,
        sio=sio,
        authenticate=authenticate,
        authorize=authorize,
        prefix=prefix,
    )
    transport = httpx.ASGITransport(gateway)
    async with gateway.running(), httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as http:
        yield Node(gateway, manager, metrics, agent, sio, http)
        agent.go.set()


class _Server(uvicorn.Server):
    """uvicorn without its signal handlers: the test process has its own."""

    @contextmanager
    def capture_signals(self) -> Generator[None]:
        with nullcontext():
            yield


@asynccontextmanager
async def serving(**options: Any) -> AsyncGenerator[Node]:
    """A node behind uvicorn on a free port."""
    async with running(**options) as node, listening(node.gateway) as url:
        node.url = url
        yield node
        await node.gateway.begin_shutdown()


@asynccontextmanager
async def listening(app: Any) -> AsyncGenerator[str]:
    """Serve `app` by uvicorn in this event loop; yields the address."""
    listener = socket.create_server(("127.0.0.1", 0))
    config = uvicorn.Config(app, lifespan="off", ws="websockets-sansio", log_config=None, timeout_graceful_shutdown=5)
    server = _Server(config)
    task = asyncio.create_task(server.serve(sockets=[listener]))
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        await task
        listener.close()
