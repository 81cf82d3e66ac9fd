"""Noticing that source files changed, by looking at them: no dependency, any file system."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import Final

# Also how long nothing may move before it counts as a change: an editor writes several files, or one twice.
_PAUSE: Final = 0.5
_SKIPPED: Final = frozenset({"__pycache__", "node_modules", "site-packages", "venv"})


def snapshot(root: Path) -> dict[str, int]:
    """Modification times (ns) of the Python files under `root`, without hidden and installed ones."""
    times: dict[str, int] = {}
    for directory, children, files in os.walk(root):
        children[:] = [name for name in children if name not in _SKIPPED and not name.startswith(".")]
        for name in files:
            if name.endswith(".py"):
                path = f"{directory}/{name}"
                try:
                    times[path] = os.stat(path).st_mtime_ns  # noqa: PTH116 - thousands of times per look
                except FileNotFoundError:
                    continue
    return times


async def next_change(root: Path, before: dict[str, int]) -> dict[str, int]:
    """Wait until files under `root` differ from `before` and have come to rest; the new snapshot."""
    while True:
        await asyncio.sleep(_PAUSE)
        now = await asyncio.to_thread(snapshot, root)
        while now != before:
            await asyncio.sleep(_PAUSE)
            later = await asyncio.to_thread(snapshot, root)
            if later == now:
                return now
            now = later


def changed(before: dict[str, int], now: dict[str, int], root: Path) -> list[str]:
    """The files that differ, relative to `root`."""
    paths = {path for path in before.keys() | now.keys() if before.get(path) != now.get(path)}
    return sorted(os.path.relpath(path, root) for path in paths)
