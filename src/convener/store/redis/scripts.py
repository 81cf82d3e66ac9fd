"""The Lua scripts: loaded from ``lua/*.lua`` at import, known by name.

A file's header lists KEYS, ARGV and replies; the stubs that fill and read them are the methods of
`conversations`, `slots`, `membership`, `nodes` and `index`. A line ``-- @include x`` stands for
``lua/lib/x.lua``: the server knows no libraries that survive a fail-over in every topology, and fragments
keep one rule in one place.

The first line is the server's own (``#!lua flags=…``): without it a script that writes would be stopped for
want of memory in its middle; with it, it is refused before it begins, or, with ``allow-oom``, never.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from importlib.resources import files
from importlib.resources.abc import Traversable
from typing import Final

_INCLUDE: Final = "-- @include "
_FULL_TOO: Final = "#!lua flags=allow-oom"


@dataclass(frozen=True, slots=True)
class Script:
    """A script as the server gets it. `sha` is what EVALSHA names."""

    name: str
    source: str
    sha: str = field(init=False)

    def __post_init__(self) -> None:
        # SHA-1 is the server's name for a script, not a safeguard.
        digest = hashlib.sha1(self.source.encode(), usedforsecurity=False).hexdigest()
        object.__setattr__(self, "sha", digest)


def _expand(folder: Traversable, source: str) -> str:
    lines: list[str] = []
    for line in source.splitlines():
        if line.startswith(_INCLUDE):
            name = line.removeprefix(_INCLUDE)
            lines.append(folder.joinpath("lib", f"{name}.lua").read_text("utf-8").rstrip("\n"))
        else:
            lines.append(line)
    return "\n".join(lines) + "\n"


def _load() -> dict[str, Script]:
    folder = files("convener.store.redis").joinpath("lua")
    scripts: dict[str, Script] = {}
    for file in sorted(folder.iterdir(), key=lambda f: f.name):
        if file.name.endswith(".lua"):
            name = file.name.removesuffix(".lua")
            scripts[name] = Script(name, _expand(folder, file.read_text("utf-8")))
    # One source, two declarations: a full store takes the batch that ends a turn, and no other.
    first, _, rest = scripts["append"].source.partition("\n")
    assert first == "#!lua"
    scripts["append_final"] = Script("append_final", f"{_FULL_TOO}\n{rest}")
    return scripts


SCRIPTS: Final = _load()
"""All scripts by name."""
