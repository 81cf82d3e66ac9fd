"""A cluster on this machine: perhaps a Valkey, and some nodes, as children of this process."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import httpx

from convener.cli.failures import CommandFailed
from convener.cli.up.joblog import JobLog
from convener.cli.up.keeper import Job, Keeper
from convener.cli.up.valkey import EmbeddedValkey
from convener.cli.up.watch import changed, next_change, snapshot

# Longest start of a node that is not broken; agents import large libraries.
_START_LIMIT: Final = 120.0
_STORE_START_LIMIT: Final = 60.0
_STORE_PATIENCE: Final = 10.0
# On top of the drain: uvicorn closes connections, the interpreter ends.
_EXIT_TIME: Final = 10.0
_PROBE_LIMIT: Final = 2.0
_ANY_ADDRESS: Final = {"0.0.0.0": "127.0.0.1", "::": "::1"}


@dataclass(frozen=True)
class Plan:
    """What to start.

    Attributes:
        app: the application, as ``module:attribute``.
        host: address that the nodes listen on.
        ports: one per node.
        store_url: of the store that they share; may hold a password.
        store_shown: the same without it.
        valkey: the server behind that URL if it is ours to run.
        lock: descriptor that says that somebody runs here.
        drain_timeout: seconds that a node may take to finish its work.
        reload: restart nodes when Python files under the working directory change.
    """

    app: str
    host: str
    ports: list[int]
    store_url: str
    store_shown: str | None
    valkey: EmbeddedValkey | None
    lock: int
    drain_timeout: float
    reload: bool

    def url(self, port: int) -> str:
        """Where a client on this machine reaches the node on `port`."""
        host = _ANY_ADDRESS.get(self.host, self.host.strip("[]"))
        return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class Cluster:
    """Starts everything, keeps it running until it is told to stop, and leaves nothing behind."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        names = [
            "up",
            *(["valkey"] if plan.valkey else []),
            *(f"node-{i + 1}" for i in range(len(plan.ports))),
        ]
        self._log = JobLog(names)
        self._stop = asyncio.Event()
        self._hurry = asyncio.Event()
        self._http = httpx.AsyncClient(timeout=_PROBE_LIMIT, trust_env=False)
        self._store = Keeper(self._store_job(plan.valkey), self._log) if plan.valkey else None
        self._nodes = [Keeper(self._node_job(i + 1, port), self._log) for i, port in enumerate(plan.ports)]
        self._tasks: dict[asyncio.Task[None], Keeper] = {}

    async def run(self) -> None:
        """Run until SIGINT, SIGTERM or SIGHUP; a second one ends everything at once.

        Raises:
            CommandFailed: something did not start; everything else has been ended by then.
        """
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            loop.add_signal_handler(number, self._on_signal)
        try:
            if await self._start() and self._plan.reload:
                await self._until_stopped(self._reload())
            await self._until_stopped(self._stop.wait())
        finally:
            await self._end()
            await self._http.aclose()

    def _on_signal(self) -> None:
        if self._stop.is_set():
            self._hurry.set()
        elif self._tasks:
            self._say("stopping; press Ctrl-C again to kill")
        self._stop.set()

    async def _start(self) -> bool:
        """Start all and print the ready line; false if told to stop before."""
        if self._store is None:
            self._say(f"using the store at {self._plan.store_shown}")
        elif not await self._until_ready([self._store], _STORE_START_LIMIT):
            return False
        if not await self._until_ready(self._nodes, _START_LIMIT):
            return False
        print(f"ready {self._plan.url(self._plan.ports[0])}", flush=True)
        return True

    async def _until_ready(self, keepers: list[Keeper], limit: float) -> bool:
        for keeper in keepers:
            self._tasks[asyncio.create_task(keeper.run(), name=keeper.job.name)] = keeper
        waits = {asyncio.ensure_future(keeper.wait_ready()): keeper for keeper in keepers}

        async def all_ready() -> None:
            _, late = await asyncio.wait(waits, timeout=limit)
            if late:
                names = ", ".join(sorted(waits[task].job.name for task in late))
                raise CommandFailed(f"not ready within {limit:g} s: {names}")

        try:
            return await self._until_stopped(all_ready())
        finally:
            for task in waits:
                task.cancel()

    async def _until_stopped(self, work: Coroutine[Any, Any, object]) -> bool:
        """Await `work`; false if a signal came first. A job that fails for good raises its error here."""
        task = asyncio.ensure_future(work)
        stop = asyncio.ensure_future(self._stop.wait())
        try:
            done, _ = await asyncio.wait({task, stop, *self._tasks}, return_when=asyncio.FIRST_COMPLETED)
            if stop in done:
                return False
            for finished in done:
                finished.result()
            return True
        finally:
            task.cancel()
            stop.cancel()

    async def _reload(self) -> None:
        root = Path.cwd()
        before = await asyncio.to_thread(snapshot, root)
        while True:
            now = await next_change(root, before)
            files = changed(before, now, root)
            more = f" and {len(files) - 1} more" if len(files) > 1 else ""
            self._say(f"{files[0]}{more} changed; restarting the nodes one by one")
            before = now
            for node in self._nodes:
                if not await node.restart(_START_LIMIT):
                    self._say(f"{node.job.name} does not get ready; the other nodes keep running as they are")
                    break
            else:
                self._say("all nodes run the changed code")

    async def _end(self) -> None:
        """End nodes, then the store; a node needs the store to leave properly."""
        hurry = asyncio.ensure_future(self._hurry.wait())
        for group in (self._nodes, [self._store] if self._store is not None else []):
            stops = asyncio.gather(*(keeper.stop() for keeper in group))
            await asyncio.wait({stops, hurry}, return_when=asyncio.FIRST_COMPLETED)
            if self._hurry.is_set():
                for keeper in group:
                    keeper.kill()
            await stops
        hurry.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            asyncio.get_running_loop().remove_signal_handler(number)

    def _store_job(self, valkey: EmbeddedValkey) -> Job:
        return Job(
            name="valkey",
            command=valkey.command,
            environment=dict(os.environ),
            directory=valkey.directory,
            death_signal=signal.SIGTERM,
            is_ready=valkey.answers,
            patience=_STORE_PATIENCE,
            descriptors=(self._plan.lock,),
            # Advice for servers with much data; this one would give it at every start.
            hidden=("vm.overcommit_memory",),
        )

    def _node_job(self, number: int, port: int) -> Job:
        plan = self._plan
        environment = {name: value for name, value in os.environ.items() if name != "CONVENER_REDIS_URL_FILE"}
        # In the environment and not in the arguments, which every user of the machine may read.
        environment["CONVENER_REDIS_URL"] = plan.store_url
        # What an agent prints is to be seen when it is printed.
        environment["PYTHONUNBUFFERED"] = "1"
        environment.pop("NO_COLOR" if self._log.colours else "FORCE_COLOR", None)
        environment["FORCE_COLOR" if self._log.colours else "NO_COLOR"] = "1"
        arguments = ["serve", plan.app, "--host", plan.host, "--port", str(port)]
        return Job(
            name=f"node-{number}",
            command=[
                sys.executable,
                "-m",
                "convener",
                *arguments,
                "--node-name",
                f"node-{number}",
                "--log-format",
                "console",
            ],
            environment=environment,
            directory=Path.cwd(),
            # Whoever killed us wants no drain, and the store goes at the same moment.
            death_signal=signal.SIGKILL,
            is_ready=self._probe(f"{plan.url(port)}/readyz"),
            patience=plan.drain_timeout + _EXIT_TIME,
        )

    def _probe(self, url: str) -> Callable[[], Awaitable[bool]]:
        async def is_ready() -> bool:
            try:
                return (await self._http.get(url)).is_success
            except httpx.HTTPError:
                return False

        return is_ready

    def _say(self, text: str) -> None:
        self._log.write("up", text)
