"""Reading a stream of Server-Sent Events (HTML standard, section 9.2.6)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class ServerSentEvent:
    """One event: its name, its data lines joined by newlines, and the last id seen on the stream so far."""

    event: str
    data: str
    last_id: str | None


def parse_events(lines: Iterable[str]) -> Iterator[ServerSentEvent]:
    """The events in `lines` (without their line ends); comments and unknown fields are skipped."""
    name = ""
    data: list[str] = []
    last_id: str | None = None
    for line in lines:
        if not line:
            if data:
                yield ServerSentEvent(name or "message", "\n".join(data), last_id)
            name, data = "", []
            continue
        field, _, value = line.partition(":")
        value = value.removeprefix(" ")
        if field == "data":
            data.append(value)
        elif field == "event":
            name = value
        elif field == "id" and "\0" not in value:
            last_id = value
