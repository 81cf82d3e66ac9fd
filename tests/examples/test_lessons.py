"""Every example is short, and runs as its docstring says."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.examples.lessons import EXAMPLES, names, read, session

pytestmark = pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")

# It needs a model; tests/examples/test_llm_stream.py has one.
OFFLINE = [name for name in names() if name != "llm_stream"]


@pytest.mark.parametrize("name", names())
def test_an_example_is_one_short_file_that_says_how_to_run_it(name: str) -> None:
    assert len((EXAMPLES / f"{name}.py").read_text(encoding="utf-8").splitlines()) < 100
    commands = [command for command, _ in session(name)]
    assert any(command.startswith(("convener serve", "uvicorn")) for command in commands)
    assert any(command.startswith("convener tail") for command in commands)


@pytest.mark.parametrize("name", OFFLINE)
def test_an_example_runs_as_its_docstring_says(name: str, tmp_path: Path) -> None:
    with read(name, tmp_path):
        pass
