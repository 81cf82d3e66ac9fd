"""What is said of a server's settings: each judgement has a case, and what is hidden condemns nobody."""

from __future__ import annotations

import pytest

from convener.store.diagnosis import Diagnosis, Finding, Verdict
from convener.store.redis.lint import Facts, judge, size, version_of

GOOD = {
    "redis_version": "7.2.4",
    "role": "master",
    "aof_enabled": "1",
    "aof_last_write_status": "ok",
    "connected_slaves": "0",
    "used_memory": "1000000",
    "maxmemory": "10000000",
    "maxmemory_policy": "noeviction",
}
SET = {
    "save": "",
    "appendfsync": "everysec",
    "client-output-buffer-limit": "normal 0 0 0 slave 268435456 67108864 60 pubsub 33554432 8388608 60",
    "min-replicas-to-write": "0",
    "maxmemory-policy": "noeviction",
}


def _found(info: dict[str, str], config: dict[str, str] | None = None, clock: float | None = 0.0) -> dict[str, Finding]:
    facts = Facts("here:1", GOOD | info, SET | (config or {}), clock)
    return {finding.check: finding for finding in judge([facts], 0.8)}


def test_a_good_server_is_safe() -> None:
    found = _found({})
    assert {finding.verdict for finding in found.values()} == {"safe"}
    assert Diagnosis(tuple(found.values())).verdict == "safe"
    assert not any(finding.advice for finding in found.values())


def test_a_server_that_hides_everything_is_unknown_and_not_refused() -> None:
    found = judge([Facts("here:1")], 0.8)
    assert {finding.verdict for finding in found} == {"unknown"}
    assert Diagnosis(found).verdict == "safe"


@pytest.mark.parametrize(
    ("check", "info", "config", "verdict", "says"),
    [
        ("version", {"redis_version": "6.2.1"}, {}, "refused", "Redis 6.2.1"),
        ("version", {"valkey_version": "9.0.1"}, {}, "safe", "Valkey 9.0.1"),
        ("eviction", {}, {"maxmemory-policy": "allkeys-lru"}, "refused", "allkeys-lru: conversations are deleted"),
        ("eviction", {}, {"maxmemory-policy": "volatile-ttl"}, "safe", "volatile-ttl"),
        ("persistence", {"aof_last_write_status": "err"}, {}, "reduced", "cannot be written"),
        ("persistence", {}, {"appendfsync": "no"}, "reduced", "when the system likes"),
        ("persistence", {"aof_enabled": "0"}, {"save": "3600 1"}, "reduced", "snapshots only"),
        ("persistence", {"aof_enabled": "0"}, {}, "reduced", "a restart loses everything"),
        ("persistence", {"aof_enabled": "0", "connected_slaves": "1"}, {}, "refused", "empties its replicas"),
        ("replicas", {"connected_slaves": "2"}, {}, "safe", "2"),
        ("replicas", {"connected_slaves": "1", "slave0": "ip=h,state=sync"}, {}, "reduced", "1 are not in step"),
        ("min_replicas", {"min_slaves_good_slaves": "0"}, {"min-replicas-to-write": "1"}, "reduced", "is refused"),
        ("min_replicas", {"min_slaves_good_slaves": "2"}, {"min-replicas-to-write": "1"}, "safe", "1"),
        ("memory", {"maxmemory": "0"}, {}, "reduced", "no limit"),
        ("memory", {"used_memory": "8100000"}, {}, "reduced", "no new conversations"),
        ("memory", {"used_memory": "8100000", "mem_not_counted_for_evict": "200000"}, {}, "safe", "(79%)"),
        ("pubsub_buffer", {}, {"client-output-buffer-limit": "pubsub 1048576 0 0"}, "reduced", "1.0 MiB: nodes"),
        ("pubsub_buffer", {}, {"client-output-buffer-limit": "pubsub 0 4096 60"}, "reduced", "4.0 KiB"),
        ("pubsub_buffer", {}, {"client-output-buffer-limit": "pubsub 0 0 0"}, "safe", "no limit"),
    ],
)
def test_what_is_wrong(check: str, info: dict[str, str], config: dict[str, str], verdict: Verdict, says: str) -> None:
    found = _found(info, config)
    assert found[check].verdict == verdict
    assert says in found[check].says
    assert bool(found[check].advice) == (verdict in ("reduced", "refused"))
    assert {name for name, finding in found.items() if finding.verdict != "safe"} <= {check}
    assert Diagnosis(tuple(found.values())).verdict == verdict


def test_clocks() -> None:
    assert _found({}, clock=0.9)["clock"].verdict == "safe"
    assert "1.500 s behind" in _found({}, clock=-1.5)["clock"].says
    assert _found({}, clock=1.5)["clock"].verdict == "reduced"


def test_several_servers_are_told_apart() -> None:
    good, bad = Facts("a:1", GOOD, SET, 0.0), Facts("b:1", GOOD | {"redis_version": "6.0.0"}, SET, 0.0)
    versions = [finding for finding in judge([good, bad], 0.8) if finding.check == "version"]
    assert [(finding.verdict, finding.says) for finding in versions] == [
        ("safe", "a:1: Redis 7.2.4"),
        ("refused", "b:1: Redis 6.0.0"),
    ]


def test_numbers() -> None:
    assert [size(n) for n in (0, 1023, 1024, 3 << 20, 5 << 40)] == ["0 B", "1023 B", "1.0 KiB", "3.0 MiB", "5120.0 GiB"]
    assert [version_of(text) for text in ("7.2.4", "8.0", "unstable", "")] == [(7, 2), (8, 0), (7, 0), (7, 0)]
