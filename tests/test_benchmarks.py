"""What benchmarks make of what they measure."""

import argparse
import statistics

import numpy as np
import pytest

from benchmarks import compare, completions, ours, reward, scale


def report(part, seconds, mb, **more):
    return {"part": part, "seconds": seconds, "peak_mb": mb, **more}


def test_ours_is_held_against_the_better_peer_of_each_line():
    """Medians against medians; the spread is best against worst."""
    results = [("ours", report("rollout", s, 500)) for s in (1.0, 2.0, 4.0)]
    results += [("huggingface", report("rollout", s, 400)) for s in (6.0, 8.0)]
    results += [("trl", report("iteration", 30.0, 900, update_seconds=20.0, rollout_seconds=10.0))]
    rollout, update, *_ = compare.table("square/small", results)[2:]
    assert rollout == ("| rollout | 2 s (1–4) | 7 s (6–8) | 10 s | 3.50× (1.50–8.00) of "
                       "huggingface |")
    assert update == "| update | – | – | 20 s | – |"


def test_memory_is_better_where_it_is_less():
    results = [("ours", report("rollout", 1.0, 500)), ("tunix", report("rollout", 1.0, 1000)),
               ("huggingface", report("rollout", 1.0, 400))]
    memory = compare.table("square/small", results)[3]
    assert memory.endswith("| 500 MB | 400 MB | 1000 MB | 0.80× (0.80–0.80) of huggingface |")


def test_the_exponent_is_the_slope_of_the_logarithms():
    assert scale.exponent([4, 8, 16], [0.3, 1.2, 4.8]) == pytest.approx(2)
    assert scale.exponent([4, 8, 16], [7.0, 7.0, 7.0]) == pytest.approx(0)


def test_long_tailed_lengths_have_the_median_and_the_tail_that_they_are_said_to_have():
    args = ours.parse("", ["--lengths=longtail", "--prompts=400", "--samples=20",
                           "--new-tokens=2048"])
    lengths_QG = ours.lengths(args)
    assert np.median(lengths_QG) == pytest.approx(200, rel=0.05)
    assert np.percentile(lengths_QG, 99) == pytest.approx(1500, rel=0.1)
    assert lengths_QG.min() >= 1 and lengths_QG.max() <= 2048


def test_plain_python_and_ours_give_the_same_rewards_and_games():
    rows = [row for row in completions.rows(1600, seed=3) if row.given]  # without mathematics
    found, wanted = reward.ours(rows), reward.plain(rows)
    assert reward.furthest(found, wanted) < 1e-9
    assert 0.9 * len(rows) < (found.reward_B > 0).sum() < len(rows)
    wanted[7] = (wanted[7][0] + 1e-6, wanted[7][1])
    assert reward.furthest(found, wanted) > 1e-7


def test_the_completions_have_real_lengths_and_some_are_spoilt():
    rows = completions.rows(800, seed=0)
    words = [len(row.text.split()) for row in rows]
    assert 250 < statistics.median(words) < 450 and max(words) <= 650
    assert sum(200 <= count for count in words) > 0.9 * len(rows)
    assert {row.prompt.data_source for row in rows} == set(completions.SOURCES)
    assert [row.text for row in rows] == [row.text for row in completions.rows(800, seed=0)]
    prompts = {row.prompt.id for row in rows}
    assert len(prompts) == len(rows) / completions.GROUP


@pytest.mark.slow
def test_the_wait_for_a_judge_is_measured_against_a_server_that_counts():
    args = argparse.Namespace(completions=40, concurrency=10, latency=0.2, seed=0)
    found = reward.judged(args)
    assert found["floor_seconds"] == pytest.approx(0.8) and found["seconds"] >= 0.8
    assert 1 < found["most_at_once"] <= 10
