"""A TCP proxy that misbehaves on demand: the network between a client and its server, in a test's hands."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

import hiredis

_CHUNK = 65536


class Passage:
    """One connection through the proxy."""

    def __init__(self, client: asyncio.StreamWriter, server: asyncio.StreamWriter) -> None:
        self.sent = bytearray()
        """The first kilobytes that the client sent: tells what kind of connection it is."""
        self.pieces = 0
        """How many pieces the client's data came in."""
        self.open = asyncio.Event()
        self.open.set()
        self._ends = (client, server)

    @property
    def subscribes(self) -> bool:
        """Whether the client subscribed to anything."""
        return b"SSUBSCRIBE" in self.sent

    def to_client(self, data: bytes) -> None:
        """Say something that the server did not say."""
        self._ends[0].write(data)

    def to_server(self, data: bytes) -> None:
        """Say something that the client did not say."""
        self._ends[1].write(data)

    def cut(self) -> None:
        """Reset both ends."""
        for end in self._ends:
            end.transport.abort()


def _all(_: Passage) -> bool:
    return True


Rewrite = Callable[[list[bytes]], bytes]
"""From a command, as its words, to what the server is told instead."""


def packed(*words: bytes | str) -> bytes:
    """A command as it is sent."""
    out = bytearray(b"*%d\r\n" % len(words))
    for word in words:
        data = word.encode() if isinstance(word, str) else word
        out += b"$%d\r\n%b\r\n" % (len(data), data)
    return bytes(out)


class _Commands:
    """Cuts what a client of Redis says into commands, and rewrites each."""

    def __init__(self, rewrite: Rewrite) -> None:
        self._rewrite = rewrite
        self._reader = hiredis.Reader(notEnoughData=None)

    def __call__(self, data: bytes) -> bytes:
        self._reader.feed(data)
        out = bytearray()
        while True:
            command: Any = self._reader.gets()
            if command is None:
                return bytes(out)
            out += self._rewrite(command)


class Proxy:
    """Forwards connections from `port` to a server.

    `freeze` holds everything back, in both directions, while connections stay up: a half-open link. `cut` resets
    connections. `delay` holds each piece back for some seconds. `accepting` False closes new connections at once.

    Args:
        rewrite: is asked about each command of Redis's protocol; without it bytes pass as they are.
    """

    def __init__(self, port: int, host: str = "127.0.0.1", rewrite: Rewrite | None = None) -> None:
        self._target = host, port
        self._rewrite = rewrite
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self.passages: list[Passage] = []
        self.delay = 0.0
        self.accepting = True
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
        self.cut()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    @property
    def url(self) -> str:
        """The proxied server's Redis URL."""
        return f"redis://127.0.0.1:{self.port}/0"

    def freeze(self, which: Callable[[Passage], bool] = _all) -> list[Passage]:
        """Hold back what the chosen connections say; returns them."""
        chosen = [passage for passage in self.passages if which(passage)]
        for passage in chosen:
            passage.open.clear()
        return chosen

    def thaw(self) -> None:
        """Let everything through again, what was held back first."""
        for passage in self.passages:
            passage.open.set()

    def cut(self, which: Callable[[Passage], bool] = _all) -> None:
        """Reset the chosen connections."""
        for passage in [p for p in self.passages if which(p)]:
            passage.cut()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            if self.accepting:
                # Cancelled at the end of a test: this task belongs to nobody who would mind.
                with contextlib.suppress(OSError, asyncio.CancelledError):
                    await self._pass(reader, writer)
        finally:
            writer.transport.abort()
            self._tasks.discard(task)

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        server_reader, server_writer = await asyncio.open_connection(*self._target)
        passage = Passage(writer, server_writer)
        self.passages.append(passage)
        try:
            pumps = [
                asyncio.create_task(self._pump(passage, reader, server_writer, passage.sent)),
                asyncio.create_task(self._pump(passage, server_reader, writer, None)),
            ]
            self._tasks.update(pumps)
            try:
                await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for pump in pumps:
                    pump.cancel()
                await asyncio.gather(*pumps, return_exceptions=True)
                self._tasks.difference_update(pumps)
        finally:
            self.passages.remove(passage)
            server_writer.transport.abort()

    async def _pump(
        self, passage: Passage, source: asyncio.StreamReader, sink: asyncio.StreamWriter, kept: bytearray | None
    ) -> None:
        commands = _Commands(self._rewrite) if kept is not None and self._rewrite is not None else None
        with contextlib.suppress(OSError):
            while data := await source.read(_CHUNK):
                if kept is not None:
                    passage.pieces += 1
                    if len(kept) < _CHUNK:
                        kept += data
                if commands is not None:
                    data = commands(data)
                await passage.open.wait()
                if self.delay:
                    await asyncio.sleep(self.delay)
                sink.write(data)
                await sink.drain()


class ProxyThread:
    """A `Proxy` with an event loop of its own, for what outlives a test's: processes that connect through it."""

    def __init__(self, port: int) -> None:
        self._proxy = Proxy(port)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="proxy", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        asyncio.run_coroutine_threadsafe(self._proxy.__aenter__(), self._loop).result(10)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        asyncio.run_coroutine_threadsafe(self._proxy.__aexit__(None, None, None), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()

    @property
    def url(self) -> str:
        """The proxied server's Redis URL."""
        return self._proxy.url

    def do(self, what: Callable[[Proxy], object]) -> None:
        """Do something with the proxy, in its own thread, and wait until that is done."""

        async def work() -> None:
            what(self._proxy)

        asyncio.run_coroutine_threadsafe(work(), self._loop).result(10)

    def behave(self) -> None:
        """Let everything through again, at once."""

        def at_once(proxy: Proxy) -> None:
            proxy.delay, proxy.accepting = 0.0, True
            proxy.thaw()

        self.do(at_once)
