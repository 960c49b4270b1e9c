"""The real command under kill -9, over and over: does it end as if nothing had happened?

    python -m tests.faults.kills [--kills=200 --inside_saves=50 --seed=0 --out=DIRECTORY]
    python -m tests.faults.kills --places[=update,save]    one kill in each place (planted.py)

The demo's model and batches with fewer steps, once uninterrupted, then killed at random moments and
given again until it is done; then the next such run, until there were enough kills. A moment is
drawn uniformly from the time that starting takes and twice `mean` seconds more. Some kills wait for
a save instead, and strike while its temporary directory lies there; they count as inside a save
only where that directory was left behind.

Checked after each death: the process goes on after the newest save that was complete, never earlier
and without an error, and does not hang. Checked of each finished run: sameness.py. A report is kept
up to date in `out`, kills.json and kills.md. Exit status 1, and the first fault on stderr, where
anything is otherwise.
"""

import argparse
import dataclasses
import json
import logging
import os
import random
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
sys.path[:0] = [str(HERE), str(HERE.parent)]  # the comparison, and what it uses of the tests

from planted import PLACES, TINY  # noqa: E402
from sameness import STAGES, committed, differences  # noqa: E402

POLL_S = 0.002
DEMO = {
    "stages": "('sft','grpo','evaluate','export')", "sft.steps": 60, "sft.log_every": 1,
    "grpo.steps": 12, "checkpoint.every": 2, "data.train_size": 600, "data.test_size": 32,
    "evaluate.batch_size": 32, "evaluate.every_steps": 3,
}
SIGNS = (  # the last of these on the console tells in which phase a process was
    (r"\d+ \w+ device\(s\)", "before the first step"),
    (r"(before cold start|sft: continuing)", "first update of a process, cold start"),
    (r"sft +\d+/\d+ ", "cold start"),
    (r"(after cold start:|grpo: continuing)", "first step of a process, GRPO"),
    (r"(grpo +\d+/\d+ |step \d+:)", "GRPO"),
    (r"after GRPO:", "curves and export"),
    (r"exported:", "tables and report"),
)


