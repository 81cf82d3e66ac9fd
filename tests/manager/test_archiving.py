"""Old entries leave the store in the background, and nobody who reads notices: clients, agents, the auditor.

Nodes are killed between each two steps of it; nothing is lost or doubled, whoever owns the conversation next.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import pytest

from convener.core.cursor import Cursor, parse
from convener.core.model import Meta
from convener.core.view import Place
from convener.errors import ConvenerError
from convener.manager import archiving
from convener.manager.context import NodeOptions
from convener.manager.members import Members
from convener.manager.standalone import StandaloneConversationManager
from convener.manager.turn import Turn
from convener.store.archive import Archive, open_objects
from convener.store.memory import MemoryStore
from convener.store.sqlite import SQLiteStore
from convener.store.tables import Tables
from convener.testing.cluster import FunctionAgent, InProcessCluster
from convener.testing.steps import StepStore
from tests.manager.conftest import MakeCluster, join
from tests.support.objectstore import ObjectStore, Switched
from tests.support.waiting import wait_until

ENOUGH, WINDOW, SEGMENT = 20, 10, 16
LEASE_S = 2.5
QUICK = NodeOptions(
    name="node", lease_ttl=LEASE_S, renew_interval=0.1, drain_timeout=5.0, hibernate_after=0.0, archive_every=0.1
)


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archiving, "ENOUGH", ENOUGH)
    monkeypatch.setattr(archiving, "WINDOW", WINDOW)
    monkeypatch.setattr(archiving, "SEGMENT_ENTRIES", SEGMENT)
    monkeypatch.setattr(archiving, "RUBBISH_S", 0.0)


async def talk(turn: Turn[Any]) -> None:
    """Says as many things as it is asked for."""
    for n in range(int(turn.text or 1)):
        await turn.emit("noted", n)
    await turn.reply({"text": f"{turn.id}: {len(await turn.conversation.history())}"})


async def count(turn: Turn[Any]) -> None:
    """The same without looking back."""
    for n in range(int(turn.text or 1)):
        await turn.emit("noted", n)
    await turn.reply({"text": turn.id})


async def say(manager: Any, cid: str, times: int = 1) -> None:
    """Have the agent say so many things, and wait until it has."""
    before = (await manager.describe(cid)).last_seq
    await manager.send_event_to_conversation(cid, {"text": str(times)}, user_id="u")

    async def answered() -> bool:
        info = await manager.describe(cid)
        return info.last_seq >= before + times + 4 and not info.busy

    await wait_until(answered, "the turn has ended")


def objects_in(folder: Path, kind: str) -> list[str]:
    """Names of the segments or manifests in a folder."""
    return sorted(path.name for path in folder.rglob(f"{kind}-*"))


async def head(manager: Any, cid: str = "c") -> Meta:
    found = await manager.engine.node.store.head(cid)
    assert found is not None
    return found


async def in_store(manager: Any, cid: str = "c") -> int:
    """Number of the first entry that the store still has."""
    page = await manager.engine.node.store.read(cid, Cursor(), 1)
    assert page is not None
    return page.first


async def archived(manager: Any, cid: str = "c", *, beyond: int = 0) -> Meta:
    """Wait until nothing more is worth archiving."""

    async def is_archived() -> Meta | None:
        found = await head(manager, cid)
        return found if found.seq - found.archived < ENOUGH and found.archived > beyond else None

    return cast("Meta", await wait_until(is_archived, "old entries are in the archive"))


async def whole(manager: Any, cid: str = "c") -> list[tuple[int, int, str]]:
    """The log as it is read page by page."""
    found: list[tuple[int, int, str]] = []
    cursor = Cursor()
    while True:
        page = await manager.read_log(cid, cursor, 7)
        found += [(e.epoch, e.seq, e.event) for e in page.entries]
        if not page.entries:
            return found
        cursor = Cursor(page.generation, Place(page.entries[-1].epoch, page.entries[-1].seq))


def is_dense(log: list[tuple[int, int, str]]) -> bool:
    return [seq for _, seq, _ in log] == list(range(1, len(log) + 1))


# -- one node, on each kind of local store, with each kind of archive --------------------------------------------


@pytest.fixture(params=["memory-folder", "sqlite-folder", "sqlite-s3"])
def alone(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., StandaloneConversationManager]]:
    kind, place = str(request.param).split("-")
    with ObjectStore() if place == "s3" else cast("Any", memoryview(b"")) as server:
        for name, value in server.environment.items() if place == "s3" else ():
            monkeypatch.setenv(name, value)

        def make(**options: Any) -> StandaloneConversationManager:
            url = server.url if place == "s3" else (tmp_path / "archive").as_uri()
            store = MemoryStore() if kind == "memory" else SQLiteStore(tmp_path / "data")
            return StandaloneConversationManager(
                agent=FunctionAgent(talk),
                store=store,
                options=dataclasses.replace(QUICK, lease_ttl=0.1, **options),
                archive=Archive(open_objects(url)),
            )

        yield make


async def test_old_entries_leave_and_are_read_as_before(alone: Callable[..., StandaloneConversationManager]) -> None:
    async with alone() as manager:
        await manager.maybe_start_agent_loop("c", user_id="u")
        await say(manager, "c", 5)
        early = await whole(manager)
        for times in (30, 3, 40, 9):
            await say(manager, "c", times)
        before = await whole(manager)
        mark = await archived(manager)
        assert mark.archived > 60
        first = await in_store(manager)
        assert mark.archived - WINDOW < first <= mark.archived + 1 - min(WINDOW, SEGMENT)
        assert await whole(manager) == before
        assert is_dense(before)
        assert (await manager.audit())["violations"] == []
        # A client that comes back with an old cursor goes on where it was, one that begins sees all of it.
        seen = await manager.read_log("c", Cursor(), 3)
        cursor = parse(f"{seen.generation}.{early[2][0]}.{early[2][1]}")
        again = await join(cast("Any", [manager]), 0, "c", "k1", after=cursor)
        fresh = await join(cast("Any", [manager]), 0, "c", "k2")
        await wait_until(lambda: again.named("joined") and fresh.named("joined"), "both are live")
        assert again.named("resync") == []
        assert [e["seq"] for e in again.events] == list(range(4, len(before) + 1))
        assert [e["seq"] for e in fresh.events] == list(range(1, len(before) + 1))
        # So does its agent: four turns have ended before this one.
        await say(manager, "c", 1)
        assert any('"t6: 10"' in event for _, _, event in await whole(manager))


async def test_a_node_that_stands_alone_comes_back_to_its_archive(tmp_path: Path) -> None:
    def make(archive: bool = True) -> StandaloneConversationManager:
        return StandaloneConversationManager(
            agent=FunctionAgent(talk),
            store=SQLiteStore(tmp_path / "data"),
            options=dataclasses.replace(QUICK, lease_ttl=0.1),
            archive=Archive(open_objects((tmp_path / "archive").as_uri())) if archive else None,
        )

    async with make() as manager:
        await manager.maybe_start_agent_loop("c", user_id="u")
        await say(manager, "c", 60)
        await archived(manager)
        before = await whole(manager)
    async with make() as manager:
        assert await whole(manager) == before
        await say(manager, "c", 60)
        await archived(manager, beyond=70)
        after = await whole(manager)
        assert (after[: len(before)], is_dense(after)) == (before, True)
    async with make(archive=False) as manager:
        with pytest.raises(ConvenerError, match="no archive_url"):
            await whole(manager)


async def test_an_open_turn_and_large_entries_keep_to_the_bounds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a new owner must read stays; a few large entries are worth a segment, and are cut into several."""
    monkeypatch.setattr(archiving, "SEGMENT_BYTES", 5_000)

    async def write(turn: Turn[Any]) -> None:
        for _ in range(5):
            await turn.emit("noted", "x" * 2_000)
        if turn.text == "ask":
            await turn.ask("well?")

    manager = StandaloneConversationManager(
        agent=FunctionAgent(write),
        options=dataclasses.replace(QUICK, lease_ttl=0.1),
        archive=Archive(open_objects(tmp_path.as_uri())),
    )
    async with manager:
        await manager.maybe_start_agent_loop("c", user_id="u")
        await say(manager, "c", 4)
        await wait_until(lambda: _has_archived(manager, 5), "large entries are archived")
        await manager.send_event_to_conversation("c", {"text": "ask"}, user_id="u")
        await wait_until(lambda: _has_archived(manager, 14), "those of the open turn too")
        now = await head(manager)
        first = await in_store(manager)
        assert first <= now.base + 1 < now.archived
        assert len(objects_in(tmp_path, "log")) >= 3
        assert is_dense(await whole(manager))
        assert (await manager.audit())["violations"] == []


