"""Who is a member, who is buried, and when burying is allowed (protocol, section 4).

Burial is terminal (I10). Renewal never creates a member. A store that paused, restarted or failed over must
not bury the healthy: whoever finds `pulse` (the latest renewal of anybody) older than two seconds sets
`grace`, and until then nobody is buried. Times are the store's clock in ms.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Final, Literal

PULSE_LIMIT_MS: Final = 2000
BURY_SLACK_MS: Final = 250
DEAD_KEPT_MS: Final = 24 * 3600 * 1000


@dataclass(frozen=True, slots=True)
class Member:
    """A live incarnation. `deadline` ends its lease; `info` is JSON text for others (address, version)."""

    deadline: int
    ttl: int
    renew: int
    info: str = "{}"

    def last_renewal(self) -> int:
        """When the store applied its latest renewal."""
        return self.deadline - self.ttl

    def is_stale(self, now: int) -> bool:
        """Two renewals were missed: it may be looked at, it is not dead yet."""
        return now - self.last_renewal() > 2 * self.renew + BURY_SLACK_MS


BurialKind = Literal["reaped", "silent", "left", "superseded"]
"""Why a member was buried: its lease had passed; it was silent and its process gone; it said so itself; its node was
started again.
"""


@dataclass(frozen=True, slots=True)
class Burial:
    """How a member came to be buried, for people; nothing is decided by it, and old nodes do not write it.

    Attributes:
        by: incarnation of whoever buried it, "" if that is not known.
        silent: ms since its last renewal.
    """

    kind: BurialKind
    by: str = ""
    silent: int = 0


@dataclass(frozen=True, slots=True)
class Membership:
    """The members, the buried with the time of burial, and the version that changes with either.

    `burials` says more of some of the buried, not of all.
    """

    members: Mapping[str, Member] = field(default_factory=dict[str, Member])
    dead: Mapping[str, int] = field(default_factory=dict[str, int])
    version: int = 0
    pulse: int = 0
    grace: int = 0
    burials: Mapping[str, Burial] = field(default_factory=dict[str, Burial])


JoinOutcome = Literal["OK", "DEAD"]
BuryOutcome = Literal["OK", "GONE", "GRACE", "FRESH", "ALIVE", "MANY"]
SupersedeOutcome = Literal["OK", "GONE", "FRESH", "OTHER"]


@dataclass(frozen=True, slots=True)
class RenewReply:
    """Outcome of JOIN and RENEW, with the membership's version."""

    outcome: JoinOutcome
    version: int = 0


def _felt(state: Membership, ttl: int, now: int) -> Membership:
    """Look at the pulse. An old one: renewals could not arrive, so nobody's silence proves anything. Unless there was
    nobody who could have renewed: a cluster that was ended and is started again owes nobody grace.
    """
    if state.members and now - state.pulse > PULSE_LIMIT_MS:
        return replace(state, grace=max(state.grace, now + ttl))
    return state


def _within_reach(state: Membership, ttl: int, now: int) -> Membership:
    """Leases and grace that end later than any that is given now were given before the store's clock was set back. They
    begin now: else a node that was gone by then would be a member, and nobody be buried, until it has caught up.
    """
    ahead = {
        name: replace(member, deadline=now + member.ttl)
        for name, member in state.members.items()
        if member.deadline > now + max(ttl, member.ttl)
    }
    longest = max([ttl, *(member.ttl for member in state.members.values())])
    return replace(state, members={**state.members, **ahead}, grace=min(state.grace, now + longest))


def join(state: Membership, incarnation: str, member: Member, now: int) -> tuple[RenewReply, Membership]:
    """JOIN: become a member; the only step that makes one. `member.deadline` is ignored."""
    if incarnation in state.dead:
        return RenewReply("DEAD", state.version), state
    state = _felt(state, member.ttl, now)
    members = {**state.members, incarnation: replace(member, deadline=now + member.ttl)}
    state = replace(state, members=members, version=state.version + 1, pulse=now)
    return RenewReply("OK", state.version), state


def renew(state: Membership, incarnation: str, info: str | None, now: int) -> tuple[RenewReply, Membership]:
    """RENEW: extend the lease; who is not a member is answered like the buried.

    A lapsed lease that nobody buried may be renewed: takeover needs burial, so nothing has been taken. What a node
    says anew of itself (that it is leaving) is told to the others.
    """
    member = state.members.get(incarnation)
    if member is None:
        return RenewReply("DEAD", state.version), state
    state = _felt(state, member.ttl, now)
    said = member.info if info is None else info
    version = state.version + (said != member.info)
    member = replace(member, deadline=now + member.ttl, info=said)
    state = replace(state, members={**state.members, incarnation: member}, pulse=now, version=version)
    return RenewReply("OK", state.version), state


