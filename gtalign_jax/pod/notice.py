"""A notice that the machine will be taken away (SIGTERM): the run saves between two steps and ends.

One process hears of it; all must stop after the same step, since saving is done together. So after
every step they ask each other. A second SIGTERM ends the process at once, as without a notice.
"""

import signal
import sys
import threading
from types import FrameType
from typing import Any

from gtalign_jax.pod import exchange

EXIT_PREEMPTED = 75  # status of a run that was told to end and saved: the same command goes on


class Preempted(Exception):
    """The run was told to end; what it has done is saved."""


class Notice:
    """Listens while it is entered; before and after, SIGTERM ends the process at once.

    Only a process's main thread can listen; elsewhere nothing is heard.
    """

    def __init__(self) -> None:
        self._given = False
        self._before: Any = None

    def __enter__(self) -> "Notice":
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGTERM, self._hear)
        return self

    def __exit__(self, *_: Any) -> None:
        self._restore()

    def given(self) -> bool:
        """Whether any process was told to end. A collective: all ask after every step."""
        return any(exchange.all_gather(self._given, "notice"))

    def _hear(self, number: int, frame: FrameType | None) -> None:
        del number, frame
        self._given = True
        self._restore()
        print("SIGTERM: this step ends, is saved, and then the run ends; a second one ends it now",
              file=sys.stderr, flush=True)

    def _restore(self) -> None:
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)
            self._before = None
