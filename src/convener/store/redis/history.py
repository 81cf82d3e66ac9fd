"""Which data a server has: the run of its process, and the line of replication that its data belong to.

A server that comes back as another run, or a replica that takes over, may lack what was acknowledged last
(replication is asynchronous, and so is writing to disk). Nothing else shows that: commands just go on. So every
new connection of the commands asks, and a difference is told before anything that waited is sent.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, cast

from convener.store.base import Fallback, Progress

_REPLICA: Final = re.compile(r"slave\d+")
_OFFSET: Final = re.compile(r"(?:^|,)offset=(\d+)")
INFO_SECTIONS = ("server", "replication")
"""What to ask INFO for."""


@dataclass(frozen=True, slots=True)
class History:
    """What a server says of its data. None: it hides that.

    Attributes:
        place: the server.
        run: id of its process' run.
        line: id of the line of replication that its data belong to; a replica has its primary's.
        former: the line that it followed before it became primary itself.
        until: offset in `former` up to which the data are the same.
        offset: how far `line` has come.
    """

    place: str
    run: str | None = None
    line: str | None = None
    former: str | None = None
    until: int | None = None
    offset: int | None = None

    def is_same(self, other: History) -> bool:
        """Whether data seen in the one are surely in the other. What is hidden is not sure."""
        return self.run is not None and self.run == other.run and self.line is not None and self.line == other.line

    def takes_over(self, other: History) -> bool:
        """Whether this server followed the other one, so that at most the last moments may be missing."""
        return self.former is not None and self.former == other.line


@dataclass(frozen=True, slots=True)
class NewHistory:
    """What was acknowledged under `old` may be missing in `new`."""

    old: History
    new: History

    def fallback(self, seen: History | None) -> Fallback:
        """The same for whoever knows nothing of lines of replication.

        Args:
            seen: the old history as it was last seen, which may have got further than at its beginning.
        """
        old, new = self.old, self.new
        if old.run is not None and old.run == new.run:
            # A primary that was made a replica and follows another line, and is primary again.
            return Fallback(new.place, "replaced")
        if not new.takes_over(old):
            return Fallback(new.place, "restart" if old.place == new.place else "replaced")
        known = [h.offset for h in (old, seen) if h is not None and h.line == old.line and h.offset is not None]
        if new.until is None or not known:
            return Fallback(new.place, "fail-over")
        return Fallback(new.place, "fail-over", max(max(known) - new.until, 0))


@dataclass(frozen=True, slots=True)
class Identity:
    """Who answers on a connection.

    Attributes:
        role: ``master`` or ``slave``, None if it cannot be found out.
        mode: ``standalone``, ``cluster`` or ``sentinel``, None if it cannot be found out.
    """

    history: History
    role: str | None
    mode: str | None


def identify(place: str, hello: object, info: object) -> Identity:
    """What the replies to HELLO and INFO say; each may be an error, where an access list forbids the command."""
    shown = lines(info)
    greeting = pairs(hello)
    offset, until = shown.get("master_repl_offset", ""), shown.get("second_repl_offset", "")
    former = shown.get("master_replid2", "")
    history = History(
        place,
        run=shown.get("run_id"),
        line=shown.get("master_replid"),
        former=former if former.strip("0") else None,
        until=int(until) - 1 if until.isdigit() else None,
        offset=int(offset) if offset.isdigit() else None,
    )
    role = shown.get("role") or greeting.get("role")
    return Identity(history, "slave" if role == "replica" else role, greeting.get("mode") or shown.get("redis_mode"))


def progress_of(reply: object) -> Progress:
    """What INFO says of a primary and its replicas."""
    shown = lines(reply)
    offset, count = shown.get("master_repl_offset", ""), shown.get("connected_slaves", "")
    confirmed = [
        int(found[1])
        for name, value in shown.items()
        if _REPLICA.fullmatch(name) and "state=online" in value and (found := _OFFSET.search(value))
    ]
    return Progress(
        line=shown.get("master_replid"),
        offset=int(offset) if offset.isdigit() else None,
        confirmed=max(confirmed, default=None),
        replicas=int(count) if count.isdigit() else None,
    )


def lines(reply: object) -> Mapping[str, str]:
    """A reply of lines ``name:value``, as INFO gives it; empty if it is an error."""
    text = reply.decode(errors="replace") if isinstance(reply, bytes) else ""
    parts = (line.partition(":") for line in text.splitlines())
    return {name: value for name, colon, value in parts if colon}


def pairs(reply: object) -> Mapping[str, str]:
    """A flat reply of names and values, those that are texts; empty if it is an error."""
    flat = cast("list[Any]", reply) if isinstance(reply, list) else []
    found = zip(flat[::2], flat[1::2], strict=False)
    return {n.decode(): v.decode() for n, v in found if isinstance(n, bytes) and isinstance(v, bytes)}
