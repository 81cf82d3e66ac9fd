"""Each guard and each effect of REPAIR: what an owner writes again after the store has fallen back.

Plain functions without arguments: `test_guards` runs them again, against transitions with a guard cut out.
"""

from __future__ import annotations

import json
from copy import deepcopy
from dataclasses import replace
from typing import Any

from convener.core import conversation
from convener.core import repair as repairs
from convener.core.model import InboxEntry, LogEntry, Meta
from convener.core.repair import RepairRequest
from convener.core.wire import event
from tests.core.world import World, owned, taken_in

REPLY = event("reply", "t1", 5, '{"text":"hi"}')


def lost(world: World, before: World, **changes: Any) -> RepairRequest:
    """What the owner of `world` asks for after the store has fallen back to `before`."""
    head, known = world.head, len(before.log)
    tip = (before.log[-1].epoch, before.log[-1].seq) if before.log else (0, 0)
    events = tuple(entry.event for entry in world.log[known:])
    settled = tuple(json.loads(text)["data"].get("message_id", "") for text in events)
    request = RepairRequest(
        *(head.owner, head.epoch, head.nonce, head.user, head.generation, head.created, head.metadata, tip, events),
        batch=head.batch,
        cursor=head.cursor,
        done=head.done,
        base=head.base,
        halted=head.halted,
        settled=tuple(message_id for message_id in settled if message_id),
    )
    return replace(request, **changes)


def repair(world: World, request: RepairRequest) -> str:
    return world.apply(repairs.repair(world.read(), request, world.now))


def answered() -> tuple[World, World]:
    """A world in which a message was taken in and answered, and the same before the store knew of either."""
    world = owned("a~1")
    world.send("m1")
    before = deepcopy(world)
    world.take_in()
    world.append(REPLY, event("turn_done", "t1", 6, '{"settles":[1]}'), done=1, base=4, halted=1, ends_turn=True)
    return world, before


# -- what has become of it -------------------------------------------------------------------------------------------


def test_standing() -> None:
    mine = Meta("u", "g", 1, 1, owner="a~1", epoch=7, nonce="n")
    assert repairs.standing(None, (0, 0), mine, 3) == "fallen"
    assert repairs.standing(mine, (7, 3), mine, 3) == "good"
    assert repairs.standing(mine, (7, 4), mine, 3) == "good"
    assert repairs.standing(mine, (7, 2), mine, 3) == "fallen"
    assert repairs.standing(replace(mine, epoch=8), (8, 4), mine, 3) == "lost"
    assert repairs.standing(replace(mine, epoch=8, owner=""), (7, 3), mine, 3) == "lost"
    assert repairs.standing(replace(mine, epoch=6, owner="b~1"), (6, 2), mine, 3) == "fallen"
    assert repairs.standing(replace(mine, owner=""), (7, 3), mine, 3) == "lost"
    assert repairs.standing(replace(mine, generation="h"), (7, 3), mine, 3) == "lost"
    assert repairs.standing(replace(mine, generation="h", epoch=6), (6, 3), mine, 3) == "lost"


# -- what is written -------------------------------------------------------------------------------------------------


def test_repair_brings_back_the_log_and_the_marks() -> None:
    world, before = answered()
    before.now = 1_500
    assert repair(before, lost(world, before, state=b"x")) == "OK"
    assert before.log == world.log
    assert before.head == replace(world.head, updated=1_500)
    assert (before.inbox, before.seen, before.state) == ([], {"m1": 0}, b"x")
    assert json.loads(before.published[-1]) == {
        "t": "log",
        "epoch": world.head.epoch,
        "seq": 2,
        "events": [json.loads(entry.event) for entry in world.log[1:]],
    }
    assert before.violations() == []


def test_repair_leaves_the_state_that_was_not_lost() -> None:
    world, before = answered()
    before.state = b"old"
    assert repair(before, lost(world, before)) == "OK"
    assert before.state == b"old"


def test_nothing_goes_back() -> None:
    world, before = answered()
    low = lost(world, before, events=(), batch="", cursor=0, done=0, base=0, halted=0, settled=())
    before.meta = replace(before.head, batch="b9", cursor=1, done=1, base=3, halted=1)
    published = len(before.published)
    assert repair(before, low) == "OK"
    head = before.head
    assert (head.seq, head.batch, head.cursor, head.done, head.base, head.halted) == (1, "b9", 1, 1, 3, 1)
    assert (head.position, len(before.published)) == (1, published)


def test_repair_brings_back_the_ownership() -> None:
    world = World()
    before = deepcopy(world)
    world.claim("a~1", "n7")
    assert repair(before, lost(world, before)) == "OK"
    assert (before.head.owner, before.head.nonce, before.head.epoch) == ("a~1", "n7", world.head.epoch)
    assert before.log == world.log


def test_repair_brings_back_a_conversation_that_is_gone() -> None:
    world, _ = answered()
    gone = World()
    gone.meta, gone.now = None, 1_500
    assert repair(gone, lost(world, gone)) == "OK"
    assert gone.head == replace(world.head, updated=1_500)
    assert gone.log == world.log
    assert gone.violations() == []


def test_what_was_accepted_since_gets_positions_of_its_own() -> None:
    """Repaired messages name their turns after their positions, which the store has given out again."""
    world = owned("a~1")
    before = deepcopy(world)
    for name in ("m1", "m2"):
        world.send(name)
    world.take_in()
    for name in ("x1", "m2", "x2"):
        before.send(name)
    request = lost(world, before)
    assert repair(before, request) == "OK"
    assert [(e.position, e.message_id) for e in before.inbox] == [(3, "x1"), (4, "x2")]
    assert before.seen == {"m1": 0, "m2": 0, "x1": 3, "x2": 4}
    assert (before.head.cursor, before.head.position) == (2, 4)
    before.take_in()
    assert before.violations() == []


