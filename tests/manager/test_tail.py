"""What an owner remembers to write again, and for how long."""

from __future__ import annotations

import json
from typing import Any

from convener.core.model import AppendRequest, LogEntry, Meta
from convener.core.wire import event, open_event
from convener.manager.losses import Replicas
from convener.manager.tail import KEPT_BYTES, KEPT_EVENTS, Budget, Tail
from convener.store.base import Progress

MINE = Meta("u", "g", 1, 1, '{"a":1}', owner="a~1", epoch=9, seq=4, nonce="n")
OPEN = LogEntry(9, 4, open_event("a~1", "start", (7, 3), 1))
REPLY = event("reply", "t1", 1, "1")


def batch(expected: int, *events: str, **changes: Any) -> AppendRequest:
    values: dict[str, Any] = {"cursor": 0, "done": 0, "base": 0, **changes}
    return AppendRequest("a~1", 9, expected, f"b{expected}", events=events, **values)


def tail(total: int = 1 << 30, opened: LogEntry | None = OPEN) -> Tail:
    return Tail(Budget(total), MINE, opened, 1.0)


def input_of(message_id: str) -> str:
    return event("input", "t1", 1, json.dumps({"message_id": message_id, "user_id": "u", "data": 1}))


def test_what_follows_the_end_of_the_log_is_written_again() -> None:
    kept = tail()
    kept.keep(batch(4, input_of("m1"), cursor=1, halted=1), 2.0)
    kept.keep(batch(5, REPLY, REPLY, done=1, base=7, state=b"s", ends_turn=True), 3.0)
    whole = kept.missing(MINE, (7, 3))
    assert whole is not None
    assert (whole.after, whole.events[1:]) == ((7, 3), (input_of("m1"), REPLY, REPLY))
    assert (whole.owner, whole.epoch, whole.nonce, whole.user) == ("a~1", 9, "n", "u")
    assert (whole.generation, whole.created, whole.metadata) == ("g", 1, '{"a":1}')
    assert (whole.batch, whole.cursor, whole.done, whole.base, whole.halted) == ("b5", 1, 1, 7, 1)
    assert (whole.settled, whole.state, whole.closes) == (("m1",), b"s", True)
    last = kept.missing(MINE, (9, 5))
    assert last is not None
    assert (last.events, last.settled, last.cursor) == ((REPLY, REPLY), (), 0)


def test_nothing_is_known_of_a_log_that_ends_elsewhere() -> None:
    kept = tail()
    kept.keep(batch(4, REPLY, REPLY), 2.0)
    for tip in ((7, 2), (8, 4), (9, 5), (9, 6), (0, 0)):
        assert kept.missing(MINE, tip) is None


def test_a_conversation_that_is_gone_needs_its_whole_log() -> None:
    kept = tail()
    assert kept.missing(None, (7, 3)) is None
    first = LogEntry(9, 1, open_event("a~1", "start", (0, 0), 1))
    whole = tail(opened=first).missing(None, (0, 0))
    assert whole is not None
    assert whole.events == (first.event,)


def test_without_the_open_entry_what_came_after_it_is_known() -> None:
    kept = tail(opened=None)
    assert len(kept) == 0
    kept.keep(batch(4, REPLY), 2.0)
    assert kept.missing(MINE, (7, 3)) is None
    assert kept.missing(MINE, (9, 4)) is not None


def test_questions() -> None:
    kept = tail()
    answer = event("answer", "t1", 1, '{"ask_id":"t1.1","message_id":"m2","user_id":"u","data":1}')
    expired = event("answer", "t1", 1, '{"ask_id":"t1.2","expired":true}')
    kept.keep(batch(4, REPLY, asks=(("t1.1", "x"), ("t1.2", "y"), ("t1.3", "z"))), 2.0)
    kept.keep(batch(5, answer, expired), 3.0)
    lost = kept.missing(MINE, (9, 4))
    assert lost is not None
    assert (lost.asks, lost.answered, lost.closes) == ((("t1.3", "z"),), ("t1.1", "t1.2"), False)
    assert lost.settled == ("m2", "ask/t1.2")
    kept.keep(batch(7, REPLY, ends_turn=True, asks=(("t2.1", "x"),)), 4.0)
    lost = kept.missing(MINE, (9, 4))
    assert lost is not None
    assert (lost.asks, lost.closes) == ((("t2.1", "x"),), True)


def test_what_a_replica_has_is_dropped() -> None:
    kept = tail()
    kept.keep(batch(4, REPLY), 2.0)
    kept.keep(batch(5, REPLY), 3.0)
    kept.confirmed(2.0)
    assert len(kept) == 2
    kept.confirmed(2.5)
    assert len(kept) == 1
    assert kept.missing(MINE, (9, 4)) is None
    assert kept.missing(MINE, (9, 5)) is not None


def test_memory_is_bounded_by_conversation_and_by_node() -> None:
    budget = Budget(1 << 30)
    kept = Tail(budget, MINE, None, 1.0)
    for number in range(40):
        kept.keep(batch(4 + number, "x" * (KEPT_BYTES // 10)), 2.0)
    assert 5 < len(kept) <= 10
    assert budget.used <= KEPT_BYTES
    many = Tail(budget, MINE, None, 1.0)
    for number in range(3):
        many.keep(batch(4 + number * KEPT_EVENTS // 2, *[REPLY] * (KEPT_EVENTS // 2)), 2.0)
    assert len(many) == 2
    kept.clear()
    many.clear()
    assert budget.used == 0
    small = Budget(1000)
    one, other = Tail(small, MINE, None, 1.0), Tail(small, MINE, None, 1.0)
    one.keep(batch(4, "x" * 600), 2.0)
    other.keep(batch(4, "x" * 600), 2.0)
    assert (len(one), len(other)) == (1, 0)
    assert small.used <= small.total
    assert len(tail(0)) == 0


def test_an_answer_counts_as_replicated_when_an_offset_that_was_read_after_it_is() -> None:
    replicas = Replicas()
    assert replicas.look("", Progress("l", 100, 90, 1), 1.0) is None
    assert replicas.look("", Progress("l", 200, 99, 1), 2.0) is None
    assert replicas.look("", Progress("l", 300, 100, 1), 3.0) == 1.0
    assert replicas.look("other", Progress("l", 300, 300, 1), 4.0) == 4.0
    assert replicas.look("", Progress("l", 400, None, 0), 5.0) is None
    assert replicas.look("", Progress("m", 1000, 900, 1), 6.0) is None
    assert replicas.look("", Progress("m", 1000, 1000, 1), 7.0) == 7.0
    assert replicas.look("", Progress(), 8.0) is None
