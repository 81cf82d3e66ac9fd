"""The live list: every client of it ends up with what the store has, whatever is lost on the way (protocol, I14)."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import pytest

from convener.errors import InvalidRequest
from convener.manager import listing
from convener.manager.base import AgentLoopInfo
from convener.manager.turn import Turn
from convener.store.base import Handler, Store
from convener.testing.cluster import InProcessCluster, RecordingSink
from tests.manager.conftest import MakeCluster
from tests.support.waiting import wait_until

pytestmark = pytest.mark.anyio


async def echo(turn: Turn) -> None:
    await turn.reply({"text": turn.text})


class Gate:
    """An agent that answers when it is let."""

    def __init__(self) -> None:
        self.open = asyncio.Event()

    async def __call__(self, turn: Turn) -> None:
        await self.open.wait()


class Muffled:
    """A store whose publications on the state channel get lost while `lost` is set."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self.lost = False
        self.swallowed = b""
        self.reconnected: Callable[[], None] = lambda: None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    async def subscribe(self, channel: str, handler: Handler, on_gap: Callable[[], None]) -> None:
        if channel == self._store.channel("sync"):
            self.reconnected = on_gap
        await self._store.subscribe(channel, handler, on_gap)

    async def publish(self, channel: str, payload: bytes) -> None:
        if self.lost and channel == self._store.channel("sync"):
            self.swallowed += payload
        else:
            await self._store.publish(channel, payload)


def shown(info: AgentLoopInfo) -> Mapping[str, Any]:
    return dataclasses.asdict(info)


class Follower(RecordingSink):
    """A client of the list; keeps its own copy of it, as a user interface would."""

    def __init__(self) -> None:
        super().__init__()
        self.list: dict[str, dict[str, Any]] = {}

    async def send(self, connection_id: str, event: str, payload: Mapping[str, Any]) -> None:
        await super().send(connection_id, event, payload)
        if payload["change"] == "deleted":
            del self.list[payload["conversation_id"]]
        else:
            self.list[payload["conversation_id"]] = dict(payload)

    def changes(self, cid: str | None = None) -> list[str]:
        """What happened, in order."""
        return [p["change"] for p in self.named("conversation") if cid in (None, p["conversation_id"])]

    def status(self, cid: str) -> str | None:
        """The status that the client shows."""
        return self.list[cid]["status"] if cid in self.list else None

    async def until(self, cid: str, **wanted: Any) -> dict[str, Any]:
        """Wait until the client shows this of a conversation."""

        def matches() -> dict[str, Any] | None:
            found = self.list.get(cid, {})
            return found if all(found.get(key) == value for key, value in wanted.items()) else None

        row = await wait_until(matches, f"the list shows {cid} with {wanted}")
        assert row is not None
        return row


async def follow(
    cluster: InProcessCluster, node: int, user: str = "u", connection: str = "l", begin: bool = True
) -> Follower:
    """A client of the list of `user` on a node."""
    sink = Follower()
    await cluster[node].follow_list(user, f"{connection}{node}", shown, sink=sink)
    if begin:
        cluster[node].begin_replay(f"{connection}{node}")
    return sink


async def make(cluster: InProcessCluster, node: int, cid: str, user: str = "u") -> None:
    await cluster[node].maybe_start_agent_loop(cid, user_id=user)


async def test_a_change_reaches_the_lists_of_all_nodes(make_cluster: MakeCluster) -> None:
    cluster = await make_cluster(echo)
    lists = [await follow(cluster, node) for node in range(3)]
    await make(cluster, 0, "c")
    owner = cluster.owner_of("c")
    for one in lists:
        row = await one.until("c", status="idle", node=f"node-{owner}")
        assert row["user_id"] == "u"
        assert one.changes("c")[0] == "created"
    await cluster[1].set_metadata("c", {"title": "new"})
    for one in lists:
        await one.until("c", metadata={"title": "new"}, change="changed")
    await cluster[2].close_session("c")
    for one in lists:
        await one.until("c", status="stopped", node="", change="stopped")
    await cluster[1].resume("c")
    for one in lists:
        await one.until("c", status="hibernated", change="changed")
    await cluster[1].delete("c")
    for one in lists:
        await wait_until(lambda o=one: o.changes("c")[-1] == "deleted", "it is gone from the list")
        assert one.list == {}
        last = one.named("conversation")[-1]
        assert set(last) == {field.name for field in dataclasses.fields(AgentLoopInfo)} | {"change"}


async def test_work_shows(make_cluster: MakeCluster) -> None:
    gate = Gate()
    cluster = await make_cluster(gate)
    one, other = await follow(cluster, 0), await follow(cluster, 1)
    await make(cluster, 0, "c")
    await cluster[0].send_event_to_conversation("c", {"text": "hi"})
    for client in (one, other):
        await client.until("c", status="running", busy=True)
    gate.open.set()
    for client in (one, other):
        await client.until("c", status="idle", busy=False)


