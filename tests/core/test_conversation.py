"""Each guard and each effect of each transition of one conversation.

Plain functions without arguments: `test_guards` runs them again, against transitions with a guard cut out.
"""

from __future__ import annotations

import json
from dataclasses import replace

from convener.core import conversation
from convener.core.model import (
    SEEN_WINDOW,
    STRIKE_WINDOW_MS,
    AppendReply,
    ClaimReply,
    ClaimRequest,
    Conversation,
    Erase,
    InboxEntry,
    LogEntry,
    Meta,
    NewMessage,
    SendReply,
    SetMeta,
    StopReply,
)
from convener.core.wire import event
from tests.core.world import World, owned

EVENT = event("reply", "t1", 5, '{"text":"hi"}')
NOBODY = Conversation()


def kinds(world: World) -> list[str]:
    return [json.loads(e.event)["kind"] for e in world.log]


# -- create, erase, metadata -----------------------------------------------------------------------------------


def test_create_makes_a_head_with_epoch_0() -> None:
    reply, effects = conversation.create(NOBODY, "u", '{"a":1}', "g", 7)
    assert reply.created
    assert reply.meta == Meta(user="u", generation="g", created=7, updated=7, metadata='{"a":1}')
    assert (reply.meta.epoch, reply.meta.owner, reply.meta.status) == (0, "", "running")
    assert effects == (SetMeta(reply.meta),)


def test_create_returns_the_one_that_exists() -> None:
    world = World(user="first")
    reply, effects = conversation.create(world.read(), "second", "{}", "other", 7)
    assert (reply.created, reply.meta.user, effects) == (False, "first", ())


def test_set_metadata() -> None:
    assert conversation.set_metadata(NOBODY, "{}", 7) == (None, ())
    world = owned()
    meta = world.apply(conversation.set_metadata(world.read(), '{"b":2}', 9))
    assert meta == world.head
    assert (world.head.metadata, world.head.updated, world.head.owner) == ('{"b":2}', 9, "a~1")


def test_erase_what_was_never_started() -> None:
    world = World()
    assert world.apply(conversation.erase(world.read())) == "OK"
    assert world.meta is None


def test_erase_of_nothing_removes_leftovers() -> None:
    assert conversation.erase(NOBODY) == ("OK", (Erase(),))


def test_erase_refuses_a_queued_start_with_messages() -> None:
    world = World()
    world.send("m1")
    assert world.apply(conversation.erase(world.read())) == "REFUSED"
    assert world.meta is not None


def test_erase_refuses_a_hibernated_conversation() -> None:
    world = owned()
    assert world.release() == "OK"
    assert world.apply(conversation.erase(world.read())) == "REFUSED"


def test_erase_refuses_an_owned_conversation() -> None:
    assert conversation.erase(owned().read()) == ("REFUSED", ())
    # Nothing clears the status of a stopped conversation but its owner: even so, what is owned is not erased.
    odd = Conversation(replace(owned().head, status="stopped"))
    assert conversation.erase(odd) == ("REFUSED", ())


def test_erase_a_stopped_conversation() -> None:
    world = owned(messages=1)
    world.stop(buried="a~1")
    assert world.apply(conversation.erase(world.read())) == "OK"


# -- send, unsend ----------------------------------------------------------------------------------------------


def test_send_numbers_remembers_and_publishes() -> None:
    world = owned()
    world.now = 2_000
    assert world.send("m1") == SendReply("OK", 1, "a~1", world.head.epoch)
    assert world.send("m2").position == 2
    assert world.inbox == [
        InboxEntry(1, "m1", "message", "u", 2_000, '"hi"'),
        InboxEntry(2, "m2", "message", "u", 2_000, '"hi"'),
    ]
    assert world.seen == {"m1": 1, "m2": 2}
    assert (world.head.position, world.head.updated) == (2, 2_000)
    assert json.loads(world.published[-1]) == {
        "t": "in",
        "pos": 2,
        "id": "m2",
        "kind": "message",
        "user": "u",
        "ts": 2_000,
        "data": "hi",
    }


def test_send_to_nobody_is_not_a_start() -> None:
    message = NewMessage("m1", "u", "1")
    assert conversation.send(NOBODY, message, 100, False, 1) == (SendReply("NOT_FOUND"), ())


def test_send_before_the_first_start_is_accepted() -> None:
    assert World().send("m1") == SendReply("OK", 1, "", 0)


def test_send_is_closed_once_a_stop_is_recorded() -> None:
    world = owned(messages=1)
    world.stop()
    assert world.head.status == "stopping"
    assert world.send("m2") == SendReply("CLOSED")
    world.stop(buried="a~1")
    assert world.head.status == "stopped"
    assert world.send("m2") == world.send("m1") == SendReply("CLOSED")


