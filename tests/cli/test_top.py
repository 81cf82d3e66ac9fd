"""`convener top`: what fits on a screen, what a pipe gets, and how it ends."""

from __future__ import annotations

import io
import json
import signal
from collections.abc import Generator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from convener.cli import run
from convener.cli.overview import Overview, Snapshot, duration, order
from tests.cli.scripted import Answer, problem, scripted_server
from tests.support.processes import RunningProcess, convener
from tests.support.terminal import Terminal
from tests.support.waiting import wait_until_sync

AT = datetime(2026, 11, 22, 12, 0, 0, tzinfo=UTC)


@dataclass
class Solo:
    """A node with the demo agent and two conversations."""

    process: RunningProcess
    url: str


@pytest.fixture
def solo(tmp_path: Path) -> Generator[Solo]:
    command = ["serve", "--port", "0", "--node-name", "solo", "--log-format", "json"]
    with convener(*command, directory=tmp_path) as process:
        url = str(json.loads(process.wait_for_error('"listening"', 60))["url"])
        for cid, user in (("c1", "ada"), ("c2", "bob")):
            assert run(["send", cid, "hello", "--create", "--user", user, "--url", url]) == 0
        yield Solo(process, url)


def member(name: str, state: str = "live", **more: Any) -> dict[str, Any]:
    return {
        "name": name,
        "incarnation": f"{name}~0123456789ab",
        "state": state,
        "version": "0.2.0",
        "protocol": 1,
        "address": "",
        "conversations": 3,
        "connections": 2,
        "lag": None,
        "started_at": "2026-11-22T11:00:00.000Z",
        "last_renewal": "2026-11-22T11:59:59.500Z",
    } | more


def row(cid: str, status: str = "idle", **more: Any) -> dict[str, Any]:
    return {
        "conversation_id": cid,
        "user_id": "ada",
        "status": status,
        "node": "node-1",
        "epoch": 7,
        "connections": 1,
    } | more


def printed(snapshot: Snapshot, width: int, height: int | None = None) -> list[str]:
    out = Console(file=io.StringIO(), width=width, height=height or 25, force_terminal=False, markup=False)
    with out.capture() as captured:
        out.print(Overview(snapshot, screen=height is not None))
    return [line.rstrip() for line in captured.get().splitlines()]


# --- what it looks like ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("height", [8, 12, 24, 60])
@pytest.mark.parametrize("width", [20, 40, 64, 80, 200])
def test_it_fits_on_every_screen(width: int, height: int) -> None:
    nodes = [member(f"node-{number}") for number in range(12)]
    rows = [row(f"a-conversation-with-a-long-name-{number:03}") for number in range(300)]
    lines = printed(Snapshot(AT, "http://a-host-with-a-long-name.example:8000", nodes, rows), width, height)
    assert max(len(line) for line in lines) <= width
    assert len(lines) <= height
    assert any(line.startswith("node-0") for line in lines)


def test_a_pipe_gets_everything() -> None:
    nodes = [member("node-1"), member("node-2", "draining", last_renewal="2026-11-22T11:59:58.000Z")]
    rows = [row(f"conversation-{number}", "running") for number in range(100)]
    lines = printed(Snapshot(AT, "http://localhost:8000", nodes, rows, more=True), 1000)
    assert lines[0] == "12:00:00  http://localhost:8000"
    assert lines[1] == "nodes: 1 draining, 1 live; clients: 4"
    assert lines[2] == "conversations: 100+ (100 running)"
    assert lines[4].split()[:6] == ["NODE", "STATE", "CONV", "CLIENTS", "RENEWED", "UP"]
    assert lines[5].split()[:8] == ["node-1", "live", "3", "2", "0.0", "s", "1", "h"]
    assert lines[6].split()[:6] == ["node-2", "draining", "3", "2", "1.5", "s"]
    assert lines[8].split() == ["CONVERSATION", "STATUS", "NODE", "CLIENTS", "USER", "EPOCH"]
    assert len(lines) == 109


def test_a_screen_without_room_says_how_much_is_missing() -> None:
    rows = [row(f"c{number}") for number in range(50)]
    lines = printed(Snapshot(AT, "http://localhost:8000", [member("node-1")], rows), 80, 20)
    shown = [line for line in lines if line.startswith("c") and not line.startswith("conversations")]
    assert len(lines) == 20
    assert lines[-1] == f"and {50 - len(shown)} more"


def test_nothing_at_all() -> None:
    assert printed(Snapshot(AT, "http://localhost:8000"), 80) == [
        "12:00:00  http://localhost:8000",
        "nodes: none; clients: 0",
        "conversations: 0",
    ]


