"""The archive when something comes between: deletions, new conversations of an old name, fail-overs, wrong clocks."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest

from convener.core.cursor import Cursor
from convener.core.retention import ArchivedOutcome, ArchivedRequest
from convener.core.view import Place
from convener.manager import archiving
from convener.manager.context import NodeContext
from convener.manager.standalone import StandaloneConversationManager
from convener.store.archive import Archive, open_objects
from convener.store.base import Store
from convener.store.sqlite import SQLiteStore
from convener.testing.cluster import FunctionAgent, InProcessCluster
from convener.testing.steps import StepStore
from tests.manager.conftest import MakeCluster, join, swept
from tests.manager.test_archiving import QUICK, archived, head, is_dense, objects_in, say, small, talk, whole
from tests.support.waiting import wait_until

__all__ = ["small"]

LONG_MS = 3_700_000


def kept_in(objects: Any) -> Callable[[int], Archive]:
    def archive(node: int) -> Archive:
        return Archive(objects)

    return archive


def of_kind(kind: str) -> Callable[..., bool]:
    def is_of_kind(name: str, data: bytes) -> bool:
        return f"/{kind}-" in name

    return is_of_kind


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*") if path.is_file())


class Forgetful:
    """A store that answers ARCHIVED and loses it, with a fail-over, once: when segments are taken off the list."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._upto = (0, 0)
        self.lost = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    async def archived(self, cid: str, request: ArchivedRequest) -> ArchivedOutcome:
        before, self._upto = self._upto, request.upto
        if before == request.upto and not self.lost:
            self.lost = True
            return "OK"
        return await self._store.archived(cid, request)


async def late(_: NodeContext) -> int:
    """More than an hour from now."""
    return archiving.wall_ms() + LONG_MS


