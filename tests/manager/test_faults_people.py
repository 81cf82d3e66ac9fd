"""Questions, alarms, interruptions under faults, from one seed: safety while things fail, liveness when they heal."""

from __future__ import annotations

import asyncio
import os
import random
from collections import Counter
from typing import Any

import pytest

from convener.errors import AskExpired, ConvenerError, ConversationStopped
from convener.manager.turn import Turn
from convener.store.base import Store
from convener.testing.cluster import InProcessCluster, RecordingSink
from convener.testing.faults import FaultyStore
from tests.manager.conftest import MakeCluster
from tests.manager.people import head_of, log_of, no_timer_is_due, store_of
from tests.support.waiting import NotInTimeError, wait_until

pytestmark = pytest.mark.anyio

FIRST = int(os.environ.get("CONVENER_TEST_SEED", "0"))
SEEDS = range(FIRST, FIRST + 2)
CONVERSATIONS = 6
ROUNDS = 40
ENDS = ("turn_done", "turn_failed", "turn_interrupted")


async def agent(turn: Turn) -> None:
    """Does what the message says; every message that is answered is counted in the state."""
    ident, said = turn.input.message_id, list[Any]()
    what = "rang" if "of" in turn.data else turn.data["what"]
    if what in ("ask", "both"):
        await turn.step("prepare", lambda: ident)
        said = await asyncio.gather(
            question(turn, f"{ident} first", turn.data["timeout"]),
            *([question(turn, f"{ident} second", None), turn.step("work", lambda: "worked")] if what == "both" else []),
        )
    elif what == "alarm":
        await turn.conversation.schedule(turn.data["timeout"], {"of": ident})
    await asyncio.sleep(0)
    turn.state["n"] = turn.state.get("n", 0) + 1
    await turn.reply({"to": ident, "said": said, "n": turn.state["n"]})


async def question(turn: Turn, prompt: str, timeout: float | None) -> Any:
    try:
        return await turn.ask(prompt, timeout=timeout)
    except AskExpired:
        return "expired"


class People:
    """Random people at a cluster whose stores fail."""

    def __init__(self, cluster: InProcessCluster, rng: random.Random) -> None:
        self.cluster = cluster
        self.rng = rng
        self.accepted: dict[str, set[str]] = {f"c{i}": set() for i in range(CONVERSATIONS)}
        self.answered: dict[str, dict[str, str]] = {cid: {} for cid in self.accepted}
        self.tried: dict[str, dict[str, Any]] = {cid: {} for cid in self.accepted}
        self.sinks: list[RecordingSink] = []
        self.counter = 0

    async def step(self) -> None:
        cid = self.rng.choice(list(self.accepted))
        manager = self.rng.choice(list(self.cluster))
        todo = self.rng.choices(
            [self.send, self.answer, self.interrupt, self.hibernate, self.join, self.start, self.resume],
            [40, 30, 6, 8, 6, 5, 5],
        )[0]
        try:
            await todo(manager, cid)
        except ConvenerError:
            pass

    async def send(self, manager: Any, cid: str) -> None:
        self.counter += 1
        known = sorted(self.tried[cid])
        ident = self.rng.choice(known) if known and self.rng.random() < 0.25 else f"m{self.counter}"
        what = self.rng.choice(["plain", "ask", "ask", "both", "alarm"])
        timeout = 0.3 if what == "alarm" else self.rng.choice([None, 0.5, 2.0])
        data = self.tried[cid].setdefault(ident, {"what": what, "timeout": timeout})
        overlap = self.rng.choice([None, None, None, "interrupt"])
        await manager.send_event_to_conversation(cid, data, user_id=user(cid), message_id=ident, overlap=overlap)
        self.accepted[cid].add(ident)

    async def answer(self, manager: Any, cid: str) -> None:
        questions = await manager.questions(cid)
        if questions:
            asked = self.rng.choice(questions)
            self.counter += 1
            ident = f"a{self.counter}"
            for _ in range(self.rng.choice([1, 1, 3])):
                await manager.answer(cid, asked.ask_id, f"{ident} to {asked.prompt}", message_id=ident)
                self.answered[cid][ident] = asked.ask_id

    async def interrupt(self, manager: Any, cid: str) -> None:
        await manager.interrupt(cid)

    async def hibernate(self, manager: Any, cid: str) -> None:
        await manager.engine.hibernate(cid)

    async def resume(self, manager: Any, cid: str) -> None:
        await manager.resume(cid)

    async def start(self, manager: Any, cid: str) -> None:
        await manager.maybe_start_agent_loop(cid, user_id=user(cid))

    async def join(self, manager: Any, cid: str) -> None:
        self.counter += 1
        sink = RecordingSink()
        await manager.join_conversation(cid, f"s{self.counter}", user_id=user(cid), sink=sink)
        manager.begin_replay(f"s{self.counter}")
        self.sinks.append(sink)


