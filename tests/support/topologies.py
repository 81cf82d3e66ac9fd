"""Several servers that belong together: a primary with replicas under Sentinels, and a Redis Cluster.

Both are made of `Server`s on free loopback ports, so single servers can be killed, frozen and started again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from types import TracebackType
from typing import Any, Final, Self, TypeVar

import redis
from redis.exceptions import RedisError

from tests.support.servers import Flavour, Server, free_port
from tests.support.waiting import wait_until_sync

SLOTS: Final = 16384
HOST: Final = "127.0.0.1"
NODE_TIMEOUT_MS: Final = 1500
"""After so long without an answer a server counts as gone: short, so that fail-overs are."""


S = TypeVar("S", bound=Server)


def tell(server: Server, *words: str | int) -> Any:
    """The reply to one command as the server sends it, which redis-py's clients would have changed."""
    connection: Any = redis.Connection(
        host=HOST, port=server.port, password=server.password, protocol=2, socket_timeout=20
    )
    try:
        connection.send_command(*words)
        return connection.read_response()
    finally:
        connection.disconnect()


def fields(reply: list[bytes]) -> dict[str, str]:
    """A flat reply of names and values."""
    return dict(zip((n.decode() for n in reply[::2]), (v.decode() for v in reply[1::2]), strict=True))


def lines(text: bytes) -> dict[str, str]:
    """A reply of lines like INFO's."""
    return {name: value for name, colon, value in (li.partition(":") for li in text.decode().splitlines()) if colon}


def info(server: Server, section: str) -> dict[str, str]:
    """INFO of one section."""
    return lines(tell(server, "INFO", section))


class Group:
    """Servers that start and end together."""

    def __init__(self) -> None:
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def start(self) -> None:
        """Start everything, and wait until it works together."""
        raise AssertionError("a group says what it consists of")

    def run(self, server: S) -> S:
        """Start a server, which ends with the group."""
        return self._stack.enter_context(server)


class Sentinel(Server):
    """A server in Sentinel mode that watches one primary."""

    def __init__(self, flavour: Flavour, primary: Server, *, quorum: int = 2, lines: Sequence[str] = ()) -> None:
        super().__init__(flavour)
        self._lines = [
            f"sentinel monitor {SERVICE} {HOST} {primary.port} {quorum}",
            f"sentinel down-after-milliseconds {SERVICE} {NODE_TIMEOUT_MS}",
            f"sentinel failover-timeout {SERVICE} 10000",
            *lines,
        ]

    def command(self) -> tuple[str, ...]:
        """Sentinel writes what it learns into its configuration file."""
        path = self.directory / "sentinel.conf"
        if not path.exists():
            path.write_text("\n".join([f"port {self.port}", f"bind {HOST}", f"dir {self.directory}", *self._lines]))
        return (self.program, str(path), "--sentinel")


SERVICE: Final = "convener-test"


