"""Alarms: a message at a time, once, late rather than never, whatever happens to the nodes."""

from __future__ import annotations

import asyncio
import dataclasses
import datetime
from typing import Any

import pytest

from convener.errors import ConvenerError
from convener.manager.conversation import Conversation
from convener.manager.timers import due_at
from convener.manager.turn import Turn
from convener.testing.cluster import QUICK, FunctionAgent, InProcessCluster
from tests.manager.conftest import MakeCluster
from tests.manager.people import (
    asked,
    head_of,
    hibernated,
    keys_of,
    log_of,
    no_timer_is_due,
    replies_of,
    settled,
    store_of,
)
from tests.manager.stepped import Stepped
from tests.manager.test_recovery_modes import mode
from tests.support.waiting import wait_until

pytestmark = pytest.mark.anyio

DAY = datetime.timedelta(days=1)


class Clock:
    """An agent that sets alarms: ``{"set": [[when, data], …]}``, takes them back: ``{"drop": [id, …]}``, and notes
    what it is called with. Its method `set` does the same as the first.
    """

    def __init__(self) -> None:
        self.rang: list[tuple[str, Any]] = []
        self.set: list[str] = []
        self.dropped: list[bool] = []
        self.open = asyncio.Event()
        self.open.set()

    @property
    def agent(self) -> FunctionAgent:
        async def set_(conversation: Conversation, params: Any) -> Any:
            return [await conversation.schedule(when, data) for when, data in params]

        async def drop(conversation: Conversation, params: Any) -> Any:
            return [await conversation.unschedule(alarm_id) for alarm_id in params]

        return FunctionAgent(self.answer, {"set": set_, "drop": drop})

    async def answer(self, turn: Turn) -> None:
        await self.open.wait()
        if turn.reason == "alarm" or turn.input.message_id.startswith("alarm/"):
            self.rang.append((turn.input.message_id, turn.data))
            await turn.reply({"rang": turn.data, "reason": turn.reason})
            return
        for when, data in turn.data.get("set", ()):
            self.set.append(await turn.conversation.schedule(when, data))
        for alarm_id in turn.data.get("drop", ()):
            self.dropped.append(await turn.conversation.unschedule(alarm_id))


async def started(cluster: InProcessCluster, message: Any = None, cid: str = "c", node: int = 0) -> None:
    await cluster[node].maybe_start_agent_loop(cid, user_id="u", initial_user_msg=message)


async def rings(cluster: InProcessCluster, cid: str = "c") -> list[Any]:
    """Data of the alarms in the log."""
    return [e["data"]["data"] for e in await log_of(cluster, cid) if e["kind"] == "input" and "alarm" in e["data"]]


async def rung(cluster: InProcessCluster, clock: Clock, count: int) -> None:
    """Return when so many alarms were answered, and nothing of them is left."""
    await wait_until(lambda: len(clock.rang) == count, f"{count} alarms ring")
    await settled(cluster, "c")
    await no_timer_is_due(cluster, "c")
    assert await store_of(cluster).alarms("c") == {}


async def test_it_rings_once_and_says_what_it_was_told(make_cluster: MakeCluster) -> None:
    cluster = await make_cluster((clock := Clock()).agent, nodes=4)
    data: list[Any] = [{"n": n} for n in range(20)] + [None, "text", [1, {"a": None}]]
    await started(cluster, {"set": [[0.01, d] for d in data]})
    await rung(cluster, clock, 23)
    assert clock.set == [f"alarm/t1.{n}" for n in range(1, 24)]
    assert sorted(clock.rang, key=str) == sorted(zip(clock.set, data, strict=True), key=str)
    events = [e for e in await log_of(cluster, "c") if e["kind"] == "input"][1:]
    assert {e["data"]["user_id"] for e in events} == {"u"}
    assert all(e["data"]["alarm"] is True for e in events)
    assert {r["reason"] for r in await replies_of(cluster, "c")} == {"alarm"}
    # It has gone through the inbox, like any message.
    head = await head_of(cluster, "c")
    assert head.position == 24


async def test_it_does_not_ring_before_its_time(make_cluster: MakeCluster) -> None:
    cluster = await make_cluster((clock := Clock()).agent)
    await started(cluster, {"set": [[86_400, "tomorrow"], [0, "now"]]})
    await wait_until(lambda: clock.rang, "the one that is due rings")
    await settled(cluster, "c")
    assert clock.rang == [("alarm/t1.2", "now")]
    assert await store_of(cluster).alarms("c") == {"alarm/t1.1": '"tomorrow"'}


