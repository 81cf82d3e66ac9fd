"""A deploy: every node is ended by a signal and started again, one after the other, while people talk.

``TEST_CLIENTS`` is how many people there are, ``TEST_ROUNDS`` how often every node is restarted; what was measured is
printed (``-s``), and nothing of it asserted.
"""

from __future__ import annotations

import asyncio
import os
import random
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, Final

import pytest

from tests.cluster.checks import check_explained, opened
from tests.cluster.clients import Client
from tests.cluster.leaving import Person, Scene, scene
from tests.cluster.silence import Span, Waits, silences, summary
from tests.cluster.talking import PASSING
from tests.support.jsclient import JavaScriptClient, LostError, missing
from tests.support.waiting import wait_until

CLIENTS: Final = int(os.environ.get("TEST_CLIENTS", "12"))
ROUNDS: Final = int(os.environ.get("TEST_ROUNDS", "1"))
NODES: Final = 3
TICK: Final = 0.005
BETWEEN: Final = 3
"""Messages for each of the people that are accepted between two restarts."""
THINKING_S: Final = 0.5
"""For how long people think at most, before they say the next thing."""
LIMIT_S: Final = 60.0


def draw(rng: random.Random, number: int) -> str:
    """A message: a short one, an answer that is streamed, or work in steps."""
    kind = rng.random()
    if kind < 0.4:
        return f"short {number}"
    if kind < 0.75:
        return "/stream " + " ".join(f"word{word}" for word in range(rng.randrange(5, 40)))
    # Some take longer than a drain may: they go on elsewhere, from a step.
    return f"/work {rng.choice((4, 8, 12, 40))} 0.05"


class Talker:
    """Somebody with a stock client who talks to a conversation of their own.

    Attributes:
        waits: when they waited for an answer.
        resends: messages that were sent once more, because the connection had gone.
        rejected: messages that a node refused for now.
    """

    def __init__(self, here: Scene, client: Client | JavaScriptClient, cid: str, rng: random.Random) -> None:
        self.client = client
        self.cid = cid
        self.waits = Waits()
        self._here = here
        self._rng = rng
        self._person = Person(client, here.api) if isinstance(client, Client) else None
        self._resends = 0
        self._rejected = Counter[str]()

    @property
    def resends(self) -> int:
        return self._person.resends if self._person is not None else self._resends

    @property
    def rejected(self) -> Counter[str]:
        return self._person.rejected if self._person is not None else self._rejected

    async def talk(self, over: asyncio.Event) -> None:
        """Say something, wait for the answer, think, say the next thing; once more after it is over."""
        number = 0
        while True:
            last, number = over.is_set(), number + 1
            self.waits.begin()
            await self._send(draw(self._rng, number))
            await self._answered(number)
            self.waits.end()
            if last:
                return
            await asyncio.sleep(self._rng.uniform(0, THINKING_S))

    async def _send(self, text: str) -> None:
        if self._person is not None:
            await self._person.send(text)
            return
        sent = self._here.api.sent[self.cid]
        ident = f"{self.cid}.{len(sent) + 1}"
        sent[ident] = text
        await wait_until(lambda: self._try(text, ident), f"{ident} is accepted by socket", LIMIT_S)
        self._here.api.accepted += 1

    async def _try(self, text: str, ident: str) -> bool:
        assert isinstance(self.client, JavaScriptClient)
        try:
            answer: dict[str, Any] = await self.client.call("message", {"message_id": ident, "data": {"text": text}})
        except LostError:
            self._resends += 1
            return False
        if answer["status"] == "accepted":
            return True
        assert answer["code"] in PASSING, answer
        self._rejected[answer["code"]] += 1
        return False

    async def _answered(self, count: int) -> None:
        if isinstance(self.client, Client):
            await self.client.wait_for(count, "turn_done", LIMIT_S)
            return
        await wait_until(lambda: self._ended() >= count, f"{self.cid} has seen {count} answers", LIMIT_S)

    def _ended(self) -> int:
        assert isinstance(self.client, JavaScriptClient)
        return sum(event["kind"] == "turn_done" for event in self.client.of("event"))

    def refusals(self) -> list[Any]:
        """Refused connections: a stock client that is refused stays away."""
        if isinstance(self.client, Client):
            return self.client.refusals
        # Without data nobody has refused: the connection could not be made, and the client tries again.
        return [refusal for refusal in self.client.of("connect_error") if refusal["data"] is not None]


