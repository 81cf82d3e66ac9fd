"""What a node tells its operators: readiness, nodes, gauges, the auditor. From memory, but for the auditor."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, Final

import msgspec

from convener.core.membership import Member
from convener.ids import node_of
from convener.manager.clock import boottime
from convener.manager.engine import Engine
from convener.manager.members import Members
from convener.manager.ops import NodeInfo, NodeState, Readiness
from convener.store.audit import audit

DEAF_S: Final = 5.0
GAUGES_S: Final = 1.0


class Told(msgspec.Struct):
    """The part of a member's info that is shown."""

    version: str = ""
    protocol: int = 1
    address: str = ""
    started_at: int = 0
    state: str = "active"


class Health:
    """The operators' view of one node."""

    def __init__(self, engine: Engine, members: Members, ready_without_store: float) -> None:
        self._engine = engine
        self._members = members
        self._grace = ready_without_store
        self._good = boottime()

    def readiness(self) -> Readiness:
        """Whether this node may receive traffic.

        A node whose store is away stays ready, degraded, for `ready_without_store` seconds: its sockets are good,
        and all nodes share the store, so sending clients elsewhere would not help them. The same holds of a store that
        is set to delete conversations when it is full: degraded, as long as that lasts.
        """
        node = self._engine.node
        now = boottime()
        checks = {"lease": "ok", "bus": "ok", "store": "ok", "draining": "ok", "tasks": "ok"}
        if not node.lease.valid():
            checks["lease"] = "not valid: this node is suspended"
        if (silent := now - node.store.heard()) > DEAF_S:
            checks["bus"] = f"nothing heard for {silent:.0f} s"
        if problem := node.storage.problem():
            checks["store"] = problem
        elif checks["lease"] != "ok" and checks["bus"] != "ok" and not node.lease.ended:
            checks["store"] = "does not answer"
        if node.draining:
            checks["draining"] = "this node is leaving"
        if failing := node.supervisor.failing:
            checks["tasks"] = "failing: " + ", ".join(sorted(failing))
        away = checks["lease"] != "ok" or checks["bus"] != "ok"
        if not away:
            self._good = now
        waits = away and not node.lease.ended and now - self._good < self._grace
        ready = checks["draining"] == "ok" and (not away or waits)
        fallbacks = tuple(self._engine.verifier.losses.reports)
        degraded = ready and (waits or checks["store"] != "ok")
        return Readiness(ready=ready, degraded=degraded, checks=checks, fallbacks=fallbacks)

    def nodes(self) -> Sequence[NodeInfo]:
        """The cluster as this node sees it, the buried that are remembered last."""
        state = self._members.state
        live = [self._live(name, member) for name, member in sorted(state.members.items())]
        dead = [NodeInfo(node_of(name), name, "buried") for name in sorted(state.dead)]
        return [*live, *dead]

    def _live(self, incarnation: str, member: Member) -> NodeInfo:
        node = self._engine.node
        try:
            told = msgspec.json.decode(member.info, type=Told)
        except msgspec.MsgspecError:
            told = Told()
        view = node.directory.nodes.get(incarnation)
        mine = node.owns(incarnation)
        state: NodeState = "draining" if told.state == "draining" or (mine and node.draining) else "live"
        if mine and not node.lease.valid():
            state = "suspended"
        return NodeInfo(
            name=node_of(incarnation),
            incarnation=incarnation,
            state=state,
            version=told.version,
            protocol=told.protocol,
            address=told.address,
            conversations=len(self._engine.runners) if mine else len(view.records) if view else 0,
            connections=len(self._engine.feeds) if mine else len(view.connections) if view else 0,
            started_at=told.started_at,
            last_renewal=member.last_renewal() if member.ttl else None,
        )

    async def audit(self, conversation_ids: Sequence[str] | None) -> Mapping[str, Any]:
        """Check the invariants of these conversations, or of all. Raises `StoreUnavailable`."""
        report = await audit(
            self._engine.node.store,
            conversation_ids,
            limit=self._engine.admission.limit_of,
            logs=self._engine.node.logs,
        )
        for violation in report.violations:
            self._engine.node.metrics.invariant_violations.labels(invariant=violation.invariant).inc()
        return {**asdict(report), "violations": [asdict(v) for v in report.violations]}

    async def run(self) -> None:
        """Keep the gauges true."""
        node, metrics = self._engine.node, self._engine.node.metrics
        shown: set[str] = set()
        while True:
            counts = Counter(runner.status for runner in self._engine.runners.values())
            for status in shown | set(counts):
                metrics.conversations.labels(status=status).set(counts[status])
            shown |= set(counts)
            metrics.inbox_pending.set(sum(runner.turns.unanswered for runner in self._engine.runners.values()))
            metrics.nodes.labels(state="live").set(len(self._members.state.members))
            metrics.nodes.labels(state="buried").set(len(self._members.state.dead))
            metrics.bus_probe_age.set(max(boottime() - node.store.heard(), 0.0))
            metrics.node_ready.set(1 if self.readiness().ready else 0)
            await asyncio.sleep(GAUGES_S)
