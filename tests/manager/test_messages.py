"""The three coroutine methods by which nodes hear of each other (`_redis_subscribe` and its two siblings)."""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec
import pytest

from tests.manager.conftest import MakeCluster, join
from tests.manager.test_cluster import echo
from tests.support.waiting import wait_until

pytestmark = pytest.mark.anyio


def update(kind: str, cid: str, **fields: Any) -> dict[str, Any]:
    return {"type": kind, "conversation_id": cid, "source_node": "other~1", **fields}


async def test_a_new_conversation_becomes_known(make_cluster: MakeCluster) -> None:
    cluster = await make_cluster(echo)
    assert not await cluster[0].is_agent_loop_running("c")
    await cluster[0]._process_message(update("new_conversation", "c", user_id="u", new_status="idle"))
    assert await cluster[0].is_agent_loop_running("c")
    assert await cluster[0].get_running_agent_loops("u") == {"c"}
    await cluster[0]._process_message(update("new_conversation", "bare"))
    assert await cluster[0].is_agent_loop_running("bare")


async def test_a_status_update_changes_the_cache_and_reaches_this_nodes_clients(make_cluster: MakeCluster) -> None:
    cluster = await make_cluster(echo)
    sink = await join(cluster, 0, "c", "s")
    await wait_until(lambda: sink.named("joined"), "joined")
    await cluster[0]._process_message(update("status_update", "c", new_status="draining"))
    await wait_until(lambda: _last(sink) == "draining", "the client is told")
    epoch = (await cluster[0].describe("c")).epoch
    await cluster[0]._process_message(update("status_update", "c", new_status="idle", epoch=epoch))
    await wait_until(lambda: _last(sink) == "idle", "the client is told")
    await cluster[0]._process_message(update("status_update", "x", new_status="running", epoch=5, user_id="u"))
    assert await cluster[0].is_agent_loop_running("x")
    await cluster[0]._process_message(update("status_update", "x", new_status="hibernated", epoch=5))
    assert not await cluster[0].is_agent_loop_running("x")


def _last(sink: Any) -> str | None:
    statuses = sink.named("status")
    return statuses[-1]["status"] if statuses else None


async def test_an_older_epoch_does_not_replace_a_newer_record(make_cluster: MakeCluster) -> None:
    cluster = await make_cluster(echo)
    await cluster[0]._process_message(update("status_update", "c", new_status="running", epoch=7, user_id="new"))
    await cluster[0]._process_message(update("status_update", "c", new_status="idle", epoch=6, user_id="old"))
    infos = await cluster[0].get_agent_loop_info()
    assert [(i.epoch, i.user_id, i.status) for i in infos] == [(7, "new", "running")]


async def test_a_stop_removes_the_entry_and_disconnects(make_cluster: MakeCluster) -> None:
    cluster = await make_cluster(echo)
    sink = await join(cluster, 1, "c", "s")
    await wait_until(lambda: sink.named("joined"), "joined")
    await cluster[0]._process_message(update("new_conversation", "c"))
    assert await cluster[0].is_agent_loop_running("c")
    await cluster[1]._process_message(update("conversation_stopped", "c", reason="gone"))
    await asyncio.wait_for(sink.disconnected.wait(), 20)
    assert sink.named("stopped")[0]["reason"] == "gone"
    await cluster[0]._process_message(update("conversation_stopped", "c"))
    found = cluster[0].engine.node.directory.find("c")
    assert found is None or not found[0].startswith("other")


MALFORMED: list[Any] = [
    {},
    {"type": "status_update"},
    {"type": 5, "conversation_id": "c", "source_node": "n"},
    {"type": "status_update", "conversation_id": None, "source_node": "n"},
    {"type": "status_update", "conversation_id": "c", "source_node": "n", "new_status": 7},
    {"type": "status_update", "conversation_id": "c", "source_node": "n", "new_status": "idle", "epoch": "x"},
    {"type": "unheard_of", "conversation_id": "c", "source_node": "n"},
]


@pytest.mark.parametrize("message", MALFORMED, ids=str)
async def test_a_malformed_message_is_counted_and_skipped(make_cluster: MakeCluster, message: Any) -> None:
    cluster = await make_cluster(echo, nodes=1)
    await cluster[0]._process_message(message)
    counted = cluster[0].metrics.registry.get_sample_value("convener_malformed_total", {"where": "sync"})
    assert counted == 1


async def test_garbage_on_every_channel_makes_nobody_deaf(make_cluster: MakeCluster) -> None:
    cluster = await make_cluster(echo)
    sink = await join(cluster, 0, "c", "s")
    store = cluster[2].engine.node.store
    garbage = [b"", b"\xff\x00", b"null", b"[]", b'{"t":5}', b'{"t":"state","messages":5}', b"{" * 5000, b'{"t":"log"}']
    garbage += [b'{"t":"in","pos":99}', b'{"t":"log","epoch":1,"seq":99,"events":[5]}', b'{"t":"req","id":"x"}']
    channels = [store.channel("sync"), store.channel("c", "c")]
    channels += [store.channel("n", m.engine.node.incarnation) for m in cluster]
    for channel in channels:
        for raw in garbage:
            await store.publish(channel, raw)
    await cluster[1].send_event_to_conversation("c", {"text": "x"})
    await wait_until(lambda: sink.replies() == [{"text": "x"}], "the conversation goes on")
    await cluster[2].maybe_start_agent_loop("d", user_id="u2")
    await wait_until(lambda: cluster[0].is_agent_loop_running("d"), "the directory goes on")
    assert [e["seq"] for e in sink.events] == list(range(1, len(sink.events) + 1))


async def test_update_state_writes_the_hash_and_publishes_a_batch(make_cluster: MakeCluster) -> None:
    cluster = await make_cluster(echo)
    heard: list[Any] = []
    peer = cluster[1].engine.node.store
    await peer.unsubscribe(peer.channel("sync"))

    def hear(raw: bytes) -> None:
        heard.append(msgspec.json.decode(raw))

    await peer.subscribe(peer.channel("sync"), hear, lambda: None)
    await cluster[0].maybe_start_agent_loop("c", user_id="u")
    await cluster[0]._update_state_in_redis()
    incarnation = cluster[0].engine.node.incarnation
    version, records, _ = await peer.node_records(incarnation)
    assert [(r.conversation_id, r.user) for r in records] == [("c", "u")]
    await wait_until(lambda: any(m["t"] == "state" for m in heard), "a batch is published")
    batches = [m for m in heard if m["t"] == "state" and m["node"] == incarnation]
    assert [b["ver"] for b in batches] == list(range(1, len(batches) + 1))
    assert version >= batches[-1]["ver"]
    messages = [m for b in batches for m in b["messages"]]
    assert messages[0]["type"] == "conversation_changed", "it was created"
    first = next(m for m in messages if m["type"] != "conversation_changed")
    assert first["type"] == "new_conversation"
    assert first["conversation_id"] == "c"
    assert first["source_node"] == incarnation


async def test_a_gap_in_the_versions_is_reconciled(make_cluster: MakeCluster) -> None:
    cluster = await make_cluster(echo)
    await cluster[0].maybe_start_agent_loop("c", user_id="u")
    await wait_until(lambda: cluster[1].is_agent_loop_running("c"), "the other node knows it")
    directory = cluster[1].engine.node.directory
    incarnation = cluster[0].engine.node.incarnation
    directory.forget(incarnation)
    assert not await cluster[1].is_agent_loop_running("c")
    await cluster[0].maybe_start_agent_loop("d", user_id="u")
    await wait_until(lambda: cluster[1].is_agent_loop_running("c"), "the missing record is read from the hash")
