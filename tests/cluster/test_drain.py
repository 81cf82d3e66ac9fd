"""Nodes that are told to end: what they do goes on elsewhere, and nobody misses, loses or repeats anything."""

from __future__ import annotations

import asyncio
import random
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cluster.checks import attempts, opened
from tests.cluster.leaving import ENDS_WELL, KINDS, Person, Scene, scene, user_of
from tests.support.processes import convener
from tests.support.proxy import Proxy
from tests.support.servers import Server
from tests.support.stored import Stored
from tests.support.waiting import wait_until


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
async def test_a_signal_empties_a_node_and_nobody_misses_anything(kind: str, tmp_path: Path) -> None:
    gate, call_gate = tmp_path / "gate", tmp_path / "call"
    async with scene(kind=kind, nodes=2) as here:
        for cid in ("busy", "idle", "asked"):
            await here.start(cid, 0)
            await here.api.talk(cid, 1)
            await here.api.answered(cid)
        busy, elsewhere = await here.python("busy", 0), await here.python("busy", 1)
        idle = await here.python("idle", 0)
        js_busy, js_idle = await here.javascript("busy", 0), await here.javascript("idle", 0)
        stream = await here.stream("idle", 0)
        await here.api.deliver("busy", f"/until {gate}", "gated")
        await here.begun("busy", 2)
        await here.api.deliver("asked", "/ask really?", "asking")
        await wait_until(lambda: here.stored.head("asked")["asks"] == "1", "it has asked")
        call = asyncio.create_task(here.call("idle", 0, "until", str(call_gate)))
        await wait_until(lambda: call_gate.with_suffix(".begun").exists(), "the call is under way")
        (old,) = here.cluster.incarnations(0)

        here.cluster.term(0)
        await here.unready(0)
        # While a turn goes on, which may take its time, everything else leaves.
        for cid in ("idle", "asked"):
            await wait_until(lambda cid=cid: here.cluster.owner(cid) != 0, f"{cid} has left memory there")
            await wait_until(lambda cid=cid: old not in here.stored.slots(user_of(cid)).values(), f"{cid} has no slot")
        await idle.wait_named("joined", 2)
        await js_idle.until("come back", lambda: len(js_idle.of("joined")) == 2)
        assert idle.closes == [1012]
        assert [list(told) for told in [*idle.named("goaway"), *js_idle.of("goaway")]] == [["delay_ms"], ["delay_ms"]]
        await wait_until(lambda: stream.over, "the stream has ended")
        assert stream.shown[-1][0] == "goaway"
        # What is sent to a node that leaves is answered all the same: here, later, or elsewhere, at once.
        await here.api.deliver("idle", "to the one that leaves", url=here.cluster.url(0))
        await here.api.deliver("busy", "for whoever comes then", url=here.cluster.url(0))
        await busy.say("by socket", "by-socket")
        here.api.sent["busy"]["by-socket"] = "by socket"
        await idle.wait_for(2)
        assert busy.closes == []
        assert here.cluster.owner("busy") == 0

        gate.touch()
        call_gate.touch()
        assert (await call).json() == {"result": "idle"}
        assert await here.ended(0) == ENDS_WELL[kind]
        events = await here.check("busy", busy, js_busy, elsewhere)
        assert attempts(events, "gated") == [(1, "new")]
        assert opened(events) == [("n0", "start"), ("n1", "handoff")]
        assert [reason for _, reason in opened(await here.check("idle", idle, js_idle))] == ["start", "wake"]
        assert (busy.closes, len(busy.named("goaway")), elsewhere.named("goaway")) == ([1012], 1, [])
        assert old in here.stored.buried()
        assert here.stored.unsettled() == ["asked: 1 of 2 messages are answered"], "nobody can but a person"
        await here.answer("asked", 1, "t2.1", "yes")
        assert attempts(await here.check("asked"), "asking") == [(1, "new"), (2, "retry")]


def _says(here: Scene, node: int, *words: str) -> Callable[[], bool]:
    """Whether a line of the node's log has all these words."""
    return lambda: any(all(word in line for word in words) for line in here.cluster.nodes[node].log())


