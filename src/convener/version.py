"""Versions: of the package, and of the protocol that nodes speak with each other."""

from __future__ import annotations

from typing import Final

__version__: Final = "0.2.0.dev0"

PROTOCOL: Final = 2
"""Raised when nodes of this version do what a node of the version before would not understand; they do it only while
every member of the cluster speaks a version that does."""

ARCHIVES: Final = 2
"""The first version that reads logs whose beginning is in an archive."""

OLDEST_PROTOCOL: Final = 1
"""The oldest version that nodes of this one can live beside; others refuse to join (`convener.manager.versions`)."""
