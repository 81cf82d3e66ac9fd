"""A day's life at high speed, and then nothing is left over: every key has an end, and it comes.

People start, write, ask, set alarms, stop, resume and delete; agents stream, ask and fail; nodes are killed and leave;
logs go to the archive. Then everybody deletes what they have, and the store holds what it held on the first day.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import secrets
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final, cast

import pytest

from convener.errors import ConvenerError, NotFound
from convener.manager import archiving, members, retention
from convener.manager.context import NodeOptions
from convener.manager.turn import Turn
from convener.store.archive import Archive, open_objects
from convener.store.redis.keys import kind_of
from convener.testing.cluster import InProcessCluster, RecordingSink
from convener.testing.leaks import SINGLETONS
from tests.support.servers import Server
from tests.support.waiting import wait_until

SEED: Final = int(os.environ.get("CONVENER_TEST_SEED", "0")) or secrets.randbelow(2**32)
USERS: Final = 6
OWN: Final = 4
"""Conversations that a user has, one more than may run at a time."""
DEEDS: Final = 60
"""What each user does in the course of the day."""
CASUALTIES: Final = 5

QUICK: Final = NodeOptions(
    name="node",
    lease_ttl=3.0,
    renew_interval=0.2,
    drain_timeout=3.0,
    hibernate_after=0.3,
    max_pending_messages=20,
    archive_every=0.2,
    sweep_every=0.3,
)

TEXTS: Final = ("hello", "much", "stream", "ask", "ask soon", "fail", "alarm soon", "alarm far", "slow")


async def agent(turn: Turn[Any]) -> None:
    """Does what the text says."""
    what = turn.text or "alarm"
    if what == "fail":
        raise ValueError("as asked")
    if what == "much":
        for n in range(40):
            await turn.emit("noted", {"n": n, "text": "x" * 200})
    elif what == "stream":
        for n in range(20):
            await turn.stream(f"word{n} ")
            await asyncio.sleep(0)
        return
    elif what.startswith("ask"):
        answer = await turn.ask("well?", timeout=0.5 if what == "ask soon" else 20)
        turn.state["answer"] = answer
    elif what.startswith("alarm "):
        await turn.conversation.schedule(0.2 if what == "alarm soon" else 86_400 * 365, {"text": "hello"})
    elif what == "slow":
        await turn.step("wait", asyncio.sleep, 0.3)
    turn.state["count"] = turn.state.get("count", 0) + 1
    await turn.reply({"text": what})


class Day:
    """The cluster, the people, and what they did."""

    def __init__(self, cluster: InProcessCluster, rng: random.Random) -> None:
        self.cluster = cluster
        self.rng = rng
        self.done = Counter[str]()

    def node(self) -> Any:
        """Any node that lives."""
        return self.rng.choice(list(self.cluster))

    async def live(self, user: str) -> None:
        """One user's day."""
        rng = random.Random(self.rng.random())
        connections: list[tuple[Any, str]] = []
        for n in range(DEEDS):
            cid = f"{user}-{rng.randrange(OWN)}"
            deed = rng.choices(
                ("send", "answer", "interrupt", "stop", "resume", "delete", "join", "leave", "alarm", "change"),
                (30, 8, 4, 4, 5, 4, 5, 3, 4, 3),
            )[0]
            manager = self.node()
            try:
                async with asyncio.timeout(15):
                    await self._do(deed, manager, user, cid, rng, connections, n)
                self.done[deed] += 1
            except (ConvenerError, TimeoutError, LookupError) as error:
                self.done[f"{deed}: {type(error).__name__}"] += 1
            await asyncio.sleep(rng.random() * 0.2)
        for manager, connection in connections:
            with contextlib.suppress(ConvenerError):
                await manager.disconnect_from_session(connection)

    async def _do(
        self, deed: str, manager: Any, user: str, cid: str, rng: random.Random, connections: list[Any], n: int
    ) -> None:
        match deed:
            case "send":
                await manager.maybe_start_agent_loop(cid, user_id=user, initial_user_msg={"text": rng.choice(TEXTS)})
            case "answer":
                for question in await manager.questions(cid):
                    await manager.answer(cid, question.ask_id, "yes", user_id=user)
            case "interrupt":
                await manager.interrupt(cid)
            case "stop":
                await manager.close_session(cid, "enough")
            case "resume":
                await manager.resume(cid)
            case "delete":
                await manager.delete(cid)
            case "join":
                connection = f"{user}-k{n}"
                await manager.join_conversation(cid, connection, sink=RecordingSink(), user_id=user)
                manager.begin_replay(connection)
                connections.append((manager, connection))
            case "leave" if connections:
                left, connection = connections.pop()
                await left.disconnect_from_session(connection)
            case "alarm":
                await manager.send_event_to_conversation(cid, {"text": "alarm far"}, user_id=user)
            case "change":
                await manager.set_metadata(cid, {"n": n})
            case _:
                pass

    async def strike(self, people: asyncio.Future[Any]) -> None:
        """Nodes are killed and leave, and others come."""
        for n in range(CASUALTIES):
            await asyncio.sleep(self.rng.uniform(0.3, 1.0))
            if people.done():
                return
            index = self.rng.choice([i for i, m in enumerate(self.cluster.managers) if m is not None])
            await self.cluster.add()
            if n % 2:
                self.done["node left"] += 1
                await self.cluster.leave(index)
            else:
                self.done["node killed"] += 1
                await self.cluster.kill(index)

    async def archive_something(self) -> None:
        """One conversation that stays loaded for long enough."""
        manager = self.node()

        async def is_archived() -> bool:
            with contextlib.suppress(ConvenerError):
                await manager.maybe_start_agent_loop("u0-0", user_id="u0", initial_user_msg={"text": "much"})
            head = await manager.engine.node.store.head("u0-0")
            return head is not None and head.archived > 0

        with contextlib.suppress(ConvenerError):
            await manager.resume("u0-0")
        await wait_until(is_archived, "a log is in the archive", 60)

    async def end(self) -> None:
        """Everybody deletes what they have; a node that is still being taken over may refuse for a while."""

        async def deleted(cid: str) -> bool:
            try:
                await self.node().delete(cid)
            except NotFound:
                return True
            except ConvenerError:
                return False
            return True

        for user in range(USERS):
            for own in range(OWN):
                cid = f"u{user}-{own}"
                await wait_until(lambda cid=cid: deleted(cid), f"{cid} is deleted", 60)