def test_send_again_gives_the_same_position_and_the_present_owner() -> None:
    world = owned(messages=1)
    world.answer(1)
    assert world.send("m1") == SendReply("DUP", 1, "a~1", world.head.epoch)
    assert world.inbox == []
    # Also when the inbox is full or busy: it was accepted.
    world.send("m2")
    assert world.send("m2", max_pending=1, reject_busy=True).outcome == "DUP"


def test_send_full_counts_what_is_unanswered() -> None:
    world = owned()
    assert world.send("m1", max_pending=2).outcome == "OK"
    assert world.send("m2", max_pending=2).outcome == "OK"
    assert world.send("m3", max_pending=2) == SendReply("FULL")
    world.take_in()
    assert world.send("m3", max_pending=2) == SendReply("FULL")
    world.answer(1)
    assert world.send("m3", max_pending=2).outcome == "OK"


def test_send_busy_only_while_something_is_unanswered() -> None:
    world = owned()
    assert world.send("m1", reject_busy=True).outcome == "OK"
    assert world.send("m2", reject_busy=True) == SendReply("BUSY")
    world.take_in()
    assert world.send("m2", reject_busy=True) == SendReply("BUSY")
    assert world.send("m2").outcome == "OK"
    world.take_in()
    world.answer(2)
    assert world.send("m3", reject_busy=True).outcome == "OK"


def unsend(world: World, message_id: str, position: int) -> str:
    return world.apply(conversation.unsend(world.read(message_id), message_id, position))


def test_unsend_takes_back_entry_and_mark() -> None:
    world = World()
    world.send("m1")
    assert unsend(world, "m1", 1) == "OK"
    assert (world.inbox, world.seen, world.head.position) == ([], {}, 0)
    assert world.send("m1") == SendReply("OK", 1, "", 0)


def test_unsend_refuses_what_is_owned_read_or_another_message() -> None:
    assert conversation.unsend(NOBODY, "m1", 1) == ("REFUSED", ())
    world = owned()
    world.send("m1")
    assert unsend(world, "m1", 1) == "REFUSED"  # owned
    world.take_in()
    world.answer(1)
    assert world.release() == "OK"
    assert unsend(world, "m1", 1) == "REFUSED"  # read
    world.send("m2")
    assert unsend(world, "m2", 1) == unsend(world, "m2", 3) == unsend(world, "nix", 2) == "REFUSED"
    assert unsend(world, "m2", 2) == "OK"


def test_unsend_from_between_keeps_the_others() -> None:
    world = World()
    for name in ("m1", "m2", "m3"):
        world.send(name)
    assert unsend(world, "m2", 2) == "OK"
    assert ([e.position for e in world.inbox], world.head.position) == ([1, 3], 3)
    assert world.violations(queued=True) == []


def test_unsend_leaves_no_position_that_nobody_can_settle() -> None:
    """In the order of acceptance, the last step has to pass the holes of the earlier ones."""
    world = owned(messages=1)
    world.answer(1)
    assert world.release() == "OK"
    for name in ("m2", "m3", "m4"):
        world.send(name)
    assert unsend(world, "m3", 3) == "OK"
    assert unsend(world, "m4", 4) == "OK"
    assert world.head.position == 2
    assert unsend(world, "m2", 2) == "OK"
    assert world.head.position == world.head.done == 1
    assert world.claim("b~1").outcome == "OK"
    assert world.release() == "OK"


# -- claim, resolve --------------------------------------------------------------------------------------------


def test_claim_opens_an_epoch() -> None:
    world = World()
    world.send("m1")
    world.now = 5_000
    reply = world.claim("a~1", "n1", reason="wake")
    assert reply == ClaimReply("OK", world.head, tuple(world.inbox), world.log[-1])
    assert (world.head.owner, world.head.nonce, world.head.epoch, world.head.seq) == ("a~1", "n1", 5_000, 1)
    assert (world.head.batch, world.head.updated) == ("", 5_000)
    (entry,) = world.log
    assert (entry.epoch, entry.seq) == (5_000, 1)
    assert json.loads(entry.event) == {
        "kind": "open",
        "turn": "",
        "ts": 5_000,
        "data": {"node": "a~1", "reason": "wake", "prev": [0, 0]},
    }
    published = json.loads(world.published[-1])
    assert published == {"t": "log", "epoch": 5_000, "seq": 1, "events": [json.loads(entry.event)]}


