"""`convener doctor` as people and programs use it."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from convener.cli import run
from tests.support.servers import Server, free_port
from tests.support.topologies import tell


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with Server("valkey", persistence="aof", options={"maxmemory": "100mb"}) as made:
        yield made


@pytest.fixture
def own(server: Server) -> Iterator[Server]:
    yield server
    tell(server, "CONFIG", "SET", "maxmemory-policy", "noeviction")
    tell(server, "FLUSHALL")


def test_a_good_store(own: Server, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["doctor", "--redis", own.url, "--watch", "0"]) == 0
    out = capsys.readouterr().out
    assert out.splitlines()[-1] == "safe"
    assert "no node is running" in out
    assert "0 keys of this namespace" in out


def test_what_could_be_better_is_said_with_what_to_do(own: Server, capsys: pytest.CaptureFixture[str]) -> None:
    tell(own, "SET", "{convener:odd}", "1")
    assert run(["doctor", "--redis", own.url, "--watch", "0"]) == 0
    out = capsys.readouterr().out
    assert out.splitlines()[-1] == "reduced: keys"
    assert "{convener:odd} is none of convener's" in out
    assert "delete them when no node runs" in out


def test_a_store_that_is_refused_ends_with_1(own: Server, capsys: pytest.CaptureFixture[str]) -> None:
    tell(own, "CONFIG", "SET", "maxmemory-policy", "allkeys-lru")
    assert run(["doctor", "--redis", own.url, "--watch", "0"]) == 1
    assert capsys.readouterr().out.splitlines()[-1] == "refused: eviction"
    assert run(["doctor", "--redis", own.url, "--watch", "0", "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert report["verdict"] == "refused"
    (found,) = [finding for finding in report["findings"] if finding["check"] == "eviction"]
    assert found.keys() == {"check", "verdict", "says", "advice"}
    assert found["advice"] == "set maxmemory-policy noeviction"


def test_the_settings_say_which_store(
    own: Server, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CONVENER_REDIS_URL", own.url)
    monkeypatch.setenv("CONVENER_NAMESPACE", "shop")
    tell(own, "SET", "{shop:odd}", "1")
    assert run(["doctor", "--watch", "0"]) == 0
    assert "{shop:odd}" in capsys.readouterr().out
    assert run(["doctor", "--print-acl", "--store-user", "node"]) == 0
    line = capsys.readouterr().out
    assert line.startswith("user node reset on >PASSWORD resetkeys ~{shop:* resetchannels &{shop:* -@all +")
    assert line.count("\n") == 1


def test_no_store(own: Server, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["doctor"]) == 2
    assert "there is no store to examine" in capsys.readouterr().err
    assert run(["doctor", "--redis", f"redis://127.0.0.1:{free_port()}/0"]) == 1
    assert "store_unavailable: cannot connect" in capsys.readouterr().err
    assert run(["doctor", "--redis", own.url.replace("127", ":wrong@127")]) == 2
    assert "refuses the credentials" in capsys.readouterr().err
    assert run(["doctor", "--namespace", "a b", "--print-acl"]) == 2
    assert "namespace" in capsys.readouterr().err