async def test_late_rather_than_never(make_cluster: MakeCluster) -> None:
    cluster = await make_cluster((clock := Clock()).agent, nodes=2)
    await started(cluster, {"set": [[0.3, "late"]]})
    await settled(cluster, "c")
    for node in range(2):
        await cluster.kill(node)
    assert clock.rang == []
    await cluster.add()
    await rung(cluster, clock, 1)
    await unowned_by_the_dead(cluster)


async def unowned_by_the_dead(cluster: InProcessCluster) -> None:
    async def is_clean() -> bool:
        slots = await store_of(cluster).slots("u")
        return {s.incarnation for s in slots.values()} <= {m.engine.node.incarnation for m in cluster}

    await wait_until(is_clean, "no slot names a node that is gone")


async def test_it_wakes_a_conversation(make_cluster: MakeCluster) -> None:
    cluster = await make_cluster((clock := Clock()).agent)
    await started(cluster, {"set": [[0.4, "wake up"]]})
    await settled(cluster, "c")
    await hibernated(cluster, "c")
    await rung(cluster, clock, 1)
    assert [e["data"]["reason"] for e in await log_of(cluster, "c") if e["kind"] == "open"] == ["start", "alarm"]
    assert (await replies_of(cluster, "c"))[0]["reason"] == "alarm"


async def test_it_waits_for_a_slot(make_cluster: MakeCluster) -> None:
    options = dataclasses.replace(QUICK, limit_policy="reject")
    cluster = await make_cluster((clock := Clock()).agent, limit=1, options=options)
    await started(cluster, {"set": [[0.3, "wake up"]]})
    await settled(cluster, "c")
    await hibernated(cluster, "c")
    await started(cluster, cid="other", node=1)

    async def is_queued() -> bool:
        return [w.conversation_id for w in await store_of(cluster).waiting("u")] == ["c"]

    await wait_until(is_queued, "its start waits")
    await cluster[2].close_session("other")
    await rung(cluster, clock, 1)