def test_claim_names_the_exact_entry_before() -> None:
    world = owned(messages=1)
    tip = world.log[-1]
    world.claim("b~1")
    assert json.loads(world.log[-1].event)["data"]["prev"] == [tip.epoch, tip.seq]
    assert world.head.batch == ""
    assert world.violations() == []


def test_claim_of_nothing() -> None:
    request = ClaimRequest("a~1", "n", "", 0, "start")
    assert conversation.claim(NOBODY, request, 1) == (ClaimReply("NOT_FOUND"), ())
    # An inbox without head and log is a leftover, not a conversation.
    leftover = Conversation(inbox=(InboxEntry(1, "m", "message", "u", 1, "1"),))
    assert conversation.claim(leftover, request, 1) == (ClaimReply("NOT_FOUND"), ())


def test_claim_compares_owner_and_epoch() -> None:
    world = owned("a~1")
    conflict = ClaimReply("CONFLICT", world.head)
    for owner in ("", "c~1"):
        assert world.claim("b~1", owner=owner) == conflict
    for epoch in (world.head.epoch - 1, 0):
        assert world.claim("b~1", epoch=epoch) == conflict
    assert len(world.log) == 1


def test_claim_again_is_the_same_claim() -> None:
    world = World()
    first = world.claim("a~1", "n1")
    world.send("m1")
    again = world.claim("a~1", "n1", owner="", epoch=0)
    assert again == ClaimReply("OK", world.head, tuple(world.inbox), None)
    assert first.meta is not None
    assert len(world.log) == 1


def test_claim_under_another_nonce_is_another_claim() -> None:
    world = owned("a~1")
    assert world.claim("a~1", "other", owner="", epoch=0).outcome == "CONFLICT"
    assert world.claim("a~1", "other").outcome == "OK"
    assert len(world.log) == 2


def test_claim_with_the_nonce_of_another_node_is_another_claim() -> None:
    world = owned("a~1")
    assert world.claim("b~1", "n", owner="", epoch=0).outcome == "CONFLICT"


def test_claim_refuses_a_stop() -> None:
    world = owned()
    world.stop()
    assert world.claim("b~1") == ClaimReply("CLOSED", world.head)
    world.stop(buried="a~1")
    assert world.claim("b~1") == ClaimReply("CLOSED", world.head)
    assert "open" not in kinds(world)[-1]


def test_epochs_grow_whatever_the_clock_says() -> None:
    world = owned()
    first = world.head.epoch
    world.now = 0
    world.claim("b~1")
    assert world.head.epoch == first + 1


def test_next_epoch_exceeds_every_one_it_knows_of() -> None:
    meta = Meta("u", "g", 1, 1, epoch=10)
    assert conversation.next_epoch(meta, (3, 9), 5) == 11
    assert conversation.next_epoch(meta, (20, 9), 5) == 21
    assert conversation.next_epoch(meta, (20, 9), 50) == 50
    assert conversation.next_epoch(meta, (20, 9), 50, floor=70) == 71


def test_claim_passes_the_log_and_the_floor() -> None:
    world = owned()
    behind = replace(world.head, epoch=1, owner="")
    state = Conversation(behind, (7_000, world.head.seq))
    reply, _ = conversation.claim(state, ClaimRequest("b~1", "n", "", 1, "start"), 3_000)
    assert reply.meta is not None
    assert reply.meta.epoch == 7_001
    reply, _ = conversation.claim(state, ClaimRequest("b~1", "n", "", 1, "start", floor=9_000), 3_000)
    assert reply.meta is not None
    assert reply.meta.epoch == 9_001


def test_claim_rebuilds_a_head_that_is_gone() -> None:
    inbox = tuple(InboxEntry(p, f"m{p}", "message", "u", 1, "1") for p in (4, 6))
    state = Conversation(None, (50, 9), inbox, last=6)
    request = ClaimRequest("b~1", "n", "a~1", 60, "takeover", user="u7", generation="g2")
    reply, effects = conversation.claim(state, request, 70)
    meta = reply.meta
    assert reply.outcome == "OK"
    assert meta is not None
    assert (meta.user, meta.generation, meta.created, meta.seq, meta.epoch) == ("u7", "g2", 70, 10, 70)
    assert (meta.cursor, meta.position, meta.done, meta.base) == (3, 6, 0, 0)
    assert reply.inbox == inbox
    assert reply.opened is not None
    assert json.loads(reply.opened.event)["data"]["prev"] == [50, 9]
    assert effects[0] == SetMeta(meta)


