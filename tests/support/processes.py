"""Real processes in tests: started in a session of their own, read continuously, gone at the end of the test."""

from __future__ import annotations

import os
import secrets
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import IO, Final, Self

from tests.support.waiting import wait_until_sync

ROOT = Path(__file__).parent.parent.parent


class RunningProcess:
    """A child process whose output can be read while it runs.

    Args:
        command: program and arguments.
        directory: where it runs.
        environment: added to this process's own, which carries no CONVENER_* variable.

    Leaving the context kills whatever still runs of its process group.
    """

    def __init__(self, command: Sequence[str], directory: Path, environment: Mapping[str, str] | None = None) -> None:
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("CONVENER_")}
        self.command = list(command)
        self.output: list[str] = []
        self.errors: list[str] = []
        self.process = subprocess.Popen(
            self.command,
            cwd=directory,
            env=inherited | dict(environment or {}),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self._readers = [
            self._read(self.process.stdout, self.output),
            self._read(self.process.stderr, self.errors),
        ]

    @staticmethod
    def _read(source: IO[str] | None, lines: list[str]) -> threading.Thread:
        assert source is not None

        def copy() -> None:
            with source:
                for line in iter(source.readline, ""):
                    lines.append(line.rstrip("\n"))  # noqa: PERF401 - read by others line by line

        thread = threading.Thread(target=copy, daemon=True)
        thread.start()
        return thread

    @property
    def pid(self) -> int:
        return self.process.pid

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def wait_for_output(self, text: str, limit: float = 30) -> str:
        """The first line of standard output that contains `text`."""
        return self._wait_for(self.output, "output", text, limit)

    def wait_for_error(self, text: str, limit: float = 30) -> str:
        """The first line of standard error that contains `text`."""
        return self._wait_for(self.errors, "errors", text, limit)

    def _wait_for(self, lines: list[str], kind: str, text: str, limit: float) -> str:
        def look() -> str | None:
            found = next((line for line in list(lines) if text in line), None)
            if found is None and self.process.poll() is not None:
                self._join()
                found = next((line for line in lines if text in line), None)
                if found is None:
                    everything = "\n".join([*self.output, *self.errors])
                    raise AssertionError(f"ended with {self.process.returncode} before {text!r}:\n{everything}")
            return found

        try:
            found = wait_until_sync(look, f"the {kind} contain {text!r}", limit)
        except AssertionError as error:
            error.add_note("\n".join([*self.output, *self.errors]))
            raise
        assert found is not None
        return found

    def wait(self, limit: float = 30) -> int:
        """The exit code, all output read."""
        try:
            code = self.process.wait(limit)
        except subprocess.TimeoutExpired:
            raise AssertionError(
                f"did not end within {limit:g} s:\n" + "\n".join([*self.output, *self.errors])
            ) from None
        self._join()
        return code

    def _join(self) -> None:
        for reader in self._readers:
            reader.join(5)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, _type: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(10)
        self._join()


def convener(*arguments: str, directory: Path, environment: Mapping[str, str] | None = None) -> RunningProcess:
    """Start ``convener ARGUMENTS`` in `directory`."""
    return RunningProcess([sys.executable, "-m", "convener", *arguments], directory, environment)


_LOWEST_PORT: Final = 10_240


def free_port(count: int = 1) -> int:
    """The first of `count` neighbouring TCP ports of the loopback address that nobody listens on now.

    None of those that the system hands out for outgoing connections: what is free now may be one of theirs when the
    server that it was chosen for binds it, or binds it again.
    """
    for _ in range(100):
        first = _LOWEST_PORT + secrets.randbelow(_own_ports() - _LOWEST_PORT - count)
        if all(_is_free(port) for port in range(first, first + count)):
            return first
    raise AssertionError(f"no {count} free neighbouring ports")


def _own_ports() -> int:
    """Where the ports begin that the system hands out."""
    try:
        return int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    except OSError:
        return 32_768


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def is_running(pid: int) -> bool:
    """Whether the process exists and is no zombie."""
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        pass
    else:
        return status.rpartition(")")[2].split()[0] != "Z"
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True
