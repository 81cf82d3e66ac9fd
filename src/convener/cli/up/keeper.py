"""Keeping one child process alive."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from convener.cli.failures import CommandFailed
from convener.cli.up import tether
from convener.cli.up.joblog import JobLog

_FIRST_PAUSE: Final = 0.5
_LONGEST_PAUSE: Final = 10.0
# A child that lived this long has not failed at its start; its next death is a new story.
_LONG_LIFE: Final = 30.0
_READY_PAUSE: Final = 0.1
# Between the end of a child and the end of its output, which a grandchild may hold open for ever.
_LAST_WORDS: Final = 1.0


@dataclass(frozen=True)
class Job:
    """What to run.

    Attributes:
        name: in the log.
        command: program and arguments.
        environment: all of it.
        directory: where it runs.
        death_signal: sent by the kernel if this process dies first.
        is_ready: whether it does its work by now.
        patience: seconds between the signal that asks it to end and the one that does not.
        descriptors: open files that it inherits.
        hidden: words; a line of its output that contains one of them is left out of the log.
    """

    name: str
    command: list[str]
    environment: Mapping[str, str]
    directory: Path
    death_signal: int
    is_ready: Callable[[], Awaitable[bool]]
    patience: float
    descriptors: tuple[int, ...] = ()
    hidden: tuple[str, ...] = ()


class Keeper:
    """Runs a job, starts it again when it dies, ends it on demand."""

    def __init__(self, job: Job, log: JobLog) -> None:
        self.job = job
        self._log = log
        self._process: asyncio.subprocess.Process | None = None
        self._was_ready = False
        self._stopping = False
        self._restarting = False
        self._wake = asyncio.Event()
        # Held while a process is being made, so that nobody takes the old one for the only one.
        self._spawning = asyncio.Lock()
        self._gone = asyncio.Event()
        self._gone.set()

    async def run(self) -> None:
        """Keep the job running until `stop`.

        Raises:
            CommandFailed: it ended before it was ever ready; trying again would only repeat that.
        """
        pause = _FIRST_PAUSE
        clock = asyncio.get_running_loop().time
        while not self._stopping:
            self._restarting = False
            born = clock()
            code = await self._run_once()
            if self._stopping:
                return
            if self._restarting:
                pause = _FIRST_PAUSE
                continue
            if not self._was_ready:
                raise CommandFailed(f"{self.job.name} did not start ({describe_exit(code)})")
            if clock() - born > _LONG_LIFE:
                pause = _FIRST_PAUSE
            self._say(f"died ({describe_exit(code)}); starting it again in {pause:g} s")
            with suppress(TimeoutError):
                await asyncio.wait_for(self._wake.wait(), pause)
            pause = min(2 * pause, _LONGEST_PAUSE)

    async def wait_ready(self) -> None:
        """Wait until the job is ready; the caller sets the limit."""
        while True:
            if self._process is not None and await self.job.is_ready():
                self._was_ready = True
                return
            await asyncio.sleep(_READY_PAUSE)

    async def restart(self, limit: float) -> bool:
        """End the job politely, start it again; whether it got ready within `limit` seconds."""
        self._restarting = True
        self._wake.set()
        await self._end_process()
        self._wake.clear()
        try:
            async with asyncio.timeout(limit):
                await self.wait_ready()
        except TimeoutError:
            return False
        return True

    async def stop(self) -> None:
        """End the job for good: ask, wait as long as its patience says, then kill."""
        self._stopping = True
        self._wake.set()
        await self._end_process()

    def kill(self) -> None:
        """End the job and everything in its process group at once."""
        self._stopping = True
        self._wake.set()
        process = self._process
        # Its own session began with it, so the group has its number, and lives at least as long as it does.
        if process is not None and process.returncode is None:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)

    async def _end_process(self) -> None:
        async with self._spawning:
            process = self._process
        if process is None or process.returncode is not None:
            return
        with suppress(ProcessLookupError):
            process.terminate()
        try:
            await asyncio.wait_for(self._gone.wait(), self.job.patience)
        except TimeoutError:
            self._say(f"did not end within {self.job.patience:g} s; killing it")
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            await self._gone.wait()

    async def _run_once(self) -> int:
        async with self._spawning:
            process = await self._spawn()
            self._process = process
            self._gone.clear()
        if self._stopping:
            self.kill()
        assert process.stdout is not None
        copier = asyncio.create_task(self._log.copy(self.job.name, process.stdout, self.job.hidden))
        try:
            code = await process.wait()
            with suppress(TimeoutError):
                await asyncio.wait_for(copier, _LAST_WORDS)
        finally:
            copier.cancel()
            self._gone.set()
        return code

    async def _spawn(self) -> asyncio.subprocess.Process:
        mode = "exec" if sys.platform == "linux" else "watch"
        return await asyncio.create_subprocess_exec(
            sys.executable,
            "-S",  # no site-packages: the tether needs none, and their start-up files cost time
            tether.__file__,
            mode,
            str(os.getpid()),
            str(self.job.death_signal),
            *self.job.command,
            cwd=self.job.directory,
            env=self.job.environment,
            # Linux needs no pipe; elsewhere its end tells the tether that we are gone.
            stdin=asyncio.subprocess.DEVNULL if mode == "exec" else asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            # A session of its own: the terminal's Ctrl-C is for us, who tell the children in their turn.
            start_new_session=True,
            pass_fds=self.job.descriptors,
        )

    def _say(self, text: str) -> None:
        self._log.write(self.job.name, text)


def describe_exit(code: int) -> str:
    """An exit code in words."""
    if code >= 0:
        return f"exit code {code}"
    try:
        return signal.Signals(-code).name
    except ValueError:
        return f"signal {-code}"
