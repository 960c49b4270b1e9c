"""What benchmarks make of what they measure."""

import numpy as np
import pytest

from benchmarks import compare, ours, scale


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
