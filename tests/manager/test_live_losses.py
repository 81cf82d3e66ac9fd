"""Answers while they are written, when publications are lost, or when something else comes in between."""

from __future__ import annotations

import asyncio
import os
import random
from typing import Any, cast

import pytest

from convener.core.cursor import parse
from convener.store.base import Store
from convener.testing.cluster import RecordingSink
from convener.testing.faults import FaultyStore
from convener.testing.steps import StepStore
from tests.manager.conftest import MakeCluster, join
from tests.manager.writing import Pen, Setting, done, end, piece_text, seen, sees, set_up
from tests.support.waiting import wait_until

pytestmark = pytest.mark.anyio

SEEDS = range(int(os.environ.get("CONVENER_TEST_SEED", "0")), int(os.environ.get("CONVENER_TEST_SEED", "0")) + 3)


# -- losses ------------------------------------------------------------------------------------------------------------


class Lossy:
    """Makes clusters whose nodes lose publications when they are told to."""

    def __init__(self) -> None:
        self.stores: list[FaultyStore] = []

    def wrap(self, index: int, store: Store) -> Store:
        self.stores.append(FaultyStore(store, random.Random(index)))
        return cast("Store", self.stores[-1])


async def test_pieces_that_were_lost_are_read(make_cluster: MakeCluster) -> None:
    lossy = Lossy()
    setting = await set_up(make_cluster, wrap=lossy.wrap)
    sinks = [await join(setting.cluster, node, "c", f"s{node}") for node in range(3)]
    pen = await setting.pen()
    await pen.write("one ")
    for sink in sinks:
        await sees(sink, "one ")
    for store in lossy.stores:
        store.loss = 1.0
    await pen.write("two ")
    await pen.write("three ")
    await wait_until(lambda: all(store.lost for store in lossy.stores), "every node has lost something")
    for store in lossy.stores:
        store.mend()
    for sink in sinks:
        await sees(sink, "one two three ")
    # A hole that nobody tells of is seen with the next piece.
    for store in lossy.stores:
        store.loss = 1.0
    lost = [store.lost for store in lossy.stores]
    await pen.write("four ")
    await wait_until(
        lambda: all(s.lost > before for s, before in zip(lossy.stores, lost, strict=True)), "and once more"
    )
    for store in lossy.stores:
        store.loss = 0.0
    await pen.write("five")
    assert pen.parts == {"text": "one two three four five"}
    await end(setting, pen, *sinks)


@pytest.mark.parametrize("between", ["turns", "end and beginning"])
async def test_a_turn_whose_beginning_was_lost_is_shown_too(make_cluster: MakeCluster, between: str) -> None:
    lossy = Lossy()
    setting = await set_up(make_cluster, wrap=lossy.wrap)
    first = await setting.pen()
    node = setting.others()[0]
    sink = await join(setting.cluster, node, "c", "s")
    await first.write("first")
    await sees(sink, "first")
    if between == "turns":
        setting.typist.finish(first)
        await done(sink)
    lossy.stores[node].loss = 1.0
    await setting.ask(setting.owner)
    setting.typist.finish(first)
    second = await setting.pen("t2")
    await second.write("sec")
    await wait_until(lambda: lossy.stores[node].lost >= 2, "both have been lost")
    # Nothing tells that there was a gap but this piece.
    lossy.stores[node].loss = 0.0
    await second.write("ond")
    await end(setting, second, sink)
    assert [reply for _, reply, _ in seen(sink).replied] == [{"text": "first"}, {"text": "second"}]


async def test_pieces_that_were_lost_with_the_beginning_of_their_turn_are_read_with_it(
    make_cluster: MakeCluster,
) -> None:
    lossy = Lossy()
    setting = await set_up(make_cluster, wrap=lossy.wrap)
    first = await setting.pen()
    node = setting.others()[0]
    sink = await join(setting.cluster, node, "c", "s")
    setting.typist.finish(first, "x")
    await done(sink)
    lossy.stores[node].loss = 1.0
    await setting.ask(setting.owner)
    second = await setting.pen("t2")
    await second.write("second")
    await wait_until(lambda: lossy.stores[node].lost >= 3, "input, beginning and piece have been lost")
    lossy.stores[node].loss = 0.0
    # The next entry shows that entries are missing; nothing shows that pieces are.
    setting.typist.tell(second, "step", "look")
    await end(setting, second, sink)


