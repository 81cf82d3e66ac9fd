"""Every metric of a node, in one table.

Names begin with ``convener_``, units are base units, counters end in ``_total``. No label ever holds an id:
each set of labels is a time series, and ids would make one per conversation.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Final

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.metrics_core import Metric

from convener.version import PROTOCOL, __version__

__all__ = ["CONTENT_TYPE", "Metrics"]

CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"
"""Media type of `Metrics.render`."""

# From a reply of the demo agent to the longest answer of a model that works with tools.
_TURN_BUCKETS: Final = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
# A fast burial takes about 1.3 s, a slow one the lease (10 s).
_TAKEOVER_BUCKETS: Final = (0.1, 0.25, 0.5, 1, 1.5, 2, 3, 4, 6, 8, 10, 12, 15, 20, 30, 60)
_RPC_BUCKETS: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)

_STATUSES: Final = (
    "starting",
    "running",
    "idle",
    "waiting",
    "hibernated",
    "recovering",
    "draining",
    "stopped",
    "failed",
)


class _Registry(CollectorRegistry):
    """A registry without the ``…_created`` gauges that the client library adds to each counter and histogram.

    The library can only switch them off for the whole process, which belongs to the application we run in.
    """

    def collect(self) -> Iterable[Metric]:
        for metric in super().collect():
            metric.samples = [sample for sample in metric.samples if not sample.name.endswith("_created")]
            yield metric


class Metrics:
    """The metrics of one node, with a registry of their own, so that one process can hold several nodes.

    Attributes are called like the metric, without ``convener_``, ``_total`` and ``_seconds``.

    Args:
        version: of the package.
        protocol: version of the protocol that this node speaks with the others.
    """

    def __init__(self, *, version: str = __version__, protocol: int = PROTOCOL) -> None:
        self.registry: CollectorRegistry = _Registry()
        self._node(version, protocol)
        self._work()
        self._trouble()

    def render(self) -> bytes:
        """All metrics in Prometheus' text format (`CONTENT_TYPE`)."""
        return generate_latest(self.registry)

    def _node(self, package: str, protocol: int) -> None:
        self.build_info = self._gauge(
            "build_info", "Version and protocol of this node; always 1.", "version", "protocol"
        )
        self.build_info.labels(version=package, protocol=str(protocol)).set(1)
        self.node_ready = self._gauge("node_ready", "1 if this node may receive traffic, else 0.")
        self.nodes = self._gauge("nodes", "Nodes of the cluster as this node sees them.", "state")
        self.conversations = self._gauge("conversations", "Conversations loaded on this node.", "status")
        for status in _STATUSES:
            self.conversations.labels(status=status)
        self.connections = self._gauge("connections", "Clients connected to this node.", "transport")
        for transport in ("websocket", "polling", "sse"):
            self.connections.labels(transport=transport)
        self.lease_margin = self._gauge(
            "lease_margin_seconds",
            "Time until this node would suspend itself, if no renewal succeeded from now on.",
        )
        self.event_loop_lag = self._gauge("event_loop_lag_seconds", "How late the event loop last ran a due task.")
        self.bus_probe_age = self._gauge(
            "bus_probe_age_seconds", "Time since a publication or a probe was last heard on every subscriber."
        )

    def _work(self) -> None:
        self.messages = self._counter(
            "messages",
            "Messages that clients sent, by what they were answered: accepted, duplicate, or a code.",
            "result",
        )
        for result in ("accepted", "duplicate"):
            self.messages.labels(result=result)
        self.message_wait = self._histogram(
            "message_wait_seconds",
            "Time from a message's acceptance, by the store's clock, to the beginning of its first turn.",
            _TURN_BUCKETS,
        )
        self.inbox_pending = self._gauge(
            "inbox_pending", "Messages that were taken in on this node and are not answered yet."
        )
        self.turns = self._counter("turns", "Turns that ended on this node.", "outcome")
        for outcome in ("done", "failed", "interrupted"):
            self.turns.labels(outcome=outcome)
        self.turn_duration = self._histogram(
            "turn_duration_seconds", "Time from the beginning of a turn to its end.", _TURN_BUCKETS
        )
        self.claims = self._counter("claims", "Ownerships that this node took.", "reason")
        self.takeover_duration = self._histogram(
            "takeover_duration_seconds",
            "Time from a node's burial to the claim of one of its conversations.",
            _TAKEOVER_BUCKETS,
        )
        self.drain_remaining_conversations = self._gauge(
            "drain_remaining_conversations", "Conversations that a node that leaves still has."
        )
        self.handoff_gap = self._histogram(
            "handoff_gap_seconds",
            "Time in which nobody acted while a conversation was handed over.",
            _TAKEOVER_BUCKETS,
        )
        self.rpc_duration = self._histogram(
            "rpc_duration_seconds", "Duration of calls to a conversation's owner.", _RPC_BUCKETS, "outcome"
        )

    def _trouble(self) -> None:
        self.store_memory_ratio = self._gauge(
            "store_memory_ratio",
            "Part of the store's memory limit that is used; NaN without a limit, or if it is hidden.",
        )
        self.store_memory_ratio.set(math.nan)
        self.store_evicts = self._gauge(
            "store_evicts", "1 if the store's eviction policy would delete conversations, else 0."
        )
        self.limit_rejections = self._counter("limit_rejections", "Starts refused by the limit per user.", "policy")
        self.fenced_appends = self._counter("fenced_appends", "Writes refused because a newer epoch had begun.")
        self.resyncs = self._counter("resyncs", "Clients told to throw their view away.", "reason")
        self.log_entries_lost = self._counter(
            "log_entries_lost", "Log entries that the store had confirmed and had no more after it fell back."
        )
        self.log_entries_repaired = self._counter(
            "log_entries_repaired", "Lost log entries that their owner has written again."
        )
        self.store_errors = self._counter("store_errors", "Failed commands to the store.", "kind")
        self.invariant_violations = self._counter(
            "invariant_violations", "Violations of the protocol's invariants that were noticed.", "invariant"
        )
        self.archived_entries = self._counter("archived_entries", "Log entries that this node put into the archive.")
        self.archive_failures = self._counter(
            "archive_failures", "Attempts to archive that were put off, by what was away or refused.", "kind"
        )
        self.background_restarts = self._counter(
            "background_restarts", "Background tasks that crashed and were restarted.", "task"
        )
        self.malformed = self._counter(
            "malformed", "Frames, requests, bus messages and log entries that could not be read.", "where"
        )

    def _gauge(self, name: str, text: str, *labels: str) -> Gauge:
        return Gauge(name, text, labels, namespace="convener", registry=self.registry)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(name, text, labels, namespace="convener", registry=self.registry)

    def _histogram(self, name: str, text: str, buckets: Sequence[float], *labels: str) -> Histogram:
        return Histogram(name, text, labels, namespace="convener", registry=self.registry, buckets=buckets)