def has_files(folder: Path) -> bool:
    """Whether there is anything but empty folders."""
    return any(path.is_file() for path in folder.rglob("*"))


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with Server("valkey") as server:
        yield server


@pytest.mark.slow
async def test_nothing_is_left_of_a_day(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    print(f"seed {SEED}: replay with CONVENER_TEST_SEED={SEED}")
    for name, value in {"ENOUGH": 30, "WINDOW": 15, "RUBBISH_S": 0.2}.items():
        monkeypatch.setattr(archiving, name, value)
    monkeypatch.setattr(retention, "CREATING_S", 3.0)
    monkeypatch.setattr(members, "FORGET_S", 0.3)
    namespace = f"day{secrets.token_hex(4)}"
    archive_url = tmp_path.as_uri()

    def keys() -> set[str]:
        prefix = f"{{{namespace}:"
        found = {cast("bytes", key).decode() for key in cast("list[Any]", server.ask("KEYS", f"{prefix}*"))}
        assert all(kind_of(key, namespace) for key in found), "a key of no known kind"
        return {key.removeprefix(prefix).replace("}", "", 1) for key in found}

    cluster = InProcessCluster(
        agent,
        url=server.url,
        namespace=namespace,
        options=QUICK,
        archive=lambda node: Archive(open_objects(archive_url), namespace),
    )
    async with cluster:
        day = Day(cluster, random.Random(SEED))
        people = asyncio.ensure_future(asyncio.gather(*(day.live(f"u{n}") for n in range(USERS))))
        await day.strike(people)
        await people
        print(dict(sorted(day.done.items())))
        await day.archive_something()
        held = keys()
        assert {"send", "stop", "delete", "join", "node killed"} <= set(day.done)
        assert any(key.endswith(":log") for key in held)
        assert has_files(tmp_path)
        report = await cluster[len(cluster.managers) - 1].audit()
        assert report["violations"] == []
        await day.end()
        # The night: all but one node leave, and the dead are forgotten.
        *others, last = [i for i, manager in enumerate(cluster.managers) if manager is not None]
        for index in others:
            await cluster.leave(index)
        monkeypatch.setattr(members, "DEAD_KEPT_MS", 0)
        mine = cluster[last].engine.node.incarnation
        own = SINGLETONS | {"m:lease", "m:info", f"n:{mine}:conversations"}
        try:
            await wait_until(lambda: not keys() - own, "nothing is left but what the last node needs", 60)
        except AssertionError as error:
            timers = [server.ask("ZRANGE", f"{{{namespace}:t:{n}}}:due", "0", "-1") for n in range(16)]
            left = f"nobody deletes {sorted(keys() - own)}; timers: {[found for found in timers if found]}"
            raise AssertionError(left) from error
        await wait_until(lambda: not has_files(tmp_path), "the archive is empty")
        await cluster.leave(last)
        assert keys() - SINGLETONS <= {"m:dead", "m:why", f"n:{mine}:conversations"}
