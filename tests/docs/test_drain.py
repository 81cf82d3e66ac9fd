"""The page on stopping nodes is true: its commands are run, and what it names exists."""

from __future__ import annotations

import re
import sys

import pytest

from convener.settings import Settings
from tests.docs.pages import DOCS, code
from tests.docs.test_tutorial import Reader, marked, reader

__all__ = ["reader"]

PAGE = (DOCS / "how-to" / "drain.md").read_text(encoding="utf-8")


@pytest.mark.skipif(sys.platform == "win32", reason="`convener up` is for POSIX systems")
def test_what_it_says_is_done(reader: Reader) -> None:
    todo = marked(PAGE)
    assert len(todo) == 5
    for step in todo:
        reader.follow(step)
    assert reader.running == []


def test_the_settings_that_it_names_exist() -> None:
    named = {name for name in code(PAGE) if name in ("drain_timeout", "shutdown_delay", "recovery")}
    assert named == {"drain_timeout", "shutdown_delay", "recovery"}
    assert named <= set(Settings.model_fields)
    variables = set(re.findall(r"CONVENER_[A-Z_]+", PAGE))
    assert {name.removeprefix("CONVENER_").lower() for name in variables} <= set(Settings.model_fields)
