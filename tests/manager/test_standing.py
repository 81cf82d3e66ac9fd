"""The status that clients are told: from the log, and from what the log does not show.

The conversation is owned by a script that takes the store's steps one by one, as any node may in any order.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from convener.core.model import NewMessage
from convener.testing.cluster import QUICK, InProcessCluster, RecordingSink
from tests.manager.conftest import MakeCluster, join
from tests.manager.writing import Owner, done, sees, set_up
from tests.support.waiting import wait_until

pytestmark = pytest.mark.anyio

ASK: dict[str, Any] = {"ask_id": "t1.1", "prompt": "Really?", "schema": None, "deadline": None}


async def owned(make_cluster: MakeCluster) -> tuple[InProcessCluster, Owner]:
    cluster = await make_cluster(None, nodes=2)
    owner = Owner(cluster[0].engine.node.store, "c")
    await owner.create()
    await owner.claim()
    return cluster, owner


async def reader(cluster: InProcessCluster, node: int = 1, name: str = "s") -> RecordingSink:
    """A client that starts nothing."""
    sink = await join(cluster, node, "c", name, user_id=None, start=False)
    await wait_until(lambda: sink.named("joined"), "joined")
    return sink


def told(sink: RecordingSink) -> tuple[str, bool]:
    """The status that the client knows, and whether it is busy."""
    last = [payload for name, payload in sink.sent if name in ("joined", "status")][-1]
    return last["status"], last["busy"]


async def knows(sink: RecordingSink, status: str, *, busy: bool = False) -> None:
    await wait_until(lambda: told(sink) == (status, busy), f"the client knows that it is {status}")


async def finish(owner: Owner) -> None:
    """Leave nothing that the auditor could complain of."""
    head = await owner.store.head("c")
    assert head is not None
    if head.status != "running":
        assert await owner.store.resume("c") == "OK"
    if not head.owner:
        await owner.claim("wake")
    head = await owner.store.head("c")
    assert head is not None
    owner.position = head.position
    if head.position > head.done:
        await owner.end("t1")
    await owner.append(done=head.position)
    assert await owner.store.release("c", owner.name, owner.epoch, owner.seq) == "OK"


async def test_a_question_makes_it_wait_until_it_is_answered(make_cluster: MakeCluster) -> None:
    cluster, owner = await owned(make_cluster)
    sink = await reader(cluster)
    turn = await owner.take()
    await owner.begin(turn)
    await knows(sink, "running", busy=True)
    await owner.append(("ask", turn, ASK), asks=(("t1.1", "{}"),))
    await knows(sink, "waiting")
    late = await reader(cluster, name="late")
    assert told(late) == ("waiting", False)
    assert (await owner.store.answer("c", "t1.1", NewMessage("a", "", "1"))).outcome == "OK"
    owner.position += 1
    await owner.append(("answer", turn, {"ask_id": "t1.1", "message_id": "a", "user_id": "", "data": 1}))
    for each in (sink, late):
        await knows(each, "running", busy=True)
    await owner.end(turn)
    await knows(sink, "idle")
    await finish(owner)


async def test_every_question_counts(make_cluster: MakeCluster) -> None:
    cluster, owner = await owned(make_cluster)
    turn = await owner.take()
    await owner.begin(turn)
    second = ASK | {"ask_id": "t1.2"}
    await owner.append(("ask", turn, ASK), ("ask", turn, second), asks=(("t1.1", "{}"), ("t1.2", "{}")))
    # Its answer is accepted, but not in the log yet: what is answered is known by its name, not by its number.
    assert (await owner.store.answer("c", "t1.2", NewMessage("a", "", "1"))).outcome == "OK"
    sink = await reader(cluster)
    assert told(sink) == ("waiting", False)
    owner.position += 1
    await owner.append(("answer", turn, {"ask_id": "t1.2", "message_id": "a", "user_id": "", "data": 1}))
    await wait_until(lambda: sink.events[-1]["kind"] == "answer", "the answer is in the log")
    assert told(sink) == ("waiting", False)
    await owner.end(turn)
    await knows(sink, "idle")
    await finish(owner)


async def test_who_waits_for_a_person_may_be_released(make_cluster: MakeCluster) -> None:
    cluster, owner = await owned(make_cluster)
    sink = await reader(cluster)
    turn = await owner.take()
    pen = await owner.begin(turn)
    await pen.write("I wonder whether")
    await sees(sink, "I wonder whether")
    await owner.append(("ask", turn, ASK), asks=(("t1.1", "{}"),))
    await knows(sink, "waiting")
    view = cluster[1].engine.views.get("c")
    assert view is not None
    assert view.loaded
    assert await owner.store.release("c", owner.name, owner.epoch, owner.seq) == "OK"
    await wait_until(lambda: not view.loaded, "the release is heard of")
    assert told(sink) == ("waiting", False)
    late = await reader(cluster, name="late")
    assert told(late) == ("waiting", False)
    assert late.named("joined")[0]["node"] == ""
    # It is begun again when the answer has come.
    assert (await owner.store.answer("c", "t1.1", NewMessage("a", "", "1"))).outcome == "OK"
    await owner.claim("wake")
    owner.position += 1
    await owner.append(("answer", turn, {"ask_id": "t1.1", "message_id": "a", "user_id": "", "data": 1}))
    again = await owner.begin(turn, 2)
    await again.write("Now I know")
    for each in (sink, late):
        await knows(each, "running", busy=True)
        await sees(each, "Now I know")
    await finish(owner)


@pytest.mark.parametrize(("closing", "status"), [("failed", "failed"), ("held", "waiting")])
@pytest.mark.parametrize("heard", ["published", "only in the head"])
async def test_a_conversation_that_waits_for_resume(
    make_cluster: MakeCluster, closing: str, status: str, heard: str
) -> None:
    cluster, owner = await owned(make_cluster)
    turn = await owner.take()
    await owner.begin(turn)
    sink = await reader(cluster)
    assert told(sink) == ("running", True)
    events: list[tuple[str, str, Any]] = []
    if closing == "failed":
        events = [("turn_failed", turn, {"code": "too_many_takeovers", "message": "", "settles": [1]})]
    await owner.append(*events, done=len(events), base=owner.seq, ends_turn=bool(events), closing=closing)
    view = cluster[1].engine.views.get("c")
    assert view is not None
    if heard == "published":
        text = f'{{"t":"status","epoch":{owner.epoch},"status":"{status}"}}'
        await owner.store.publish(owner.store.channel("c", "c"), text.encode())
    elif not events:
        # Nothing was published at all; whatever makes the node look shows it.
        view.fall_behind()
    await knows(sink, status)
    late = await reader(cluster, 0, "late")
    assert told(late) == (status, False)
    assert await owner.store.resume("c") == "OK"
    for each in (sink, late):
        await knows(each, "hibernated")
    await owner.claim("wake")
    for each in (sink, late):
        await knows(each, "idle")
    await finish(owner)


async def test_a_turn_that_is_held_after_a_crash_makes_it_wait(make_cluster: MakeCluster) -> None:
    setting = await set_up(make_cluster, options=dataclasses.replace(QUICK, recovery="wait"))
    pen = await setting.pen()
    await pen.write("cut o")
    sinks = [await join(setting.cluster, node, "c", f"s{node}") for node in setting.others()]
    for sink in sinks:
        await sees(sink, "cut o")
    await setting.cluster.kill(setting.owner)
    for sink in sinks:
        await knows(sink, "waiting")
    # What was written last is still there for whoever has to decide.
    late = await join(setting.cluster, setting.rest()[0], "c", "late")
    await sees(late, "cut o")
    assert told(late) == ("waiting", False)

    def nobody_lists_it() -> bool:
        return not any(list(manager.engine.node.directory.listed()) for manager in setting.cluster)

    await wait_until(nobody_lists_it, "no node takes it for loaded")
    assert await setting.cluster[setting.rest()[0]].resume("c") == "resumed"
    again = await setting.pen(attempt=2)
    await again.write("Once more")
    for sink in (*sinks, late):
        await sees(sink, "Once more")
    setting.typist.finish(again)
    for sink in (*sinks, late):
        await done(sink)


async def test_a_missed_resume_is_found_out(make_cluster: MakeCluster) -> None:
    cluster, owner = await owned(make_cluster)
    turn = await owner.take()
    await owner.begin(turn)
    await owner.append(closing="held")
    sink = await reader(cluster)
    assert told(sink) == ("waiting", False)
    view = cluster[1].engine.views.get("c")
    assert view is not None
    store = cluster[1].engine.node.store
    await store.unsubscribe(view.channel)
    assert await owner.store.resume("c") == "OK"
    await store.subscribe(view.channel, view.on_publication, view.on_gap)
    view.on_gap()
    await knows(sink, "hibernated")
    await finish(owner)


async def test_a_release_that_comes_while_a_node_begins_to_look_is_not_overlooked(make_cluster: MakeCluster) -> None:
    cluster, owner = await owned(make_cluster)
    store = cluster[1].engine.node.store
    asked = store.head

    async def head(cid: str) -> Any:
        found = await asked(cid)
        if found is not None and found.owner:
            # Just after it was read; the publication is here before the answer is.
            assert await owner.store.release("c", owner.name, owner.epoch, owner.seq) == "OK"
            view = cluster[1].engine.views.get("c")
            assert view is not None
            text = f'{{"t":"status","epoch":{owner.epoch},"status":"hibernated"}}'
            view.on_publication(text.encode())
        return found

    store.head = head
    try:
        sink = await reader(cluster)
        await knows(sink, "hibernated")
    finally:
        store.head = asked


async def test_statuses_that_nobody_knows_and_old_ones_change_nothing(make_cluster: MakeCluster) -> None:
    cluster, owner = await owned(make_cluster)
    sink = await reader(cluster)
    view = cluster[1].engine.views.get("c")
    assert view is not None
    channel = owner.store.channel("c", "c")
    for epoch, status in ((owner.epoch, "sleeping"), (owner.epoch - 1, "hibernated"), (owner.epoch - 1, "failed")):
        await owner.store.publish(channel, f'{{"t":"status","epoch":{epoch},"status":"{status}"}}'.encode())
    await owner.store.publish(channel, b'{"t":"something new","epoch":1}')
    await owner.append(("note", "", 1))
    await wait_until(lambda: sink.events[-1]["kind"] == "note", "the entry after them has come")
    assert told(sink) == ("idle", False)
    assert sink.named("status") == []
    await finish(owner)


async def test_a_stopped_one_that_is_opened_again_elsewhere(make_cluster: MakeCluster) -> None:
    cluster, owner = await owned(make_cluster)
    assert await owner.store.release("c", owner.name, owner.epoch, owner.seq) == "OK"
    assert (await owner.store.stop("c", "x~1", "enough", "")).outcome == "STOPPED"
    sink = await reader(cluster)
    assert told(sink) == ("stopped", False)
    assert await owner.store.resume("c") == "OK"
    await knows(sink, "hibernated")
    await owner.claim("wake")
    await knows(sink, "idle")
    await finish(owner)
