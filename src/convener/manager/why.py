"""Why a conversation is where it is: who owned it since when and why that changed, and what it waits for now.

Everything is read out of the store: the log's `open` entries, the head, the membership with the burials that it
remembers. Nothing is decided by it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import msgspec

from convener.core.cursor import Cursor
from convener.core.membership import Membership
from convener.core.model import LogEntry, Meta
from convener.core.view import Place
from convener.errors import NotFound
from convener.ids import node_of
from convener.manager.engine import Engine
from convener.manager.members import is_draining
from convener.manager.queries import status_of_head
from convener.manager.waits import Wait, Waits

WINDOW: Final = 20_000
"""Entries at the end of a log that are looked at; a longer history is told from there on."""
PAGE: Final = 1000


@dataclass(frozen=True, slots=True)
class Buried:
    """How a node came to be buried, as far as that is known.

    Attributes:
        at: ms since 1970, by the store's clock.
        kind: `reaped`, `silent`, `left` or `superseded`; "" if it was not recorded.
        by: name of the node that did it.
        silent: ms since its last renewal then.
    """

    at: int
    kind: str = ""
    by: str = ""
    silent: int = 0


@dataclass(frozen=True, slots=True)
class Ownership:
    """One epoch.

    Attributes:
        since: when it began, ms since 1970 by the store's clock.
        until: when the next one began; None for the latest.
        reason: as in the log's `open` entry.
        former: incarnation that owned the conversation before, "" for none that is known.
        buried: how that one was buried, if it is.
        text: why this epoch began, in words.
    """

    epoch: int
    seq: int
    since: int
    until: int | None
    node: str
    incarnation: str
    reason: str
    former: str
    buried: Buried | None
    text: str


@dataclass(frozen=True, slots=True)
class Owner:
    """Who owns it.

    Attributes:
        state: `live`, `draining`, `silent` (it has missed renewals), `buried` or `unknown`.
        last_renewal: of its lease, ms since 1970 by the store's clock; None if it has none any more.
        lease_until: when that ends.
        text: the same in words.
    """

    node: str
    incarnation: str
    since: int | None
    state: str
    last_renewal: int | None
    lease_until: int | None
    text: str


@dataclass(frozen=True, slots=True)
class Why:
    """What is known of one conversation's owners.

    Attributes:
        owner: None for nobody.
        waits: what has to happen before it goes on, or that it waits for nothing.
        ownerships: oldest first.
        first_seq: where the part of the log begins that was looked at; 1 for all of it.
    """

    conversation_id: str
    user_id: str
    status: str
    epoch: int
    owner: Owner | None
    waits: Sequence[Wait]
    ownerships: Sequence[Ownership]
    first_seq: int = 1


class Opened(msgspec.Struct):
    """The data of an `open` entry."""

    node: str = ""
    reason: str = ""


class Event(msgspec.Struct):
    """What of a log entry is looked at."""

    kind: str
    turn: str = ""
    ts: int = 0
    data: msgspec.Raw = msgspec.Raw(b"null")


@dataclass(slots=True)
class _History:
    opens: list[tuple[LogEntry, Event]] = field(default_factory=list[tuple[LogEntry, Event]])
    turn: tuple[str, int, int] | None = None
    """The turn that was begun last: id, attempt, when."""
    first: int = 1


async def explain(engine: Engine, cid: str, live: Sequence[str]) -> Why:
    """What can be said of a conversation's owners.

    Args:
        live: nodes that may take conversations, in whose names recovery goes first.

    Raises:
        NotFound: there is no such conversation.
        StoreUnavailable: the store does not answer.
    """
    store = engine.node.store
    meta = await store.head(cid)
    if meta is None:
        raise NotFound(f"no conversation {cid}")
    history = await _read(engine, cid, meta)
    # What has happened meanwhile is in the head that is read last; a burial precedes the claim that it allows.
    meta = await store.head(cid)
    membership = await store.membership()
    if meta is None:
        raise NotFound(f"no conversation {cid}")
    owned = ownerships(history.opens, membership)
    owner = _owner(meta, owned, membership)
    waits = await Waits(engine, cid, meta, membership, live, history.turn).all()
    status = status_of_head(engine.node, meta)
    return Why(cid, meta.user, status, meta.epoch, owner, waits, owned, history.first)


async def _read(engine: Engine, cid: str, meta: Meta) -> _History:
    """The `open` entries at the end of the log, and the turn that was begun last."""
    found = _History(first=max(meta.seq - WINDOW, 0) + 1)
    after = found.first - 1
    while after < meta.seq:
        page = await engine.node.store.read(cid, Cursor(place=Place(0, after)), PAGE)
        if page is None or not page.entries:
            break
        if after == found.first - 1:
            found.first = page.entries[0].seq
        for entry in page.entries:
            event = msgspec.json.decode(entry.event, type=Event)
            if event.kind == "open":
                found.opens.append((entry, event))
            elif event.kind == "turn_started":
                attempt = msgspec.json.decode(event.data, type=dict[str, Any]).get("attempt", 1)
                found.turn = (event.turn, int(attempt), event.ts)
        after = page.entries[-1].seq
    return found


def ownerships(opens: Sequence[tuple[LogEntry, Event]], membership: Membership) -> list[Ownership]:
    """What the `open` entries of a log say, together with what is known of burials."""
    found: list[Ownership] = []
    former = ""
    for index, (entry, event) in enumerate(opens):
        opened = msgspec.json.decode(event.data, type=Opened)
        until = opens[index + 1][1].ts if index + 1 < len(opens) else None
        buried = buried_of(former, membership)
        text = because(opened.node, opened.reason, former, buried, event.ts)
        found.append(
            Ownership(
                epoch=entry.epoch,
                seq=entry.seq,
                since=event.ts,
                until=until,
                node=node_of(opened.node),
                incarnation=opened.node,
                reason=opened.reason,
                former=former,
                buried=buried,
                text=text,
            )
        )
        former = opened.node
    return found


def buried_of(incarnation: str, membership: Membership) -> Buried | None:
    """How an incarnation was buried, None if it is not known to be."""
    at = membership.dead.get(incarnation)
    if at is None:
        return None
    told = membership.burials.get(incarnation)
    if told is None:
        return Buried(at)
    return Buried(at, told.kind, node_of(told.by), told.silent)


_LOADED: Final[Mapping[str, str]] = {
    "wake": "for a message or a client",
    "interrupt": "to interrupt a turn",
    "answer": "for an answer to its question",
    "alarm": "for an alarm",
    "resume": "since somebody has resumed it",
}


def because(incarnation: str, reason: str, former: str, buried: Buried | None, at: int) -> str:
    """Why an epoch began, in words that need no knowledge of the protocol.

    Args:
        former: incarnation that owned the conversation before, "" for none that is known.
        buried: how that one was buried, None if it is not.
        at: when the epoch began, in ms.
    """
    node, before = node_of(incarnation), node_of(former) or "its former owner"
    # The clocks of a cluster's servers may differ a little: whoever was buried first need not look so.
    gone = buried is not None and (buried.at <= at or reason == "takeover")
    if reason == "start":
        return f"started on {node}"
    if reason == "takeover":
        return f"taken over by {node}, since {words(before, buried, at)}"
    if reason == "handoff":
        if gone:
            return f"taken over by {node}: {before} was leaving and could not hand it over"
        if buried is not None and buried.kind == "left":
            return f"handed over by {before} to {node}: {before} was leaving, and left {_after(at, buried.at)}"
        return f"moved from {before} to {node}"
    if reason == "restart":
        return f"begun anew by {node}, which owned it: what it knew was not certain to be what the store has"
    loaded = f"loaded on {node} {_LOADED.get(reason, f'({reason})')}"
    if not former:
        return loaded
    if gone:
        return f"{loaded}: nobody owned it, and {words(before, buried, at)}"
    return f"{loaded}: {before} had unloaded it"


def words(name: str, buried: Buried | None, at: int) -> str:
    """That and how a node was buried, seen from a moment in ms."""
    if buried is None:
        return f"{name} was buried, longer ago than is remembered"
    text = f"{name} was buried {_before(at, buried.at)}"
    silence = f"no renewal for {seconds(buried.silent)}"
    by = f", seen by {buried.by}" if buried.by and buried.by != name else ""
    if buried.kind == "silent":
        return f"{text} ({silence}, process gone{by})"
    if buried.kind == "reaped":
        return f"{text} ({silence}, so its lease had ended{by})"
    if buried.kind == "superseded":
        known = f": {silence}" if buried.silent else ""
        return f"{text} (it was started again{known})"
    if buried.kind == "left":
        return f"{name} had left {_before(at, buried.at)} (it was told to end)"
    return f"{text} (why is not recorded: by a node of an earlier version)"


def seconds(ms: int) -> str:
    """A duration for people."""
    if ms < 100:
        return f"{ms} ms"
    if ms < 10_000:
        return f"{ms / 1000:.1f} s"
    return f"{ms / 1000:.0f} s" if ms < 600_000 else f"{ms / 60_000:.0f} min"


def _before(at: int, earlier: int) -> str:
    return f"{seconds(at - earlier)} before" if at > earlier else "at that moment"


def _after(at: int, later: int) -> str:
    return f"{seconds(later - at)} later" if later > at else "at that moment"


def _owner(meta: Meta, owned: Sequence[Ownership], membership: Membership) -> Owner | None:
    if not meta.owner:
        return None
    since = next((o.since for o in reversed(owned) if o.incarnation == meta.owner and o.epoch == meta.epoch), None)
    name, member = node_of(meta.owner), membership.members.get(meta.owner)
    if member is None:
        buried = buried_of(meta.owner, membership)
        state = "unknown" if buried is None else "buried"
        text = f"{name} is no member" if buried is None else words(name, buried, membership.pulse)
        return Owner(name, meta.owner, since, state, None, None, text)
    if not member.ttl:
        return Owner(name, meta.owner, since, "live", None, None, f"{name} is the only node")
    last = member.last_renewal()
    # The pulse is when anybody renewed last: what this one lacks against it, it has missed.
    late = max(membership.pulse - last, 0)
    state = "draining" if is_draining(member) else "live"
    text = f"{name} renews its lease"
    if late > 2 * member.renew:
        state, text = "silent", f"{name} has not renewed its lease for {seconds(late)}"
    elif state == "draining":
        text = f"{name} renews its lease, and is leaving"
    return Owner(name, meta.owner, since, state, last, member.deadline, text)
