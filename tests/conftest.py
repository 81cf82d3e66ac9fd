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
