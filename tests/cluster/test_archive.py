"""Nodes that are real processes archive into a server that speaks S3, are killed meanwhile, and nobody notices."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from convener.store.archive import Archive, LogReader, open_objects
from convener.store.audit import audit
from convener.store.redis import RedisStore
from tests.support.cluster import Cluster
from tests.support.objectstore import BUCKET, ObjectStore
from tests.support.servers import Server
from tests.support.waiting import wait_until_sync

MESSAGES = 90


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[ObjectStore]:
    with ObjectStore() as server:
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        yield server


@pytest.fixture
def nodes(s3: ObjectStore) -> Iterator[Cluster]:
    settings = {"archive_url": s3.url, "lease_ttl": 4, "retention": "1h"}
    with Server("valkey") as server, Cluster(server, 3, settings=settings) as nodes:
        yield nodes


def events(cluster: Cluster, node: int, **query: object) -> dict[str, Any]:
    answer = cluster.http.get(
        f"{cluster.url(node)}/api/conversations/c/events", params={k: str(v) for k, v in query.items()}
    )
    assert answer.status_code == 200, answer.text
    return answer.json()


def forwards(cluster: Cluster, node: int) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    query: dict[str, object] = {"limit": 100}
    while page := events(cluster, node, **query)["events"]:
        found += page
        query["after"] = page[-1]["cursor"]
    return found


def backwards(cluster: Cluster, node: int, last: int) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    before: int | None = last + 1
    while before is not None:
        page = events(cluster, node, before=before, limit=70)
        found = page["events"] + found
        before = page["next"]
    return found


def talk(cluster: Cluster, node: int, first: int) -> None:
    """Send messages, and wait until all are answered."""

    def send(n: int) -> bool:
        body = {"message_id": f"m{n}", "data": {"text": f"message {n}"}}
        answer = cluster.http.post(f"{cluster.url(node)}/api/conversations/c/messages", json=body)
        return answer.status_code == 202

    for n in range(first, first + MESSAGES):
        wait_until_sync(lambda n=n: send(n), f"message {n} is accepted", 60, retry_on=httpx.TransportError)

    def answered() -> bool:
        assert cluster.stored is not None
        head = cluster.stored.head("c")
        return head["done"] == head["position"]

    wait_until_sync(answered, "all are answered", 60)


def archived(cluster: Cluster) -> int:
    assert cluster.stored is not None
    return int(cluster.stored.head("c")["archived"])


@pytest.mark.slow
@pytest.mark.timeout(300)
async def test_archived_by_nodes_that_are_killed(nodes: Cluster, s3: ObjectStore) -> None:
    assert nodes.server is not None
    assert nodes.stored is not None
    body = {"conversation_id": "c", "user_id": "u"}
    assert nodes.http.post(f"{nodes.url(0)}/api/conversations", json=body).status_code == 201
    marks = [0]
    for round_ in range(2):
        talk(nodes, 2, 1 + round_ * MESSAGES)
        wait_until_sync(lambda: archived(nodes) > marks[-1], "its old entries are archived", 60)
        marks.append(archived(nodes))
        owner = nodes.stored.head("c")["owner"].partition("~")[0]
        if owner != "n2":
            nodes.kill(int(owner[1:]))
    log = forwards(nodes, 2)
    assert [e["seq"] for e in log] == list(range(1, len(log) + 1))
    assert [e["data"]["message_id"] for e in log if e["kind"] == "input"] == [f"m{n + 1}" for n in range(2 * MESSAGES)]
    assert backwards(nodes, 2, len(log)) == log
    for place in (3, 250, len(log) - 5):
        assert events(nodes, 2, after=log[place]["cursor"], limit=2)["events"] == log[place + 1 : place + 3]
    objects = open_objects(s3.url)
    async with RedisStore(nodes.server.url) as store:
        report = await audit(store, logs=LogReader(store, Archive(objects)))
    assert report.violations == ()
    assert nodes.http.delete(f"{nodes.url(2)}/api/conversations/c").status_code == 204
    assert "<Contents>" not in nodes.http.get(f"{s3.address}/{BUCKET}?list-type=2").text
