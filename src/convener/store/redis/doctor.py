"""`convener doctor`: what a store says of itself, what it lets us do, and what lies in it that nobody will delete.

Nodes never walk through keys; this does, by SCAN on every primary, so it costs a large store some seconds of attention.
It changes nothing but a scratch key of the probe, which is gone at once.
"""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, Final

import msgspec
from redis.exceptions import RedisError

from convener.errors import ConfigurationError, StoreUnavailable
from convener.ids import node_of
from convener.store.audit import every_conversation
from convener.store.diagnosis import Diagnosis, Finding
from convener.store.redis.endpoint import Target
from convener.store.redis.keys import kind_of
from convener.store.redis.lint import Facts, judge, size
from convener.store.redis.probe import HIDDEN, look, probe
from convener.store.redis.store import RedisStore

MOST_KEYS: Final = 1_000_000
SHOWN: Final = 5
NOISE: Final = 64 << 10
"""Bytes: a smaller growth during the examination says nothing."""


class _Told(msgspec.Struct):
    protocol: int = 1
    version: str = ""


async def diagnose(store: RedisStore, *, high_watermark: float = 0.8, watch: float = 2.0) -> Diagnosis:
    """Examine a store that is not open.

    Args:
        high_watermark: the setting `store_high_watermark`.
        watch: seconds for which the growth of the used memory is watched.

    Raises:
        StoreUnavailable: it cannot be reached.
        ConfigurationError: the URL or the credentials are refused.
    """
    await store.topology.open()
    try:
        judged = judge(await look(store.topology), high_watermark)
        usable = await _usable(store)
        if any(finding.verdict == "refused" for finding in usable):
            return Diagnosis((*judged, *usable))
        rest = (await _members(store), await _orphans(store))
        # Only now: scripts that are sent for the first time take room too.
        before, began = await look(store.topology), time.monotonic()
        await asyncio.sleep(watch)
        growth = _growth(before, await look(store.topology), time.monotonic() - began)
        return Diagnosis((*judged, *growth, *usable, *rest))
    finally:
        await store.topology.close()


# -- what the servers say ------------------------------------------------------------------------------------------


def _growth(before: Sequence[Facts], after: Sequence[Facts], seconds: float) -> list[Finding]:
    """When a store with a limit will be full, if it can be seen to grow."""
    found: list[Finding] = []
    for old, new in zip(before, after, strict=False):
        was, now, most = old.number("used_memory_dataset"), new.number("used_memory_dataset"), new.number("maxmemory")
        if was is None or now is None or not most or now - was < NOISE:
            continue
        rate = (now - was) / seconds
        left = max(most - (new.number("used_memory") or 0), 0) / rate
        says = f"grows by {size(rate)} a second now: full in {left / 3600:.1f} h if that went on"
        found.append(Finding("growth", "safe", says))
    return found


# -- what it lets us do --------------------------------------------------------------------------------------------


async def _usable(store: RedisStore) -> list[Finding]:
    try:
        found = await probe(store.topology, store.keys)
    except ConfigurationError as error:
        return [Finding("rights", "refused", str(error))]
    rights = Finding("rights", "safe", "everything that nodes do is allowed")
    if found.counts_subscribers:
        burial = Finding("fast_burial", "safe", "a killed node is noticed after a second")
    else:
        says = "scripts may not count subscribers: a killed node is noticed when its lease ends"
        burial = Finding("fast_burial", "reduced", says, "allow +pubsub|shardnumsub")
    waits = Finding("wait", "safe", "what replicas have can be waited for")
    if not found.waits:
        waits = Finding("wait", "reduced", "what replicas have cannot be waited for", "allow +wait")
    return [rights, burial, waits]


async def _members(store: RedisStore) -> Finding:
    state = await store.membership()
    protocols: defaultdict[int, list[str]] = defaultdict(list)
    for name, member in sorted(state.members.items()):
        told = _Told()
        with suppress(msgspec.MsgspecError):
            told = msgspec.json.decode(member.info, type=_Told)
        protocols[told.protocol].append(f"{node_of(name)} ({told.version or 'unknown version'})")
    if not protocols:
        return Finding("members", "safe", "no node is running")
    said = "; ".join(f"protocol {number}: {', '.join(names)}" for number, names in sorted(protocols.items()))
    if len(protocols) > 1:
        return Finding("members", "reduced", said, "finish the upgrade: what is new waits for the last node")
    return Finding("members", "safe", said)


# -- what lies in it -----------------------------------------------------------------------------------------------


async def _orphans(store: RedisStore) -> Finding:
    """Keys and entries that nobody would ever delete. Looked at twice: a step of the cluster takes a moment."""
    try:
        found, count = await _look(store)
        if found:
            await asyncio.sleep(1.0)
            again, _ = await _look(store)
            found = [what for what in found if what in again]
    except (*HIDDEN, RedisError) as error:
        return Finding("keys", "unknown", f"the store hides it (SCAN): {error}")
    most = " (the first million were looked at)" if count >= MOST_KEYS else ""
    if not found:
        return Finding("keys", "safe", f"{count} keys of this namespace, all in use{most}")
    more = f" and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
    says = f"{len(found)} of {count} keys are left over: {'; '.join(found[:SHOWN])}{more}{most}"
    return Finding("keys", "reduced", says, "they do no harm; delete them when no node runs")


async def _look(store: RedisStore) -> tuple[list[str], int]:
    prefix, namespace = f"{{{store.keys.namespace}:", store.keys.namespace
    scanned = [_scan(target, f"{prefix}*") for target in store.topology.targets().values()]
    keys = {key for part in await asyncio.gather(*scanned) for key in part}
    state = await store.membership()
    nodes, listed = {*state.members, *state.dead}, set(await every_conversation(store))
    groups: defaultdict[tuple[str, str], set[str]] = defaultdict(set)
    found: list[str] = []
    for key in sorted(keys):
        if kind_of(key, namespace) is None:
            if key != store.keys.scratch:
                found.append(f"{key} is none of convener's")
            continue
        kind, _, ident = key.removeprefix(prefix).partition("}")[0].partition(":")
        groups[kind, ident].add(key)
    living = {ident for kind, ident in groups if kind == "c" and store.keys.meta(ident) in keys}
    for (kind, ident), held in groups.items():
        if kind == "c" and not (ident in living or store.keys.log(ident) in held):
            found.append(f"{min(held)} belongs to no conversation")
        elif kind == "c" and ident not in listed:
            found.append(f"{min(held)} belongs to a conversation that no list has")
        elif kind == "n" and ident not in nodes:
            found.append(f"{min(held)} belongs to a node that is neither a member nor buried")
        elif kind == "u" and store.keys.slots(ident) in held:
            gone = sorted(set(await store.slots(ident)) - living)
            found += [f"{store.keys.slots(ident)} counts {cid}, which does not exist" for cid in gone]
    return found, len(keys)


async def _scan(target: Target, pattern: str) -> list[str]:
    return await asyncio.to_thread(_scan_all, target, pattern)


def _scan_all(target: Target, pattern: str) -> list[str]:
    connection, _ = target.connect_sync(10.0)
    try:
        found: list[str] = []
        cursor: Any = 0
        while True:
            connection.send_command("SCAN", cursor, "MATCH", pattern, "COUNT", 1000)
            cursor, keys = connection.read_response()
            found += [key.decode() for key in keys]
            if int(cursor) == 0 or len(found) >= MOST_KEYS:
                return found
    except OSError as error:
        raise StoreUnavailable(f"SCAN: {error}") from error
    finally:
        connection.disconnect()
