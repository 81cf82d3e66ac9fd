"""The tutorial is true: its commands are run against real processes, and print what it says that they print.

Steps are marked in the page: ``file`` writes a file, ``background`` starts a process and waits for a word of it,
``run`` runs commands (``until`` a pattern is in what the last one prints), ``shown`` waits for the lines that are shown
by the process that was started last, ``interrupt`` is Ctrl-C for it. Output is compared as in
`tests/support/console.py`.
"""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Generator
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest

from tests.docs.pages import DOCS, ROOT, Step, blocks, steps
from tests.support.console import matches, on_port, pattern, sessions
from tests.support.processes import RunningProcess, convener, free_port
from tests.support.waiting import wait_until_sync

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="`convener up` is for POSIX systems")

VERBS = ("file", "background", "run", "run until", "shown", "interrupt")
NODES = 3


@dataclass
class Reader:
    """Somebody who follows the page."""

    directory: Path
    port: int
    running: list[RunningProcess] = field(default_factory=list[RunningProcess])

    def follow(self, step: Step) -> None:
        match step.verb:
            case "file":
                (self.directory / step.argument).write_text(step.code, encoding="utf-8")
            case "background":
                self.start(step)
            case "shown":
                self.see(step)
            case "interrupt":
                process = self.running.pop()
                process.signal(signal.SIGINT)
                assert process.wait(60) == 0, "\n".join(process.errors)
            case _:
                self.run(step, step.argument if step.verb == "run until" else "")

    def start(self, step: Step) -> None:
        command, expected = self.commands(step)[0]
        program, *arguments = shlex.split(command)
        assert program == "convener"
        process = convener(*arguments, "--port", str(self.port), directory=self.directory)
        self.running.append(process)
        if step.argument == "ready":
            process.wait_for_output("ready", 60)
        else:
            process.wait_for_error(step.argument, 60)
        assert matches(expected, process.output), process.output

    def see(self, step: Step) -> None:
        lines = [line for line in step.code.splitlines() if line != "…"]

        def unseen() -> list[str]:
            shown = [line.strip() for line in self.running[-1].errors]
            return [line for line in lines if not any(pattern(line).fullmatch(other) for other in shown)]

        wait_until_sync(lambda: not unseen(), f"the process shows what line {step.line} says", 60)

    def run(self, step: Step, until: str) -> None:
        for given, expected in self.commands(step):
            command, _, kill = given.partition("; pkill")
            if command.startswith("pkill"):
                self.kill(command)
                continue

            def look(command: str = command) -> list[str] | None:
                printed = self.output_of(command)
                return printed if re.search(until, "\n".join(printed)) else None

            printed = wait_until_sync(look, f"`{command}` shows {until!r}", 30)
            assert printed is not None
            assert matches(expected, printed), f"line {step.line}: `{command}` printed\n" + "\n".join(printed)
            if kill:
                self.kill(kill)

    def output_of(self, command: str) -> list[str]:
        program, *arguments = shlex.split(command)
        assert program == "convener"
        done = subprocess.run(
            [sys.executable, "-m", "convener", *arguments],
            cwd=self.directory,
            env=os.environ | {"CONVENER_URL": f"http://127.0.0.1:{self.port}"},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 0, f"{command}: {done.stderr}"
        return done.stdout.splitlines()

    def kill(self, command: str) -> None:
        """What the page's command does, among the processes of this test alone."""
        wanted = shlex.split(command)[-1]
        children = psutil.Process(self.running[-1].pid).children(recursive=True)
        hit = [child for child in children if re.search(wanted, " ".join(child.cmdline()))]
        assert hit
        for child in hit:
            child.kill()

    def commands(self, step: Step) -> list[tuple[str, list[str]]]:
        """Commands with what they print, on this test's ports."""
        return sessions(on_port(step.code, self.port))


@pytest.fixture
def reader(tmp_path: Path) -> Generator[Reader]:
    made = Reader(tmp_path, free_port(NODES))
    yield made
    for process in made.running:
        with process:
            pass


TUTORIAL = (DOCS / "tutorial" / "first-cluster.md").read_text(encoding="utf-8")
README = (ROOT / "README.md").read_text(encoding="utf-8")


def marked(page: str) -> list[Step]:
    """The steps of a page; everything that it shows must be one."""
    todo = list(steps(page, VERBS))
    assert page.count("```console") == sum(step.verb in ("background", "run", "run until") for step in todo)
    assert page.count("```text") == sum(step.verb == "shown" for step in todo)
    return todo


def test_tutorial(reader: Reader) -> None:
    todo = marked(TUTORIAL)
    assert len(todo) > 15
    for step in todo:
        reader.follow(step)
    assert reader.running == []


def test_readme(reader: Reader) -> None:
    # The tutorial's first agent is that of the README, and its model is the slow echo.
    echo = next(step for step in marked(TUTORIAL) if step.verb == "file")
    _, _, agent = blocks(README, "python")[0].partition("@app.agent")
    assert agent in echo.code
    reader.follow(echo)
    for step in marked(README):
        reader.follow(step)


@pytest.mark.parametrize(
    ("expected", "printed", "same"),
    [
        ("accepted at position 1 as 4n5mBeiQvTTtsfwKWy7Jbw", "accepted at position 12 as ZZZZZZZZZZZZZZZZZZZZZZ", True),
        ("accepted at position 1", "accepted at position one", False),
        ("status   idle", "status           idle", True),
        ("status   idle", "status           running", False),
        ("1\n…\n3", "1\n2\n2\n4", True),
        ("1\n…\nx 3", "1\n2\n2\n4", False),
        ("epoch begins on …", "epoch begins on node-1 (start)", True),
        ("a", "a\nb", False),
    ],
)
def test_output_is_compared(expected: str, printed: str, same: bool) -> None:
    assert matches(expected.split("\n"), printed.split("\n")) is same