async def test_a_turn_that_takes_too_long_goes_on_elsewhere_from_its_last_step(tmp_path: Path) -> None:
    folder, gate = tmp_path / "steps", tmp_path / "gate"
    folder.mkdir()

    def calls() -> list[str]:
        return (folder / "calls").read_text().split() if (folder / "calls").exists() else []

    async with scene(nodes=2, drain_timeout=6) as here:
        for cid, text in (("stepping", f"/steps {folder}"), ("endless", f"/until {gate}")):
            await here.start(cid, 0)
            await here.api.deliver(cid, text, "long")
            await here.api.deliver(cid, "next", "next")
            await here.begun(cid, 1)
        guests = {cid: await here.python(cid, 1) for cid in ("stepping", "endless")}
        (folder / "0").touch()
        await wait_until(lambda: calls() == ["0", "1"], "it is in its second step")
        here.cluster.term(0)
        await wait_until(_says(here, 0, "next step", "stepping"), "its time to end by itself is over")
        (folder / "1").touch()
        await wait_until(lambda: here.cluster.owner("stepping") == 1, "it was handed over")
        assert await here.ended(0) == 0
        await wait_until(lambda: calls() == ["0", "1", "2"], "it goes on with its third step")
        for path in (folder / "2", folder / "3", gate):
            path.touch()
        for cid, guest in guests.items():
            events = await here.check(cid, guest)
            assert attempts(events, "long") == [(1, "new"), (2, "handoff")]
            assert opened(events) == [("n0", "start"), ("n1", "handoff")]
            assert here.stored.head(cid)["strikes"] == "0"
        assert calls() == ["0", "1", "2", "3"], "no step was run twice"


