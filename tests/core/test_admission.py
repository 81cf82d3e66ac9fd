"""RESERVE, case by case. Plain functions without arguments: `test_guards` runs them again."""

from __future__ import annotations

from convener.core.admission import MAX_WAITING, ReserveReply, Slot, Waiting, reserve

MINE = Slot("n1", "a~1")
OTHER = Slot("n2", "b~1")


def taken(count: int) -> dict[str, Slot]:
    return {f"c{i}": Slot(f"n{i}", "b~1") for i in range(count)}


def queue(*cids: str) -> tuple[Waiting, ...]:
    return tuple(Waiting(cid, "b~1", "wake", i) for i, cid in enumerate(cids))


def test_a_slot_survives_its_encoding() -> None:
    assert Slot.decode(MINE.encode()) == MINE
    assert MINE.encode() == "n1|a~1"


def test_exactly_the_limit_can_start() -> None:
    """Registration counts itself: with a limit of 3, raised to 4, the third start is not refused, the fourth is."""
    for count in range(3):
        assert reserve(taken(count), (), "new", MINE, 4, None) == ReserveReply("OK", None)
    assert reserve(taken(3), (), "new", MINE, 4, None) == ReserveReply("LIMIT", None, 3)
    assert reserve(taken(9), (), "new", MINE, 4, None) == ReserveReply("LIMIT", None, 9)


def test_without_a_limit_everything_starts() -> None:
    assert reserve(taken(1_000), queue("x", "y"), "new", MINE, 0, None).outcome == "OK"


def test_the_same_nonce_again_is_ok_beyond_the_limit() -> None:
    slots = {**taken(5), "new": MINE}
    assert reserve(slots, (), "new", MINE, 4, None) == ReserveReply("OK", MINE)


def test_a_slot_that_was_read_is_adopted_beyond_the_limit() -> None:
    slots = {**taken(5), "new": OTHER}
    assert reserve(slots, queue("x"), "new", MINE, 4, OTHER) == ReserveReply("OK", OTHER)


def test_a_slot_that_changed_since_is_held() -> None:
    slots = {"new": OTHER}
    assert reserve(slots, (), "new", MINE, 4, None) == ReserveReply("HELD", OTHER)
    for read in (Slot("n2", "c~1"), Slot("n3", "b~1"), MINE):
        assert reserve(slots, (), "new", MINE, 4, read) == ReserveReply("HELD", OTHER)


def test_a_slot_that_was_freed_since_counts_anew() -> None:
    assert reserve(taken(3), (), "new", MINE, 4, OTHER).outcome == "LIMIT"
    assert reserve(taken(2), (), "new", MINE, 4, OTHER).outcome == "OK"


def test_nobody_passes_those_who_wait() -> None:
    slots = taken(1)
    assert reserve(slots, queue("x"), "new", MINE, 4, None).outcome == "OK"
    assert reserve(slots, queue("x", "y"), "new", MINE, 4, None) == ReserveReply("LIMIT", None, 1)


def test_who_waits_counts_those_ahead_only() -> None:
    slots = taken(2)
    waiting = queue("x", "y", "z")
    assert reserve(slots, waiting, "x", MINE, 4, None).outcome == "OK"
    assert reserve(slots, waiting, "y", MINE, 4, None) == ReserveReply("LIMIT", None, 2)
    assert reserve(taken(1), waiting, "y", MINE, 4, None).outcome == "OK"
    assert reserve(taken(1), waiting, "z", MINE, 4, None).outcome == "LIMIT"


def test_the_queue_is_bounded() -> None:
    assert 0 < MAX_WAITING < 100_000
