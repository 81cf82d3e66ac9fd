"""The command ``convener``.

Exit codes: 0 done, 1 failed, 2 wrong usage or settings. Data goes to standard output, everything else to
standard error; an error is one line, without a traceback unless ``--traceback`` asks for it.
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Sequence

from convener.cli.failures import CommandFailed
from convener.cli.root import State, app
from convener.errors import ConfigurationError, ConvenerError

__all__ = ["main", "run"]


def main() -> None:
    """Entry point of the installed script."""
    sys.exit(run(sys.argv[1:]))


def run(arguments: Sequence[str]) -> int:
    """Run one command line and return its exit code."""
    state = State()
    try:
        app(list(arguments), prog_name="convener", obj=state)
    except SystemExit as stop:
        # Typer ends every command this way, with 130 after Ctrl-C; only 0, 1 and 2 are promised.
        code = stop.code if isinstance(stop.code, int) else 0 if stop.code is None else 1
        return code if code in (0, 1, 2) else 1
    except CommandFailed as error:
        return _fail(str(error), error.exit_code)
    except ConfigurationError as error:
        return _fail(str(error), 2)
    except ConvenerError as error:
        return _fail(f"{error.wire_code}: {error}", 1)
    except Exception as error:
        if state.traceback:
            traceback.print_exc()
        return _fail(f"unexpected {type(error).__name__}: {error} (convener --traceback … tells more)", 1)
    return 0


def _fail(message: str, code: int) -> int:
    print(f"error: {message}", file=sys.stderr)
    return code
