"""The commands against answers that a healthy node does not give: refusals, cut connections, other servers."""

from __future__ import annotations

import json
from typing import Any

import pytest

from convener.cli import run
from convener.cli.sse import ServerSentEvent, parse_events
from convener.cli.tail import describe
from tests.cli.scripted import Answer, events, problem, scripted_server

ACCEPTED = Answer(202, b'{"status": "accepted", "message_id": "m1", "position": 7, "duplicate": false}')


def entry(seq: int, kind: str = "input", data: Any = None) -> dict[str, Any]:
    return {"seq": seq, "cursor": f"c{seq}", "epoch": 1, "kind": kind, "turn": "", "data": data, "ts": 0}


def logged(seq: int, data: str = "x") -> list[str]:
    return ["event: event", f"id: c{seq}", f"data: {json.dumps(entry(seq, 'reply', {'text': data}))}", ""]


# --- refusals ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (problem(404, "not_found", "no conversation c1"), "error: not_found: no conversation c1\n"),
        (
            problem(429, "limit_exceeded", "3 of 3 are running", **{"Retry-After": "5"}),
            "error: limit_exceeded: 3 of 3 are running (try again in 5 s)\n",
        ),
        (Answer(502, b"<html>"), "error: HTTP 502 Bad Gateway\n"),
        (Answer(200, b"<html>"), "error: {url} does not answer like a convener node (no JSON)\n"),
        (Answer(cut=True), "error: cannot reach a node at {url}: "),
    ],
    ids=["problem", "retry-after", "not a problem", "not JSON", "cut"],
)
def test_a_refusal_is_one_line(capsys: pytest.CaptureFixture[str], answer: Answer, expected: str) -> None:
    with scripted_server(answer) as script:
        assert run(["show", "c1", "--url", script.url]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(expected.format(url=script.url))
    assert captured.err.count("\n") == 1


def test_a_silent_node_is_given_up(capsys: pytest.CaptureFixture[str]) -> None:
    with scripted_server(Answer(hold=True)) as script:
        assert run(["nodes", "--url", script.url, "--timeout", "0.2"]) == 1
    assert capsys.readouterr().err == f"error: {script.url} did not answer in time\n"


def test_the_token_is_sent_as_a_bearer_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CONVENER_TOKEN", "from-environment")
    with scripted_server(Answer(200, b'{"nodes": []}')) as script:
        assert run(["nodes", "--url", script.url]) == 0
        assert run(["nodes", "--url", script.url, "--token", "from-flag"]) == 0
    sent = [request.headers["authorization"] for request in script.requests]
    assert sent == ["Bearer from-environment", "Bearer from-flag"]


# --- listings ---------------------------------------------------------------------------------------------


def test_all_pages_are_read(capsys: pytest.CaptureFixture[str]) -> None:
    pages = [
        Answer(200, b'{"conversations": [{"conversation_id": "a"}], "next": "p2"}'),
        Answer(200, b'{"conversations": [{"conversation_id": "b"}], "next": null}'),
    ]
    with scripted_server(*pages) as script:
        assert run(["conversations", "--user", "u", "--json", "--url", script.url]) == 0
    assert [row["conversation_id"] for row in json.loads(capsys.readouterr().out)] == ["a", "b"]
    first, second = script.requests
    assert first.query == {"scope": ["cluster"], "user_id": ["u"], "limit": ["100"]}
    assert second.query["cursor"] == ["p2"]


def test_what_users_wrote_does_not_steer_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    answer = Answer(200, json.dumps({"conversation_id": "c1", "metadata": {"a": "\x1b[2J"}}).encode())
    with scripted_server(answer) as script:
        assert run(["show", "c1", "--url", script.url]) == 0
    assert "\x1b[2J" not in capsys.readouterr().out
    assert "\x1b" not in describe(entry(1, "reply", {"text": "a\x1b[2Jb\nc"}))


@pytest.mark.parametrize(
    ("kind", "data", "expected"),
    [
        ("input", {"user_id": "alice", "data": {"text": "hello"}}, "alice: hello"),
        ("input", {"user_id": "alice", "data": [1, 2]}, "alice: [1, 2]"),
        ("input", {"user_id": "", "data": {"text": "hello"}}, "hello"),
        ("reply", {"text": "two\nlines"}, "two\\nlines"),
        ("open", {"node": "node-1~5ac1", "reason": "start"}, "epoch begins on node-1 (start)"),
        ("turn_done", {}, ""),
        ("mine", None, ""),
    ],
)
def test_an_entry_is_one_readable_line(kind: str, data: Any, expected: str) -> None:
    line = describe(entry(12, kind, data))
    number, _moment, shown_kind, *rest = line.split(maxsplit=3)
    assert (number, shown_kind) == ("12", kind)
    assert (rest[0] if rest else "") == expected


def test_violations_make_the_audit_fail(capsys: pytest.CaptureFixture[str]) -> None:
    report = {
        "checked": 9,
        "violations": [{"invariant": "I1", "where": "c1 seq 4", "detail": "a gap"}],
        "conversations": 2,
        "nodes": 3,
    }
    with scripted_server(Answer(200, json.dumps(report).encode())) as script:
        assert run(["audit", "c1", "c2", "--url", script.url]) == 1
        assert run(["audit", "--all", "--json", "--url", script.url]) == 1
    text, _, document = capsys.readouterr().out.partition("{")
    assert "I1" in text
    assert "c1 seq 4" in text
    assert "1 violation; 9 checks on 2 conversations and 3 nodes" in text
    assert json.loads("{" + document) == report
    assert script.requests[0].query == {"conversation_id": ["c1", "c2"]}
    assert script.requests[1].query == {}


# --- sending ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("failure", [Answer(cut=True), problem(503, "owner_unavailable", "not now")])
def test_a_message_is_sent_again_under_the_same_id(failure: Answer) -> None:
    with scripted_server(failure, ACCEPTED) as script:
        assert run(["send", "c1", "hello", "--url", script.url]) == 0
    first, second = script.requests
    assert first.body == second.body
    assert first.body["message_id"]
    assert first.body["data"] == {"text": "hello"}


def test_a_refused_message_is_not_sent_again(capsys: pytest.CaptureFixture[str]) -> None:
    with scripted_server(problem(409, "conversation_stopped", "c1 was stopped")) as script:
        assert run(["send", "c1", "hello", "--url", script.url]) == 1
    assert len(script.requests) == 1
    assert capsys.readouterr().err == "error: conversation_stopped: c1 was stopped\n"


def test_create_comes_first_and_says_for_whom(capsys: pytest.CaptureFixture[str]) -> None:
    with scripted_server(Answer(201), ACCEPTED) as script:
        arguments = ["send", "c1", "--data", "[1]", "--create", "--user", "alice", "--message-id", "m1"]
        assert run([*arguments, "--url", script.url]) == 0
    assert [(request.path, request.body) for request in script.requests] == [
        ("/api/conversations", {"conversation_id": "c1", "user_id": "alice"}),
        ("/api/conversations/c1/messages", {"message_id": "m1", "data": [1]}),
    ]
    assert capsys.readouterr().out == "accepted at position 7 as m1\n"


# --- following --------------------------------------------------------------------------------------------


def test_server_sent_events_are_parsed_by_the_standard() -> None:
    lines = [
        ": comment",
        "event: event",
        "id: 7",
        "data: a",
        "data:b",
        "",
        "data",
        "",
        "id: 8",
        "",
        "event: x",
        "data: c",
    ]
    assert list(parse_events([*lines, ""])) == [
        ServerSentEvent("event", "a\nb", "7"),
        ServerSentEvent("message", "", "7"),
        ServerSentEvent("x", "c", "8"),
    ]
    assert list(parse_events(lines))[2:] == [], "an event that was cut off is none"


def test_tail_goes_on_where_the_connection_was_cut(capsys: pytest.CaptureFixture[str]) -> None:
    streams = [
        events(*logged(1), *logged(2)),
        problem(503, "store_unavailable", "not now"),
        events(*logged(3), "event: stopped", 'data: {"reason": "done"}', ""),
    ]
    with scripted_server(*streams) as script:
        assert run(["tail", "c1", "--json", "--after", "0", "--url", script.url]) == 0
    captured = capsys.readouterr()
    assert [json.loads(line)["seq"] for line in captured.out.splitlines()] == [1, 2, 3]
    assert captured.err.splitlines() == [
        "the node closed the stream; connecting again",
        "store_unavailable: not now; connecting again",
        "the conversation was stopped: done",
    ]
    assert [request.headers.get("last-event-id") for request in script.requests] == [None, "c2", "c2"]
    assert script.requests[0].query == {"after": ["0"]}


def test_tail_without_following_ends_after_the_replay(capsys: pytest.CaptureFixture[str]) -> None:
    stream = events(*logged(5), "event: joined", "data: {}", "", *logged(6))
    with scripted_server(stream) as script:
        assert run(["tail", "c1", "-n", "1", "--no-follow", "--url", script.url]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["5"]
    assert script.requests[0].query == {"tail": ["1"]}


def test_tail_starts_over_when_told_to(capsys: pytest.CaptureFixture[str]) -> None:
    streams = [
        events(*logged(9), "event: resync", "data: {}", "", *logged(1)),
        events(*logged(2), "event: joined", "data: {}", ""),
    ]
    with scripted_server(*streams) as script:
        assert run(["tail", "c1", "--no-follow", "--json", "--url", script.url]) == 0
    assert [json.loads(line)["seq"] for line in capsys.readouterr().out.splitlines()] == [9, 1, 2]
    assert script.requests[1].headers["last-event-id"] == "c1"


def piece(offset: int, data: Any, *, turn: str = "t1", attempt: int = 1, part: str = "text") -> list[str]:
    kind = "text" if isinstance(data, str) else "call"
    fields = {"turn": turn, "attempt": attempt, "part": part, "type": kind, "offset": offset, "data": data}
    return ["event: delta", f"data: {json.dumps(fields)}", ""]


def turned(seq: int, kind: str, data: Any = None, turn: str = "t1") -> list[str]:
    return ["event: event", f"id: c{seq}", f"data: {json.dumps(entry(seq, kind, data) | {'turn': turn})}", ""]


STOPPED = ["event: stopped", 'data: {"reason": "done"}', ""]


def tailed(capsys: pytest.CaptureFixture[str], *streams: list[str]) -> list[str]:
    """What is printed of each line after the time."""
    with scripted_server(*(events(*lines) for lines in streams)) as script:
        assert run(["tail", "c1", "--url", script.url]) == 0
    return [" ".join([line[:6].strip(), line[18:].strip()]) for line in capsys.readouterr().out.splitlines()]


def test_tail_shows_an_answer_while_it_is_written_and_not_again(capsys: pytest.CaptureFixture[str]) -> None:
    lines = tailed(
        capsys,
        [
            *turned(3, "turn_started", {"attempt": 1}),
            *piece(0, "It was a dark"),
            *piece(13, " and\nstormy\x1b[31m"),
            *turned(4, "reply", {"text": "It was a dark and\nstormy\x1b[31m"}),
            *turned(5, "turn_done", {}),
            *turned(6, "turn_started", {"attempt": 1}, "t2"),
            *piece(0, "night", turn="t2"),
            *turned(7, "reply", {"text": "night", "partial": True}, "t2"),
            *STOPPED,
        ],
    )
    assert lines == [
        '3 turn_started      {"attempt": 1}',
        "… reply             It was a dark and\\nstormy\\x1b[31m",
        "5 turn_done",
        '6 turn_started      {"attempt": 1}',
        "… reply             night",
    ]


def test_tail_prints_a_reply_that_says_something_else(capsys: pytest.CaptureFixture[str]) -> None:
    lines = tailed(
        capsys,
        [
            *piece(0, "a draft"),
            *turned(4, "reply", {"text": "a fair copy"}),
            *piece(0, "more"),
            *turned(5, "reply", "more"),
            *turned(6, "reply", {"text": "nothing of it was shown"}),
            *turned(7, "reply", {"text": "of another turn"}, "t2"),
            *STOPPED,
        ],
    )
    assert lines == [
        "… reply             a draft",
        "4 reply             a fair copy",
        "… reply             more",
        "5 reply             more",
        "6 reply             nothing of it was shown",
        "7 reply             of another turn",
    ]


def test_tail_goes_on_with_what_only_the_reply_says(capsys: pytest.CaptureFixture[str]) -> None:
    calls = [{"call": 1}, {"call": 2}]
    lines = tailed(
        capsys,
        [
            *piece(0, "one "),
            *piece(0, calls[:1], part="calls"),
            *turned(5, "reply", {"text": "one two", "calls": calls, "more": "x", "partial": True}),
            *piece(0, "one", turn="t2"),
            *turned(6, "reply", {"text": "on"}, "t2"),
            *STOPPED,
        ],
    )
    assert lines == [
        "… reply             one",
        '… reply             calls: [{"call": 1}]',
        "… reply             two",
        '… reply             calls: [{"call": 2}]',
        "… reply             more: x",
        "… reply             one",
        "6 reply             on",
    ]


def test_tail_shows_what_comes_in_between_on_lines_of_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    lines = tailed(
        capsys,
        [
            *piece(0, "one "),
            *turned(4, "input", {"user_id": "u", "data": "hurry"}, "t2"),
            *piece(4, "two"),
            *piece(0, "hmm", part="thought"),
            *piece(0, [{"call": 1}], part="calls"),
            *piece(1, [{"call": 2}], part="calls"),
            *piece(3, "!", part="thought"),
            *turned(5, "reply", {"text": "one two", "thought": "hmm!", "calls": [{"call": 1}, {"call": 2}]}),
            *STOPPED,
        ],
    )
    assert lines == [
        "… reply             one",
        "4 input             u: hurry",
        "… reply             two",
        "… reply             thought: hmm",
        '… reply             calls: [{"call": 1}]',
        '… reply             calls: [{"call": 2}]',
        "… reply             thought: !",
    ]


def test_tail_repeats_nothing_after_a_reconnection_and_begins_anew_with_an_attempt(
    capsys: pytest.CaptureFixture[str],
) -> None:
    lines = tailed(
        capsys,
        [*piece(0, "cut o")],
        [*piece(0, "cut off"), *piece(3, " of"), *piece(7, " he")],
        [
            *turned(4, "turn_started", {"attempt": 2}),
            *piece(0, "again", attempt=2),
            *piece(7, "late", attempt=1),
            *turned(5, "reply", {"text": "again"}),
            "event: resync",
            "data: {}",
            "",
            *piece(0, "again", attempt=2),
            *STOPPED,
        ],
    )
    assert lines == [
        "… reply             cut o",
        "… reply             ff he",
        '4 turn_started      {"attempt": 2}',
        "… reply             again",
        "… reply             again",
    ]


def test_tail_prints_pieces_as_json_too(capsys: pytest.CaptureFixture[str]) -> None:
    with scripted_server(events(*piece(0, "a"), *piece(0, [1], part="calls"), *logged(4, "a"), *STOPPED)) as script:
        assert run(["tail", "c1", "--json", "--url", script.url]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert lines[0] == {"turn": "t1", "attempt": 1, "part": "text", "type": "text", "offset": 0, "data": "a"}
    assert lines[1]["data"] == [1]
    assert lines[2]["seq"] == 4


def test_tail_of_an_unknown_conversation_fails_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    with scripted_server(problem(404, "not_found", "no conversation c1")) as script:
        assert run(["tail", "c1", "--url", script.url]) == 1
    assert len(script.requests) == 1
    assert capsys.readouterr().err == "error: not_found: no conversation c1\n"


# --- drain ------------------------------------------------------------------------------------------------------------


def test_the_end_of_a_drain_is_told_although_nothing_was_left_before(capsys: pytest.CaptureFixture[str]) -> None:
    def status(state: str, remaining: int) -> Answer:
        found = {"node": "n2", "state": state, "remaining": remaining, "deadline": None}
        return Answer(200, json.dumps(found).encode())

    with scripted_server(status("draining", 1), status("draining", 0), status("drained", 0)) as script:
        assert run(["drain", "n2", "--url", script.url]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "n2 draining: 1 conversations left",
        "n2 draining: 0 conversations left",
        "n2 drained: 0 conversations left",
    ]
