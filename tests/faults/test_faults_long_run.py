"""What a long run holds: a leak is told from an allocator that warms up, and arrays do not pile up.

Whole runs of 1,000 steps are `benchmarks/long_run.py`; here is its judgement.
"""

import ctypes
import gc
import json
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import long_run
from gtalign_jax.training.checkpoint import CheckpointConfig, Checkpointer
from gtalign_jax.training.metrics import JsonLines


def samples(steps: int = 1000, leak: float = 0.0, jump: float = 0.0, rss: float = 0.0) -> list:
    """What `note_steps` leaves of the steps after the first 100.

    `leak`: bytes a step; `jump`: bytes given back at step 500; `rss`: bytes a step of pages alone.
    """
    noise = np.random.default_rng(0).normal(scale=40e3, size=steps + 1)
    rows = []
    for step in range(101, steps + 1):
        held = 470e6 + leak * step - jump * (step > 500)
        row = {"step": step, "rss": held + 400e6 + rss * step + 200 * noise[step], "threads": 9,
               "files": 20, "compiled": 52, "hits": 0}
        if step % long_run.EVERY == 0:
            row |= {"objects": 552_000, "used": held + noise[step]}
        rows.append(row)
    return rows


@pytest.mark.parametrize("steps", [1000, 500])
@pytest.mark.parametrize("jump", [0.0, 6e6])
def test_twenty_kilobytes_a_step_are_found_also_where_a_cache_is_emptied_halfway(steps, jump):
    found = long_run.growth(samples(steps, leak=20e3, jump=jump))
    assert found["kb_per_step"] == pytest.approx(20, abs=2)
    assert long_run.grown(found) == ["memory"]
    assert long_run.grown(found, judged=True) == ["memory"]


@pytest.mark.parametrize("jump", [-6e6, 0.0, 6e6])
def test_pages_that_the_allocator_touches_and_one_cache_that_fills_are_no_leak(jump):
    found = long_run.growth(samples(rss=30e3, jump=jump))
    assert found["mb_per_1000"] > 3 * found["error"] > 0
    assert long_run.grown(found) == []


def test_what_is_kept_now_and_then_is_found_by_its_amount():
    assert long_run.grown(long_run.growth(samples(jump=-60e6))) == ["memory"]


def test_bytes_in_use_are_counted_as_they_are_taken_and_given_back():
    gc.collect()
    before = long_run.in_use()
    taken = [ctypes.create_string_buffer(10_000_000)]
    assert long_run.in_use() - before == pytest.approx(10e6, abs=1e6)
    taken.clear()
    assert long_run.in_use() == pytest.approx(before, abs=1e6)


@pytest.mark.slow
def test_saving_again_and_again_keeps_no_arrays(tmp_path):
    """Their copies on the host would be a checkpoint's bytes for each save."""
    checkpointer, held = Checkpointer(tmp_path, CheckpointConfig(), {"run": 1}), []
    for step in range(1, 9):
        checkpointer.save(step, {"weights": jnp.full(1_000_000, step)})
        checkpointer.wait()
        if step in (4, 8):
            gc.collect()
            held.append((long_run.in_use(), len(jax.live_arrays())))
    checkpointer.close()
    (used, arrays), (used_later, arrays_later) = held
    assert arrays_later <= arrays and used_later - used < 4e6  # the array of one save


def test_a_log_is_cut_back_without_being_read_into_memory(tmp_path):
    path = tmp_path / "rollouts.jsonl"
    rows = [{"stage": "grpo", "step": i // 8 + 1, "completion": "word " * 200} for i in range(4000)]
    whole = "".join(json.dumps(row) + "\n" for row in rows)
    path.write_text(whole + '{"half a li')
    tracemalloc.start()
    try:
        log = JsonLines(path)
        assert log.truncate("grpo", 250) == 2000
        log.close()
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert path.read_text() == "".join(whole.splitlines(keepends=True)[:2000])
    assert peak < len(whole) / 10, (peak, len(whole))
