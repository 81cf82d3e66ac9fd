"""The project's Markdown pages, and the little of Markdown that the tests need."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).parent.parent.parent
DOCS: Final = ROOT / "docs"

_FENCE: Final = re.compile(r"^(`{3,})([^`\n]*)\n(.*?)^\1`*\n", re.MULTILINE | re.DOTALL)
_LINK: Final = re.compile(r"(?<!!)\[[^\]]*\]\(([^)\s]+)\)")


def pages() -> list[Path]:
    """Every page: at the root, and below ``docs``."""
    return [*sorted(ROOT.glob("*.md")), *sorted(DOCS.rglob("*.md"))]


def name_of(page: Path) -> str:
    """The page's path in the repository."""
    return str(page.relative_to(ROOT))


def without_code(text: str) -> str:
    """The text without fenced code."""
    return _FENCE.sub("", text)


def links(text: str) -> list[str]:
    """Targets of the links in a page."""
    return _LINK.findall(without_code(text))


def anchors(text: str) -> set[str]:
    """Fragments that a link may name: one per heading, made the way that GitHub does."""
    found: set[str] = set()
    for heading in re.findall(r"^#+ +(.*)$", without_code(text), re.MULTILINE):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).replace("`", "").strip().lower()
        found.add(re.sub(r"[^\w\- ]", "", plain).replace(" ", "-"))
    return found


def rows(text: str) -> list[list[str]]:
    """Rows of all tables, as cells without the quotes of code; header and ruler too."""
    found: list[list[str]] = []
    for line in without_code(text).splitlines():
        if line.startswith("|"):
            cells = re.split(r"(?<!\\)\|", line.strip().strip("|"))
            found.append([cell.replace("\\|", "|").strip() for cell in cells])
    return found


def first_cells(text: str) -> list[str]:
    """First cells of all table rows."""
    return [row[0] for row in rows(text) if row]


def code(text: str) -> set[str]:
    """Everything between single backquotes, outside of fenced code."""
    return set(re.findall(r"`([^`\n]+)`", without_code(text).replace("\\|", "|")))


@dataclass(frozen=True)
class Step:
    """A marker ``<!-- verb[: argument] -->`` and the code right after it, if there is any."""

    verb: str
    argument: str
    code: str
    line: int


def steps(text: str, verbs: Sequence[str]) -> Iterator[Step]:
    """The marked steps of a page, in order."""
    marker = re.compile(rf"^<!-- ({'|'.join(map(re.escape, verbs))})(?:: (.*?))? -->\n", re.MULTILINE)
    for match in marker.finditer(text):
        fence = _FENCE.match(text, match.end())
        line = text.count("\n", 0, match.start()) + 1
        yield Step(match[1], match[2] or "", fence[3] if fence else "", line)


def blocks(text: str, language: str) -> list[str]:
    """Fenced code of a language, in order."""
    return [match[3] for match in _FENCE.finditer(text) if match[2].strip() == language]
