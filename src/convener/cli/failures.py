"""How a command fails."""

from __future__ import annotations


class CommandFailed(Exception):
    """The command could not do its work; the message is all that the user sees.

    Args:
        message: one line.
        exit_code: 1 failed, 2 wrong usage.
    """

    def __init__(self, message: str, exit_code: int = 1) -> None:
        super().__init__(message)
        self.exit_code = exit_code
