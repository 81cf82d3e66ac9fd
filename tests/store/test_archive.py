"""The archive's objects, against a local folder and against a server that speaks S3; and the log read as one."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import pytest

from convener.core.cursor import Cursor
from convener.core.model import LogEntry
from convener.core.retention import ArchivedRequest
from convener.core.view import START, Place
from convener.core.wire import event
from convener.errors import ArchiveUnavailable, ConfigurationError
from convener.store.archive import Archive, LogReader, Manifest, Objects, Segment, SegmentRef, open_objects, writer_of
from convener.store.archive.segments import Malformed
from convener.store.memory import MemoryStore
from convener.testing.contract_checks.tools import GENERATION, REPLY, append, claim, head, owned
from convener.testing.steps import StepStore
from tests.support.objectstore import ObjectStore


@pytest.fixture(scope="module")
def s3() -> Iterator[ObjectStore]:
    with ObjectStore() as server:
        yield server


@pytest.fixture(params=["folder", "s3", "memory"])
def objects(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Objects:
    """One kind of object store each, empty."""
    if request.param == "folder":
        return open_objects((tmp_path / "a folder").as_uri())
    if request.param == "memory":
        return open_objects("memory:///")
    server: ObjectStore = request.getfixturevalue("s3")
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    return open_objects(f"{server.url}/{tmp_path.name}")


def entries(first: int, last: int, epoch: int = 7) -> tuple[LogEntry, ...]:
    return tuple(LogEntry(epoch, n, event("reply", "t1", n * 10, f'"é\\n {n}"')) for n in range(first, last + 1))


# -- objects -----------------------------------------------------------------------------------------------------


async def test_an_object_is_made_once_and_never_overwritten(objects: Objects) -> None:
    assert await objects.get("a/b") is None
    assert await objects.create("a/b", b"one")
    assert not await objects.create("a/b", b"two")
    assert not await objects.create("a/b", b"one")
    assert await objects.get("a/b") == b"one"


async def test_folders_are_listed_exactly_and_deleting_is_idempotent(objects: Objects) -> None:
    names = [f"ns-x/c-{cid}/g/log-{i}" for cid in ("a", "ab", "..", "A:~@._-1") for i in range(3)]
    for name in names:
        assert await objects.create(name, name.encode())
    assert sorted(await objects.list("ns-x/c-a")) == names[:3]
    assert sorted(await objects.list("ns-x/c-A:~@._-1")) == names[9:]
    assert await objects.list("ns-x/c-none") == []
    await objects.delete([*names[:2], "ns-x/c-a/g/never"])
    await objects.delete(names[:2])
    assert await objects.list("ns-x/c-a") == [names[2]]
    assert [await objects.get(name) for name in names[3:]] == [name.encode() for name in names[3:]]


async def test_a_store_that_is_away_is_a_typed_error(monkeypatch: pytest.MonkeyPatch) -> None:
    with ObjectStore() as server:
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        objects = open_objects(server.url)
        assert await objects.create("a", b"1")
    for call in (objects.create("a", b"1"), objects.get("a"), objects.list("x"), objects.delete(["a"])):
        with pytest.raises(ArchiveUnavailable, match="the archive cannot"):
            await call


def test_urls_that_cannot_work(tmp_path: Path) -> None:
    for url in ("ftp://host/x", "file://", "file:///", "file://host/folder", "s3://"):
        with pytest.raises(ConfigurationError, match="archive_url"):
            open_objects(url)
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(ConfigurationError, match="archive_url: cannot be opened"):
        open_objects((tmp_path / "file").as_uri())


# -- what they hold ----------------------------------------------------------------------------------------------


def test_segments_say_what_they_are() -> None:
    segment = Segment("c", "g", entries(3, 9))
    assert Segment.decode(segment.encode()) == segment
    assert segment.ref(12) == SegmentRef((7, 3), (7, 9), 90, "log-000000000000003-12")
    assert segment.encode() == segment.encode()
    odd = Segment("c", "g", (LogEntry(1, 1, "not json"), LogEntry(1, 2, '{"ts":"x"}')))
    assert odd.ref(1).newest == 0


def test_names_tell_the_epoch_of_their_writer() -> None:
    segment = Segment("c", "g", entries(3, 9))
    assert writer_of(segment.ref(1234).name) == 1234
    assert writer_of(Manifest("c", "g").new_name(77)) == 77
    for name in ("", "log", "log-", "log-1", "log-1-x", "other-1-5", "manifest", "log-1-\u0665"):
        assert writer_of(name) == 0


def test_damaged_objects_are_noticed() -> None:
    whole = Segment("c", "g", entries(3, 9))
    holes = (
        dataclasses.replace(whole, entries=(*entries(3, 5), *entries(7, 9))),
        dataclasses.replace(whole, entries=(*entries(3, 5), *entries(5, 9))),
    )
    for data in (b"", b"x", whole.encode()[:-9], whole.encode() + b"x", *(s.encode() for s in holes)):
        with pytest.raises(Malformed):
            Segment.decode(data)
    manifest = Manifest("c", "g", (whole.ref(1),))
    assert Manifest.decode(manifest.encode()) == manifest
    for data in (b"", b"{}", b"[]", manifest.encode().replace(b'"v": 1', b'"v": 2')):
        with pytest.raises(Malformed):
            Manifest.decode(data)
    with pytest.raises(Malformed, match="format 2"):
        Manifest.decode(manifest.encode().replace(b'"v": 1', b'"v": 2'))


def test_manifests_lose_what_is_old_but_not_their_end() -> None:
    manifest = Manifest("c", "g")
    assert (manifest.first, manifest.last, manifest.newer_than(10**15)) == (1, (0, 0), manifest)
    for first, last in ((1, 3), (4, 6), (7, 9)):
        manifest = manifest.with_(Segment("c", "g", entries(first, last)).ref(1))
    assert (manifest.first, manifest.last) == (1, (7, 9))
    assert [ref.first[1] for ref in manifest.after(3)] == [4, 7]
    assert manifest.newer_than(30) == manifest
    assert manifest.newer_than(31).first == 4
    assert manifest.newer_than(10**15).first == 7


# -- the archive -------------------------------------------------------------------------------------------------


async def no_log(first: int, last: int) -> Sequence[LogEntry]:
    raise AssertionError("nobody asks")


async def test_a_segment_that_is_there_counts_if_the_log_has_it(objects: Objects) -> None:
    archive = Archive(objects)
    asked: list[tuple[int, int]] = []

    async def known(first: int, last: int) -> Sequence[LogEntry]:
        asked.append((first, last))
        return entries(first, last)

    written = await archive.put_segment(Segment("c", "g", entries(1, 5)), 9, no_log)
    assert await archive.segment("c", "g", written) == Segment("c", "g", entries(1, 5))
    for last in (5, 8, 3):
        assert await archive.put_segment(Segment("c", "g", entries(1, last)), 9, known) == written
    assert asked == [(1, 5)] * 3
    other = Segment("c", "g", entries(1, 5, epoch=8))

    async def others(first: int, last: int) -> Sequence[LogEntry]:
        return entries(first, last, epoch=8)

    with pytest.raises(ArchiveUnavailable, match="another object"):
        await archive.put_segment(other, 9, others)
    assert await Archive(objects).segment("c", "g", written) == Segment("c", "g", entries(1, 5))
    assert (await archive.put_segment(other, 10, no_log)).name != written.name


async def test_what_is_not_a_segment_is_never_overwritten(objects: Objects) -> None:
    archive, segment = Archive(objects), Segment("c", "g", entries(1, 5))
    path = f"{archive.folder('c', 'g')}/{segment.ref(9).name}"
    assert await objects.create(path, b"somebody's")
    with pytest.raises(ArchiveUnavailable, match="another object"):
        await archive.put_segment(segment, 9, no_log)
    with pytest.raises(ArchiveUnavailable, match="damaged"):
        await archive.segment("c", "g", segment.ref(9))
    assert await objects.get(path) == b"somebody's"


async def test_a_segment_that_is_another_one_is_damage(objects: Objects) -> None:
    archive = Archive(objects)
    ref = await archive.put_segment(Segment("c", "g", entries(1, 5)), 9, no_log)
    with pytest.raises(ArchiveUnavailable, match="damaged"):
        await archive.segment("c", "g", dataclasses.replace(ref, last=(7, 6)))


async def test_erasing_takes_all_of_a_log_and_nothing_else(objects: Objects) -> None:
    archive = Archive(objects, "x")
    for cid in ("c", "cc"):
        for generation in ("g1", "g2"):
            ref = await archive.put_segment(Segment(cid, generation, entries(1, 5)), 9, no_log)
            manifest = Manifest(cid, generation, (ref,))
            await archive.put_manifest(manifest, "m")
            await archive.put_manifest(manifest, "m")
            with pytest.raises(ArchiveUnavailable, match="another object"):
                await archive.put_manifest(Manifest(cid, generation), "m")
    assert {g: len(paths) for g, paths in (await archive.generations("c")).items()} == {"g1": 2, "g2": 2}
    await archive.erase("c", ["g1", "never"])
    assert {g: len(paths) for g, paths in (await archive.generations("c")).items()} == {"g2": 2}
    assert sorted(await archive.names("cc", "g1")) == ["log-000000000000001-9", "m"]
    await archive.delete("cc", "g1", ["m"])
    assert await archive.names("cc", "g1") == ["log-000000000000001-9"]
    assert await archive.manifest("c", "g2", "m") == await Archive(objects, "x").manifest("c", "g2", "m")
    assert await archive.manifest("c", "g1", "m") is None or await archive.names("c", "g1") == []


# -- one log -----------------------------------------------------------------------------------------------------


@pytest.fixture
async def store() -> AsyncIterator[MemoryStore]:
    store = MemoryStore()
    await store.open()
    yield store
    await store.close()


class Halves:
    """A log of five epochs, entries 1 to 20, of which the archive has some and the store the rest."""

    def __init__(self, store: Any, archive: Archive) -> None:
        self.store = store
        self.archive = archive
        self.entries: list[LogEntry] = []
        self.refs: list[SegmentRef] = []

    async def write(self) -> None:
        await owned(self.store)
        await append(self.store, *[REPLY] * 3)
        for i in range(4):
            await claim(self.store, f"n{i}~1", f"k{i}")
            await append(self.store, *[REPLY] * 3, base=100)
        page = await self.store.read("c", Cursor(), 100)
        self.entries = list(page.entries)
        assert [e.seq for e in self.entries] == list(range(1, 21))

    async def put(self, *bounds: tuple[int, int], keep: int) -> None:
        """Archive segments with these bounds, and trim the store to `keep`."""
        for first, last in bounds:
            segment = Segment("c", GENERATION, tuple(self.entries[first - 1 : last]))
            self.refs.append(await self.archive.put_segment(segment, 1, no_log))
        await self.commit(Manifest("c", GENERATION, tuple(self.refs)), keep)

    async def commit(self, manifest: Manifest, keep: int = 0) -> str:
        name = manifest.new_name(1)
        await self.archive.put_manifest(manifest, name)
        meta = await head(self.store)
        first = self.entries[keep - 1]
        kept = (first.epoch, first.seq) if keep else (0, 0)
        request = ArchivedRequest(meta.owner, meta.epoch, manifest.last, name, kept)
        assert await self.store.archived("c", request) == "OK"
        return name


@pytest.fixture
async def halves(store: MemoryStore, objects: Objects) -> Halves:
    halves = Halves(store, Archive(objects))
    await halves.write()
    return halves


async def everything(reader: LogReader, halves: Halves) -> None:
    """Whatever is asked is answered as if the store had all of it."""
    whole, tip = halves.entries, (halves.entries[-1].epoch, 20)
    for seq in range(22):
        for limit in (1, 3, 100):
            page = await reader.read("c", Cursor(place=Place(0, seq)), limit)
            assert page is not None
            assert (list(page.entries), page.tip, page.resync) == (whole[seq : seq + limit], tip, False)
    for entry in whole:
        page = await reader.read("c", Cursor(GENERATION, Place(entry.epoch, entry.seq)), 4)
        assert page is not None
        assert (list(page.entries), page.tip, page.resync) == (whole[entry.seq : entry.seq + 4], tip, False)
        for wrong in (
            Cursor(GENERATION, Place(entry.epoch + 1, entry.seq)),
            Cursor("x", Place(entry.epoch, entry.seq)),
        ):
            page = await reader.read("c", wrong, 4)
            assert page is not None
            assert (list(page.entries), page.tip, page.resync) == (whole[:4], tip, True)
    for start in (Cursor(), Cursor(GENERATION, START)):
        page = await reader.read("c", start, 100)
        assert page is not None
        assert (list(page.entries), page.resync, page.first) == (whole, False, 1)


async def test_a_log_reads_the_same_wherever_its_entries_are(halves: Halves) -> None:
    reader = LogReader(halves.store, halves.archive)
    await everything(reader, halves)
    await halves.put((1, 6), (7, 7), (8, 15), keep=3)
    await everything(reader, halves)
    await halves.put(keep=9)
    await everything(reader, halves)
    await halves.put((16, 19), keep=20)
    await everything(reader, halves)
    await everything(LogReader(halves.store, halves.archive), halves)
    assert await reader.read("none", Cursor(), 9) is None


async def test_a_log_whose_beginning_was_deleted(halves: Halves) -> None:
    await halves.put((1, 6), (7, 12), (13, 15), keep=14)
    await halves.commit(Manifest("c", GENERATION, tuple(halves.refs[1:])))
    reader = LogReader(halves.store, halves.archive)
    for seq in range(7):
        page = await reader.read("c", Cursor(place=Place(0, seq)), 100)
        assert page is not None
        hole = 0 < seq < 6
        assert (list(page.entries), page.resync, page.first) == (halves.entries[6:], hole, 7)
    gone, there = halves.entries[3], halves.entries[7]
    page = await reader.read("c", Cursor(GENERATION, Place(gone.epoch, gone.seq)), 3)
    assert page is not None
    assert (list(page.entries), page.resync) == (halves.entries[6:9], True)
    page = await reader.read("c", Cursor(GENERATION, Place(there.epoch, there.seq)), 3)
    assert page is not None
    assert (list(page.entries), page.resync) == (halves.entries[8:11], False)


def _is_manifest(name: str) -> bool:
    return "manifest" in name


def _is_after_8(cid: str, after: Cursor, limit: int) -> bool:
    return after.place.seq == 8


async def test_a_read_that_was_overtaken_begins_again(store: MemoryStore, tmp_path: Path) -> None:
    """Its manifest is replaced and deleted between its two looks."""
    objects = open_objects(tmp_path.as_uri())
    halves = Halves(store, Archive(objects))
    await halves.write()
    await halves.put((1, 8), keep=5)
    slow = StepStore(cast("Any", objects))
    reader = LogReader(store, Archive(cast("Any", slow)))
    held = slow.hold("get", _is_manifest)
    reading = asyncio.create_task(reader.read("c", Cursor(place=Place(0, 2)), 100))
    await held.reached.wait()
    old = (await head(store)).manifest
    await halves.put((9, 14), keep=14)
    await halves.archive.delete("c", GENERATION, [old])
    held.go()
    page = await reading
    assert page is not None
    assert list(page.entries) == halves.entries[2:]


async def test_trimmed_under_a_read(store: MemoryStore, tmp_path: Path) -> None:
    """The archive's part was read by a manifest that the store has meanwhile gone beyond."""
    halves = Halves(store, Archive(open_objects(tmp_path.as_uri())))
    await halves.write()
    await halves.put((1, 8), keep=5)
    slow = StepStore(cast("Any", store))
    reader = LogReader(cast("Any", slow), halves.archive)
    held = slow.hold("read", _is_after_8)
    reading = asyncio.create_task(reader.read("c", Cursor(place=Place(0, 2)), 100))
    await held.reached.wait()
    await halves.put((9, 14), keep=14)
    held.go()
    page = await reading
    assert page is not None
    assert list(page.entries) == halves.entries[2:]


async def test_what_cannot_be_read_is_said(halves: Halves, objects: Objects) -> None:
    await halves.put((1, 6), (7, 12), keep=9)
    with pytest.raises(ArchiveUnavailable, match="no archive_url"):
        await LogReader(halves.store).read("c", Cursor(), 9)
    page = await LogReader(halves.store).read("c", Cursor(place=Place(0, 8)), 9)
    assert page is not None
    assert list(page.entries) == halves.entries[8:17]
    await halves.archive.delete("c", GENERATION, [halves.refs[1].name])
    with pytest.raises(ArchiveUnavailable, match="lacks"):
        await LogReader(halves.store, Archive(objects)).read("c", Cursor(), 9)
