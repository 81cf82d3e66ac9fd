"""Each guard and each effect of what owners, recovery and users do to one conversation: append, release, disown, stop.

Plain functions without arguments: `test_guards` runs them again, against transitions with a guard cut out.
"""

from __future__ import annotations

import json

from convener.core import conversation
from convener.core.model import (
    SEEN_WINDOW,
    AppendReply,
    Conversation,
    InboxEntry,
    LogEntry,
    StopReply,
)
from convener.core.wire import event
from tests.core.world import World, owned

EVENT = event("reply", "t1", 5, '{"text":"hi"}')
NOBODY = Conversation()


def kinds(world: World) -> list[str]:
    return [json.loads(e.event)["kind"] for e in world.log]


# -- append ----------------------------------------------------------------------------------------------------


def test_append_writes_in_order_and_publishes() -> None:
    world = owned()
    epoch = world.head.epoch
    world.now = 1_500
    other = event("reply", "t1", 5, "2")
    assert world.append(EVENT, other, batch="b7") == AppendReply("OK", 3, "b7")
    assert world.log[1:] == [LogEntry(epoch, 2, EVENT), LogEntry(epoch, 3, other)]
    assert (world.head.seq, world.head.batch, world.head.updated) == (3, "b7", 1_500)
    published = json.loads(world.published[-1])
    assert published == {"t": "log", "epoch": epoch, "seq": 2, "events": [json.loads(EVENT), json.loads(other)]}


def test_append_is_fenced_by_epoch() -> None:
    world = owned("a~1")
    old = world.head.epoch
    world.release()
    world.claim("a~1", "n2")
    reply = world.append(EVENT, epoch=old)
    assert reply == AppendReply("FENCED", world.head.seq, "", "a~1", world.head.epoch)
    assert len(world.log) == 2


def test_append_is_fenced_by_owner() -> None:
    """RELEASE keeps the epoch: what is late after it may not be written either."""
    world = owned("a~1")
    world.release()
    assert world.append(EVENT, owner="a~1").outcome == "FENCED"
    assert world.append(EVENT, owner="b~1").outcome == "FENCED"
    assert len(world.log) == 1


def test_append_to_nothing() -> None:
    world = owned()
    world.meta = None
    request = conversation.AppendRequest("a~1", 1, 0, "b", 0, 0, 0, (EVENT,))
    assert conversation.append(world.read(), request, 1) == (AppendReply("FENCED"), ())


def test_append_expects_its_place() -> None:
    world = owned()
    world.append(EVENT, batch="b1")
    assert world.append(EVENT, expected=1, batch="b1") == AppendReply("GAP", 2, "b1")
    assert world.append(EVENT, expected=3, batch="b3") == AppendReply("GAP", 2, "b1")
    assert len(world.log) == 2


def test_append_trims_the_inbox_up_to_the_cursor() -> None:
    world = owned()
    for name in ("m1", "m2", "m3"):
        world.send(name)
    world.append(EVENT, cursor=2)
    assert ([e.position for e in world.inbox], world.head.cursor) == ([3], 2)


def test_append_never_moves_back() -> None:
    world = owned(messages=2)
    world.append(EVENT, done=1, base=2)
    world.send("m3")
    world.append(EVENT, cursor=0, done=0, base=0)
    assert (world.head.cursor, world.head.done, world.head.base) == (2, 1, 2)
    assert [e.position for e in world.inbox] == [3]


def test_append_saves_the_state_with_the_turn() -> None:
    world = owned()
    world.append(EVENT, state=b"1")
    assert world.state == b"1"
    world.append(EVENT)
    assert world.state == b"1"
    world.append(EVENT, state=b"")
    assert world.state == b""
    world.append(EVENT, state=b"2", expected=0)
    assert world.state == b""


def test_append_without_events_says_nothing() -> None:
    world = owned(messages=1)
    said = len(world.published)
    assert world.append(done=1, batch="b9") == AppendReply("OK", 2, "b9")
    assert (len(world.log), len(world.published), world.head.done) == (2, said, 1)


def test_the_window_of_seen() -> None:
    world = owned()
    for i in range(1, SEEN_WINDOW + 11):
        world.send(f"m{i}", max_pending=10_000)
    world.take_in()
    for position in range(1, 6):
        world.answer(position)
    assert len(world.seen) == SEEN_WINDOW + 5  # of the ten beyond the window, five are answered
    for position in range(6, SEEN_WINDOW + 1):
        world.answer(position)
    assert set(world.seen.values()) == set(range(11, SEEN_WINDOW + 11))
    assert world.violations() == []


