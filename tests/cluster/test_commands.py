"""The commands that talk to a node, against a real cluster."""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path
from typing import Any

from tests.cluster.agents import scripted
from tests.cluster.checks import check_answered, check_explained
from tests.cluster.talking import Api, until_started
from tests.support.cluster import Cluster


async def _run(cluster: Cluster, directory: Path, *arguments: str, code: int = 0) -> str:
    """What `convener ARGUMENTS` prints: its output, or its error if it ends with another code than 0."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        *("-m", "convener", *arguments, "--url", cluster.url(1)),
        cwd=directory,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    output, errors = await process.communicate()
    assert process.returncode == code, errors.decode()
    assert b"Traceback" not in errors
    return (errors if code else output).decode()


@scripted
async def test_why_says_what_has_happened(cluster: Cluster, api: Api, tmp_path: Path) -> None:
    await api.start(cluster.url(0), "c1", "u")
    await api.deliver("c1", "/hang", "m1")
    await until_started(cluster, "c1", 1)
    cluster.kill(0)
    events = await api.answered("c1")
    found = json.loads(await _run(cluster, tmp_path, "why", "c1", "--json"))
    check_explained(found, events)
    words = [line.rstrip() for line in (await _run(cluster, tmp_path, "why", "c1")).splitlines()]
    owner = found["owner"]["node"]
    assert words[0].startswith(f"c1 is idle; {owner} owns it since 20")
    assert words[1].startswith(f"its lease: {owner} renews its lease; renewed last at ")
    assert words[2] == "waits for: nothing: everything is answered"
    assert words[4].endswith("  started on n0")
    assert f"taken over by {owner}, since n0 was buried " in words[5]
    assert "process gone, seen by n" in words[5]
    short = (await _run(cluster, tmp_path, "why", "c1", "--last", "1")).splitlines()
    assert [line.rstrip() for line in short[4:]] == words[5:]
    assert "not_found" in await _run(cluster, tmp_path, "why", "c2", code=1)


async def test_every_command_does_on_a_cluster_what_it_says(cluster: Cluster, api: Api, tmp_path: Path) -> None:
    async def asked(*arguments: str) -> Any:
        return json.loads(await _run(cluster, tmp_path, *arguments, "--json"))

    sent = await asked("send", "c1", "hello", "--create", "--user", "u", "--message-id", "m1")
    assert sent == {"status": "accepted", "message_id": "m1", "position": 1, "duplicate": False}
    assert (await asked("send", "c1", "hello", "--message-id", "m1"))["duplicate"] is True
    api.sent["c1"]["m1"] = "hello"
    events = await api.answered("c1")
    check_answered(events, api.sent["c1"])
    nodes, conversations, shown, tail, audit = await asyncio.gather(
        asked("nodes"),
        asked("conversations", "--user", "u"),
        asked("show", "c1"),
        _run(cluster, tmp_path, "tail", "c1", "--no-follow", "--json"),
        _run(cluster, tmp_path, "audit", "--all"),
    )
    assert {node["name"] for node in nodes["nodes"] if node["state"] == "live"} == {"n0", "n1", "n2"}
    assert [row["conversation_id"] for row in conversations] == ["c1"]
    assert (shown["user_id"], shown["last_seq"], shown["node"]) == ("u", len(events), "n1")
    assert [json.loads(line) for line in tail.splitlines()] == events
    assert audit.startswith("no violations; ")
    assert await asked("stop", "c1") == {"outcome": "stopped"}
    assert "conversation_stopped" in await _run(cluster, tmp_path, "send", "c1", "too late", code=1)
    assert await asked("resume", "c1") == {"outcome": "resumed"}
    await _run(cluster, tmp_path, "delete", "c1", "--yes")
    assert "not_found" in await _run(cluster, tmp_path, "show", "c1", code=1)