class Fault(Exception):
    """What must not happen to a run."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """When an attempt is killed: after so many seconds, or so long into a save. None: never."""

    after_s: float | None = None
    save: int | None = None  # the how many-th save that begins
    into_s: float = 0.0

    @classmethod
    def draw(cls, dice: random.Random, inside: float, window_s: float) -> "Plan":
        """`inside`: the share of plans that wait for a save."""
        if dice.random() < inside:
            return cls(save=dice.randint(1, 4), into_s=dice.uniform(0, 0.1))
        return cls(after_s=dice.uniform(0, window_s))


@dataclasses.dataclass(frozen=True)
class Kill:
    """What a kill hit. `lost_s`: since the last complete save, or the start of the process."""

    run: str
    attempt: int
    at_s: float
    phase: str
    inside_save: bool
    lost_s: float
    lost_steps: int


class Run:
    """One run, given again and again. `bound_s`: without a word for so long it hangs."""

    def __init__(self, workdir: Path, command: Sequence[str], environ: dict, bound_s: float = 300):
        self.workdir, self.bound_s = workdir, bound_s
        self.command = [*command, f"--config.workdir={workdir}"]
        self.environ, self.attempts, self.resumes = os.environ | environ, 0, 0

    def attempt(self, plan: Plan, environ: dict | None = None) -> Kill | None:
        """Starts the command, kills it as planned; None where it came to its end. Raises Fault."""
        before = {stage: committed(self.workdir, stage) for stage in STAGES}
        unfinished, began = set(self._saving()), time.time()
        self.attempts += 1
        log = self.workdir.with_name(f"{self.workdir.name}-{self.attempts}.log")
        with log.open("wb") as out:
            process = subprocess.Popen(
                self.command, cwd=ROOT, stdout=out, stderr=out,
                env=self.environ | {"PYTHONUNBUFFERED": "1"} | (environ or {}),
            )
            try:
                self._wait(process, plan, unfinished, log)
            finally:
                process.kill()
                process.wait()
        text = log.read_text(errors="replace")
        self._check_resumed(before, text, log)
        if process.returncode == 0:
            return None
        if process.returncode != -signal.SIGKILL:
            raise Fault(f"{log}: ended by itself with status {process.returncode}")
        inside = bool(set(self._saving()) - unfinished)
        since, steps = self._lost(text, began)
        return Kill(self.workdir.name, self.attempts, round(time.time() - began, 2),
                    "a save" if inside else phase_of(text), inside, since, steps)

    def _wait(self, process: subprocess.Popen, plan: Plan, unfinished: set[Path], log: Path):
        """Returns when the process has ended, or is to be killed. Raises Fault where it hangs."""
        began = looked = moved = time.monotonic()
        saves, size = set(unfinished), -1
        while process.poll() is None:
            now = time.monotonic()
            if plan.after_s is not None and now - began > plan.after_s:
                return
            if plan.save is not None:
                saves |= set(self._saving())
                if len(saves) - len(unfinished) >= plan.save:
                    time.sleep(plan.into_s)
                    return
            if now - looked > 1:
                metrics = self.workdir / "metrics.jsonl"
                grown = log.stat().st_size + (metrics.stat().st_size if metrics.exists() else 0)
                moved, size, looked = (moved if grown == size else now), grown, now
                if now - moved > self.bound_s:
                    process.send_signal(signal.SIGABRT)  # the stacks of its threads go to the log
                    time.sleep(1)
                    raise Fault(f"{log}: no sign of life for {self.bound_s:g} s")
            time.sleep(POLL_S)

    def _saving(self) -> list[Path]:
        """Saves that are not complete."""
        return list(self.workdir.glob("checkpoints/*/*.orbax-checkpoint-tmp*"))

    def _check_resumed(self, before: dict[str, list[int]], text: str, log: Path) -> None:
        for stage, steps in before.items():
            found = re.search(rf"{stage}: continuing after step (\d+)", text)
            begun = found or re.search(rf"^{stage} +\d+/", text, re.M)
            after = int(found[1]) if found else 0
            self.resumes += found is not None
            if begun and after != max(steps, default=0):
                raise Fault(f"{log}: {stage} went on after step {after} of complete saves {steps}")
            now = committed(self.workdir, stage)
            if max(now, default=0) < max(steps, default=0):
                raise Fault(f"{log}: {stage} had complete saves {steps}, now {now}")
        if "Traceback" in text:
            raise Fault(f"{log}: an error was raised")

    def _lost(self, text: str, began: float) -> tuple[float, int]:
        """Seconds and updates since the last complete save: the next attempt repeats them."""
        lines = re.findall(r"^(\w+) +(\d+)/\d+ ", text, re.M)
        if not lines:
            return round(time.time() - began, 2), 0
        stage, step = lines[-1]
        steps = committed(self.workdir, stage)
        saves = [self.workdir / "checkpoints" / stage / str(at) for at in steps[-1:]]
        since = max([began, *(path.stat().st_ctime for path in saves)])
        return round(time.time() - since, 2), int(step) - max(steps, default=0)


def phase_of(text: str) -> str:
    """The phase in which a process was that had written `text`."""
    phase = "start-up"
    for line in text.splitlines():
        phase = next((name for sign, name in SIGNS if re.match(sign, line)), phase)
    return phase


@dataclasses.dataclass
class Campaign:
    """Many runs, side by side, until there were enough kills; and the report on them."""

    whole: Path
    make: Callable[[str], Run]
    kills_wanted: int
    inside_wanted: int
    window_s: float
    seed: int
    out: Path
    kills: list[Kill] = dataclasses.field(default_factory=list)
    runs: dict[str, Run] = dataclasses.field(default_factory=dict)
    compared: int = 0
    faults: list[str] = dataclasses.field(default_factory=list)
    lock: threading.Lock = dataclasses.field(default_factory=threading.Lock)
    began: float = dataclasses.field(default_factory=time.monotonic)

    def enough(self) -> bool:
        inside = sum(kill.inside_save for kill in self.kills)
        return len(self.kills) >= self.kills_wanted and inside >= self.inside_wanted

    def work(self) -> None:
        """Run after run until there were enough kills, or a fault."""
        while not self.faults and not self.enough():
            with self.lock:
                run = self.make(f"run-{len(self.runs) + 1:03}")
                self.runs[run.workdir.name] = run
            try:
                self.finish(run)
            except Fault as fault:
                self.tell(str(fault))

    def finish(self, run: Run) -> None:
        """Kills a run until it is done all the same, then compares it."""
        while not self.faults:
            dice = random.Random(f"{self.seed}/{run.workdir.name}/{run.attempts}")
            # More plans than are wanted: a save may be complete before the signal comes.
            share = min(1.5 * self.inside_wanted / max(self.kills_wanted, 1), 1.0)
            kill = run.attempt(Plan() if self.enough() else Plan.draw(dice, share, self.window_s))
            if kill is None:
                break
            with self.lock:
                self.kills.append(kill)
                self.save()
                print(f"{len(self.kills)}/{self.kills_wanted} kills, {self.summary()['inside']} "
                      f"inside a save | {kill.run}, attempt {kill.attempt}: {kill.phase}, "
                      f"{kill.at_s:.1f} s", flush=True)
        else:
            return
        found = differences(run.workdir, self.whole)
        with self.lock:
            self.compared += 1
        for difference in found:
            self.tell(f"{run.workdir}: {difference}")
        if not found:  # its logs stay
            shutil.rmtree(run.workdir)

    def tell(self, fault: str) -> None:
        with self.lock:
            self.faults.append(fault)
            self.save()
        print(f"FAULT: {fault}", file=sys.stderr, flush=True)

    def summary(self) -> dict:
        lost = [kill.lost_s for kill in self.kills] or [0.0]
        return {
            "kills": len(self.kills), "inside": sum(kill.inside_save for kill in self.kills),
            "attempts": sum(run.attempts for run in self.runs.values()),
            "resumes": sum(run.resumes for run in self.runs.values()),
            "runs_compared": self.compared, "faults": self.faults,
            "seconds_lost": {"median": statistics.median(lost), "most": max(lost)},
            "steps_repeated": sum(kill.lost_steps for kill in self.kills),
            "minutes": round((time.monotonic() - self.began) / 60, 1),
            "phases": dict(Counter(kill.phase for kill in self.kills).most_common()),
        }

    def save(self) -> None:
        summary = self.summary()
        every = [dataclasses.asdict(kill) for kill in self.kills]
        (self.out / "kills.json").write_text(json.dumps(summary | {"each": every}, indent=1) + "\n")
        (self.out / "kills.md").write_text(markdown(summary))


def markdown(summary: dict) -> str:
    lost = summary["seconds_lost"]
    lines = [
        f"{summary['kills']} kills, {summary['inside']} of them inside a save, in "
        f"{summary['attempts']} processes and {summary['minutes']} minutes; "
        f"{summary['runs_compared']} runs came to their end and were compared.", "",
        "| | |", "|---|---|",
        f"| stages continued from a save | {summary['resumes']} |",
        f"| updates done twice | {summary['steps_repeated']} |",
        f"| seconds from the last save to a kill | median {lost['median']:.1f}, at most "
        f"{lost['most']:.1f} |",
        f"| faults | {len(summary['faults'])} |", "",
        "| where the kill struck | kills |", "|---|---|",
        *(f"| {phase} | {count} |" for phase, count in summary["phases"].items()),
        *(["", "Faults:", *(f"- {fault}" for fault in summary["faults"])]
          if summary["faults"] else []),
    ]
    return "\n".join(lines) + "\n"


def command(settings: dict, script: Sequence[str] = ("-m", "gtalign_jax.main")) -> list[str]:
    words = [f"--config.{key}={value}" for key, value in settings.items()]
    return [sys.executable, *script, "--config=configs/demo_cpu.py", *words]


def cached(directory: Path) -> dict[str, str]:
    """Processes with this environment keep every compiled program in `directory`."""
    return {"JAX_PLATFORMS": "cpu", "JAX_COMPILATION_CACHE_DIR": str(directory),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", "PYTHONPATH": str(ROOT)}


def uninterrupted(run: Run) -> float:
    """Carries `run` out; returns the seconds that its start-up took."""
    began = time.time()
    if run.attempt(Plan()) is not None:
        raise Fault(f"{run.workdir} was not to be killed")
    return (run.workdir / "config.json").stat().st_mtime - began


def many_kills(args: argparse.Namespace, out: Path, environ: dict) -> dict:
    """The report of as many kills as were asked for, or of fewer and a fault."""
    def make(name: str) -> Run:
        return Run(out / name, command(DEMO), environ)

    fill = make("compiling")  # so that those which are killed start quickly
    uninterrupted(fill)
    whole = make("uninterrupted")
    start_up = uninterrupted(whole)
    if found := differences(fill.workdir, whole.workdir):
        raise Fault(f"programs from the cache compute otherwise: {found[0]}")
    print(f"start-up takes {start_up:.1f} s", flush=True)
    campaign = Campaign(whole.workdir, make, args.kills, args.inside_saves,
                        start_up + 2 * args.mean, args.seed, out)
    threads = [threading.Thread(target=campaign.work) for _ in range(args.side_by_side)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if not (campaign.enough() or campaign.faults):  # the harness itself failed: see stderr
        campaign.tell(f"ended after {len(campaign.kills)} kills, fewer than were wanted")
    campaign.save()
    return campaign.summary()


def planted_kills(places: Sequence[str], out: Path, environ: dict) -> dict:
    """One kill in each place of a tiny run; the report."""
    script = command(TINY, [str(HERE / "planted.py")])
    whole = Run(out / "uninterrupted", script, environ)
    uninterrupted(whole)
    killed, faults = {}, []
    for place in places:
        try:
            killed[place] = planted_kill(place, Run(out / place.replace(" ", "-"), script, environ))
            found = differences(out / place.replace(" ", "-"), whole.workdir)
        except Fault as fault:
            found = [str(fault)]
        faults += [f"{place}: {difference}" for difference in found]
        print(f"{place}: {found or 'identical'}", flush=True)
    return {"places": killed, "faults": faults}


def planted_kill(place: str, run: Run) -> dict:
    """Kills `run` in a place and gives it again until its end; what the kill hit."""
    kill = run.attempt(Plan(), {"KILL_AT": place})
    if kill is None:
        raise Fault(f"{run.workdir} came to its end without having been at {place!r}")
    uninterrupted(run)
    return dataclasses.asdict(kill)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--inside_saves", type=int, default=50)
    parser.add_argument("--mean", type=float, default=9.0)
    parser.add_argument("--side_by_side", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--places", nargs="?", const=",".join(PLACES))
    args = parser.parse_args(argv)
    logging.getLogger("absl").setLevel(logging.ERROR)  # orbax misses metadata that nobody needs
    out = (args.out or Path(tempfile.mkdtemp(prefix="kills-"))).resolve()
    out.mkdir(parents=True, exist_ok=True)
    print(f"everything goes to {out}", flush=True)
    environ = cached(out / "compiled")
    if args.places:
        summary = planted_kills(args.places.split(","), out, environ)
        (out / "places.json").write_text(json.dumps(summary, indent=1) + "\n")
    else:
        summary = many_kills(args, out, environ)
        print(markdown(summary))
    return 1 if summary["faults"] else 0


if __name__ == "__main__":
    sys.exit(main())
