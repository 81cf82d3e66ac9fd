"""What is on its way when an owner loses its conversation arrives too late, and is refused by the store itself."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, cast

from tests.cluster.agents import SCRIPTED
from tests.cluster.checks import attempts, check_answered, opened
from tests.cluster.talking import Api, talking, until_started
from tests.support.cluster import Cluster
from tests.support.proxy import Proxy
from tests.support.servers import Flavour, Server
from tests.support.waiting import wait_until


@asynccontextmanager
async def _behind_a_proxy(server: Server, proxy: Proxy) -> AsyncGenerator[Cluster]:
    """Two nodes; the first reaches the store through the proxy, which needs this event loop meanwhile.

    Without fast burial a node acts for three of its five seconds without a renewal: long enough to write something.
    """
    settings = {"lease_ttl": 5, "fast_burial": "false"}
    cluster = Cluster(server, 2, app=SCRIPTED, settings=settings, detours={0: proxy.url})
    await asyncio.to_thread(cluster.__enter__)
    try:
        yield cluster
        await asyncio.to_thread(cluster.settle)
        await asyncio.to_thread(cluster.audit)
        await asyncio.to_thread(cluster.erase_everything)
    except BaseException as error:
        error.add_note(await asyncio.to_thread(cluster.report, str(error)))
        raise
    finally:
        await asyncio.to_thread(cluster.close)


def _arrived(server: Server, *words: str) -> bool:
    """Whether the store has executed a command with all these words since its slow log, which logs all, was reset."""
    entries = cast("list[list[Any]]", server.ask("SLOWLOG", "GET", -1))
    commands = [b" ".join(entry[3]) for entry in entries]
    return any(all(word.encode() in command for word in words) for command in commands)


async def test_a_write_that_was_under_way_at_the_takeover_is_fenced(flavour: Flavour, tmp_path: Path) -> None:
    cid, gate = "fenced", tmp_path / "gate"
    with Server(flavour) as server:
        async with (
            Proxy(server.port) as proxy,
            _behind_a_proxy(server, proxy) as cluster,
            talking(lambda: [cluster.url(1)]) as api,
        ):
            await _hold_back_a_write(cluster, server, proxy, api, cid, gate)


async def _hold_back_a_write(cluster: Cluster, server: Server, proxy: Proxy, api: Api, cid: str, gate: Path) -> None:
    stored = cluster.stored
    assert stored is not None
    await api.start(cluster.url(0), cid, "u")
    await api.deliver(cid, f"/until {gate}", "gated")
    await until_started(cluster, cid, 1)
    (old,) = cluster.incarnations(0)
    old_epoch = stored.log(cid)[-1].epoch
    # The node still holds its lease: it ends the turn and writes that, into a network that does not deliver.
    proxy.freeze()
    proxy.accepting = False
    await asyncio.to_thread(gate.touch)
    await wait_until(lambda: old in stored.buried(), "its node is buried", 30)
    events = await api.answered(cid)
    check_answered(events, api.sent[cid])
    assert attempts(events, "gated") == [(1, "new"), (2, "takeover")]
    server.ask("CONFIG", "SET", "slowlog-max-len", 100_000)
    server.ask("SLOWLOG", "RESET")
    server.ask("CONFIG", "SET", "slowlog-log-slower-than", 0)
    proxy.accepting = True
    proxy.thaw()
    await wait_until(lambda: _arrived(server, old, str(old_epoch), '"kind":"turn_done"'), "the late write has arrived")
    await wait_until(lambda: cluster.incarnations(0) - {old}, "its node has joined as a new incarnation")
    await asyncio.to_thread(cluster.wait_ready, 0)
    await api.deliver(cid, "and to the node that was away", url=cluster.url(0))
    events = await api.answered(cid)
    check_answered(events, api.sent[cid])
    assert [entry.kind for entry in stored.log(cid) if entry.epoch == old_epoch] == ["open", "input", "turn_started"]
    assert [reason for _, reason in opened(events)] == ["start", "takeover"]
