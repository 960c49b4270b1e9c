"""Does a long run stay as it is? Compilations, memory, threads and open files over its steps.

    python -m benchmarks.long_run [--steps=1000 --out=DIRECTORY --plant=BYTES]

A tiny model and the built-in tasks, with saves and evaluations every 50 steps: judged by rules in
the process, over HTTP by a server on loopback, and by rules again but killed halfway and resumed,
with the compiled programs of the first. Every step notes what the process holds. A table in
Markdown and long_run.json in `out`, one line for each process, of its steps after the first 100:

    compiled        programs when they began and at the end; must be the same
    from cache      of these
    threads, files  the least in their first and in their last quarter (a save under way has some
                    of its own); must not grow
    objects         live Python objects, the same way; must not grow by more than 1 %
    in use, growth  MB that were asked for and not given back, when they began; KB in each step
    RSS, growth     MB of pages when they began; MB in 1,000 steps: the slope of a least-squares
                    line through medians of 20 steps, with its standard error

RSS is no measure of a leak: most of it is what compiling left free, and the allocator touches ever
more of that without anybody holding more. So the bytes in use decide, as glibc counts them; Python
allocates from there, too, so that none are hidden (PYTHONMALLOC=malloc). They are taken every 50
steps, after a collection of garbage: each interval has one save and one evaluation. Its growth is
the median over intervals, which a cache that fills or is emptied once does not move; the error is
the standard error of that median. It must not be more than three of them above LEAK. What a leak
looks like here is shown by --plant: each step keeps so many bytes. A leak in fewer than half of the
intervals escapes the median, but not the second bound: 10 % of the bytes in use.

Exit status 1 where something grows. Linux with glibc >= 2.33.
"""

import argparse
import contextlib
import ctypes
import functools
import gc
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))  # the tiny run is the one that the tests use

import runs  # noqa: E402
from judging import serving  # noqa: E402

from benchmarks.faulty_judge import grade  # noqa: E402

WARM_UP, BLOCK = 100, 20
EVERY = 50  # steps between saves, between evaluations, and between looks at the bytes in use
# KB in a step. TensorStore 0.1.86 loses some 20 KB of statistics and 0.4 KB for each array at each
# save of orbax (what it hands over as JSON): here about 1 KB in a step.
LEAK = 5.0
JUDGED = 10.0  # the same with a store of judgements: 225 bytes for each of the step's 16
COUNTED = ("threads", "files", "objects")


