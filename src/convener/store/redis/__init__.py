"""The store in Redis (7.0 or later) or Valkey. Nothing outside this package knows Redis."""

from __future__ import annotations

from convener.store.redis.heartbeat import HeartbeatLink
from convener.store.redis.store import RedisStore

__all__ = ["HeartbeatLink", "RedisStore"]
