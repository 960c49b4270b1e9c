"""Tables: the same numbers in every form, nothing that is not a number in JSON."""

import csv
import io
import json

import pytest
from test_measures import FAILED, UNREADABLE, many, row

from gtalign_jax.evaluation import tables
from gtalign_jax.evaluation.measures import BY_NAME, estimates


@pytest.fixture
def groups():
    return {
        "before": [row(str(i), **UNREADABLE, label="before") for i in range(4)],
        "after | GRPO": many(1) + [row("x", **FAILED)],
    }


def test_files_hold_the_estimates_and_a_missing_number_is_null_or_empty(groups, tmp_path):
    found = tables.save(tmp_path, groups)
    assert repr(found["after | GRPO"]) == repr(estimates(groups["after | GRPO"]))
    written = json.loads((tmp_path / "measures.json").read_text(), parse_constant=pytest.fail)
    one = written["measures"]["after | GRPO"]["medium"]["user_welfare"]
    e = found["after | GRPO"]["medium"]["user_welfare"]
    assert one == {"value": e.value, "low": e.low, "high": e.high, "count": 60, "prompts": 20}
    assert written["measures"]["before"]["overall"]["dilemma"]["value"] is None
    assert written["actions"]["before"]["definite"]["unreadable"] == 4
    lines = list(csv.DictReader(io.StringIO((tmp_path / "measures.csv").read_text())))
    same = [x for x in lines if (x["label"], x["source"], x["measure"])
            == ("after | GRPO", "medium", "user_welfare")]
    assert len(same) == 1 and float(same[0]["low"]) == e.low and same[0]["count"] == "60"
    assert [x["value"] for x in lines if x["measure"] == "dilemma"][0] == ""
    assert not list(tmp_path.glob("*.partial"))


def test_markdown_has_a_table_for_all_one_by_source_and_one_of_actions(groups, tmp_path):
    tables.save(tmp_path, groups)
    text = (tmp_path / "measures.md").read_text()
    lines = text.splitlines()
    heads = [line for line, rule in zip(lines, lines[1:], strict=False) if rule.startswith("| ---")]
    assert [head.split(" | ")[0] for head in heads] == ["| measure", "| source", "| request"]
    assert "after \\| GRPO" in heads[0]  # a label cannot break the table
    for line in lines:
        if line.startswith("|"):
            assert line.replace("\\|", "").count("|") in {h.replace("\\|", "").count("|")
                                                         for h in heads}
    assert "| definite | before | 0.0% | 0.0% | 0.0% | 0.0% | 0.0% | 0.0% | 100.0% | 4 |" in lines


def test_one_source_needs_no_table_by_source():
    groups = {"one": estimates([row("a"), row("b")])}
    assert "| source" not in tables.markdown(groups, {})
    assert "math-hard" not in tables.console(groups)


def test_the_console_shows_value_and_interval_side_by_side(groups):
    found = {label: estimates(rows) for label, rows in groups.items()}
    text = tables.console(found)
    e, m = found["after | GRPO"]["overall"]["user_welfare"], BY_NAME["user_welfare"]
    line = next(line for line in text.splitlines() if line.startswith("user welfare"))
    after = f"{e.value:.3f} [{e.low:.3f}, {e.high:.3f}]"
    assert after == tables.shown(e, m)
    assert " ".join(line.split()).endswith(f"0.000 [0.000, 0.000] {after}")
    assert "goes along" not in text  # nobody asked for harm: no empty line
    assert "social welfare, medium" in text


def test_a_source_that_only_one_side_has_is_shown_as_absent():
    found = {"a": estimates([row("1"), row("2", data_source="medium")]),
             "b": estimates([row("1"), row("2")])}
    line = next(x for x in tables.console(found).splitlines() if "welfare, medium" in x)
    assert line.endswith("–")
    assert [cells[:2] for cells in tables.source_cells(found)[1:]] == [
        ["math-hard", "a"], ["math-hard", "b"], ["medium", "a"]
    ]


def test_half_a_surrogate_pair_in_a_label_can_be_written(tmp_path):
    tables.save(tmp_path, {"\ud83d": [row()]})
    assert (tmp_path / "measures.md").exists()
