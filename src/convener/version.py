"""Versions: of the package, and of the protocol that nodes speak with each other."""

from __future__ import annotations

from typing import Final

__version__: Final = "0.2.0.dev0"

PROTOCOL: Final = 1
"""Raised when a node of this version could not work beside one of the version before."""
