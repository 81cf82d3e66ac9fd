"""What the nodes of most tests run: the demo agent, or one whose turns last as long as a test wants."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import pytest

SCRIPTED: Final = (Path(__file__).parent / "apps" / "scripted.py").read_text()

scripted = pytest.mark.cluster(app=SCRIPTED, lease_ttl=4)
"""Three nodes with `apps/scripted.py` and a lease that a test can wait for."""
