"""No run hangs silently: every process shows signs of life, every phase has a deadline.

    beat       each process stores (count, phase, step) every `heartbeat_s`
    leader     process 0 reads all beats at once; who has not moved for `silence_s` is lost
    followers  read one short directory: the leader's beat, and the first failure, if there is one
    deadline   a phase longer than its `…_s`, a beat of our own that came late: this process fails
    notice     SIGTERM or SIGINT (notice.py): whoever it makes leave alone tells the others

Whoever finds a failure publishes it, and every process ends with the same cause, the stacks of its
threads and status `ending.EXIT`; the one that raised, with `ending.EXIT_FAILED`; after a notice all
with its status. A beat costs each process a constant number of requests. Ages are measured by the
reader's own clock.

A second line behind this: if process 0, which serves the store, is killed, JAX ends the others
within a moment by a fatal log (status 134), and `faulthandler` adds their stacks to it.

With one process there are no beats, but the deadlines hold.
"""

import contextlib
import dataclasses
import faulthandler
import itertools
import json
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import jax

from gtalign_jax.pod import ending
from gtalign_jax.pod.exchange import is_first, process_count, process_index, store
from gtalign_jax.pod.notice import Notice, Preempted
from gtalign_jax.pod.start import PodConfig

_TICK_S = 0.2  # how often deadlines are looked at; needs no network
_watches = itertools.count()


@dataclasses.dataclass(frozen=True)
class _Phase:
    name: str
    step: int | None
    began: float
    limit_s: float

    def __str__(self) -> str:
        return self.name if self.step is None else f"{self.name} of step {self.step}"


@dataclasses.dataclass
class _Peer:
    beat: dict[str, Any]
    looked: float
    silent_s: float = 0.0


