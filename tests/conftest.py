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


# Real clusters of processes want the machine for themselves: one worker of xdist runs them one after another, while
# the others run everything else (`--dist loadgroup`).
PROCESSES = ("tests/cluster/", "tests/cli/", "tests/docs/", "tests/examples/")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.nodeid.startswith(PROCESSES):
            item.add_marker(pytest.mark.xdist_group("processes"))
