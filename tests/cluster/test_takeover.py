"""Nodes that are killed, frozen, ended or cut off: no accepted message is lost, none is answered twice."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.cluster.agents import scripted
from tests.cluster.checks import attempts, check_answered, check_explained, opened
from tests.cluster.clients import Client, Clients
from tests.cluster.talking import Api, until_started, while_talking
from tests.support.cluster import Cluster
from tests.support.waiting import wait_until

pytestmark = scripted


async def _check_watchers(watchers: list[Client], events: list[dict[str, Any]]) -> None:
    """Every client was shown exactly the log, in order, and was never told to begin anew."""
    for watcher in watchers:
        await watcher.wait_seq(events[-1]["seq"])
        assert watcher.events == events, watcher.name
        assert watcher.named("resync") == []


def _lives(cluster: Cluster, index: int) -> int:
    """How often a node has begun a new life after it was buried."""
    return sum("a new life begins" in line for line in cluster.nodes[index].log())


@pytest.mark.parametrize("watched", [True, False], ids=["clients", "no-clients"])
async def test_a_killed_owner_is_replaced_in_the_middle_of_a_turn(
    cluster: Cluster, clients: Clients, api: Api, watched: bool
) -> None:
    cid = "killed"
    (old,) = cluster.incarnations(0)
    await api.start(cluster.url(0), cid, "u")
    watchers = [await clients.join(cluster.url(node), cid, user_id="u") for node in (1, 2)] if watched else []
    await api.talk(cid, 3)
    await api.answered(cid)
    await api.deliver(cid, "/hang", "hanging")
    await until_started(cluster, cid, 4)
    await api.talk(cid, 4)
    cluster.kill(0)
    # Without a client nobody says anything any more: recovery has to find the open turn by itself.
    for number, watcher in enumerate(watchers * 2):
        await watcher.say(f"after {number}", f"after.{number}")
        api.sent[cid][f"after.{number}"] = f"after {number}"
    events = await api.answered(cid)
    check_answered(events, api.sent[cid])
    assert attempts(events, "hanging") == [(1, "new"), (2, "takeover")]
    why = await asyncio.to_thread(cluster.get, 1, f"/conversations/{cid}/why")
    check_explained(why, events)
    assert [ownership["buried"]["kind"] for ownership in why["ownerships"][1:]] == ["silent"]
    (first, _), (second, reason) = opened(events)
    assert (first, reason) == ("n0", "takeover")
    assert second in ("n1", "n2")
    await _check_watchers(watchers, events)
    await asyncio.to_thread(cluster.restart, 0)
    assert len(cluster.incarnations(0) - {old}) == 1, "under its old name, it is somebody new"
    assert cluster.stored is not None
    assert old in cluster.stored.buried()


async def test_an_idle_conversation_of_a_killed_node_gives_its_slot_back(cluster: Cluster, api: Api) -> None:
    await api.start(cluster.url(0), "idle", "u")
    await api.talk("idle", 1)
    await api.answered("idle")
    cluster.kill(0)
    stored = cluster.stored
    assert stored is not None
    await wait_until(lambda: not stored.slots("u"), "the slot is free")
    assert stored.head("idle")["owner"] == ""
    await api.deliver("idle", "again")
    events = await api.answered("idle")
    check_answered(events, api.sent["idle"])
    assert opened(events)[1][1] == "wake"


async def test_a_frozen_owner_writes_nothing_after_its_lease_and_comes_back_as_somebody_new(
    cluster: Cluster, clients: Clients, api: Api, tmp_path: Path
) -> None:
    cid, gate = "frozen", tmp_path / "gate"
    stored = cluster.stored
    assert stored is not None
    await api.start(cluster.url(0), cid, "u")
    watchers = [await clients.join(cluster.url(node), cid, user_id="u") for node in range(3)]
    await api.deliver(cid, f"/until {gate}", "gated")
    await until_started(cluster, cid, 1)
    (old,) = cluster.incarnations(0)
    old_epoch, lives = stored.log(cid)[-1].epoch, _lives(cluster, 0)
    cluster.stop(0)
    await wait_until(lambda: old in stored.buried(), "the frozen node is buried", 30)
    await wait_until(lambda: any(e.kind == "reply" for e in stored.log(cid)), "another node has answered")
    written = [entry for entry in stored.log(cid) if entry.epoch == old_epoch]
    # The old owner's turn ends at the moment it goes on: it has something to write, and may not.
    gate.touch()
    await api.deliver(cid, "meanwhile", url=cluster.url(1))
    cluster.cont(0)
    await wait_until(lambda: cluster.incarnations(0) - {old}, "it has joined as a new incarnation")
    await asyncio.to_thread(cluster.wait_ready, 0)
    assert _lives(cluster, 0) == lives + 1
    assert len(cluster.incarnations(0)) == 1
    await api.deliver(cid, "to the one that was frozen", url=cluster.url(0))
    events = await api.answered(cid)
    check_answered(events, api.sent[cid])
    assert attempts(events, "gated") == [(1, "new"), (2, "takeover")]
    assert [entry for entry in stored.log(cid) if entry.epoch == old_epoch] == written
    assert [kind for _, kind in opened(events)] == ["start", "takeover"]
    assert old not in stored.members()
    await _check_watchers(watchers, events)


async def test_a_node_that_is_told_to_end_gives_everything_back(
    cluster: Cluster, clients: Clients, api: Api, tmp_path: Path
) -> None:
    stored, gate = cluster.stored, tmp_path / "gate"
    assert stored is not None
    for cid in ("talking", "busy", "quiet"):
        await api.start(cluster.url(0), cid, f"user-of-{cid}")
        await api.talk(cid, 1)
        await api.answered(cid)
    urls = iter([cluster.url(0)])
    guest = await clients.join(
        lambda: next(urls, cluster.url(1)), "talking", comes_back=True, user_id="user-of-talking"
    )
    await api.deliver("busy", f"/until {gate}", "gated")
    await until_started(cluster, "busy", 2)
    (old,) = cluster.incarnations(0)
    cluster.term(0)
    await guest.wait_named("joined", 2)
    assert guest.closes == [1012]
    # The node is still there: a turn is under way, for which it may take its time.
    for number in range(5):
        await api.deliver("talking", f"meanwhile {number}", url=cluster.url(1))
        await api.deliver("busy", f"meanwhile {number}", url=cluster.url(2))
    gate.touch()
    assert await asyncio.to_thread(cluster.wait_ended, 0) == 0
    assert old not in stored.members()
    assert stored.head("quiet")["owner"] == ""
    assert stored.slots("user-of-quiet") == {}
    assert stored.records(old) == set()
    for cid in ("talking", "busy", "quiet"):
        events = await api.answered(cid)
        check_answered(events, api.sent[cid])
    # What came at the last moment is left to recovery; the turn that was under way is not.
    assert attempts(await api.events("busy"), "gated") == [(1, "new")]
    await _check_watchers([guest], await api.events("talking"))
    states = {node["incarnation"]: node["state"] for node in cluster.get(1, "/nodes")["nodes"]}
    assert states.get(old, "buried") == "buried"


async def _conversations(cluster: Cluster, clients: Clients, api: Api, count: int) -> dict[str, list[Client]]:
    """Some conversations, each owned by another node and watched on two."""
    made: dict[str, list[Client]] = {}
    for number in range(count):
        cid = f"load-{number}"
        await api.start(cluster.url(number % 3), cid, f"user-{number}")
        made[cid] = [
            await clients.join(cluster.url(node % 3), cid, user_id=f"user-{number}", name=f"{cid} at n{node % 3}")
            for node in (number, number + 1)
        ]
    return made


async def _check_all(cluster: Cluster, api: Api, watched: dict[str, list[Client]]) -> None:
    """Everything was answered once, and whoever's node lived has seen it all."""
    alive = {f"n{index}" for index in cluster.live()}
    for cid, watchers in watched.items():
        events = await api.answered(cid)
        check_answered(events, api.sent[cid])
        staying = [watcher for watcher in watchers if watcher.name.rpartition(" ")[2] in alive and not watcher.closes]
        await _check_watchers(staying, events)


