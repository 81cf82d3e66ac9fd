"""Nodes for the gateway's tests."""

from __future__ import annotations

from collections.abc import AsyncGenerator

import pytest
import structlog

from tests.gateway.support import Node, running, serving


@pytest.fixture(scope="session", autouse=True)
def _short_tracebacks() -> None:
    """What a node logs is shown with a failed test; the values of all variables would bury the rest."""
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.dev.ConsoleRenderer(exception_formatter=structlog.dev.plain_traceback),
        ]
    )


@pytest.fixture
async def node() -> AsyncGenerator[Node]:
    """A node without a server, auth none."""
    async with running() as started:
        yield started


@pytest.fixture
async def served() -> AsyncGenerator[Node]:
    """A node behind uvicorn, auth none."""
    async with serving() as started:
        yield started
