"""The intent to end a turn: recorded in the inbox, whatever becomes of the owner.

Plain functions without arguments: `test_guards` runs them again, against transitions with a guard cut out.
"""

from __future__ import annotations

import json

from convener.core import intents
from convener.core.model import MAX_UNREAD, Conversation, InboxEntry, InterruptReply
from tests.core.world import World, owned


def press(world: World, turn: str = "") -> InterruptReply:
    return world.apply(intents.interrupt(world.read(), turn, world.now))


def test_a_press_is_a_numbered_entry_of_its_own_kind() -> None:
    world = owned("a~1", messages=1)
    world.now = 3_000
    position = world.head.position + 1
    assert press(world, "t1") == InterruptReply("OK", position, "a~1", world.head.epoch)
    assert world.inbox[-1] == InboxEntry(position, f"interrupt.{position}", "interrupt", "", 3_000, '"t1"')
    assert (world.head.position, world.head.updated, world.head.status) == (position, 3_000, "running")
    assert f"interrupt.{position}" not in world.seen
    assert json.loads(world.published[-1])["kind"] == "interrupt"


def test_nothing_to_interrupt() -> None:
    assert intents.interrupt(Conversation(), "", 1) == (InterruptReply("NOT_FOUND"), ())
    world = owned("a~1")
    assert press(world) == InterruptReply("IDLE")
    world.send("m1")
    world.stop()
    assert press(world) == InterruptReply("CLOSED")


def test_a_press_for_a_turn_that_has_ended_is_stale() -> None:
    world = owned("a~1", messages=1)
    world.append(done=1)
    world.send("m2")
    assert press(world, "t1") == InterruptReply("STALE")
    assert press(world, "t2").outcome == "OK"
    assert press(world).outcome == "OK"


def test_intents_are_bounded_though_messages_do_not_count() -> None:
    world = World()
    world.send("m1")
    for _ in range(MAX_UNREAD - 1):
        assert press(world).outcome == "OK"
    assert press(world) == InterruptReply("FULL")
    assert world.head.position == MAX_UNREAD


def test_what_is_taken_in_makes_room_again() -> None:
    world = owned("a~1")
    for _ in range(MAX_UNREAD):
        world.send(f"m{world.head.position}", max_pending=2 * MAX_UNREAD)
    assert press(world) == InterruptReply("FULL")
    world.append(cursor=1)
    assert press(world).outcome == "OK"
