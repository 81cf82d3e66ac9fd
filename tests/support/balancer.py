"""A small TCP load balancer in a test's hands: new connections go to nodes that say that they are ready, in turn."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from types import TracebackType
from typing import Final, Self
from urllib.parse import urlsplit

from tests.support.cluster import Cluster

_CHUNK: Final = 65536
_PROBE_LIMIT: Final = 2.0


class Balancer:
    """Listens on a port of its own and passes each connection on to a node.

    A node is asked for its readiness (``/readyz``) when a connection comes, so none goes to a node that has said that
    it leaves. A connection for which nobody is ready is reset, as one to a port on which nobody listens.

    Attributes:
        only: if set, the only node that is asked.
        passed: node → how many connections it was given.
        turned_away: connections for which nobody was ready.
    """

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._next = 0
        self.only: int | None = None
        self.passed = Counter[int]()
        self.turned_away = 0
        self.port = 0

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._server is not None
        self._server.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    @property
    def url(self) -> str:
        """Where clients connect to; what is mounted at the nodes is below the same path here."""
        return f"http://127.0.0.1:{self.port}{self._cluster.prefix}"

    async def is_ready(self, index: int) -> bool:
        """Whether the node says now that it may receive traffic."""
        node = self._cluster.nodes[index]
        if not node.url or not node.running:
            return False
        address = urlsplit(node.url)
        writer: asyncio.StreamWriter | None = None
        try:
            async with asyncio.timeout(_PROBE_LIMIT):
                reader, writer = await asyncio.open_connection(address.hostname, address.port)
                request = f"GET {address.path}/readyz HTTP/1.1\r\nHost: {address.netloc}\r\nConnection: close\r\n\r\n"
                writer.write(request.encode())
                return (await reader.readline()).split()[1:2] == [b"200"]
        except (OSError, TimeoutError):
            return False
        finally:
            if writer is not None:
                writer.transport.abort()

    async def _choose(self) -> int | None:
        if self.only is not None:
            return self.only if await self.is_ready(self.only) else None
        count = len(self._cluster.nodes)
        self._next += 1
        for index in range(self._next, self._next + count):
            if await self.is_ready(index % count):
                return index % count
        return None

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            # Cancelled at the end of a test: this task belongs to nobody who would mind.
            with contextlib.suppress(OSError, asyncio.CancelledError):
                chosen = await self._choose()
                if chosen is None:
                    self.turned_away += 1
                else:
                    self.passed[chosen] += 1
                    await self._pass(chosen, reader, writer)
        finally:
            writer.transport.abort()
            self._tasks.discard(task)

    async def _pass(self, chosen: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        address = urlsplit(self._cluster.nodes[chosen].url)
        node_reader, node_writer = await asyncio.open_connection(address.hostname, address.port)
        try:
            # Whoever has said everything may still be answered: the end of one direction is passed on by itself.
            async with asyncio.TaskGroup() as both:
                both.create_task(_copy(reader, node_writer))
                both.create_task(_copy(node_reader, writer))
        except ExceptionGroup as errors:
            if errors.split(OSError)[1] is not None:
                raise
        finally:
            node_writer.transport.abort()


async def _copy(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
    while data := await source.read(_CHUNK):
        sink.write(data)
        await sink.drain()
    sink.write_eof()
    await sink.drain()
