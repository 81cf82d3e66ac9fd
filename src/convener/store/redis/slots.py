"""Which server of a cluster has which hash slots: what CLUSTER SLOTS says."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from redis.exceptions import ResponseError

from convener.errors import ConfigurationError, StoreUnavailable
from convener.store.redis.address import Host, refused
from convener.store.redis.connection import Link
from convener.store.redis.endpoint import Endpoint
from convener.store.redis.errors import known_host

SLOTS: Final = 16384


def name_of(host: Host) -> str:
    """Host and port as one text, which names the server from then on."""
    return f"{host[0]}:{host[1]}"


@dataclass(frozen=True, slots=True)
class SlotMap:
    """Which primary has which slots, as one server saw it.

    Attributes:
        owners: the primary of each slot; None if nobody has it.
        replicas: primary → its replicas.
        hosts: every server by name.
    """

    owners: list[str | None] = field(default_factory=lambda: [None] * SLOTS)
    replicas: Mapping[str, frozenset[str]] = field(default_factory=dict[str, frozenset[str]])
    hosts: Mapping[str, Host] = field(default_factory=dict[str, Host])

    def primaries(self) -> set[str]:
        """Those that have slots."""
        return {owner for owner in self.owners if owner is not None}


def read_slots(reply: Any, asked: str) -> SlotMap:
    """The reply to CLUSTER SLOTS of a server with the host `asked`.

    Raises:
        StoreUnavailable: it is no such reply, or nobody has any slot.
    """
    owners: list[str | None] = [None] * SLOTS
    replicas: dict[str, frozenset[str]] = {}
    hosts: dict[str, Host] = {}
    try:
        for low, high, *servers in reply:
            primary, *others = [_host(server, asked) for server in servers]
            name = name_of(primary)
            hosts |= {name_of(host): host for host in (primary, *others)}
            replicas[name] = replicas.get(name, frozenset()) | {name_of(host) for host in others}
            owners[low : high + 1] = [name] * (high + 1 - low)
    except (TypeError, ValueError, AttributeError) as error:
        raise StoreUnavailable(f"{asked} does not say who has the hash slots: {reply!r:.200}") from error
    if not hosts:
        raise StoreUnavailable(f"{asked} knows nobody who has hash slots")
    return SlotMap(owners, replicas, hosts)


def _host(server: Sequence[Any], asked: str) -> Host:
    said = server[0].decode() if isinstance(server[0], bytes) else ""
    return known_host(said, asked), int(server[1])


def changes(old: Sequence[str | None], new: Sequence[str | None]) -> Mapping[str, set[int]]:
    """Former owner → slots that it has no more."""
    moved: dict[str, set[int]] = {}
    if old == new:
        return moved
    for slot, (before, after) in enumerate(zip(old, new, strict=True)):
        if before != after and before is not None:
            moved.setdefault(before, set()).add(slot)
    return moved


def replaced(old: SlotMap, new: SlotMap) -> Iterable[tuple[str, str]]:
    """(former primary, primary that took over from it), for servers that had no slots before.

    A replica that was promoted has what reached it; a server that a resharding gave slots has everything. Where the
    old map does not tell them apart, the former primary having lost all its slots does.
    """
    before, after = old.primaries(), new.primaries()
    heirs: dict[str, str] = {}
    for was, now in zip(old.owners, new.owners, strict=True):
        if was is None or now is None or was == now or now in before or now in heirs:
            continue
        if now in old.replicas.get(was, ()) or was not in after:
            heirs[now] = was
    return [(was, now) for now, was in heirs.items()]


async def ask_for_slots(links: Sequence[Link], server: Endpoint, hosts: Sequence[Host], limit: float) -> SlotMap:
    """The map, of whoever answers first: over a link, else over a connection of its own to one of `hosts`.

    Raises:
        StoreUnavailable: nobody answers; each has `limit` seconds.
        ConfigurationError: somebody says that this is no cluster, or refuses the credentials.
    """
    errors: list[Exception] = []
    for link in links:
        try:
            async with asyncio.timeout(limit):
                reply = await link.execute("", "CLUSTER", "SLOTS")
            return read_slots(reply, link.target.place.rpartition(":")[0])
        except (StoreUnavailable, TimeoutError) as error:
            errors.append(error)
    for host in hosts:
        try:
            (reply,) = await server.at(*host).ask(limit, ("CLUSTER", "SLOTS"))
            if isinstance(reply, ResponseError):
                raise refused(f"{name_of(host)} is no server of a cluster, or hides it: {reply}")
            return read_slots(reply, host[0])
        except (StoreUnavailable, ConfigurationError) as error:
            errors.append(error)
    for error in errors:
        if isinstance(error, ConfigurationError):
            raise error
    raise StoreUnavailable(f"no server of the cluster answers: {errors[-1] if errors else 'none is known'}")
