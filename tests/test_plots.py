"""The curves and the final table."""

import json

import numpy as np
import pytest
from matplotlib.image import imread

from gtalign_jax.training import plots
from gtalign_jax.training.metrics import MetricsWriter
from gtalign_jax.training.plots import final_table, read_results, save_results, welfare_curves

RESULTS = {
    "after GRPO": {"reward/total": 0.6, "reward/format": 1.0, "source/medium": 2.0, "game/x": 1.0},
    "after cold start": {"reward/total": 0.4, "reward/format": 0.95},
    "before cold start": {"reward/total": 0.0, "reward/format": float("nan")},
}


def write_run(workdir, steps: int, *names: str) -> None:
    writer = MetricsWriter(workdir)
    for step in range(1, steps + 1):
        writer.write("grpo", step, {name: 0.3 + 0.001 * step for name in names})
    writer.write("sft", 1, {"sft/loss": 9.0})
    writer.close()


def test_the_curves_are_a_readable_picture_with_one_panel_per_kind_of_metric(tmp_path):
    write_run(tmp_path, 60, "reward/total", "welfare/user", "reward/format", "rollout/length")
    save_results(tmp_path, RESULTS)
    path = welfare_curves(tmp_path)
    picture = imread(path)
    assert path == tmp_path / "welfare.png"
    assert picture.shape[1] > 2.5 * picture.shape[0]  # three panels side by side
    assert len(np.unique(picture.reshape(-1, picture.shape[2]), axis=0)) > 20


def test_a_metric_that_was_never_measured_leaves_no_empty_panel(tmp_path):
    write_run(tmp_path, 1, "reward/total")
    picture = imread(welfare_curves(tmp_path))
    assert picture.shape[1] < 1.6 * picture.shape[0]


def test_curves_without_any_step_say_what_is_missing(tmp_path):
    write_run(tmp_path, 0, "reward/total")
    with pytest.raises(ValueError, match="holds no row of stage 'grpo'"):
        welfare_curves(tmp_path)


def test_smoothing_is_a_centred_mean_that_does_not_move_a_constant():
    np.testing.assert_allclose(plots._smooth(np.full(50, 0.7)), 0.7)
    values = np.arange(48.0)
    smooth = plots._smooth(values)  # half a window is 48 // 24 = 2
    np.testing.assert_allclose(smooth[2:-2], values[2:-2])  # a trailing mean would lag behind
    assert smooth[0] == 1.0 and smooth[-1] == 46.0


def test_the_table_has_stages_in_order_and_the_change_since_the_cold_start():
    lines = final_table(RESULTS).splitlines()
    assert lines[0].endswith(" change")
    assert [lines[0].index(stage) for stage in plots.STAGES] == sorted(
        lines[0].index(stage) for stage in plots.STAGES
    )
    welfare = next(line for line in lines if line.startswith("social welfare"))
    assert welfare.split()[-5:] == ["0.000", "0.400", "0.600", "+0.200", "(+50%)"]
    form = next(line for line in lines if line.startswith("well-formed"))
    assert form.split()[-5:] == ["–", "95.0%", "100.0%", "+5.0", "pt"]
    assert lines[-1].split() == ["source/medium", "–", "–", "2.000", "–"]


def test_a_table_without_a_cold_start_has_no_change_column():
    assert "change" not in final_table({"after GRPO": {"reward/total": 0.6}})


def test_results_are_saved_as_json_and_as_markdown(tmp_path):
    text = save_results(tmp_path, RESULTS)
    assert text == final_table(RESULTS)
    saved = read_results(tmp_path)
    assert saved["after GRPO"] == RESULTS["after GRPO"]
    assert saved["before cold start"]["reward/format"] is None
    json.loads((tmp_path / "results.json").read_text(), parse_constant=pytest.fail)
    markdown = (tmp_path / "results.md").read_text().splitlines()
    assert len({line.count("|") for line in markdown}) == 1
    assert any(line.startswith("| game/x | – | – | 1.000") for line in markdown)
    assert read_results(tmp_path / "elsewhere") == {}


def test_results_that_were_read_back_can_be_saved_again(tmp_path):
    """A resumed run does that, also with a number that was not finite and is null in the file."""
    text = save_results(tmp_path, RESULTS)
    before = (tmp_path / "results.json").read_text()
    assert save_results(tmp_path, read_results(tmp_path)) == text
    assert (tmp_path / "results.json").read_text() == before


def test_a_kill_while_results_are_written_leaves_the_ones_before(tmp_path, monkeypatch):
    save_results(tmp_path, {"after cold start": {"reward/total": 0.4}})

    def killed(partial, path):
        raise KeyboardInterrupt

    monkeypatch.setattr("os.replace", killed)
    with pytest.raises(KeyboardInterrupt):
        save_results(tmp_path, RESULTS)
    assert read_results(tmp_path) == {"after cold start": {"reward/total": 0.4}}
