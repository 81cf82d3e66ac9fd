"""The slow searches are left out unless they are asked for by ``-m slow`` (or any other ``-m``).

They take minutes each on a slow machine and depend on nothing but the models, which change rarely; the quick ones
break every guard but a handful. ``python -m models`` runs them all.
"""

from __future__ import annotations

from pathlib import Path

import pytest


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.option.markexpr:
        return
    here = Path(__file__).parent
    slow = [item for item in items if item.path.parent == here and item.get_closest_marker("slow")]
    if slow:
        config.hook.pytest_deselected(items=slow)
        items[:] = [item for item in items if item not in slow]
