"""Membership as one node lives it: join, know the others, reap and bury, leave (protocol, section 4)."""

from __future__ import annotations

import asyncio
import contextlib
import math
import random
from collections import Counter
from collections.abc import Callable
from typing import Final

import msgspec
import structlog

from convener.core.membership import BURY_SLACK_MS, DEAD_KEPT_MS, Member, Membership
from convener.core.placement import successors
from convener.errors import ConfigurationError, ConvenerError, OwnershipLost, StoreUnavailable
from convener.ids import node_of
from convener.manager.clock import boottime, wall_ms
from convener.manager.context import NodeContext
from convener.manager.versions import check_protocols, spoken
from convener.version import OLDEST_PROTOCOL, PROTOCOL, __version__

log = structlog.get_logger(__name__)

LOOK_S: Final = 0.25
REAP_S: Final = 1.0
FORGET_S: Final = 600.0
TWIN: Final = 4
"""Renewals of a former incarnation after which it is taken for a process of its own."""
FORGOTTEN_SLACK_MS: Final = 60_000
SMALL: Final = 16
"""Up to so many nodes everybody's lease is read twice per renew interval; above, once."""


def is_draining(member: Member) -> bool:
    """Whether it has said that it leaves."""
    return '"state":"draining"' in member.info


class Members:
    """This node's knowledge of the membership, and its part in burying the dead."""

    def __init__(self, node: NodeContext) -> None:
        self._node = node
        self.state = Membership()
        self.started_at = wall_ms()
        self.on_buried: list[Callable[[str], None]] = []
        self.on_changed: list[Callable[[], None]] = []
        self.on_dead: Callable[[], None] | None = None
        self._refresh = asyncio.Lock()
        self._suspects: set[str] = set()
        self._held_until = -math.inf

    def info(self) -> str:
        """What others are told of this node, JSON text."""
        terms = self._node.lease.terms
        return msgspec.json.encode(
            {
                "name": self._node.options.name,
                "version": __version__,
                "protocol": PROTOCOL,
                "oldest": OLDEST_PROTOCOL,
                "acts": 0 if terms is None else round(terms.window() * 1000),
                "started_at": self.started_at,
                "state": "draining" if self._node.draining else "active",
            }
        ).decode()

    async def join(self) -> None:
        """JOIN.

        Raises:
            OwnershipLost: this very incarnation is buried.
            ConfigurationError: a member speaks a protocol that does not go with this node's.
        """
        # Usually nobody ever hears of a node that does not belong here; what counts is the look below.
        with contextlib.suppress(StoreUnavailable):
            await self._check_protocols()
        options = self._node.options
        member = Member(
            deadline=0,
            ttl=round(options.lease_ttl * 1000),
            renew=round(options.renew_interval * 1000),
            info=self.info(),
        )
        reply = await self._node.store.join(self._node.incarnation, member)
        if reply.outcome != "OK":
            raise OwnershipLost("this incarnation is buried")
        try:
            # Of two that join at the same time at least the second one sees the other here.
            await self._check_protocols()
        except ConfigurationError:
            await self.leave()
            raise

    async def _check_protocols(self) -> None:
        state = await self._node.store.membership()
        # What still stands there under this node's own name is what it replaces.
        check_protocols({i: m for i, m in state.members.items() if spoken(m).name != self._node.options.name})

    async def leave(self) -> None:
        """A clean exit buries itself: others take over at once what is left."""
        await self._node.store.leave(self._node.incarnation)

    async def refresh(self) -> None:
        """Read the membership and act on what is new. `buried` only ever grows while a burial is remembered."""
        async with self._refresh:
            before, state = self.state, await self._node.store.membership()
            lost = _lost(before, state)
            if lost:
                log.warning("burials that the store has lost are written again", nodes=lost)
                self.fell_back()
                await self._node.store.rebury(lost)
                state = await self._node.store.membership()
            self.state = state
            acted_on = self._acted_on(before, state)
            new = [i for i in acted_on if i not in self._node.buried]
            self._node.buried |= set(new)
            # Forgotten burials have no records, slots or ownerships left that could name them.
            self._node.buried &= acted_on
            for incarnation in new:
                if incarnation != self._node.incarnation:
                    log.info("node is buried", node=incarnation)
                for tell in self.on_buried:
                    tell(incarnation)
            # A store that came back without its data counts anew, perhaps to the same number.
            if before.version != state.version or before.members.keys() != state.members.keys():
                for tell in self.on_changed:
                    tell()
        if self._node.incarnation in state.dead and self.on_dead is not None:
            self.on_dead()

    def fell_back(self) -> None:
        """The store may have lost burials. What is written again is acted on one lease later: until then who was buried
        may have been renewed, and acts (I7).
        """
        ttl = self._node.options.lease_ttl
        self._held_until = boottime() + ttl
        self._node.supervisor.spawn("act on burials", self._refresh_after(ttl))

    async def _refresh_after(self, seconds: float) -> None:
        await asyncio.sleep(seconds + 0.1)
        while boottime() >= self._held_until:
            try:
                await self.refresh()
            except ConvenerError as error:
                log.info("cannot read the members, again", error=str(error))
                await asyncio.sleep(0.5)
            else:
                break

    def _acted_on(self, before: Membership, state: Membership) -> set[str]:
        """Burials that count here. Those that appear after the store has fallen back do not, for a while."""
        if boottime() >= self._held_until:
            return set(state.dead)
        return {i for i, at in state.dead.items() if i in self._node.buried and before.dead.get(i) == at}

    async def verify(self) -> None:
        """The store may have fallen back: make membership and burials what they were. Raises `ConvenerError`."""
        await self.refresh()
        me = self._node.incarnation
        if me not in self.state.members and me not in self.state.dead:
            log.warning("the store has lost that this node is a member", node=me)
            await self.join()

    def live(self) -> list[str]:
        """Incarnations that are members and not draining."""
        return [name for name, member in self.state.members.items() if not is_draining(member)]

    def all_speak(self, protocol: int) -> bool:
        """Whether every member speaks at least this version of the protocol."""
        members = self.state.members.values()
        return bool(members) and all(spoken(member).protocol >= protocol for member in members)

    async def reap_forever(self) -> None:
        """Bury whose lease has passed; every second with jitter, on every node."""
        while True:
            await asyncio.sleep(REAP_S * random.uniform(0.75, 1.25))
            try:
                if self._node.lease.valid():
                    reaped = await self._node.store.reap(
                        round(self._node.options.lease_ttl * 1000), self._node.incarnation
                    )
                    if reaped:
                        await self.refresh()
            except ConvenerError as error:
                log.info("cannot reap", error=str(error))

    async def look_forever(self) -> None:
        """The fast path: two looks 250 ms apart at whose renewals have stopped, then BURY, which decides."""
        while True:
            few = len(self.state.members) <= SMALL
            pause = LOOK_S if self._suspects or few else self._node.options.renew_interval
            await asyncio.sleep(pause)
            try:
                if self._node.lease.valid():
                    await self._look()
            except ConvenerError as error:
                self._suspects.clear()
                log.info("cannot look at the members", error=str(error))

    async def _look(self) -> None:
        state = await self._node.store.membership()
        me = self._node.incarnation
        now = {
            name
            for name, member in state.members.items()
            # The pulse is at most a renew interval behind the store's clock; BURY itself compares exactly.
            if name != me
            and state.pulse - member.last_renewal() > member.renew
            and me in successors(name, state.members)
        }
        for name in now & self._suspects:
            outcome = await self._node.store.bury(name, round(self._node.options.lease_ttl * 1000), me)
            if outcome == "OK":
                log.info("buried a node whose process is gone", node=name)
                await self.refresh()
        self._suspects = now
        if state.version != self.state.version:
            await self.refresh()

    async def supersede(self) -> None:
        """Bury the former incarnations of this node: it was started again, so their process is gone, or is frozen.

        Until it is seen that they do not renew they may still act. One that does renew is another process under this
        node's name: a mistake, unless it is about to leave. It is left alone, so that the two never fight.
        """
        me, seen = self._node.incarnation, dict[str, tuple[int, float]]()
        former = {name for name in self.state.members if name != me and node_of(name) == node_of(me)}
        renewed: Counter[str] = Counter()
        while former and me == self._node.incarnation:
            try:
                state = await self._node.store.membership()
                former &= set(state.members)
                for name in sorted(former):
                    member = state.members[name]
                    if name not in seen or seen[name][0] != member.deadline:
                        renewed[name] += name in seen
                        seen[name] = (member.deadline, boottime())
                    elif boottime() - seen[name][1] > self._acting(member) and self._node.lease.valid():
                        await self._supersede(name, member.deadline)
                former -= {name for name in former if self._is_twin(state.members[name], name, renewed[name])}
            except ConvenerError as error:
                # What was seen before says nothing of what happened meanwhile.
                seen.clear()
                log.info("cannot look at former incarnations", error=str(error))
            await asyncio.sleep(LOOK_S)

    def _acting(self, member: Member) -> float:
        """Seconds after a renewal for which a member may act, and some. Its settings may be others than this node's."""
        if acts := spoken(member).acts:
            return (acts + BURY_SLACK_MS) / 1000
        fast = self._node.options.fast_burial
        return (2 * member.renew + BURY_SLACK_MS if fast else member.ttl) / 1000

    async def _supersede(self, name: str, deadline: int) -> None:
        if await self._node.store.supersede(name, self._node.incarnation, deadline) == "OK":
            log.info("superseded the former incarnation", node=name)
            await self.refresh()

    def _is_twin(self, member: Member, name: str, renewals: int) -> bool:
        if renewals < TWIN or is_draining(member):
            return False
        log.error(
            "another process runs under this node's name; give each node a name of its own",
            node=self._node.incarnation,
            other=name,
        )
        return True

    async def forget_forever(self) -> None:
        """Burials go after a day, when nothing is left in their hash; a record that landed late is recovered."""
        while True:
            await asyncio.sleep(FORGET_S * random.uniform(0.5, 1.5))
            try:
                for incarnation in list(self.state.dead):
                    if await self._node.store.drop_node(incarnation):
                        await self._node.store.forget(incarnation, DEAD_KEPT_MS)
                    else:
                        for tell in self.on_buried:
                            tell(incarnation)
            except ConvenerError as error:
                log.info("cannot forget", error=str(error))


def _lost(before: Membership, state: Membership) -> list[str]:
    """Burials that are not there any more, though nobody can have forgotten them yet."""
    known = [i for i in before.dead if i not in state.dead]
    return [i for i in known if state.pulse - before.dead[i] < DEAD_KEPT_MS - FORGOTTEN_SLACK_MS]
