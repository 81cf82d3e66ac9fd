"""Console sessions as pages and docstrings show them: commands after ``$``, and what they print.

In expected output digits stand for digits and made ids for made ids; ``…`` stands for anything, and for any number of
lines where it is alone.
"""

from __future__ import annotations

import re
from collections.abc import Sequence


def sessions(text: str) -> list[tuple[str, list[str]]]:
    """Commands with the lines that they print."""
    parts = re.split(r"^\$ ", text, flags=re.MULTILINE)[1:]
    split = (part.rstrip("\n").split("\n") for part in parts)
    return [(first, rest) for first, *rest in split]


def on_port(text: str, port: int) -> str:
    """The text with `port` instead of 8000 and so on."""
    return re.sub(r"127\.0\.0\.1:(800\d)", lambda m: f"127.0.0.1:{port + int(m[1]) - 8000}", text)


def pattern(expected: str) -> re.Pattern[str]:
    """What a line of output has to be like."""
    parts: list[str] = []
    for word in re.split(r"(\s+|…)", expected.strip()):
        if not word:
            continue
        if word == "…":
            parts.append(".*")
        elif word.isspace():
            parts.append(r"\s+")
        elif re.fullmatch(r"[\w.-]{22}", word):
            parts.append(r"[\w.-]{22}")  # an id that was made
        else:
            parts.append(re.sub(r"\d+", lambda _: r"\d+", re.escape(word)))
    return re.compile("".join(parts))


def matches(expected: Sequence[str], printed: Sequence[str]) -> bool:
    """Whether the lines are as expected."""
    if not expected:
        return not printed
    if expected[0].strip() == "…":
        return any(matches(expected[1:], printed[start:]) for start in range(len(printed) + 1))
    if not printed or not pattern(expected[0]).fullmatch(printed[0].strip()):
        return False
    return matches(expected[1:], printed[1:])
