"""The world outside: agents tell it of everything that they do, and it counts, and holds whom it is told to hold."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

from tests.cluster.windows import Director, Window


@dataclass(frozen=True)
class Call:
    """A step's function was called. `serial` is what it returned: no two calls have the same."""

    serial: int
    cid: str
    turn: str
    attempt: int
    epoch: int
    name: str
    number: int
    key: str


class Recorder:
    """A server for the agents of `apps/recorded.py`.

    Args:
        node_of: index of the node with that process id.

    Attributes:
        calls: every call of a step's function, in order.
    """

    def __init__(self, director: Director, node_of: Callable[[int], int]) -> None:
        self._director = director
        self._node_of = node_of
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self.calls: list[Call] = []
        self.reached: set[tuple[str, str, int, int]] = set()
        """(conversation, turn, attempt, place) of every pause that an attempt has come to."""
        self.port = 0

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
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

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            # Nobody minds an agent that is gone, nor this task when the test ends.
            with contextlib.suppress(OSError, asyncio.CancelledError):
                line = await reader.readline()
                if line:
                    writer.write(json.dumps(await self._answer(json.loads(line), reader)).encode() + b"\n")
                    await writer.drain()
        finally:
            writer.close()
            self._tasks.discard(task)

    async def _answer(self, said: dict[str, Any], reader: asyncio.StreamReader) -> int:
        cid, turn, attempt = said["cid"], said["turn"], said["attempt"]
        if said["what"] == "flow":
            await self._unless_gone(self._director.flowed(cid, turn, attempt, said["offset"]), reader)
            return 0
        serial, window, at = 0, Window.BETWEEN_STEPS, said.get("place")
        if said["what"] == "step":
            serial, window, at = len(self.calls) + 1, Window.IN_STEP, (said["name"], said["number"])
            self.calls.append(
                Call(serial, cid, turn, attempt, said["epoch"], said["name"], said["number"], said["key"])
            )
        else:
            self.reached.add((cid, turn, attempt, said["place"]))
        plan = self._director.stop_at(self._node_of(said["pid"]), cid, turn, window, at)
        if plan is not None and not await self._unless_gone(plan.over.wait(), reader):
            self._director.gave_up(plan)
        return serial

    @staticmethod
    async def _unless_gone(wait: Any, reader: asyncio.StreamReader) -> bool:
        """Wait, but not for somebody who has hung up. False if he has."""
        waiting, gone = asyncio.ensure_future(wait), asyncio.ensure_future(reader.read(1))
        try:
            await asyncio.wait({waiting, gone}, return_when=asyncio.FIRST_COMPLETED)
            return waiting.done()
        finally:
            waiting.cancel()
            gone.cancel()
            await asyncio.gather(waiting, gone, return_exceptions=True)
