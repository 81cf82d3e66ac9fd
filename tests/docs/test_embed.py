"""The how-to on embedding is true: its applications run, and its commands print what it says that they print."""

from __future__ import annotations

import re
import shutil
import signal
from collections.abc import Generator
from pathlib import Path

import pytest

from tests.docs.pages import DOCS, steps
from tests.examples.lessons import Reader
from tests.support.console import on_port, sessions
from tests.support.processes import free_port

pytestmark = pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")

PAGE = (DOCS / "how-to" / "embed.md").read_text(encoding="utf-8")
PARTS = PAGE.split("\n## ")


def part(title: str) -> str:
    (found,) = [text for text in PARTS if text.startswith(title)]
    return found


@pytest.fixture
def reader(tmp_path: Path) -> Generator[Reader]:
    made = Reader(tmp_path, free_port(), {})
    yield made
    made.close()


@pytest.mark.parametrize("title", ["FastAPI", "Starlette, and a lifespan of your own"])
def test_a_part_of_the_page(title: str, reader: Reader) -> None:
    followed = 0
    for step in steps(part(title), ["file", "run"]):
        code = on_port(step.code, reader.port)
        if step.verb == "file":
            (reader.directory / step.argument).write_text(code, encoding="utf-8")
            continue
        for command, expected in sessions(code):
            reader.follow(command, expected)
            followed += 1
    assert followed == part(title).count("\n$ ") > 3
    (server,) = reader.running
    server.signal(signal.SIGTERM)
    assert server.wait(60) in (0, -signal.SIGTERM)
    assert re.search("Traceback", "\n".join(server.errors)) is None


def test_no_step_is_left_out() -> None:
    assert PAGE.count("```console") == PAGE.count("<!-- run -->\n```console")
    assert PAGE.count("```python") == PAGE.count(".py -->\n```python")
