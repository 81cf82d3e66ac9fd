"""Each change of owner is explained, and so is what a conversation waits for."""

from __future__ import annotations

import asyncio
import dataclasses

import pytest

from convener.core.membership import Burial, Membership
from convener.errors import InvalidRequest, NotFound
from convener.manager.turn import Turn
from convener.manager.why import Buried, Why, because, buried_of
from convener.testing.cluster import QUICK, InProcessCluster
from tests.manager.conftest import MakeCluster, join
from tests.support.waiting import wait_until

pytestmark = pytest.mark.anyio

AT = 1_000_000


class Agent:
    """Answers at once; `/hold` waits for the gate, `/ask` asks."""

    def __init__(self) -> None:
        self.gate = asyncio.Event()
        self.begun = 0

    async def __call__(self, turn: Turn) -> None:
        self.begun += 1
        if turn.text == "/hold":
            await self.gate.wait()
        elif turn.text == "/ask":
            await turn.ask("which?")
        elif turn.text == "/alarm":
            await turn.conversation.schedule(3600, {"text": "later"})
        await turn.reply(turn.data)


async def told(cluster: InProcessCluster, index: int, cid: str = "c") -> Why:
    return await cluster[index].why(cid)


def waits(why: Why) -> list[str]:
    return [wait.kind for wait in why.waits]


async def answered(cluster: InProcessCluster, index: int, cid: str = "c") -> None:
    async def is_answered() -> bool:
        meta = await cluster[index].engine.node.store.head(cid)
        return meta is not None and meta.position == meta.done

    await wait_until(is_answered, f"{cid} is answered")


async def test_a_takeover_names_the_node_that_was_buried_and_how(make_cluster: MakeCluster) -> None:
    agent = Agent()
    cluster = await make_cluster(agent)
    await cluster[0].maybe_start_agent_loop("c", user_id="u", initial_user_msg={"text": "/hold"})
    await wait_until(lambda: agent.begun == 1, "it works")
    old = cluster[0].engine.node.incarnation
    before = await told(cluster, 1)
    assert [o.text for o in before.ownerships] == ["started on node-0"]
    assert before.owner is not None
    assert (before.owner.node, before.owner.state, before.owner.since) == ("node-0", "live", before.ownerships[0].since)
    assert before.owner.last_renewal is not None
    await cluster.kill(0)
    await wait_until(lambda: agent.begun == 2, "another node goes on")
    after = await told(cluster, 1)
    assert len(after.ownerships) == 2
    first, second = after.ownerships
    assert (first.until, second.reason, second.former) == (second.since, "takeover", old)
    assert second.buried is not None
    assert second.buried.kind == "silent"
    assert second.buried.by in ("node-1", "node-2")
    assert second.buried.silent > 600
    assert second.text.startswith(f"taken over by {second.node}, since node-0 was buried ")
    assert f"process gone, seen by {second.buried.by})" in second.text
    assert after.owner is not None
    assert (after.owner.node, after.owner.since) == (second.node, second.since)
    assert waits(after) == ["turn"]
    assert f"the agent on {second.node} to end turn t1, attempt 2" in after.waits[0].text
    agent.gate.set()
    await answered(cluster, 1)
    assert waits(await told(cluster, 2)) == ["nothing"]


async def test_moves_departures_and_waking_are_told_apart(make_cluster: MakeCluster) -> None:
    agent = Agent()
    options = dataclasses.replace(QUICK, drain_timeout=0.1)
    cluster = await make_cluster(agent, options=options)
    await cluster[0].maybe_start_agent_loop("c", user_id="u")
    assert await cluster[0].move("c", "node-1") == "moved"
    assert (await told(cluster, 2)).ownerships[-1].text == "moved from node-0 to node-1"
    assert await cluster[1].engine.hibernate("c")
    idle = await told(cluster, 2)
    assert (idle.owner, waits(idle)) == (None, ["nothing"])
    await cluster[2].send_event_to_conversation("c", {"text": "/hold"})
    await wait_until(lambda: agent.begun == 1, "it works")
    woken = (await told(cluster, 2)).ownerships[-1]
    assert woken.text == "loaded on node-2 for a message or a client: node-1 had unloaded it"
    await cluster.leave(2)
    await wait_until(lambda: agent.begun == 2, "it goes on elsewhere")
    last = (await told(cluster, 0)).ownerships[-1]
    assert last.reason == "handoff"
    assert last.text.startswith(f"handed over by node-2 to {last.node}: node-2 was leaving, and left ")
    agent.gate.set()
    await answered(cluster, 0)


