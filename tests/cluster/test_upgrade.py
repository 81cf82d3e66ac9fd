"""Rolling upgrades: nodes of the release before beside those of this tree, and every node changed under load.

The older ones run from their wheel (`releases/`), with this environment's libraries.
"""

from __future__ import annotations

import asyncio
import random
import zipfile
from collections import Counter
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final

import pytest

from convener.version import __version__
from tests.cluster.checks import opened
from tests.cluster.leaving import Person, Scene, scene
from tests.support.waiting import wait_until

NODES: Final = 3
PEOPLE: Final = 6
KILLED: Final = 1
BETWEEN: Final = 3
"""Messages of each of the people that are accepted between two changes."""
RELEASES: Final = Path(__file__).parent / "releases"


@pytest.fixture(scope="module")
def before(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The code of the latest release."""
    wheels = sorted(RELEASES.glob("convener-*.whl"))
    assert len(wheels) == 1, wheels
    code = tmp_path_factory.mktemp("release")
    with zipfile.ZipFile(wheels[0]) as wheel:
        wheel.extractall(code)
    return code


def version_of(code: Path | None) -> str:
    """Of a release's wheel, by its name; or of this tree."""
    return __version__ if code is None else next(RELEASES.glob("*.whl")).name.split("-")[1]


async def change(here: Scene, index: int, code: Path | None, *, kill: bool = False) -> None:
    """End a node, politely or not, and start it with other code."""
    node = here.cluster.nodes[index]
    if kill:
        await asyncio.to_thread(here.cluster.kill, index)
    else:
        here.cluster.term(index)
        assert await here.ended(index) == 0, f"n{index} ended badly"
    node.code = code
    await asyncio.to_thread(here.cluster.restart, index)


def versions(here: Scene) -> list[str]:
    """Of the live nodes, as each of them says; they all say the same."""
    live = here.cluster.live()
    told = [[row["version"] for row in here.cluster.get(i, "/nodes")["nodes"] if row["state"] == "live"] for i in live]
    assert all(sorted(each) == sorted(told[0]) for each in told), told
    return sorted(told[0])


def draw(rng: random.Random, number: int) -> str:
    """A message: a short one, an answer that is streamed, or work in steps, at times longer than a drain may take."""
    kind = rng.random()
    if kind < 0.4:
        return f"short {number}"
    if kind < 0.7:
        return "/stream " + " ".join(f"word{word}" for word in range(rng.randrange(5, 30)))
    return f"/work {rng.choice((2, 8, 40))} 0.05"


async def talk(person: Person, rng: random.Random, over: asyncio.Event) -> None:
    """Say something, wait for the answer, say the next thing; once more after it is over."""
    number = 0
    while True:
        last, number = over.is_set(), number + 1
        await person.send(draw(rng, number))
        await person.client.wait_for(number, "turn_done", 60)
        if last:
            return


@asynccontextmanager
async def talking_people(here: Scene, rng: random.Random) -> AsyncGenerator[None]:
    """People who talk meanwhile; afterwards everybody has seen every answer, once and in order."""
    cids = [f"talk-{number}" for number in range(PEOPLE)]
    for number, cid in enumerate(cids):
        await here.start(cid, number % NODES)
    people = [await here.person(cid) for cid in cids]
    over = asyncio.Event()
    talks = [asyncio.create_task(talk(each, random.Random(rng.random()), over)) for each in people]
    try:
        yield
    finally:
        over.set()
        await asyncio.gather(*talks)
    for cid, person in zip(cids, people, strict=True):
        events = await here.check(cid, person.client)
        assert person.client.refusals == [], "a stock client that is refused stays away"
        steps = Counter((e["turn"], e["data"]["number"]) for e in events if e["kind"] == "step")
        assert set(steps.values()) <= {1}, "a step is recorded once"


async def accepted(here: Scene) -> None:
    """Return when some more messages have been accepted."""
    goal = here.api.accepted + BETWEEN * PEOPLE
    await wait_until(lambda: here.api.accepted >= goal, "more messages are accepted", 120)


async def each_asks_each(here: Scene, rng: random.Random) -> None:
    """Every node is asked about a conversation of every other one: requests and replies cross the versions."""
    for owner in range(NODES):
        cid = f"asked-{rng.getrandbits(32)}"
        await here.start(cid, owner)
        await here.api.deliver(cid, "hello", url=here.cluster.url(owner))
        await here.api.answered(cid)
        for asked in range(NODES):
            answer = await here.call(cid, asked, "turns", None)
            assert answer.json() == {"result": 1}, (owner, asked, answer.text)
        # Handed over to the next node, whichever code that runs.
        target = here.cluster.nodes[(owner + 1) % NODES].name
        url = here.cluster.url(rng.randrange(NODES))
        answer = await here.api.http.post(f"{url}/api/conversations/{cid}/move", json={"node": target})
        assert answer.status_code == 200, answer.text
        await here.api.deliver(cid, "still there", url=here.cluster.url(owner))
        events = await here.check(cid)
        assert (target, "handoff") in opened(events)


class Standing:
    """Work that was begun before a change, and is over after it."""

    def __init__(self, here: Scene, folder: Path) -> None:
        self._here = here
        self._folder = folder

    async def begin(self) -> None:
        """A question that nobody has answered, an alarm that is far away, a turn that waits in a step."""
        here = self._here
        for number, cid in enumerate(("asking", "alarmed", "stepping", "stopped")):
            await here.start(cid, number % NODES)
        await here.api.deliver("asking", "/ask may I?")
        await wait_until(lambda: any(e.kind == "ask" for e in here.stored.log("asking")), "the question is asked")
        await here.api.deliver("alarmed", "/alarm 15")
        await here.api.deliver("stepping", f"/steps {self._folder}")
        (self._folder / "0").touch()
        await wait_until(lambda: any(e.kind == "step" for e in here.stored.log("stepping")), "a step is recorded")
        answer = await here.api.http.post(f"{here.cluster.url(0)}/api/conversations/stopped/stop")
        assert answer.json()["outcome"] in ("stopped", "stopping")

    async def end(self) -> None:
        """All of it goes on where it was."""
        here = self._here
        for number in range(1, 4):
            (self._folder / str(number)).touch()
        events = await here.check("stepping")
        assert [e["data"]["result"] for e in events if e["kind"] == "step"] == [0, 1, 2, 3]
        ask = next(e for e in here.stored.log("asking") if e.kind == "ask")
        await here.answer("asking", 0, ask.data["ask_id"], "yes")
        await here.check("asking")
        await wait_until(
            lambda: (
                any(e.kind == "input" and "alarm_id" in str(e.data) for e in here.stored.log("alarmed"))
                or sum(e.kind == "turn_done" for e in here.stored.log("alarmed")) > 1
            ),
            "the alarm went off",
        )
        refused = await here.api.post(here.cluster.url(1), "stopped", "hello")
        assert refused.json()["code"] == "conversation_stopped"
        resumed = await here.api.http.post(f"{here.cluster.url(2)}/api/conversations/stopped/resume")
        assert resumed.status_code == 200, resumed.text
        await here.api.deliver("stopped", "hello again")
        await here.check("stopped")


@pytest.mark.slow
@pytest.mark.parametrize("up", [True, False], ids=["upgrade", "going back"])
async def test_every_node_is_changed_under_load(before: Path, up: bool, rng: random.Random, tmp_path: Path) -> None:
    """One node after the other; the second one of them dies instead of leaving, and others take over."""
    old, new = (before, None) if up else (None, before)
    async with scene(nodes=NODES, code=old, drain_timeout=1) as here:
        standing = Standing(here, tmp_path)
        await standing.begin()
        assert versions(here) == [version_of(old)] * NODES
        async with talking_people(here, rng):
            for index in range(NODES):
                await accepted(here)
                await change(here, index, new, kill=index == KILLED)
                if index + 1 < NODES:
                    await each_asks_each(here, rng)
            await accepted(here)
        assert versions(here) == [version_of(new)] * NODES
        await standing.end()
