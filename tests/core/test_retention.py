"""Each guard and each effect of what leaves the store.

Plain functions without arguments: `test_guards` runs them again, against transitions with a guard cut out.
"""

from __future__ import annotations

from dataclasses import replace

from convener.core import retention
from convener.core.model import Conversation
from convener.core.retention import ArchivedOutcome, ArchivedRequest, ExpireOutcome
from tests.core.world import World, owned


def settled() -> World:
    """`a~1` owns it; one message is answered, and its log may be trimmed up to that."""
    world = owned("a~1", messages=1)
    world.answer(1)
    world.send("m2")
    world.take_in()
    world.answer(2)
    return world


def archive(world: World, seq: int, keep: int | tuple[int, int] = 0, **changes: object) -> ArchivedOutcome:
    """ARCHIVED with the places that the log has."""
    head = world.head
    by_seq = {e.seq: (e.epoch, e.seq) for e in world.log}
    kept = by_seq.get(keep, (head.epoch, keep)) if isinstance(keep, int) else keep
    request = ArchivedRequest(head.owner, head.epoch, by_seq.get(seq, (head.epoch, seq)), "m", kept)
    request = replace(request, **changes)
    places = {request.upto, request.keep} & {(e.epoch, e.seq) for e in world.log}
    state = replace(world.read(), places=frozenset(places))
    return world.apply(retention.archived(state, request))


def expire(world: World, before: int = 10**15) -> ExpireOutcome:
    """EXPIRE."""
    return world.apply(retention.expire(world.read(), before))


def seqs(world: World) -> list[int]:
    return [entry.seq for entry in world.log]


def test_archived_moves_the_mark_and_trims() -> None:
    world = settled()
    world.meta = replace(world.head, base=world.head.seq)
    before, epoch = world.head, world.head.epoch
    assert archive(world, 3) == "OK"
    assert world.head == replace(before, archived=3, archived_epoch=epoch, manifest="m")
    assert seqs(world) == [1, 2, 3, 4, 5]
    assert archive(world, 4, keep=5, manifest="n") == "OK"
    assert world.head == replace(before, archived=4, archived_epoch=epoch, manifest="n")
    assert seqs(world) == [5]
    assert archive(world, 4, manifest="o") == "OK"
    assert world.head == replace(before, archived=4, archived_epoch=epoch, manifest="o")


def test_archived_is_fenced() -> None:
    world = settled()
    before, epoch = world.head, world.head.epoch
    assert archive(world, 3, owner="b~1") == "FENCED"
    assert archive(world, 3, epoch=epoch - 1) == "FENCED"
    assert archive(world, 3, epoch=epoch + 1) == "FENCED"
    assert world.head == before
    nobody = ArchivedRequest("", epoch, (epoch, 3), "m")
    assert retention.archived(Conversation(), nobody) == ("FENCED", ())
    unowned = Conversation(replace(before, owner=""), places=frozenset({(epoch, 3)}))
    assert retention.archived(unowned, nobody) == ("FENCED", ())


def test_what_is_stopped_may_be_archived_whole_under_its_epoch() -> None:
    world = settled()
    world.send("m3")
    world.take_in()
    world.stop("b~1", buried="a~1")
    last = world.head.seq
    assert world.head.base < last - 1
    assert archive(world, last, epoch=world.head.epoch - 1) == "FENCED"
    assert archive(world, last, owner="a~1") == "FENCED"
    assert archive(world, last, keep=last) == "OK"
    assert seqs(world) == [last]
    world.resume()
    assert archive(world, last, keep=last, epoch=world.head.epoch - 1) == "FENCED"
    assert archive(world, last) == "FENCED"
    world.claim("c~1", "n9")
    assert seqs(world) == [last, last + 1]
    assert archive(world, last, keep=last + 1) == "OK"
    assert seqs(world) == [last, last + 1]


def test_the_mark_goes_by_the_log_and_never_back() -> None:
    world = settled()
    epoch = world.head.epoch
    assert archive(world, 6) == "STALE"
    assert archive(world, 0) == "STALE"
    assert archive(world, 3, upto=(epoch + 1, 3)) == "STALE"
    assert world.head.archived == 0
    assert archive(world, 3) == "OK"
    assert archive(world, 2) == "STALE"
    assert archive(world, 3, upto=(epoch + 1, 3)) == "STALE"
    assert world.head.archived == 3


def test_trimming_stays_behind_the_mark_and_what_an_owner_must_read() -> None:
    world = settled()
    world.meta = replace(world.head, base=2)
    assert archive(world, 4, keep=4) == "OK"
    assert seqs(world) == [1, 2, 3, 4, 5]
    assert archive(world, 4, keep=3) == "OK"
    assert seqs(world) == [3, 4, 5]
    world.meta = replace(world.head, base=5)
    assert archive(world, 4, keep=6) == "OK"
    assert archive(world, 4, keep=5, upto=(world.head.epoch, 4)) == "OK"
    assert seqs(world) == [5]


def test_trimming_does_not_pass_the_mark() -> None:
    world = settled()
    world.meta = replace(world.head, base=5)
    assert archive(world, 2, keep=4) == "OK"
    assert seqs(world) == [1, 2, 3, 4, 5]
    assert archive(world, 2, keep=3) == "OK"
    assert seqs(world) == [3, 4, 5]


def test_trimming_goes_by_the_log() -> None:
    world = settled()
    world.meta = replace(world.head, base=5)
    assert archive(world, 4, keep=(world.head.epoch + 1, 3)) == "OK"
    assert archive(world, 5, keep=6) == "OK"
    assert seqs(world) == [1, 2, 3, 4, 5]
    assert archive(world, 5, keep=5) == "OK"
    assert seqs(world) == [5]


def test_expire_takes_what_is_answered_and_old() -> None:
    world = settled()
    assert expire(world) == "KEPT"
    assert world.release() == "OK"
    assert expire(world, world.head.updated - 1) == "KEPT"
    assert world.meta is not None
    assert expire(world, world.head.updated) == "OK"
    assert (world.meta, world.log) == (None, [])
    assert expire(world) == "NOT_FOUND"


def test_expire_leaves_what_waits() -> None:
    world = settled()
    world.release()
    world.alarms = {"alarm/1": "1"}
    assert expire(world) == "KEPT"
    world.alarms = {}
    world.send("m3")
    assert expire(world) == "KEPT"
    world.meta = replace(world.head, status="stopping")
    assert expire(world) == "KEPT"
    world.meta = replace(world.head, position=world.head.done)
    assert expire(world) == "KEPT"


def test_expire_takes_what_is_closed() -> None:
    for status in ("stopped", "failed", "held"):
        world = settled()
        world.release()
        world.send("m3")
        world.alarms = {"alarm/1": "1"}
        world.meta = replace(world.head, status=status)
        assert expire(world) == "OK"
        assert world.meta is None
