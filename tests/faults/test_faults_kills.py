"""A run under kill -9 ends as one that nobody touched; the long set is `tests.faults.kills`."""

from pathlib import Path

import compiler
import kills
import planted
import pytest
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
