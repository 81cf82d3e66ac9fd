"""What the tests of a Redis Cluster share: stores in a namespace of their own, and short ways to say things."""

from __future__ import annotations

import secrets
from contextlib import AsyncExitStack
from typing import Any

from convener.core.model import AppendRequest, ClaimRequest
from convener.store.redis import RedisStore, acl
from convener.store.redis.history import NewHistory
from convener.store.redis.keys import Keys
from convener.store.redis.wire import slot_of
from tests.store.redis.load import ME, PUSH
from tests.support.servers import Server
from tests.support.topologies import RedisCluster, role, tell

OWN = ("rpush", "lrange", "zincrby")
"""What only these tests do."""

RIGHTS = ("~{t*", "&{t*", "-@all", *(f"+{command}" for command in (*sorted(acl.commands()), *OWN)))
"""What `convener doctor --print-acl` gives a node, for the namespaces of these tests."""


class Opener:
    """Opens stores in one namespace."""

    def __init__(self, servers: RedisCluster, stack: AsyncExitStack) -> None:
        self.servers = servers
        self.namespace = f"t{secrets.token_hex(4)}"
        self.keys = Keys(self.namespace)
        self.told: list[NewHistory] = []
        self._stack = stack

    @property
    def url(self) -> str:
        return self.servers.url.replace("://", "://node:pw@")

    async def __call__(self, url: str | None = None, **options: Any) -> RedisStore:
        tls = self.servers.tls
        options.setdefault("tls", None if tls is None else {"ssl_ca_certs": str(tls.certificate)})
        options.setdefault("on_new_history", self.told.append)
        return await self._stack.enter_async_context(RedisStore(url or self.url, namespace=self.namespace, **options))

    def conversations(self) -> list[str]:
        """A conversation at each primary."""
        found: dict[int, str] = {}
        number = 0
        while len(found) < 3:
            cid = f"c{number}"
            found.setdefault(self.servers.owner(self.slot(cid)).port, cid)
            number += 1
        return list(found.values())

    def slot(self, cid: str) -> int:
        return slot_of(self.keys.meta(cid))


def load_push(servers: RedisCluster) -> None:
    for server in servers.servers:
        tell(server, "SCRIPT", "LOAD", PUSH.source)


def other(servers: RedisCluster, than: Server) -> Server:
    return next(s for s in servers.servers if s is not than and role(s) == "master")


async def owned(store: RedisStore, cid: str) -> int:
    await store.create(cid, "u", "{}", "g")
    reply = await store.claim(cid, ClaimRequest(ME, "x", "", 0, "start"))
    assert reply.meta is not None
    return reply.meta.epoch


def batch(epoch: int, expected: int) -> AppendRequest:
    return AppendRequest(ME, epoch, expected, f"b{expected}", 0, 0, 0, (f'{{"kind":"reply","n":{expected}}}',))