async def test_any_node_sees_to_it_if_the_one_whose_part_it_is_does_not(
    make_cluster: MakeCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("convener.manager.timers.OTHERS_AFTER_MS", 200)
    monkeypatch.setattr("convener.manager.timers.OTHERS_EVERY", 1)
    stepped = Stepped(make_cluster)
    cluster = await stepped.start((clock := Clock()).agent, limit=100)
    for store in stepped.stores[:2]:
        store.down.add("due_timers")
    # In all of the parts into which timers are divided.
    cids = [f"c{n}" for n in range(40)]
    for cid in cids:
        await started(cluster, {"set": [[0, cid]]}, cid)
    await wait_until(lambda: len(clock.rang) == 40, "all ring")
    assert sorted(data for _, data in clock.rang) == sorted(cids)


# -- the turn that sets it is repeated


@pytest.mark.parametrize("after", ["set_alarm", "set_timer", "append"])
@pytest.mark.parametrize("due", [0, 1.5], ids=["due at once", "due later"])
async def test_a_repeated_turn_does_not_set_it_twice(make_cluster: MakeCluster, after: str, due: float) -> None:
    stepped = Stepped(make_cluster)
    cluster = await stepped.start((clock := Clock()).agent)

    def is_meant(*arguments: Any) -> bool:
        return after != "append" or '"convener.schedule"' in str(arguments[1].events)

    at = stepped.stores[0].hold_reply(after, is_meant)
    await started(cluster, {"set": [[due, "once"]]})
    await asyncio.wait_for(at.reached.wait(), 20)
    if after == "set_alarm" and not due:
        # It rings while the turn that sets it has not heard that it is set.
        await wait_until(lambda: is_recorded(cluster, "alarm/t1.1"), "it has rung")
    await cluster.kill(0)
    await rung(cluster, clock, 1)
    assert clock.rang == [("alarm/t1.1", "once")]
    assert await rings(cluster) == ["once"]
    assert set(clock.set) == {"alarm/t1.1"}


async def is_recorded(cluster: InProcessCluster, message_id: str) -> bool:
    (position,) = await store_of(cluster).seen("c", [message_id])
    return position is not None


@pytest.mark.parametrize("step", ["set_alarm", "set_timer", "fire", "clear_timer"])
@pytest.mark.parametrize("fault", ["lose", "lose_reply", "repeat", "late"])
async def test_with_lost_commands(make_cluster: MakeCluster, step: str, fault: str) -> None:
    stepped = Stepped(make_cluster)
    faults: list[Any] = []
    stepped.prepare = lambda store: faults.append(getattr(store, fault)(step))
    cluster = await stepped.start((clock := Clock()).agent)
    await started(cluster, {"set": [[0.2, "once"]]})
    await rung(cluster, clock, 1)
    hit = [f for f in faults if f.reached.is_set()]
    assert hit
    if fault == "late":
        for late in hit:
            await late.land()
        await rung(cluster, clock, 1)
    assert await rings(cluster) == ["once"]


@pytest.mark.parametrize("after", ["set_timer", "set_alarm"])
async def test_a_turn_that_is_cut_off_while_it_sets_one_leaves_none_that_never_rings(
    make_cluster: MakeCluster, monkeypatch: pytest.MonkeyPatch, after: str
) -> None:
    monkeypatch.setattr("convener.manager.timers.UNSET_MS", 500)
    stepped = Stepped(make_cluster)
    cluster = await stepped.start((clock := Clock()).agent, options=mode("fail"))
    at = stepped.stores[0].hold_reply(after)
    await started(cluster, {"set": [[0, "if it is set"]]})
    await asyncio.wait_for(at.reached.wait(), 20)
    await cluster.kill(0)
    await settled(cluster, "c")
    if after == "set_alarm":
        await rung(cluster, clock, 1)

    async def is_clean() -> bool:
        return not await store_of(cluster).alarms("c") and not [k for k in await keys_of(cluster) if k[:2] == "t:"]

    await wait_until(is_clean, "nothing of it is left")
    assert len(clock.rang) == (1 if after == "set_alarm" else 0)


async def test_one_that_is_set_after_it_came_due(make_cluster: MakeCluster) -> None:
    stepped = Stepped(make_cluster)
    looked_at: list[str] = []

    def is_seen(cid: str, alarm_id: str, **options: Any) -> bool:
        looked_at.append(alarm_id)
        return False

    stepped.prepare = lambda store: store.hold("fire", is_seen)
    cluster = await stepped.start((clock := Clock()).agent)
    setting = stepped.stores[0].hold("set_alarm")
    await started(cluster, {"set": [[0, "late"]]})
    await asyncio.wait_for(setting.reached.wait(), 20)
    await wait_until(lambda: len(looked_at) > 1, "it was looked at, and looked at again")
    setting.go()
    await rung(cluster, clock, 1)


async def test_a_fired_one_whose_node_dies_before_it_wakes_anybody(make_cluster: MakeCluster) -> None:
    stepped = Stepped(make_cluster)
    cluster = await stepped.start((clock := Clock()).agent, nodes=1)
    await started(cluster, {"set": [[0.4, "once"]]})
    await settled(cluster, "c")
    await hibernated(cluster, "c")
    firing = stepped.stores[0].hold_reply("fire")
    await asyncio.wait_for(firing.reached.wait(), 20)
    await cluster.add()
    await cluster.kill(0)
    await rung(cluster, clock, 1)


# -- taking it back


async def test_taking_it_back(make_cluster: MakeCluster) -> None:
    cluster = await make_cluster((clock := Clock()).agent)
    await started(cluster, {"set": [[86_400, 1], [86_400, 2], [0, 3]], "drop": ["alarm/t1.1"]})
    await wait_until(lambda: clock.rang, "the one that is due rings")
    await cluster[1].send_event_to_conversation(
        "c", {"drop": ["alarm/t1.1", "alarm/t1.2", "alarm/t1.3", "alarm/t9.9", "nothing"]}
    )
    await settled(cluster, "c")
    assert clock.dropped == [True, False, True, False, False, False]
    assert await store_of(cluster).alarms("c") == {}
    assert not [key for key in await keys_of(cluster) if key.startswith("t:")], "nothing is left to come due"
    assert clock.rang == [("alarm/t1.3", 3)]


async def test_a_deadline_of_a_question_is_no_alarm(make_cluster: MakeCluster) -> None:
    said: list[Any] = []

    async def agent(turn: Turn) -> None:
        if turn.text == "drop":
            said.append(await turn.conversation.unschedule("ask/t1.1"))
            return
        try:
            await turn.ask("?", timeout=1.0)
        except ConvenerError as error:
            said.append(error.wire_code)

    async def drop(conversation: Conversation, params: Any) -> Any:
        return await conversation.unschedule(params)

    cluster = await make_cluster(FunctionAgent(agent, {"drop": drop}))
    await started(cluster, {"text": "ask"})
    await asked(cluster, "c")
    assert await cluster[1].call("c", "drop", "ask/t1.1") is False
    await settled(cluster, "c")
    assert said == ["ask_expired"]


# -- outside a turn


async def test_outside_a_turn(make_cluster: MakeCluster) -> None:
    cluster = await make_cluster((clock := Clock()).agent)
    await started(cluster)
    (alarm_id, other) = await cluster[1].call("c", "set", [[0.1, "ring"], [1000, "not"]])
    assert alarm_id.startswith("alarm/")
    assert await cluster[2].call("c", "drop", [other]) == [True]
    assert await cluster[2].call("c", "drop", [other]) == [False]
    await rung(cluster, clock, 1)
    assert clock.rang == [(alarm_id, "ring")]
    assert await cluster[1].call("c", "drop", [alarm_id]) == [False]


async def test_a_thousand_are_enough(make_cluster: MakeCluster) -> None:
    cluster = await make_cluster((clock := Clock()).agent)
    await started(cluster)
    await cluster[0].call("c", "set", [[1000, n] for n in range(1000)])
    with pytest.raises(ConvenerError, match="1000 alarms"):
        await cluster[0].call("c", "set", [[1000, "one more"]])
    await cluster[0].send_event_to_conversation("c", {"set": [[1000, "one more"]]})
    await settled(cluster, "c")
    (failed,) = [e for e in await log_of(cluster, "c") if e["kind"] == "turn_failed"]
    assert failed["data"]["code"] == "inbox_full"
    assert clock.set == []
    await cluster[1].delete("c")
    assert await keys_of(cluster) == set()


BAD_TIMES: list[Any] = [
    *("soon", "5", None, [], {}, True, False, 1j, datetime.date(2030, 1, 1), datetime.time(12)),
    *(float("nan"), float("inf"), float("-inf"), 1e300, 10**30, datetime.timedelta.max, datetime.timedelta.min),
    datetime.datetime(2030, 1, 1),  # noqa: DTZ001 - without a zone is what is refused
    datetime.datetime.max.replace(tzinfo=datetime.UTC),
    datetime.datetime.max.replace(tzinfo=datetime.timezone(-datetime.timedelta(hours=12))),
]


@pytest.mark.parametrize("when", BAD_TIMES, ids=repr)
def test_what_is_no_time(when: Any) -> None:
    with pytest.raises(ConvenerError) as error:
        due_at(when)
    assert error.value.wire_code == "invalid_request"


def test_what_is_a_time() -> None:
    now = datetime.datetime.now(datetime.UTC)
    in_a_day = int((now + DAY).timestamp() * 1000)
    for when in (DAY, 86_400, 86_400.0, now + DAY, (now + DAY).astimezone(datetime.timezone(DAY / 3))):
        assert abs(due_at(when) - in_a_day) < 60_000
    past = (-DAY, -86_400, now - DAY, datetime.datetime.min.replace(tzinfo=datetime.UTC))
    assert all(due_at(when) < in_a_day - 86_400_000 for when in past)
    assert due_at(past[-1]) == 0


async def test_wrong_arguments_fail_the_turn_that_gives_them(make_cluster: MakeCluster) -> None:
    codes: list[str] = []

    async def bad(turn: Turn) -> None:
        for when, data in (("soon", 1), (1, object()), (1, "x" * 3000)):
            try:
                await turn.conversation.schedule(when, data)  # pyright: ignore[reportArgumentType]
            except ConvenerError as error:
                codes.append(error.wire_code)

    agent = FunctionAgent(bad, Clock().agent.methods)
    cluster = await make_cluster(agent, options=dataclasses.replace(QUICK, max_payload_bytes=2000))
    await started(cluster, {})
    await settled(cluster, "c")
    assert codes == ["invalid_request", "invalid_request", "payload_too_large"]
    with pytest.raises(ConvenerError, match="when must be"):
        await cluster[1].call("c", "set", [["soon", 1]])
    assert await store_of(cluster).alarms("c") == {}
