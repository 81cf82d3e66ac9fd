"""Answers while they are written: every client of every node sees every piece once, in its place (I9)."""

from __future__ import annotations

import asyncio
import os
from typing import cast

import pytest

from convener.core.cursor import parse
from convener.manager.turn import Turn
from convener.store.base import Store
from convener.testing.cluster import RecordingSink
from convener.testing.steps import StepStore
from tests.manager.conftest import MakeCluster, join
from tests.manager.writing import done, end, seen, sees, set_up
from tests.support.waiting import wait_until

pytestmark = pytest.mark.anyio

SEEDS = range(int(os.environ.get("CONVENER_TEST_SEED", "0")), int(os.environ.get("CONVENER_TEST_SEED", "0")) + 3)


async def test_pieces_reach_the_clients_of_all_nodes(make_cluster: MakeCluster) -> None:
    setting = await set_up(make_cluster)
    sinks = [await join(setting.cluster, node, "c", f"s{node}") for node in range(3)]
    for sink in sinks:
        await wait_until(lambda sink=sink: sink.named("joined"), "joined")
    pen = await setting.pen()
    for piece in ("It ", "was a ", "dark ", "näïve 😀 night"):
        await pen.write(piece)
    await pen.write([{"call": 1}], [{"call": 2}], part="calls")
    for sink in sinks:
        await sees(sink, "It was a dark näïve 😀 night")
        await sees(sink, [{"call": 1}, {"call": 2}], part="calls")
        first = sink.named("delta")[0]
        assert (first["turn"], first["attempt"], first["part"], first["type"], first["offset"]) == (
            *("t1", 1, "text", "text"),
            0,
        )
    await end(setting, pen, *sinks)


async def test_who_joins_late_gets_one_piece_of_each_part_and_goes_on(make_cluster: MakeCluster) -> None:
    setting = await set_up(make_cluster)
    pen = await setting.pen()
    for number in range(20):
        await pen.write(f"{number} ")
        await pen.write([number], part="calls")
    sinks = [await join(setting.cluster, node, "c", f"s{node}") for node in range(3)]
    for sink in sinks:
        await sees(sink, pen.parts["text"])
        await sees(sink, list(range(20)), part="calls")
        assert [name for name, _ in sink.sent if name in ("joined", "delta")] == ["joined", "delta", "delta"]
        assert [e["kind"] for e in sink.events][-1] == "turn_started"
    await pen.write("and on")
    await end(setting, pen, *sinks)


@pytest.mark.parametrize("place", ["cursor", "number", "tail"])
async def test_who_comes_back_in_the_middle_gets_it_whole_again(make_cluster: MakeCluster, place: str) -> None:
    setting = await set_up(make_cluster)
    pen = await setting.pen()
    before = await join(setting.cluster, 0, "c", "s0")
    await pen.write("one ")
    await sees(before, "one ")
    await setting.cluster[0].disconnect_from_session("s0")
    await pen.write("two ")
    last = before.events[-1]
    after = {"cursor": parse(last["cursor"]), "number": parse(last["seq"]), "tail": None}[place]
    sinks: list[RecordingSink] = []
    for node in range(3):
        options = {"after": after} if after is not None else {"tail": 0}
        sinks.append(await join(setting.cluster, node, "c", f"again{node}", **options))
    for sink in sinks:
        await sees(sink, "one two ")
        assert sink.events == []
        assert seen(sink).deltas == 1
    await pen.write("three")
    await end(setting, pen, *sinks)


async def test_large_pieces_are_read(make_cluster: MakeCluster) -> None:
    setting = await set_up(make_cluster)
    sinks = [await join(setting.cluster, node, "c", f"s{node}") for node in range(3)]
    pen = await setting.pen()
    await pen.write("small ")
    for letter in "abc":
        await pen.write(letter * 20_000)
        await pen.write("small again ")
    for sink in sinks:
        await sees(sink, pen.parts["text"])
    late = await join(setting.cluster, 2, "c", "late")
    await sees(late, pen.parts["text"])
    assert seen(late).deltas == 1
    await end(setting, pen, *sinks, late)


