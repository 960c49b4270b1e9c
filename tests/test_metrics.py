"""Means, logs, console lines and phase times."""

import io
import json
import re
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gtalign_jax.training.metrics import (
    Console,
    JsonLines,
    Mean,
    MetricsWriter,
    PhaseTimer,
    RolloutLog,
    read_rows,
    step_line,
)


def test_merged_means_equal_the_mean_of_the_union_not_the_mean_of_means():
    a = Mean(jnp.float32(6.0), jnp.float32(3.0))  # 1, 2, 3
    b = Mean(jnp.float32(10.0), jnp.float32(1.0))
    assert a.merge(b).divide() == 4.0  # the mean of means would be (2 + 10) / 2 = 6
    stacked = jax.tree.map(lambda *x: jnp.stack(x).sum(0), a, b)
    assert stacked.divide() == 4.0


def test_an_empty_mean_is_zero_and_has_finite_gradients():
    def loss(x):
        return Mean((x * 0.0).sum(), jnp.zeros(())).divide()

    assert loss(jnp.ones(3)) == 0.0
    np.testing.assert_array_equal(jax.grad(loss)(jnp.ones(3)), np.zeros(3))


def test_phases_add_up_and_start_anew_when_taken():
    timer = PhaseTimer()
    for _ in range(2):
        with timer("sample"):
            time.sleep(0.02)
    taken = timer.take()
    assert 0.04 <= taken["time/sample"] <= taken["time/step"]
    assert list(timer.take()) == ["time/step"]


def test_a_phase_that_raises_is_counted_all_the_same():
    timer = PhaseTimer()
    with pytest.raises(KeyError), timer("reward"):
        raise KeyError
    assert "time/reward" in timer.take()


def test_metrics_are_written_as_rows_and_as_tensorboard_events(tmp_path):
    writer = MetricsWriter(tmp_path)
    writer.write("grpo", 1, {"reward/total": jnp.float32(0.1), "grpo/kl": np.float64(2)})
    writer.write("grpo", 2, {"reward/total": float("nan")})
    writer.close()
    first, second = read_rows(tmp_path / "metrics.jsonl")
    assert first == {"stage": "grpo", "step": 1, "reward/total": float(np.float32(0.1)),
                     "grpo/kl": 2.0}
    assert second == {"stage": "grpo", "step": 2, "reward/total": None}
    assert list((tmp_path / "tensorboard" / "grpo").glob("events.out.*"))


def test_resuming_drops_later_rows_of_that_stage_only(tmp_path):
    writer = MetricsWriter(tmp_path)
    for stage, step in (("sft", 1), ("sft", 9), ("grpo", 1), ("grpo", 2), ("grpo", 3)):
        writer.write(stage, step, {"x/y": step})
    writer.close()

    resumed = MetricsWriter(tmp_path)
    resumed.truncate("grpo", 1)
    resumed.write("grpo", 2, {"x/y": 20})
    resumed.close()
    rows = [(r["stage"], r["step"], r["x/y"]) for r in read_rows(tmp_path / "metrics.jsonl")]
    assert rows == [("sft", 1, 1), ("sft", 9, 9), ("grpo", 1, 1), ("grpo", 2, 20)]


def test_half_a_line_left_by_a_kill_is_dropped_and_the_next_row_is_whole(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"stage": "grpo", "step": 1}\n{"stage": "grpo", "st')
    assert len(read_rows(path)) == 1
    lines = JsonLines(path)
    lines.append([{"stage": "grpo", "step": 2}])
    lines.close()
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2]


def test_rollout_rows_hold_arrays_missing_values_and_any_text(tmp_path):
    log = RolloutLog(tmp_path)
    row = {
        "prompt": "¿qué?\u2028", "completion": "a\nb\ud83d", "q_user": np.float32(0.5),
        "payoff": np.arange(12.0).reshape(2, 3, 2), "judge_reply": None, "valid": np.bool_(True),
        "latency": float("inf"),
    }
    log.write(1, [row])
    log.write(2, [row, row])
    log.truncate(1)
    log.close()
    (read,) = read_rows(tmp_path / "rollouts.jsonl")
    assert read["step"] == 1
    assert read["prompt"] == "¿qué?\u2028" and read["completion"] == "a\nb\ud83d"
    assert read["payoff"] == [[[0, 1], [2, 3], [4, 5]], [[6, 7], [8, 9], [10, 11]]]
    assert read["judge_reply"] is None and read["valid"] is True and read["latency"] is None


def test_a_step_line_shows_what_there_is_in_a_fixed_order():
    line = step_line({
        "time/step": 3.25, "time/sample": 2.0, "time/update": 1.2, "time/log": 0.01,
        "reward/format": 0.975, "welfare/llm": 0.5, "welfare/user": 0.25, "reward/total": 0.4321,
        "perf/tokens_per_s": 12345.6, "grpo/kl": float("nan"), "other/metric": 1.0,
    })
    assert line == (
        "reward 0.432 | user 0.250 | llm 0.500 | format 98% | kl nan | tok/s 12,346 | "
        "3.2s (sample 2.0, update 1.2)"
    )


def test_without_a_terminal_each_step_is_one_plain_line_with_the_time_left():
    out = io.StringIO()
    console = Console(out)
    with console.stage("grpo", 150):
        console.step(1, {"reward/total": 0.5, "time/step": 1.0})
        console.step(2, {"reward/total": 0.6, "time/step": 1.0})
    lines = out.getvalue().splitlines()
    assert len(lines) == 2 and "\x1b" not in out.getvalue()
    assert re.fullmatch(r"grpo   1/150 \[\d:\d\d left\] \| reward 0\.500 \| 1\.0s", lines[0])


def test_the_time_left_ignores_one_slow_step(monkeypatch):
    clock = iter([0.0, 100.0, 102.0, 104.0, 106.0])  # the first step compiles
    monkeypatch.setattr("gtalign_jax.training.metrics.time.perf_counter", lambda: next(clock))
    console = Console(io.StringIO())
    with console.stage("grpo", 64):
        for step in range(1, 5):
            console.step(step, {})
    assert console.time_left() == "2:00"  # 60 steps of 2 s; the mean step would say 26:30


def test_a_resumed_stage_counts_only_its_own_steps(monkeypatch):
    clock = iter([0.0, 2.0])
    monkeypatch.setattr("gtalign_jax.training.metrics.time.perf_counter", lambda: next(clock))
    console = Console(io.StringIO())
    with console.stage("grpo", 20, done=10):
        console.step(11, {})
    assert console.time_left() == "0:18"


def test_text_with_brackets_is_printed_as_it_is():
    out = io.StringIO()
    Console(out).say("[bold]payoff[/bold] [1, 2]")
    assert out.getvalue() == "[bold]payoff[/bold] [1, 2]\n"