async def test_a_client_that_is_ahead_of_its_node_gets_no_piece_of_what_has_ended(make_cluster: MakeCluster) -> None:
    lossy = Lossy()
    setting = await set_up(make_cluster, wrap=lossy.wrap)
    pen = await setting.pen()
    node = setting.others()[0]
    sink = await join(setting.cluster, node, "c", "s")
    await pen.write("text")
    await sees(sink, "text")
    lossy.stores[node].loss = 1.0
    setting.typist.finish(pen)
    witness = await join(setting.cluster, setting.owner, "c", "w")
    await done(witness)
    # It reads in the store what its node has not heard of.
    ahead = await join(setting.cluster, node, "c", "ahead", after=parse(1))
    await wait_until(lambda: ahead.named("joined"), "joined")
    await done(ahead)
    view = setting.cluster[node].engine.views.get("c")
    assert view is not None
    assert view.answer.writing == (1, 1, 0)
    view.wake()
    await asyncio.sleep(0)
    lossy.stores[node].mend()
    await done(sink)
    await setting.ask(setting.owner)
    second = await setting.pen("t2")
    await second.write("the next")
    await end(setting, second, sink, ahead, witness)
    assert seen(ahead).replied[0] == ("t1", {"text": "text"}, {})


@pytest.mark.parametrize("seed", SEEDS)
async def test_under_losses_everything_is_seen_once(make_cluster: MakeCluster, seed: int) -> None:
    print(f"seed {seed}: replay with CONVENER_TEST_SEED={seed}")
    rng = random.Random(seed)
    lossy = Lossy()
    setting = await set_up(make_cluster, wrap=lossy.wrap)
    sinks = [await join(setting.cluster, node, "c", f"s{node}") for node in range(3)]
    turns = [f"t{number}" for number in range(1, 6)]
    for _ in turns[1:]:
        await setting.ask()
    for turn in turns:
        pen = await setting.pen(turn)
        for store in lossy.stores:
            store.loss, store.rate = 0.3, 0.1 if rng.random() < 0.5 else 0.0
        for number in range(rng.randrange(10, 30)):
            size = 9000 if rng.random() < 0.05 else rng.randrange(1, 20)
            await _insist(pen, f"{turn}.{number}" + "x" * size)
            if rng.random() < 0.1:
                await asyncio.sleep(0)
        for store in lossy.stores:
            store.rate = 0.0
            store.mend()
        if rng.random() < 0.7:
            for sink in sinks:
                await sees(sink, pen.parts["text"])
        setting.typist.finish(pen)
    for sink in sinks:
        await done(sink, turns[-1])
        replied = seen(sink).replied
        assert [turn for turn, _, _ in replied] == turns
        for _, reply, streamed in replied:
            assert reply["text"].startswith(streamed.get("text", ""))


async def _insist(pen: Pen, text: str) -> None:
    """Write a piece under a store that fails: again, until it is known to be there, so it may be there twice."""
    from convener.errors import StoreUnavailable

    held = pen.parts.get("text", "")
    raw = piece_text(pen.turn, pen.attempt, len(held), text)
    while True:
        try:
            await pen.put(raw)
        except StoreUnavailable:
            continue
        pen.parts["text"] = held + text
        return