async def _when(api: Api, count: int) -> None:
    """Return when that many messages have been accepted."""
    await wait_until(lambda: api.accepted >= count, f"{count} messages are accepted", 60)


async def test_nodes_that_are_killed_one_after_the_other_under_load(
    cluster: Cluster, clients: Clients, api: Api, rng: random.Random
) -> None:
    watched = await _conversations(cluster, clients, api, 6)

    async def kill_some() -> None:
        for victim in rng.sample(range(3), 2):
            await _when(api, api.accepted + 20)
            cluster.kill(victim)
            await _when(api, api.accepted + 10)
            await asyncio.to_thread(cluster.restart, victim)

    await while_talking(api, watched, kill_some())
    await _check_all(cluster, api, watched)


async def test_the_last_of_three_nodes_takes_everything_over(
    cluster: Cluster, clients: Clients, api: Api, rng: random.Random
) -> None:
    watched = await _conversations(cluster, clients, api, 6)
    survivor = rng.randrange(3)

    async def kill_two() -> None:
        await _when(api, 30)
        for victim in {0, 1, 2} - {survivor}:
            cluster.kill(victim)
        # Each of them is answered by the survivor, so all have been taken over by then.
        await _when(api, api.accepted + 60)

    await while_talking(api, watched, kill_two())
    await _check_all(cluster, api, watched)
    assert {cluster.owner(cid) for cid in watched} == {survivor}


