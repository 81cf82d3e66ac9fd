"""The stock JavaScript client (tests/js/client.mjs) as a child process."""

from __future__ import annotations

import asyncio
import json
import shutil
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final

from tests.support.waiting import wait_until

FOLDER: Final = Path(__file__).parent.parent / "js"


def missing() -> str | None:
    """What the client needs and this machine lacks, None if it can run."""
    if shutil.which("node") is None:
        return "Node.js is not installed"
    if not (FOLDER / "node_modules" / "socket.io-client").is_dir():
        return "tests/js has no node_modules: run `npm ci` there"
    return None


class LostError(AssertionError):
    """What was sent got no acknowledgement; the message says why."""


class JavaScriptClient:
    """One running client.

    Attributes:
        lines: everything it has printed.
        times: when, in seconds of the monotonic clock.
    """

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process
        self._numbers = iter(range(1, 1_000_000))
        self.lines: list[dict[str, Any]] = []
        self.times: list[float] = []

    async def read(self) -> None:
        """Keep what it prints, until it ends."""
        assert self._process.stdout is not None
        async for line in self._process.stdout:
            self.lines.append(json.loads(line))
            self.times.append(time.monotonic())

    @property
    def marks(self) -> list[tuple[float, str]]:
        """When a connection was `closed`, one was `refused` or not made, one was `connected`."""
        words = {"disconnect": "closed", "connect_error": "refused", "connect": "connected"}
        pairs = zip(self.lines, self.times, strict=True)
        return [(at, words[line["event"]]) for line, at in pairs if line.get("event") in words]

    def of(self, event: str) -> list[Any]:
        """Payloads of one event."""
        return [line["data"] for line in self.lines if line.get("event") == event]

    async def until(self, what: str, predicate: Callable[[], Any]) -> Any:
        """Wait until something was printed."""
        return await wait_until(predicate, f"the JavaScript client has {what}; it has {self.lines[-5:]}")

    async def call(self, event: str, data: Any) -> Any:
        """Send an event and return its acknowledgement. Raises `LostError` if there will be none."""
        number = next(self._numbers)
        assert self._process.stdin is not None
        command = {"emit": event, "data": data, "id": number}
        self._process.stdin.write(json.dumps(command).encode() + b"\n")
        await self._process.stdin.drain()
        (line,) = await self.until(
            f"the answer to {event}", lambda: [line for line in self.lines if line.get("ack") == number]
        )
        if "error" in line:
            raise LostError(line["error"])
        return line["data"]

    async def close(self) -> int:
        """Let it disconnect and end; returns its exit code."""
        if self._process.stdin is not None:
            self._process.stdin.close()
        return await asyncio.wait_for(self._process.wait(), 20)


@asynccontextmanager
async def javascript_client(url: str, conversation_id: str, *options: str) -> AsyncGenerator[JavaScriptClient]:
    """Start a client; what it printed and whether it ended well is the test's to look at."""
    process = await asyncio.create_subprocess_exec(
        "node",
        str(FOLDER / "client.mjs"),
        url,
        conversation_id,
        *options,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        # A history can hold long lines.
        limit=64 * 1024 * 1024,
    )
    client = JavaScriptClient(process)
    reading = asyncio.create_task(client.read())
    try:
        yield client
        await client.close()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
        await reading