async def test_the_beginning_is_what_is_there(make_cluster: MakeCluster) -> None:
    cluster = await make_cluster(echo)
    for cid in ("c0", "c1", "c2"):
        await make(cluster, 0, cid)
    await cluster[0].close_session("c1")
    await make(cluster, 1, "other", user="v")
    one = await follow(cluster, 2)
    await wait_until(lambda: len(one.list) == 3, "all three are listed")
    assert one.changes() == ["snapshot"] * 3
    assert one.status("c1") == "stopped"
    # Nobody else's, ever.
    await cluster[1].set_metadata("other", {"a": 1})
    await make(cluster, 1, "c3")
    await one.until("c3", status="idle")
    assert "other" not in one.list


async def test_the_beginning_has_what_is_loaded_besides_the_newest(
    make_cluster: MakeCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listing, "NEWEST", 2)
    cluster = await make_cluster(echo, limit=1)
    await make(cluster, 0, "old")
    for number in range(3):
        # Evicted by the next one, but for the last.
        await make(cluster, 0, f"c{number}")
    gate = await follow(cluster, 1)
    await wait_until(lambda: len(gate.list) == 2, "the newest are listed")
    assert set(gate.list) == {"c1", "c2"}
    # Older ones are told of when something happens to them: that is no creation.
    await cluster[2].set_metadata("old", {"a": 1})
    await gate.until("old", metadata={"a": 1}, change="changed")
    await cluster[2].send_event_to_conversation("old", "wake up")
    await gate.until("old", status="idle")
    monkeypatch.setattr(listing, "NEWEST", 0)
    loaded = await follow(cluster, 2)
    await loaded.until("old", change="snapshot")
    assert set(loaded.list) == {"old"}


async def test_nothing_is_told_before_it_may_be_and_nothing_falls_between(make_cluster: MakeCluster) -> None:
    cluster = await make_cluster(echo)
    await make(cluster, 0, "c0")
    one = await follow(cluster, 1, begin=False)
    await make(cluster, 0, "c1")
    await cluster[0].delete("c0")
    assert one.sent == []
    cluster[1].begin_replay("l1")
    await one.until("c1", status="idle")
    assert set(one.list) == {"c1"}


async def test_owners_move(make_cluster: MakeCluster) -> None:
    cluster = await make_cluster(echo, nodes=3)
    lists = {node: await follow(cluster, node) for node in (1, 2)}
    await make(cluster, 0, "idle")
    await make(cluster, 0, "loved")
    assert cluster.owner_of("idle") == cluster.owner_of("loved") == 0
    sink = RecordingSink()
    await cluster[1].join_conversation("loved", "client", user_id="u", sink=sink)
    for one in lists.values():
        await one.until("idle", node="node-0")
    await cluster.kill(0)
    for one in lists.values():
        await one.until("loved", status="idle", node="node-1")
        # Nobody needs it: it is only taken out of the dead node's hands.
        await one.until("idle", status="hibernated", node="")


async def test_what_was_lost_on_the_way_is_told_after_comparing(make_cluster: MakeCluster) -> None:
    stores: dict[int, Muffled] = {}

    def wrap(index: int, store: Store) -> Any:
        stores[index] = Muffled(store)
        return stores[index]

    cluster = await make_cluster(echo, nodes=2, wrap=wrap)
    one = await follow(cluster, 1)
    for cid in ("patched", "stopped", "deleted"):
        await make(cluster, 0, cid)
        await one.until(cid, status="idle")
    stores[0].lost = True
    await cluster[0].set_metadata("patched", {"a": 1})
    await cluster[0].close_session("stopped")
    await cluster[0].delete("deleted")
    await make(cluster, 0, "created")
    told = [f'"{cid}"'.encode() for cid in ("patched", "stopped", "deleted", "created")]
    await wait_until(lambda: all(cid in stores[0].swallowed for cid in told), "everything was published, in vain")
    assert [one.status(cid) for cid in ("patched", "stopped", "deleted", "created")] == ["idle"] * 3 + [None]
    stores[0].lost = False
    # The next batch shows the gap.
    await make(cluster, 0, "later", user="v")
    await one.until("patched", metadata={"a": 1})
    await one.until("stopped", status="stopped", change="stopped")
    await one.until("created", status="idle", change="created")
    await wait_until(lambda: "deleted" not in one.list, "the deleted one is gone")
    assert one.changes("deleted")[-1] == "deleted"


async def test_a_reconnect_is_enough_to_look_again(make_cluster: MakeCluster) -> None:
    stores: dict[int, Muffled] = {}

    def wrap(index: int, store: Store) -> Any:
        stores[index] = Muffled(store)
        return stores[index]

    cluster = await make_cluster(echo, nodes=2, wrap=wrap)
    one = await follow(cluster, 1)
    await make(cluster, 0, "c")
    await one.until("c", status="idle")
    stores[0].lost = True
    await cluster[0].set_metadata("c", {"a": 1})
    await wait_until(lambda: b'"c"' in stores[0].swallowed, "it was published, in vain")
    assert one.list["c"]["metadata"] == {}
    stores[1].reconnected()
    await one.until("c", metadata={"a": 1})