async def roll(here: Scene, people: int) -> dict[str, list[Span]]:
    """End each node and start it again. Returns when which of this was done, as (from, until)."""
    moments = [time.monotonic()]
    for node in [*range(NODES)] * ROUNDS:
        await accepted(here, BETWEEN * people)
        moments.append(time.monotonic())
        here.cluster.term(node)
        assert await here.ended(node) == 0, f"n{node} ended badly"
        moments.append(time.monotonic())
        await asyncio.to_thread(here.cluster.restart, node)
        moments.append(time.monotonic())
    await accepted(here, BETWEEN * people)
    moments.append(time.monotonic())
    spans = list(pairwise(moments))
    return {"all nodes are there": spans[0::3], "a node leaves": spans[1::3], "a node starts": spans[2::3]}


async def accepted(here: Scene, count: int) -> None:
    """Return when so many more messages have been accepted."""
    goal = here.api.accepted + count
    await wait_until(lambda: here.api.accepted >= goal, f"{count} more messages are accepted", 120)


class Pulse:
    """How long this process itself, in which all clients run, was held up: nobody is shown anything then."""

    def __init__(self) -> None:
        self._ticks = [time.monotonic()]

    async def run(self) -> None:
        """Tick, for ever."""
        while True:
            await asyncio.sleep(TICK)
            self._ticks.append(time.monotonic())

    def longest(self, spans: Sequence[Span]) -> float:
        """The longest stop that began within one of the spans."""
        stops = [b - a - TICK for a, b in pairwise(self._ticks) if any(s <= a < u for s, u in spans)]
        return max(stops, default=0.0)


def measured(talkers: Sequence[Talker], spans: Mapping[str, Sequence[Span]], pulse: Pulse) -> str:
    """What was measured, in words."""
    python = [silences(t.client, t.waits) for t in talkers if isinstance(t.client, Client)]
    javascript = [silences(t.client, t.waits) for t in talkers if not isinstance(t.client, Client)]
    stops = "; ".join(f"{1000 * pulse.longest(times):.0f} ms while {when}" for when, times in spans.items())
    rejected = sum((talker.rejected for talker in talkers), Counter[str]())
    closes = Counter(code for t in talkers if isinstance(t.client, Client) for code in t.client.closes)
    return "\n".join(
        (
            summary(python, spans, f"{len(python)} Python clients that come back after 0.1 s"),
            summary(javascript, spans, f"{len(javascript)} JavaScript clients that come back after 0.5 to 1.5 s"),
            f"the clients' own process stood still for up to {stops}",
            f"connections closed, by code {dict(closes)}; refused {sum(len(t.refusals()) for t in talkers)}",
            f"messages sent again {sum(t.resends for t in talkers)}, rejected for now {dict(rejected)}",
        )
    )


@pytest.mark.slow
@pytest.mark.skipif(missing() is not None, reason=missing() or "")
@pytest.mark.timeout(180 + 12 * CLIENTS * ROUNDS)
async def test_a_rolling_restart_under_load_loses_and_repeats_nothing(rng: random.Random) -> None:
    seed = str(rng.random())
    async with scene(nodes=NODES, drain_timeout=1) as here:
        cids = [f"rolling-{number:02}" for number in range(CLIENTS)]
        for number, cid in enumerate(cids):
            await here.start(cid, number % NODES)
        clients = [await (here.javascript if number % 6 == 0 else here.python)(c) for number, c in enumerate(cids)]
        watchers = {cid: await here.python(cid) for cid in cids[::4]}
        talkers = [Talker(here, c, cid, random.Random(f"{seed} {cid}")) for c, cid in zip(clients, cids, strict=True)]
        over, pulse = asyncio.Event(), Pulse()
        ticking = asyncio.create_task(pulse.run())
        talks = [asyncio.create_task(talker.talk(over)) for talker in talkers]
        try:
            spans = await roll(here, len(talkers))
        finally:
            over.set()
            await asyncio.gather(*talks)
            ticking.cancel()
        print(f"seed {seed}: {len(talkers)} people, {len(watchers)} watchers, {NODES} nodes restarted {ROUNDS} times")
        print(measured(talkers, spans, pulse))
        reasons, again = Counter[str](), 0
        for talker in talkers:
            others = [watchers[talker.cid]] if talker.cid in watchers else []
            events = await here.check(talker.cid, talker.client, *others)
            reasons.update(reason for _, reason in opened(events))
            assert talker.refusals() == []
            why = await asyncio.to_thread(here.cluster.get, 0, f"/conversations/{talker.cid}/why")
            check_explained(why, events)
            assert not any(o["text"].startswith("moved") for o in why["ownerships"]), (
                "nodes left, nobody moved anything"
            )
            steps = Counter((e["turn"], e["data"]["number"]) for e in events if e["kind"] == "step")
            assert set(steps.values()) <= {1}, "a step is recorded once"
            again += sum(e["kind"] == "turn_started" and e["data"]["attempt"] > 1 for e in events)
        assert reasons["takeover"] == 0, f"something was left to recovery: {dict(reasons)}"
        print(f"{here.api.accepted} messages, {again} turns cut and begun again; ownerships by reason: {dict(reasons)}")