async def test_very_much_comes_in_several_pieces(make_cluster: MakeCluster) -> None:
    setting = await set_up(make_cluster)
    pen = await setting.pen()
    for number in range(12):
        await pen.write(str(number % 10) * 200_000)
    sink = await join(setting.cluster, 1, "c", "s")
    await sees(sink, pen.parts["text"])
    assert 2 <= seen(sink).deltas <= 4
    setting.typist.finish(pen, {"text": "too long to be told twice"})
    await done(sink)


async def test_a_takeover_voids_what_was_written(make_cluster: MakeCluster) -> None:
    setting = await set_up(make_cluster)
    pen = await setting.pen()
    await pen.write("the first one wrote this")
    node = setting.others()[0]
    sink = await join(setting.cluster, node, "c", "s")
    await sees(sink, "the first one wrote this")
    await setting.cluster.kill(setting.owner)
    again = await setting.pen(attempt=2)
    # Void, though nothing has taken its place yet.
    await wait_until(lambda: seen(sink).parts == {}, "the new attempt is shown to begin")
    await again.write("the second ")
    late = await join(setting.cluster, setting.others()[0], "c", "late")
    await again.write("wrote that")
    await end(setting, again, sink, late)


async def test_each_turn_has_its_own(make_cluster: MakeCluster) -> None:
    setting = await set_up(make_cluster)
    await setting.ask()
    await setting.ask()
    sinks = [await join(setting.cluster, node, "c", f"s{node}") for node in range(3)]
    for turn in ("t1", "t2", "t3"):
        pen = await setting.pen(turn)
        await pen.write(f"this is {turn}")
        for sink in sinks:
            await sees(sink, f"this is {turn}")
        # Ends with pieces that nobody may have heard of yet.
        await pen.write(", its end")
        setting.typist.finish(pen)
    for sink in sinks:
        await done(sink, "t3")
        assert [(turn, reply) for turn, reply, _ in seen(sink).replied] == [
            (turn, {"text": f"this is {turn}, its end"}) for turn in ("t1", "t2", "t3")
        ]


async def test_a_reply_in_the_middle_takes_the_place_of_what_was_before_it(make_cluster: MakeCluster) -> None:
    setting = await set_up(make_cluster)
    sinks = [await join(setting.cluster, node, "c", f"s{node}") for node in range(3)]
    pen = await setting.pen()
    await pen.write("a draft")
    for sink in sinks:
        await sees(sink, "a draft")
    setting.typist.tell(pen, "reply", "a fair copy")
    pen.next_reply()
    # The reply is held back until the step begins; what is written after it waits for it.
    await pen.write("something ")
    setting.typist.tell(pen, "step", "look")
    for sink in sinks:
        await wait_until(lambda sink=sink: sink.replies() == ["a fair copy"], "the reply is there")
    await pen.write("else")
    late = await join(setting.cluster, 1, "c", "late")
    await end(setting, pen, *sinks, late)
    for sink in sinks:
        assert seen(sink).replied[0] == ("t1", "a fair copy", {"text": "a draft"})


async def test_an_attempt_that_repeats_a_reply_does_not_show_it_again(make_cluster: MakeCluster) -> None:
    setting = await set_up(make_cluster)
    pen = await setting.pen()
    await pen.write("a draft")
    setting.typist.tell(pen, "reply", "a fair copy")
    setting.typist.tell(pen, "step", "look")
    pen.next_reply()
    sink = await join(setting.cluster, setting.others()[0], "c", "s")
    await wait_until(lambda: sink.replies() == ["a fair copy"], "the reply is there")
    await pen.write("cut o")
    await sees(sink, "cut o")
    await setting.cluster.kill(setting.owner)
    again = await setting.pen(attempt=2)
    late = await join(setting.cluster, setting.others()[0], "c", "late")
    await again.write("another draft")
    setting.typist.tell(again, "reply", "a fair copy")
    setting.typist.tell(again, "step", "look")
    again.next_reply()
    await again.write("the rest")
    await end(setting, again, sink, late)
    for each in (sink, late):
        assert "another draft" not in [delta["data"] for delta in each.named("delta")]


