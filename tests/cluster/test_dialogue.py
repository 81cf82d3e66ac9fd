"""Real dialogue, through the whole system: every line accepted once, answered once, seen by everybody in one order."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import chatterbot_corpus
import httpx
import pytest
import yaml

from tests.cluster.checks import check_answered, opened
from tests.cluster.clients import Client, Clients
from tests.support.cluster import Cluster

CONVERSATIONS: Final = 50
LINES: Final = 44
PER_USER: Final = 3


def _corpus() -> list[str]:
    """Everything that is said in the English files, in order."""
    directory = Path(chatterbot_corpus.__file__).parent / "data" / "english"
    lines: list[str] = []
    for file in sorted(directory.glob("*.yml")):
        document = yaml.load(file.read_text(encoding="utf-8"), Loader=yaml.CSafeLoader)
        lines += [line for dialogue in document["conversations"] for line in dialogue]
    return lines


@dataclass
class Talk:
    """One conversation: what is to be said, who says it, and who looks on."""

    cid: str
    user: str
    script: Sequence[str]
    nodes: list[int]
    sent: dict[str, str] = field(default_factory=dict[str, str])
    positions: dict[str, int] = field(default_factory=dict[str, int])
    clients: list[Client] = field(default_factory=list[Client])

    async def hold(self, cluster: Cluster, clients: Clients) -> None:
        """Two speakers on two nodes take turns; a third one comes to listen half-way, on the third node."""
        for node in self.nodes[:2]:
            client = await clients.join(cluster.url(node), self.cid, user_id=self.user, name=f"{self.cid} at n{node}")
            self.clients.append(client)
        for number, text in enumerate(self.script):
            if number == len(self.script) // 2:
                late = await clients.join(
                    cluster.url(self.nodes[2]), self.cid, user_id=self.user, name=f"{self.cid}, late"
                )
                self.clients.append(late)
            await self._say(number, text)

    async def _say(self, number: int, text: str) -> None:
        ident = f"{self.cid}.{number}"
        self.sent[ident] = text
        speakers = [self.clients[number % 2]]
        if number % 10 == 9:
            # Both say it under one id, at the same moment.
            speakers.append(self.clients[(number + 1) % 2])
        answers = await asyncio.gather(*(speaker.say(text, ident) for speaker in speakers))
        assert sorted(answer["duplicate"] for answer in answers) == [False, True][: len(answers)]
        assert {answer["message_id"] for answer in answers} == {ident}
        (self.positions[ident],) = {answer["position"] for answer in answers}


def _talks(rng: random.Random) -> list[Talk]:
    corpus = _corpus()
    assert len(corpus) >= CONVERSATIONS * LINES > 2000
    rng.shuffle(corpus)
    talks: list[Talk] = []
    for number in range(CONVERSATIONS):
        script = corpus[number * LINES : (number + 1) * LINES]
        nodes = rng.sample(range(3), 3)
        talks.append(Talk(f"dialogue-{number}", f"user-{number // PER_USER}", script, nodes))
    return talks


@pytest.mark.slow
async def test_every_line_of_a_corpus_is_answered_once_and_seen_in_one_order(
    cluster: Cluster, clients: Clients, rng: random.Random
) -> None:
    talks = _talks(rng)
    await asyncio.gather(*(talk.hold(cluster, clients) for talk in talks))
    async with httpx.AsyncClient(trust_env=False, timeout=30, limits=httpx.Limits(max_keepalive_connections=0)) as http:
        await asyncio.gather(*(_check_views(cluster, clients, talk) for talk in talks))
        for talk in talks:
            await _check_pages(http, cluster, talk, rng)
        await _check_every_replay(cluster, clients, talks[0], rng)
        for talk in talks[1:]:
            await _check_replay(cluster, clients, talk, rng.randint(0, talk.clients[0].last_seq), rng)


async def _check_views(cluster: Cluster, clients: Clients, talk: Talk) -> None:
    """All clients, one that comes when all is said among them, have seen the same history: the log."""
    after_all = await clients.join(cluster.url(talk.nodes[0]), talk.cid, user_id=talk.user, name=f"{talk.cid}, last")
    talk.clients.append(after_all)
    for client in talk.clients:
        await client.wait_for(LINES, "turn_done", limit=60)
    first = talk.clients[0].events
    check_answered(first, talk.sent)
    assert len(opened(first)) == 1, "nobody else took it meanwhile"
    for client in talk.clients:
        assert client.events == first
        assert client.named("resync") == []
    positions = {e["data"]["message_id"]: int(e["turn"][1:]) for e in first if e["kind"] == "input"}
    assert positions == talk.positions
    assert sorted(positions.values()) == list(range(1, LINES + 1))
    last = after_all.named("joined")[0]
    assert last["last_seq"] <= len(first)
    assert last["cursor"] == first[last["last_seq"] - 1]["cursor"]


async def _check_pages(http: httpx.AsyncClient, cluster: Cluster, talk: Talk, rng: random.Random) -> None:
    """Pages over HTTP, forwards by cursor and backwards by number, are what the sockets were shown."""
    expected = talk.clients[0].events

    async def page(**params: Any) -> dict[str, Any]:
        url = f"{cluster.url(rng.randrange(3))}/api/conversations/{talk.cid}/events"
        answer = await http.get(url, params=params)
        assert answer.status_code == 200
        found: dict[str, Any] = answer.json()
        assert len(found["events"]) <= params["limit"]
        assert not found["resync"]
        return found

    forwards: list[Any] = []
    found = await page(limit=(limit := rng.randint(20, 200)))
    while found["events"]:
        forwards += found["events"]
        found = await page(limit=limit, after=found["next"])
    assert forwards == expected
    backwards: list[Any] = []
    before: int | None = len(expected) + 1
    while before is not None:
        found = await page(limit=limit, before=before)
        backwards, before = found["events"] + backwards, found["next"]
    assert backwards == expected
    between = await page(limit=1000, after=expected[9]["cursor"], before=31)
    assert between["events"] == expected[10:30]


async def _check_every_replay(cluster: Cluster, clients: Clients, talk: Talk, rng: random.Random) -> None:
    """From each place of one conversation."""
    for seq in range(len(talk.clients[0].events) + 1):
        await _check_replay(cluster, clients, talk, seq, rng)


async def _check_replay(cluster: Cluster, clients: Clients, talk: Talk, seq: int, rng: random.Random) -> None:
    """What comes after `seq`, asked for by cursor, by number, as a text, or as a tail, on any node."""
    expected = talk.clients[0].events
    ways: list[dict[str, Any]] = [
        {"after": expected[seq - 1]["cursor"] if seq else 0},
        {"after": seq},
        {"after": str(seq)},
        {"tail": len(expected) - seq},
    ]
    hello = rng.choice(ways)
    client = await clients.join(cluster.url(rng.randrange(3)), talk.cid, user_id=talk.user, **hello)
    assert client.events == expected[seq:], f"asked for {hello}"
    assert client.named("resync") == []
    assert client.named("joined")[0]["last_seq"] == len(expected)
    await client.close()
