"""Nodes that leave, behind a load balancer, and what has to be true whoever has left."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import signal
from collections import Counter
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import httpx
from socketio.exceptions import ConnectionError as SocketConnectionError
from socketio.exceptions import SocketIOError

from tests.cluster.checks import check_answered
from tests.cluster.clients import Client, Clients, RejectedError
from tests.cluster.talking import PASSING, Api, talking
from tests.support.balancer import Balancer
from tests.support.cluster import Cluster, Launcher
from tests.support.jsclient import JavaScriptClient, javascript_client
from tests.support.servers import Flavour, Server
from tests.support.stored import Stored
from tests.support.waiting import TIME_SCALE, wait_until

LEAVING: Final = (Path(__file__).parent / "apps" / "leaving.py").read_text()

_IN_FASTAPI: Final = """
from fastapi import FastAPI

from agent_under_test import app as agents

app = FastAPI(lifespan=agents.lifespan)
agents.mount_on(app, path="/agents")
"""

KINDS: Final[Mapping[str, Launcher | None]] = {
    "serve": None,
    "uvicorn": Launcher(("uvicorn", "agent_under_test:app", "--port", "{port}")),
    "fastapi": Launcher(("uvicorn", "inside:app", "--port", "{port}"), "/agents", {"inside": _IN_FASTAPI}),
    "gunicorn": Launcher(
        (
            *("gunicorn", "agent_under_test:app", "--bind", "127.0.0.1:{port}", "--graceful-timeout", "60"),
            *("--worker-class", "uvicorn_worker.UvicornWorker", "--no-control-socket"),
        )
    ),
}
"""The servers under which nodes drain. The middle two end as uvicorn does, by the signal that they were sent."""

ENDS_WELL: Final = {"serve": 0, "uvicorn": -signal.SIGTERM, "fastapi": -signal.SIGTERM, "gunicorn": 0}


@dataclass(eq=False)
class Stream:
    """Server-Sent Events of one conversation, read to their end.

    Attributes:
        shown: every event, as (name, payload).
        over: the response has ended, as a whole one does.
    """

    shown: list[tuple[str, Any]] = field(default_factory=list[tuple[str, Any]])
    over: bool = False

    async def read(self, http: httpx.AsyncClient, url: str) -> None:
        """Read until the server ends it."""
        name = ""
        async with http.stream("GET", url, timeout=httpx.Timeout(15 * TIME_SCALE, read=None)) as answer:
            assert answer.status_code == 200
            async for line in answer.aiter_lines():
                word, _, rest = line.partition(": ")
                if word == "event":
                    name = rest
                elif word == "data":
                    self.shown.append((name, json.loads(rest)))
        self.over = True

    def named(self, name: str) -> list[Any]:
        """Payloads of all events of one name."""
        return [payload for event, payload in self.shown if event == name]


class Person:
    """Somebody who talks to a conversation through a stock client, and sends again what was not acknowledged.

    Attributes:
        resends: messages that were sent once more because the connection had gone.
        rejected: messages that a node refused for now.
    """

    def __init__(self, client: Client, api: Api) -> None:
        self.client = client
        self._api = api
        self.resends = 0
        self.rejected = Counter[str]()

    async def send(self, text: str) -> None:
        """Send a message under an id, until it is accepted."""
        sent = self._api.sent[self.client.cid]
        ident = f"{self.client.cid}.{len(sent) + 1}"
        sent[ident] = text
        await wait_until(lambda: self._try(text, ident), f"{ident} is accepted by socket", 60)
        self._api.accepted += 1

    async def _try(self, text: str, ident: str) -> bool:
        client, lost = self.client, len(self.client.closes)
        if not client.sio.connected:
            return False
        # The library waits for an answer although the connection has gone.
        call = asyncio.create_task(client.say(text, ident))
        try:
            await wait_until(lambda: call.done() or len(client.closes) > lost, f"{ident} is answered or lost", 60)
            if call.done():
                call.result()
                return True
        except RejectedError as error:
            if error.answer["code"] not in PASSING:
                raise
            self.rejected[error.answer["code"]] += 1
            return False
        except SocketIOError:
            pass
        finally:
            call.cancel()
            await asyncio.gather(call, return_exceptions=True)
        self.resends += 1
        return False


class Scene:
    """A cluster, a balancer before it, and people who talk to it."""

    def __init__(self, cluster: Cluster, balancer: Balancer, api: Api, clients: Clients, stack: AsyncExitStack) -> None:
        assert cluster.stored is not None
        self.cluster = cluster
        self.balancer = balancer
        self.api = api
        self.clients = clients
        self.stored: Stored = cluster.stored
        self._stack = stack
        self._reading = list[asyncio.Task[None]]()
        stack.push_async_callback(self._end_reading)

    async def _end_reading(self) -> None:
        for task in self._reading:
            task.cancel()
        await asyncio.gather(*self._reading, return_exceptions=True)

    # -- people ----------------------------------------------------------------------------------------------------

    async def python(self, cid: str, node: int | None = None, **hello: Any) -> Client:
        """python-socketio's client, through the balancer; with `node`, its first connection goes there."""
        url, path = f"http://127.0.0.1:{self.balancer.port}", self.cluster.prefix
        with self._only(node):
            return await self.clients.join(url, cid, comes_back=True, path=path, user_id=user_of(cid), **hello)

    async def person(self, cid: str) -> Person:
        """Somebody who joins through the balancer, again if the node that was chosen leaves at that moment."""

        async def attempt() -> Client:
            return await self.python(cid)

        joined = await wait_until(attempt, f"{cid} is joined", 60, retry_on=SocketConnectionError)
        return Person(joined, self.api)

    async def create(self, cid: str, rng: random.Random) -> None:
        """Make a conversation at any node, again if that one leaves at that moment."""

        async def attempt() -> bool:
            url = self.cluster.url(rng.choice(self.cluster.live()))
            body = {"conversation_id": cid, "user_id": user_of(cid)}
            answer = await self.api.http.post(f"{url}/api/conversations", json=body)
            if answer.status_code in (200, 201):
                return True
            assert answer.json()["code"] in PASSING, answer.text
            return False

        await wait_until(attempt, f"{cid} is made", 60, retry_on=httpx.TransportError)

    async def call_somewhere(self, cid: str, rng: random.Random, method: str, params: Any) -> Any:
        """Call a method at any node, until it is answered; returns its result."""

        async def attempt() -> list[Any]:
            answer = await self.call(cid, rng.choice(self.cluster.live()), method, params)
            if answer.status_code == 200:
                return [answer.json()["result"]]
            assert answer.json()["code"] in PASSING, answer.text
            return []

        return (await wait_until(attempt, f"{method} of {cid} is answered", 60, retry_on=httpx.TransportError))[0]

    async def javascript(self, cid: str, node: int | None = None) -> JavaScriptClient:
        """The stock JavaScript client, likewise."""
        options = ("--user", user_of(cid), "--path", f"{self.cluster.prefix}/socket.io/")
        with self._only(node):
            made = await self._stack.enter_async_context(
                javascript_client(f"http://127.0.0.1:{self.balancer.port}", cid, *options)
            )
            await made.until("joined", lambda: made.of("joined"))
        return made

    @contextlib.contextmanager
    def _only(self, node: int | None) -> Any:
        before, self.balancer.only = self.balancer.only, node if node is not None else self.balancer.only
        try:
            yield
        finally:
            self.balancer.only = before

    async def stream(self, cid: str, node: int) -> Stream:
        """Somebody who reads a conversation's events from one node."""
        made = Stream()
        url = f"{self.cluster.url(node)}/api/conversations/{cid}/stream"
        self._reading.append(asyncio.create_task(made.read(self.api.http, url)))
        await wait_until(lambda: made.named("joined"), f"the stream of {cid} goes")
        return made

    async def start(self, cid: str, node: int) -> None:
        """Let a node own a conversation."""
        await self.api.start(self.cluster.url(node), cid, user_of(cid))

    async def call(self, cid: str, node: int, method: str, params: Any) -> httpx.Response:
        """Call a method of a conversation at a node."""
        url = f"{self.cluster.url(node)}/api/conversations/{cid}/rpc/{method}"
        return await self.api.http.post(url, json={"params": params, "timeout": 120}, timeout=120)

    async def answer(self, cid: str, node: int, ask_id: str, data: Any) -> None:
        """Answer a question at a node."""
        url = f"{self.cluster.url(node)}/api/conversations/{cid}/answer"
        answer = await self.api.http.post(url, json={"ask_id": ask_id, "data": data})
        assert answer.status_code == 202, answer.text

    # -- looking ---------------------------------------------------------------------------------------------------

    async def begun(self, cid: str, position: int) -> None:
        """Return when the turn of the message at `position` has begun."""
        await wait_until(
            lambda: any(e.kind == "turn_started" and e.turn == f"t{position}" for e in self.stored.log(cid)),
            f"turn {position} of {cid} has begun",
        )

    async def unready(self, node: int) -> None:
        """Return when the node says that it may receive no traffic."""

        async def says_so() -> bool:
            return not await self.balancer.is_ready(node)

        await wait_until(says_so, f"n{node} is unready")

    async def ended(self, node: int, limit: float = 60) -> int:
        """The exit code of a node that was told to end."""
        return await asyncio.to_thread(self.cluster.wait_ended, node, limit)

    async def at_rest(self, cid: str, *watchers: Client | JavaScriptClient) -> list[dict[str, Any]]:
        """The log when all is answered, which is what everybody was shown."""
        events = await self.api.answered(cid)
        for watcher in watchers:
            await self.sees(watcher, events)
        return events

    @staticmethod
    async def sees(watcher: Client | JavaScriptClient, events: Sequence[dict[str, Any]]) -> None:
        """A client was shown exactly this, without gaps and repeats, and was never told to begin anew."""
        if isinstance(watcher, Client):
            await watcher.wait_seq(events[-1]["seq"])
            assert watcher.events == events, watcher.name
            assert watcher.named("resync") == []
        else:
            await watcher.until("seen it all", lambda: len(watcher.of("event")) >= len(events))
            assert watcher.of("event") == events
            assert watcher.of("resync") == []

    async def check(self, cid: str, *watchers: Client | JavaScriptClient) -> list[dict[str, Any]]:
        """Every accepted message is in the log once and answered once, and everybody has seen that."""
        events = await self.at_rest(cid, *watchers)
        check_answered(events, self.api.sent[cid])
        return events


