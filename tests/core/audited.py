"""Conversations for the tests of the auditor: clean ones, and ways to plant a fault in them."""

from __future__ import annotations

from dataclasses import replace

from convener.core import conversation, intents
from convener.core.audit import ConversationFacts, audit_conversation
from convener.core.model import InboxEntry, LogEntry, NewMessage
from convener.core.wire import event
from tests.core.world import World, owned


def living() -> World:
    """Two epochs, three answered messages, one open turn, two unread messages."""
    world = owned("a~1", messages=3)
    for position in (1, 2, 3):
        world.append(event("reply", f"t{position}", 1, '{"text":"…"}'))
        world.answer(position)
    world.now += 5_000
    world.claim("b~1", "n2", reason="takeover")
    world.send("m4")
    world.take_in()
    world.send("m5")
    world.send("m6")
    return world


def stopped() -> World:
    world = living()
    world.stop("c~1", buried="b~1")
    return world


def fresh() -> World:
    return World()


def hibernated() -> World:
    world = owned(messages=1)
    world.answer(1)
    world.release()
    return world


def resumed() -> World:
    world = stopped()
    world.apply(conversation.resume(world.read(), world.now))
    return world


def started_again() -> World:
    world = resumed()
    world.claim("d~1")
    world.send("m7")
    world.take_in()
    return world


def stopping() -> World:
    world = living()
    world.stop()
    return world


def interrupted() -> World:
    world = owned(messages=2)
    world.append(event("turn_interrupted", "t1", 1, '{"settles":[1,2]}'), done=2)
    return world


def asking() -> World:
    """One question answered in the log, one by an unread answer, one open; an unread alarm."""
    world = owned("a~1", messages=1)
    world.ask("t1.1", "t1.2", "t1.3")
    world.reply("t1.1", "r1")
    world.take_in()
    world.reply("t1.2", "r2")
    world.set_alarm("alarm/1")
    world.fire("alarm/1")
    return world


def waiting() -> World:
    """Nobody owns it, a person is waited for."""
    world = owned("a~1", messages=1)
    world.ask("t1.1")
    world.release()
    return world


def expired() -> World:
    """A deadline has answered one question and a person the other one; the turn has ended since."""
    world = waiting()
    message = NewMessage("ask/t1.1", "", '{"ask_id":"t1.1","expired":true}', "answer")
    world.apply(intents.answer(world.read("ask/t1.1"), "t1.1", message, world.now))
    world.claim("b~1", reason="answer")
    world.append(event("answer", "t1", 1, '{"ask_id":"t1.1","expired":true}'), cursor=2)
    world.answer(1)
    return world


def held() -> World:
    """One open question, one unread message."""
    world = owned("a~1", messages=1)
    world.ask("t1.1")
    world.send("m2")
    world.park("held")
    return world


def findings(facts: ConversationFacts) -> list[tuple[str, str]]:
    found = audit_conversation(facts)
    assert all(v.where == "conversation c" for v in found)
    return [(v.invariant, v.detail) for v in found]


def with_entry(facts: ConversationFacts, index: int, text: str) -> ConversationFacts:
    log = list(facts.log)
    log[index] = replace(log[index], event=text)
    return replace(facts, log=log)


def place(facts: ConversationFacts, kind: str, nth: int = 0) -> int:
    """Index of the nth entry of a kind."""
    found = [i for i, e in enumerate(facts.log) if f'"kind":"{kind}"' in e.event]
    return found[nth]


def appended(facts: ConversationFacts, *texts: str) -> ConversationFacts:
    """The facts with further entries of the present owner."""
    last = facts.log[-1]
    log = [*facts.log, *(LogEntry(last.epoch, last.seq + i, t) for i, t in enumerate(texts, start=1))]
    return replace(facts, log=log, meta=replace(facts.meta, seq=last.seq + len(texts)))


def message(position: int, message_id: str) -> InboxEntry:
    return InboxEntry(position, message_id, "message", "u", 1, '"hi"')
