"""Planned changes of owner: one node stops acting and asks another to own the conversation (protocol, section 8).

The source settles what it has written and acts no more; the target does what every start does (record, slot,
subscription, CLAIM), expecting the source as owner. If that fails, or its outcome cannot be learnt, the source owns the
conversation anew under an epoch that a late claim cannot match. So a handoff is no new way to own a conversation, and
nothing but time is lost when either node dies in the middle.
"""

from __future__ import annotations

import dataclasses
import time
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Final

import msgspec
import structlog

from convener.errors import ConvenerError, InvalidRequest, NotFound, OwnerUnavailable
from convener.ids import node_of
from convener.manager.balancing import Balance
from convener.manager.base import MoveResult
from convener.manager.calls import Calls
from convener.manager.clock import boottime
from convener.manager.engine import Engine
from convener.manager.members import Members
from convener.manager.ops import DrainStatus
from convener.manager.runner import Runner
from convener.manager.starter import Queued, Started

log = structlog.get_logger(__name__)

TAKE_S: Final = 10.0
MOVE_S: Final = 20.0
UNTOLD_S: Final = 2.0
"""How long the directory may not show yet what a node has taken."""


class Moves:
    """Hands conversations of this node over, and takes those of others."""

    def __init__(self, engine: Engine, members: Members, calls: Calls) -> None:
        self._engine = engine
        self._node = engine.node
        self._members = members
        self._calls = calls
        self.balance = Balance(engine, members, self)
        self._chosen: deque[tuple[float, str]] = deque()
        calls.serve("take", self._serve_take)
        calls.serve("move", self._serve_move)
        calls.serve("drain", self._serve_drain)
        self.drain_here: Callable[[float | None], Awaitable[DrainStatus]] | None = None

    async def hand_over(self, runner: Runner) -> bool:
        """See `Elsewhere`."""
        target = self.least_loaded()
        if target is None:
            return False
        return await self.give(runner.cid, target, cut=True) == "moved"

    def exists(self) -> bool:
        """See `Elsewhere`."""
        return bool(self._others())

    def choose(self, cid: str) -> str | None:
        """See `Elsewhere`."""
        return self.balance.choose(cid)

    async def start(self, cid: str, node: str | None = None, source: str = "") -> Started:
        """See `Elsewhere`."""
        target = node or self.least_loaded()
        if target is None:
            raise OwnerUnavailable("this node is leaving, and there is no other", retry_after=1.0)
        return await self._ask_to_take(target, cid, source)

    async def _ask_to_take(self, target: str, cid: str, source: str) -> Started:
        """Ask another node to own a conversation in the place of `source`, or to wake it ("").

        Raises as a start there does; `OwnerUnavailable` with code ``not_taken`` if it has not begun to.
        """
        try:
            answer = await self._calls.ask(target, "take", {"conversation_id": cid, "source": source}, TAKE_S)
        except ConvenerError as error:
            if error.wire_code == Queued.code:
                raise Queued(error.detail) from error
            raise
        return Started(str(answer["owner"]), int(answer["epoch"]), here=False)

    async def move(self, cid: str, node: str, *, cut: bool) -> MoveResult:
        """Make the node of that name own a conversation, from wherever it is; one that is not loaded is loaded there.

        Args:
            cut: whether a turn under way is cut off, to be begun again there.

        Raises:
            NotFound: no such conversation or node.
            InvalidRequest: the node is leaving.
            OwnerUnavailable: it could not be done in time; it is owned all the same, here or there.
        """
        target = self._incarnation(node)
        meta = await self._node.store.head(cid)
        if meta is None:
            raise NotFound(f"no conversation {cid}")
        body = {"conversation_id": cid, "target": target, "cut": cut}
        if not self._engine.is_answering(cid, meta.owner):
            # Nobody has it: the target starts it.
            if self._node.owns(target):
                await self._engine.starter.ensure(cid, "wake")
            else:
                await self._ask_to_take(target, cid, "")
            return "moved"
        if meta.owner == target:
            return "there"
        if self._node.owns(meta.owner):
            return await self.give(cid, target, cut=cut)
        outcome = await self._calls.ask(meta.owner, "move", body, MOVE_S)
        return outcome if outcome in ("moved", "there") else "busy"

    def _incarnation(self, node: str) -> str:
        names = [name for name in self._members.state.members if node in (name, node_of(name))]
        if not names:
            raise NotFound(f"no node {node}", code="node_not_found")
        live = [name for name in names if name in self._members.live()]
        if not live:
            raise InvalidRequest(f"node {node} is leaving", code="node_leaving")
        return live[0]

    async def give(self, cid: str, target: str, *, cut: bool) -> MoveResult:
        """Hand a conversation of this node over.

        Raises:
            OwnerUnavailable: it was not taken, or its outcome is unknown and it is owned anew.
        """
        runner = self._engine.runner(cid)
        if runner is None:
            raise OwnerUnavailable("the conversation has just moved; try again", retry_after=0.5)
        if runner.acting and not cut:
            return "busy"
        began = time.monotonic()
        if not await runner.hand_over(lambda: self._ask_to_take(target, cid, runner.incarnation)):
            raise OwnerUnavailable("the conversation was not handed over; try again", retry_after=1.0)
        await runner.wait_ended()
        self._node.metrics.handoff_gap.observe(time.monotonic() - began)
        log.info("conversation handed over", conversation_id=cid, to=target)
        return "moved"

    def _others(self) -> list[str]:
        return [name for name in self._members.live() if not self._node.owns(name)]

    def least_loaded(self) -> str | None:
        """The node that owns the fewest conversations of those that may take one; None if there is no other.

        What this node has just chosen one for is counted: it does not show in the directory yet.
        """
        now, nodes = boottime(), self._node.directory.nodes
        while self._chosen and now - self._chosen[0][0] > UNTOLD_S:
            self._chosen.popleft()
        chosen = Counter(name for _, name in self._chosen)
        loads = {name: len(nodes[name].records) if name in nodes else 0 for name in self._others()}
        target = min(loads, key=lambda name: (loads[name] + chosen[name], name), default=None)
        if target is not None:
            self._chosen.append((now, target))
        return target

    async def drain(self, node: str, timeout: float | None) -> DrainStatus:
        """Begin to empty another node. Raises as `Operations.drain`."""
        names = [name for name in self._members.state.members if node in (name, node_of(name))]
        gone = [name for name in self._members.state.dead if node in (name, node_of(name))]
        if gone and not names:
            # It has left, by itself or not: what it owned is owned by others, or by nobody.
            return DrainStatus(node_of(gone[0]), "drained")
        if not names:
            raise NotFound(f"no node {node}", code="node_not_found")
        answer = await self._calls.ask(names[0], "drain", {"timeout": timeout}, TAKE_S)
        return msgspec.convert(answer, DrainStatus)

    async def _serve_drain(self, body: Mapping[str, Any]) -> Any:
        timeout = body.get("timeout")
        assert self.drain_here is not None
        return dataclasses.asdict(await self.drain_here(timeout if isinstance(timeout, int | float) else None))

    # -- for other nodes -------------------------------------------------------------------------------------------

    async def _serve_take(self, body: Mapping[str, Any]) -> dict[str, Any]:
        cid, source = str(body.get("conversation_id")), str(body.get("source", ""))
        if self._node.draining:
            raise OwnerUnavailable("this node is leaving too", code="not_taken")
        if source:
            started = await self._engine.starter.take(cid, source)
            if not started.here:
                raise OwnerUnavailable("another node owns the conversation")
        else:
            started = await self._engine.starter.ensure_here(cid, "wake")
        return {"owner": started.owner, "epoch": started.epoch}

    async def _serve_move(self, body: Mapping[str, Any]) -> MoveResult:
        cid, target = str(body.get("conversation_id")), str(body.get("target"))
        try:
            return await self.give(cid, target, cut=body.get("cut") is True)
        except ConvenerError as error:
            log.info("not handed over", conversation_id=cid, to=target, error=str(error))
            raise
