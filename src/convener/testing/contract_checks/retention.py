"""What leaves the store: archived entries, and conversations that nobody has used for long."""

from __future__ import annotations

from dataclasses import replace

from convener.core.cursor import Cursor
from convener.core.model import Meta, NewMessage
from convener.core.retention import ArchivedOutcome, ArchivedRequest
from convener.core.view import START, Place
from convener.store.base import Store
from convener.testing.contract_checks.tools import (
    GENERATION,
    REPLY,
    answer,
    append,
    ask,
    claim,
    head,
    made,
    owned,
    send,
    take_in,
)
from convener.testing.harness import Harness

FAR = 10**15


async def settled(s: Store, entries: int = 8) -> Meta:
    """A conversation of `a~1` whose log has so many entries after the first, none of which a new owner must read."""
    await owned(s)
    await append(s, *[REPLY] * entries, base=entries + 1)
    return await head(s)


async def archived(s: Store, seq: int, keep: int | tuple[int, int] = 0, **changes: object) -> ArchivedOutcome:
    """ARCHIVED by the present owner, with places of its present epoch; `changes` are fields of the request."""
    m = await head(s)
    kept = keep if isinstance(keep, tuple) else (m.epoch, keep) if keep else (0, 0)
    request = ArchivedRequest(m.owner, m.epoch, (m.epoch, seq), f"m-{seq}", kept)
    return await s.archived("c", replace(request, **changes))


async def seqs(s: Store, after: Cursor | None = None, limit: int = 100) -> tuple[list[int], bool, int]:
    """What a read finds: seqs, whether it is a resync, and where the log in the store begins."""
    page = await s.read("c", after or Cursor(), limit)
    assert page is not None
    return [e.seq for e in page.entries], page.resync, page.first


async def check_archived_names_the_manifest_and_trims(h: Harness) -> None:
    """One step: the mark, the manifest, and the log that begins later. Nothing else of the head changes."""
    s = await h.connect()
    m = await settled(s)
    assert (m.archived, m.archived_epoch, m.manifest) == (0, 0, "")
    assert await archived(s, 4) == "OK"
    assert await head(s) == replace(m, archived=4, archived_epoch=m.epoch, manifest="m-4")
    assert await seqs(s) == ([1, 2, 3, 4, 5, 6, 7, 8, 9], False, 1)
    assert await archived(s, 6, keep=5) == "OK"
    assert await head(s) == replace(m, archived=6, archived_epoch=m.epoch, manifest="m-6")
    assert await seqs(s) == ([5, 6, 7, 8, 9], False, 5)
    page = await s.read("c", Cursor(), 2)
    assert page is not None
    assert (page.generation, page.tip, page.archived, page.manifest) == (GENERATION, (m.epoch, 9), 6, "m-6")


async def check_archived_may_name_another_manifest(h: Harness) -> None:
    """The same mark again: another list of the same entries counts, and trimming may go on."""
    s = await h.connect()
    m = await settled(s)
    assert await archived(s, 6) == "OK"
    assert await archived(s, 6, keep=7, manifest="shorter") == "OK"
    assert await head(s) == replace(m, archived=6, archived_epoch=m.epoch, manifest="shorter")
    assert await archived(s, 6, keep=7, manifest="again") == "OK"
    assert await seqs(s) == ([7, 8, 9], False, 7)


async def check_archived_is_fenced(h: Harness) -> None:
    """By owner and epoch; a conversation without an owner has nobody who may."""
    s = await h.connect()
    assert await s.archived("c", ArchivedRequest("a~1", 1, (1, 1), "m")) == "FENCED"
    m = await settled(s)
    for changes in ({"owner": "b~1"}, {"epoch": m.epoch + 1}, {"epoch": m.epoch - 1}, {"owner": ""}):
        assert await archived(s, 4, keep=4, **changes) == "FENCED"
    assert await s.release("c", "a~1", m.epoch, m.seq) == "OK"
    assert await archived(s, 4, keep=4) == "FENCED"
    assert await seqs(s) == ([1, 2, 3, 4, 5, 6, 7, 8, 9], False, 1)
    later = await claim(s, "b~1", "n2")
    assert later.meta is not None
    assert await archived(s, 4, owner="a~1", epoch=m.epoch) == "FENCED"
    assert await archived(s, 4, upto=(m.epoch, 4), keep=(m.epoch, 4)) == "OK"
    assert await seqs(s) == ([4, 5, 6, 7, 8, 9, 10], False, 4)


