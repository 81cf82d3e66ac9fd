"""``python -m models [NAME…]``: run models and say what came of each.

A NAME is a model (``stop``) or one of its runs (``stop/no-tombstone``); without one, all models run. Exit code 0 if
every run came out as it must, 1 if one did not, 2 for an unknown name.
"""

from __future__ import annotations

import argparse
import sys
import textwrap
import time

from models.catalogue import select
from models.explore import Found, Run, TooLarge, explore


def main() -> int:
    """Run what the command line names; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m models", description="Search the models of the protocol.")
    parser.add_argument("names", nargs="*", metavar="NAME", help="a model, or model/run; default all")
    parser.add_argument("--quick", action="store_true", help="leave the slow runs out")
    parser.add_argument("--list", action="store_true", help="list the runs instead of searching")
    parser.add_argument("--trace", action="store_true", help="print the counterexamples")
    options = parser.parse_args()
    try:
        runs = select(options.names, slow=not options.quick)
    except KeyError as error:
        print(f"error: there is no model or run {error.args[0]}", file=sys.stderr)
        return 2
    if options.list:
        for name, run in runs:
            print(f"{name:<40} {'slow  ' if run.slow else '      '}{run.about}")
        return 0
    wrong = [name for name, run in runs if not _report(name, run, trace=options.trace)]
    if wrong:
        print(f"not as expected: {', '.join(wrong)}", file=sys.stderr)
    return 1 if wrong else 0


def _report(name: str, run: Run, *, trace: bool) -> bool:
    began = time.monotonic()
    try:
        found = explore(run.make())
    except TooLarge as error:
        print(f"FAIL {name:<40} {error}")
        return False
    problem = run.judge(found)
    took = time.monotonic() - began
    print(f"{'FAIL' if problem else 'ok':<4} {name:<40} {_outcome(found)}, {took:.1f} s", flush=True)
    if problem:
        print(f"     {problem}")
    if found.trace and (trace or problem):
        print(textwrap.indent("\n".join(found.trace), "       "))
    return problem is None


def _outcome(found: Found) -> str:
    if found.verdict == "clean":
        return f"clean, {found.states} states"
    what = "stuck" if found.verdict == "stuck" else found.reason.partition(":")[0]
    return f"{what} after {len(found.trace)} steps, {found.states} states"


if __name__ == "__main__":
    sys.exit(main())
