"""`convener chat`, from a pipe and at a terminal, against a real node."""

from __future__ import annotations

import json
import signal
from collections.abc import Generator
from pathlib import Path

import psutil
import pytest

from convener.cli import run
from convener.cli.questions import data_of
from convener.cli.talk import words
from convener.ids import new_id
from tests.support.processes import convener
from tests.support.terminal import Terminal
from tests.support.waiting import wait_until_sync


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Generator[str]:
    """Address of a node with the demo agent."""
    directory = tmp_path_factory.mktemp("node")
    with convener("serve", "--port", "0", "--log-format", "json", directory=directory) as process:
        yield json.loads(process.wait_for_error('"listening"', 60))["url"]
        process.signal(signal.SIGTERM)
        assert process.wait() == 0


class Piped:
    """Runs the command in this process, with lines from a file."""

    def __init__(self, url: str, directory: Path, capsys: pytest.CaptureFixture[str], patch: pytest.MonkeyPatch):
        self._url = url
        self._file = directory / "lines"
        self._capsys = capsys
        self._patch = patch
        self.errors = ""

    def say(self, lines: str, *arguments: str, code: int = 0) -> list[str]:
        """What is printed for these lines; the command ends with `code`."""
        self._file.write_text(lines, encoding="utf-8")
        with self._file.open(encoding="utf-8") as source:
            self._patch.setattr("sys.stdin", source)
            found = run(["chat", *arguments, "--url", self._url])
        captured = self._capsys.readouterr()
        self.errors = captured.err
        assert found == code, captured.err
        return captured.out.splitlines()


@pytest.fixture
def piped(url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Piped:
    return Piped(url, tmp_path, capsys, monkeypatch)


def test_lines_from_a_pipe_are_answered_in_order(piped: Piped) -> None:
    assert piped.say("hello\n\n/stream one two\nlast") == ["agent: hello", "agent: /stream one two", "agent: last"]
    assert piped.errors == ""


def test_the_next_line_answers_a_question(piped: Piped) -> None:
    cid = new_id()
    printed = piped.say('/ask which colour?\nred\n/ask and now?\n{"text": "blue"}\nthank you\n', cid, "--user", "alice")
    assert printed == [
        "agent asks: which colour?",
        "agent: red",
        "agent asks: and now?",
        "agent: blue",
        "agent: thank you",
    ]


def test_a_question_that_was_open_before(piped: Piped) -> None:
    cid = new_id()
    assert piped.say("/ask which colour?\n", cid) == ["agent asks: which colour?"]
    printed = piped.say(":say something else\nred\n", cid, "-n", "0")
    # What was said waits behind the question.
    assert printed == ["agent: red", "agent: something else"]


def test_a_chat_shows_what_was_said_before(piped: Piped) -> None:
    cid = new_id()
    piped.say("first\nsecond\n", cid, "--user", "alice")
    assert piped.say("third\n", cid) == [
        "somebody: first",
        "agent: first",
        "somebody: second",
        "agent: second",
        "agent: third",
    ]
    assert piped.say("fourth\n", cid, "--tail", "0") == ["agent: fourth"]


def test_failures_are_said_and_do_not_end_it(piped: Piped) -> None:
    assert piped.say("/crash\nhello\n") == ["agent: hello"]
    assert piped.errors.startswith("(this failed: ")


def test_quit_ends_it_and_interrupt_says_what_became_of_it(piped: Piped) -> None:
    assert piped.say("hello\n:interrupt\n:quit\nnever said\n") == ["agent: hello"]
    assert piped.errors == "(idle)\n"


def test_a_conversation_that_was_stopped(piped: Piped, url: str) -> None:
    cid = new_id()
    piped.say("hello\n", cid)
    assert run(["stop", cid, "--url", url]) == 0
    piped.say("more\n", cid, code=1)
    assert piped.errors.startswith("error: conversation_stopped: ")


class Chat(Terminal):
    """The command at a terminal of its own."""

    def __init__(self, url: str, cid: str, directory: Path) -> None:
        super().__init__(["chat", cid, "--user", "alice", "--url", url], directory)

    def press_ctrl_c(self) -> None:
        """As soon as it waits for a line: a signal just before that is only noticed with the next key."""
        process = psutil.Process(self.process.pid)
        wait_until_sync(
            lambda: self.look().endswith("> ") and process.status() == psutil.STATUS_SLEEPING, "it waits for a line"
        )
        super().press_ctrl_c()


def test_at_a_terminal(url: str, tmp_path: Path) -> None:
    cid = new_id()
    with Chat(url, cid, tmp_path) as terminal:
        terminal.until(f"conversation {cid}")
        terminal.until("> ")
        terminal.type("hello\n")
        terminal.until("agent: hello")
        terminal.type("/ask which colour?\n")
        terminal.until("agent asks: which colour?")
        terminal.type("red\n")
        terminal.until("agent: red")
        # A refusal does not end it.
        assert run(["stop", cid, "--url", url]) == 0
        terminal.until("the conversation was stopped")
        assert terminal.ended() == 0
        assert "Traceback" not in terminal.look()


def test_ctrl_c_ends_first_what_is_said_then_the_chat(url: str, tmp_path: Path) -> None:
    cid = new_id()
    with Chat(url, cid, tmp_path) as terminal:
        terminal.until("> ")
        terminal.type("/sleep 3600\n")
        # The chat shows in order what it hears, so it knows by now that the agent is at work.
        assert run(["send", cid, "and then?", "--url", url]) == 0
        terminal.until("somebody: and then?")
        terminal.press_ctrl_c()
        terminal.until("(interrupted)")
        terminal.until("agent: and then?")
        assert terminal.process.poll() is None
        assert run(["send", cid, "/crash", "--url", url]) == 0
        terminal.until("(this failed: ")
        terminal.type(":interrupt\n")
        terminal.until("(idle)")
        terminal.press_ctrl_c()
        assert terminal.ended() == 0
        assert "Traceback" not in terminal.look()


def test_ctrl_d_ends_it(url: str, tmp_path: Path) -> None:
    with Chat(url, new_id(), tmp_path) as terminal:
        terminal.until("> ")
        terminal.type("\x04")
        assert terminal.ended() == 0


@pytest.mark.parametrize(
    ("typed", "data"),
    [
        ("red", "red"),
        ('"red"', "red"),
        ("7", 7),
        ("true", True),
        ('{"a": [1]}', {"a": [1]}),
        ("{", "{"),
        ("", ""),
        ("[" * 100_000, "[" * 100_000),
    ],
    ids=lambda value: str(value)[:12],
)
def test_an_answer_is_json_or_text(typed: str, data: object) -> None:
    assert data_of(typed) == data


@pytest.mark.parametrize(
    ("data", "shown"),
    [
        ({"text": "two\nlines"}, "two\nlines"),
        ("plain", "plain"),
        ({"text": "", "x": 1}, ""),
        ({"x": 1}, '{"x": 1}'),
        ({"text": 7}, "7"),
        (None, "null"),
        ("\x1b[31mred\x07", "\\x1b[31mred\\x07"),
    ],
)
def test_what_is_said_is_safe_to_print(data: object, shown: str) -> None:
    assert words(data) == shown
