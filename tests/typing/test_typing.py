"""User code is typed: what is right passes strict checking as it stands, what is wrong is refused.

The modules beside this one are user code. Those of `refused.py` mark what must be refused; since a comment that is not
needed is an error, too, nothing there can begin to pass unnoticed.
"""

from __future__ import annotations

import importlib
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any, Final

import pytest

from tests.support.processes import ROOT

HERE: Final = Path(__file__).parent
ACCEPTED: Final = sorted(path.stem for path in HERE.glob("*.py") if path.stem not in ("refused", "test_typing"))


def pyright(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pyright", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=170, check=False)


@pytest.fixture(scope="module")
def report() -> dict[str, Any]:
    """What pyright says of this folder, under the project's own settings."""
    version = pyright("--version")
    if version.returncode != 0:
        # It fetches its program when it is used for the first time.
        pytest.skip(f"pyright cannot be had on this machine: {version.stderr.strip().splitlines()[-1:]}")
    return json.loads(pyright("--outputjson", str(HERE.relative_to(ROOT))).stdout)


def test_the_settings_are_strict() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["pyright"]
    assert settings["typeCheckingMode"] == "strict"
    assert settings["reportUnnecessaryTypeIgnoreComment"] == "error"


def test_user_code_is_accepted_and_refused_where_it_has_to_be(report: dict[str, Any]) -> None:
    found = [
        f"{Path(each['file']).name}:{each['range']['start']['line'] + 1}: {each['message']} ({each.get('rule')})"
        for each in report["generalDiagnostics"]
    ]
    assert found == []
    assert report["summary"]["filesAnalyzed"] == len(list(HERE.glob("*.py")))


def test_only_what_is_to_be_refused_is_marked() -> None:
    for name in ACCEPTED:
        assert "pyright: ignore" not in (HERE / f"{name}.py").read_text(encoding="utf-8")


def test_every_mark_names_its_rules() -> None:
    text = (HERE / "refused.py").read_text(encoding="utf-8")
    marks = re.findall(r"# pyright: ignore\[report\w+(?:, report\w+)*\]$", text, re.MULTILINE)
    assert len(marks) == text.count("ignore") > 30


@pytest.mark.parametrize("name", ACCEPTED)
def test_what_is_accepted_can_be_imported(name: str) -> None:
    """The decorators take at run time what the types take."""
    module = importlib.import_module(f"tests.typing.{name}")
    assert module.__doc__
