"""Run a command that must not outlive the process that started it.

A script of its own, started by path and importing the standard library alone, because it runs before each
child and must cost no more than the interpreter's start. Usage::

    python tether.py MODE PARENT SIGNAL COMMAND [ARGUMENT...]

MODE ``exec`` (Linux): asks the kernel for SIGNAL at the parent's death, then becomes COMMAND; the process id
stays. MODE ``watch`` (elsewhere): runs COMMAND as a child, and sends it SIGNAL when standard input, a pipe
from the parent, is at its end.

A ``preexec_fn`` could do the first in fewer lines, but it runs Python between fork and exec, which is not
safe in a process with threads, and asyncio's child watcher is a thread.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import threading
from types import FrameType

_PR_SET_PDEATHSIG = 1
# Between the signal that asks and the one that does not.
_GRACE = 10.0


def become(parent: int, death_signal: int, command: list[str]) -> None:
    """Turn this process into `command`, tied to the life of `parent`."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, death_signal, 0, 0, 0) != 0:
        sys.exit(f"error: prctl: {os.strerror(ctypes.get_errno())}")
    # Whoever died before that call was answered cannot be waited for any more.
    if os.getppid() != parent:
        sys.exit(1)
    os.execv(command[0], command)


def watch(death_signal: int, command: list[str]) -> int:
    """Run `command` until it ends or the parent does; its exit code, 128 + signal if a signal ended it."""
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL)

    def forward(number: int, _frame: FrameType | None) -> None:
        child.send_signal(number)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, forward)

    def end_with_parent() -> None:
        while os.read(0, 4096):
            pass
        child.send_signal(death_signal)
        try:
            child.wait(_GRACE)
        except subprocess.TimeoutExpired:
            child.kill()

    threading.Thread(target=end_with_parent, daemon=True).start()
    code = child.wait()
    return code if code >= 0 else 128 - code


def main() -> None:
    """Entry point."""
    mode, parent, death_signal, *command = sys.argv[1:]
    if mode == "exec":
        become(int(parent), int(death_signal), command)
    sys.exit(watch(int(death_signal), command))


if __name__ == "__main__":
    main()
