"""Kill -9 in every window of a turn: each turn is done once all the same, and no recorded step is run again.

Many conversations are held at once, each in a window of its own; then their node is killed, by its process id. What
is drawn comes from one seed (``CONVENER_TEST_SEED`` repeats it), though not the order of what happens at the same time.
``TEST_KILLS`` is how often each kind of window is hit at least, ``TEST_RUNS`` how many runs there are.
"""

from __future__ import annotations

import asyncio
import os
import secrets
from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Final

import pytest

from tests.cluster.clients import Clients
from tests.cluster.recorder import Recorder
from tests.cluster.talking import talking
from tests.cluster.trial import Trial
from tests.cluster.windows import KINDS, Director
from tests.support.cluster import Cluster
from tests.support.proxy import Proxy
from tests.support.servers import FLAVOURS, Flavour, Server

RECORDED: Final = (Path(__file__).parent / "apps" / "recorded.py").read_text()
NODES: Final = 3
KILLS: Final = int(os.environ.get("TEST_KILLS", "20"))
RUNS: Final = int(os.environ.get("TEST_RUNS", "1"))


@asynccontextmanager
async def _cluster(server: Server, director: Director, stack: AsyncExitStack) -> AsyncGenerator[Cluster]:
    """Three nodes, each of which reaches the store through a proxy of its own, in this event loop."""
    proxies = [
        await stack.enter_async_context(Proxy(server.port, rewrite=partial(director.rewrite, node)))
        for node in range(NODES)
    ]
    detours = {node: proxy.url for node, proxy in enumerate(proxies)}
    cluster = Cluster(server, NODES, app=RECORDED, settings={"lease_ttl": 4}, detours=detours)
    await asyncio.to_thread(cluster.__enter__)
    try:
        yield cluster
    except BaseException as error:
        error.add_note("\n".join(director.history[-400:]))
        error.add_note(await asyncio.to_thread(cluster.report, str(error)))
        raise
    finally:
        await asyncio.to_thread(cluster.close)


@asynccontextmanager
async def _trial(flavour: Flavour, seed: str) -> AsyncGenerator[Trial]:
    director = Director()
    async with AsyncExitStack() as stack:
        server = stack.enter_context(Server(flavour))
        cluster = await stack.enter_async_context(_cluster(server, director, stack))
        recorder = await stack.enter_async_context(Recorder(director, cluster.index_of))
        clients = Clients()
        stack.push_async_callback(clients.aclose)
        api = await stack.enter_async_context(talking(lambda: [cluster.url(index) for index in cluster.live()]))
        trial = Trial(seed, cluster, director, recorder, clients, api)
        stack.callback(trial.close)
        yield trial


@pytest.mark.slow
@pytest.mark.timeout(180 + 20 * KILLS)
@pytest.mark.parametrize("run", range(RUNS))
async def test_a_kill_in_any_window_of_a_turn_neither_loses_nor_repeats_anything(run: int) -> None:
    base = os.environ.get("CONVENER_TEST_SEED") or secrets.token_hex(4)
    seed = f"{base}.{run}"
    print(f"repeat with CONVENER_TEST_SEED={base}")
    async with _trial(FLAVOURS[run % len(FLAVOURS)], seed) as trial:
        await trial.begin()
        while min(trial.hits_of(kind) for kind in KINDS) < KILLS:
            await trial.round()
        await trial.end()
        print(trial.summary())
