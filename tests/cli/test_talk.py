"""What a chat shows of an answer that is being written: every word once."""

from __future__ import annotations

from typing import Any

import pytest

from convener.cli.client import NodeClient
from convener.cli.talk import Follower, Screen, Talk
from tests.cli.scripted import events, scripted_server
from tests.cli.test_client import STOPPED, piece, turned


def heard(capsys: pytest.CaptureFixture[str], *streams: list[str], live: bool = False) -> str:
    """What is printed of these events, one connection after the other; notes in brackets, in their place."""
    with scripted_server(*(events(*lines) for lines in streams)) as script, NodeClient(script.url, None, 5) as client:
        Follower("c1", client, 50, Talk(), Screen(live=live)).run()
    captured = capsys.readouterr()
    assert captured.err.splitlines()[-1] == "(the conversation was stopped: done)"
    return captured.out


def test_it_is_shown_as_it_comes_and_not_again(capsys: pytest.CaptureFixture[str]) -> None:
    printed = heard(
        capsys,
        [
            *piece(0, "It was a dark"),
            *piece(13, " and\n"),
            *piece(18, "stormy\x1b[31m\r\n"),
            *piece(0, "hmm", part="thought"),
            *piece(0, [1], part="calls"),
            *piece(32, "night"),
            *turned(4, "reply", {"text": "It was a dark and\nstormy\x1b[31m\r\nnight", "thought": "hmm", "calls": [1]}),
            *turned(5, "turn_done", {}),
            *turned(6, "reply", {"text": "at once"}, "t2"),
            *STOPPED,
        ],
    )
    assert printed == "agent: It was a dark and\nstormy\\x1b[31m\nnight\nagent: at once\n"


def test_a_reply_that_says_something_else_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    printed = heard(
        capsys,
        [
            *piece(0, "a draft"),
            *turned(4, "reply", {"text": "a fair copy"}),
            *piece(0, "more"),
            *turned(5, "reply", "more"),
            *STOPPED,
        ],
    )
    assert printed == "agent: a draft\nagent: a fair copy\nagent: more\nagent: more\n"


def test_the_end_of_an_answer_that_came_with_the_reply_alone(capsys: pytest.CaptureFixture[str]) -> None:
    printed = heard(
        capsys,
        [
            *piece(0, "It was a dark"),
            *turned(4, "reply", {"text": "It was a dark and stormy night", "thought": "hmm"}),
            *turned(5, "turn_started", {"attempt": 1}, "t2"),
            *piece(0, "The end", turn="t2"),
            *turned(6, "reply", {"text": 7}, "t2"),
            *STOPPED,
        ],
    )
    assert printed == "agent: It was a dark and stormy night\nagent: The end\nagent: 7\n"


def test_what_comes_in_between_has_lines_of_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    asked: dict[str, Any] = {"ask_id": "t1.1", "prompt": "Which?"}
    printed = heard(
        capsys,
        [
            *piece(0, "one "),
            *turned(4, "input", {"user_id": "bob", "data": "hurry"}, "t2"),
            *piece(4, "two"),
            *turned(5, "ask", asked),
            *piece(7, " three"),
            *turned(6, "turn_failed", {"message": "no"}),
            *STOPPED,
        ],
    )
    assert printed == "agent: one \nbob: hurry\nagent: two\nagent asks: Which?\nagent:  three\n"


def test_what_was_cut_off_begins_again(capsys: pytest.CaptureFixture[str]) -> None:
    with (
        scripted_server(
            events(
                *piece(0, "cut o"),
                *turned(4, "turn_started", {"attempt": 2}),
                *piece(5, "ff", attempt=1),
                *piece(0, "again", attempt=2),
                *turned(5, "reply", {"text": "again", "partial": True}),
                *turned(6, "turn_interrupted", {}),
                *STOPPED,
            )
        ) as script,
        NodeClient(script.url, None, 5) as client,
    ):
        Follower("c1", client, 50, Talk(), Screen(live=False)).run()
    captured = capsys.readouterr()
    assert captured.out == "agent: cut o\nagent: again\n"
    assert captured.err.splitlines()[:2] == ["(this was cut off, and begins again)", "(interrupted)"]


def test_nothing_is_repeated_after_a_reconnection(capsys: pytest.CaptureFixture[str]) -> None:
    printed = heard(
        capsys,
        [*piece(0, "half ")],
        [*piece(0, "half of"), *piece(7, " it"), *turned(4, "reply", {"text": "half of it"}), *STOPPED],
    )
    assert printed == "agent: half of it\n"
    rebuilt = ["event: resync", "data: {}", "", *piece(0, "anew"), *STOPPED]
    assert heard(capsys, [*piece(0, "anew"), *rebuilt]) == "agent: anew\nagent: anew\n"


def test_at_a_terminal_the_prompt_gives_way(capsys: pytest.CaptureFixture[str]) -> None:
    printed = heard(
        capsys, [*piece(0, "Hel"), *piece(3, "lo"), *turned(4, "reply", {"text": "Hello"}), *STOPPED], live=True
    )
    assert printed == "\r\x1b[Kagent: Hello\n\r\x1b[K"