def user_of(cid: str) -> str:
    """Whose conversation it is."""
    return f"user-of-{cid}"


@asynccontextmanager
async def scene(
    *,
    kind: str = "serve",
    nodes: int = 3,
    flavour: Flavour = "valkey",
    app: str = LEAVING,
    detours: Mapping[int, str] = {},
    server: Server | None = None,
    code: Path | None = None,
    **settings: object,
) -> AsyncGenerator[Scene]:
    """Nodes of a kind, and everything inspected at the end: all is settled, the auditor finds nothing, and without the
    conversations nothing of them is left in the store.
    """
    async with AsyncExitStack() as stack:
        if server is None:
            server = stack.enter_context(Server(flavour))
        settings = {"lease_ttl": 4} | settings
        cluster = Cluster(server, nodes, app=app, settings=settings, detours=detours, launcher=KINDS[kind], code=code)
        stack.push_async_callback(asyncio.to_thread, cluster.close)
        await asyncio.to_thread(cluster.__enter__)
        balancer = await stack.enter_async_context(Balancer(cluster))
        api = await stack.enter_async_context(
            talking(lambda: [cluster.url(index) for index in cluster.live()], random.Random(0))
        )
        clients = Clients()
        stack.push_async_callback(clients.aclose)
        try:
            yield Scene(cluster, balancer, api, clients, stack)
            await asyncio.to_thread(inspect, cluster)
        except BaseException as error:
            error.add_note(await asyncio.to_thread(cluster.report, str(error)))
            raise


def inspect(cluster: Cluster) -> None:
    """See `scene`. Ended nodes are started again first: a cluster without nodes settles nothing."""
    cluster.heal()
    cluster.settle()
    cluster.agree()
    cluster.audit()
    cluster.erase_everything()
