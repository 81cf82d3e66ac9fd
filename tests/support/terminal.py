"""A command that runs at a terminal, as a person would have it."""

from __future__ import annotations

import os
import pty
import re
import signal
import subprocess
import sys
import termios
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

from tests.support.waiting import wait_until_sync


class Terminal:
    """A command at a terminal of its own.

    Args:
        arguments: of `convener`.
        size: lines and columns.
    """

    def __init__(self, arguments: Sequence[str], directory: Path, size: tuple[int, int] = (24, 80)) -> None:
        self._master, slave = pty.openpty()
        termios.tcsetwinsize(slave, size)
        self.before = termios.tcgetattr(slave)
        command = [sys.executable, "-m", "convener", *arguments]
        self.process = subprocess.Popen(
            command, cwd=directory, stdin=slave, stdout=slave, stderr=slave, start_new_session=True, close_fds=True
        )
        os.close(slave)
        os.set_blocking(self._master, False)
        self._seen = ""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(10)
        os.close(self._master)

    def type(self, text: str) -> None:
        os.write(self._master, text.encode())

    def press_ctrl_c(self) -> None:
        """As the terminal does it: a signal to everything that runs there."""
        os.killpg(self.process.pid, signal.SIGINT)

    def settings(self) -> list[Any]:
        """How the terminal is set; `before` is how it was."""
        return termios.tcgetattr(self._master)

    def look(self) -> str:
        """Everything that was shown so far, without the codes that steer the terminal."""
        try:
            while chunk := os.read(self._master, 65536):
                self._seen += chunk.decode()
        except OSError:
            pass
        return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", self._seen).replace("\r", "\n")

    def until(self, text: str, count: int = 1) -> None:
        try:
            wait_until_sync(lambda: self.look().count(text) >= count, f"{count} times {text!r} is shown")
        except AssertionError as error:
            error.add_note(self.look())
            raise

    def ended(self) -> int:
        def is_over() -> bool:
            self.look()
            return self.process.poll() is not None

        wait_until_sync(is_over, "the command has ended")
        assert self.process.returncode is not None
        return self.process.returncode
