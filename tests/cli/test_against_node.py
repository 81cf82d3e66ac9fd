"""The commands against a real node: standalone, with the demo agent."""

from __future__ import annotations

import json
import re
import signal
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest

from convener.cli import run
from convener.ids import new_id
from tests.support.processes import RunningProcess, convener
from tests.support.waiting import wait_until_sync

TOKEN = "an-admin-token"


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Generator[str]:
    """Address of a node whose admin routes need `TOKEN`."""
    directory = tmp_path_factory.mktemp("node")
    command = ["serve", "--port", "0", "--node-name", "solo", "--log-format", "json"]
    with convener(*command, directory=directory, environment={"CONVENER_ADMIN_TOKEN": TOKEN}) as process:
        yield json.loads(process.wait_for_error('"listening"', 60))["url"]
        process.signal(signal.SIGTERM)
        assert process.wait() == 0


class Commands:
    """Runs command lines in this process."""

    def __init__(self, url: str, capsys: pytest.CaptureFixture[str]) -> None:
        self._url = url
        self._capsys = capsys
        self.errors = ""

    def text(self, *arguments: str, code: int = 0, token: str = TOKEN) -> str:
        """What the command prints; it ends with `code`."""
        found = run([*arguments, "--url", self._url, "--token", token])
        captured = self._capsys.readouterr()
        self.errors = captured.err
        assert found == code, captured.err
        return captured.out

    def json(self, *arguments: str) -> Any:
        """The document that the command prints with --json."""
        return json.loads(self.text(*arguments, "--json"))

    def log(self, cid: str) -> list[dict[str, Any]]:
        """All entries of a conversation."""
        return [json.loads(line) for line in self.text("tail", cid, "--no-follow", "--json").splitlines()]

    def answered(self, cid: str, count: int) -> list[dict[str, Any]]:
        """The log, once it holds `count` finished turns."""

        def look() -> list[dict[str, Any]] | None:
            entries = self.log(cid)
            return entries if sum(entry["kind"] == "turn_done" for entry in entries) >= count else None

        entries = wait_until_sync(look, f"{cid} has answered {count} messages")
        assert entries is not None
        return entries


@pytest.fixture
def command(url: str, capsys: pytest.CaptureFixture[str]) -> Commands:
    return Commands(url, capsys)


def test_nodes(command: Commands) -> None:
    (node,) = command.json("nodes")["nodes"]
    assert (node["name"], node["state"]) == ("solo", "live")
    heading, row = command.text("nodes").splitlines()
    assert heading.startswith("NODE")
    assert re.match(r"solo +live ", row)


def test_a_conversation_from_its_first_message_to_its_end(command: Commands) -> None:
    cid = new_id()
    assert re.fullmatch(
        r"accepted at position 1 as \S+\n", command.text("send", cid, "hello", "--create", "--user", "alice")
    )
    command.answered(cid, 1)
    assert command.text("send", cid, "again", "--message-id", "m2") == "accepted at position 2 as m2\n"
    assert command.text("send", cid, "again", "--message-id", "m2") == (
        "accepted at position 2 as m2 (again: it was there already)\n"
    )
    entries = command.answered(cid, 2)
    assert [entry["seq"] for entry in entries] == list(range(1, len(entries) + 1))
    assert [entry["data"] for entry in entries if entry["kind"] == "reply"] == [{"text": "hello"}, {"text": "again"}]
    assert command.json("show", cid)["user_id"] == "alice"
    assert re.search(r"^last_seq +\d+", command.text("show", cid), re.M)

    assert command.text("stop", cid) in ("stopped\n", "stopping\n")
    wait_until_sync(lambda: command.json("show", cid)["status"] == "stopped", f"{cid} is stopped")
    assert command.text("stop", cid) == "already_stopped\n"
    command.text("send", cid, "too late", code=1)
    assert command.errors.startswith("error: conversation_stopped: ")
    assert command.json("resume", cid)["outcome"] == "resumed"
    command.text("send", cid, "back")
    command.answered(cid, 3)

    assert command.text("delete", cid, "--yes") == "deleted\n"
    command.text("show", cid, code=1)
    assert command.errors.startswith("error: not_found: ")


def test_conversations_of_a_user(command: Commands) -> None:
    user, cids = new_id(), [new_id(), new_id()]
    for cid in cids:
        command.text("send", cid, "hello", "--create", "--user", user)
    rows = command.json("conversations", "--user", user)
    assert sorted(row["conversation_id"] for row in rows) == sorted(cids)
    assert command.json("conversations", "--user", user, "--node", "elsewhere") == []
    assert command.text("conversations", "--user", "nobody") == ""
    assert command.errors == "no conversations\n"
    assert len(command.json("conversations", "--user", user, "--limit", "1")) == 1


