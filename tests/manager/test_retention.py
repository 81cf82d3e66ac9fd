"""Conversations that are deleted, or that nobody has used for long, go with all they have, whoever dies on the way."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from convener.core.cursor import Cursor
from convener.core.view import Place
from convener.errors import NotFound
from convener.manager import archiving, retention
from convener.manager.context import NodeOptions
from convener.manager.turn import Turn
from convener.store.archive import Archive, open_objects
from convener.testing.cluster import InProcessCluster
from convener.testing.steps import StepStore
from tests.manager.conftest import MakeCluster, swept
from tests.manager.people import keys_of
from tests.support.objectstore import Switched
from tests.support.waiting import wait_until

QUICK = NodeOptions(
    name="node",
    lease_ttl=2.5,
    renew_interval=0.1,
    drain_timeout=5.0,
    hibernate_after=0.2,
    archive_every=0.1,
    sweep_every=0.2,
)
FOREVER = dataclasses.replace(QUICK, hibernate_after=0.0)


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archiving, "ENOUGH", 20)
    monkeypatch.setattr(archiving, "WINDOW", 10)
    monkeypatch.setattr(retention, "CREATING_S", 1.0)


async def talk(turn: Turn[Any]) -> None:
    for n in range(30):
        await turn.emit("noted", n)
    if turn.text == "later":
        await turn.conversation.schedule(3600, "wake up")
    if turn.text == "ask":
        await turn.ask("well?")


async def said(cluster: InProcessCluster, cid: str, text: str = "x") -> None:
    await cluster[0].maybe_start_agent_loop(cid, user_id="u")
    await cluster[0].send_event_to_conversation(cid, {"text": text}, user_id="u")
    await wait_until(lambda: _has(cluster, cid, 30), f"{cid} has a log")


async def _has(cluster: InProcessCluster, cid: str, entries: int) -> bool:
    return (await cluster[0].describe(cid)).last_seq > entries


async def _is_archived(cluster: InProcessCluster, cid: str) -> bool:
    found = await cluster[0].engine.node.store.head(cid)
    return found is not None and found.archived > 0


async def exists(cluster: InProcessCluster, cid: str) -> bool:
    try:
        await cluster[0].describe(cid)
    except NotFound:
        return False
    return True


async def listed(cluster: InProcessCluster) -> set[str]:
    """Whatever any list names."""
    store = cluster[0].engine.node.store
    found = {cid for shard in range(64) for cid in await store.list_all(shard, "", 1000)}
    for user in ("u", ""):
        found |= {cid for cid, _ in await store.list_user(user, None, 1000)}
    return found


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*") if path.is_file())


@pytest.fixture
def folder(tmp_path: Path) -> Callable[[int], Archive]:
    return lambda node: Archive(open_objects(tmp_path.as_uri()))


async def test_deleting_takes_the_archive_along(
    make_cluster: MakeCluster, folder: Callable[[int], Archive], tmp_path: Path
) -> None:
    cluster: InProcessCluster = await make_cluster(talk, options=FOREVER, nodes=2, archive=folder)
    for cid in ("c", "cc"):
        await said(cluster, cid)
        await wait_until(lambda cid=cid: _is_archived(cluster, cid), f"{cid} is archived")
    kept = list(files(tmp_path / "ns-convener" / "c-cc"))
    await cluster[1].delete("c")
    assert files(tmp_path / "ns-convener" / "c-c") == []
    assert [name for name in files(tmp_path) if name in kept] == kept
    assert await listed(cluster) == {"cc"}
    with pytest.raises(NotFound):
        await cluster[0].describe("c")


async def test_an_archive_that_is_away_is_cleared_when_it_is_back(make_cluster: MakeCluster, tmp_path: Path) -> None:
    objects = Switched(open_objects(tmp_path.as_uri()))

    def archive(node: int) -> Archive:
        return Archive(objects)

    cluster: InProcessCluster = await make_cluster(talk, options=FOREVER, nodes=2, archive=archive)
    await said(cluster, "c")
    await wait_until(lambda: _is_archived(cluster, "c"), "it is archived")
    objects.away = True
    await cluster[1].delete("c")
    assert not await exists(cluster, "c")
    assert files(tmp_path) != []
    assert await cluster[0].list_conversations("u", None, 10) == []
    objects.away = False
    await wait_until(lambda: files(tmp_path) == [], "nothing is left in the archive")
    await wait_until(lambda: _lists_nothing(cluster), "nothing is left in the lists")


async def _lists_nothing(cluster: InProcessCluster) -> bool:
    return not await listed(cluster)


@pytest.mark.parametrize("step", ["erase", "unindex"])
async def test_a_node_that_dies_while_it_deletes(
    make_cluster: MakeCluster, folder: Callable[[int], Archive], tmp_path: Path, step: str
) -> None:
    """After ERASE, and after the archive: the others finish it, the user's list when it is looked at."""
    stores: list[StepStore] = []

    def wrap(node: int, store: Any) -> Any:
        stores.append(StepStore(store))
        return stores[-1]

    cluster: InProcessCluster = await make_cluster(talk, options=FOREVER, nodes=2, archive=folder, wrap=wrap)
    await said(cluster, "c")
    await wait_until(lambda: _is_archived(cluster, "c"), "it is archived")
    held = stores[1].hold_reply(step) if step == "erase" else stores[1].hold(step)
    deleting = cluster[1].engine.node.supervisor.spawn("delete", cluster[1].delete("c"))
    await wait_until(held.reached.is_set, "it has come that far")
    await cluster.kill(1)
    await wait_until(deleting.done, "it is dead")
    assert not await exists(cluster, "c")

    async def is_clear() -> bool:
        await cluster[0].list_conversations("u", None, 10)
        return files(tmp_path) == [] and not await listed(cluster)

    await wait_until(is_clear, "nothing is left of it")


