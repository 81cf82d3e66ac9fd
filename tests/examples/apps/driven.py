"""An example whose outside world is the test's: calls are noted in a file, and held while the test wants it.

``calls.txt`` gets a line for every call, with its key. A call is held as long as the file ``hold`` names it.
"""

from __future__ import annotations

import asyncio
import importlib
import sys
from pathlib import Path
from typing import Any

NAME, EXAMPLES = "", ""  # the test writes them here

sys.path.insert(0, EXAMPLES)
lesson: Any = importlib.import_module(NAME)
app = lesson.app


async def call(order: str, key: str = "") -> str:
    """What the example calls its service."""
    with Path("calls.txt").open("a", encoding="utf-8") as calls:  # noqa: ASYNC230 - one short line
        calls.write(f"{order} ({key})\n")
    hold = Path("hold")
    while hold.exists() and hold.read_text(encoding="utf-8") in order:  # noqa: ASYNC110, ASYNC240 - what a test can make
        await asyncio.sleep(0.01)
    return f"{order}: done"


async def summarise(said: str) -> str:
    """The same for the worker, whose work has no key."""
    await call(f"summarise {said}")
    return f"{len(said.split())} words"


lesson.service = call
lesson.summarise = summarise
lesson.PAUSE_S = 0.05