def test_from_standard_input(command: Commands, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    cid = new_id()
    file = tmp_path / "message"
    file.write_text("line one\nline two")
    with file.open() as lines:
        monkeypatch.setattr("sys.stdin", lines)
        command.text("send", cid, "-", "--create")
    replies = [entry["data"] for entry in command.answered(cid, 1) if entry["kind"] == "reply"]
    assert replies == [{"text": "line one\nline two"}]


def test_questions_are_shown_and_answered(command: Commands, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    cid = new_id()
    command.text("send", cid, "/ask which colour?", "--create")
    wait_until_sync(lambda: command.json("show", cid)["status"] == "waiting", f"{cid} waits for an answer")
    (question,) = command.json("show", cid)["questions"]
    assert question == {"ask_id": "t1.1", "prompt": "which colour?", "schema": None, "deadline": None}
    assert re.search(r"^t1\.1 +which colour\?", command.text("show", cid), re.M)
    assert command.text("answer", cid, "t1.1", "red", "--message-id", "a1") == "accepted at position 2 as a1\n"
    again = command.text("answer", cid, "t1.1", "red", "--message-id", "a1")
    assert again == "accepted at position 2 as a1 (again: it was there already)\n"
    command.text("answer", cid, "t1.1", "green", code=1)
    assert command.errors.startswith("error: ask_closed: ")
    command.answered(cid, 1)
    assert command.json("show", cid)["questions"] == []
    assert "QUESTION" not in command.text("show", cid)

    file = tmp_path / "answer"
    file.write_text('{"text": "blue"}\n')
    command.text("send", cid, "/ask again?")
    wait_until_sync(lambda: command.json("show", cid)["questions"], "it asks again")
    with file.open() as lines:
        monkeypatch.setattr("sys.stdin", lines)
        assert command.json("answer", cid, "t3.1", "-")["status"] == "accepted"
    replies = [entry["data"]["text"] for entry in command.answered(cid, 2) if entry["kind"] == "reply"]
    assert replies == ["red", "blue"]


def test_overlap(command: Commands) -> None:
    cid = new_id()
    command.text("send", cid, "/sleep 3600", "--create")
    command.text("send", cid, "no", "--overlap", "reject", code=1)
    assert command.errors.startswith("error: conversation_busy: ")
    command.text("send", cid, "later", "--overlap", "enqueue")
    command.text("send", cid, "now", "--overlap", "interrupt")
    entries = command.answered(cid, 1)
    assert [entry["turn"] for entry in entries if entry["kind"] == "turn_interrupted"] == ["t1", "t2"]
    assert [entry["data"] for entry in entries if entry["kind"] == "reply"] == [{"text": "now"}]


def test_tail_from_a_place(command: Commands) -> None:
    cid = new_id()
    command.text("send", cid, "hello", "--create")
    entries = command.answered(cid, 1)
    last_two = command.text("tail", cid, "--no-follow", "--json", "-n", "2").splitlines()
    assert [json.loads(line) for line in last_two] == entries[-2:]
    for after in (str(entries[1]["seq"]), entries[1]["cursor"]):
        rest = command.text("tail", cid, "--no-follow", "--json", "--after", after).splitlines()
        assert [json.loads(line) for line in rest] == entries[2:]
    lines = command.text("tail", cid, "--no-follow").splitlines()
    assert len(lines) == len(entries)
    assert any(re.search(r"reply +hello$", line) for line in lines)


def test_tail_follows_until_ctrl_c(command: Commands, url: str, tmp_path: Path) -> None:
    cid = new_id()
    command.text("send", cid, "first", "--create")
    with convener("tail", cid, "--json", "--url", url, "--token", TOKEN, directory=tmp_path) as process:
        process.wait_for_output('"turn_done"')
        command.text("send", cid, "second")
        process.wait_for_output('"second"')
        process.signal(signal.SIGINT)
        assert process.wait() == 0
        assert process.errors == []


def test_tail_shows_an_answer_once(command: Commands, url: str, tmp_path: Path) -> None:
    cid = new_id()
    command.text("send", cid, "hello", "--create")
    with convener("tail", cid, "--url", url, "--token", TOKEN, directory=tmp_path) as process:
        process.wait_for_output("turn_done")
        command.text("send", cid, "/stream one two three")
        wait_until_sync(lambda: sum("turn_done" in line for line in process.output) == 2, "it is answered")
        said = [line for line in process.output if "  reply  " in line]
        assert [re.sub(r".* reply +", "", line) for line in said] == ["hello", "/stream one two three"]
        process.signal(signal.SIGINT)
        assert process.wait() == 0


def test_tail_ends_when_the_conversation_is_stopped(command: Commands, url: str, tmp_path: Path) -> None:
    cid = new_id()
    command.text("send", cid, "hello", "--create")
    with convener("tail", cid, "--url", url, "--token", TOKEN, directory=tmp_path) as process:
        process.wait_for_output("turn_done")
        command.text("stop", cid)
        assert process.wait() == 0
        assert process.errors[-1].startswith("the conversation was stopped: ")


def test_tail_survives_the_nodes_restart(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The data outlive the process; the follower sees every entry once."""

    def node(port: str) -> RunningProcess:
        arguments = ["--port", port, "--data", "data", "--log-format", "json"]
        return convener("serve", *arguments, directory=tmp_path)

    with node("0") as first:
        url = json.loads(first.wait_for_error('"listening"', 60))["url"]
        command = Commands(url, capsys)
        command.text("send", "c1", "first", "--create")
        with convener("tail", "c1", "--json", "--url", url, directory=tmp_path) as follower:
            follower.wait_for_output('"turn_done"')
            first.signal(signal.SIGTERM)
            assert first.wait() == 0
            with node(url.rpartition(":")[2]) as second:
                second.wait_for_error('"listening"', 60)
                command.text("send", "c1", "second")
                wait_until_sync(
                    lambda: sum('"turn_done"' in line for line in follower.output) == 2, "the follower saw it"
                )
                sequence = [json.loads(line)["seq"] for line in follower.output]
                assert sequence == list(range(1, len(sequence) + 1))


def test_the_admin_commands_need_the_token(command: Commands) -> None:
    for arguments in (["nodes"], ["conversations"], ["audit", "--all"]):
        command.text(*arguments, token="wrong", code=1)
        assert re.match(r"error: not_auth\w+: ", command.errors)


def test_audit_finds_nothing_wrong(command: Commands) -> None:
    cid = new_id()
    command.text("send", cid, "hello", "--create")
    command.answered(cid, 1)
    report = command.json("audit", cid)
    assert report["violations"] == []
    assert report["conversations"] == 1
    assert command.text("audit", "--all").startswith("no violations; ")
