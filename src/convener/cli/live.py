"""Answers that are shown while they are written, and not once more when they are finished."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any, cast


class LiveAnswer:
    """What is on the screen of the answer that is being written."""

    def __init__(self) -> None:
        self._writing: tuple[str, int] = ("", 0)
        self._parts: dict[str, Any] = {}

    def take(self, delta: Mapping[str, Any]) -> Any:
        """What a `delta` event brings beyond what is shown: text or a list, empty if nothing.

        After a reconnection everything comes again; an attempt that was given up may be heard of late.
        """
        turn, attempt = self._writing
        writing = (str(delta["turn"]), int(delta["attempt"]))
        if writing[0] == turn and writing[1] < attempt:
            return ""
        if writing != self._writing:
            self._writing, self._parts = writing, {}
        data, part = delta["data"], str(delta["part"])
        held = self._parts.get(part, data[:0])
        new = data[max(len(held) - int(delta["offset"]), 0) :]
        self._parts[part] = held + new
        return new

    def entry(self, entry: Mapping[str, Any]) -> bool:
        """Take the next log entry. True if it says nothing that is not shown."""
        kind, turn = entry["kind"], entry["turn"]
        if turn != self._writing[0]:
            return False
        shown = kind == "reply" and self._is_shown(entry["data"])
        if kind == "reply" or kind.startswith("turn_"):
            self._parts = {}
        return shown

    def _is_shown(self, data: object) -> bool:
        if not isinstance(data, dict) or not self._parts:
            return False
        fields = cast("dict[str, Any]", data)
        return {key: value for key, value in fields.items() if (key, value) != ("partial", True)} == self._parts

    def forget(self) -> None:
        """The view is thrown away."""
        self._writing, self._parts = ("", 0), {}


class OpenLine:
    """A line on standard output that grows. Whoever prints something else ends it first."""

    def __init__(self) -> None:
        self._of: object = None

    def write(self, of: object, head: str, text: str) -> None:
        """Go on with the line of `of`, or begin one with `head`."""
        if self._of != of:
            self.end()
            self._of = of
            sys.stdout.write(head)
        sys.stdout.write(text)
        sys.stdout.flush()

    def end(self) -> None:
        """End the line, if there is one."""
        if self._of is not None:
            self._of = None
            sys.stdout.write("\n")
            sys.stdout.flush()