def test_a_rebuilt_head_goes_on_after_the_last_position() -> None:
    request = ClaimRequest("b~1", "n", "", 0, "start", user="u", generation="g")
    unread = (InboxEntry(40, "m", "message", "u", 1, "1"),)
    for inbox, last, expected in (((), 41, (41, 41)), (unread, 41, (39, 41)), (unread, 0, (39, 40))):
        reply, _ = conversation.claim(Conversation(None, (50, 9), inbox, last=last), request, 70)
        assert reply.meta is not None
        assert (reply.meta.cursor, reply.meta.position) == expected


def test_takeover_of_an_open_turn_counts_a_strike() -> None:
    world = owned(messages=1)
    for strikes in (1, 2, 3):
        world.now += 1_000
        world.claim(f"n~{strikes}", f"n{strikes}", reason="takeover")
        assert (world.head.strikes, world.head.struck) == (strikes, 1)
    assert world.head.strike_at == 2_000


def test_strikes_are_of_one_turn() -> None:
    world = owned(messages=2)
    world.claim("b~1", "n1", reason="takeover")
    world.claim("b~1", "n2", reason="takeover")
    assert world.head.strikes == 2
    world.answer(1)
    world.claim("c~1", "n3", reason="takeover")
    assert (world.head.strikes, world.head.struck) == (1, 2)


def test_strikes_lapse() -> None:
    world = owned(messages=1)
    world.claim("b~1", "n1", reason="takeover")
    began = world.now
    world.now = began + STRIKE_WINDOW_MS
    world.claim("b~1", "n2", reason="takeover")
    assert (world.head.strikes, world.head.strike_at) == (2, began)
    world.now = began + STRIKE_WINDOW_MS + 1
    world.claim("b~1", "n3", reason="takeover")
    assert (world.head.strikes, world.head.strike_at) == (1, world.now)


def test_no_strike_without_an_open_turn_or_a_takeover() -> None:
    world = owned(messages=1)
    for i, reason in enumerate(("start", "wake", "handoff", "restart")):
        world.claim("b~1", f"n{i}", reason=reason)
    assert world.head.strikes == 0
    world.answer(1)
    world.claim("b~1", "x", reason="takeover")
    assert world.head.strikes == 0


def resolve(world: World, me: str, nonce: str, epoch: int) -> str:
    return world.apply(conversation.resolve(world.read(), me, nonce, epoch)).outcome


def test_resolve_of_a_claim_that_landed() -> None:
    world = World()
    world.claim("a~1", "n1")
    world.send("m1")
    reply, effects = conversation.resolve(world.read(), "a~1", "n1", 0)
    assert (reply.outcome, reply.meta, effects) == ("OWNED", world.head, ())
    assert reply.inbox == tuple(world.inbox)


def test_resolve_makes_a_late_claim_impossible() -> None:
    world = World()
    assert resolve(world, "a~1", "n1", 0) == "CANCELLED"
    assert (world.head.epoch, world.head.owner) == (1, "")
    assert world.claim("a~1", "n1", epoch=0).outcome == "CONFLICT"


def test_resolve_of_a_takeover_fences_the_buried_owner_too() -> None:
    world = owned("a~1")
    epoch = world.head.epoch
    assert resolve(world, "b~1", "n1", epoch) == "CANCELLED"
    assert (world.head.epoch, world.head.owner) == (epoch + 1, "a~1")
    assert world.append(EVENT, epoch=epoch).outcome == "FENCED"


def test_resolve_after_somebody_else_moved() -> None:
    world = World()
    world.claim("b~1", "n2")
    assert resolve(world, "a~1", "n1", 0) == "MOVED"
    assert resolve(world, "b~1", "n1", 0) == "MOVED"
    assert resolve(world, "a~1", "n2", 0) == "MOVED"
    assert world.head.epoch == world.log[-1].epoch


def test_resolve_of_nothing() -> None:
    assert conversation.resolve(NOBODY, "a~1", "n", 0)[0].outcome == "NOT_FOUND"


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
    reply = world.append(event("stopped", "", 1, '{"reason":"why"}'), stopped=True, cursor=2, done=1)
    assert reply.outcome == "OK"
    m = world.head
    assert (m.owner, m.nonce, m.status, m.done, m.cursor, m.position) == ("", "", "stopped", 2, 2, 2)
    assert world.inbox == []
    assert world.violations() == []


def test_append_closes_nothing_that_was_not_asked_to_stop() -> None:
    world = owned()
    assert world.append(EVENT, stopped=True) == AppendReply("PENDING", 1, "")
    assert (world.head.status, len(world.log)) == ("running", 1)


def test_append_does_not_close_over_what_it_has_not_taken_in() -> None:
    world = owned()
    world.send("m1")
    world.stop()
    for cursor in (0, 1):
        assert world.append(EVENT, stopped=True, cursor=cursor).outcome == "PENDING"
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
