"""Each guard and each effect of pieces of an answer that is being written, and of alarms.

Plain functions without arguments: `test_guards` runs them again, against transitions with a guard cut out.
"""

from __future__ import annotations

import json

from convener.core import intents
from convener.core.model import MAX_ALARMS, Conversation, InboxEntry, SendReply
from convener.core.wire import event
from tests.core.world import owned

NOBODY = Conversation()


# -- pieces ------------------------------------------------------------------------------------------------------


def test_pieces_are_kept_and_published() -> None:
    world = owned("a~1", messages=1)
    before = world.head
    assert world.stream('{"a":1}', "2") == "OK"
    assert world.stream("3") == "OK"
    assert (world.pieces, world.head) == (['{"a":1}', "2", "3"], before)
    said = [json.loads(text) for text in world.published[-2:]]
    epoch = before.epoch
    assert said == [
        {"t": "piece", "epoch": epoch, "pieces": [{"a": 1}, 2]},
        {"t": "piece", "epoch": epoch, "pieces": [3]},
    ]


def test_no_pieces_say_nothing() -> None:
    world = owned("a~1", messages=1)
    said = len(world.published)
    assert world.stream() == "OK"
    assert (world.pieces, len(world.published)) == ([], said)


def test_pieces_are_fenced_and_end_with_the_turn() -> None:
    assert intents.pieces(NOBODY, "", 0, 1, ("1",)) == ("FENCED", ())
    world = owned("a~1", messages=2)
    assert world.stream("1", owner="b~1") == world.stream("1", epoch=world.head.epoch - 1) == "FENCED"
    world.stream("1")
    world.answer(1)
    assert world.pieces == []
    assert world.stream("late") == "STALE"
    assert world.stream("next", position=2) == "OK"
    assert world.pieces == ["next"]


def test_a_new_attempt_voids_what_was_streamed() -> None:
    world = owned("a~1", messages=1)
    world.stream("1")
    world.append(event("x", "t1", 1, "1"))
    assert world.pieces == ["1"]
    world.append(begins_turn=True)
    assert world.pieces == []


# -- alarms ------------------------------------------------------------------------------------------------------


def test_an_alarm_becomes_a_message_once() -> None:
    world = owned("a~1")
    assert world.set_alarm("alarm/t1.1", '{"say":1}') == "OK"
    world.now = 3_000
    assert world.fire("alarm/t1.1") == SendReply("OK", 1, "a~1", world.head.epoch)
    assert world.inbox == [InboxEntry(1, "alarm/t1.1", "alarm", "u", 3_000, '{"say":1}')]
    assert (world.alarms, world.seen) == ({}, {"alarm/t1.1": 1})
    assert (world.head.position, world.head.updated) == (1, 3_000)
    assert json.loads(world.published[-1])["kind"] == "alarm"
    assert world.fire("alarm/t1.1") == SendReply("DUP", 1, "a~1", world.head.epoch)
    assert world.fire("alarm/t1.2") == SendReply("DUP", 0, "a~1", world.head.epoch)
    world.take_in()
    said = json.loads(world.log[-1].event)
    assert (said["kind"], said["turn"], said["data"]["alarm"]) == ("input", "t1", True)
    assert world.violations() == []


def test_an_alarm_that_is_set_again_says_the_new_thing() -> None:
    world = owned()
    world.set_alarm("a1", "1")
    assert world.set_alarm("a1", "2") == "OK"
    assert world.alarms == {"a1": "2"}


def test_an_alarm_that_has_fired_is_not_set_again() -> None:
    world = owned()
    world.set_alarm("a1")
    world.fire("a1")
    assert world.set_alarm("a1") == "DUP"
    assert world.alarms == {}


def test_alarms_are_bounded() -> None:
    world = owned()
    world.alarms = {f"a{i}": "1" for i in range(MAX_ALARMS - 1)}
    assert world.set_alarm("last") == "OK"
    assert world.set_alarm("more") == "FULL"
    assert world.set_alarm("last", "2") == "OK"
    assert (len(world.alarms), world.alarms["last"]) == (MAX_ALARMS, "2")


def test_alarms_of_nothing() -> None:
    assert intents.set_alarm(NOBODY, "a1", "1") == ("NOT_FOUND", ())
    assert intents.fire(NOBODY, "a1", 9, 1) == (SendReply("NOT_FOUND"), ())


def test_a_stopped_conversation_takes_no_alarms_and_drops_those_that_are_due() -> None:
    world = owned("a~1")
    world.set_alarm("a1")
    world.set_alarm("a2")
    world.stop()
    assert world.set_alarm("a3") == "CLOSED"
    assert world.fire("a1") == SendReply("CLOSED")
    world.stop(buried="a~1")
    assert world.set_alarm("a3") == "CLOSED"
    assert world.fire("a1") == SendReply("CLOSED")
    assert world.alarms == {"a2": "1"}
    world.resume()
    assert world.fire("a2").outcome == "OK"


def test_an_alarm_waits_while_the_queue_is_full() -> None:
    world = owned()
    world.set_alarm("a1")
    world.send("m1")
    assert world.fire("a1", max_pending=1) == SendReply("FULL")
    assert (world.alarms, world.head.position) == ({"a1": "1"}, 1)
    assert world.fire("a1", max_pending=2).outcome == "OK"
    world.set_alarm("a2")
    world.take_in()
    assert world.fire("a2", max_pending=2) == SendReply("FULL")
    world.answer(1)
    assert world.fire("a2", max_pending=2).outcome == "OK"


def test_an_alarm_never_takes_the_place_of_a_message() -> None:
    """Whoever chose the same id: a second entry under it would make the owner pass the first one over."""
    world = owned()
    world.set_alarm("a1")
    world.send("a1")
    assert world.fire("a1") == SendReply("DUP", 1, "a~1", world.head.epoch)
    assert (world.seen, world.alarms, len(world.inbox)) == ({"a1": 1}, {}, 1)