async def test_what_nobody_uses_goes_and_what_waits_stays(
    make_cluster: MakeCluster, folder: Callable[[int], Archive], tmp_path: Path
) -> None:
    options = dataclasses.replace(QUICK, retention=1.0)
    cluster: InProcessCluster = await make_cluster(talk, options=options, nodes=2, archive=folder, limit=9)
    for cid, text in (("plain", "x"), ("later", "later"), ("asks", "ask"), ("closed", "later")):
        await said(cluster, cid, text)
    await cluster[0].close_session("closed", "enough")

    async def left() -> bool:
        return await listed(cluster) == {"later", "asks"}

    await wait_until(left, "only what waits for something is left")
    assert [await exists(cluster, cid) for cid in ("plain", "closed", "later", "asks")] == [False, False, True, True]
    store = cluster[0].engine.node.store
    assert len(await store.alarms("later")) == 1
    due = [entry for shard in range(16) for entry in await store.due_timers(shard, 100)]
    assert not [entry for entry in due if entry[0] == "closed"]
    await cluster[0].maybe_start_agent_loop("plain", user_id="somebody-else")
    assert (await cluster[0].describe("plain")).user_id == "somebody-else"


async def test_without_an_archive_the_same(make_cluster: MakeCluster) -> None:
    options = dataclasses.replace(QUICK, retention=1.0)
    cluster: InProcessCluster = await make_cluster(talk, options=options, nodes=1)
    await said(cluster, "c")
    page = await cluster[0].read_log("c", Cursor(), 1)
    assert page.entries[0].seq == 1
    await wait_until(lambda: _lists_nothing(cluster), "it is gone")
    assert not await exists(cluster, "c")


async def test_what_is_used_stays(make_cluster: MakeCluster) -> None:
    """Owned, it stays however long nothing happens; unowned, until nothing has happened for so long."""
    options = dataclasses.replace(FOREVER, retention=0.5)
    cluster: InProcessCluster = await make_cluster(talk, options=options, nodes=1)
    await said(cluster, "c")
    await swept(cluster, 10)
    assert await exists(cluster, "c")


async def test_a_stopped_conversation_leaves_the_store_and_comes_back(
    make_cluster: MakeCluster, folder: Callable[[int], Archive], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its log, but for the last entry; several nodes are at it. It is read as before, and `resume` goes on with it."""
    monkeypatch.setattr(archiving, "SEGMENT_ENTRIES", 16)
    monkeypatch.setattr(archiving, "RUBBISH_S", 0.0)
    cluster: InProcessCluster = await make_cluster(counted, options=FOREVER, nodes=3, archive=folder)
    await said(cluster, "c")
    await said(cluster, "c")
    await wait_until(lambda: _has(cluster, "c", 65), "both turns have ended")
    await cluster[1].close_session("c", "enough")
    log = await whole(cluster[0], "c")

    async def has_left() -> bool:
        page = await cluster[0].engine.node.store.read("c", Cursor(), 100)
        return page is not None and len(page.entries) == 1

    await wait_until(has_left, "its log has left the store")
    assert await whole(cluster[2], "c") == log
    assert [seq for _, seq, _ in log] == list(range(1, len(log) + 1))
    await cluster[2].resume("c")
    await cluster[2].send_event_to_conversation("c", {"text": "x"}, user_id="u")
    await wait_until(lambda: _has(cluster, "c", len(log) + 31), "it goes on")
    after = await whole(cluster[1], "c")
    assert after[: len(log)] == log
    assert '"count":3' in after[-2][2]


async def counted(turn: Turn[Any]) -> None:
    turn.state["count"] = turn.state.get("count", 0) + 1
    for n in range(30):
        await turn.emit("noted", n)
    await turn.reply({"count": turn.state["count"]})


async def whole(manager: Any, cid: str) -> list[tuple[int, int, str]]:
    """The log as it is read page by page."""
    found: list[tuple[int, int, str]] = []
    while True:
        page = await manager.read_log(cid, Cursor(place=Place(0, len(found))), 50)
        if not page.entries:
            return found
        found += [(e.epoch, e.seq, e.event) for e in page.entries]


@pytest.mark.parametrize("owned", [True, False])
async def test_a_stop_takes_the_deadlines_of_its_questions_along(make_cluster: MakeCluster, owned: bool) -> None:
    """They may be a year away; whoever deletes the conversation later does not know of them."""

    async def ask(turn: Turn[Any]) -> None:
        await turn.ask("well?", timeout=86_400 * 365)

    cluster: InProcessCluster = await make_cluster(ask, options=FOREVER, nodes=1)
    await cluster[0].maybe_start_agent_loop("c", user_id="u", initial_user_msg={"text": "x"})
    await wait_until(lambda: _asks(cluster, "c"), "it asks")
    assert await _timers(cluster) == ["c"]
    if not owned:
        await wait_until(lambda: cluster[0].engine.hibernate("c"), "nobody owns it")
    await cluster[0].close_session("c", "enough")
    assert await _timers(cluster) == []
    await cluster[0].delete("c")
    assert await listed(cluster) == set()


async def _asks(cluster: InProcessCluster, cid: str) -> bool:
    return len(await cluster[0].questions(cid)) == 1


async def _timers(cluster: InProcessCluster) -> list[str]:
    """Conversations with an entry in the list of what is to happen, however far away that is."""
    return ["c"] if any(name.startswith("t:") for name in await keys_of(cluster)) else []
