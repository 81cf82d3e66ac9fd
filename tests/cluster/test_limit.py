"""The limit of conversations per user: exact in the cluster, whoever starts what where at the same moment."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from typing import Any, Final

import httpx
import pytest

from tests.cluster.checks import attempts, check_answered, opened
from tests.cluster.clients import Client, Clients
from tests.cluster.talking import Api
from tests.support.cluster import Cluster
from tests.support.waiting import wait_until

LIMIT: Final = 3
AT_ONCE: Final = 40
ROUNDS: Final = 50

rejecting = pytest.mark.cluster(limit_policy="reject")
evicting = pytest.mark.cluster()
queueing = pytest.mark.cluster(limit_policy="queue", lease_ttl=4)


async def _create(http: httpx.AsyncClient, url: str, cid: str, user: str) -> httpx.Response:
    return await http.post(f"{url}/api/conversations", json={"conversation_id": cid, "user_id": user})


async def _stop(http: httpx.AsyncClient, url: str, cid: str) -> None:
    answer = await http.post(f"{url}/api/conversations/{cid}/stop")
    assert answer.json() == {"outcome": "stopped"}, answer.text


def _check_refusal(answer: httpx.Response, running: Sequence[str]) -> None:
    """A problem document with everything that is documented of `limit_exceeded`."""
    assert answer.status_code == 429
    assert answer.headers["content-type"] == "application/problem+json"
    problem: dict[str, Any] = answer.json()
    assert problem["code"] == "limit_exceeded"
    assert problem["status"] == 429
    assert problem["limit"] == LIMIT
    assert problem["current"] == LIMIT
    assert sorted(problem["running"]) == sorted(running)
    assert problem["detail"]


@rejecting
@pytest.mark.slow
async def test_of_forty_simultaneous_starts_on_three_nodes_exactly_three_succeed(
    cluster: Cluster, api: Api, rng: random.Random
) -> None:
    stored = cluster.stored
    assert stored is not None
    for number in range(ROUNDS):
        user = f"user-{number}"
        cids = [f"{user}.{index}" for index in range(AT_ONCE)]
        targets = [cluster.url(index % 3) for index in range(AT_ONCE)]
        rng.shuffle(targets)
        answers = await asyncio.gather(
            *(_create(api.http, url, cid, user) for cid, url in zip(cids, targets, strict=True))
        )
        won = [cid for cid, answer in zip(cids, answers, strict=True) if answer.status_code == 201]
        assert len(won) == LIMIT, [answer.text for answer in answers]
        for answer in answers:
            if answer.status_code != 201:
                _check_refusal(answer, won)
        assert set(stored.slots(user)) == set(won)
        listed = await api.http.get(f"{rng.choice(targets)}/api/conversations", params={"user_id": user})
        found = {conversation["conversation_id"]: conversation for conversation in listed.json()["conversations"]}
        assert set(found) == set(won), "a refused start leaves no conversation"
        # The place of a stopped one is free at once, at every node.
        await _stop(api.http, rng.choice(targets), rng.choice(won))
        after = await _create(api.http, rng.choice(targets), f"{user}.next", user)
        assert after.status_code == 201, after.text


@rejecting
async def test_starts_one_after_the_other_are_refused_at_the_limit_and_never_before(cluster: Cluster, api: Api) -> None:
    running: list[str] = []
    for number in range(30):
        if len(running) == LIMIT:
            refused = await _create(api.http, cluster.url((number + 1) % 3), f"refused-{number}", "u")
            _check_refusal(refused, running)
            gone = await api.http.get(f"{cluster.url(number % 3)}/api/conversations/refused-{number}")
            assert gone.status_code == 404
            await _stop(api.http, cluster.url((number + 2) % 3), running.pop(0))
        cid = f"started-{number}"
        answer = await _create(api.http, cluster.url(number % 3), cid, "u")
        assert answer.status_code == 201, answer.text
        running.append(cid)
        again = await _create(api.http, cluster.url((number + 1) % 3), cid, "u")
        assert again.status_code == 200, "one that runs needs no second slot"


@rejecting
async def test_a_socket_over_the_limit_is_refused_with_the_same_error(
    cluster: Cluster, clients: Clients, api: Api
) -> None:
    running = [f"c{number}" for number in range(LIMIT)]
    for cid in running:
        await api.start(cluster.url(0), cid, "u")
    refusal = await clients.refused(cluster.url(1), "one-too-many", user_id="u")
    assert refusal["code"] == "limit_exceeded"
    assert refusal["limit"] == refusal["current"] == LIMIT
    assert sorted(refusal["running"]) == running
    await clients.join(cluster.url(1), running[0], user_id="u")
    other = await clients.join(cluster.url(1), "of-somebody-else", user_id="v")
    assert other.named("joined")[0]["status"] in ("starting", "idle")


@rejecting
async def test_a_message_that_cannot_wake_its_conversation_is_refused_and_not_kept(cluster: Cluster, api: Api) -> None:
    """Under `reject`, what nobody will answer is not accepted; later the same id is new."""
    stored = cluster.stored
    assert stored is not None
    await api.start(cluster.url(0), "sleeper", "u")
    await api.talk("sleeper", 1)
    await api.answered("sleeper")
    cluster.kill(0)
    await wait_until(lambda: not stored.slots("u"), "its slot is free")
    for number in range(LIMIT):
        await api.start(cluster.url(1), f"c{number}", "u")
    refused = await api.post(cluster.url(1), "sleeper", "wake up", "m2")
    _check_refusal(refused, [f"c{number}" for number in range(LIMIT)])
    assert stored.unread("sleeper") == 0
    await _stop(api.http, cluster.url(2), "c0")
    api.sent["sleeper"]["m2"] = "wake up"
    accepted = await api.post(cluster.url(1), "sleeper", "wake up", "m2")
    assert accepted.status_code == 202, accepted.text
    assert accepted.json()["duplicate"] is False
    check_answered(await api.answered("sleeper"), api.sent["sleeper"])


@asynccontextmanager
async def _observed(cluster: Cluster, user: str) -> AsyncGenerator[None]:
    """At no look at the store while this lasts does the user hold more slots than allowed."""
    stored = cluster.stored
    assert stored is not None
    over = asyncio.Event()

    async def look() -> None:
        while not over.is_set():
            assert len(await asyncio.to_thread(stored.slots, user)) <= LIMIT

    looking = asyncio.create_task(look())
    try:
        yield
    finally:
        over.set()
        await looking


@evicting
async def test_the_longest_idle_conversation_makes_room_keeps_its_clients_and_wakes_up_again(
    cluster: Cluster, clients: Clients, api: Api
) -> None:
    stored = cluster.stored
    assert stored is not None
    guests: dict[str, Client] = {}
    async with _observed(cluster, "u"):
        for number, cid in enumerate(("first", "second", "third")):
            guests[cid] = await clients.join(cluster.url(number), cid, user_id="u", name=cid)
            await guests[cid].say("hello", f"{cid}.hello")
            await guests[cid].wait_for(1, "turn_done")
        await api.start(cluster.url(0), "fourth", "u")
        await wait_until(
            lambda: any(s["status"] == "hibernated" for s in guests["first"].named("status")),
            "the client of the evicted one is told so",
        )
        assert set(stored.slots("u")) == {"second", "third", "fourth"}
        assert stored.head("first")["owner"] == ""
        assert guests["first"].sio.connected
        await guests["first"].say("good morning", "first.morning")
        await guests["first"].wait_for(2, "turn_done")
        assert set(stored.slots("u")) == {"first", "third", "fourth"}, "now the second was idle for longest"
    check_answered(guests["first"].events, {"first.hello": "hello", "first.morning": "good morning"})
    assert [reason for _, reason in opened(guests["first"].events)] == ["start", "wake"]
    assert guests["first"].closes == []


@evicting
async def test_a_working_conversation_is_never_evicted(cluster: Cluster, api: Api) -> None:
    stored = cluster.stored
    assert stored is not None
    working = ["working-0", "working-1", "working-2"]
    async with _observed(cluster, "u"):
        for number, cid in enumerate(working[:2]):
            await api.start(cluster.url(number), cid, "u", message={"message_id": "m", "data": {"text": "/sleep 600"}})
        await api.start(cluster.url(2), "idle", "u")
        await api.start(cluster.url(0), working[2], "u", message={"message_id": "m", "data": {"text": "/sleep 600"}})
        assert set(stored.slots("u")) == set(working), "the idle one had to go"
        for number in range(6):
            _check_refusal(await _create(api.http, cluster.url(number % 3), f"more-{number}", "u"), working)
        waking = await api.post(cluster.url(1), "idle", "somebody there?", "m")
        assert waking.status_code == 202, "accepted: it waits for a slot"
        for cid in working:
            events = await api.events(cid)
            assert attempts(events, "m") == [(1, "new")]
            assert len(opened(events)) == 1
        await _stop(api.http, cluster.url(1), working[0])
        api.sent["idle"]["m"] = "somebody there?"
        check_answered(await api.answered("idle"), api.sent["idle"])
    for cid in working[1:]:
        await _stop(api.http, cluster.url(0), cid)


@evicting
async def test_a_storm_of_starts_evicts_and_never_exceeds_the_limit(
    cluster: Cluster, api: Api, rng: random.Random
) -> None:
    """Whatever order they come in: some start, some are refused, each that exists can be talked to."""
    async with _observed(cluster, "u"):
        cids = [f"c{number}" for number in range(12)]
        answers = await asyncio.gather(*(_create(api.http, cluster.url(rng.randrange(3)), cid, "u") for cid in cids))
        assert {answer.status_code for answer in answers} <= {201, 429}
        existing = [cid for cid, answer in zip(cids, answers, strict=True) if answer.status_code == 201]
        assert len(existing) >= LIMIT
        await asyncio.gather(*(api.deliver(cid, f"hello {cid}") for cid in existing))
        for cid in existing:
            check_answered(await api.answered(cid), api.sent[cid])


@evicting
async def test_messages_to_more_conversations_than_may_run_are_all_answered(cluster: Cluster, api: Api) -> None:
    """They wake, push each other out, and wait for each other, all the time."""
    cids = [f"c{number}" for number in range(2 * LIMIT)]
    async with _observed(cluster, "u"):
        for number, cid in enumerate(cids):
            await api.start(cluster.url(number % 3), cid, "u")
        await asyncio.gather(*(api.talk(cid, 10) for cid in cids))
        for cid in cids:
            events = await api.answered(cid)
            check_answered(events, api.sent[cid])
            assert {reason for _, reason in opened(events)} <= {"start", "wake"}


@evicting
async def test_a_start_after_the_node_of_all_idle_ones_was_killed_finds_its_place(cluster: Cluster, api: Api) -> None:
    for number in range(LIMIT):
        await api.start(cluster.url(0), f"c{number}", "u")
    cluster.kill(0)
    answer = await _create(api.http, cluster.url(1), "next", "u")
    # At once, or when the dead have been buried: until then their places are taken.
    if answer.status_code != 201:
        assert answer.json()["code"] in ("limit_exceeded", "owner_unavailable"), answer.text

        async def starts() -> bool:
            return (await _create(api.http, cluster.url(1), "next", "u")).status_code == 201

        await wait_until(starts, "it is started")
    await api.deliver("next", "hello")
    check_answered(await api.answered("next"), api.sent["next"])


async def _fill(cluster: Cluster, api: Api) -> list[str]:
    busy = [f"busy-{number}" for number in range(LIMIT)]
    for number, cid in enumerate(busy):
        await api.start(cluster.url(number), cid, "u", message={"data": {"text": "/sleep 600"}})
    return busy


@queueing
async def test_a_queued_start_accepts_messages_and_begins_when_a_slot_is_free(
    cluster: Cluster, clients: Clients, api: Api
) -> None:
    stored = cluster.stored
    assert stored is not None
    busy = await _fill(cluster, api)
    async with _observed(cluster, "u"):
        for number, cid in enumerate(("next", "after-next")):
            answer = await api.start(cluster.url(number), cid, "u")
            assert answer["status"] == "starting"
            assert answer["node"] == ""
        assert stored.waiting("u") == ["next", "after-next"]
        guest = await clients.join(cluster.url(2), "next", user_id="u")
        for cid in ("next", "after-next"):
            accepted = await api.deliver(cid, f"hello {cid}", url=cluster.url(2))
            assert accepted["position"] == 1
        assert guest.events == []
        await _stop(api.http, cluster.url(2), busy[0])
        await guest.wait_for(1)
        check_answered(await api.answered("next"), api.sent["next"])
        assert stored.waiting("u") == ["after-next"], "nobody is passed over, and only one slot was free"
        assert (await api.show("after-next"))["status"] == "starting"
        await _stop(api.http, cluster.url(0), busy[1])
        check_answered(await api.answered("after-next"), api.sent["after-next"])
    assert stored.waiting("u") == []
    await _stop(api.http, cluster.url(0), busy[2])


@queueing
async def test_a_newcomer_does_not_pass_those_who_wait_though_a_place_is_free(cluster: Cluster, api: Api) -> None:
    stored = cluster.stored
    assert stored is not None
    busy = [f"busy-{number}" for number in range(LIMIT)]
    for number, cid in enumerate(busy):
        await api.start(cluster.url(1 + number % 2), cid, "u", message={"data": {"text": "/sleep 600"}})
    await api.start(cluster.url(0), "first", "u")
    # Who looks after the one that waits is frozen, so the place stays free for a while.
    cluster.stop(0)
    await _stop(api.http, cluster.url(1), busy[0])
    answer = await api.start(cluster.url(1), "newcomer", "u")
    assert (answer["status"], answer["node"]) == ("starting", "")
    assert stored.waiting("u") == ["first", "newcomer"]
    assert set(stored.slots("u")) == set(busy[1:])
    cluster.cont(0)
    await wait_until(lambda: stored.waiting("u") == ["newcomer"], "the first one is served first", 30)
    await _stop(api.http, cluster.url(1), busy[1])
    for cid in ("first", "newcomer"):
        await api.deliver(cid, "hello", url=cluster.url(2))
        check_answered(await api.answered(cid), api.sent[cid])
    await _stop(api.http, cluster.url(1), busy[2])


@queueing
@pytest.mark.parametrize("written", [True, False], ids=["with a message", "without a message"])
async def test_a_queued_start_survives_the_node_that_looks_after_it(cluster: Cluster, api: Api, written: bool) -> None:
    stored = cluster.stored
    assert stored is not None
    busy: list[str] = []
    for number in range(LIMIT):
        cid = f"busy-{number}"
        await api.start(cluster.url(1 + number % 2), cid, "u", message={"data": {"text": "/sleep 600"}})
        busy.append(cid)
    await api.start(cluster.url(0), "queued", "u")
    if written:
        await api.deliver("queued", "anybody?", url=cluster.url(0))
    (dead,) = cluster.incarnations(0)
    cluster.kill(0)
    await wait_until(lambda: dead in stored.buried(), "the node is buried")
    await wait_until(lambda: not stored.records(dead), "its records are recovered")
    await _stop(api.http, cluster.url(1), busy[0])
    if not written:
        # The place is free for whoever waits, and then for others.
        await wait_until(lambda: stored.waiting("u") == [], "the queue is served")
        await api.deliver("queued", "anybody?")
    check_answered(await api.answered("queued"), api.sent["queued"])
    for cid in busy[1:]:
        await _stop(api.http, cluster.url(1), cid)
