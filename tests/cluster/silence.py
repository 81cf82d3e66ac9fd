"""For how long somebody who waits for something is shown nothing, and what that time consists of."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Final

from tests.cluster.clients import Client
from tests.support.jsclient import JavaScriptClient

Span = tuple[float, float]

_PARTS: Final = (("p50", 0.5), ("p99", 0.99), ("worst", 1.0))


@dataclass
class Waits:
    """When somebody waited for an answer: from the moment of sending until the end of the turn was shown."""

    spans: list[Span] = field(default_factory=list[Span])
    _since: float = 0.0

    def begin(self) -> None:
        """A message is sent."""
        self._since = time.monotonic()

    def end(self) -> None:
        """Its turn has ended, and that was shown."""
        self.spans.append((self._since, time.monotonic()))


@dataclass(frozen=True)
class Silence:
    """A time in which a client that waited was shown nothing.

    Attributes:
        since, until: seconds of the monotonic clock.
        after, before: what was shown at either end.
        moved: it changed from one connection to another meanwhile, or was about to.
        shares: part of it → seconds.
    """

    since: float
    until: float
    after: str
    before: str
    moved: bool
    shares: Mapping[str, float]

    @property
    def length(self) -> float:
        """In seconds."""
        return self.until - self.since

    def __str__(self) -> str:
        shares = ", ".join(f"{name} {1000 * share:.0f}" for name, share in self.shares.items())
        return f"{1000 * self.length:.0f} ms from {self.after} to {self.before}" + (f" ({shares})" if shares else "")


def silences(client: Client | JavaScriptClient, waits: Waits) -> list[Silence]:
    """Every silence of a client. `goaway` is no answer, and neither is the greeting of a new connection."""
    happened = [(at, "sent", False) for at, _ in waits.spans]
    happened += [(at, _name(name, data), name in ("goaway", "joined")) for at, name, data in _shown(client)]
    happened.sort(key=lambda item: item[0])
    found: list[Silence] = []
    for begin, end in waits.spans:
        here = [item for item in happened if begin <= item[0] <= end]
        told = [item for item in here if not item[2]]
        marks = [(at, name) for at, name in client.marks if begin <= at <= end]
        marks += [(at, name) for at, name, greeting in here if greeting]
        for (since, after, _), (until, before, _) in pairwise(told):
            inside = sorted(mark for mark in marks if since < mark[0] < until)
            points = [(since, ""), *inside, (until, "shown")] if inside else []
            shares: dict[str, float] = {}
            for (a, _), (b, name) in pairwise(points):
                shares[f"to {name}"] = shares.get(f"to {name}", 0.0) + b - a
            found.append(Silence(since, until, after, before, bool(inside), shares))
    return found


def _shown(client: Client | JavaScriptClient) -> Iterable[tuple[float, str, Any]]:
    """When what was shown of the conversation, or said about the connection. A status is nothing to read."""
    if isinstance(client, Client):
        everything = [(at, name, data) for (name, data), at in zip(client.shown, client.times, strict=True)]
    else:
        pairs = zip(client.lines, client.times, strict=True)
        everything = [(at, line["event"], line["data"]) for line, at in pairs if "event" in line]
    return [item for item in everything if item[1] in ("event", "delta", "goaway", "joined")]


def _name(name: str, data: Any) -> str:
    if name != "event":
        return name
    return f"open ({data['data']['reason']})" if data["kind"] == "open" else str(data["kind"])


def within(silences_: Iterable[Silence], spans: Sequence[Span]) -> list[Silence]:
    """Those that began in one of the spans."""
    return [s for s in silences_ if any(since <= s.since < until for since, until in spans)]


def longest(silences_: Iterable[Silence]) -> Silence | None:
    """The longest of one client."""
    return max(silences_, key=lambda silence: silence.length, default=None)


def percentiles(values: Iterable[float]) -> str:
    """The values that half, 99 % and all do not exceed, of seconds, in words."""
    ordered = sorted(values)
    if not ordered:
        return "none"
    words = ((word, ordered[min(int(part * len(ordered)), len(ordered) - 1)]) for word, part in _PARTS)
    return ", ".join(f"{word} {1000 * value:.0f} ms" for word, value in words)


def summary(found: Sequence[Sequence[Silence]], spans: Mapping[str, Sequence[Span]], which: str) -> str:
    """The longest silence of each client in each kind of time, and what the longest of all consist of.

    Args:
        found: for each client, all of its silences.
        spans: kind of time → when it was.
        which: what kind of clients they are.
    """
    lines: list[str] = []
    for when, times in spans.items():
        of_each = [within(one, times) for one in found]
        worst = [silence for one in of_each if (silence := longest(one)) is not None]
        kept = [silence for one in of_each if (silence := longest(s for s in one if not s.moved)) is not None]
        lines.append(f"longest silence of each of {which} while {when}: {percentiles(s.length for s in worst)}")
        if any(silence.moved for silence in worst):
            lines.append(f"  where the connection was kept: {percentiles(s.length for s in kept)}")
            shares: dict[str, list[float]] = {}
            for silence in (s for one in of_each for s in one if s.moved):
                for name, share in silence.shares.items():
                    shares.setdefault(name, []).append(share)
            lines += [f"  of a change of connection, {name}: {percentiles(v)}" for name, v in shares.items()]
        lines += [f"  {silence}" for silence in sorted(worst, key=lambda s: -s.length)[:4]]
    return "\n".join(lines)
