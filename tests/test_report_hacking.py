"""gtalign_jax.report.figures_hacking: what is drawn equals the metrics."""

import xml.etree.ElementTree as ET

import numpy as np
import pytest
import test_report_figures
from report_directories import metrics, write_rows
from test_report_figures import lines_of

from gtalign_jax.report import ink
from gtalign_jax.report.figures import hacking_signs
from gtalign_jax.report.load import load
from gtalign_jax.report.page import compose

drawn = test_report_figures.drawn


def rows(steps, stage="grpo"):
    return [{
        "stage": stage, "step": step, "hacking/repeated_ngrams": 0.01 * step,
        "hacking/copied_prompt": None if step == 2 else 0.5, "hacking/same_matrix": 0.25,
        "hacking/q_by_length_0": 0.2 * step / 10, "hacking/q_by_length_9": 1.0,
    } for step in steps]


def test_shares_stand_at_their_steps_and_a_step_without_one_is_left_out(drawn):
    hacking_signs(rows([1, 2, 3]) + rows([1, 2], stage="evaluate"))
    repeated, copied, same = (
        lines_of(drawn["hacking_shares"], ink.style(i).color)[0].tolist() for i in range(3)
    )
    np.testing.assert_allclose(repeated, [[1, 0.01], [2, 0.02], [3, 0.03]])
    assert copied == [[1, 0.5], [3, 0.5]] and same == [[1, 0.25], [2, 0.25], [3, 0.25]]


def test_many_steps_are_pooled_and_the_caption_says_so(drawn):
    picture = hacking_signs(rows(range(1, 101)))[0]
    line, = lines_of(drawn["hacking_shares"], ink.style(0).color)
    assert len(line) == 50
    np.testing.assert_allclose(line[1], [3.5, 0.035])
    assert "Each point pools 2 neighbouring steps." in picture.caption


def test_q_by_length_is_that_of_the_first_and_of_the_last_third(drawn):
    picture = hacking_signs(rows(range(1, 10)))[1]
    early, late = (lines_of(drawn["q_by_length"], ink.style(i).color)[0] for i in range(2))
    np.testing.assert_allclose(early, [[1, 0.04], [10, 1]])  # mean of steps 1 to 3
    np.testing.assert_allclose(late, [[1, 0.16], [10, 1]])
    assert "steps 1–3" in picture.alt and "steps 7–9 from 16% at 1 to 100% at 10" in picture.alt


def test_one_step_is_a_picture_of_that_step(drawn):
    picture = hacking_signs(rows([7]))[1]
    assert len(lines_of(drawn["q_by_length"], ink.style(0).color)) == 1
    assert "step 7 from" in picture.alt
    assert not lines_of(drawn["q_by_length"], ink.style(1).color)


@pytest.mark.parametrize("given", [
    [], [{"stage": "grpo", "step": 1, "reward/total": 0.5}],
    [{"stage": "grpo", "step": 1, "hacking/same_matrix": None, "hacking/q_by_length_3": None}],
])
def test_metrics_without_the_panel_are_drawn_as_nothing(given):
    assert hacking_signs(given) == []


def test_the_report_shows_them_where_the_metrics_hold_them(tmp_path):
    plain = metrics(0, 3)
    write_rows(tmp_path / "metrics.jsonl", plain)
    names = [picture.name for picture in compose(load(tmp_path)).pictures]
    assert "hacking_shares" not in names and "q_by_length" not in names
    both = [{**more, **row} for more, row in zip(rows([1, 2, 3]), plain, strict=True)]
    write_rows(tmp_path / "metrics.jsonl", both)
    report = compose(load(tmp_path))
    shown = {picture.name: picture for picture in report.pictures}
    for name in ("hacking_shares", "q_by_length"):
        assert ET.fromstring(shown[name].svg).tag.endswith("svg")
        assert shown[name].svg in report.html
