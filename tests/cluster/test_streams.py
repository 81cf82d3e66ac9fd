"""Event streams over HTTP tell what sockets tell, from any node, and go on where they were cut."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from tests.cluster.checks import check_answered
from tests.cluster.clients import Clients
from tests.cluster.talking import Api
from tests.support.cluster import Cluster


@dataclass
class Stream:
    """What one stream has said: log entries, the id of the last one, and the names of all events."""

    lines: Any
    entries: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    names: list[str] = field(default_factory=list[str])
    last_id: str = ""

    async def read_until(self, name: str, count: int = 1) -> None:
        """Read on until `count` events of that name have been said in all."""
        event: dict[str, str] = {}
        while self.names.count(name) < count:
            line: str = await anext(self.lines)
            if line:
                key, _, value = line.partition(":")
                event[key] = value.removeprefix(" ")
                continue
            if "event" in event:
                self.names.append(event["event"])
            if event.get("event") == "event":
                self.entries.append(json.loads(event["data"]))
                self.last_id = event["id"]
                assert self.last_id == self.entries[-1]["cursor"]
            else:
                assert "id" not in event, "only log entries move a client's place"
            event = {}


@asynccontextmanager
async def _stream(api: Api, url: str, cid: str, last_id: str = "", **params: Any) -> AsyncGenerator[Stream]:
    path = f"{url}/api/conversations/{cid}/stream"
    headers = {"Last-Event-ID": last_id} if last_id else {}
    async with api.http.stream("GET", path, params=params, headers=headers) as answer:
        assert answer.status_code == 200
        assert answer.headers["content-type"].startswith("text/event-stream")
        yield Stream(answer.aiter_lines())


async def test_a_stream_tells_what_a_socket_tells_and_goes_on_at_another_node(
    cluster: Cluster, clients: Clients, api: Api
) -> None:
    cid = "streamed"
    guest = await clients.join(cluster.url(0), cid, user_id="u")
    async with _stream(api, cluster.url(1), cid) as first:
        await first.read_until("joined")
        await api.talk(cid, 3)
        await first.read_until("event", 1 + 4 * 3)
    await api.talk(cid, 3)
    # Where it was cut, by the header that browsers send; the cursor is good at every node.
    async with _stream(api, cluster.url(2), cid, first.last_id) as second:
        await second.read_until("joined")
        await api.talk(cid, 2)
        await second.read_until("event", 4 * 5)
    events = await api.answered(cid)
    check_answered(events, api.sent[cid])
    await guest.wait_seq(events[-1]["seq"])
    assert first.entries + second.entries == guest.events == events
    async with _stream(api, cluster.url(1), cid, tail=5) as last:
        await last.read_until("joined")
        assert last.entries == events[-5:]


async def test_a_stream_ends_when_the_conversation_is_stopped(cluster: Cluster, api: Api) -> None:
    await api.start(cluster.url(0), "ended", "u")
    async with _stream(api, cluster.url(1), "ended") as stream:
        await stream.read_until("joined")
        answer = await api.http.post(f"{cluster.url(2)}/api/conversations/ended/stop")
        assert answer.json() == {"outcome": "stopped"}
        await stream.read_until("stopped")
        assert stream.entries[-1]["kind"] == "stopped"
        assert [line async for line in stream.lines if line] == []