def test_a_problem_is_shown_above_what_is_old() -> None:
    lines = printed(Snapshot(AT, "http://localhost:8000", [member("node-1")], problem="no answer\x1b[2J"), 80)
    assert lines[3] == "no answer\\x1b[2J"


def test_the_order() -> None:
    rows = [row("b", "idle", connections=9), row("c", "recovering"), row("a", "idle"), row("d", "something new")]
    assert [r["conversation_id"] for r in order(rows, "status")] == ["c", "a", "b", "d"]
    assert [r["conversation_id"] for r in order(rows, "connections")] == ["b", "a", "c", "d"]
    assert [r["conversation_id"] for r in order(rows, "conversation_id")] == ["a", "b", "c", "d"]


def test_durations() -> None:
    found = [duration(seconds) for seconds in (-1, 0, 59, 61, 3600, 90_061)]
    assert found == ["0 s", "0 s", "59 s", "1 min 1 s", "1 h", "1 d 1 h"]


# --- in a pipe --------------------------------------------------------------------------------------------------------


def test_json_is_one_document_or_a_line_for_each_look(solo: Solo, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()

    def looked(*arguments: str) -> str:
        assert run(["top", "--json", "--url", solo.url, *arguments]) == 0
        return capsys.readouterr().out

    def ids(found: Any) -> list[str]:
        return [each["conversation_id"] for each in found["conversations"]]

    found = json.loads(looked())
    assert [each["name"] for each in found["nodes"]] == ["solo"]
    assert ids(found) == ["c1", "c2"]
    assert (sum(found["counts"].values()), found["more"]) == (2, False)
    lines = looked("-n", "3", "-i", "0.1", "--user", "bob").splitlines()
    assert [ids(json.loads(line)) for line in lines] == [["c2"]] * 3
    found = json.loads(looked("--limit", "1", "--sort", "user"))
    assert (ids(found), found["more"]) == (["c1"], True)
    found = json.loads(looked("--node", "other"))
    assert (found["nodes"], found["conversations"]) == ([], [])


def test_text_is_printed_once(solo: Solo, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert run(["top", "--url", solo.url]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1] == "nodes: 1 live; clients: 0"
    assert [line.split()[0] for line in lines[-2:]] == ["c1", "c2"]


def test_who_may_not_is_told_so(capsys: pytest.CaptureFixture[str]) -> None:
    with scripted_server(problem(403, "not_authorized", "this needs the admin token")) as script:
        assert run(["top", "--url", script.url]) == 1
    assert capsys.readouterr().err == "error: not_authorized: this needs the admin token\n"


def test_a_later_look_that_fails_is_told_and_the_next_one_tried(capsys: pytest.CaptureFixture[str]) -> None:
    good = (Answer(200, b'{"nodes": []}'), Answer(200, b'{"conversations": [], "next": null}'))
    bad = problem(503, "store_unavailable", "no answer")
    with scripted_server(*good, bad, *good) as script:
        assert run(["top", "--json", "-n", "3", "-i", "0.1", "--url", script.url]) == 0
    captured = capsys.readouterr()
    assert len(captured.out.splitlines()) == 2
    assert captured.err == "error: asking again: store_unavailable: no answer\n"


# --- on a screen ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["q", "ctrl-c"])
def test_it_shows_what_is_new_and_leaves_the_terminal_as_it_was(solo: Solo, tmp_path: Path, how: str) -> None:
    with Terminal(["top", "-i", "0.2", "--url", solo.url], tmp_path, (24, 60)) as terminal:
        terminal.until("solo")
        terminal.until("c2")
        assert run(["send", "c3", "hello", "--create", "--url", solo.url]) == 0
        terminal.until("c3")
        if how == "q":
            terminal.type("x")
            terminal.type("q")
        else:
            terminal.press_ctrl_c()
        assert terminal.ended() == 0
        assert terminal.settings() == terminal.before
        assert "Traceback" not in terminal.look()


def test_a_node_that_goes_away_is_asked_again(solo: Solo, tmp_path: Path) -> None:
    with Terminal(["top", "-i", "0.2", "--url", solo.url], tmp_path, (24, 120)) as terminal:
        terminal.until("c2")
        solo.process.signal(signal.SIGKILL)
        wait_until_sync(lambda: solo.process.process.poll() is not None, "the node is gone")
        terminal.until("asking again")
        assert terminal.process.poll() is None
        terminal.type("q")
        assert terminal.ended() == 0
