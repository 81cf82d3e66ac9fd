"""The scripts against the core: random steps, each done by the server and by the pure function, must agree exactly.

The functions take the time as an argument. What the server took is found out from what it wrote (`updated`, `pulse`,
the time of a burial), so even epochs and timestamps are compared to the millisecond.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass

from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from convener.core import conversation, intents
from convener.core.cursor import Cursor
from convener.core.model import (
    AppendReply,
    AppendRequest,
    ClaimRequest,
    Meta,
    NewMessage,
)
from convener.store.redis import RedisStore
from tests.store.redis.model import Model
from tests.support.waiting import wait_until

NODES = ("a~1", "b~2")
NONCES = ("p", "q")
IDS = ("m1", "m2", "m3", "m4")
ASKS = ("t1.1", "t1.2", "t12.1", "t7")
# One of them is an id of a message, too.
ALARMS = ("m4", "alarm/1", "alarm/2")
TEXTS = ('{"x":1}', '"é 😀"', '"a/b\\\\"', "[" + "1," * 5000 + "1]")

# -- one conversation ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Op:
    """A step, with arguments relative to what the conversation is at then: 0 is right, others are stale or early."""

    name: str
    node: int = 0
    nonce: int = 0
    id: int = 0
    text: int = 0
    off_epoch: int = 0
    off_seq: int = 0
    forward: int = 0
    done: int = 0
    events: int = 1
    flag: bool = False
    expects: int = 0
    reason: str = "start"
    stopped: bool = False
    parked: bool = False
    asks: int = 0
    ends: bool = False
    begins: bool = False
    which: int = 0


MOSTLY_RIGHT = st.sampled_from([0, 0, 0, 0, 0, -1, 1])
STEPS = (
    "create", "send", "send", "send", "unsend", "claim", "claim", "resolve", "append", "append", "append", "release",
    "disown", "stop", "resume", "set_metadata", "erase", "lose", "age", "interrupt", "answer", "answer", "pieces",
    "set_alarm", "set_alarm", "fire",
)  # fmt: skip
OPS = st.builds(
    Op,
    name=st.sampled_from(STEPS),
    node=st.integers(0, 1),
    nonce=st.integers(0, 1),
    id=st.integers(0, len(IDS) - 1),
    text=st.integers(0, len(TEXTS) - 1),
    off_epoch=MOSTLY_RIGHT,
    off_seq=MOSTLY_RIGHT,
    forward=st.integers(-1, 3),
    done=st.integers(0, 3),
    events=st.integers(0, 3),
    flag=st.booleans(),
    expects=st.sampled_from([0, 0, 0, 1, 2]),
    reason=st.sampled_from(["start", "wake", "takeover", "takeover", "handoff", "restart"]),
    stopped=st.booleans(),
    parked=st.integers(0, 5).map(lambda n: n == 0),
    asks=st.sampled_from([0, 0, 0, 1, 2]),
    ends=st.integers(0, 3).map(lambda n: n == 0),
    begins=st.booleans(),
    which=st.integers(0, 2),
)


class Pair:
    """One conversation in the server and in the model."""

    def __init__(self, store: RedisStore, cid: str) -> None:
        self.store = store
        self.cid = cid
        self.model = Model()
        self.heard: list[str] = []
        self.lost = False

    async def step(self, op: Op) -> None:
        """Do it in both, and compare everything."""
        if op.name == "lose":
            await self._lose()
        elif op.name == "create" and self.lost:
            return  # A head that was lost is rebuilt by CLAIM; nobody creates what is in the lists already.
        else:
            await getattr(self, f"_{op.name}")(op)
        await self.compare(op)

    async def now(self) -> int:
        """The server's time at the step before, if it wrote it."""
        head = await self.store.head(self.cid)
        return head.updated if head is not None else 0

    def meta(self) -> Meta:
        return self.model.meta or Meta(user="", generation="", created=0, updated=0)

    async def _create(self, op: Op) -> None:
        made = await self.store.create(self.cid, f"u{op.node}", TEXTS[op.text], f"g{op.nonce}")
        expected = conversation.create(
            self.model.view(), f"u{op.node}", TEXTS[op.text], f"g{op.nonce}", made.meta.created
        )
        assert made == self.model.apply(expected)

    async def _send(self, op: Op) -> None:
        kind = "interrupting" if op.begins else "message"
        message = NewMessage(IDS[op.id], f"u{op.node}", TEXTS[op.text], kind)
        reply = await self.store.send(self.cid, message, max_pending=3, reject_busy=op.flag)
        expected = conversation.send(self.model.view(IDS[op.id]), message, 3, op.flag, await self.now())
        assert reply == self.model.apply(expected)

    async def _interrupt(self, op: Op) -> None:
        turn = ("", f"t{self.meta().done + 1 + op.off_seq}", "x")[op.which]
        reply = await self.store.interrupt(self.cid, turn)
        assert reply == self.model.apply(intents.interrupt(self.model.view(), turn, await self.now()))

    async def _answer(self, op: Op) -> None:
        ask_id = ASKS[op.text]
        ids = (*IDS[:2], *(f"r{len(self.model.seen)}" for _ in range(2)))
        data = (f'{{"ask_id":"{ask_id}","data":{TEXTS[op.text]}}}', f'{{"ask_id":"{ask_id}","expired":true}}', "1.50")
        message = NewMessage(ids[op.id], f"u{op.node}", data[op.which], "answer")
        reply = await self.store.answer(self.cid, ask_id, message)
        expected = intents.answer(self.model.view(ids[op.id]), ask_id, message, await self.now())
        assert reply == self.model.apply(expected)

    async def _pieces(self, op: Op) -> None:
        meta = self.meta()
        owner = NODES[op.node] if op.expects == 2 else meta.owner
        arguments = owner, max(0, meta.epoch + op.off_epoch), meta.done + op.forward
        texts = tuple(TEXTS[(op.text + i) % 4] for i in range(op.events))
        reply = await self.store.add_pieces(self.cid, *arguments, texts)
        assert reply == self.model.apply(intents.pieces(self.model.view(), *arguments, texts))

    async def _set_alarm(self, op: Op) -> None:
        alarm_id = ALARMS[op.which]
        reply = await self.store.set_alarm(self.cid, alarm_id, TEXTS[op.text])
        expected = intents.set_alarm(self.model.view(alarm_id), alarm_id, TEXTS[op.text])
        assert reply == self.model.apply(expected)

    async def _fire(self, op: Op) -> None:
        alarm_id = ALARMS[op.which]
        reply = await self.store.fire(self.cid, alarm_id, max_pending=3)
        assert reply == self.model.apply(intents.fire(self.model.view(alarm_id), alarm_id, 3, await self.now()))

    async def _unsend(self, op: Op) -> None:
        position = self.model.seen.get(IDS[op.id], 1) + op.off_seq
        reply = await self.store.unsend(self.cid, IDS[op.id], position)
        assert reply == self.model.apply(conversation.unsend(self.model.view(IDS[op.id]), IDS[op.id], position))

    async def _claim(self, op: Op) -> None:
        meta = self.meta()
        owner = (meta.owner, "", NODES[1 - op.node])[op.expects]
        request = ClaimRequest(
            NODES[op.node],
            NONCES[op.nonce],
            owner,
            max(0, meta.epoch + op.off_epoch),
            op.reason,  # type: ignore[arg-type]
            floor=meta.epoch + 10**9 if op.flag else 0,
            user="u",
            generation="another" if op.which == 2 else meta.generation or "rebuilt",
            acted=op.off_seq != 0,
        )
        reply = await self.store.claim(self.cid, request)
        assert reply == self.model.apply(conversation.claim(self.model.view(), request, await self.now()))
        self.lost = self.lost and reply.outcome != "OK"

    async def _resolve(self, op: Op) -> None:
        arguments = NODES[op.node], NONCES[op.nonce], max(0, self.meta().epoch + op.off_epoch)
        reply = await self.store.resolve(self.cid, *arguments)
        assert reply == self.model.apply(conversation.resolve(self.model.view(), *arguments))

    async def _append(self, op: Op) -> None:
        meta = self.meta()
        cursor = max(0, min(meta.position, meta.cursor + op.forward))
        if op.stopped and op.flag:
            cursor = meta.position
        kinds = ("input", "reply", "turn_done")
        request = AppendRequest(
            NODES[op.node] if op.expects == 2 else meta.owner,
            max(0, meta.epoch + op.off_epoch),
            max(0, meta.seq + op.off_seq),
            f"b{op.id}",
            cursor,
            min(cursor, op.done + (meta.done if op.flag else 0)),
            op.done,
            tuple(f'{{"kind":"{kinds[i]}","data":{TEXTS[(op.text + i) % 4]}}}' for i in range(op.events)),
            TEXTS[op.text].encode() + b"\0\xff" if op.flag else None,
            "stopped" if op.stopped else ("", "failed", "held")[op.parked + op.begins * op.parked],
            halted=op.which + op.done,
            asks=tuple((ASKS[(op.id + i) % 4], TEXTS[i]) for i in range(op.asks)),
            ends_turn=op.ends,
            begins_turn=op.begins,
        )
        reply = await self.store.append(self.cid, request)
        assert reply == self.model.apply(conversation.append(self.model.view(), request, await self.now()))

    async def _release(self, op: Op) -> None:
        meta = self.meta()
        owner = NODES[op.node] if op.expects == 2 else meta.owner
        arguments = owner, max(0, meta.epoch + op.off_epoch), max(0, meta.seq + op.off_seq)
        reply = await self.store.release(self.cid, *arguments)
        assert reply == self.model.apply(conversation.release(self.model.view(), *arguments))

    async def _disown(self, op: Op) -> None:
        meta = self.meta()
        owner = (meta.owner, "", NODES[op.node])[op.expects]
        epoch = max(0, meta.epoch + op.off_epoch)
        reply = await self.store.disown(self.cid, owner, epoch)
        assert reply == self.model.apply(conversation.disown(self.model.view(), owner, epoch))

    async def _stop(self, op: Op) -> None:
        buried = self.meta().owner if op.flag else ("x~9", "", NODES[op.node])[op.expects]
        reason = ("closed", 'says "no" / é \\ \n')[op.nonce]
        reply = await self.store.stop(self.cid, NODES[op.node], reason, buried)
        expected = conversation.stop(self.model.view(), NODES[op.node], reason, buried, await self.now())
        assert reply == self.model.apply(expected)

    async def _resume(self, _: Op) -> None:
        reply = await self.store.resume(self.cid)
        assert reply == self.model.apply(conversation.resume(self.model.view(), await self.now()))

    async def _set_metadata(self, op: Op) -> None:
        reply = await self.store.set_metadata(self.cid, TEXTS[op.text])
        expected = conversation.set_metadata(self.model.view(), TEXTS[op.text], await self.now())
        assert reply == self.model.apply(expected)

    async def _erase(self, _: Op) -> None:
        reply = await self.store.erase(self.cid)
        assert reply == self.model.apply(conversation.erase(self.model.view()))
        self.lost = self.lost and reply != "OK"

    async def _lose(self) -> None:
        """The head is gone, as after a fail-over to a replica that lacked it."""
        if self.model.log:
            key = self.store.keys.meta(self.cid)
            await self.store.topology.execute(key, "DEL", key)
            self.model.meta = None
            self.lost = True

    async def _age(self, _: Op) -> None:
        """A head that was written before there were questions and interrupts to keep: it has no such fields."""
        if self.model.meta is not None and not self.model.meta.asks and not self.model.meta.halted:
            key = self.store.keys.meta(self.cid)
            await self.store.topology.execute(key, "HDEL", key, "asks", "halted")

    async def compare(self, op: Op) -> None:
        model, store, keys = self.model, self.store, self.store.keys
        assert await store.head(self.cid) == model.meta, op
        page = await store.read(self.cid, Cursor(), 10**6)
        found = await store.inbox(self.cid)
        if model.meta is not None:
            assert page is not None
            assert page.entries == tuple(model.log), op
            assert page.tip == model.view().tip, op
            assert found == (model.meta, tuple(model.inbox)), op
        else:
            assert page is None
            assert found is None
        assert await store.state(self.cid) == model.state, op
        assert await store.asks(self.cid) == model.asks, op
        assert list(await store.pieces(self.cid)) == model.pieces, op
        assert await store.alarms(self.cid) == model.alarms, op
        flat = await store.topology.execute("", "ZRANGE", keys.seen(self.cid), 0, -1, "WITHSCORES")
        seen = {flat[i].decode(): int(flat[i + 1]) for i in range(0, len(flat), 2)}
        assert seen == model.seen, op