def _buried(state: Membership, names: tuple[str, ...], kind: BurialKind, by: str, now: int) -> Membership:
    members = {k: v for k, v in state.members.items() if k not in names}
    dead = {**state.dead, **dict.fromkeys(names, now)}
    told = {name: Burial(kind, by, now - state.members[name].last_renewal()) for name in names}
    return replace(state, members=members, dead=dead, version=state.version + 1, burials={**state.burials, **told})


def reap(state: Membership, ttl: int, now: int, by: str = "") -> tuple[tuple[str, ...], Membership]:
    """REAP: bury the members whose lease has passed. `ttl` is the caller's, for the grace period; `by` the caller."""
    state = _within_reach(_felt(state, ttl, now), ttl, now)
    if now < state.grace:
        return (), state
    names = tuple(name for name, member in state.members.items() if member.deadline <= now)
    return names, _buried(state, names, "reaped", by, now) if names else state


def bury(
    state: Membership, incarnation: str, live_subscribers: int, ttl: int, now: int, by: str = ""
) -> tuple[BuryOutcome, Membership]:
    """BURY: the fast path for a killed process. Compares everything itself, in one step.

    Args:
        state: who is a member and who is not.
        incarnation: whom to bury.
        live_subscribers: subscribers of the incarnation's `live` channel, counted in the same step. They only
            spare a node that is late; what keeps two nodes from acting is the clock rule (`core.lease`).
        ttl: the caller's, in ms, for the grace period.
        now: the store's clock in ms.
        by: who buries it.
    """
    member = state.members.get(incarnation)
    if member is None:
        return "GONE", state
    state = _felt(state, ttl, now)
    if now < state.grace:
        return "GRACE", state
    if not member.is_stale(now):
        return "FRESH", state
    if live_subscribers:
        return "ALIVE", state
    stale = sum(m.is_stale(now) for m in state.members.values())
    if stale > max(1, len(state.members) // 3):
        return "MANY", state
    return "OK", _buried(state, (incarnation,), "silent", by, now)


def supersede(
    state: Membership, incarnation: str, by: str, deadline: int, now: int
) -> tuple[SupersedeOutcome, Membership]:
    """SUPERSEDE: a node that was started again buries its former incarnation.

    The caller has seen `deadline`, and has waited since, by its own clock, for longer than a node may act after a
    renewal. If no renewal has come meanwhile the former one does not act any more (I7), whatever the store's clock
    does, whoever else is silent, and whether a connection of it is still open: so neither grace nor a subscriber
    spares it. Two processes that share a name by mistake both renew, and never bury each other.
    """
    member = state.members.get(incarnation)
    if member is None:
        return "GONE", state
    if by == incarnation or by.rpartition("~")[0] != incarnation.rpartition("~")[0]:
        return "OTHER", state
    if member.deadline != deadline:
        return "FRESH", state
    return "OK", _buried(state, (incarnation,), "superseded", by, now)


def leave(state: Membership, incarnation: str, now: int) -> Membership:
    """LEAVE: a clean exit buries itself."""
    if incarnation in state.members:
        return _buried(state, (incarnation,), "left", incarnation, now)
    return state


def inherit(state: Membership, now: int) -> Membership:
    """Bury everybody, by the only process that can have the store: its lock shows that the former one is gone."""
    names = tuple(state.members)
    after = _buried(state, names, "superseded", "", now)
    # Of them nothing but the names is known.
    return replace(after, burials={**state.burials, **dict.fromkeys(names, Burial("superseded"))}) if names else state


def rebury(state: Membership, incarnations: Collection[str], now: int) -> Membership:
    """REBURY: write burials again that the store has lost; burial is terminal, whatever was lost of it (I10)."""
    names = tuple(name for name in incarnations if name not in state.dead)
    if not names:
        return state
    members = {k: v for k, v in state.members.items() if k not in names}
    return replace(state, members=members, dead={**state.dead, **dict.fromkeys(names, now)}, version=state.version + 1)


def forget(state: Membership, incarnation: str, kept_ms: int, now: int) -> Membership:
    """FORGET: drop a burial after `kept_ms`; the caller has seen that the node's hash is empty."""
    buried = state.dead.get(incarnation)
    if buried is None or now - buried < kept_ms:
        return state
    dead = {k: v for k, v in state.dead.items() if k != incarnation}
    # Old nodes forget the one and not the other.
    return replace(state, dead=dead, burials={k: v for k, v in state.burials.items() if k in dead})
