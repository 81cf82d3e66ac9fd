"""Answers that are shown while they are written, and not once more when they are finished."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any, cast


class LiveAnswer:
    """What is on the screen of the answer that is being written.

    Args:
        only: the part that is shown; default all.
    """

    def __init__(self, only: str | None = None) -> None:
        self._only = only
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
        if self._only not in (None, part):
            return ""
        held = self._parts.get(part, data[:0])
        new = data[max(len(held) - int(delta["offset"]), 0) :]
        self._parts[part] = held + new
        return new

    def entry(self, entry: Mapping[str, Any]) -> dict[str, Any] | None:
        """Take the next log entry. Of a reply that goes on with what is shown: what is missing of it, by part; None of
        any other entry, which is still to be shown.
        """
        kind, turn = entry["kind"], entry["turn"]
        if kind == "turn_started":
            self._writing, self._parts = (turn, int(entry["data"]["attempt"])), {}
        elif turn == self._writing[0] and (kind == "reply" or kind.startswith("turn_")):
            shown, self._parts = self._parts, {}
            return self._missing(shown, entry["data"]) if kind == "reply" and shown else None
        return None

    def _missing(self, shown: Mapping[str, Any], data: object) -> dict[str, Any] | None:
        # The last pieces are often sent with the reply alone.
        fields = dict(cast("dict[str, Any]", data)) if isinstance(data, dict) else {}
        if fields.get("partial") is True:
            del fields["partial"]
        if self._only is not None:
            fields = {part: said for part, said in fields.items() if part == self._only}
        missing: dict[str, Any] = {}
        for part, held in shown.items():
            said: Any = fields.pop(part, None)
            if type(said) is not type(held) or said[: len(held)] != held:
                return None
            if len(said) > len(held):
                missing[part] = said[len(held) :]
        return missing | fields

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
