"""The node's log: what a traceback shows of what it was about."""

from __future__ import annotations

import io
import logging
import secrets
from collections.abc import Generator

import pytest
import structlog

from convener.cli.logs import LogFormat, configure_logging


@pytest.fixture(autouse=True)
def _restored() -> Generator[None]:
    """Logging is the process's own: give it back as it was."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    structlog.reset_defaults()


def _fail(token: str) -> None:
    raise RuntimeError(f"refused after {len(token)} characters")


@pytest.mark.parametrize("log_format", ["json", "console"])
def test_a_traceback_names_the_functions_and_keeps_their_variables_to_itself(log_format: LogFormat) -> None:
    stream = io.StringIO()
    configure_logging(log_format, stream)
    token = secrets.token_hex()
    try:
        _fail(token)
    except RuntimeError:
        structlog.get_logger("test").exception("it failed")
    written = stream.getvalue()
    assert "refused after 64 characters" in written
    assert "_fail" in written
    assert token not in written
