"""One ``convener up`` per directory: two would write into the same Valkey files."""

from __future__ import annotations

import fcntl
import os
import time
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from convener.cli.failures import CommandFailed

# An `up` that was killed leaves a Valkey that needs a moment to notice; it holds the lock for that long.
_PATIENCE: Final = 3.0
_PAUSE: Final = 0.1


class DirectoryLock:
    """An exclusive lock on a file, held until the last process that inherited it ends.

    Raises:
        CommandFailed: on entering, if another `up` holds it.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._descriptor = -1

    @property
    def descriptor(self) -> int:
        """To pass on to Valkey: while it lives, nobody else may start one on the same files."""
        return self._descriptor

    def __enter__(self) -> Self:
        self._descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o600)
        deadline = time.monotonic() + _PATIENCE
        while True:
            try:
                fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                holder = os.pread(self._descriptor, 32, 0).decode().strip()
                if time.monotonic() > deadline or _is_alive(holder):
                    os.close(self._descriptor)
                    raise CommandFailed(
                        f"`convener up` runs in this directory already (process {holder or 'unknown'}); "
                        "stop it first, or start this one elsewhere"
                    ) from None
            time.sleep(_PAUSE)
        os.ftruncate(self._descriptor, 0)
        os.pwrite(self._descriptor, f"{os.getpid()}\n".encode(), 0)
        return self

    def __exit__(
        self, _type: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        os.close(self._descriptor)


def _is_alive(process: str) -> bool:
    try:
        os.kill(int(process), 0)
    except (ValueError, ProcessLookupError):
        return False
    except PermissionError:
        return True
    return True
