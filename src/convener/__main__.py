"""``python -m convener`` is the command ``convener``."""

from __future__ import annotations

from convener.cli import main

if __name__ == "__main__":
    main()
