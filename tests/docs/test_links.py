"""What a page points at is there."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.docs.pages import DOCS, ROOT, anchors, code, links, name_of, pages

PAGES = [pytest.param(page, id=name_of(page)) for page in pages()]
PACKAGE = ROOT / "src" / "convener"


def broken(page: Path) -> Iterator[str]:
    text = page.read_text(encoding="utf-8")
    for link in links(text):
        target, _, fragment = link.partition("#")
        if re.match(r"[a-z]+:", target):
            continue
        path = page.parent / target if target else page
        if not path.exists():
            yield f"{link}: no such file"
        elif fragment and fragment not in anchors(path.read_text(encoding="utf-8")):
            yield f"{link}: no such heading"


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: Path) -> None:
    assert list(broken(page)) == []


def test_every_page_can_be_reached_from_the_readme() -> None:
    seen: set[Path] = set()
    todo = [ROOT / "README.md"]
    while todo:
        page = todo.pop().resolve()
        if page in seen or page.suffix != ".md" or not page.exists():
            continue
        seen.add(page)
        targets = (link.partition("#")[0] for link in links(page.read_text(encoding="utf-8")))
        todo += [page.parent / target for target in targets if target and ":" not in target]
    assert [name_of(page) for page in DOCS.rglob("*.md") if page.resolve() not in seen] == []


def defined(path: Path) -> set[str]:
    """Names of functions and classes of a Python file, also of those inside classes."""
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    return {node.name for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, kinds)}


def missing_code(page: Path) -> Iterator[str]:
    for quoted in code(page.read_text(encoding="utf-8")):
        match = re.fullmatch(r"((?:[\w.-]+/)+[\w.-]+\.(?:py|lua))(?:::(\w+))?", quoted)
        if match is None:
            continue
        path = next((base / match[1] for base in (ROOT, PACKAGE) if (base / match[1]).exists()), None)
        if path is None:
            yield f"{quoted}: no such file"
        elif match[2] and match[2] not in defined(path):
            yield f"{quoted}: no such name in it"


@pytest.mark.parametrize("page", PAGES)
def test_code_that_is_named_exists(page: Path) -> None:
    assert list(missing_code(page)) == []


@pytest.mark.parametrize("page", PAGES)
def test_pages_name_no_path_of_somebodys_machine(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert re.findall(r"(?<![\w.:/])/(?:home|root|work|tmp|Users|opt)/\S*", text) == []


def test_there_are_pages() -> None:
    assert len(PAGES) > 25