async def test_a_malformed_piece_is_counted_and_skipped(make_cluster: MakeCluster) -> None:
    setting = await set_up(make_cluster)
    node = setting.others()[0]
    sink = await join(setting.cluster, node, "c", "s")
    pen = await setting.pen()
    await pen.write("fine")
    await sees(sink, "fine")
    bad = [
        *("5", "[]", "null", '{"turn":"t1"}'),
        piece_text("x1", 1, 4, "no turn"),
        piece_text("t1", 0, 4, "no attempt"),
        piece_text("t1", 1, -1, "no place"),
        piece_text("t1", 1, 4, "no part", part=""),
        piece_text("t1", 1, 4, "no reply", reply=-1),
        piece_text("t1", 1, 4, "no text").replace('"text"', '"call"'),
        piece_text("t1", 1, 4, [1]).replace('"call"', '"text"'),
    ]
    await pen.put(*bad)
    await pen.write(" still")
    await sees(sink, "fine still")
    registry = setting.cluster[node].metrics.registry
    assert registry.get_sample_value("convener_malformed_total", {"where": "piece"}) == len(bad)
    # They are in the tail as well, and do no harm there either.
    late = await join(setting.cluster, setting.others()[1], "c", "late")
    await end(setting, pen, sink, late)


# -- what comes in between ---------------------------------------------------------------------------------------------


async def held_read(make_cluster: MakeCluster) -> tuple[Setting, Pen, RecordingSink, Any]:
    """A client has joined in the middle of a turn; its node has read the tail and does not know it yet."""
    stores: list[StepStore] = []

    def wrap(index: int, store: Store) -> Store:
        stores.append(StepStore(store))
        return cast("Store", stores[-1])

    setting = await set_up(make_cluster, wrap=wrap)
    pen = await setting.pen()
    await pen.write("what is there")
    node = setting.others()[0]
    read = stores[node].hold_reply("pieces")
    sink = await join(setting.cluster, node, "c", "s")
    await wait_until(read.reached.is_set, "the tail is being read")
    return setting, pen, sink, read


async def test_what_comes_while_the_tail_is_read_is_not_lost(make_cluster: MakeCluster) -> None:
    setting, pen, sink, read = await held_read(make_cluster)
    await pen.write(", and more")
    await pen.write("." * 10_000)
    read.go()
    await end(setting, pen, sink)


async def test_a_turn_that_ends_while_the_tail_is_read_is_not_brought_back(make_cluster: MakeCluster) -> None:
    setting, pen, sink, read = await held_read(make_cluster)
    witness = await join(setting.cluster, setting.owner, "c", "w")
    await setting.ask(setting.owner)
    setting.typist.finish(pen)
    second = await setting.pen("t2")
    await second.write("the second")
    await sees(witness, "the second")
    read.go()
    await end(setting, second, sink)
    assert seen(sink).replied[0] == ("t1", pen.parts, {})
    assert [delta["turn"] for delta in sink.named("delta")] == ["t2"]


async def test_an_end_that_comes_while_a_client_is_written_to_comes_after_its_pieces(
    make_cluster: MakeCluster,
) -> None:
    setting = await set_up(make_cluster)
    sink = await join(setting.cluster, setting.others()[0], "c", "s")
    await setting.ask()
    pen = await setting.pen()
    await pen.write("x")
    await sees(sink, "x")
    sink.gate.clear()
    await pen.write("y")
    witness = await join(setting.cluster, setting.others()[0], "c", "w")
    await sees(witness, "xy")
    setting.typist.finish(pen)
    second = await setting.pen("t2")
    await second.write("the next")
    await sees(witness, "the next")
    sink.gate.set()
    await end(setting, second, sink, witness)
    assert seen(sink).replied[0] == ("t1", {"text": "xy"}, {"text": "x"})


@pytest.mark.parametrize("call", ["pieces", "read"])
@pytest.mark.parametrize("mode", ["lose", "lose_reply"])
async def test_a_read_that_fails_is_done_again(make_cluster: MakeCluster, call: str, mode: str) -> None:
    setting, pen, sink, read = await held_read(make_cluster)
    read.go()
    await sees(sink, "what is there")
    store = setting.cluster[setting.others()[0]].engine.node.store
    failing = getattr(store, mode)(call)
    # So much that it has to be read.
    await pen.write("." * 10_000)
    await wait_until(failing.reached.is_set, "it has failed")
    await end(setting, pen, sink)
