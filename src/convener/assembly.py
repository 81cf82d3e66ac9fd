"""What a node is built of, out of the settings."""

from __future__ import annotations

import os
import secrets
import socket
from pathlib import Path

from convener.manager.context import NodeOptions
from convener.settings import Settings
from convener.store.archive import Archive, open_objects
from convener.store.base import Store
from convener.store.memory import MemoryStore


def options_of(settings: Settings) -> NodeOptions:
    """The node's options out of the settings. Two processes of one command are two nodes, so a name that is not
    given gets the process's id.
    """
    name = settings.node_name or f"{socket.gethostname()[:40]}-{os.getpid()}-{secrets.token_hex(2)}"
    return NodeOptions(
        name=name,
        limit_policy=settings.limit_policy,
        overlap_policy=settings.overlap_policy,
        recovery=settings.recovery,
        placement=settings.placement,
        capacity=settings.capacity,
        rebalance=settings.rebalance,
        max_pending_messages=settings.max_pending_messages,
        max_payload_bytes=settings.max_payload_bytes,
        lease_ttl=settings.lease_ttl,
        renew_interval=settings.renew_interval,
        fast_burial=settings.fast_burial,
        drain_timeout=settings.drain_timeout,
        hibernate_after=settings.hibernate_after,
        turn_timeout=settings.turn_timeout,
        ready_without_store=settings.ready_without_store,
        store_high_watermark=settings.store_high_watermark,
        retention=settings.retention_seconds,
    )


def make_store(settings: Settings) -> Store:
    """The store that the settings name."""
    if settings.redis_url is not None:
        from convener.store.redis import RedisStore

        files = {
            "ssl_ca_certs": settings.redis_ca_file,
            "ssl_certfile": settings.redis_cert_file,
            "ssl_keyfile": settings.redis_key_file,
        }
        return RedisStore(
            settings.redis_url,
            namespace=settings.namespace,
            credentials=settings.redis_credentials,
            durability=settings.durability,
            tls={option: str(path) for option, path in files.items() if path is not None},
        )
    if settings.data_dir is not None:
        from convener.store.sqlite import SQLiteStore

        return SQLiteStore(Path(settings.data_dir))
    return MemoryStore()


def make_archive(settings: Settings) -> Archive | None:
    """The archive that the settings name, None for none.

    Raises:
        ConfigurationError: obstore is not installed, or cannot make anything of it.
    """
    if settings.archive_url is None:
        return None
    return Archive(open_objects(settings.archive_url), settings.namespace)