class SentinelGroup(Group):
    """A primary, replicas, and three Sentinels.

    Args:
        options: of primary and replicas.
        lines: further lines of the Sentinels' configuration.
    """

    def __init__(
        self,
        flavour: Flavour = "valkey",
        *,
        replicas: int = 1,
        options: Mapping[str, str] | None = None,
        lines: Sequence[str] = (),
    ) -> None:
        super().__init__()
        self.flavour: Flavour = flavour
        self._replicas = replicas
        self._options = {"repl-diskless-sync-delay": "0", "repl-ping-replica-period": "1", **(options or {})}
        self._lines = lines
        self.servers: list[Server] = []
        self.sentinels: list[Sentinel] = []

    @property
    def url(self) -> str:
        """Where the Sentinels are."""
        return f"redis+sentinel://{','.join(f'{HOST}:{s.port}' for s in self.sentinels)}/0/{SERVICE}"

    def start(self) -> None:
        """Start everything, and wait until every Sentinel knows every replica and the other Sentinels."""
        self.servers = [self.run(Server(self.flavour, options=self._options)) for _ in range(1 + self._replicas)]
        primary = self.servers[0]
        for replica in self.servers[1:]:
            tell(replica, "REPLICAOF", HOST, primary.port)
        self.sentinels = [self.run(Sentinel(self.flavour, primary, lines=self._lines)) for _ in range(3)]
        wait_until_sync(self.complete, "the Sentinels know each other and the replicas", 30)

    def complete(self) -> bool:
        """Whether every Sentinel sees a sound primary, all replicas in sync, and the other Sentinels."""
        for sentinel in self.sentinels:
            seen = fields(tell(sentinel, "SENTINEL", "MASTER", SERVICE))
            known = (seen["flags"], int(seen["num-slaves"]), int(seen["num-other-sentinels"]))
            if known != ("master", self._replicas, len(self.sentinels) - 1):
                return False
        return all(info(s, "replication").get("master_link_status") == "up" for s in self.servers[1:])

    def primary(self) -> Server:
        """The server that the first running Sentinel names."""
        sentinel = next(s for s in self.sentinels if s.running)
        _, port = tell(sentinel, "SENTINEL", "GET-MASTER-ADDR-BY-NAME", SERVICE)
        return next(server for server in self.servers if server.port == int(port))

    def wait_for_other_primary(self, than: Server) -> Server:
        """The new primary, when the Sentinels have one."""
        wait_until_sync(lambda: self.primary() is not than, "the Sentinels name another primary", 60)
        return self.primary()


class RedisCluster(Group):
    """A Redis Cluster.

    Args:
        options: of each server.
    """

    def __init__(
        self,
        flavour: Flavour = "valkey",
        *,
        primaries: int = 3,
        replicas: int = 0,
        options: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__()
        self.flavour: Flavour = flavour
        self._primaries = primaries
        self._replicas = replicas
        self._options = dict(options or {})
        self.servers: list[Server] = []

    @property
    def url(self) -> str:
        """Two of the servers."""
        return f"redis+cluster://{','.join(f'{HOST}:{s.port}' for s in self.servers[:2])}"

    def start(self) -> None:
        """Start everything, share the hash slots out, and wait until every server agrees."""
        for _ in range(self._primaries * (1 + self._replicas)):
            options = {
                "cluster-enabled": "yes",
                "cluster-port": str(free_port()),
                "cluster-node-timeout": str(NODE_TIMEOUT_MS),
                "cluster-replica-validity-factor": "0",
                "repl-diskless-sync-delay": "0",
                "repl-ping-replica-period": "1",
                **self._options,
            }
            self.servers.append(self.run(Server(self.flavour, options=options)))
        first = self.servers[0]
        for i, server in enumerate(self.servers[: self._primaries]):
            tell(server, "CLUSTER", "SET-CONFIG-EPOCH", i + 1)
            low, high = (SLOTS * j // self._primaries for j in (i, i + 1))
            tell(server, "CLUSTER", "ADDSLOTSRANGE", low, high - 1)
        for server in self.servers[1:]:
            bus = server.options["cluster-port"]
            tell(first, "CLUSTER", "MEET", HOST, server.port, bus)
        wait_until_sync(self._agreed, "all servers know each other", 30)
        for i, server in enumerate(self.servers[self._primaries :]):
            of = self.servers[i % self._primaries]
            wait_until_sync(
                lambda server=server, of=of: tell(server, "CLUSTER", "REPLICATE", self.id_of(of)),
                "a replica follows its primary",
                retry_on=RedisError,
            )
        wait_until_sync(self.complete, "the cluster is up and its replicas are in sync", 30)

    def _agreed(self) -> bool:
        for server in self.servers:
            seen = lines(tell(server, "CLUSTER", "INFO"))
            if (seen["cluster_known_nodes"], seen["cluster_state"]) != (str(len(self.servers)), "ok"):
                return False
        return True

    def complete(self) -> bool:
        """Whether all servers agree that all is well, and every replica is in sync."""
        if not self._agreed():
            return False
        return all(info(s, "replication").get("master_link_status") == "up" for s in self.servers[self._primaries :])

    @staticmethod
    def id_of(server: Server) -> str:
        """The server's name in the cluster."""
        return tell(server, "CLUSTER", "MYID").decode()
