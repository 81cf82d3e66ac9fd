"""How a server is set up, and what that means for conversations: the same judgement when a node starts and in
`convener doctor`. Pure: what the servers say goes in, findings come out.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from convener.store.diagnosis import Finding

OLDEST: Final = (7, 0)
"""Sharded pub/sub, script flags and XADD's explicit ids of Redis 7 are what the protocol stands on."""

ASKED: Final = ("save", "appendfsync", "client-output-buffer-limit", "min-replicas-to-write", "maxmemory-policy")
"""What CONFIG GET is asked, where it may be."""

PUBSUB_BYTES: Final = 32 << 20
"""The servers' own default: a subscriber that is behind by more is cut off."""

CLOCK_S: Final = 1.0


@dataclass(frozen=True, slots=True)
class Facts:
    """What one server says of itself.

    Attributes:
        place: host and port.
        info: fields of INFO; empty if it is hidden.
        config: parameters of CONFIG GET; empty if it is hidden.
        clock: seconds by which its clock is ahead of this machine's; None if it is hidden.
    """

    place: str
    info: Mapping[str, str] = field(default_factory=dict[str, str])
    config: Mapping[str, str] = field(default_factory=dict[str, str])
    clock: float | None = None

    @property
    def policy(self) -> str | None:
        """The eviction policy, None if it is hidden."""
        return self.config.get("maxmemory-policy") or self.info.get("maxmemory_policy")

    def number(self, name: str) -> int | None:
        """A field of INFO, None if it is hidden."""
        text = self.info.get(name, "")
        return int(text) if text.isdigit() else None

    def ratio(self) -> float | None:
        """Part of the memory limit that is used; None without a limit, or if it is hidden."""
        used, most = self.number("used_memory"), self.number("maxmemory")
        if used is None or not most:
            return None
        # Buffers of replicas and of the append-only file do not count towards the limit.
        return (used - (self.number("mem_not_counted_for_evict") or 0)) / most


def version_of(text: str) -> tuple[int, int]:
    """Major and minor number; `OLDEST` for what is none."""
    parts = text.split(".")
    return (int(parts[0]), int(parts[1])) if len(parts) > 1 and parts[0].isdigit() and parts[1].isdigit() else OLDEST


def judge(servers: Sequence[Facts], high_watermark: float) -> tuple[Finding, ...]:
    """All findings, those of several servers by the name of the check and the place."""
    return tuple(finding for facts in servers for finding in _server(facts, high_watermark, len(servers) > 1))


def _server(facts: Facts, high_watermark: float, several: bool) -> Iterator[Finding]:
    found = (
        _version(facts),
        _eviction(facts),
        _persistence(facts),
        _replicas(facts),
        _writes(facts),
        _memory(facts, high_watermark),
        _pubsub(facts),
        _clock(facts),
    )
    for finding in found:
        says = f"{facts.place}: {finding.says}" if several else finding.says
        yield Finding(finding.check, finding.verdict, says, finding.advice)


def _hidden(check: str, by: str) -> Finding:
    return Finding(check, "unknown", f"the store hides it ({by})")


def _version(facts: Facts) -> Finding:
    interface = facts.info.get("redis_version")
    if interface is None:
        return _hidden("version", "INFO")
    name = f"Valkey {facts.info['valkey_version']}" if "valkey_version" in facts.info else f"Redis {interface}"
    if version_of(interface) < OLDEST:
        return Finding("version", "refused", name, "use Redis 7.0 or later, or Valkey")
    return Finding("version", "safe", name)


def _eviction(facts: Facts) -> Finding:
    policy = facts.policy
    if policy is None:
        return _hidden("eviction", "INFO, CONFIG")
    if policy.startswith("allkeys"):
        advice = "set maxmemory-policy noeviction"
        return Finding("eviction", "refused", f"{policy}: conversations are deleted when the memory is full", advice)
    return Finding("eviction", "safe", f"{policy}: nothing that conversations need is deleted")