def held() -> dict[str, int]:
    """What this process holds: bytes in memory, threads, open files."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return {"rss": pages * os.sysconf("SC_PAGE_SIZE"), "threads": threading.active_count(),
            "files": len(os.listdir("/proc/self/fd"))}


class _MallInfo(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in (
        "arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks",
        "fordblks", "keepcost",
    )]


def in_use() -> int:
    """Bytes that this process has asked the C library for and not given back."""
    ask = ctypes.CDLL(None).mallinfo2
    ask.restype = _MallInfo
    found = ask()
    return found.uordblks + found.hblkhd  # of all arenas; large ones have pages of their own


def note_steps(samples: Path, plant: int) -> None:
    """From now on every step of GRPO in this process leaves a line in `samples`, and `plant` bytes
    that are never given back."""
    import jax

    from gtalign_jax.training.metrics import MetricsWriter

    hits, planted, write = [], [], MetricsWriter.write
    jax.monitoring.register_event_listener(
        lambda event, **_: hits.extend(["one"] * (event == "/jax/compilation_cache/cache_hits"))
    )

    @functools.wraps(write)
    def noting(writer, stage, step, metrics):
        write(writer, stage, step, metrics)
        if stage != "grpo":
            return
        row = held() | {"step": step, "compiled": metrics["perf/compilations"], "hits": len(hits)}
        planted.append(os.urandom(plant))
        if step % EVERY == 0:
            gc.collect()
            row |= {"objects": len(gc.get_objects()), "used": in_use()}
        with samples.open("a") as file:
            file.write(json.dumps(row) + "\n")

    MetricsWriter.write = noting


def command() -> None:
    """The real command; completions read as chains, since so small a model writes none."""
    from absl import app

    from gtalign_jax import main as real
    from gtalign_jax.config import parse_flags
    from gtalign_jax.training import collect

    collect.decode = runs.fluent
    note_steps(Path(os.environ["SAMPLES"]), int(os.environ["PLANT"]))
    app.run(real.main, flags_parser=parse_flags)


def train(out: Path, name: str, steps: int, until: int | None = None, **more) -> Path:
    """One process of the run `out`/NAME, killed after the step `until`; returns its samples."""
    settings = runs.settings(
        out / name, stages="('sft','grpo','evaluate')", grpo__steps=steps,
        checkpoint__every=EVERY, evaluate__every_steps=EVERY, **more,
    )
    words = [f"--config.{key}={value}" for key, value in settings.items()]
    samples = out / f"{name}{'' if until else '-to-the-end'}.jsonl"
    samples.unlink(missing_ok=True)
    environ = {"SAMPLES": str(samples), "JAX_COMPILATION_CACHE_DIR": str(out / "compiled"),
               "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", "JAX_PLATFORMS": "cpu",
               "PYTHONMALLOC": "malloc"}
    process = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.long_run", "--config=configs/demo_cpu.py", *words],
        cwd=ROOT, env=os.environ | environ, stdout=sys.stderr,
    )
    while until and process.poll() is None:
        if samples.exists() and len(samples.read_bytes().splitlines()) >= until:
            process.kill()
        time.sleep(0.05)
    if process.wait() not in (0, -signal.SIGKILL if until else 0):
        raise SystemExit(f"{name} ended with status {process.returncode}")
    return samples


def slope(steps: np.ndarray, values: np.ndarray) -> tuple[float, float]:
    """(slope, its standard error) of a least-squares line."""
    x, y = steps - steps.mean(), values - values.mean()
    per_step = (x @ y) / (x @ x)
    rest = y - per_step * x
    return float(per_step), float(np.sqrt((rest @ rest) / max(len(x) - 2, 1) / (x @ x)))


def steady(rows: list[dict]) -> tuple[float, float]:
    """(KB that a step adds to the bytes in use, the standard error): a median over intervals."""
    used = np.array([row["used"] for row in rows if "used" in row])
    each = np.diff(used) / EVERY / 1e3
    middle = np.median(each)
    # 1.4826 MAD estimates a standard deviation; a median has 1.2533 times the error of a mean.
    return float(middle), float(1.2533 * 1.4826 * np.median(abs(each - middle)) / len(each) ** 0.5)


def growth(rows: list[dict]) -> dict:
    """What became of a process over the steps `rows`."""
    blocks = [rows[i : i + BLOCK] for i in range(0, len(rows) - BLOCK + 1, BLOCK)]
    at = np.array([statistics.mean(row["step"] for row in block) for block in blocks])
    rss = np.array([statistics.median(row["rss"] for row in block) for block in blocks]) / 1e6
    per_step, error = slope(at, rss)
    used = [row["used"] for row in rows if "used" in row]
    kept, unsure = steady(rows)
    quarter = max(len(rows) // 4, EVERY)
    out = {"steps": len(rows), "compiled": [rows[0]["compiled"], rows[-1]["compiled"]],
           "from_cache": rows[-1]["hits"],
           "used_mb": [round(used[0] / 1e6, 2), round(used[-1] / 1e6, 2)],
           "kb_per_step": round(kept, 3), "kb_error": round(unsure, 3),
           "rss_mb": round(float(rss[0]), 1),
           "mb_per_1000": round(1000 * per_step, 2), "error": round(1000 * error, 2)}
    for name in COUNTED:
        out[name] = [min(row[name] for row in part if name in row)
                     for part in (rows[:quarter], rows[-quarter:])]
    return out


def grown(found: dict, judged: bool = False) -> list[str]:
    """The names of what has grown. `judged`: a store of judgements may, by a little."""
    out = [name for name in ("compiled", "threads", "files") if found[name][1] > found[name][0]]
    if not judged and found["objects"][1] > 1.01 * found["objects"][0]:
        out.append("objects")
    steadily = found["kb_per_step"] - 3 * found["kb_error"] > (JUDGED if judged else LEAK)
    if steadily or found["used_mb"][1] > 1.1 * found["used_mb"][0]:
        out.append("memory")
    return out


def table(results: dict[str, dict]) -> str:
    lines = ["| process | steps | compiled | from cache | threads | files | objects | in use, MB | "
             "growth in a step, KB | RSS, MB | growth in 1,000 steps, MB |",
             "|---|---|---|---|---|---|---|---|---|---|---|"]
    for name, found in results.items():
        pairs = {key: "{:,.0f} → {:,.0f}".format(*found[key])
                 for key in ("compiled", *COUNTED, "used_mb")}
        lines.append(
            f"| {name} | {found['steps']:,} | {pairs['compiled']} | {found['from_cache']} | "
            f"{pairs['threads']} | {pairs['files']} | {pairs['objects']} | {pairs['used_mb']} | "
            f"{found['kb_per_step']:+.2f} ± {found['kb_error']:.2f} | {found['rss_mb']:,.0f} | "
            f"{found['mb_per_1000']:+.1f} ± {found['error']:.1f} |"
        )
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--plant", type=int, default=0)
    args = parser.parse_args(argv)
    if args.steps < 6 * WARM_UP:
        parser.error(f"--steps={args.steps}: must be >= {6 * WARM_UP}, to outlast warming up")
    os.environ["PLANT"] = str(args.plant)
    out = (args.out or Path(tempfile.mkdtemp(prefix="long-run-"))).resolve()
    out.mkdir(parents=True, exist_ok=True)
    http = {"judge__kind": "http", "judge__rules": False, "judge__model": "judge-1",
            "judge__preflight": False}
    jobs = {
        "rules": lambda: train(out, "rules", args.steps),
        "HTTP judge": lambda: train(out, "http", args.steps, judge__base_url=server.url, **http),
        "rules, to the kill": lambda: train(out, "killed", args.steps, args.steps // 2),
        "rules, resumed": lambda: train(out, "killed", args.steps),
    }
    results, bad = {}, {}
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(serving(grade=grade))
        for name, job in jobs.items():
            rows = [json.loads(line) for line in job().read_text().splitlines()][WARM_UP:]
            results[name] = growth(rows)
            bad[name] = grown(results[name], judged="HTTP" in name)
            (out / "long_run.json").write_text(json.dumps(results, indent=1) + "\n")
            print(f"{name}: {json.dumps(results[name])} {bad[name] or ''}", flush=True)
    print(table(results))
    for name in (name for name in bad if bad[name]):
        print(f"{name}: {', '.join(bad[name])} grew", file=sys.stderr)
    return 1 if any(bad.values()) else 0


if __name__ == "__main__":
    if "SAMPLES" in os.environ:
        command()
    sys.exit(main())