async def test_what_an_agent_streams_reaches_everybody(make_cluster: MakeCluster) -> None:
    gates = [asyncio.Event() for _ in range(3)]

    async def novelist(turn: Turn) -> None:
        for number, gate in enumerate(gates):
            await gate.wait()
            for word in f"chapter {number} is näïve 😀 ".split(" "):
                await turn.stream(word + " ")
                await turn.stream({"words": len(word)}, part="notes", type="note")

    cluster = await make_cluster(novelist)
    await cluster[0].maybe_start_agent_loop("c", user_id="u")
    sinks = [await join(cluster, node, "c", f"s{node}") for node in range(3)]
    await cluster[1].send_event_to_conversation("c", {"text": "write"})
    for number, gate in enumerate(gates[:2]):
        gate.set()
        sinks.append(await join(cluster, number, "c", f"late{number}"))
        for sink in sinks:
            await wait_until(
                lambda sink=sink, number=number: f"chapter {number} is näïve 😀" in seen(sink).parts.get("text", ""),
                f"chapter {number} is shown",
            )
    gates[2].set()
    for sink in sinks:
        await done(sink)
        ((_, reply, streamed),) = seen(sink).replied
        assert reply["text"].startswith(streamed["text"])
        assert reply["notes"][: len(streamed["notes"])] == streamed["notes"]
        assert "chapter 1 is näïve 😀" in streamed["text"], "it is in the reply as it was seen"


# -- slow clients ------------------------------------------------------------------------------------------------------


async def test_a_client_that_does_not_read_holds_nobody_up(make_cluster: MakeCluster) -> None:
    setting = await set_up(make_cluster)
    sinks = [await join(setting.cluster, node, "c", f"s{node}") for node in range(3)]
    slow = await join(setting.cluster, 1, "c", "slow")
    asleep = await join(setting.cluster, 1, "c", "asleep")
    pen = await setting.pen()
    await pen.write("0 ")
    for sink in [*sinks, slow, asleep]:
        await sees(sink, "0 ")
    slow.gate.clear()
    asleep.gate.clear()
    for number in range(1, 50):
        await pen.write(f"{number} ")
        for sink in sinks:
            await sees(sink, pen.parts["text"])
    assert len(slow.named("delta")) == 1
    slow.gate.set()
    await sees(slow, pen.parts["text"])
    # Everything that came meanwhile, as one.
    assert len(slow.named("delta")) == 2
    await end(setting, pen, *sinks, slow)
    # Who slept through it gets the reply, and no piece after the end.
    asleep.gate.set()
    await done(asleep)
    assert seen(asleep).replied == [("t1", pen.parts, {"text": "0 "})]


async def test_a_node_without_clients_keeps_nothing(make_cluster: MakeCluster) -> None:
    stores: list[StepStore] = []

    def wrap(index: int, store: Store) -> Store:
        stores.append(StepStore(store))
        return cast("Store", stores[-1])

    setting = await set_up(make_cluster, wrap=wrap)
    pen = await setting.pen()
    reads = [store.hold("pieces") for store in stores]
    await pen.write("for nobody")
    view = setting.cluster[setting.owner].engine.views.get("c")
    assert view is not None
    sink = await join(setting.cluster, setting.others()[0], "c", "s")
    for read in reads:
        read.go()
    await sees(sink, "for nobody")
    assert view.answer.parts() == ()
    assert not reads[setting.owner].reached.is_set()
    # Its first client changes that.
    own = await join(setting.cluster, setting.owner, "c", "own")
    await end(setting, pen, own)
