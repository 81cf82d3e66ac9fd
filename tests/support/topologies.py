"""Several servers that belong together: a primary with replicas under Sentinels, and a Redis Cluster.

Both are made of `Server`s on free loopback ports, so single servers can be killed, frozen and started again.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from types import TracebackType
from typing import Any, Final, Self, TypeVar

import redis
from redis.exceptions import RedisError

from tests.support.certificates import Certificate
from tests.support.servers import Flavour, Server, free_port
from tests.support.waiting import wait_until_sync

SLOTS: Final = 16384
HOST: Final = "127.0.0.1"
SERVICE: Final = "convener-test"
"""What the Sentinels call the primary."""

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


def caught_up(replica: Server, primary: Server) -> None:
    """Wait until a replica has everything that its primary has now."""
    wanted = info(primary, "replication")

    def has() -> bool:
        seen = info(replica, "replication")
        there = int(seen["master_repl_offset"]) >= int(wanted["master_repl_offset"])
        return seen["role"] == "slave" and seen["master_replid"] == wanted["master_replid"] and there

    wait_until_sync(has, "the replica has caught up", 30)


def client_port(server: Server) -> int:
    """Where clients connect: with TLS, if the server has it."""
    return int(server.options.get("tls-port", server.port))


def hosts(servers: Sequence[Server]) -> str:
    """Where clients connect to some servers, as in a URL."""
    return ",".join(f"{HOST}:{client_port(server)}" for server in servers)


def role(server: Server) -> str:
    """``master`` or ``slave``."""
    return info(server, "replication")["role"]


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

    def __init__(
        self,
        flavour: Flavour,
        primary: Server,
        *,
        service: str = SERVICE,
        quorum: int = 2,
        password: str | None = None,
        options: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(flavour, password=password, options=options)
        self._lines = [
            *([] if password is None else [f"requirepass {password}"]),
            *(f"{name} {value}" for name, value in self.options.items()),
            f"sentinel monitor {service} {HOST} {client_port(primary)} {quorum}",
            f"sentinel down-after-milliseconds {service} {NODE_TIMEOUT_MS}",
            # After one fail-over it takes twice as long until there may be another.
            f"sentinel failover-timeout {service} 2000",
        ]

    def command(self) -> tuple[str, ...]:
        """Sentinel writes what it learns into its configuration file."""
        path = self.directory / "sentinel.conf"
        if not path.exists():
            path.write_text("\n".join([f"port {self.port}", f"bind {HOST}", f"dir {self.directory}", *self._lines]))
        return (self.program, str(path), "--sentinel")


class SentinelGroup(Group):
    """A primary, replicas, and three Sentinels.

    Args:
        options: of primary and replicas.
        password: of the Sentinels.
        tls: for all.
    """

    def __init__(
        self,
        flavour: Flavour = "valkey",
        *,
        replicas: int = 1,
        options: Mapping[str, str] | None = None,
        password: str | None = None,
        tls: Certificate | None = None,
    ) -> None:
        super().__init__()
        self.flavour: Flavour = flavour
        self._replicas = replicas
        self._options = {"repl-diskless-sync-delay": "0", "repl-ping-replica-period": "1", **(options or {})}
        self.password = password
        self.tls = tls
        self.servers: list[Server] = []
        self.sentinels: list[Sentinel] = []

    @property
    def url(self) -> str:
        """Where the Sentinels are."""
        scheme = "redis" if self.tls is None else "rediss"
        return f"{scheme}+sentinel://{hosts(self.sentinels)}/0/{SERVICE}"

    def _with_tls(self, options: Mapping[str, str]) -> Mapping[str, str]:
        if self.tls is None:
            return options
        return {**options, **self.tls.options(free_port()), "tls-replication": "yes"}

    def start(self) -> None:
        """Start everything, and wait until every Sentinel knows every replica and the other Sentinels."""
        for _ in range(1 + self._replicas):
            self.servers.append(self.run(Server(self.flavour, options=self._with_tls(self._options))))
        primary = self.servers[0]
        for replica in self.servers[1:]:
            tell(replica, "REPLICAOF", HOST, client_port(primary))
        for _ in range(3):
            options = self._with_tls({})
            sentinel = Sentinel(self.flavour, primary, password=self.password, options=options)
            self.sentinels.append(self.run(sentinel))
        wait_until_sync(self.complete, "the Sentinels know each other and the replicas", 30)

    def complete(self) -> bool:
        """Whether every Sentinel sees a sound primary, all replicas in sync, and the other Sentinels."""
        for sentinel in self.sentinels:
            seen = fields(tell(sentinel, "SENTINEL", "MASTER", SERVICE))
            known = (seen["flags"], int(seen["num-slaves"]), int(seen["num-other-sentinels"]))
            if known != ("master", self._replicas, len(self.sentinels) - 1):
                return False
        return all(info(s, "replication").get("master_link_status", "up") == "up" for s in self.servers)

    def restore(self) -> None:
        """Start what was killed, and make replicas of all but the primary, which Sentinels would do after some time."""
        primary = self.primary()
        for server in self.servers:
            server.resume()
            server.start()
            if server is not primary:
                tell(server, "REPLICAOF", HOST, client_port(primary))
        wait_until_sync(self.complete, "primary, replicas and Sentinels are what they were", 60)
        self.caught_up()

    def caught_up(self) -> None:
        """Wait until the replicas have everything that the primary has now."""
        primary = self.primary()
        for server in self.servers:
            if server is not primary:
                caught_up(server, primary)

    def primary(self) -> Server:
        """The server that the first running Sentinel names."""
        sentinel = next(s for s in self.sentinels if s.running)
        _, port = tell(sentinel, "SENTINEL", "GET-MASTER-ADDR-BY-NAME", SERVICE)
        return next(server for server in self.servers if client_port(server) == int(port))

    def fail_over(self) -> Server:
        """Let a replica take over, losing nothing (Valkey 9); returns it."""
        before = self.primary()
        tell(self.sentinels[0], "SENTINEL", "FAILOVER", SERVICE, "COORDINATED")
        return self.wait_for_other_primary(before)

    def wait_for_other_primary(self, than: Server) -> Server:
        """The new primary, when the Sentinels have one."""
        wait_until_sync(lambda: self.primary() is not than, "the Sentinels name another primary", 60)
        return self.primary()


class RedisCluster(Group):
    """A Redis Cluster.

    Args:
        options: of each server.
        tls: for all.
    """

    def __init__(
        self,
        flavour: Flavour = "valkey",
        *,
        primaries: int = 3,
        replicas: int = 0,
        options: Mapping[str, str] | None = None,
        tls: Certificate | None = None,
    ) -> None:
        super().__init__()
        self.flavour: Flavour = flavour
        self._primaries = primaries
        self._replicas = replicas
        self._options = dict(options or {})
        self.tls = tls
        self.servers: list[Server] = []

    @property
    def url(self) -> str:
        """Two of the servers."""
        return f"{'redis' if self.tls is None else 'rediss'}+cluster://{hosts(self.servers[:2])}"

    def start(self) -> None:
        """Start everything, share the hash slots out, and wait until every server agrees."""
        for _ in range(self._primaries * (1 + self._replicas)):
            self.servers.append(self.run(self.server()))
        first = self.servers[0]
        for i, server in enumerate(self.servers[: self._primaries]):
            tell(server, "CLUSTER", "SET-CONFIG-EPOCH", i + 1)
            low, high = (SLOTS * j // self._primaries for j in (i, i + 1))
            tell(server, "CLUSTER", "ADDSLOTSRANGE", low, high - 1)
        for server in self.servers[1:]:
            self.meet(first, server)
        wait_until_sync(self.agreed, "all servers know each other", 30)
        for i, server in enumerate(self.servers[self._primaries :]):
            of = self.servers[i % self._primaries]
            wait_until_sync(
                lambda server=server, of=of: tell(server, "CLUSTER", "REPLICATE", self.id_of(of)),
                "a replica follows its primary",
                retry_on=RedisError,
            )
        wait_until_sync(self.complete, "the cluster is up and its replicas are in sync", 30)

    def server(self) -> Server:
        """One more server, not started and not in the cluster yet."""
        options = {
            "cluster-enabled": "yes",
            "cluster-port": str(free_port()),
            "cluster-node-timeout": str(NODE_TIMEOUT_MS),
            "cluster-replica-validity-factor": "0",
            # Else a primary that gives its last slot away becomes a replica by itself.
            "cluster-allow-replica-migration": "no",
            "repl-diskless-sync-delay": "0",
            "repl-ping-replica-period": "1",
            **self._options,
        }
        if self.tls is not None:
            options |= {**self.tls.options(free_port()), "tls-replication": "yes", "tls-cluster": "yes"}
        return Server(self.flavour, options=options)

    @staticmethod
    def meet(first: Server, other: Server) -> None:
        """Take a server into the cluster."""
        tell(first, "CLUSTER", "MEET", HOST, client_port(other), other.options["cluster-port"])

    @contextmanager
    def joined(self) -> Generator[Server]:
        """One more server, in the cluster for a while. It has no slots, and must have none in the end."""
        with self.server() as fresh:
            self.meet(self.servers[0], fresh)
            self.servers.append(fresh)
            try:
                wait_until_sync(self.agreed, "all servers know the new one", 30)
                yield fresh
            finally:
                self.servers.remove(fresh)
                for server in self.servers:
                    tell(server, "CLUSTER", "FORGET", self.id_of(fresh))

    def agreed(self) -> bool:
        """Whether all servers know each other, and all slots are served."""
        for server in self.servers:
            seen = lines(tell(server, "CLUSTER", "INFO"))
            if (seen["cluster_known_nodes"], seen["cluster_state"]) != (str(len(self.servers)), "ok"):
                return False
        return True

    def complete(self) -> bool:
        """Whether all servers agree that all is well, every replica is in sync, and everybody knows it."""
        if not self.agreed():
            return False
        for server in self.servers:
            if any(len(of) != 3 + self._replicas for of in tell(server, "CLUSTER", "SLOTS")):
                return False
        return all(info(s, "replication").get("master_link_status", "up") == "up" for s in self.servers)

    def owner(self, slot: int) -> Server:
        """The primary that has a slot, as the first running server sees it."""
        seen = tell(next(s for s in self.servers if s.running), "CLUSTER", "SLOTS")
        port = next(servers[0][1] for low, high, *servers in seen if low <= slot <= high)
        return next(server for server in self.servers if server.port == port)

    def replica_of(self, primary: Server) -> Server:
        """A running replica of a primary."""
        port = str(client_port(primary))
        return next(s for s in self.servers if s.running and info(s, "replication").get("master_port") == port)

    @contextmanager
    def migrating(self, slot: int, to: Server) -> Generator[None]:
        """The slot is on the move, key by key, and none has moved yet; at the end all do, and the slot."""
        source = self.owner(slot)
        tell(to, "CLUSTER", "SETSLOT", slot, "IMPORTING", self.id_of(source))
        tell(source, "CLUSTER", "SETSLOT", slot, "MIGRATING", self.id_of(to))
        try:
            yield
        finally:
            self.move_keys(slot, source, to)
            for server in (to, source):
                tell(server, "CLUSTER", "SETSLOT", slot, "NODE", self.id_of(to))

    def move_keys(self, slot: int, source: Server, to: Server, most: int = SLOTS) -> None:
        """Move some keys of a slot that is on the move."""
        keys = tell(source, "CLUSTER", "GETKEYSINSLOT", slot, most)
        if keys:
            tell(source, "MIGRATE", HOST, client_port(to), "", 0, 20000, "REPLACE", "KEYS", *keys)

    def move(self, slot: int, to: Server) -> None:
        """Give a slot and its keys to another primary, as resharding tools do."""
        with self.migrating(slot, to):
            pass

    def move_at_once(self, slot: int, to: Server) -> None:
        """The same in one step, which Valkey 9 has."""
        source = self.owner(slot)
        tell(source, "CLUSTER", "MIGRATESLOTS", "SLOTSRANGE", slot, slot, "NODE", self.id_of(to))
        wait_until_sync(
            lambda: self.owner(slot) is to and self._owner_by(source, slot) == to.port, "the slot has moved"
        )

    @staticmethod
    def _owner_by(server: Server, slot: int) -> int:
        seen = tell(server, "CLUSTER", "SLOTS")
        return next(servers[0][1] for low, high, *servers in seen if low <= slot <= high)

    def fail_over(self, primary: Server) -> Server:
        """Let a replica take over, losing nothing; returns it."""
        replica = self.replica_of(primary)
        tell(replica, "CLUSTER", "FAILOVER")
        wait_until_sync(
            lambda: role(replica) == "master" and role(primary) == "slave", "the replica has taken over", 60
        )
        return replica

    @staticmethod
    def id_of(server: Server) -> str:
        """The server's name in the cluster."""
        return tell(server, "CLUSTER", "MYID").decode()
