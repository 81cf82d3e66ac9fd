"""What is found out about the servers before they are used: what they say of themselves, and what they let us do."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from convener.errors import ConfigurationError, StoreFull
from convener.store.redis import acl
from convener.store.redis.errors import AccessRefused, StoreCommandError
from convener.store.redis.history import lines
from convener.store.redis.keys import Keys
from convener.store.redis.lint import ASKED, Facts
from convener.store.redis.scripts import SCRIPTS
from convener.store.redis.topology import Topology, find_name

HIDDEN: Final = (AccessRefused, StoreCommandError)
"""An access list forbids a command, or the server does not know it."""


@dataclass(frozen=True, slots=True)
class Rights:
    """What may be done besides what has to be.

    Attributes:
        counts_subscribers: a script may count subscribers, without which there is no fast burial.
        waits: WAIT may be used, without which it is unknown what replicas have.
    """

    counts_subscribers: bool
    waits: bool


def shown(reply: Any) -> Any:
    """A reply; None where an access list forbids the command, or the server does not know it.

    Raises: every other error.
    """
    if isinstance(reply, HIDDEN):
        return None
    if isinstance(reply, BaseException):
        raise reply
    return reply


async def look(topology: Topology) -> list[Facts]:
    """What every server says of itself."""
    places = sorted(topology.targets())
    infos, configs = await _each(topology, "INFO"), await _each(topology, "CONFIG", "GET", *ASKED)
    asked = time.time()
    clocks = await _each(topology, "TIME")
    middle = (asked + time.time()) / 2
    return [
        Facts(
            place or "the store",
            lines(info),
            _pairs(config),
            None if clock is None else int(clock[0]) + int(clock[1]) / 1e6 - middle,
        )
        for place, info, config, clock in zip(places, infos, configs, clocks, strict=True)
    ]


async def look_again(topology: Topology) -> list[Facts]:
    """Only what changes: INFO, and the eviction policy where INFO does not show it."""
    places, infos = sorted(topology.targets()), await _each(topology, "INFO")
    found = [Facts(place or "the store", lines(info)) for place, info in zip(places, infos, strict=True)]
    if all(facts.policy is not None for facts in found):
        return found
    policies = await _each(topology, "CONFIG", "GET", "maxmemory-policy")
    return [Facts(facts.place, facts.info, _pairs(policy)) for facts, policy in zip(found, policies, strict=True)]


async def _each(topology: Topology, *words: str) -> list[Any]:
    return [shown(reply) for reply in await asyncio.gather(*topology.each(*words), return_exceptions=True)]


def _pairs(reply: Sequence[bytes] | None) -> Mapping[str, str]:
    flat = [word.decode() for word in reply or ()]
    return dict(zip(flat[::2], flat[1::2], strict=True))


async def probe(topology: Topology, keys: Keys) -> Rights:
    """Run scripts like ours, and publish to each kind of channel; then a script on every server.

    Raises:
        ConfigurationError: something that nodes cannot do without is forbidden; names the rule that the access list
            lacks.
    """
    try:
        await _need_rights(topology, keys)
        counts = await topology.call(SCRIPTS["probe"], (keys.version,), keys.live("probe"))
        for channel in (keys.channel("probe"), keys.node_channel("probe")):
            await topology.execute(channel, "SPUBLISH", channel, "")
        for place in topology.targets():
            there = find_name(topology, place, lambda number: f"probe{number}", keys.node_channel)
            await topology.call(SCRIPTS["probe"], (keys.records(there),), keys.node_channel(there))
    except StoreFull:
        raise
    except StoreCommandError as error:
        hint = acl.advice(str(error), keys.namespace)
        raise ConfigurationError(f"redis_url: the server cannot run convener's scripts: {error}{hint}") from error
    except AccessRefused as error:
        raise refused(error, keys) from error
    waits = await asyncio.gather(topology.execute(keys.version, "WAIT", 0, 1), return_exceptions=True)
    return Rights(counts == 1, isinstance(shown(waits[0]), int))


async def need_replicas(topology: Topology, rights: Rights, seconds: float) -> None:
    """``durability=replicated`` needs WAIT, and a replica at every server.

    Raises:
        ConfigurationError: it lacks one of them.
    """
    if not rights.waits:
        raise ConfigurationError(
            "durability: replicated needs WAIT, which this store does not know or the access list forbids (+wait); "
            "write managed if the service replicates before it answers, else memory"
        )
    places = topology.places()
    replies = await asyncio.gather(*topology.each("WAIT", 1, round(1000 * seconds)), return_exceptions=True)
    for place, reply in zip(places, replies, strict=True):
        if (shown(reply) or 0) < 1:
            raise ConfigurationError(
                f"durability: replicated needs a replica, and {place or 'the store'} has none that answers; "
                "attach one, or write memory"
            )


def refused(error: AccessRefused, keys: Keys) -> ConfigurationError:
    """The same where only the operator can help, with the rule that is missing."""
    return ConfigurationError(f"redis_url: {error}{acl.advice(str(error), keys.namespace)}")


async def _need_rights(topology: Topology, keys: Keys) -> None:
    reply = await topology.call(SCRIPTS["rights"], (keys.scratch,), keys.live("probe"))
    if lacking := [f"+{name.decode()}" for name in reply]:
        hint = "convener doctor --print-acl prints all that it needs"
        raise ConfigurationError(f"redis_url: the user's access list lacks {' '.join(lacking)} ({hint})")
