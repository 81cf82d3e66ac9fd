"""What the parts of the store share."""

from __future__ import annotations

from typing import Final

from convener.store.redis.keys import Keys
from convener.store.redis.topology import Topology

CHUNK: Final = 1000
"""Items of one command: some managed stores refuse commands of more than 3,000 arguments."""


class Part:
    """A part of `RedisStore`: the names of keys, and the way to the servers."""

    keys: Keys
    topology: Topology