async def test_connections_to_the_store_that_are_cut_under_load_lose_nothing(
    cluster: Cluster, clients: Clients, api: Api
) -> None:
    watched = await _conversations(cluster, clients, api, 6)
    server = cluster.server
    assert server is not None

    async def cut() -> None:
        for number in range(8):
            await _when(api, api.accepted + 10)
            await asyncio.to_thread(server.ask, "CLIENT", "KILL", "TYPE", ("normal", "pubsub")[number % 2])

    await while_talking(api, watched, cut())
    await _check_all(cluster, api, watched)
    for index in range(3):
        await asyncio.to_thread(cluster.wait_ready, index)
    members = {node["name"]: node["state"] for node in cluster.get(0, "/nodes")["nodes"] if node["state"] != "buried"}
    assert members == {"n0": "live", "n1": "live", "n2": "live"}


async def test_a_message_to_a_killed_owner_is_accepted_by_another_node_at_once(cluster: Cluster, api: Api) -> None:
    await api.start(cluster.url(0), "told", "u")
    cluster.kill(0)
    answer = await api.post(cluster.url(1), "told", "are you there?", "m1")
    assert answer.status_code == 202, answer.text
    assert answer.json() == {"status": "accepted", "message_id": "m1", "position": 1, "duplicate": False}
    again = await api.post(cluster.url(2), "told", "are you there?", "m1")
    assert again.json() == {"status": "accepted", "message_id": "m1", "position": 1, "duplicate": True}
    api.sent["told"]["m1"] = "are you there?"
    check_answered(await api.answered("told"), api.sent["told"])


async def test_a_client_of_a_killed_node_comes_back_to_another_one_and_has_missed_nothing(
    cluster: Cluster, clients: Clients, api: Api
) -> None:
    await api.start(cluster.url(0), "moved", "u")
    urls = iter([cluster.url(0)])
    guest = await clients.join(lambda: next(urls, cluster.url(1)), "moved", comes_back=True, user_id="u")
    await api.talk("moved", 2)
    await guest.wait_for(2)
    cluster.kill(0)
    await api.talk("moved", 2)
    await guest.wait_named("joined", 2, 60)
    await guest.say("and back", "back")
    api.sent["moved"]["back"] = "and back"
    events = await api.answered("moved")
    check_answered(events, api.sent["moved"])
    await _check_watchers([guest], events)


async def test_frozen_nodes_answer_nobody_and_lose_nothing(cluster: Cluster, api: Api) -> None:
    """A pause that is shorter than the lease changes nothing but the time: no takeover, the same epoch."""
    await api.start(cluster.url(0), "paused", "u")
    await api.talk("paused", 1)
    await api.answered("paused")
    cluster.stop(0)
    with pytest.raises(httpx.TimeoutException):
        await api.http.get(f"{cluster.url(0)}/readyz", timeout=0.5)
    await api.deliver("paused", "while it is frozen", url=cluster.url(1))
    cluster.cont(0)
    events = await api.answered("paused")
    check_answered(events, api.sent["paused"])
    assert opened(events) == [("n0", "start")]