def test_unanswered_messages_are_remembered_beyond_the_window() -> None:
    world = owned()
    for i in range(1, SEEN_WINDOW + 51):
        world.send(f"m{i}", max_pending=10_000)
    world.take_in()
    world.answer(1)
    assert "m1" not in world.seen
    assert world.send("m2").outcome == "DUP"


def test_append_that_closes() -> None:
    world = owned(messages=1)
    world.stop()
    reply = world.append(event("stopped", "", 1, '{"reason":"why"}'), closing="stopped", cursor=2, done=1)
    assert reply.outcome == "OK"
    m = world.head
    assert (m.owner, m.nonce, m.status, m.done, m.cursor, m.position) == ("", "", "stopped", 2, 2, 2)
    assert world.inbox == []
    assert world.violations() == []


def test_append_closes_nothing_that_was_not_asked_to_stop() -> None:
    world = owned()
    assert world.append(EVENT, closing="stopped") == AppendReply("PENDING", 1, "")
    assert (world.head.status, len(world.log)) == ("running", 1)


def test_append_does_not_close_over_what_it_has_not_taken_in() -> None:
    world = owned()
    world.send("m1")
    world.stop()
    for cursor in (0, 1):
        assert world.append(EVENT, closing="stopped", cursor=cursor).outcome == "PENDING"
    assert (world.head.status, len(world.log), len(world.inbox)) == ("stopping", 1, 2)


def test_append_goes_on_while_stopping() -> None:
    world = owned(messages=1)
    world.stop()
    assert world.append(EVENT).outcome == "OK"


# -- release, disown -------------------------------------------------------------------------------------------


def test_release() -> None:
    world = owned(messages=1)
    world.answer(1)
    epoch = world.head.epoch
    assert world.release() == "OK"
    assert (world.head.owner, world.head.nonce, world.head.epoch) == ("", "", epoch)
    assert json.loads(world.published[-1]) == {"t": "status", "epoch": epoch, "status": "hibernated"}
    assert world.violations() == []


def test_release_compares_owner_and_epoch() -> None:
    world = owned("a~1")
    m = world.head
    assert conversation.release(world.read(), "b~1", m.epoch, m.seq) == ("FENCED", ())
    assert conversation.release(world.read(), "a~1", m.epoch - 1, m.seq) == ("FENCED", ())
    assert conversation.release(NOBODY, "a~1", m.epoch, m.seq) == ("FENCED", ())


def test_release_again_is_fenced() -> None:
    world = owned("a~1")
    m = world.head
    world.release()
    assert conversation.release(world.read(), "a~1", m.epoch, m.seq) == ("FENCED", ())


def test_release_refuses_open_turns_and_unread_messages() -> None:
    world = owned()
    world.send("m1")
    assert world.release() == "PENDING"
    world.take_in()
    assert world.release() == "PENDING"
    assert world.head.owner == "a~1"


def test_release_refuses_after_an_append_under_way() -> None:
    world = owned()
    m = world.head
    world.append(EVENT)
    assert conversation.release(world.read(), m.owner, m.epoch, m.seq) == ("PENDING", ())
    assert conversation.release(world.read(), m.owner, m.epoch, m.seq + 2) == ("PENDING", ())


def test_release_refuses_an_unfinished_stop() -> None:
    world = owned()
    world.stop()
    assert world.release() == "PENDING"


def disown(world: World, owner: str, epoch: int) -> str:
    return world.apply(conversation.disown(world.read(), owner, epoch))


def test_disown_clears_a_buried_owner_and_fences() -> None:
    world = owned("a~1")
    epoch = world.head.epoch
    assert disown(world, "a~1", epoch) == "OK"
    assert (world.head.owner, world.head.nonce, world.head.epoch) == ("", "", epoch + 1)
    assert json.loads(world.published[-1]) == {"t": "status", "epoch": epoch, "status": "hibernated"}
    assert world.claim("b~1", owner="", epoch=epoch).outcome == "CONFLICT"


def test_disown_of_what_nobody_owns_raises_the_epoch_in_silence() -> None:
    world = World()
    world.send("m1")
    said = len(world.published)
    assert disown(world, "", 0) == "OK"
    assert (world.head.epoch, len(world.published)) == (1, said)
    assert world.claim("b~1", epoch=0).outcome == "CONFLICT"


def test_disown_refuses_what_is_unanswered() -> None:
    world = owned("a~1", messages=1)
    assert disown(world, "a~1", world.head.epoch) == "PENDING"
    world.answer(1)
    world.send("m2")
    assert disown(world, "a~1", world.head.epoch) == "PENDING"
    assert world.head.owner == "a~1"