async def check_what_is_stopped_is_archived_whole(h: Harness) -> None:
    """By anybody, under its last epoch, also beyond `base`: nothing is unanswered. `resume` ends that."""
    s = await h.connect()
    await owned(s)
    await append(s, *[REPLY] * 8)
    await send(s, "m1")
    assert (await s.stop("c", "b~1", "enough", "a~1")).outcome == "STOPPED"
    m = await head(s)
    last = (m.epoch, m.seq)
    assert await archived(s, 0, upto=last, keep=last, owner="a~1") == "FENCED"
    assert await archived(s, 0, upto=last, keep=last, epoch=m.epoch - 1) == "FENCED"
    assert await archived(s, 0, upto=last, keep=last, manifest="all") == "OK"
    assert await seqs(s) == ([m.seq], False, m.seq)
    assert (await head(s)) == replace(m, archived=m.seq, archived_epoch=m.epoch, manifest="all")
    assert await s.resume("c") == "OK"
    assert await archived(s, 0, upto=last, keep=last, epoch=m.epoch) == "FENCED"
    assert await archived(s, 0, upto=last, keep=last) == "FENCED"
    again = await claim(s, "b~1", "n2")
    assert again.opened is not None
    assert f'"prev":[{m.epoch},{m.seq}]' in again.opened.event
    await send(s, "m2")
    await take_in(s)
    await answer(s, 2)
    assert await seqs(s) == ([m.seq, m.seq + 1, m.seq + 2, m.seq + 3], False, m.seq)


async def check_archived_goes_by_the_log(h: Harness) -> None:
    """Only an entry that the log has, and never back: the archive may have what a fail-over has taken."""
    s = await h.connect()
    m = await settled(s)
    for upto in ((m.epoch, 10), (m.epoch - 1, 4), (m.epoch, 0), (m.epoch + 1, 9)):
        assert await archived(s, 0, upto=upto) == "STALE"
    assert await archived(s, 6, keep=7) == "OK"
    for upto in (5, 2):
        assert await archived(s, upto) == "STALE"
    assert await archived(s, 6, upto=(m.epoch - 1, 6)) == "STALE"
    # The entry of the mark itself need not be there any more.
    assert await archived(s, 6, keep=8) == "OK"
    assert (await head(s)).manifest == "m-6"


async def check_trimming_has_its_bounds(h: Harness) -> None:
    """Never beyond the mark, nor what a new owner must read, nor to an entry that is not there."""
    s = await h.connect()
    await owned(s)
    m = await head(s)
    await append(s, *[REPLY] * 8, base=3)
    assert await archived(s, 6, keep=5) == "OK"
    assert await seqs(s) == ([1, 2, 3, 4, 5, 6, 7, 8, 9], False, 1)
    assert await archived(s, 6, keep=4) == "OK"
    assert await seqs(s) == ([4, 5, 6, 7, 8, 9], False, 4)
    await append(s, base=9)
    for keep in ((m.epoch, 8), (m.epoch - 1, 6), (m.epoch + 1, 6), (m.epoch, 10), (0, 0)):
        assert await archived(s, 6, keep=keep) == "OK"
        assert await seqs(s) == ([4, 5, 6, 7, 8, 9], False, 4)
    assert await archived(s, 6, keep=7) == "OK"
    assert await archived(s, 9, keep=9) == "OK"
    assert await seqs(s) == ([9], False, 9)
    assert (await append(s, REPLY)).outcome == "OK"
    assert await seqs(s) == ([9, 10], False, 9)


