"""The command line as such: help, usage errors, exit codes, one-line failures."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.main import get_command

from convener.cli import root, run
from convener.ids import is_id, new_id
from convener.version import __version__
from tests.support.processes import free_port

COMMANDS = [
    "answer",
    "audit",
    "chat",
    "conversations",
    "delete",
    "doctor",
    "drain",
    "interrupt",
    "kick",
    "move",
    "nodes",
    "resume",
    "send",
    "serve",
    "show",
    "stop",
    "tail",
    "top",
    "up",
    "why",
]
CLIENTS = {
    "nodes": ["nodes"],
    "top": ["top"],
    "why": ["why", "c1"],
    "conversations": ["conversations"],
    "show": ["show", "c1"],
    "tail": ["tail", "c1"],
    "send": ["send", "c1", "hello"],
    "answer": ["answer", "c1", "t1.1", "yes"],
    "stop": ["stop", "c1"],
    "resume": ["resume", "c1"],
    "delete": ["delete", "c1", "--yes"],
    "audit": ["audit", "--all"],
    "move": ["move", "c1", "n2"],
    "drain": ["drain", "n2"],
    "kick": ["kick", "--user", "u"],
}

Runner = Callable[..., tuple[int, str, str]]


@pytest.fixture
def convener(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Runner:
    """Runs a command line in this process: exit code, output, errors."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")

    def call(*arguments: str) -> tuple[int, str, str]:
        code = run(arguments)
        captured = capsys.readouterr()
        return code, captured.out, re.sub(r"\x1b\[[0-9;]*m", "", captured.err)

    return call


def test_the_commands() -> None:
    assert sorted(getattr(get_command(root.app), "commands")) == COMMANDS  # noqa: B009 - Typer's groups are untyped


def test_version(convener: Runner) -> None:
    assert convener("--version") == (0, f"convener {__version__}\n", "")


def test_help_lists_every_command(convener: Runner) -> None:
    code, output, _ = convener("--help")
    assert code == 0
    for command in COMMANDS:
        assert re.search(rf"│ {command} ", output), command


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_explains_itself_with_an_example(convener: Runner, command: str) -> None:
    code, output, _ = convener(command, "--help")
    assert code == 0
    assert re.search(rf"Examples?: convener {command}", output)


@pytest.mark.parametrize("command", sorted(CLIENTS))
def test_every_client_command_takes_url_token_and_json(convener: Runner, command: str) -> None:
    _, output, _ = convener(command, "--help")
    for option in ("--url", "--token", "--json", "CONVENER_URL"):
        assert option in output


@pytest.mark.parametrize(
    "arguments",
    [
        ["fly"],
        ["show"],
        ["show", "not an id"],
        ["nodes", "--url", "127.0.0.1:8000"],
        ["nodes", "--timeout", "0"],
        ["tail", "c1", "--after", "3", "--tail", "5"],
        ["send", "c1"],
        ["send", "c1", "text", "--data", "{}"],
        ["send", "c1", "--data", "{"],
        ["send", "c1", "text", "--user", "alice"],
        ["send", "c1", "text", "--message-id", "a b"],
        ["send", "c1", "text", "--overlap", "queue"],
        ["answer", "c1", "t1.1"],
        ["answer", "c1", "a b", "yes"],
        ["answer", "c1", "t1.1", "yes", "--message-id", "a b"],
        ["chat", "a b"],
        ["chat", "--tail", "-1"],
        ["conversations", "--mine", "--user", "alice"],
        ["audit"],
        ["why"],
        ["why", "c1", "--last", "0"],
        ["top", "--sort", "name"],
        ["top", "--interval", "0"],
        ["top", "--count", "0"],
        ["top", "--user", "a b"],
        ["audit", "c1", "--all"],
        ["delete", "c1"],
        ["serve", "--port", "70000"],
        ["serve", "--log-format", "yaml"],
        ["serve", "noattribute"],
        ["serve", "--host", "0.0.0.0"],
        ["serve", "--redis", "redis://127.0.0.1", "--data", "d"],
        ["up", "--nodes", "0"],
        ["up", "--port", "65535"],
        ["up", "--redis", "nonsense"],
    ],
    ids=" ".join,
)
def test_wrong_usage_ends_with_2(convener: Runner, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    # Typer prints its usage panels with colours if it believes that it runs under GitHub Actions.
    monkeypatch.delenv("GITHUB_ACTIONS", raising=False)
    code, output, errors = convener(*arguments)
    assert code == 2
    assert output == ""
    assert errors
    assert "Traceback" not in errors


def test_without_a_command_there_is_help(convener: Runner) -> None:
    code, output, errors = convener()
    assert code == 2
    assert "Usage: convener" in output + errors


@pytest.mark.parametrize("command", sorted(CLIENTS))
def test_an_unreachable_node_is_one_line(convener: Runner, command: str) -> None:
    url = f"http://127.0.0.1:{free_port()}"
    code, output, errors = convener(*CLIENTS[command], "--url", url)
    assert (code, output) == (1, "")
    assert errors == (f"error: cannot reach a node at {url}: connection refused (is it running? --url names another)\n")


def test_a_chat_with_an_unreachable_node_is_one_line(convener: Runner) -> None:
    code, output, errors = convener("chat", "--url", f"http://127.0.0.1:{free_port()}")
    assert (code, output, errors.count("\n")) == (1, "", 1)
    assert errors.startswith("error: cannot reach a node")


def test_the_url_comes_from_the_environment(convener: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    url = f"http://127.0.0.1:{free_port()}"
    monkeypatch.setenv("CONVENER_URL", url + "/")
    code, _, errors = convener("nodes")
    assert code == 1
    assert f"cannot reach a node at {url}:" in errors


def test_a_fresh_id_is_never_taken_for_an_option() -> None:
    assert not [found for found in (new_id() for _ in range(2000)) if "-" in found or not is_id(found)]


def test_an_id_that_looks_like_an_option_can_be_written(convener: Runner) -> None:
    url = f"http://127.0.0.1:{free_port()}"
    code, _, errors = convener("show", "--url", url, "--", "-c1")
    assert code == 1
    assert "cannot reach" in errors


def test_an_unexpected_error_is_one_line_unless_the_traceback_is_asked_for(
    convener: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    def explode(*_: object) -> None:
        raise KeyError("surprise")

    monkeypatch.setattr("convener.cli.nodes.NodeClient", explode)
    code, _, errors = convener("nodes")
    assert (code, errors.count("\n")) == (1, 1)
    assert errors.startswith("error: unexpected KeyError: 'surprise'")
    code, _, errors = convener("--traceback", "nodes")
    assert code == 1
    assert "Traceback (most recent call last)" in errors


def test_ctrl_c_ends_a_command_without_a_traceback(convener: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("convener.cli.nodes.NodeClient", interrupted)
    code, output, errors = convener("nodes")
    assert (code, output) == (1, "")
    assert "Traceback" not in errors