def _persistence(facts: Facts) -> Finding:
    if facts.info.get("aof_enabled") == "1":
        failed = facts.info.get("aof_last_write_status", "ok") != "ok"
        if failed:
            return Finding("persistence", "reduced", "the append-only file cannot be written", "look at its disk")
        sync = facts.config.get("appendfsync")
        if sync == "no":
            says = "append-only file, written to disk when the system likes to"
            return Finding("persistence", "reduced", says, "set appendfsync everysec or always")
        return Finding("persistence", "safe", f"append-only file{f', synced {sync}' if sync else ''}")
    save = facts.config.get("save")
    if "aof_enabled" not in facts.info or save is None:
        return _hidden("persistence", "INFO, CONFIG")
    advice = "set appendonly yes"
    if save:
        says = "snapshots only: a crash loses what came after the last one"
        return Finding("persistence", "reduced", says, advice)
    if facts.number("connected_slaves"):
        says = "none, with replicas: a primary that is restarted by its supervisor is empty, and empties its replicas"
        return Finding("persistence", "refused", says, f"{advice}, or make sure that nothing restarts a primary")
    return Finding("persistence", "reduced", "none: a restart loses everything", advice)


def _replicas(facts: Facts) -> Finding:
    count = facts.number("connected_slaves")
    if count is None:
        return _hidden("replicas", "INFO")
    if not count:
        return Finding("replicas", "safe", "none: if this server's disk is lost, so is everything")
    states = [value for name, value in facts.info.items() if name.startswith("slave") and "state=" in value]
    behind = [state for state in states if "state=online" not in state]
    if behind:
        return Finding("replicas", "reduced", f"{count}, of which {len(behind)} are not in step yet", "wait for them")
    return Finding("replicas", "safe", str(count))


def _writes(facts: Facts) -> Finding:
    wanted, good = facts.config.get("min-replicas-to-write"), facts.number("min_slaves_good_slaves")
    if wanted is None and good is None:
        # INFO tells of it only where it is set.
        return _hidden("min_replicas", "CONFIG") if "role" not in facts.info else Finding("min_replicas", "safe", "0")
    if wanted is not None and wanted.isdigit() and int(wanted) > (good or 0):
        says = f"{wanted} replicas are needed to write, {good or 0} are there: every write is refused"
        return Finding("min_replicas", "reduced", says, "bring the replicas back, or lower min-replicas-to-write")
    return Finding("min_replicas", "safe", wanted or "met")


def _memory(facts: Facts, high_watermark: float) -> Finding:
    used, most, ratio = facts.number("used_memory"), facts.number("maxmemory"), facts.ratio()
    if used is None or most is None:
        return _hidden("memory", "INFO")
    if ratio is None:
        says = f"{size(used)} used, no limit: what the machine has is the limit, and the system ends the server there"
        return Finding("memory", "reduced", says, "set maxmemory below what the machine has")
    says = f"{size(used)} used of {size(most)} ({ratio:.0%})"
    if ratio >= high_watermark:
        advice = "give it more memory, or delete conversations"
        return Finding("memory", "reduced", f"{says}: no new conversations are taken", advice)
    return Finding("memory", "safe", says)


def _pubsub(facts: Facts) -> Finding:
    words = facts.config.get("client-output-buffer-limit", "").split()
    if "pubsub" not in words:
        return _hidden("pubsub_buffer", "CONFIG")
    hard, soft = (int(word) for word in words[words.index("pubsub") + 1 : words.index("pubsub") + 3])
    low = [size(limit) for limit, least in ((hard, PUBSUB_BYTES), (soft, PUBSUB_BYTES // 4)) if 0 < limit < least]
    if low:
        advice = "set client-output-buffer-limit pubsub 32mb 8mb 60, or more"
        return Finding("pubsub_buffer", "reduced", f"{low[0]}: nodes are cut off in a burst of messages", advice)
    return Finding("pubsub_buffer", "safe", size(hard) if hard else "no limit")


def _clock(facts: Facts) -> Finding:
    if facts.clock is None:
        return _hidden("clock", "TIME")
    says = f"{abs(facts.clock):.3f} s {'ahead of' if facts.clock >= 0 else 'behind'} this machine's"
    if abs(facts.clock) > CLOCK_S:
        return Finding(
            "clock", "reduced", says, "synchronise the clocks: those of servers that replace each other must agree"
        )
    return Finding("clock", "safe", says)


def size(number: float) -> str:
    """Bytes for people."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if number < 1024 or unit == "GiB":
            break
        number /= 1024
    return f"{number:.0f} {unit}" if unit == "B" else f"{number:.1f} {unit}"
