"""``convener serve`` as a process: starting, failing to start, ending."""

from __future__ import annotations

import json
import signal
import socket
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.support.processes import ROOT, RunningProcess, convener

PLAIN = "tests.cli.apps.plain:app"


def serve(*arguments: str, **environment: str) -> RunningProcess:
    return convener("serve", *arguments, directory=ROOT, environment=environment)


@contextmanager
def serving(*arguments: str, **environment: str) -> Generator[tuple[RunningProcess, str]]:
    """A node on a free port, and its address."""
    with serve(*arguments, "--port", "0", "--log-format", "json", **environment) as process:
        line: dict[str, Any] = json.loads(process.wait_for_error('"listening"'))
        yield process, line["url"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_serves_until_a_signal_then_ends_cleanly(number: signal.Signals) -> None:
    with serving(PLAIN) as (process, url):
        assert httpx.get(url + "/x", trust_env=False).json()["pid"] == process.pid
        process.signal(number)
        assert process.wait() == 0
        assert process.output == ["plain application starts", "plain application ends"]
        assert "Traceback" not in "\n".join(process.errors)


def test_every_log_line_is_json_when_nobody_watches() -> None:
    with serve(PLAIN, "--port", "0") as process:
        process.wait_for_error("listening")
        process.signal(signal.SIGTERM)
        assert process.wait() == 0
        lines = [json.loads(line) for line in process.errors]
        assert [line["event"] for line in lines] == ["listening", "stopped"]
        for line in lines:
            assert line["level"] == "info"
            assert line["timestamp"].endswith("Z")


def test_the_console_form_has_colours_only_on_demand() -> None:
    with serve(PLAIN, "--port", "0", "--log-format", "console", FORCE_COLOR="1", NO_COLOR="") as process:
        assert "\x1b[" in process.wait_for_error("listening")
    with serve(PLAIN, "--port", "0", "--log-format", "console", FORCE_COLOR="", NO_COLOR="") as process:
        assert "\x1b[" not in process.wait_for_error("listening")


def test_flags_reach_an_application_that_is_not_ours() -> None:
    url = "redis://127.0.0.1:1/0"
    with serving(PLAIN, "--redis", url, "--node-name", "n7", CONVENER_NODE_NAME="other") as (_, address):
        about = httpx.get(address, trust_env=False).json()
        assert (about["redis_url"], about["node_name"]) == (url, "n7")


def test_the_working_directory_is_on_the_path(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text((ROOT / "tests/cli/apps/plain.py").read_text())
    with convener("serve", "mine:app", "--port", "0", directory=tmp_path) as process:
        process.wait_for_error("listening")


@pytest.mark.parametrize(
    ("arguments", "code", "expected"),
    [
        (["nowhere:app"], 1, "no module named nowhere in "),
        (["nowhere.deeper:app"], 1, "no module named nowhere in "),
        (["tests.nowhere:app"], 1, "no module named tests.nowhere in "),
        (["tests.cli.apps.plain:missing"], 1, "module tests.cli.apps.plain has no attribute missing"),
        (["tests.cli.apps.raises:app"], 1, "tests.cli.apps.raises cannot be imported: RuntimeError: no model at"),
        (["tests.cli.apps.broken:not_an_application"], 1, "is no ASGI application but int"),
        (["tests.cli.apps.broken:Factory"], 1, "is no ASGI application but type"),
        (["tests.cli.apps.broken:without_lifespan"], 1, "the application did not start: AssertionError: only HTTP"),
        (["tests.cli.apps.broken:store_is_away"], 1, "store_unavailable: cannot reach redis.example:6379"),
        (["tests.cli.apps.broken:reports_failure"], 1, "the application did not start: KeyError: 'database'"),
        ([PLAIN, "--host", "no.such.host.invalid"], 2, "auth: none is refused on no.such.host.invalid"),
        (["plain"], 2, "'plain' names no application: write module:attribute"),
    ],
)
def test_what_cannot_start_says_why_in_one_line(arguments: list[str], code: int, expected: str) -> None:
    with serve(*arguments, *([] if "--host" in arguments else ["--port", "0"])) as process:
        assert process.wait() == code
        assert [line for line in process.errors if not line.startswith("{")] == process.errors[-1:]
        assert process.errors[-1].startswith("error: ")
        assert expected in process.errors[-1]


def test_a_host_that_cannot_be_found_is_one_line() -> None:
    tokens = {"CONVENER_AUTH": "token", "CONVENER_AUTH_TOKENS": '{"t": "u"}'}
    with serve(PLAIN, "--host", "no.such.host.invalid", **tokens) as process:
        assert process.wait() == 1
        assert process.errors[-1].startswith("error: cannot listen on no.such.host.invalid: ")
        assert len(process.errors) == 1


def test_a_port_in_use_is_one_line_and_the_application_never_starts() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with serve(PLAIN, "--port", str(port)) as process:
            assert process.wait() == 1
            assert process.errors == [f"error: cannot listen on 127.0.0.1 port {port}: address already in use"]
            assert process.output == []


def test_an_unknown_variable_is_refused() -> None:
    with serve(PLAIN, CONVENER_REDIS_ULR="redis://h") as process:
        assert process.wait() == 2
        assert process.errors == [
            "error: unknown environment variable CONVENER_REDIS_ULR; did you mean CONVENER_REDIS_URL?"
        ]
