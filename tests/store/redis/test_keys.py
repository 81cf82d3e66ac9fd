from __future__ import annotations

import zlib

import pytest

from convener.errors import ConfigurationError
from convener.store.redis.keys import KINDS, Keys, kind_of, shard_of, waited


def _all_keys(keys: Keys) -> list[str]:
    return [
        *keys.membership,
        keys.meta("c"),
        keys.log("c"),
        keys.inbox("c"),
        keys.seen("c"),
        keys.state("c"),
        keys.tail("c"),
        keys.asks("c"),
        keys.alarms("c"),
        keys.due(15),
        keys.ticket("t"),
        keys.slots("u"),
        keys.wait("u"),
        keys.conversations("u"),
        keys.records("n~1"),
        keys.connections("n~1"),
        keys.index(63),
        waited("ns:u:u"),
    ]


def test_every_key_is_of_a_known_kind_and_every_kind_is_used() -> None:
    kinds = [kind_of(key, "ns") for key in _all_keys(Keys("ns"))]
    assert None not in kinds
    assert {kind.pattern for kind in kinds if kind} == {kind.pattern for kind in KINDS}


def test_names_are_those_of_the_protocol() -> None:
    keys = Keys("NS")
    assert keys.membership == tuple(f"{{NS:m}}:{n}" for n in ("lease", "dead", "info", "ver", "pulse", "grace", "why"))
    assert (keys.meta("C"), keys.inbox("C"), keys.channel("C")) == ("{NS:c:C}:meta", "{NS:c:C}:in", "{NS:c:C}")
    assert (keys.tail("C"), keys.asks("C")) == ("{NS:c:C}:tail", "{NS:c:C}:asks")
    assert (keys.alarms("C"), keys.due(7)) == ("{NS:c:C}:alarms", "{NS:t:7}:due")
    assert (keys.records("I"), keys.node_channel("I")) == ("{NS:n:I}:conversations", "{NS:n:I}")
    assert (keys.sync, keys.live("I")) == ("{NS:m}:sync", "{NS:m}:live:I")
    assert (keys.conversations("U"), keys.index(7)) == ("{NS:u:U}:conversations", "{NS:i:7}")


def test_foreign_keys_are_of_no_kind() -> None:
    for key in ("x", "{ns:c:a}", "{ns:c:a}:metadata", "{other:c:a}:meta", "{ns:c:{a}}:meta", "{ns:m}:lease2"):
        assert kind_of(key, "ns") is None, key


@pytest.mark.parametrize("namespace", ["", "a b", "a{b", "a}b", "x" * 65, "a:b"])
def test_a_namespace_that_could_leave_its_hash_tag_is_refused(namespace: str) -> None:
    with pytest.raises(ConfigurationError, match="namespace"):
        Keys(namespace)


def test_shards_are_the_same_in_every_process_and_all_used() -> None:
    assert shard_of("c1") == zlib.crc32(b"c1") % 64
    assert {shard_of(f"c{i}") for i in range(2000)} == set(range(64))
