"""Stopped on purpose is stopped for good, wherever the stop is asked for and whoever dies; deleted is gone."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import pytest

from tests.cluster.agents import scripted
from tests.cluster.checks import SETTLING, check_answered, check_order, opened
from tests.cluster.clients import Client, Clients
from tests.cluster.talking import Api, until_started
from tests.support.cluster import Cluster
from tests.support.stored import Stored
from tests.support.waiting import wait_until

pytestmark = scripted
PENDING = 100


def _stored(cluster: Cluster) -> Stored:
    assert cluster.stored is not None
    return cluster.stored


async def _stop(api: Api, url: str, cid: str) -> str:
    answer = await api.http.post(f"{url}/api/conversations/{cid}/stop")
    assert answer.status_code == 200, answer.text
    return answer.json()["outcome"]


async def _resume(api: Api, url: str, cid: str) -> str:
    answer = await api.http.post(f"{url}/api/conversations/{cid}/resume")
    assert answer.status_code == 200, answer.text
    return answer.json()["outcome"]


async def _check_stopped(cluster: Cluster, api: Api, cid: str, user: str) -> list[dict[str, Any]]:
    """It ends with one `stopped`, nobody owns it, it holds no slot, and no node takes messages for it."""
    stored = _stored(cluster)
    events = await api.events(cid)
    check_order(events)
    assert events[-1]["kind"] == "stopped"
    head = stored.head(cid)
    assert (head["owner"], head["status"]) == ("", "stopped")
    assert head["done"] == head["position"]
    await wait_until(lambda: cid not in stored.slots(user), "its slot is free")
    for index in cluster.live():
        refused = await api.post(cluster.url(index), cid, "too late")
        assert (refused.status_code, refused.json()["code"]) == (409, "conversation_stopped")
        assert (await api.show(cid, cluster.url(index)))["status"] == "stopped"
    assert (await api.events(cid))[-1] == events[-1]
    return events


async def _check_sent_away(clients: list[Client], events: list[dict[str, Any]]) -> None:
    """Clients saw the log to its end, were told why, and stay away after it."""
    for client in clients:
        (told,) = await client.wait_named("stopped")
        assert told == {"conversation_id": client.cid, "reason": "stopped by the user"}
        await wait_until(lambda client=client: not client.sio.connected, f"{client.name} is disconnected")
        assert client.events == events


@pytest.mark.parametrize("state", ["idle", "busy", "full"])
async def test_a_stop_that_another_node_asks_for(cluster: Cluster, clients: Clients, api: Api, state: str) -> None:
    cid = f"stopped-{state}"
    await api.start(cluster.url(0), cid, "u")
    guests = [await clients.join(cluster.url(node), cid, user_id="u", comes_back=True) for node in range(3)]
    await api.talk(cid, 2)
    await api.answered(cid)
    given_up: list[str] = []
    if state != "idle":
        await api.deliver(cid, "/hang", "hanging")
        await until_started(cluster, cid, 3)
        given_up.append("hanging")
    if state == "full":
        for number in range(1, PENDING):
            await api.deliver(cid, f"waiting {number}", f"waiting.{number}")
            given_up.append(f"waiting.{number}")
        full = await api.post(cluster.url(1), cid, "one too many")
        assert (full.status_code, full.json()["code"]) == (429, "inbox_full")
    assert await _stop(api, cluster.url(1), cid) == "stopped"
    events = await _check_stopped(cluster, api, cid, "u")
    check_answered(events, api.sent[cid], given_up=given_up)
    settled = [(event["kind"], event["turn"]) for event in events if event["kind"] in SETTLING]
    assert settled[2:] == ([] if state == "idle" else [("turn_interrupted", "t3")])
    await _check_sent_away(guests, events)
    for node in range(3):
        assert await _stop(api, cluster.url(node), cid) == "already_stopped"
    assert await api.events(cid) == events


async def test_a_stop_whose_owner_has_just_been_killed(cluster: Cluster, clients: Clients, api: Api) -> None:
    cid = "stopped-orphan"
    await api.start(cluster.url(0), cid, "u")
    guest = await clients.join(cluster.url(2), cid, user_id="u")
    await api.deliver(cid, "/hang", "hanging")
    await until_started(cluster, cid, 1)
    cluster.kill(0)
    assert await _stop(api, cluster.url(1), cid) == "stopped"
    events = await _check_stopped(cluster, api, cid, "u")
    check_answered(events, api.sent[cid], given_up=["hanging"])
    await _check_sent_away([guest], events)


async def test_a_stop_is_finished_by_others_when_owner_and_asker_die(cluster: Cluster, api: Api) -> None:
    """The intent is in the store: recovery obeys it, and never starts the conversation again."""
    stored, cid = _stored(cluster), "stopped-twice-orphaned"
    await api.start(cluster.url(0), cid, "u")
    await api.deliver(cid, "/hang", "hanging")
    await until_started(cluster, cid, 1)
    # A frozen owner hears of the stop, and does nothing about it.
    cluster.stop(0)
    asking = asyncio.create_task(api.http.post(f"{cluster.url(1)}/api/conversations/{cid}/stop"))
    await wait_until(lambda: stored.head(cid)["status"] == "stopping", "the stop is recorded")
    cluster.kill(1)
    with pytest.raises(httpx.TransportError):
        await asking
    cluster.kill(0)
    await wait_until(lambda: stored.head(cid)["status"] == "stopped", "the stop is finished", 30)
    events = await _check_stopped(cluster, api, cid, "u")
    check_answered(events, api.sent[cid], given_up=["hanging"])
    assert opened(events) == [("n0", "start"), ("n2", "stop")]
    assert events[-1]["data"] == {"reason": "stopped by the user"}


async def test_a_frozen_owner_cannot_hold_up_a_stop_or_undo_it(cluster: Cluster, api: Api) -> None:
    stored, cid = _stored(cluster), "stopped-frozen"
    await api.start(cluster.url(0), cid, "u")
    await api.deliver(cid, "/hang", "hanging")
    await until_started(cluster, cid, 1)
    (old,) = cluster.incarnations(0)
    cluster.stop(0)
    assert await _stop(api, cluster.url(1), cid) == "stopped", "after the lease, if not before"
    events = await api.events(cid, cluster.url(1))
    cluster.cont(0)
    await wait_until(lambda: cluster.incarnations(0) - {old}, "it has joined anew")
    await asyncio.to_thread(cluster.wait_ready, 0)
    assert await _check_stopped(cluster, api, cid, "u") == events
    check_answered(events, api.sent[cid], given_up=["hanging"])
    assert stored.records(old) == set()


async def test_simultaneous_stops_at_all_nodes_are_one(cluster: Cluster, api: Api) -> None:
    cid = "stopped-at-once"
    await api.start(cluster.url(0), cid, "u")
    await api.talk(cid, 1)
    await api.answered(cid)
    outcomes = await asyncio.gather(*(_stop(api, cluster.url(number % 3), cid) for number in range(9)))
    assert set(outcomes) <= {"stopped", "already_stopped"}
    assert "stopped" in outcomes
    events = await _check_stopped(cluster, api, cid, "u")
    assert [event["kind"] for event in events].count("stopped") == 1


async def test_what_was_stopped_goes_on_after_a_resume(cluster: Cluster, clients: Clients, api: Api) -> None:
    cid = "resumed"
    await api.start(cluster.url(0), cid, "u")
    await api.deliver(cid, "/hang", "hanging")
    await until_started(cluster, cid, 1)
    assert await _resume(api, cluster.url(2), cid) == "running"
    assert await _stop(api, cluster.url(1), cid) == "stopped"
    reader = await clients.join(cluster.url(2), cid, user_id="u")
    assert reader.named("joined")[0]["status"] == "stopped"
    assert reader.sio.connected, "one may come to read"
    assert await _resume(api, cluster.url(1), cid) == "resumed"
    assert await _resume(api, cluster.url(0), cid) == "running"
    await api.deliver(cid, "good morning", url=cluster.url(2))
    await reader.wait_for(1)
    events = await api.answered(cid)
    check_answered(events, api.sent[cid], given_up=["hanging"])
    await reader.wait_seq(events[-1]["seq"])
    assert reader.events == events


async def test_a_socket_stops_and_the_owner_elsewhere_obeys(cluster: Cluster, clients: Clients, api: Api) -> None:
    cid = "stopped-by-socket"
    await api.start(cluster.url(0), cid, "u")
    guest = await clients.join(cluster.url(1), cid, user_id="u", comes_back=True)
    assert await guest.call("stop", {}) == {"outcome": "stopped"}
    await _check_sent_away([guest], await _check_stopped(cluster, api, cid, "u"))


async def test_a_deleted_conversation_leaves_nothing_and_its_id_begins_anew(
    cluster: Cluster, clients: Clients, api: Api
) -> None:
    stored, cid = _stored(cluster), "deleted"
    await api.start(cluster.url(0), cid, "u", metadata={"colour": "red"})
    guest = await clients.join(cluster.url(1), cid, user_id="u")
    await api.talk(cid, 2)
    before = await api.answered(cid)
    await api.deliver(cid, "/hang", "hanging")
    await until_started(cluster, cid, 3)
    answer = await api.http.delete(f"{cluster.url(2)}/api/conversations/{cid}")
    assert (answer.status_code, answer.content) == (204, b"")
    await guest.wait_named("stopped")
    await wait_until(lambda: not stored.leftovers(), "no key is left")
    for index in range(3):
        for path in ("", "/events", "/stream"):
            gone = await api.http.get(f"{cluster.url(index)}/api/conversations/{cid}{path}")
            assert (gone.status_code, gone.json()["code"]) == (404, "not_found")
        listed = await api.http.get(f"{cluster.url(index)}/api/conversations", params={"user_id": "u"})
        assert listed.json()["conversations"] == []
    again = await api.http.delete(f"{cluster.url(1)}/api/conversations/{cid}")
    assert again.status_code == 404
    # The same id is another conversation: an old cursor is told so, and shown everything.
    api.sent[cid].clear()
    await api.start(cluster.url(1), cid, "v")
    await api.talk(cid, 1)
    events = await api.answered(cid)
    check_answered(events, api.sent[cid])
    late = await clients.join(cluster.url(2), cid, user_id="v", after=before[-1]["cursor"])
    assert [name for name, _ in late.shown][:2] == ["resync", "event"]
    assert late.events == events


async def test_a_delete_while_messages_arrive_at_every_node(cluster: Cluster, api: Api) -> None:
    stored, cid = _stored(cluster), "deleted-under-load"
    await api.start(cluster.url(0), cid, "u")
    refusals: list[str] = []

    async def shout(url: str) -> None:
        while True:
            answer = await api.post(url, cid, "anybody?")
            if answer.status_code != 202:
                refusals.append(answer.json()["code"])
                if answer.json()["code"] == "not_found":
                    return

    async def delete(url: str) -> int:
        await wait_until(lambda: stored.head(cid).get("position", "0") != "0", "messages arrive")
        return (await api.http.delete(f"{url}/api/conversations/{cid}")).status_code

    outcomes = await asyncio.gather(
        *(shout(cluster.url(index)) for index in range(3)), *(delete(cluster.url(index)) for index in range(3))
    )
    deleted = [status for status in outcomes if status is not None]
    assert set(deleted) <= {204, 404}
    assert 204 in deleted
    assert set(refusals) <= {"not_found", "conversation_stopped", "inbox_full"}
    await wait_until(lambda: not stored.leftovers(), "no key is left")
