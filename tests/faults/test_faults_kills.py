"""A run under kill -9 ends as one that nobody touched; the long set is `tests.faults.kills`."""

from pathlib import Path

import compiler
import kills
import numpy as np
import planted
import pytest
import runs
from sameness import differences, saved

SCRIPT = [str(Path(planted.__file__).resolve())]


@pytest.fixture(scope="module")
def environ(tmp_path_factory) -> dict:
    return kills.cached(tmp_path_factory.mktemp("compiled")) | {"XLA_FLAGS": compiler.flags()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory, environ) -> Path:
    run = kills.Run(tmp_path_factory.mktemp("whole") / "run", command(), environ)
    kills.uninterrupted(run)
    return run.workdir


def command() -> list[str]:
    return kills.command(planted.TINY, SCRIPT)


@pytest.mark.slow
def test_a_run_killed_eight_times_three_times_at_a_save_ends_as_an_untouched_one(
    whole, environ, tmp_path
):
    run, at_a_save = kills.Run(tmp_path / "run", command(), environ), kills.Plan(save=1)
    struck = []
    for place in ("cold start", "between the stages", "judging", "evaluation", "last step"):
        struck.append(run.attempt(kills.Plan(), {"KILL_AT": place}))
        if place in ("cold start", "between the stages", "judging"):
            struck.append(run.attempt(at_a_save))
    assert None not in struck, f"came to its end after {len(struck)} kills"
    assert sum(kill.inside_save for kill in struck) >= 2, struck  # a busy machine may be late once
    kills.uninterrupted(run)
    assert run.resumes >= 5
    assert differences(run.workdir, whole) == []
    assert saved(run.workdir, "grpo", 6)["state.updates"] == 6


@pytest.mark.slow
@pytest.mark.long
def test_a_run_killed_on_one_device_goes_on_over_four_by_rows_and_by_weights(
    whole, environ, tmp_path
):
    """Up to rounding: partial sums over devices are added in another order."""
    on_one = kills.Run(tmp_path / "run", command(), environ)
    assert on_one.attempt(kills.Plan(), {"KILL_AT": "save"})  # of step 4: that of step 2 is done
    mesh = ["--config.mesh.fsdp=2", "--config.mesh.tensor=2"]
    over_four = kills.Run(tmp_path / "run", [*command(), *mesh],
                          environ | {"XLA_FLAGS": compiler.flags(4)})
    kills.uninterrupted(over_four)
    assert over_four.resumes == 2  # of both stages
    for stage in ("sft", "grpo"):
        rows, wanted = (runs.repeatable(runs.metrics(at, stage))
                        for at in (over_four.workdir, whole))
        for row, other in zip(rows, wanted, strict=True):
            assert row.pop("stage") == other.pop("stage")
            assert row == pytest.approx(other, rel=1e-5, abs=1e-5)
    arrays = saved(over_four.workdir, "grpo", 6)
    for name, other in saved(whole, "grpo", 6).items():
        furthest = np.abs(arrays[name] - other.astype(np.float64)).max()
        assert furthest <= 1e-5 * np.abs(other).max(), name
