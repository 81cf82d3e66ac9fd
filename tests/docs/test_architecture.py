"""The map of the code shows every file, and nothing else."""

from __future__ import annotations

import re
from collections.abc import Iterator

from tests.docs.pages import ROOT

PACKAGE = ROOT / "src" / "convener"


def mapped() -> Iterator[str]:
    """Files of the package that the map has a row for."""
    text = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
    for section in re.split(r"^### ", text, flags=re.MULTILINE)[1:]:
        heading, _, body = section.partition("\n")
        folder = re.fullmatch(r"`(src/convener/[\w/]*)`", heading)
        if folder is None:
            continue
        for row in re.findall(r"^\| (`.+?) \|", body, re.MULTILINE):
            for name in re.findall(r"`([\w./]+)`", row):
                yield folder[1] + name


def present() -> Iterator[str]:
    for path in PACKAGE.rglob("*.py"):
        yield str(path.relative_to(ROOT))


def test_every_file_has_a_row() -> None:
    assert sorted(set(present()) - set(mapped())) == []


def test_every_row_has_a_file() -> None:
    assert sorted(name for name in mapped() if not (ROOT / name).exists()) == []


def test_no_file_has_two_rows() -> None:
    names = list(mapped())
    assert sorted(name for name in set(names) if names.count(name) > 1) == []