async def _has_archived(manager: Any, seq: int) -> bool:
    return (await head(manager)).archived >= seq


async def test_what_counts_no_more_is_deleted(tmp_path: Path) -> None:
    """Old manifests, and what a node left that died half way; what the manifest lists stays."""
    manager = StandaloneConversationManager(
        agent=FunctionAgent(talk),
        options=dataclasses.replace(QUICK, lease_ttl=0.1),
        archive=Archive(open_objects(tmp_path.as_uri())),
    )
    async with manager:
        await manager.maybe_start_agent_loop("c", user_id="u")
        await say(manager, "c", 60)
        mark = await archived(manager)
        folder = tmp_path / "ns-convener" / "c-c" / mark.generation
        (folder / "log-000000000000001-1").write_bytes(b"of somebody who died")
        (folder / "manifest-000000000000001-1-x").write_bytes(b"too")

        async def tidy() -> bool:
            names = {path.name for path in folder.iterdir()}
            manifests = [name for name in names if name.startswith("manifest")]
            return manifests == [(await head(manager)).manifest] and "log-000000000000001-1" not in names

        await wait_until(tidy, "only what counts is there")
        assert is_dense(await whole(manager))


async def test_a_fail_over_that_loses_the_mark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The head names a former manifest again: it is still there, and what was written since counts once more."""

    async def keep_all(*_: object) -> tuple[int, int]:
        # What ARCHIVED has trimmed is back with what it has written; here it is not trimmed in the first place.
        return (0, 0)

    monkeypatch.setattr(archiving, "RUBBISH_S", 3600.0)
    monkeypatch.setattr(cast("Any", archiving)._Job, "_keep", keep_all)
    store = MemoryStore()
    manager = StandaloneConversationManager(
        agent=FunctionAgent(count),
        store=store,
        options=dataclasses.replace(QUICK, lease_ttl=0.1),
        archive=Archive(open_objects(tmp_path.as_uri())),
    )
    async with manager:
        await manager.maybe_start_agent_loop("c", user_id="u")
        await say(manager, "c", 60)
        lost = await archived(manager)
        await say(manager, "c", 60)
        after = await archived(manager, beyond=lost.archived)
        marks = {"archived": lost.archived, "archived_epoch": lost.archived_epoch, "manifest": lost.manifest}

        def fall_back(t: Tables) -> None:
            meta = t.meta("c")
            assert meta is not None
            t.set_meta("c", dataclasses.replace(meta, **cast("Any", marks)))

        await store.run(fall_back)
        segments = objects_in(tmp_path, "log")
        await say(manager, "c", 60)
        await archived(manager, beyond=after.archived)
        log = await whole(manager)
        assert is_dense(log)
        assert set(segments) <= set(objects_in(tmp_path, "log"))
        found = await Archive(open_objects(tmp_path.as_uri())).manifest(
            "c", after.generation, (await head(manager)).manifest
        )
        assert found is not None
        assert [ref.first[1] for ref in found.segments[1:]] == [ref.last[1] + 1 for ref in found.segments[:-1]]
        assert (await manager.audit())["violations"] == []


async def test_segments_beyond_their_time_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manager = StandaloneConversationManager(
        agent=FunctionAgent(talk),
        options=dataclasses.replace(QUICK, lease_ttl=0.1, retention=3600.0),
        archive=Archive(open_objects(tmp_path.as_uri())),
    )
    monkeypatch.setattr(archiving, "AGE_CHECK_S", 0.0)
    async with manager:
        await manager.maybe_start_agent_loop("c", user_id="u")
        await say(manager, "c", 60)
        await archived(manager)
        log = await whole(manager)
        assert is_dense(log)
        now = archiving.wall_ms()
        monkeypatch.setattr(archiving, "wall_ms", lambda: now + 3_700_000)

        async def is_shorter() -> bool:
            page = await manager.read_log("c", Cursor(), 1)
            return page.entries[0].seq > 1 and len(objects_in(tmp_path, "log")) == 1

        await wait_until(is_shorter, "the old segments are gone")
        rest = await whole(manager)
        assert rest == log[-len(rest) :]
        client = await join(cast("Any", [manager]), 0, "c", "k", after=parse(f"{(await head(manager)).generation}.1.1"))
        await wait_until(lambda: client.named("joined"), "it is live")
        assert len(client.named("resync")) == 1
        assert [e["seq"] for e in client.events] == [seq for _, seq, _ in rest]
        assert (await manager.audit())["violations"] == []


# -- several nodes -------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Callable[[int], Archive]:
    return lambda node: Archive(open_objects(tmp_path.as_uri()))


async def test_owners_after_one_another(make_cluster: MakeCluster, folder: Callable[[int], Archive]) -> None:
    cluster: InProcessCluster = await make_cluster(talk, options=QUICK, archive=folder)
    await cluster[0].maybe_start_agent_loop("c", user_id="u")
    client = await join(cluster, 2, "c", "k")
    for round_, doomed in enumerate((0, 1)):
        await say(cluster[2], "c", 50)
        await archived(cluster[2], beyond=40 + 50 * round_)
        if cluster.owner_of("c") == doomed:
            await cluster.kill(doomed)
        await wait_until(lambda: cluster.owner_of("c") is not None or True, "somebody may own it")
    await say(cluster[2], "c", 50)
    await archived(cluster[2], beyond=120)
    log = await whole(cluster[2])
    assert is_dense(log)
    await wait_until(lambda: len(client.events) == len(log), "the client has all of it")
    assert [(e["epoch"], e["seq"]) for e in client.events] == [(epoch, seq) for epoch, seq, _ in log]


@pytest.mark.parametrize("step", ["segment", "manifest", "archived", "archived-reply"])
async def test_killed_half_way(make_cluster: MakeCluster, tmp_path: Path, step: str) -> None:
    """After the segment, after the manifest, before ARCHIVED and after it."""
    slow: list[StepStore] = []
    stores: list[StepStore] = []

    def archive(node: int) -> Archive:
        slow.append(StepStore(cast("Any", open_objects(tmp_path.as_uri()))))
        return Archive(cast("Any", slow[-1]))

    def wrap(node: int, store: Any) -> Any:
        stores.append(StepStore(store))
        return stores[-1]

    cluster: InProcessCluster = await make_cluster(talk, options=QUICK, archive=archive, wrap=wrap)
    await cluster[0].maybe_start_agent_loop("c", user_id="u")
    await say(cluster[0], "c", 10)
    if step.startswith("archived"):
        held = (stores[0].hold_reply if step.endswith("reply") else stores[0].hold)("archived")
    else:
        kind = "log" if step == "segment" else "manifest"

        def is_of_kind(name: str, data: bytes) -> bool:
            return f"/{kind}-" in name

        held = slow[0].hold_reply("create", is_of_kind)
    await say(cluster[0], "c", 60)
    before = await whole(cluster[1])
    await wait_until(held.reached.is_set, "it has come that far")
    await cluster.kill(0)
    await say(cluster[1], "c", 3)
    mark = await archived(cluster[1], beyond=60)
    log = await whole(cluster[1])
    assert (log[: len(before)], is_dense(log)) == (before, True)
    assert {mark.manifest, (await head(cluster[1])).manifest} & set(objects_in(tmp_path, "manifest"))


async def test_an_archive_that_is_away_delays_trimming_and_nothing_else(
    make_cluster: MakeCluster, tmp_path: Path
) -> None:
    objects = Switched(open_objects(tmp_path.as_uri()))

    def archive(node: int) -> Archive:
        return Archive(objects)

    cluster: InProcessCluster = await make_cluster(count, options=QUICK, nodes=2, archive=archive)
    objects.away = True
    await cluster[0].maybe_start_agent_loop("c", user_id="u")
    client = await join(cluster, 1, "c", "k")
    await say(cluster[0], "c", 60)
    registry = cluster[0].metrics.registry

    def tried() -> bool:
        failures = registry.get_sample_value("convener_archive_failures_total", {"kind": "archive"})
        return (failures or 0) > 1

    await wait_until(tried, "it has tried more than once")
    assert (await head(cluster[0])).archived == 0
    await say(cluster[0], "c", 3)
    log = await whole(cluster[0])
    await wait_until(lambda: len(client.events) == len(log), "the client has all of it")
    objects.away = False
    await archived(cluster[0])
    assert await whole(cluster[1]) == log
    # Away again: only who asks for what is there hears of it.
    cluster[1].engine.node.logs = type(cluster[1].engine.node.logs)(cluster[1].engine.node.store, Archive(objects))
    objects.away = True
    with pytest.raises(ConvenerError):
        await cluster[1].read_log("c", Cursor(), 5)
    await say(cluster[1], "c", 3)
    tail = await cluster[1].read_log("c", Cursor(place=Place(0, len(log))), 50)
    assert tail.entries[0].seq == len(log) + 1
    objects.away = False


async def test_nothing_is_archived_beside_a_node_that_knows_no_archive(
    make_cluster: MakeCluster, folder: Callable[[int], Archive], monkeypatch: pytest.MonkeyPatch
) -> None:
    looks, look = 0, Members.all_speak

    def counted(self: Members, protocol: int) -> bool:
        nonlocal looks
        looks += 1
        return look(self, protocol)

    monkeypatch.setattr(Members, "all_speak", counted)
    cluster: InProcessCluster = await make_cluster(talk, options=QUICK, nodes=1, archive=folder)
    info = Members.info

    def older(self: Members) -> str:
        text = info(self)
        return text.replace('"protocol":2', '"protocol":1') if '"node-1"' in text else text

    monkeypatch.setattr(Members, "info", older)
    await cluster.add()
    await cluster[0].maybe_start_agent_loop("c", user_id="u")
    await wait_until(lambda: len(cast("Any", cluster[0])._members.state.members) == 2, "they know each other")
    await say(cluster[0], "c", 60)
    before = looks
    await wait_until(lambda: looks > before + 2 * LEASE_S / QUICK.archive_every, "it has looked for long enough", 60)
    assert (await head(cluster[0])).archived == 0
    await cluster.leave(1)
    await archived(cluster[0])


async def test_a_client_without_haste_reads_on_in_the_archive(
    make_cluster: MakeCluster, folder: Callable[[int], Archive]
) -> None:
    """It had stopped reading when its place was trimmed under it."""
    cluster: InProcessCluster = await make_cluster(talk, options=QUICK, nodes=2, archive=folder)
    await cluster[0].maybe_start_agent_loop("c", user_id="u")
    client = await join(cluster, 1, "c", "k")
    await say(cluster[0], "c", 5)
    await wait_until(lambda: len(client.events) > 5, "it has the beginning")
    client.gate.clear()
    for _ in range(5):
        await say(cluster[0], "c", 70)
    await archived(cluster[0], beyond=300)
    client.gate.set()
    log = await whole(cluster[0])
    await wait_until(lambda: len(client.events) == len(log), "the client has all of it")
    assert [e["seq"] for e in client.events] == list(range(1, len(log) + 1))
    assert client.named("resync") == []