CLAIM, STOP = Op("claim"), Op("stop")
SENDS = [Op("send", id=i) for i in range(3)]


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(ops=st.lists(OPS, min_size=5, max_size=40))
# Two messages taken back, the later one first: their positions are given out again.
@example(ops=[Op("create"), *SENDS, Op("unsend", id=2), Op("unsend", id=1), Op("send", id=3), CLAIM])
@example(ops=[Op("create"), *SENDS, Op("unsend", id=1), Op("send", id=3), STOP, Op("resume"), CLAIM])
# The head is lost with and without unread messages.
@example(ops=[Op("create"), *SENDS[:2], CLAIM, Op("append", forward=1), Op("lose"), Op("claim"), SENDS[2]])
@example(ops=[Op("create"), SENDS[0], CLAIM, Op("append", forward=1), Op("lose"), CLAIM, Op("send", id=1), STOP])
# Three takeovers of one turn.
@example(
    ops=[Op("create"), SENDS[0], CLAIM, Op("append", forward=1)]
    + [Op("claim", node=i % 2, nonce=i // 2 % 2, reason="takeover") for i in range(1, 5)]
)
# A takeover of a later turn is its first.
@example(
    ops=[
        *(Op("create"), *SENDS, CLAIM, Op("append", forward=1), Op("claim", node=1, reason="takeover")),
        *(Op("append", forward=1, done=1), Op("claim", reason="takeover"), Op("claim", node=1, reason="takeover")),
    ]
)
# The owner closes on request.
@example(ops=[Op("create"), SENDS[0], CLAIM, STOP, Op("append", flag=True, stopped=True), Op("erase")])
# A stop is asked for twice, and then the owner is buried.
@example(ops=[Op("create"), *SENDS, CLAIM, STOP, STOP, Op("append", forward=1), Op("stop", flag=True), STOP])
# It must not close over a message that it has not taken in.
@example(ops=[Op("create"), SENDS[0], CLAIM, STOP, Op("append", forward=1, stopped=True), Op("release")])
# Answers, with and without an owner; the last one goes with the stop into the log.
@example(
    ops=[
        *(Op("create"), SENDS[0], CLAIM, Op("append", forward=1, asks=2), Op("answer"), Op("answer")),
        *(Op("append", forward=1), Op("release", off_seq=0), Op("answer", text=1, id=2), Op("answer", text=1, id=3)),
        *(STOP, Op("resume"), Op("answer", text=1, id=3)),
    ]
)
@example(
    ops=[Op("create"), SENDS[0], CLAIM, Op("append", forward=1, asks=1), Op("disown", flag=True), Op("lose"), CLAIM]
)
# A head without the new fields takes a batch, waits, and is interrupted.
@example(ops=[Op("create"), SENDS[0], CLAIM, Op("age"), Op("append", forward=1, which=1), Op("age"), Op("release")])
@example(ops=[Op("create"), SENDS[0], CLAIM, Op("age"), Op("append", forward=1, asks=1), Op("release"), Op("resume")])
# An alarm goes off, is set again, and has the id of a message.
@example(
    ops=[
        *(Op("create"), Op("set_alarm", which=1), Op("fire", which=1), Op("set_alarm", which=1), Op("fire", which=1)),
        *(Op("set_alarm"), Op("send", id=3), Op("fire"), Op("set_alarm", which=2), STOP, Op("fire", which=2)),
    ]
)
# Whatever form an unread answer has, a stop logs it.
@example(
    ops=[
        *(Op("create"), SENDS[0], CLAIM, Op("append", forward=1, asks=2), Op("append", asks=2, id=2)),
        *(Op("answer", id=2), Op("answer", text=1, id=2, which=1), Op("answer", text=2, id=2, which=2)),
        *(Op("answer", text=3, id=2), Op("stop", flag=True)),
    ]
)
# Questions end with their turn, and with the conversation.
@example(ops=[Op("create"), SENDS[0], CLAIM, Op("append", forward=1, asks=2), Op("append", ends=True), Op("answer")])
@example(ops=[Op("create"), SENDS[0], CLAIM, Op("append", asks=2), STOP, Op("append", flag=True, stopped=True)])
# A takeover while a person is waited for, and afterwards; the count begins anew.
@example(
    ops=[
        *(Op("create"), SENDS[0], CLAIM, Op("append", forward=1, asks=1), Op("claim", node=1, reason="takeover")),
        *(Op("answer", id=2), Op("claim", reason="takeover"), Op("append", parked=True), Op("resume")),
    ]
)
# A stop comes before giving up.
@example(ops=[Op("create"), SENDS[0], CLAIM, Op("append", forward=1), STOP, Op("append", parked=True)])
# What cannot be taken back.
@example(ops=[Op("create"), Op("set_alarm"), Op("fire"), Op("unsend", id=3), Op("send", id=1), Op("unsend", id=1)])
# Parked with everything open, resumed, and parked again.
@example(
    ops=[
        *(Op("create"), *SENDS, CLAIM, Op("pieces", forward=1), Op("append", forward=1, asks=1, parked=True)),
        *(Op("send"), Op("answer", id=2), Op("fire"), Op("interrupt"), CLAIM, Op("resume"), Op("claim", node=1)),
        *(Op("append", forward=2, parked=True, begins=True), STOP, Op("erase")),
    ]
)
# Cursor and done never go back.
@example(ops=[Op("create"), *SENDS, CLAIM, Op("append", forward=2, done=2), Op("append", forward=-1), SENDS[0]])
async def test_one_conversation(store: RedisStore, ops: list[Op]) -> None:
    pair = Pair(store, f"c{secrets.token_hex(6)}")
    channel = store.channel("c", pair.cid)
    await store.subscribe(channel, lambda payload: pair.heard.append(payload.decode()), lambda: None)
    try:
        for op in [Op("create"), *ops]:
            await pair.step(op)
        await wait_until(lambda: len(pair.heard) >= len(pair.model.said), "everything is heard")
        assert pair.heard == pair.model.said
    finally:
        await store.unsubscribe(channel)


async def test_the_window_of_remembered_ids(store: RedisStore) -> None:
    """Longer than random steps are: what is answered and older than the window is forgotten, and nothing else."""
    pair = Pair(store, "c")
    await pair.step(Op("create"))
    await pair.step(CLAIM)
    for i in range(300):
        message = NewMessage(f"m{i}", "u", "1")
        reply = await store.send("c", message, max_pending=1000)
        pair.model.apply(conversation.send(pair.model.view(f"m{i}"), message, 1000, False, await pair.now()))
        assert reply.position == i + 1
    meta = pair.meta()
    for cursor, done in ((300, 20), (300, 150), (300, 300)):
        request = AppendRequest(meta.owner, meta.epoch, pair.meta().seq, "b", cursor, done, 0, ("1",))
        await store.append("c", request)
        pair.model.apply(conversation.append(pair.model.view(), request, await pair.now()))
        await pair.compare(Op("append"))
        assert min(pair.model.seen.values()) == min(done, 300 - 256) + 1


async def test_a_head_that_went_back_in_time(store: RedisStore) -> None:
    """After a fail-over the head may be older than the log; then the log is the second fence."""
    pair = Pair(store, "c")
    for op in (Op("create"), CLAIM):
        await pair.step(op)
    old = pair.meta()
    for op in (Op("append"), Op("claim", node=1, reason="takeover"), Op("append")):
        await pair.step(op)
    newer = pair.meta()
    key = store.keys.meta("c")
    fields = ("owner", old.owner, "epoch", old.epoch, "seq", old.seq, "batch", old.batch, "nonce", old.nonce)
    await store.topology.execute(key, "HSET", key, *fields)
    rewound = await store.head("c")
    assert rewound is not None
    request = AppendRequest(old.owner, old.epoch, old.seq, "b", 0, 0, 0, ('"x"', '"y"'), b"s")
    assert await store.append("c", request) == AppendReply("FENCED", old.seq, old.batch, old.owner, old.epoch)
    assert (await store.head("c"), await store.state("c")) == (rewound, None)
    pair.model.meta = rewound
    await pair.step(Op("claim", node=1, reason="takeover", nonce=1))
    assert pair.meta().epoch > newer.epoch
    assert pair.model.log[-1].seq == old.seq + 1
