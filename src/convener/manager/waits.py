"""What a conversation waits for, in words for operators."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal

from convener.core.membership import Member, Membership
from convener.core.model import Meta
from convener.core.placement import rendezvous
from convener.core.wire import turn_id, turn_position
from convener.ids import node_of
from convener.manager.engine import Engine
from convener.manager.members import is_draining

WaitKind = Literal[
    "nothing", "slot", "claim", "recovery", "lease", "handoff", "inbox", "turn", "answer", "alarm", "resume", "stop"
]
SHOWN: Final = 10


@dataclass(frozen=True, slots=True)
class Wait:
    """One thing that has to happen.

    Attributes:
        kind: for programs.
        text: for people.
        since: ms since 1970, where that is known.
    """

    kind: WaitKind
    text: str
    since: int | None = None


class Waits:
    """Finds what one conversation waits for.

    Args:
        live: nodes that may take conversations.
        turn: the turn that was begun last: id, attempt, when.
    """

    def __init__(
        self,
        engine: Engine,
        cid: str,
        meta: Meta,
        membership: Membership,
        live: Sequence[str],
        turn: tuple[str, int, int] | None,
    ) -> None:
        self._engine = engine
        self._store = engine.node.store
        self._cid = cid
        self._meta = meta
        self._membership = membership
        self._live = live
        self._turn = turn

    async def all(self) -> list[Wait]:
        """Everything, what comes first first; never empty."""
        meta = self._meta
        found = self._for_somebody()
        if found is None:
            found = []
            if meta.status == "running":
                found = await self._running()
            if await self._store.alarms(self._cid):
                found.append(await self._alarms())
        return found or [self._nothing()]

    def _for_somebody(self) -> list[Wait] | None:
        """What a status other than `running` says; None for `running` and `stopping`."""
        cid, meta = self._cid, self._meta
        last = f"turn {turn_id(meta.done)}" if meta.done else "a turn"
        if meta.status == "stopped":
            return [Wait("resume", f"it was stopped on purpose: `convener resume {cid}` lets it go on", meta.updated)]
        if meta.status == "failed":
            text = f"{last} was given up, since {meta.strikes} nodes went down over it: see their logs for why, then"
            return [Wait("resume", f"{text} `convener resume {cid}`", meta.updated)]
        if meta.status == "held":
            text = "a turn was cut off when its node went down, and is not repeated unasked (recovery=wait):"
            return [Wait("resume", f"{text} `convener resume {cid}`", meta.updated)]
        if meta.status == "stopping":
            who = node_of(meta.owner) if meta.owner in self._membership.members else "whoever recovers its node"
            return [Wait("stop", f"a stop was asked for; {who or 'the next node that looks'} is finishing it")]
        return None

    async def _running(self) -> list[Wait]:
        meta = self._meta
        if not meta.owner:
            return await self._unowned()
        member = self._membership.members.get(meta.owner)
        if member is None:
            return [self._recovery()]
        found: list[Wait] = []
        late = max(self._membership.pulse - member.last_renewal(), 0)
        if member.ttl and late > 2 * member.renew:
            found.append(self._lease(member, late))
        elif is_draining(member):
            found.append(Wait("handoff", f"{node_of(meta.owner)} is leaving: it is unloaded, or goes on elsewhere"))
        return found + await self._work(node_of(meta.owner))

    def _lease(self, member: Member, late: int) -> Wait:
        owner, lapse = node_of(self._meta.owner), max(member.deadline - self._membership.pulse, 0)
        text = (
            f"{owner} has not renewed its lease for {late / 1000:.1f} s and may not act. Either it renews, or it is "
            f"buried: at once if its process is gone, else when the lease ends, in {lapse / 1000:.1f} s"
        )
        return Wait("lease", text, member.last_renewal())

    def _recovery(self) -> Wait:
        meta, owner = self._meta, node_of(self._meta.owner)
        if meta.owner not in self._membership.dead:
            return Wait("recovery", f"{owner} owns it, and is neither a member nor remembered as buried: audit it")
        first = rendezvous(self._cid, self._live)
        if first is None:
            return Wait("recovery", f"{owner} is buried, and no node is there that could take it over")
        text = f"{owner} is buried; {node_of(first)} goes first to take it over, after two seconds any node"
        return Wait("recovery", text, self._membership.dead[meta.owner])

    async def _unowned(self) -> list[Wait]:
        meta, cid = self._meta, self._cid
        queue = await self._store.waiting(meta.user) if meta.user else ()
        place = next((index for index, waiting in enumerate(queue) if waiting.conversation_id == cid), None)
        if place is not None:
            held = await self._store.slots(meta.user)
            names = [f"{c} on {node_of(slot.incarnation)}" for c, slot in sorted(held.items())[:SHOWN]]
            more = f" and {len(held) - SHOWN} more" if len(held) > SHOWN else ""
            text = f"one of {meta.user}'s slots: it is number {place + 1} of {len(queue)} in the queue;"
            return [Wait("slot", f"{text} they are held by {', '.join(names) or 'nobody'}{more}", queue[place].since)]
        if meta.asks:
            return await self._questions()
        if meta.position > meta.done:
            text = (
                f"{_count(meta.position - meta.done, 'message')} unanswered, and nobody owns it: a node is claiming it"
            )
            return [Wait("claim", f"{text}, or it is woken by the same message sent again", meta.updated)]
        return []

    async def _work(self, owner: str) -> list[Wait]:
        """What a live owner has to do."""
        meta, found = self._meta, list[Wait]()
        if meta.asks:
            found += await self._questions()
        open_, unread = meta.cursor - meta.done, meta.position - meta.cursor
        if unread > 0:
            found.append(Wait("inbox", f"{owner} to take in {_count(unread, 'entry', 'entries')} of the inbox"))
        if open_ > 0 and not meta.asks:
            found.append(self._open_turn(owner, open_))
        return found

    def _open_turn(self, owner: str, open_: int) -> Wait:
        expected = turn_id(self._meta.done + 1)
        turn, attempt, since = self._turn or ("", 0, 0)
        if turn_position(turn) <= self._meta.done:
            turn = ""
        queued = f", and {_count(open_ - 1, 'message')} behind it" if open_ > 1 else ""
        if not turn:
            return Wait("turn", f"{owner} to begin turn {expected}{queued}")
        again = f", attempt {attempt}" if attempt > 1 else ""
        return Wait("turn", f"the agent on {owner} to end turn {turn}{again}{queued}", since)

    async def _questions(self) -> list[Wait]:
        asked = [q.ask_id for q in await self._engine.intents.questions(self._cid)]
        if not asked:
            return []
        which = f"question {asked[0]}" if len(asked) == 1 else f"one of the questions {', '.join(asked[:SHOWN])}"
        return [Wait("answer", f"an answer to {which} of the agent: `convener show {self._cid}` lists what it asks")]

    async def _alarms(self) -> Wait:
        count = len(await self._store.alarms(self._cid))
        return Wait("alarm", f"{_count(count, 'alarm')} set, which wake{'s' if count == 1 else ''} it when due")

    def _nothing(self) -> Wait:
        if self._meta.owner:
            return Wait("nothing", "nothing: everything is answered")
        return Wait(
            "nothing", "nothing: everything is answered, and it is not loaded; the next message or client loads it"
        )


def _count(number: int, noun: str, plural: str = "") -> str:
    return f"{number} {noun if number == 1 else plural or noun + 's'}"
