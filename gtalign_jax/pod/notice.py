"""A notice to end: SIGTERM, as before a machine is taken away, or SIGINT (Ctrl-C).

    nothing to save     the main thread raises Preempted where it stands; where native code keeps it
                        (a compilation), the process ends after `NATIVE_S` all the same
    hold … release      there is: all processes raise it at the next `check`, the same in all

`check` stands wherever a step may be dropped: between the pieces of a rollout, after judging,
between the batches of an evaluation, after a step. Data and randomness are functions of (key,
step), so a dropped step is repeated exactly. An update, once begun, is finished: it takes its
state's place.

A second signal of the same kind ends the process at once. Within `ECHO_S` it is the first again:
who ends a whole group of processes reaches a run, and the script that keeps it and passes it on.
"""

import contextlib
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

import jax

from gtalign_jax.pod import ending, exchange

NATIVE_S = 5.0  # what native code gets to come back to Python where nothing must be saved
ECHO_S = 1.0  # a signal that comes again within this time is the same one
_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_KEYS = "gtalign/notice/"


class Preempted(BaseException):
    """The run was told to end. Like KeyboardInterrupt no `except Exception` keeps it.

    Attributes:
      saved: what is saved, in words.
      together: all processes raise it, at the same point; else this one alone.
    """

    def __init__(self, number: int, where: str, saved: str, together: bool) -> None:
        self.saved, self.together = saved, together
        self._number, self._where = number, where

    @property
    def status(self) -> int:
        """That of the process."""
        return ending.EXIT_INTERRUPTED if self._number == signal.SIGINT else ending.EXIT_PREEMPTED

    def __str__(self) -> str:
        name = signal.Signals(self._number).name
        return (f"told to end by {name} in {self._where}: {self.saved}; the same command goes on "
                "from there")


class Notice:
    """Listens while it is entered, inside another one also in its place.

    Only a process's main thread can listen; elsewhere nothing is heard.

    where: what the process does, in words. leave: ends the process, given cause and status.
    Attributes:
      saved: what is saved, in words.
    """

    def __init__(self, where: Callable[[], str] = lambda: "start-up",
                 leave: Callable[[str, int], Any] = ending.end) -> None:
        self.saved = "there was nothing to save"
        self._where, self._leave = where, leave
        self._given, self._at = 0, ""  # the signal that was heard, and where
        self._holds = False
        self._seen = threading.Event()  # by the main thread
        self._undo = contextlib.ExitStack()

    def __enter__(self) -> "Notice":
        if threading.current_thread() is not threading.main_thread():
            return self
        # A handler runs when native code is done; a byte on this socket comes at once.
        ear, mouth = socket.socketpair()
        mouth.setblocking(False)
        listener = threading.Thread(target=self._listen, args=(ear,), name="notice", daemon=True)
        self._undo.callback(ear.close)
        self._undo.callback(listener.join)
        self._undo.callback(mouth.close)  # the listener ends by this
        before = signal.set_wakeup_fd(mouth.fileno(), warn_on_full_buffer=False)
        self._undo.callback(signal.set_wakeup_fd, before)
        listener.start()
        for number in _SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:  # so are Ctrl-C's in a background
                self._undo.callback(signal.signal, number, signal.signal(number, self._handle))
        return self

    def __exit__(self, *_: Any) -> None:
        self._undo.close()

    def hold(self) -> None:
        """From now on there is something to save: Preempted is only raised by `check`."""
        self._holds = True

    def release(self) -> None:
        """All is saved. Raises Preempted for a notice that came after the last `check`."""
        self._holds = False
        if self._given:
            raise self._told(self._given, together=False)

    def heard(self) -> bool:
        """Whether some process was told to end, as far as this one knows. No collective: for those
        who wait for something of their own, before a `check`."""
        if exchange.process_count() == 1:
            return bool(self._given)
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # the watch knows what that means
            if self._given:
                key = f"{_KEYS}{exchange.process_index()}"
                exchange.store().key_value_set(key, str(self._given), allow_overwrite=True)
            return bool(exchange.store().key_value_dir_get(_KEYS))
        return bool(self._given)

    def check(self) -> None:
        """Raises Preempted in all processes if any was told to end. A collective."""
        if self._given:
            self.heard()  # the others may wait for their judges: it tells them
        given = [number for number in exchange.all_gather(self._given, "notice") if number]
        if given:
            raise self._told(given[0], together=True)

    def _told(self, number: int, together: bool) -> Preempted:
        return Preempted(number, self._at or self._where(), self.saved, together)

    def _take(self, number: int) -> None:
        if not self._given:
            self._at, self._given = self._where(), number

    def _handle(self, number: int, frame: FrameType | None) -> None:
        """In the main thread."""
        del frame
        self._take(number)
        leaving = self._seen.is_set()
        self._seen.set()
        if not self._holds and not leaving:
            raise self._told(number, together=False)

    def _listen(self, ear: socket.socket) -> None:
        """In a thread of its own, also while the main thread is in native code."""
        heard: dict[int, float] = {}
        while numbers := ear.recv(64):
            for number in numbers:
                if number in heard and time.monotonic() - heard[number] > ECHO_S:
                    os._exit(128 + number)
                if number in _SIGNALS and number not in heard:
                    heard[number] = time.monotonic()
                    self._take(number)
                    self._answer(signal.Signals(number).name)

    def _answer(self, name: str) -> None:
        then = ("its update is finished, any other step is dropped; the run is saved and ends"
                if self._holds else "the run ends")
        print(f"{name} in {self._at}: {then}; a second {name} ends it at once", file=sys.stderr,
              flush=True)
        if not self._holds and not self._seen.wait(NATIVE_S) and not self._holds:
            told = self._told(self._given, together=False)
            self._leave(str(told), told.status)
