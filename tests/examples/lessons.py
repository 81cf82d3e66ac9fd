"""The examples as a reader has them: files whose docstrings say how they are run."""

from __future__ import annotations

import ast
import importlib.metadata
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from tests.support.console import matches, on_port, sessions
from tests.support.processes import ROOT, RunningProcess, free_port
from tests.support.waiting import wait_until_sync

EXAMPLES: Final = ROOT / "examples"
SHOWS: Final = ("convener tail", "convener show", "convener nodes", "cat")
"""Commands that only show something: they are given until they show what the docstring says."""


def names() -> list[str]:
    """Names of all examples."""
    return sorted(path.stem for path in EXAMPLES.glob("*.py"))


def docstring(name: str) -> str:
    """What an example says of itself."""
    text = ast.get_docstring(ast.parse((EXAMPLES / f"{name}.py").read_text(encoding="utf-8")))
    assert text is not None
    return text


def session(name: str) -> list[tuple[str, list[str]]]:
    """The commands of an example's docstring, with what they print."""
    indented = [line[4:] for line in docstring(name).splitlines() if line.startswith("    ")]
    return sessions("\n".join(indented))


def driven(name: str) -> str:
    """A module that runs an example with the test's outside world."""
    text = (Path(__file__).parent / "apps" / "driven.py").read_text(encoding="utf-8")
    placeholder = 'NAME, EXAMPLES = "", ""'
    assert placeholder in text
    return text.replace(placeholder, f"NAME, EXAMPLES = {name!r}, {str(EXAMPLES)!r}")


@dataclass
class Reader:
    """Somebody who does what a docstring says.

    Attributes:
        given: values for ``export``, instead of the docstring's.
    """

    directory: Path
    port: int
    given: Mapping[str, str]
    environment: dict[str, str] = field(default_factory=dict[str, str])
    running: list[RunningProcess] = field(default_factory=list[RunningProcess])

    def follow(self, command: str, expected: list[str]) -> None:
        """Give one command and compare what it prints."""
        words = shlex.split(command)
        if words[:2] == ["pip", "install"]:
            for name in words[2:]:
                assert importlib.metadata.version(name)
        elif words[0] == "export":
            name, _, value = words[1].partition("=")
            self.environment[name] = self.given.get(name, value)
        elif words[:2] == ["convener", "serve"] or words[0] == "uvicorn":
            self.start(words)
        else:
            self.run(command, expected)

    def start(self, words: list[str]) -> None:
        """Run the application in the background."""
        arguments = [word for word in words if word not in ("--port", "8000")]
        command = [sys.executable, "-m", *arguments, "--port", str(self.port)]
        self.running.append(RunningProcess(command, self.directory, self.environment))
        self.running[-1].wait_for_error(f"127.0.0.1:{self.port}", 60)

    def run(self, command: str, expected: list[str]) -> None:
        """Give a command to a shell: once, or until it shows what is expected."""
        last: list[str] = []

        def as_expected() -> bool:
            last[:] = self.output_of(command)
            return matches(expected, last)

        if command.startswith(SHOWS):
            try:
                wait_until_sync(as_expected, f"`{command}` prints what the docstring says", 30)
            except AssertionError as error:
                error.add_note("\n".join(last))
                raise
        else:
            assert as_expected(), f"`{command}` printed\n" + "\n".join(last)

    def output_of(self, command: str) -> list[str]:
        programs = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        here = {"PATH": programs, "CONVENER_URL": f"http://127.0.0.1:{self.port}"}
        done = subprocess.run(
            ["sh", "-c", command],
            cwd=self.directory,
            env=os.environ | here | self.environment,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 0, f"{command}: {done.stderr}"
        return done.stdout.splitlines()

    def close(self) -> None:
        """End what runs."""
        for process in self.running:
            process.__exit__(None, None, None)


@contextmanager
def read(name: str, directory: Path, given: Mapping[str, str] | None = None) -> Generator[Reader]:
    """Do everything that the docstring of an example says; its application runs as long as the context."""
    (directory / f"{name}.py").write_text((EXAMPLES / f"{name}.py").read_text(encoding="utf-8"), encoding="utf-8")
    reader = Reader(directory, free_port(), given or {})
    try:
        for command, expected in session(name):
            reader.follow(on_port(command, reader.port), expected)
        yield reader
        for process in reader.running:
            written = "\n".join(process.errors)
            assert re.search(r"Traceback", written) is None, written
    finally:
        reader.close()
