"""One log for many processes: each line behind the coloured name of who wrote it, on standard error."""

from __future__ import annotations

import asyncio
import sys
from typing import Final, TextIO

from convener.cli.logs import use_colours

_COLOURS: Final = ("36", "35", "33", "32", "34", "96", "95", "93", "92", "94")
_GREY: Final = "90"
_CHUNK: Final = 65_536
# A line that does not end is cut here, so that one child cannot fill our memory.
_LONGEST_LINE: Final = 1024 * 1024


class JobLog:
    """Writes the lines of all children.

    Args:
        names: everybody who will write, for the width of the first column.
        stream: where to, standard error by default.
    """

    def __init__(self, names: list[str], stream: TextIO | None = None) -> None:
        self._stream = stream if stream is not None else sys.stderr
        self.colours = use_colours(self._stream)
        self._width = max(len(name) for name in names)
        nodes = [name for name in names if name.startswith("node-")]
        self._colour_of = {name: _COLOURS[index % len(_COLOURS)] for index, name in enumerate(nodes)}

    def write(self, name: str, line: str) -> None:
        """Write one line of `name`."""
        label = f"{name:<{self._width}} |"
        if self.colours:
            label = f"\x1b[{self._colour_of.get(name, _GREY)}m{label}\x1b[0m"
        # One write per line: what a child writes in one piece stays in one piece.
        self._stream.write(f"{label} {line}\n")
        self._stream.flush()

    async def copy(self, name: str, source: asyncio.StreamReader, hidden: tuple[str, ...] = ()) -> None:
        """Write every line of `source` until its end, but for those that contain one of `hidden`."""
        rest = b""
        while chunk := await source.read(_CHUNK):
            *lines, rest = (rest + chunk).split(b"\n")
            if len(rest) > _LONGEST_LINE:
                lines, rest = [*lines, rest], b""
            self._write_all(name, lines, hidden)
        if rest:
            self._write_all(name, [rest], hidden)

    def _write_all(self, name: str, lines: list[bytes], hidden: tuple[str, ...]) -> None:
        for line in lines:
            text = line.rstrip(b"\r").decode("utf-8", "replace")
            if not any(word in text for word in hidden):
                self.write(name, text)
