"""Reports: the same numbers everywhere, text that cannot act, and directories of every kind."""

import csv
import html.parser
import json
import re
import tomllib
from pathlib import Path

import pytest
from report_directories import (
    CONFIG,
    HOSTILE,
    PROMPTS,
    evaluation,
    finished_run,
    metrics,
    rollouts,
    unjudged,
    write_rows,
)

from gtalign_jax import report
from gtalign_jax.report import __main__ as command
from gtalign_jax.report import numbers, page

ROOT = Path(__file__).resolve().parent.parent


class Page(html.parser.HTMLParser):
    """What a browser would make of a page: elements with attributes, and text by section."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict]] = []
        self.text: dict[str, str] = {"": ""}
        self._section = ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        self.text[self._section] += " "
        if tag == "section":
            self._section = dict(attributes)["id"]
            self.text[self._section] = ""

    def handle_endtag(self, tag):
        if tag == "section":
            self._section = ""

    def handle_data(self, data):
        self.text[self._section] += data

    def cells(self, section: str) -> str:
        return re.sub(r"\s+", " ", self.text[section])


def read(directory: Path) -> tuple[Page, dict]:
    path = report.write(directory)
    assert path == directory / "report.html"
    text = path.read_text(encoding="utf-8")
    return Page(text), json.loads((directory / "report.json").read_text())


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """(page, numbers, directory) of a finished run whose first completion after GRPO is hostile."""
    directory = tmp_path_factory.mktemp("run") / "<my run>"
    after_0 = {"completion": HOSTILE, "question": HOSTILE, "ground_truth": HOSTILE,
               "judge_reply": HOSTILE, "chain_error": HOSTILE, "payoff": None,
               "pareto_set": None, "recommended": None}
    finished_run(directory, after_0=after_0)
    return *read(directory), directory


def csv_rows(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_page_json_and_csv_have_the_means_of_the_rows(whole):
    page, found, directory = whole
    # Social welfare is √(U·L): before .25 .36 .64 .25, after .81 .64 .16 .49.
    assert found["labels"] == {
        "shown": ["before cold start", "after cold start", "after GRPO"],
        "before": "after cold start", "after": "after GRPO",
    }
    means = {"after cold start": 0.375, "after GRPO": 0.525}
    table = csv_rows(directory / "tables" / "measures.csv")
    for label, mean in means.items():
        estimate = found["measures"][label]["overall"]["social_welfare"]
        assert estimate["value"] == pytest.approx(mean) and estimate["count"] == 4
        assert estimate["low"] <= mean <= estimate["high"]
        row, = (row for row in table if (row["label"], row["source"], row["measure"])
                == (label, "overall", "social_welfare"))
        assert [float(row[key]) for key in ("value", "low", "high")] == [
            estimate[key] for key in ("value", "low", "high")
        ]
        assert f"{mean:.3f} [{estimate['low']:.3f}, {estimate['high']:.3f}]" in page.cells(
            "measures")
    assert found["measures"]["after GRPO"]["builtin-safety"]["social_welfare"][
        "value"] == pytest.approx((0.16 + 0.49) / 2)


def test_differences_are_paired_and_said_with_their_doubt(whole):
    page, found, directory = whole
    pair = found["paired"]
    assert pair["pairs"] == pair["prompts"] == 4
    d = pair["differences"]["overall"]["social_welfare"]
    assert (d["first"], d["second"]) == (pytest.approx(0.375), pytest.approx(0.525))
    assert d["difference"] == pytest.approx(0.15)
    # Differences .56 .28 -.48 .24: 10 of the 16 sums of ± them are as far from 0 as 0.60.
    sums = [abs(a * .56 + b * .28 - c * .48 + e * .24)
            for a in (-1, 1) for b in (-1, 1) for c in (-1, 1) for e in (-1, 1)]
    assert d["p"] == pytest.approx(sum(s >= 0.6 - 1e-9 for s in sums) / 16)
    assert d["p_adjusted"] == 1.0
    assert set(pair["differences"]["builtin-safety"]) == set(numbers.MAIN)
    row, = (row for row in csv_rows(directory / "tables" / "paired.csv")
            if (row["source"], row["measure"]) == ("overall", "social_welfare"))
    assert float(row["difference"]) == d["difference"] and float(row["p"]) == d["p"]
    summary = page.cells("summary")
    assert "That cannot be said: social welfare √(U·L) rose from 0.375 to 0.525, by +0.150" in (
        summary)
    assert "Social welfare rose in 1 of 2 sources: most in builtin-ambiguity (+0.420), least in " \
           "builtin-safety (−0.120)" in summary
    for entry in found["summary"]:
        assert entry["about"] in summary and entry["text"] in summary


def test_actions_are_counted_by_what_was_asked(whole):
    page, found, directory = whole
    before, after = (found["actions"][label] for label in ("after cold start", "after GRPO"))
    assert before["ambiguous"]["answer"] == 1 and after["ambiguous"]["ask"] == 1
    assert before["harmful"]["constructive"] == 1 and after["harmful"]["answer"] == 1
    assert sum(sum(counts.values()) for counts in after.values()) == 4
    rows = csv_rows(directory / "tables" / "actions.csv")
    assert {"label": "after GRPO", "request": "ambiguous", "response": "ask",
            "completions": "1"} in rows
    assert "100.0% 1 of 1 · called for" in page.cells("actions")


def test_costs_are_sums_of_what_the_files_say(whole):
    page, found, _ = whole
    cost = found["cost"]
    assert cost["seconds"]["grpo"] == {"rollout": 1200.0, "update": 300.0, "step": 1680.0}
    assert cost["seconds_total"] == 2 * 60 + 3 * 560
    assert cost["chip_hours"] == 1800 * 8 / 3600 == 4.0
    assert cost["tokens"] == {"cold start, trained on": 1000, "training, sampled": 12 * 40,
                              "evaluations, sampled": 16 * 40}
    assert cost["judge_calls"] == {"training": 12, "evaluations": 16}
    cells = page.cells("cost")
    assert "4 chip-hours: 8 × TPU v4, in 2 process(es)" in cells
    assert "between the phases 3:00 min 10.7%" in cells and "rollout 20:00 min 71.4%" in cells


def test_what_is_missing_is_counted_and_said(whole):
    page, found, _ = whole
    assert found["missing"]["training"] == {"missing": 1, "of": 12}
    assert "No judgement for 1 of 12 completions of training (8.3%)" in page.cells("summary")


def test_hostile_text_is_text(whole):
    page, found, directory = whole
    tags = {tag for tag, _ in page.elements}
    assert not tags & {"script", "img", "b2", "iframe", "object", "link", "form", "base"}
    for tag, attributes in page.elements:
        assert not [name for name in attributes if name.startswith("on")], (tag, attributes)
    shown = HOSTILE.replace("\ud800", "\ufffd").replace("\x00", "\ufffd")
    assert page.text["examples"].count(shown) >= 4  # question, reference, completion, reply
    assert "<my run>" in page.text[""] and "<my run>" == found["name"]
    assert "\u2028" in page.text["examples"] and "{{ 7 * 7 }}" in page.text["examples"]


def test_the_page_needs_nothing_but_itself(whole):
    page, _, directory = whole
    text = (directory / "report.html").read_text(encoding="utf-8")
    assert text.startswith("<!DOCTYPE html>\n<html lang=\"en\">")
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids)), "an id stands for one element"
    for tag, attributes in page.elements:
        assert "src" not in attributes and "srcset" not in attributes, tag
        for key in ("href", "xlink:href"):
            if key in attributes:
                assert attributes[key].removeprefix("#") in ids and attributes[key][0] == "#"
    assert not re.search(r"url\(\s*['\"]?(?!#)", text) and "@import" not in text
    policy, = (a["content"] for tag, a in page.elements
               if a.get("http-equiv") == "Content-Security-Policy")
    assert "default-src 'none'" in policy and "script" not in policy


def test_tables_can_be_read_aloud_and_scrolled_by_keyboard(whole):
    page, _, _ = whole
    boxes = [a for tag, a in page.elements if "scroll" in a.get("class", "").split()]
    assert boxes and all(a["tabindex"] == "0" and a["role"] == "region" for a in boxes)
    tags = [tag for tag, _ in page.elements]
    assert tags.count("table") == tags.count("caption") == len(boxes)
    assert all(a.get("scope") in ("row", "col", "rowgroup")
               for tag, a in page.elements if tag == "th")
    assert {"header", "nav", "main", "footer"} <= set(tags)


def test_pictures_are_saved_beside_the_page_and_no_half_file_stays(whole):
    _, _, directory = whole
    names = {path.stem for path in (directory / "figures").iterdir()}
    assert {"welfare_plane", "payoff_1", "payoff_2", "welfare"} <= names
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in
               (directory / "figures").iterdir())
    assert not list(directory.rglob("*.partial"))


def test_a_matrix_is_shown_as_a_table_with_the_recommended_cell_and_the_pareto_set(whole):
    page, _, _ = whole
    assert re.search(r"DQ 3 · 2 4 · 1 5 · 0 ◆ play", page.cells("examples"))
    assert re.search(r"VQ 0 · 5 ● Pareto 1 · 4 2 · 3", page.cells("examples"))


def test_a_run_that_is_going_on_is_reported_up_to_its_last_whole_line(tmp_path):
    write_rows(tmp_path / "metrics.jsonl", metrics(2, 1))
    write_rows(tmp_path / "rollouts.jsonl", rollouts(1))
    write_rows(tmp_path / "evaluations.jsonl", evaluation("after cold start", after=False))
    with (tmp_path / "rollouts.jsonl").open("a") as file:
        file.write('{"stage": "grpo", "st')
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    page, found = read(tmp_path)
    assert found["rows"]["rollouts"] == 4
    assert found["progress"]["grpo"] == {"done": 1, "of": 3}
    assert "GRPO: 1 of 3 steps so far (the run is not finished)" in page.cells("summary")
    assert "there is no other evaluation to compare it with" in page.cells("summary")
    assert "On how many devices it ran is not recorded" in page.cells("cost")
    assert found["paired"] is None and not (tmp_path / "tables" / "paired.csv").exists()


def test_a_run_without_evaluations_has_curves_and_says_so(tmp_path):
    write_rows(tmp_path / "metrics.jsonl", metrics(2, 3))
    page, found = read(tmp_path)
    assert "Nothing was evaluated on held-out prompts" in page.cells("summary")
    assert {"summary", "curves", "cost"} == set(page.text) - {""}
    assert found["measures"] == {} and found["examples"] == []


def test_a_run_without_grpo_is_compared_with_what_it_was(tmp_path):
    write_rows(tmp_path / "metrics.jsonl", metrics(2, 0))
    write_rows(tmp_path / "evaluations.jsonl", [
        *evaluation("before cold start", after=False),
        *evaluation("after cold start", after=True)])
    page, found = read(tmp_path)
    assert (found["labels"]["before"], found["labels"]["after"]) == (
        "before cold start", "after cold start")
    assert "by +0.150" in page.cells("summary")


def test_where_no_judge_answered_nothing_is_claimed(tmp_path):
    rows = [unjudged(row) for label in ("one", "two") for row in evaluation(label, after=True)]
    write_rows(tmp_path / "evaluations.jsonl", rows)
    page, found = read(tmp_path)
    assert found["measures"]["two"]["overall"]["social_welfare"]["value"] is None
    assert "No completion of “two” has a score, so nothing can be said." in page.cells("summary")
    assert "4 of 4 completions of “two” (100.0%)" in page.cells("summary")
    assert "nan" not in (tmp_path / "report.html").read_text().lower().split("<svg")[0]


def test_evaluations_of_other_prompts_are_not_subtracted(tmp_path):
    others = [row | {"id": f"other {row['id']}"} for row in evaluation("two", after=True)]
    write_rows(tmp_path / "evaluations.jsonl", [*evaluation("one", after=False), *others])
    page, found = read(tmp_path)
    assert found["paired"] is None and found["pareto"] is None
    assert "The two evaluations have no prompt in common." in page.cells("summary")


def test_a_baseline_in_a_file_of_its_own_is_reported_from_the_comparison(tmp_path):
    difference = {"first": 0.4, "second": 0.6, "difference": 0.2, "low": 0.1, "high": 0.3,
                  "p": 0.001, "p_adjusted": 0.002, "pairs": 4}
    sides = {"file1": 0.25, "file2": 0.75}
    spread = {"u_cov": 0.5, "l_cov": 1.0, "mean_cov": 0.75}
    write_rows(tmp_path / "evaluations.jsonl", evaluation("mine", after=True))
    (tmp_path / "comparison.json").write_text(json.dumps({
        "first": {"file": "/some/where/theirs.jsonl", "label": None},
        "differences": {"user_welfare": difference, "reward": difference}, "by_source": {},
        "basic_compare": {"common_count": 4, "file1_dominates_file2": 1,
                          "file2_dominates_file1": 2, "equal": 1, "incomparable": 0},
        "coverage_spread": {"file1": spread, "file2": spread}, "epsilon": 0.05,
        **dict.fromkeys(numbers.OF_PAIR, sides),
    }))
    page, _ = read(tmp_path)
    assert "Against “theirs.jsonl”: user welfare U +0.200 [+0.100, +0.300] (better, p = 0.002)" in (
        page.cells("summary"))
    assert "reward 0.400 0.600 +0.200 ▲" not in page.cells("frontier")  # nobody said which way
    assert "user welfare U 0.400 0.600 +0.200 ▲ better" in page.cells("frontier")


def test_megabytes_of_completion_do_not_make_megabytes_of_page(tmp_path):
    rows = evaluation("one", after=True)
    for row in rows:
        row["completion"] = f"<response>{'spam ' * 400_000}</response>"
        row["judge_reply"] = row["question"] = "x" * 1_000_000
    write_rows(tmp_path / "evaluations.jsonl", rows)
    page, _ = read(tmp_path)
    assert (tmp_path / "report.html").stat().st_size < 1_000_000
    assert "990,000 further characters are in evaluations.jsonl" in page.cells("examples")


@pytest.mark.parametrize(("name", "content", "expected"), [
    ("metrics.jsonl", '{"stage": "grpo", "step": 1}\n{"stage":\n', "metrics.jsonl, line 2, is no"),
    ("metrics.jsonl", '{"stage": "grpo"}\n', "metrics.jsonl, line 1, has no 'step'"),
    ("metrics.jsonl", "[1]\n", "metrics.jsonl, line 1, is list, expected an object"),
    ("evaluations.jsonl", '{"label": "x"}\n', "evaluations.jsonl, line 1, has no 'id'"),
    ("config.json", "{", "config.json is no JSON"),
    ("config.json", '{"stages": []}', "config.json has no 'model'"),
    ("evaluations.jsonl", json.dumps(evaluation("x", True)[0] | {"user_welfare": None}) + "\n",
     "evaluations.jsonl, line 1, is valid, but not all of reward, user_welfare, llm_welfare"),
    ("evaluations.jsonl", "".join(json.dumps(evaluation(label, True)[0]) + "\n" for label in "xyy"),
     "evaluations.jsonl: id 'p0', sample 0 stands twice"),
    ("comparison.json", "{}", "comparison.json has no 'first'"),
    ("rollouts.jsonl", b"\xff\n", "rollouts.jsonl, line 1, is no JSON"),
])
def test_a_broken_file_is_named_and_nothing_is_written(tmp_path, name, content, expected):
    write_rows(tmp_path / "metrics.jsonl", metrics(1, 0))
    (tmp_path / "report.html").write_text("the old one")
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(report.ReportError, match=re.escape(expected)):
        report.write(tmp_path)
    assert (tmp_path / "report.html").read_text() == "the old one"
    assert not (tmp_path / "figures").exists()


def test_the_command_names_an_empty_directory_in_one_line_and_ends_with_2(tmp_path, capsys):
    assert command.main([str(tmp_path)]) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err == (
        f"error: {tmp_path} holds no row of metrics.jsonl, rollouts.jsonl or evaluations.jsonl: "
        "there is nothing to report\n")


def test_the_command_writes_where_it_is_told_to(tmp_path, capsys):
    write_rows(tmp_path / "metrics.jsonl", metrics(1, 0))
    assert command.main([str(tmp_path), f"--out={tmp_path / 'out'}"]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'out' / 'report.html'}\n"
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "report.html", "report.json", "figures", "tables"}
    assert {path.name for path in tmp_path.iterdir()} == {"metrics.jsonl", "out"}


def test_the_template_and_its_style_are_part_of_the_package():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    patterns = settings["package-data"]["gtalign_jax.report"]
    folder = Path(page.__file__).parent
    others = {path for path in folder.iterdir() if path.is_file() and path.suffix != ".py"}
    assert others == {path for pattern in patterns for path in folder.glob(pattern)} != set()


def test_the_prompts_of_these_tests_have_the_sums_that_they_claim():
    assert sum(first[0] for *_, first, _ in PROMPTS) == 1.5