def user(cid: str) -> str:
    return f"u{int(cid[1:]) % 3}"


@pytest.mark.parametrize("seed", SEEDS)
async def test_people_under_faults(make_cluster: MakeCluster, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    monkeypatch.setattr("convener.manager.timers.UNSET_MS", 2000)
    rng = random.Random(seed)
    print(f"seed {seed}: replay with CONVENER_TEST_SEED={seed}")
    stores: list[FaultyStore] = []

    def wrap(index: int, store: Store) -> Store:
        stores.append(FaultyStore(store, random.Random(f"{seed}.{index}"), rate=0.0, delay=0.02))
        return stores[-1]  # type: ignore[return-value]

    cluster = await make_cluster(agent, limit=2, wrap=wrap)
    people = People(cluster, rng)
    for cid in people.accepted:
        await people.start(cluster[0], cid)
    for store in stores:
        store.rate, store.loss = 0.2, 0.1
    for round_ in range(ROUNDS):
        await asyncio.gather(*(people.step() for _ in range(8)))
        if round_ in (ROUNDS // 4, ROUNDS // 2, 3 * ROUNDS // 4):
            await cluster.kill(rng.choice([i for i, m in enumerate(cluster.managers) if m is not None]))
            await cluster.add()
            stores[-1].rate, stores[-1].loss = 0.2, 0.1
    for store in stores:
        store.rate = 0.0
        store.mend()
    assert sum(sum(store.failed.values()) for store in stores) > 2 * ROUNDS, "hardly anything failed"
    await heal(cluster, people)
    happened = Counter[str]()
    for cid in people.accepted:
        log = await log_of(cluster, cid)
        happened.update(e["kind"] for e in log)
        check(cid, log, people)
        await no_timer_is_due(cluster, cid)
        assert await store_of(cluster).alarms(cid) == {}
    print(f"what happened: {happened}")
    assert all(happened[kind] > 5 for kind in ("ask", "answer", "step", "turn_done", "turn_interrupted")), happened
    for sink in people.sinks:
        seqs = [e["seq"] for e in sink.events]
        assert seqs == list(range(1, len(seqs) + 1)), f"a client saw {seqs}"


async def heal(cluster: InProcessCluster, people: People) -> None:
    """Answer what is still asked, let what was given up go on, until all is settled."""

    async def is_settled(cid: str) -> bool:
        manager = next(iter(cluster))
        for asked in await manager.questions(cid):
            try:
                await manager.answer(cid, asked.ask_id, f"{asked.ask_id} to {asked.prompt}", message_id=asked.ask_id)
                people.answered[cid][asked.ask_id] = asked.ask_id
            except ConvenerError:
                continue
        if (await head_of(cluster, cid)).status == "failed":
            await manager.resume(cid)
        head, alarms = await head_of(cluster, cid), await store_of(cluster).alarms(cid)
        return head.position == head.done == head.cursor and head.status == "running" and not alarms

    for cid in people.accepted:
        try:
            await wait_until(lambda c=cid: is_settled(c), f"{cid} is settled", limit=40, retry_on=ConversationStopped)
        except NotInTimeError as error:
            store = store_of(cluster)
            slots, queue = await store.slots(user(cid)), await store.waiting(user(cid))
            error.add_note(f"{await head_of(cluster, cid)}\nslots {slots}\nqueue {queue}\n{await store.inbox(cid)}")
            error.add_note(f"alarms {await store.alarms(cid)}")
            error.add_note("\n".join(map(str, (await log_of(cluster, cid))[-12:])))
            raise


def check(cid: str, log: list[dict[str, Any]], people: People) -> None:
    """What must be true of one conversation in the end."""
    assert [e["seq"] for e in log] == list(range(1, len(log) + 1))
    inputs = {e["turn"]: e["data"] for e in log if e["kind"] == "input"}
    ids = [data["message_id"] for data in inputs.values()]
    assert len(ids) == len(set(ids)) == sum(e["kind"] == "input" for e in log), f"{cid}: a message twice"
    assert people.accepted[cid] <= set(ids), f"{cid}: accepted, not in the log"
    ended = {e["turn"]: e for e in log if e["kind"] in ENDS}
    assert len(ended) == sum(e["kind"] in ENDS for e in log), f"{cid}: a turn with two ends"
    assert ended.keys() == inputs.keys(), f"{cid}: a turn without an end"
    codes = {e["data"]["code"] for e in ended.values() if e["kind"] == "turn_failed"}
    assert codes <= {"too_many_takeovers"}
    answers = check_answers(cid, log, people)
    done = [turn for turn, end in ended.items() if end["kind"] == "turn_done"]
    replies = {e["turn"]: e["data"] for e in log if e["kind"] == "reply" and e["turn"] in done}
    assert list(replies) == done, f"{cid}: not one answer each"
    assert [replies[turn]["n"] for turn in done] == list(range(1, len(done) + 1)), f"{cid}: the state lost a turn"
    for turn in done:
        said = [a for a in replies[turn]["said"] if a != "worked"]
        assert Counter(said) == Counter(answers.get(turn, ())), f"{cid} {turn}: other answers than were given"
    check_alarms(cid, inputs, done)
    steps = [(e["turn"], e["data"]["name"], e["data"]["number"]) for e in log if e["kind"] == "step"]
    assert len(steps) == len(set(steps)), f"{cid}: a step recorded twice"


def check_answers(cid: str, log: list[dict[str, Any]], people: People) -> dict[str, list[str]]:
    """Questions and answers; returns what was said, by turn."""
    asked = [e["data"]["ask_id"] for e in log if e["kind"] == "ask"]
    assert len(asked) == len(set(asked)), f"{cid}: two questions of one id"
    prompts = [(e["turn"], e["data"]["prompt"]) for e in log if e["kind"] == "ask"]
    assert len(prompts) == len(set(prompts)), f"{cid}: a question asked twice"
    given = [e for e in log if e["kind"] == "answer"]
    taken = [e["data"]["ask_id"] for e in given]
    assert len(taken) == len(set(taken)), f"{cid}: a question answered twice"
    assert set(taken) <= set(asked)
    by_id = {e["data"].get("message_id"): e["data"]["ask_id"] for e in given}
    assert people.answered[cid].items() <= by_id.items(), f"{cid}: an accepted answer is lost"
    said: dict[str, list[str]] = {}
    prompt_of = {e["data"]["ask_id"]: e["data"]["prompt"] for e in log if e["kind"] == "ask"}
    for e in given:
        text = "expired" if e["data"].get("expired") else e["data"]["data"]
        assert text == "expired" or text.endswith(f" to {prompt_of[e['data']['ask_id']]}")
        said.setdefault(e["turn"], []).append(text)
    return said


def check_alarms(cid: str, inputs: dict[str, Any], done: list[str]) -> None:
    """Every alarm rings once, if the turn that set it is done."""
    rung = Counter(d["data"]["of"] for d in inputs.values() if "of" in d["data"])
    assert not rung or max(rung.values()) == 1, f"{cid}: an alarm rang twice"
    setting = {inputs[turn]["message_id"] for turn in done if inputs[turn]["data"].get("what") == "alarm"}
    assert setting <= rung.keys(), f"{cid}: an alarm did not ring"