async def test_what_it_waits_for(make_cluster: MakeCluster) -> None:
    agent = Agent()
    options = dataclasses.replace(QUICK, limit_policy="queue")
    cluster = await make_cluster(agent, nodes=1, limit=1, options=options)
    await cluster[0].maybe_start_agent_loop("c", user_id="u", initial_user_msg={"text": "/hold"})
    await cluster[0].maybe_start_agent_loop("d", user_id="u", initial_user_msg={"text": "/ask"})
    queued = await told(cluster, 0, "d")
    assert (queued.owner, waits(queued), queued.ownerships) == (None, ["slot"], [])
    assert "number 1 of 1 in the queue; they are held by c on node-0" in queued.waits[0].text
    assert queued.waits[0].since
    await cluster[0].send_event_to_conversation("c", {"text": "/alarm"})
    await wait_until(lambda: agent.begun == 1, "it works")
    working = await told(cluster, 0)
    assert waits(working) == ["turn"]
    assert "and 1 message behind it" in working.waits[0].text
    agent.gate.set()
    await answered(cluster, 0)
    assert waits(await told(cluster, 0)) == ["alarm"]
    await cluster[0].close_session("c")
    assert waits(await told(cluster, 0)) == ["resume"]
    assert "stopped on purpose: `convener resume c`" in (await told(cluster, 0)).waits[0].text

    async def asks() -> bool:
        return waits(await told(cluster, 0, "d")) == ["answer"]

    await wait_until(asks, "the other one asks")
    assert "question t1.1 of the agent" in (await told(cluster, 0, "d")).waits[0].text


async def test_an_owner_that_is_gone_is_shown_until_it_is_recovered(make_cluster: MakeCluster) -> None:
    """By a node that may not take anything over: it is leaving."""
    cluster = await make_cluster(Agent(), nodes=2, options=dataclasses.replace(QUICK, fast_burial=False))
    await cluster[0].maybe_start_agent_loop("c", user_id="u")
    await cluster[1].drain(None, 0)
    await cluster.kill(0)

    async def waits_for(kind: str) -> bool:
        return kind in waits(await told(cluster, 1))

    await wait_until(lambda: cluster[1].drain_status().state == "drained", "it is drained")
    # Nobody renews any more, so nobody is late.
    found = await told(cluster, 1)
    assert found.owner is not None
    assert found.owner.node == "node-0"
    await cluster.add()
    await wait_until(lambda: waits_for("nothing"), "it is recovered")


async def test_who_asks_for_nothing_is_told_so(make_cluster: MakeCluster) -> None:
    cluster = await make_cluster(nodes=1)
    with pytest.raises(NotFound):
        await told(cluster, 0, "nobody-knows-it")
    with pytest.raises(InvalidRequest):
        await cluster[0].why("no id")
    await join(cluster, 0, "c", "s")
    assert (await told(cluster, 0)).first_seq == 1


def test_what_an_old_node_has_buried_is_still_explained() -> None:
    state = Membership(dead={"a~1": AT - 300, "b~1": AT}, burials={"b~1": Burial("reaped", "c~1", 10_200)})
    assert buried_of("a~1", state) == Buried(AT - 300)
    assert buried_of("b~1", state) == Buried(AT, "reaped", "c", 10_200)
    assert buried_of("c~1", state) is None


SILENT = "no renewal for 1.3 s, process gone, seen by c"
LAPSED = "no renewal for 10 s, so its lease had ended, seen by c"
LOADED = "loaded on b for a message or a client: nobody owned it, and"
UNSAID = "why is not recorded: by a node of an earlier version"
TAKEN = "taken over by b, since a"


@pytest.mark.parametrize(
    ("reason", "buried", "text"),
    [
        ("takeover", None, f"{TAKEN} was buried, longer ago than is remembered"),
        ("takeover", Buried(AT - 300), f"{TAKEN} was buried 0.3 s before ({UNSAID})"),
        ("takeover", Buried(AT + 1, "reaped", "c", 10_200), f"{TAKEN} was buried at that moment ({LAPSED})"),
        (
            "takeover",
            Buried(AT - 1300, "superseded", "a", 1250),
            f"{TAKEN} was buried 1.3 s before (it was started again: no renewal for 1.2 s)",
        ),
        ("takeover", Buried(AT - 9, "superseded"), f"{TAKEN} was buried 9 ms before (it was started again)"),
        ("takeover", Buried(AT - 9, "left", "a", 1), f"{TAKEN} had left 9 ms before (it was told to end)"),
        ("handoff", Buried(AT - 1, "left", "a", 100), "taken over by b: a was leaving and could not hand it over"),
        ("handoff", Buried(AT + 800, "left", "a", 1), "handed over by a to b: a was leaving, and left 0.8 s later"),
        ("handoff", Buried(AT + 800, "silent", "c", 1), "moved from a to b"),
        ("handoff", None, "moved from a to b"),
        ("restart", None, "begun anew by b, which owned it: what it knew was not certain to be what the store has"),
        ("alarm", None, "loaded on b for an alarm: a had unloaded it"),
        ("wake", Buried(AT - 900_000, "silent", "c", 1300), f"{LOADED} a was buried 15 min before ({SILENT})"),
        ("later", None, "loaded on b (later): a had unloaded it"),
    ],
)
def test_words(reason: str, buried: Buried | None, text: str) -> None:
    assert because("b~1", reason, "a~1", buried, AT) == text


def test_words_without_a_former_owner() -> None:
    assert because("b~1", "wake", "", None, AT) == "loaded on b for a message or a client"
    assert because("b~1", "takeover", "", None, AT).startswith("taken over by b, since its former owner was buried")
