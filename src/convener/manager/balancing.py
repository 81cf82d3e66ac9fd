"""Where conversations run: the node that starts one chooses by policy, and nodes that have more than their share give
some away (protocol, sections 5 and 8).

All of it is preference. Who owns a conversation is decided by CLAIM, and a choice that cannot be carried out falls back
to the node that was asked.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Mapping
from typing import TYPE_CHECKING, Final

import structlog

from convener.core.placement import rendezvous, surplus
from convener.errors import ConvenerError
from convener.manager.clock import boottime

if TYPE_CHECKING:
    from convener.manager.engine import Engine
    from convener.manager.members import Members
    from convener.manager.moving import Moves

log = structlog.get_logger(__name__)

ROUND_S: Final = 5.0
AT_ONCE: Final = 8
"""Conversations that a node gives away in one round: few, so that what they change is seen before the next."""
SETTLED_S: Final = 10.0
"""How long a conversation must have been idle before it is moved for balance alone."""


class Balance:
    """One node's part in an even load."""

    def __init__(self, engine: Engine, members: Members, moves: Moves) -> None:
        self._engine = engine
        self._node = engine.node
        self._members = members
        self._moves = moves

    def loads(self) -> Mapping[str, int]:
        """Conversations by node, of those that may take one; this node's own count is exact."""
        nodes = self._node.directory.nodes
        counts = {name: len(nodes[name].records) if name in nodes else 0 for name in self._members.live()}
        if self._node.incarnation in counts:
            counts[self._node.incarnation] = len(self._engine.runners)
        return counts

    def choose(self, cid: str) -> str | None:
        """Where a conversation is to start, None for here."""
        options, me = self._node.options, self._node.incarnation
        loads = self.loads()
        chosen: str | None = me
        if options.placement == "rendezvous":
            chosen = rendezvous(cid, loads)
        elif options.placement == "least_loaded":
            chosen = min(loads, key=lambda name: (loads[name], name != me, name), default=me)
        if chosen == me and options.capacity and loads.get(me, 0) >= options.capacity:
            # Full: whoever has least, if that is less than here.
            least = min(loads, key=lambda name: (loads[name], name), default=me)
            chosen = least if loads.get(least, 0) < loads.get(me, 0) else me
        return None if chosen == me else chosen

    async def run(self) -> None:
        """Give away what is more than this node's share, idle conversations only, for ever."""
        while True:
            await asyncio.sleep(ROUND_S * random.uniform(0.75, 1.25))
            if self._node.lease.valid() and not self._node.draining:
                await self._round()

    async def _round(self) -> None:
        loads = self.loads()
        count = min(surplus(loads, self._node.incarnation), AT_ONCE)
        if count <= 0:
            return
        idle = [
            runner
            for runner in self._engine.runners.values()
            if runner.status == "idle" and not runner.armed and boottime() - runner.idle_since > SETTLED_S
        ]
        # Those without clients here first: then nothing that is near gets far.
        idle.sort(key=lambda runner: (bool(runner.view.feeds), runner.idle_since))
        for runner in idle[:count]:
            target = min(
                (name for name in loads if not self._node.owns(name)), key=lambda n: (loads[n], n), default=None
            )
            if target is None:
                return
            try:
                await self._moves.give(runner.cid, target, cut=False)
            except ConvenerError as error:
                log.info("not moved for balance", conversation_id=runner.cid, error=str(error))
                return
            loads = self.loads()
