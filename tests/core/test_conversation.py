"""Each guard and each effect of creating a conversation, writing to it and claiming it.

Plain functions without arguments: `test_guards` runs them again, against transitions with a guard cut out.
"""

from __future__ import annotations

import json
from dataclasses import replace

from convener.core import conversation
from convener.core.model import (
    STRIKE_WINDOW_MS,
    ClaimReply,
    ClaimRequest,
    Conversation,
    Erase,
    InboxEntry,
    Meta,
    NewMessage,
    SendReply,
    SetMeta,
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


def test_a_late_claim_does_not_take_the_conversation_that_was_made_under_the_same_id() -> None:
    world = World()
    late = ClaimRequest("a~1", "n", "", 0, "start", generation="of the one that was deleted")
    reply, effects = conversation.claim(world.read(), late, 1_000)
    assert (reply, effects) == (ClaimReply("CONFLICT", world.head), ())
    assert world.claim("a~1", generation=world.head.generation).outcome == "OK"
    assert world.claim("a~1", "again", generation="").outcome == "OK"


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
