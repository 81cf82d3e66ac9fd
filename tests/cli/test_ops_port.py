"""Health and metrics on a port of their own."""

from __future__ import annotations

import json
import signal
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from tests.support.processes import RunningProcess, convener, free_port
from tests.support.waiting import wait_until_sync

PATHS = ("/livez", "/healthz", "/readyz", "/metrics")


@contextmanager
def serving(directory: Path, **environment: str) -> Generator[tuple[RunningProcess, str, str]]:
    """A standalone node, its address, and that of its second port."""
    ops = free_port()
    process = convener(
        *("serve", "--port", "0", "--log-format", "json"),
        directory=directory,
        environment={"CONVENER_OPS_PORT": str(ops), **environment},
    )
    with process:
        url = json.loads(process.wait_for_error('"listening"'))["url"]
        yield process, url, f"http://127.0.0.1:{ops}"


@pytest.fixture
def http() -> Generator[httpx.Client]:
    with httpx.Client(trust_env=False, limits=httpx.Limits(max_keepalive_connections=0)) as client:
        yield client


def test_health_and_metrics_are_there_and_nowhere_else(tmp_path: Path, http: httpx.Client) -> None:
    with serving(tmp_path) as (process, url, ops):
        for path in PATHS:
            assert http.get(ops + path).status_code == 200, path
            missing = http.get(url + path)
            assert (missing.status_code, missing.json()["code"]) == (404, "not_found"), path
        assert "convener_node_ready 1.0" in http.get(f"{ops}/metrics").text
        assert http.get(f"{url}/api/conversations").status_code == 200
        for path in ("/api/conversations", "/socket.io/", "/openapi.json"):
            refused = http.get(ops + path)
            assert (refused.status_code, refused.json()["code"]) == (404, "not_found"), path
        description = http.get(f"{url}/openapi.json").json()
        assert not set(PATHS) & set(description["paths"])
        process.signal(signal.SIGTERM)
        assert process.wait() == 0
        with pytest.raises(httpx.ConnectError):
            http.get(f"{ops}/livez")


def test_it_tells_that_the_node_is_leaving(tmp_path: Path, http: httpx.Client) -> None:
    with serving(tmp_path, CONVENER_SHUTDOWN_DELAY="60") as (process, url, ops):
        process.signal(signal.SIGTERM)
        wait_until_sync(lambda: http.get(f"{ops}/readyz").status_code == 503, "the node says that it is unready")
        assert http.get(f"{ops}/livez").status_code == 200
        assert http.get(f"{url}/api/conversations").status_code == 200
        process.signal(signal.SIGTERM)
        process.wait()


def test_a_port_that_is_taken_is_one_line(tmp_path: Path) -> None:
    with serving(tmp_path) as (_, _, ops):
        port = ops.rpartition(":")[2]
        with convener("serve", "--port", "0", directory=tmp_path, environment={"CONVENER_OPS_PORT": port}) as second:
            assert second.wait() == 1
            assert f"ops_port: cannot listen on 127.0.0.1 port {port}" in second.errors[-1]
            assert "Traceback" not in "\n".join(second.errors)


@pytest.mark.parametrize(
    ("command", "port", "said"),
    [
        (("serve", "--port", "8123"), "8123", "ops_port: 8123 is the port of the API"),
        (("serve",), "0", "ops_port"),
        (("up",), "8123", "ops_port: the nodes of `up` cannot share one"),
    ],
)
def test_ports_that_cannot_be(tmp_path: Path, command: tuple[str, ...], port: str, said: str) -> None:
    with convener(*command, directory=tmp_path, environment={"CONVENER_OPS_PORT": port}) as process:
        assert process.wait() in (1, 2)
        assert said in " ".join(" ".join(process.errors).split())