async def test_a_manifest_that_counts_again_is_not_deleted(
    make_cluster: MakeCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stores: list[Forgetful] = []

    def wrap(node: int, store: Any) -> Any:
        stores.append(Forgetful(store))
        return stores[-1]

    monkeypatch.setattr(archiving, "time_of_day", late)
    cluster: InProcessCluster = await make_cluster(
        talk,
        options=dataclasses.replace(QUICK, retention=3600.0),
        nodes=1,
        wrap=wrap,
        archive=kept_in(cast("Any", open_objects(tmp_path.as_uri()))),
    )
    await cluster[0].maybe_start_agent_loop("c", user_id="u")
    await say(cluster[0], "c", 60)
    await wait_until(lambda: stores[0].lost, "the shorter list was lost")
    log, counts = await whole(cluster[0]), (await head(cluster[0])).manifest
    assert is_dense(log)
    await wait_until(lambda: len(objects_in(tmp_path, "manifest")) <= 2, "the earlier ones are deleted")
    await say(cluster[0], "c", 60)
    await archived(cluster[0], beyond=60)
    assert (await head(cluster[0])).manifest != counts
    assert (await whole(cluster[0]))[: len(log)] == log


async def test_what_is_uploaded_while_it_is_deleted_goes_too(make_cluster: MakeCluster, tmp_path: Path) -> None:
    slow = StepStore(cast("Any", open_objects(tmp_path.as_uri())))
    cluster: InProcessCluster = await make_cluster(talk, options=QUICK, nodes=2, archive=kept_in(slow))
    await cluster[0].maybe_start_agent_loop("c", user_id="u")
    segment, manifest = slow.hold("create", of_kind("log")), slow.hold_reply("create", of_kind("manifest"))
    await say(cluster[0], "c", 60)
    await wait_until(segment.reached.is_set, "it is being uploaded")
    await cluster[1].delete("c")
    segment.go()
    await wait_until(manifest.reached.is_set, "it is there, and so is a list of it")
    assert len(files(tmp_path)) == 2
    manifest.go()
    await wait_until(lambda: files(tmp_path) == [], "nothing is left of it")


async def test_a_new_conversation_of_the_name_stays_listed(make_cluster: MakeCluster, tmp_path: Path) -> None:
    slow = StepStore(cast("Any", open_objects(tmp_path.as_uri())))
    cluster: InProcessCluster = await make_cluster(talk, options=QUICK, nodes=2, archive=kept_in(slow))
    await cluster[0].maybe_start_agent_loop("c", user_id="u")
    await say(cluster[0], "c", 60)
    await archived(cluster[0])
    held = slow.hold("delete")
    deleting = cluster[1].engine.node.supervisor.spawn("delete", cluster[1].delete("c"))
    await wait_until(held.reached.is_set, "the archive is being cleared")
    await cluster[0].maybe_start_agent_loop("c", user_id="u")
    held.go()
    await wait_until(deleting.done, "it is deleted")
    assert [row.info.conversation_id for row in await cluster[0].list_conversations("u", None, 10)] == ["c"]
    store = cluster[0].engine.node.store
    assert [cid for shard in range(64) for cid in await store.list_all(shard, "", 10)] == ["c"]


async def test_a_number_in_the_deleted_part_is_a_resync(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else there would be a hole that nobody is told of."""
    monkeypatch.setattr(archiving, "AGE_CHECK_S", 0.0)
    manager = StandaloneConversationManager(
        agent=FunctionAgent(talk),
        options=dataclasses.replace(QUICK, lease_ttl=0.1, retention=3600.0),
        archive=Archive(open_objects(tmp_path.as_uri())),
    )
    async with manager:
        await manager.maybe_start_agent_loop("c", user_id="u")
        await say(manager, "c", 30)
        await say(manager, "c", 60)
        await archived(manager, beyond=60)
        monkeypatch.setattr(archiving, "time_of_day", late)

        async def beginning() -> int:
            found = (await manager.read_log("c", Cursor(), 1)).entries[0].seq
            return found if found > 3 else 0

        first = await wait_until(beginning, "the old segments are gone")
        for after, resync in ((0, False), (2, True), (first - 1, False)):
            page = await manager.read_log("c", Cursor(place=Place(0, after)), 5)
            assert (after, page.resync, page.entries[0].seq) == (after, resync, first)
        nodes = cast("Any", [manager])
        client = await join(nodes, 0, "c", "k", after=Cursor(place=Place(0, 2)))
        newcomer = await join(nodes, 0, "c", "n", tail=(await head(manager)).seq - 2)
        await wait_until(lambda: client.named("joined") and newcomer.named("joined"), "both are live")
        assert (len(client.named("resync")), len(newcomer.named("resync"))) == (1, 0)
        assert client.events == newcomer.events
        assert client.events[0]["seq"] == first


async def test_a_node_whose_clock_is_wrong_deletes_nothing(
    make_cluster: MakeCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = archiving.wall_ms
    monkeypatch.setattr(archiving, "wall_ms", lambda: now() + 10**11)
    options = dataclasses.replace(QUICK, retention=3600.0, hibernate_after=0.1, sweep_every=0.1)
    cluster: InProcessCluster = await make_cluster(talk, options=options, nodes=1)
    await cluster[0].maybe_start_agent_loop("c", user_id="u")
    await say(cluster[0], "c", 5)

    async def is_unloaded() -> bool:
        return not (await head(cluster[0])).owner

    await wait_until(is_unloaded, "nobody owns it")
    await swept(cluster, 5)
    assert (await cluster[0].describe("c")).last_seq > 5


async def test_a_store_that_is_put_back_finds_its_archive(tmp_path: Path) -> None:
    """Out of a backup: the manifest that it names has been deleted since."""
    options = dataclasses.replace(QUICK, lease_ttl=0.1)

    def manager(data: str) -> StandaloneConversationManager:
        archive, store = Archive(open_objects((tmp_path / "archive").as_uri())), SQLiteStore(tmp_path / data)
        return StandaloneConversationManager(agent=FunctionAgent(talk), store=store, options=options, archive=archive)

    async with manager("data") as first:
        await first.maybe_start_agent_loop("c", user_id="u")
        await say(first, "c", 30)
        await say(first, "c", 30)
        await archived(first, beyond=30)
        log = await whole(first)
    shutil.copytree(tmp_path / "data", tmp_path / "backup")
    async with manager("data") as second:
        counted = (await head(second)).manifest
        await say(second, "c", 60)
        await archived(second, beyond=70)
        await wait_until(lambda: counted not in objects_in(tmp_path, "manifest"), "it is replaced and deleted")
    async with manager("backup") as third:
        assert (await head(third)).manifest == counted
        assert (await whole(third))[: len(log)] == log
        await say(third, "c", 60)
        await archived(third, beyond=70)
        found = await whole(third)
        assert (found[: len(log)], is_dense(found)) == (log, True)
        assert (await third.audit())["violations"] == []