async def check_reading_a_trimmed_log(h: Harness) -> None:
    """From any number below the first entry that is here, from there; an exact place that is not here is a resync."""
    s = await h.connect()
    m = await settled(s)
    for i in range(3):
        await claim(s, f"n{i}~1", f"k{i}")
        await append(s, REPLY, REPLY, base=100)
    now = await head(s)
    assert await archived(s, 8, upto=(m.epoch, 8), keep=(m.epoch, 7)) == "OK"
    tip = now.seq
    for seq in range(tip + 1):
        expected = list(range(max(seq + 1, 7), tip + 1))[:3]
        assert await seqs(s, Cursor(place=Place(0, seq)), 3) == (expected, False, 7)
    assert await seqs(s, Cursor(GENERATION, START), 2) == ([7, 8], False, 7)
    assert await seqs(s, Cursor(GENERATION, Place(m.epoch, 7)), 2) == ([8, 9], False, 7)
    assert await seqs(s, Cursor(GENERATION, Place(m.epoch, 6)), 2) == ([7, 8], True, 7)
    other = await h.connect()
    found = await claim(other, "z~1", "z")
    assert found.opened is not None
    assert f'"prev":[{now.epoch},{tip}]' in found.opened.event


async def check_a_trimmed_conversation_goes_on(h: Harness) -> None:
    """Messages, stops and resumptions do not care where the log begins."""
    s = await h.connect()
    m = await settled(s)
    assert await archived(s, 9, keep=9) == "OK"
    await send(s, "m1")
    await take_in(s)
    await answer(s, 1)
    assert (await s.stop("c", "b~1", "enough", "a~1")).outcome == "STOPPED"
    after = await head(s)
    assert (after.archived, after.archived_epoch, after.manifest, after.seq) == (9, m.epoch, "m-9", 13)
    assert await seqs(s) == ([9, 10, 11, 12, 13], False, 9)
    assert await s.resume("c") == "OK"
    assert (await claim(s, "b~1", "n2")).outcome == "OK"
    assert (await head(s)).manifest == "m-9"


async def check_expire(h: Harness) -> None:
    """Erases what nobody owns and nobody waits for, if nothing has happened since a time; all of it."""
    s = await h.connect()
    assert await s.expire("c", FAR) == "NOT_FOUND"
    m = await owned(s)
    assert await s.expire("c", FAR) == "KEPT"
    assert await s.release("c", "a~1", m.epoch, m.seq) == "OK"
    assert await s.expire("c", (await head(s)).updated - 1) == "KEPT"
    await send(s, "m1")
    assert await s.expire("c", FAR) == "KEPT"
    assert (await claim(s, "a~1", "n2")).outcome == "OK"
    await take_in(s)
    await ask(s, "t1.1")
    now = await head(s)
    assert await s.release("c", "a~1", now.epoch, now.seq) == "OK"
    assert await s.expire("c", FAR) == "KEPT"
    assert (await claim(s, "a~1", "n3")).outcome == "OK"
    await answer(s, 1)
    await append(s, state=b"x")
    assert await s.set_alarm("c", "alarm/1", "1") == "OK"
    now = await head(s)
    assert await s.release("c", "a~1", now.epoch, now.seq) == "OK"
    assert await s.expire("c", FAR) == "KEPT"
    assert await s.drop_alarm("c", "alarm/1")
    assert await s.expire("c", now.updated) == "OK"
    assert await s.head("c") is None
    await s.unindex("u", "c")
    assert not [key for key in await h.keys() if "c:c" in key]


async def check_expire_takes_what_is_closed(h: Harness) -> None:
    """Stopped ones, and those that were given up; not one that is being stopped."""
    s = await h.connect()
    await owned(s)
    await send(s, "m1")
    await take_in(s)
    await s.set_alarm("c", "alarm/1", "1")
    assert (await s.stop("c", "b~1", "enough", "")).outcome == "STOPPING"
    assert await s.expire("c", FAR) == "KEPT"
    assert (await s.stop("c", "b~1", "enough", "a~1")).outcome == "STOPPED"
    assert await s.expire("c", FAR) == "OK"
    assert await s.head("c") is None
    await made(s, "d")
    await claim(s, "a~1", cid="d")
    await send(s, "m1", "d")
    await take_in(s, "d")
    assert (await append(s, cid="d", closing="held")).outcome == "OK"
    assert (await s.send("d", NewMessage("m2", "u", "1"), max_pending=9)).outcome == "HELD"
    assert await s.expire("d", FAR) == "OK"