async def test_what_blocks_a_thread_does_not_keep_the_node_from_ending(tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    async with scene(nodes=2, drain_timeout=1) as here:
        await here.start("blocked", 0)
        await here.api.deliver("blocked", f"/block {gate}", "blocking")
        await wait_until(lambda: [e for e in here.stored.log("blocked") if e.kind == "turn_started"], "it has begun")
        here.cluster.term(0)
        assert await here.ended(0) == 0
        assert here.cluster.owner("blocked") == 1
        gate.touch()
        assert attempts(await here.check("blocked"), "blocking") == [(1, "new"), (2, "handoff")]


@pytest.mark.parametrize("kind", ["serve", "uvicorn", "fastapi"])
async def test_a_second_signal_ends_it_at_once(kind: str, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    async with scene(kind=kind, nodes=2, drain_timeout=300) as here:
        for cid in ("busy", "called"):
            await here.start(cid, 0)
        guests = [await here.python("busy", 0), await here.python("busy", 1)]
        stream = await here.stream("busy", 0)
        await here.api.deliver("busy", f"/until {gate}", "gated")
        await here.begun("busy", 1)
        call = asyncio.create_task(here.call("called", 0, "until", str(tmp_path / "call")))
        await wait_until((tmp_path / "call.begun").exists, "the call is under way")
        here.cluster.term(0)
        await here.unready(0)
        await here.api.deliver("busy", "queued", "queued", url=here.cluster.url(0))
        assert here.cluster.nodes[0].running
        here.cluster.term(0)
        await here.ended(0)
        refused = await call
        assert (refused.status_code, refused.json()["code"]) == (503, "owner_unavailable"), refused.text
        await wait_until(lambda: stream.over, "the stream has ended")
        gate.touch()
        events = await here.check("busy", *guests)
        assert opened(events) == [("n0", "start"), ("n1", "handoff")]
        assert attempts(events, "gated")[-1] == (2, "handoff")


@pytest.mark.parametrize("longer", [False, True], ids=["comes back in time", "comes back when it has ended"])
async def test_a_signal_while_the_store_is_away(longer: bool, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    # The longer story ends by this; the shorter one must not.
    limit = 3 if longer else 60
    with Server("valkey") as server:
        async with (
            Proxy(server.port) as link,
            scene(nodes=2, server=server, detours={0: link.url}, drain_timeout=limit) as here,
        ):
            for cid in ("busy", "idle"):
                await here.start(cid, 0)
                await here.api.talk(cid, 1)
                await here.api.answered(cid)
            guests = {cid: await here.python(cid, 1) for cid in ("busy", "idle")}
            await here.api.deliver("busy", f"/until {gate}", "gated")
            await here.begun("busy", 2)
            (old,) = here.cluster.incarnations(0)
            link.freeze()
            # New connections are no better.
            link.accepting = False
            await wait_until(_says(here, 0, "suspended"), "it may not act any more")
            here.cluster.term(0)
            await here.unready(0)
            if longer:
                assert await here.ended(0) == 0
            link.thaw()
            link.cut()
            link.accepting = True
            gate.touch()
            if not longer:
                assert await here.ended(0) == 0
            await wait_until(lambda: old in here.stored.buried(), "it is buried")
            for cid, guest in guests.items():
                await here.api.deliver(cid, "and then?", url=here.cluster.url(1))
                await here.check(cid, guest)


async def test_a_handover_whose_target_dies_is_taken_by_another(tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    with Server("valkey") as server:
        async with Proxy(server.port) as link, scene(server=server, detours={1: link.url}) as here:
            # The one that has most is asked last.
            for number in range(3):
                await here.start(f"ballast-{number}", 2)
            await here.start("handed", 0)
            await here.api.deliver("handed", f"/until {gate}", "gated")
            await here.begun("handed", 1)
            guest = await here.python("handed", 2)
            await here.api.deliver("handed", "queued")
            await wait_until(
                lambda: len(here.cluster.get(0, "/conversations", scope="cluster")["conversations"]) == 4,
                "the node knows what the others have",
            )
            here.cluster.term(0)
            await here.unready(0)
            link.freeze(lambda passage: not passage.subscribes)
            gate.touch()
            await guest.wait_for(1)
            here.cluster.kill(1)
            events = await here.check("handed", guest)
            assert await here.ended(0) == 0
            assert attempts(events, "gated") == [(1, "new")]
            assert _says(here, 0, "whether it was handed over is not known")(), "it was asked to take it"
            assert opened(events)[0] == ("n0", "start")
            assert opened(events)[-1][0] == "n2"


async def test_nodes_that_leave_at_the_same_time_give_nothing_to_each_other(tmp_path: Path) -> None:
    gate, cids = tmp_path / "gate", [f"c{number}" for number in range(6)]
    async with scene() as here:
        for number, cid in enumerate(cids):
            await here.start(cid, number % 2)
            await here.api.deliver(cid, f"/until {gate}", f"{cid}.gated")
            await here.begun(cid, 1)
            await here.api.deliver(cid, "queued", f"{cid}.queued")
        guests = [await here.python(cid) for cid in cids]
        for node in (0, 1):
            here.cluster.term(node)
        for node in (0, 1):
            await here.unready(node)
        gate.touch()
        for node in (0, 1):
            assert await here.ended(node) == 0
        for number, (cid, guest) in enumerate(zip(cids, guests, strict=True)):
            events = await here.check(cid, guest)
            assert attempts(events, f"{cid}.gated") == [(1, "new")]
            assert opened(events) == [(f"n{number % 2}", "start"), ("n2", "handoff")]


async def test_a_cluster_that_ends_and_starts_again_goes_on_with_everything(tmp_path: Path) -> None:
    gate, cids = tmp_path / "gate", [f"c{number}" for number in range(6)]
    async with scene(drain_timeout=2) as here:
        for number, cid in enumerate(cids):
            await here.start(cid, number % 3)
            await here.api.deliver(cid, f"/until {gate}", f"{cid}.gated")
            await here.begun(cid, 1)
            await here.api.deliver(cid, "queued", f"{cid}.queued")
        guests = [await here.python(cid) for cid in cids]
        # As often as would be taken for a turn that takes its nodes down.
        for _ in range(3):
            for node in range(3):
                here.cluster.term(node)
            assert [await here.ended(node) for node in range(3)] == [0, 0, 0]
            assert here.stored.members() == set()
            await asyncio.to_thread(here.cluster.heal)
            await wait_until(lambda: all(here.cluster.owner(cid) is not None for cid in cids), "all go on")
            await wait_until(
                lambda: all(here.stored.head(cid)["owner"] in here.stored.members() for cid in cids), "anew"
            )
        gate.touch()
        for cid, guest in zip(cids, guests, strict=True):
            events = await here.check(cid, guest)
            assert {reason for _, reason in attempts(events, f"{cid}.gated")[1:]} == {"handoff"}
            assert here.stored.head(cid)["strikes"] == "0", "nobody crashed"


async def test_alarms_come_and_questions_are_answered_while_a_node_leaves(tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    async with scene(nodes=2) as here:
        for cid in ("busy", "alarmed", "asking"):
            await here.start(cid, 0)
        await here.api.deliver("busy", f"/until {gate}", "gated")
        await here.begun("busy", 1)
        await here.api.deliver("alarmed", "/alarm 3", "setting")
        await here.api.deliver("asking", "/ask really?", "asking")
        await wait_until(lambda: here.stored.head("asking")["asks"] == "1", "it has asked")
        guests = {cid: await here.python(cid, 0) for cid in ("alarmed", "asking")}
        await guests["alarmed"].wait_for(1)
        here.cluster.term(0)
        await here.unready(0)
        await here.answer("asking", 0, "t1.1", "yes")
        events = await here.check("asking", guests["asking"])
        assert attempts(events, "asking")[0] == (1, "new")
        await guests["alarmed"].wait_for(2)
        assert here.cluster.nodes[0].running
        assert [e["data"]["text"] for e in guests["alarmed"].of_kind("reply")] == ["/alarm 3", "alarm t1"]
        gate.touch()
        assert await here.ended(0) == 0
        await here.check("busy")


async def test_a_drain_in_the_middle_of_everything_loses_nothing(rng: random.Random) -> None:
    """While it begins, conversations are made, joined, written to and called, at the node that leaves as at others."""
    cids = [f"storm-{number:02}" for number in range(30)]
    async with scene() as here:
        count = 0

        async def talk(cid: str) -> Person:
            nonlocal count
            await here.create(cid, rng)
            person = await here.person(cid)
            for number in range(4):
                count += 1
                await here.api.deliver(cid, f"/stream line {number} of {cid}")
                await person.send(f"by socket {number}")
                assert await here.call_somewhere(cid, rng, "turns", None) >= 0
            return person

        talks = [asyncio.create_task(talk(cid)) for cid in cids]
        await wait_until(lambda: count > len(cids), "everything is under way")
        here.cluster.term(0)
        ending = asyncio.create_task(here.ended(0))
        people = await asyncio.gather(*talks)
        assert await ending == 0
        for cid, person in zip(cids, people, strict=True):
            events = await here.check(cid, person.client)
            assert "takeover" not in [reason for _, reason in opened(events)], "nothing was left to recovery"


async def test_a_node_that_is_killed_while_it_leaves_is_recovered(tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    async with scene(nodes=2) as here:
        for cid in ("busy", "idle"):
            await here.start(cid, 0)
        guests = {cid: await here.python(cid, 0) for cid in ("busy", "idle")}
        await here.api.deliver("busy", f"/until {gate}", "gated")
        await here.begun("busy", 1)
        here.cluster.term(0)
        await wait_until(lambda: here.cluster.owner("idle") != 0, "it is leaving")
        await here.api.deliver("busy", "queued", url=here.cluster.url(0))
        here.cluster.kill(0)
        gate.touch()
        for cid, guest in guests.items():
            await here.api.deliver(cid, "afterwards", url=here.cluster.url(1))
            events = await here.check(cid, guest)
            if cid == "busy":
                assert attempts(events, "gated") == [(1, "new"), (2, "takeover")]


async def test_a_second_signal_does_not_wait_for_load_balancers(tmp_path: Path) -> None:
    async with scene(nodes=2, shutdown_delay=300, drain_timeout=300) as here:
        await here.start("busy", 0)
        guest = await here.python("busy", 0)
        await here.api.deliver("busy", f"/until {tmp_path / 'gate'}", "gated")
        await here.begun("busy", 1)
        here.cluster.term(0)
        await here.unready(0)
        # Nothing is refused yet: a balancer may not have noticed.
        late = await here.clients.join(here.cluster.url(0), "busy", user_id=user_of("busy"))
        await guest.say("in time", "in-time")
        here.api.sent["busy"]["in-time"] = "in time"
        assert guest.closes == []
        here.cluster.term(0)
        assert await here.ended(0) == 0
        await wait_until(lambda: late.closes, "who came late is gone")
        (tmp_path / "gate").touch()
        await here.check("busy", guest)


async def test_a_signal_while_a_node_starts(tmp_path: Path) -> None:
    with Server("valkey") as server:
        async with Proxy(server.port) as link:
            link.delay = 0.05
            with convener("serve", "--port", "0", "--redis", link.url, "--node-name", "n0", directory=tmp_path) as node:
                await wait_until(lambda: link.passages, "it has begun to start")
                node.signal(signal.SIGTERM)
                assert await asyncio.to_thread(node.wait, 60) == 0
                assert "Traceback" not in "\n".join(node.errors)
            stored = Stored(server)
            try:
                assert (stored.members(), len(stored.buried())) == (set(), 1), "it has left as it should"
            finally:
                stored.close()