def test_what_is_above_all_that_was_taken_in_keeps_its_position() -> None:
    world, before = answered()
    for name in ("m2", "m3"):
        before.send(name)
    before.apply(conversation.unsend(replace(before.read("m2"), meta=replace(before.head, owner="")), "m2", 2))
    assert repair(before, lost(world, before)) == "OK"
    assert [(e.position, e.message_id) for e in before.inbox] == [(3, "m3")]
    assert (before.head.cursor, before.head.position, before.seen["m3"]) == (1, 3, 3)


def test_positions_go_on_above_an_empty_inbox() -> None:
    world, before = answered()
    world.send("m2")
    world.take_in()
    assert repair(before, lost(world, before)) == "OK"
    assert (before.head.position, before.inbox) == (2, [])


def test_an_intent_keeps_its_place_and_forgets_nobodys_id() -> None:
    """The id of a stop may be that of a message, which is remembered."""
    world = owned("a~1")
    before = deepcopy(world)
    world.send("m1")
    world.take_in()
    before.stop("a~1")
    stop = before.inbox[0]
    before.seen[stop.message_id] = 0
    assert repair(before, lost(world, before, settled=("m1", stop.message_id))) == "OK"
    assert before.inbox == [replace(stop, position=2)]
    assert before.seen == {"m1": 0, stop.message_id: 0}
    assert before.head.status == "stopping"


def test_questions() -> None:
    world = owned("a~1")
    world.send("m1")
    world.take_in()
    world.ask("t1.1", "t1.2")
    world.stream("piece")
    before = deepcopy(world)
    world.reply("t1.1")
    world.append(taken_in(world.inbox[0]), cursor=2)
    world.ask("t1.3", "t1.4")
    request = lost(world, before, answered=("t1.1",), asks=(("t1.3", "x"), ("t1.4", "x")))
    assert repair(before, request) == "OK"
    assert (set(before.asks), before.head.asks, before.pieces) == ({"t1.2", "t1.3", "t1.4"}, 3, ["piece"])


def test_questions_of_a_turn_that_has_ended_are_closed() -> None:
    world = owned("a~1")
    world.send("m1")
    world.take_in()
    world.ask("t1.1")
    world.stream("piece")
    before = deepcopy(world)
    world.answer(1)
    assert repair(before, lost(world, before, closes=True, asks=(("t2.1", "x"),))) == "OK"
    assert (set(before.asks), before.head.asks, before.pieces) == ({"t2.1"}, 1, [])
    assert repair(World(), replace(request_of_nothing(), closes=False)) == "OK"


def request_of_nothing() -> RepairRequest:
    return RepairRequest("a~1", 5, "n", "u", "g", 1, "{}", (0, 0))


# -- what is refused -------------------------------------------------------------------------------------------------


def refused(world: World, request: RepairRequest, outcome: str) -> None:
    found = repairs.repair(world.read(), request, 1)
    assert found == (outcome, ())


def test_nothing_is_repaired_under_a_later_epoch() -> None:
    world, before = answered()
    request = lost(world, before)
    before.meta = replace(before.head, epoch=before.head.epoch + 1)
    refused(before, request, "FENCED")


def test_nothing_is_repaired_under_somebody_elses_ownership() -> None:
    world, before = answered()
    request = lost(world, before)
    before.meta = replace(before.head, owner="b~1")
    refused(before, request, "FENCED")
    before.meta = replace(before.head, owner="")
    refused(before, request, "FENCED")


def test_a_former_owner_is_no_obstacle() -> None:
    world, before = answered()
    before.meta = replace(before.head, owner="b~1", epoch=before.head.epoch - 1)
    assert repair(before, lost(world, before)) == "OK"


def test_nothing_is_repaired_into_another_conversation() -> None:
    world, _ = answered()
    other = World()
    other.meta = replace(other.head, generation="h")
    refused(other, lost(world, other), "FENCED")


def test_a_stop_is_the_last_word() -> None:
    world, before = answered()
    request = lost(world, before)
    for status in ("stopped", "failed", "held"):
        before.meta = replace(before.head, status=status)
        refused(before, request, "CLOSED")
    before.meta = replace(before.head, status="stopping")
    assert repair(before, request) == "OK"


def test_the_log_must_end_where_the_owner_knows_it() -> None:
    world, before = answered()
    epoch = before.head.epoch
    for place in ((epoch, 0), (epoch, 2), (epoch - 1, 1)):
        refused(before, lost(world, before, after=place), "GAP")
    request = lost(world, before)
    before.meta = replace(before.head, seq=2)
    refused(before, request, "GAP")
    gone = World()
    gone.meta, gone.log = None, [LogEntry(1, 1, "{}")]
    refused(gone, lost(world, gone), "GAP")


def test_an_entry_that_is_repaired_leaves_the_inbox_wherever_it_is() -> None:
    world, before = answered()
    before.inbox = [InboxEntry(9, "m1", "message", "u", 1, '"hi"')]
    before.meta = replace(before.head, position=9)
    before.seen = {"m1": 9}
    assert repair(before, lost(world, before)) == "OK"
    assert (before.inbox, before.seen, before.head.position) == ([], {"m1": 0}, 9)