async def test_a_slow_client_gets_the_latest_and_no_queue_grows(make_cluster: MakeCluster) -> None:
    cluster = await make_cluster(echo)
    await make(cluster, 0, "c")
    slow, quick = await follow(cluster, 1, connection="slow"), await follow(cluster, 1, connection="quick")
    await slow.until("c", status="idle")
    slow.gate.clear()
    for number in range(20):
        await cluster[1].set_metadata("c", {"n": number})
        await quick.until("c", metadata={"n": number})
    assert len(slow.named("conversation")) == len(slow.changes("c")) <= 3
    slow.gate.set()
    await slow.until("c", metadata={"n": 19})
    assert len(slow.changes("c")) <= 4


async def test_a_user_with_more_than_can_be_remembered(
    make_cluster: MakeCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listing, "MAX_KNOWN", 4)
    monkeypatch.setattr(listing, "PAGE", 2)
    cluster = await make_cluster(echo, nodes=2, limit=2)
    one = await follow(cluster, 1)
    for number in range(12):
        await make(cluster, 0, f"c{number}")
    statuses = ["hibernated"] * 10 + ["idle"] * 2
    await wait_until(lambda: sorted(row["status"] for row in one.list.values()) == statuses, "all are listed")
    for number in range(12):
        await cluster[0].delete(f"c{number}")
    await wait_until(lambda: not one.list, "all are gone from the list")


async def test_more_changes_than_a_slow_client_may_have_waiting(
    make_cluster: MakeCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listing, "MAX_DIRTY", 2)
    cluster = await make_cluster(echo, nodes=1, limit=10)
    for number in range(8):
        await make(cluster, 0, f"c{number}")
    slow = await follow(cluster, 0)
    await wait_until(lambda: len(slow.list) == 8, "all are listed")
    slow.gate.clear()
    for number in range(8):
        await cluster[0].set_metadata(f"c{number}", {"n": number})
    await cluster[0].delete("c3")
    slow.gate.set()
    await wait_until(lambda: "c3" not in slow.list, "the deleted one is gone")
    for number in (0, 1, 2, 4, 5, 6, 7):
        await slow.until(f"c{number}", metadata={"n": number})


async def test_a_new_owner_of_an_id_is_none_of_the_old_ones_business(make_cluster: MakeCluster) -> None:
    cluster = await make_cluster(echo, nodes=2)
    one, other = await follow(cluster, 1, "u", "u"), await follow(cluster, 1, "v", "v")
    await make(cluster, 0, "c")
    await one.until("c", status="idle")
    await cluster[0].delete("c")
    await make(cluster, 0, "c", user="v")
    await other.until("c", status="idle")
    await wait_until(lambda: one.changes("c")[-1] == "deleted", "it is gone from the old list")
    assert {p["user_id"] for p in one.named("conversation")} == {"u"}
    assert {p["user_id"] for p in other.named("conversation")} == {"v"}


async def test_a_refused_start_is_not_listed_for_good(make_cluster: MakeCluster) -> None:
    gate = Gate()
    cluster = await make_cluster(gate, limit=1)
    one = await follow(cluster, 1)
    await make(cluster, 0, "c")
    await cluster[0].send_event_to_conversation("c", "work")
    await one.until("c", status="running")
    with pytest.raises(Exception, match="1 of 1"):
        await make(cluster, 2, "refused")
    await make(cluster, 0, "x", user="v")
    await cluster[0].set_metadata("c", {"a": 1})
    await one.until("c", metadata={"a": 1})
    await wait_until(lambda: "refused" not in one.list, "the refused one is not listed")
    gate.open.set()


async def test_who_leaves_is_forgotten(make_cluster: MakeCluster) -> None:
    cluster = await make_cluster(echo)
    one = await follow(cluster, 0)
    again = await follow(cluster, 0)
    await make(cluster, 0, "c")
    await again.until("c", status="idle")
    assert one.sent == [], "the second one took its place"
    await cluster[0].disconnect_from_session("l0")
    await cluster[0].disconnect_from_session("l0")
    before = len(again.sent)
    late = await follow(cluster, 0, connection="late")
    await cluster[1].set_metadata("c", {"a": 1})
    await late.until("c", metadata={"a": 1})
    assert len(again.sent) == before


async def test_a_client_that_cannot_be_written_to_is_sent_away(
    make_cluster: MakeCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster = await make_cluster(echo)
    one = await follow(cluster, 0, begin=False)

    async def fail(*_: Any) -> None:
        raise RuntimeError("broken pipe")

    monkeypatch.setattr(one, "send", fail)
    await make(cluster, 0, "c")
    cluster[0].begin_replay("l0")
    async with asyncio.timeout(20):
        await one.disconnected.wait()


@pytest.mark.parametrize("user", ["", "a b"])
async def test_a_list_is_somebodys(make_cluster: MakeCluster, user: str) -> None:
    cluster = await make_cluster(echo, nodes=1)
    with pytest.raises(InvalidRequest):
        await cluster[0].follow_list(user, "l", shown, sink=RecordingSink())
