"""Fixtures for all tests."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from hypothesis import settings

# How long an example takes says something of the machine, not of the code.
settings.register_profile("tests", deadline=None)
settings.load_profile("tests")


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    """Only asyncio: python-socketio's server runs on nothing else."""
    return "asyncio"


def pytest_configure() -> None:
    """Hide the developer's own CONVENER_* variables, from fixtures of every scope."""
    _forget_settings()


def _forget_settings() -> None:
    for name in [name for name in os.environ if name.startswith("CONVENER_") and name != "CONVENER_TEST_SEED"]:
        del os.environ[name]


@pytest.fixture(autouse=True)
def _no_settings_left_behind(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """`convener serve` hands its flags on in the environment; run inside this process it must not reach other tests."""
    yield
    monkeypatch.undo()
    _forget_settings()


# Clusters of processes mostly wait, but many at once would only show what a machine without time does: three workers of
# xdist run them, each one after another, while the others run everything else (`--dist loadgroup`).
CLUSTERS = "tests/cluster/"
MIDDLE = f"{CLUSTERS}test_i"
"""Those before it in the alphabet take about as long as those behind it."""
COMMANDS = ("tests/cli/", "tests/docs/", "tests/examples/", f"{CLUSTERS}test_up.py")
"""Together because of those that want the ports that the documentation names."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.nodeid.startswith(COMMANDS):
            item.add_marker(pytest.mark.xdist_group("commands"))
        elif item.nodeid.startswith(CLUSTERS):
            item.add_marker(pytest.mark.xdist_group("clusters" if item.nodeid < MIDDLE else "more clusters"))