def test_disown_compares_owner_and_epoch() -> None:
    world = owned("a~1")
    epoch = world.head.epoch
    assert conversation.disown(NOBODY, "a~1", epoch) == ("NOT_FOUND", ())
    assert disown(world, "b~1", epoch) == disown(world, "a~1", epoch - 1) == disown(world, "", epoch) == "CONFLICT"


# -- stop, resume ----------------------------------------------------------------------------------------------


def test_stop_asks_the_owner() -> None:
    world = owned("a~1")
    world.now = 3_000
    assert world.stop("b~1", 'a "reason"') == StopReply("STOPPING", "a~1", "n", "u", 'a "reason"')
    assert world.inbox == [InboxEntry(1, "stop.1", "stop", "", 3_000, '"a \\"reason\\""')]
    assert (world.head.status, world.head.position, world.head.updated) == ("stopping", 1, 3_000)
    assert world.seen == {}  # a client may call a message "stop.1"
    assert json.loads(world.published[-1])["kind"] == "stop"


def test_stop_is_asked_for_once() -> None:
    world = owned("a~1")
    world.stop()
    assert world.stop().outcome == "STOPPING"
    assert (len(world.inbox), world.head.position) == (1, 1)


def test_stop_of_what_nobody_owns_is_finished_at_once() -> None:
    world = World()
    world.send("m1")
    world.send("m2")
    world.now = 4_000
    assert world.stop("b~1") == StopReply("STOPPED", "", "", "u", "why")
    assert kinds(world) == ["open", "input", "input", "stopped"]
    assert json.loads(world.log[0].event)["data"] == {"node": "b~1", "reason": "stop", "prev": [0, 0]}
    assert json.loads(world.log[1].event)["data"] == {"message_id": "m1", "user_id": "u", "data": "hi"}
    assert json.loads(world.log[-1].event)["data"] == {"reason": "why"}
    m = world.head
    assert (m.status, m.owner, m.seq, m.cursor, m.done, m.position) == ("stopped", "", 4, 2, 2, 2)
    assert (m.batch, m.updated, world.inbox) == ("", 4_000, [])
    assert json.loads(world.published[-1])["seq"] == 1
    assert world.violations() == []


def test_stop_of_a_buried_owner_takes_the_ownership_from_it() -> None:
    world = owned("a~1", messages=1)
    epoch = world.head.epoch
    world.send("m2")
    assert world.head.batch == "b"
    assert world.stop("b~1", buried="a~1") == StopReply("STOPPED", "a~1", "n", "u", "why")
    assert kinds(world) == ["open", "input", "open", "input", "stopped"]
    assert (world.head.owner, world.head.nonce, world.head.batch) == ("", "", "")
    assert world.head.epoch > epoch
    assert world.append(EVENT, owner="a~1", epoch=epoch).outcome == "FENCED"
    assert world.violations() == []


def test_stop_finishes_the_stop_of_a_buried_owner() -> None:
    world = owned("a~1")
    world.send("m1")
    world.stop()
    assert world.stop(buried="a~1").outcome == "STOPPED"
    assert kinds(world) == ["open", "open", "input", "stopped"]  # the stop's own entry is not an input
    assert (world.head.done, world.inbox) == (2, [])
    assert world.violations() == []


def test_stop_of_another_buried_node_asks_the_owner() -> None:
    world = owned("a~1")
    assert world.stop(buried="c~1").outcome == "STOPPING"
    assert world.head.owner == "a~1"


def test_stop_of_what_was_disowned_meanwhile_is_finished_too() -> None:
    """Who read a buried owner may find nobody: nobody could be asked."""
    world = owned("a~1")
    disown(world, "a~1", world.head.epoch)
    assert world.stop(buried="a~1") == StopReply("STOPPED", "", "", "u", "why")


def test_stop_again_is_answered_from_the_mark() -> None:
    world = World()
    world.stop()
    entries = len(world.log)
    assert world.stop().outcome == "ALREADY"
    assert len(world.log) == entries


def test_stop_of_nothing() -> None:
    assert conversation.stop(NOBODY, "a~1", "why", "", 1) == (StopReply("NOT_FOUND"), ())


def test_only_resume_opens_a_stopped_conversation() -> None:
    assert conversation.resume(NOBODY, 1) == ("NOT_FOUND", ())
    world = owned()
    assert conversation.resume(world.read(), 1) == ("RUNNING", ())
    world.stop()
    assert conversation.resume(world.read(), 1) == ("BUSY", ())
    world.stop(buried="a~1")
    assert world.claim("b~1").outcome == "CLOSED"
    assert world.apply(conversation.resume(world.read(), 9_000)) == "OK"
    assert (world.head.status, world.head.updated) == ("running", 9_000)
    assert world.claim("b~1").outcome == "OK"
    assert world.violations() == []
