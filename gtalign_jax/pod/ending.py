"""How a process of a pod ends itself when it cannot go on: cause, stacks of all threads, status.

Python's ordinary exit is no way out there: the main thread may sit in a collective that never
returns, and JAX's own exit waits for peers that are gone.
"""

import faulthandler
import os
import sys
from typing import NoReturn

EXIT = 70  # status of a process that the watch or the start-up deadline ended
EXIT_FAILED = 1  # of one that raised
EXIT_MISTAKE = 2  # of one that raised because of the user's input: starting it again is no use
EXIT_PREEMPTED = 75  # of a run that SIGTERM told to end, and that saved: the same command goes on
EXIT_INTERRUPTED = 130  # the same by SIGINT, Ctrl-C
TOLD = (EXIT_PREEMPTED, EXIT_INTERRUPTED)
MISTAKES = (ValueError, TypeError, FileNotFoundError)  # how such input shows


class OutOfMemory(RuntimeError):
    """A device had no room; the message names the phase, what was asked for and what would help."""


def end(cause: str, status: int = EXIT, stacks: bool = True) -> NoReturn:
    """Writes `cause` and the stacks of all threads to stderr and ends this process at once."""
    try:
        print(cause if status in TOLD else f"\nerror: {cause}", file=sys.stderr, flush=True)
        if stacks:
            faulthandler.dump_traceback(sys.__stderr__, all_threads=True)
        sys.stdout.flush()
    finally:
        os._exit(status)