class Watch:
    """Watches this process and, from process 0, all; make one right after `start.start`.

    Use it as a context manager, or call `close`. `cfg.silence_s` and the deadlines of the phases
    are seconds. `notice` listens while it is entered.
    """

    def __init__(self, cfg: PodConfig) -> None:
        self._cfg = cfg
        self._limits = {
            field.name.removesuffix("_s"): getattr(cfg, field.name)
            for field in dataclasses.fields(cfg) if field.name.endswith("_s")
        }
        self._me = f"process {process_index()} (host {socket.gethostname()}, pid {os.getpid()})"
        root = f"gtalign/watch/{next(_watches)}"
        self._beats, self._common, self._told = f"{root}/beats/", f"{root}/common/", f"{root}/told/"
        self._leader, self._failure = f"{self._common}leader", f"{self._common}failure"
        self._peers: dict[int, _Peer] = {}
        self._raised: tuple[BaseException, _Phase] | None = None
        self._leaving = threading.Event()  # this process has nothing more to do
        self._over = threading.Event()  # nobody has
        self._wake = threading.Event()  # the next beat is due: a phase began or ended
        self._ending = threading.Lock()  # taken by the thread that ends this process
        self._answered = time.monotonic()  # when process 0 last answered
        self.notice = Notice(self.where, self._fail)
        self._enter(self._new_phase("start of the run", None))
        if not faulthandler.is_enabled():  # JAX's fatal log aborts: stacks for that too
            faulthandler.enable(sys.__stderr__, all_threads=True)
        jobs = {"deadlines": self._keep_deadlines}
        if process_count() > 1:
            jobs["beats"] = self._beat
        self._threads = [
            threading.Thread(target=job, name=f"watch: {name}", daemon=True)
            for name, job in jobs.items()
        ]
        for thread in self._threads:
            thread.start()

    def __enter__(self) -> "Watch":
        self.notice.__enter__()
        return self

    def __exit__(self, kind: Any, failed: BaseException | None, trace: Any) -> None:
        self.notice.hold()  # who says good-bye to the others is not to be torn away
        try:
            if isinstance(failed, Preempted) and not failed.together and process_count() > 1:
                self._fail(f"{self._me}: {failed}", failed.status)
            self.close(None if isinstance(failed, Preempted) else failed)  # that is no failure
            if failed is None:
                self.notice.release()
        finally:
            self.notice.__exit__()

    def raised_in(self, error: BaseException) -> str:
        """In which phase, in words; the innermost one."""
        known = self._raised is not None and self._raised[0] is error
        return str(self._raised[1] if known else self._phase)

    def where(self) -> str:
        """What this process does now, in words."""
        return str(self._phase)

    @contextlib.contextmanager
    def phase(self, name: str, step: int | None = None) -> Iterator[None]:
        """What this process does now, with the deadline `cfg.<name>_s` (or `cfg.other_s`).

        A phase inside another has a deadline of its own; the outer one starts anew after it.
        """
        outer, inner = self._phase, self._new_phase(name, step)
        self._enter(inner)
        try:
            yield
        except BaseException as error:
            if self._raised is None or self._raised[0] is not error:
                self._raised = error, inner  # the innermost phase that it passed through
            raise
        finally:
            self._enter(dataclasses.replace(outer, began=time.monotonic()))

    def close(self, failed: BaseException | None = None) -> None:
        """The end of the run. Without `failed` it returns when every process has come here.

        With `failed` and peers it tells them and does not return: the traceback goes to stderr and
        this process ends with status 1 (SystemExit: its own), because JAX's exit would wait for
        peers that are ending, too. With one process it returns and the exception goes its way.
        A planned early end of all processes is no failure: close first, then sys.exit.
        """
        if process_count() > 1 and not self._over.is_set():
            if failed is not None:
                self._fail_by(failed)
            self._enter(self._new_phase("end of the run", None))
            self._leaving.set()
            self._wake.set()
            self._over.wait()
            if is_first():
                self._show()  # followers leave when they read this
        self._over.set()
        self._wake.set()
        for thread in self._threads:  # none may be in a request while JAX takes its client down
            thread.join(timeout=self._cfg.heartbeat_s)
        faulthandler.cancel_dump_traceback_later()

    def _new_phase(self, name: str, step: int | None) -> _Phase:
        return _Phase(name, step, time.monotonic(), self._limits.get(name, self._cfg.other_s))

    def _enter(self, phase: _Phase) -> None:
        self._phase = phase
        self._wake.set()
        # Our own deadline thread needs the interpreter's lock; this one works even where native
        # code never gives it back.
        faulthandler.dump_traceback_later(
            phase.limit_s + self._cfg.silence_s, exit=True, file=sys.__stderr__
        )

    # Deadlines: a thread that never talks to the network, so that no dead peer can block it.

    def _keep_deadlines(self) -> None:
        woke = time.monotonic()
        while not self._over.wait(_TICK_S):
            now, before = time.monotonic(), woke
            woke, phase = now, self._phase
            if process_count() > 1 and now - before > self._cfg.silence_s:
                self._end(
                    f"{self._me} did not run for {now - before:.1f} s (it was stopped or starved), "
                    "so the others have given it up"
                )
            elif now - phase.began > phase.limit_s:
                self._fail(
                    f"{self._me} passed the deadline of {phase.limit_s:g} s in {phase}"
                    + self._elsewhere(str(phase))
                )
            elif process_count() > 1 and now - self._answered > self._cfg.silence_s:
                self._end(
                    f"process 0 has not answered {self._me} for {now - self._answered:.1f} s: it "
                    f"was killed or stopped, or the network is cut; here: {phase}"
                )

    # Beats: a thread that may hang in a request; the one above ends the process then.

    def _beat(self) -> None:
        while not self._over.is_set():
            began = time.monotonic()
            try:
                self._show()
                self._look()
            except jax.errors.JaxRuntimeError as error:
                if not self._over.is_set():
                    self._end(
                        f"process 0 is gone, {self._me} in {self._phase} got no answer: "
                        f"{str(error).splitlines()[0]}"
                    )
                return
            self._answered = time.monotonic()
            # At the end nobody should wait for a whole heartbeat to be allowed to leave.
            pause = _TICK_S if self._leaving.is_set() else self._cfg.heartbeat_s
            self._wake.wait(max(0.0, began + pause - time.monotonic()))
            self._wake.clear()

    def _show(self) -> None:
        done = self._over.is_set() if is_first() else self._leaving.is_set()
        beat = {"time": time.time_ns(), "name": self._me, "phase": str(self._phase), "done": done}
        key = self._leader if is_first() else f"{self._beats}{process_index()}"
        store().key_value_set(key, json.dumps(beat), allow_overwrite=True)

    def _look(self) -> None:
        """Reads who lives: process 0 all the others, the others process 0. Ends where one fails."""
        common = dict(store().key_value_dir_get(self._common))
        if self._failure in common:
            cause, status = json.loads(common[self._failure])
            self._end(cause, status if status in ending.TOLD else ending.EXIT)
        if is_first():
            found = dict(store().key_value_dir_get(self._beats))
            texts = {i: found.get(f"{self._beats}{i}") for i in range(1, process_count())}
        else:
            texts = {0: common.get(self._leader)}
        peers = [self._judge(index, text) for index, text in texts.items()]
        if self._leaving.is_set() and all(peer.beat.get("done") for peer in peers):
            self._over.set()

    def _judge(self, index: int, text: str | None) -> "_Peer":
        beat = json.loads(text) if text else {
            "time": 0, "name": f"process {index}", "phase": "start of the run"
        }
        now = time.monotonic()
        peer = self._peers.setdefault(index, _Peer(beat, now))
        # While we were stopped ourselves we saw nobody, which is not their silence.
        peer.silent_s += min(now - peer.looked, 2 * self._cfg.heartbeat_s)
        peer.looked = now
        if beat["time"] != peer.beat["time"]:
            peer.beat, peer.silent_s = beat, 0.0
        if peer.silent_s > self._cfg.silence_s:
            self._fail(
                f"{beat['name']} has been silent for {peer.silent_s:.1f} s: it was killed or "
                f"stopped, or its network is cut; last seen in {beat['phase']}"
            )
        return peer

    # The end of a run that cannot go on

    def _fail_by(self, error: BaseException) -> NoReturn:
        """Called by the main thread with what it raised."""
        if isinstance(error, ending.OutOfMemory):  # its message says it all
            self._fail(f"{self._me}: {error}", ending.EXIT_FAILED)
        traceback.print_exception(error, file=sys.stderr)
        known = self._raised is not None and self._raised[0] is error
        phase = self._raised[1] if known else self._phase
        lines = str(error).strip().splitlines() or [""]
        cause = f"{self._me} failed in {phase}: {type(error).__name__}: {lines[0]}"
        suspects = self._suspects()
        cause += suspects
        status = error.code if isinstance(error, SystemExit) else ending.EXIT_FAILED
        # Before the first step, and with all peers alive: a collective may raise a ValueError, too.
        if isinstance(error, ending.MISTAKES) and phase.step is None and not suspects:
            status = ending.EXIT_MISTAKE
        self._fail(cause, status if isinstance(status, int) else ending.EXIT_FAILED)

    def _suspects(self) -> str:
        """Who has fallen silent. A peer's death shows here first as an error of a collective, of
        whatever type the backend likes, and must not be taken for a failure of this process.

        It takes two heartbeats. If the peer has published a failure of its own, the beats of this
        process end it meanwhile with that cause, which is the better one.
        """
        before = self._all_beats()
        time.sleep(2 * self._cfg.heartbeat_s + _TICK_S)
        after = self._all_beats()
        silent = [
            json.loads(text)["name"] for key, text in before.items() if after.get(key) == text
        ]
        return f"; no more signs of life from {', '.join(silent)}" if silent else ""

    def _elsewhere(self, phase: str) -> str:
        """Who is in another phase than `phase`: who waits for a peer is not the one to blame."""
        if process_count() == 1:
            return ""
        beats = [json.loads(text) for text in self._all_beats().values()]
        apart = [beat for beat in beats if beat["phase"] != phase]
        return "".join(f"; {beat['name']} is in {beat['phase']}" for beat in apart[:8])

    def _all_beats(self) -> dict[str, str]:
        beats: dict[str, str] = {}
        self._ask(lambda: beats.update(store().key_value_dir_get(self._beats)))
        self._ask(lambda: beats.update(store().key_value_dir_get(self._common)))
        return {key: text for key, text in beats.items() if key != self._failure}

    def _fail(self, cause: str, status: int = ending.EXIT) -> NoReturn:
        """Tells everybody the cause, then ends this process."""
        if process_count() > 1:
            mine = json.dumps([cause, status])
            self._ask(lambda: store().key_value_set(self._failure, mine))  # the first one stays
            common: dict[str, str] = {}
            self._ask(lambda: common.update(store().key_value_dir_get(self._common)))
            first, its_status = json.loads(common.get(self._failure, mine))
            cause = cause if first == cause else f"{first}\nthen {cause}"
            status = its_status if its_status in ending.TOLD else status
        self._end(cause, status)

    def _end(self, cause: str, status: int = ending.EXIT) -> NoReturn:
        """Ends this process; process 0, which serves the store, when the others have read it."""
        self._ending.acquire()  # for good: one thread ends a process, the others wait for that
        if is_first() and process_count() > 1:
            end = time.monotonic() + 2 * self._cfg.heartbeat_s + 1
            told: dict[str, str] = {}
            while len(told) < process_count() - 1 and time.monotonic() < end:
                time.sleep(_TICK_S)
                self._ask(lambda: told.update(store().key_value_dir_get(self._told)))
        elif process_count() > 1:
            self._ask(lambda: store().key_value_set(f"{self._told}{process_index()}", "yes"))
        ending.end(cause, status, stacks=status == ending.EXIT)

    def _ask(self, request: Callable[[], Any]) -> None:
        """A request that must not hang or fail a process which is ending anyway."""
        def run() -> None:
            with contextlib.suppress(jax.errors.JaxRuntimeError):
                request()

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        thread.join(min(self._cfg.heartbeat_s, 5.0))
