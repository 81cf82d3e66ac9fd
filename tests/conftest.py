"""Fixtures for all tests."""

from __future__ import annotations

import os

import pytest


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    """Only asyncio: python-socketio's server runs on nothing else."""
    return "asyncio"


@pytest.fixture(autouse=True)
def _no_settings_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hide the developer's own CONVENER_* variables from every test."""
    for name in [name for name in os.environ if name.startswith("CONVENER_")]:
        monkeypatch.delenv(name)


# Real clusters of processes want the machine for themselves: one worker of xdist runs them one after another, while
# the others run everything else (`--dist loadgroup`).
PROCESSES = ("tests/cluster/", "tests/cli/", "tests/docs/")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.nodeid.startswith(PROCESSES):
            item.add_marker(pytest.mark.xdist_group("processes"))
