"""What an owner does not do before it was verified, and what keeps nobody from being verified."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any, cast

import pytest

from convener.errors import OwnerUnavailable
from convener.manager.turn import Turn
from convener.manager.verify import Left
from convener.testing.cluster import FunctionAgent, InProcessCluster
from tests.manager.test_fallbacks import answer, answers, runner, send, talked
from tests.support.servers import Server, binary
from tests.support.topologies import HOST, caught_up, info, tell
from tests.support.waiting import wait_until, wait_until_sync

pytestmark = [pytest.mark.anyio, pytest.mark.xdist_group("falling stores")]


@pytest.fixture
def server() -> Iterator[Server]:
    if binary("valkey") is None:
        pytest.skip("no valkey server is installed on this machine")
    with Server("valkey") as one:
        yield one


async def test_no_call_is_served_and_no_step_is_run_before_the_owner_was_verified(server: Server) -> None:
    may_go, at_step, ran = asyncio.Event(), asyncio.Event(), asyncio.Event()

    async def effect() -> None:
        ran.set()

    async def steps(turn: Turn) -> None:
        at_step.set()
        await may_go.wait()
        await turn.step("effect", effect)
        await turn.reply({"to": turn.input.message_id})

    async def method(conversation: Any, params: Any) -> int:
        return 1

    async with InProcessCluster(FunctionAgent(steps, {"one": method}), url=server.url, nodes=1) as cluster:
        await cluster[0].maybe_start_agent_loop("c", user_id="u")
        assert await cluster[0].call("c", "one") == 1
        await send(cluster, "c", "m1")
        await asyncio.wait_for(at_step.wait(), 30)
        owned = runner(cluster, "c")
        owned.appender.hold()
        may_go.set()
        with pytest.raises(OwnerUnavailable, match="being verified"):
            await cluster[0].call("c", "one")
        for _ in range(20):
            await asyncio.sleep(0)
        assert not ran.is_set()
        owned.appender.go_on()
        await asyncio.wait_for(ran.wait(), 30)
        assert await cluster[0].call("c", "one") == 1


async def test_what_was_left_and_is_forgotten_meanwhile_is_counted_all_the_same(server: Server) -> None:
    async with InProcessCluster(answer, url=server.url, nodes=1) as cluster:
        await talked(cluster, "c", "m1")
        head = await cluster[0].engine.node.store.head("c")
        assert head is not None
        verifier = cast("Any", cluster[0].engine.verifier)
        await verifier._count(Left("c", "u", head.epoch, head.seq + 2, 0.0))
        assert verifier.losses.reports[-1].lost == 2


async def test_a_verification_that_fails_is_repeated_or_the_conversation_owned_anew(server: Server) -> None:
    async with InProcessCluster(answer, url=server.url, nodes=1) as cluster:
        sink = await talked(cluster, "c", "m1")
        owned, verifier = runner(cluster, "c"), cluster[0].engine.verifier
        owned.appender.tail.missing = None
        owned.appender.written_seq += 1
        verifier.suspect()
        await wait_until(lambda: owned.over, "it is owned anew")
        await send(cluster, "c", "m2")
        await wait_until(lambda: answers(sink)[-1:] == ["m2"], "m2 is answered")


async def test_nobody_is_held_still_because_no_replica_confirms() -> None:
    """After a fail-over the new primary often has no replica; turns under way are to end all the same."""
    if binary("valkey") is None:
        pytest.skip("no valkey server is installed on this machine")
    options = {"repl-diskless-sync-delay": "0", "repl-ping-replica-period": "1"}
    with ExitStack() as stack:
        primary, replica = (stack.enter_context(Server("valkey", options=options)) for _ in range(2))
        tell(replica, "REPLICAOF", HOST, primary.port)
        wait_until_sync(lambda: info(replica, "replication")["master_link_status"] == "up", "the replica is in sync")
        caught_up(replica, primary)
        async with InProcessCluster(answer, url=primary.url, nodes=1, durability="replicated") as cluster:
            await talked(cluster, "c", "m1")
            owned = runner(cluster, "c")
            replica.freeze()
            cluster[0].engine.verifier.suspect()
            assert owned.appender.held
            await wait_until(lambda: not owned.appender.held, "the conversation is verified", 20)
            assert not owned.over
            replica.resume()


async def test_a_life_that_the_store_has_forgotten_is_buried_when_it_ends(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is neither a member then nor buried, so nobody else would ever recover what it owned."""
    async with InProcessCluster(answer, url=server.url, nodes=2) as cluster:
        sink = await talked(cluster, "c", "m1")
        manager = cast("Any", cluster[0])
        old = manager.engine.node.incarnation

        async def is_forgotten() -> bool:
            for key in ("lease", "info"):
                command = "ZREM" if key == "lease" else "HDEL"
                await asyncio.to_thread(server.ask, command, f"{{convener:m}}:{key}", old)
            return False

        monkeypatch.setattr(manager, "_was_lost", is_forgotten)
        manager._rebirth.set()
        await wait_until(lambda: old in cluster[1].engine.node.buried, "the ended life is buried")
        await send(cluster, "c", "m2", 1)
        await wait_until(lambda: answers(sink) == ["m1", "m2"], "m2 is answered")
