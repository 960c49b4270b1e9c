"""The compare command, end to end: what it writes and prints, what it leaves out, its errors."""

import json
import math

import pytest

from gtalign_jax import compare, score
from gtalign_jax.game.chain import KEYS, render

FIRST = [(0.2, 0.5), (0.5, 0.5), (0.6, 0.4), (0.8, 0.3)]
SECOND = [(0.4, 0.6), (0.5, 0.5), (0.7, 0.2), (0.9, 0.4)]


def rows(points, **fields):
    return [
        {"id": f"p{i}", "user_welfare": user, "llm_welfare": llm, **fields}
        for i, (user, llm) in enumerate(points)
    ]


def lines(rows):
    return "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)


def numbers(tree, path=""):
    """{path: number} of a nested dict."""
    if not isinstance(tree, dict):
        return {path: tree}
    return {k: v for name, x in tree.items() for k, v in numbers(x, f"{path}/{name}").items()}


@pytest.fixture
def run(tmp_path, capsys):
    """run(first rows, second rows, flags) -> (exit status, JSON or None, stdout, stderr)."""

    def call(first, second, *flags):
        paths = [tmp_path / "first.jsonl", tmp_path / "second.jsonl"]
        for path, content in zip(paths, (first, second), strict=True):
            path.write_text(lines(content), encoding="utf-8")
        out = tmp_path / "out" / "comparison.json"
        status = compare.main([*map(str, paths), "--eps=0", f"--json={out}", *flags])
        printed = capsys.readouterr()
        found = json.loads(out.read_text()) if out.exists() else None
        assert not list(tmp_path.rglob("*.partial"))
        return status, found, printed.out, printed.err

    return call


def test_two_files_are_compared_and_the_figures_written_and_printed(run):
    status, found, out, err = run(rows(FIRST), rows(SECOND), "--rho=-inf")
    assert status == 0 and err == ""
    assert (found["pairs"], found["pairs_left_out"], found["matched_by"]) == (4, 0, ["id"])
    assert found["basic_compare"] == {
        "common_count": 4, "file1_dominates_file2": 0, "file2_dominates_file1": 2, "equal": 1,
        "incomparable": 1,
    }  # fmt: skip
    user = found["differences"]["user_welfare"]
    assert user["first"] == pytest.approx(0.525) and user["second"] == pytest.approx(0.625)
    assert user["difference"] == pytest.approx(0.1)
    assert user["p"] == pytest.approx(4 / 16)  # three gains and a zero: the zero's sign is free
    social = found["differences"]["social_welfare"]
    assert social["first"] == pytest.approx(sum(math.sqrt(u * m) for u, m in FIRST) / 4)
    # The smaller welfare of each pair, and the word, because JSON has no infinities.
    assert found["CES_rho"] == "-inf"
    assert found["CES_avg"]["file1"] == pytest.approx((0.2 + 0.5 + 0.4 + 0.3) / 4)
    # Against (0.2, 0.2): steps of the first at (0.5, 0.5) (0.6, 0.4) (0.8, 0.3) ...
    assert found["hypervolume_exact"]["file1"] == pytest.approx(0.3 * 0.3 + 0.1 * 0.2 + 0.2 * 0.1)
    # ... and of the second at (0.4, 0.6) (0.5, 0.5) (0.9, 0.4); (0.7, 0.2) adds nothing.
    assert found["hypervolume_exact"]["file2"] == pytest.approx(0.2 * 0.4 + 0.1 * 0.3 + 0.4 * 0.2)
    for words in ("user_welfare", "+0.1000", "hypervolume", "0.1900", "matched by id: 4 pairs",
                  "CES welfare, rho -inf"):
        assert words in out, words


def test_the_given_cases_come_out_of_the_command(shared_dir, run):
    cases = json.loads((shared_dir / "welfare_cases.json").read_text())["pareto_metrics"]
    for case in cases:
        status, found, _, _ = run(
            rows(case["first"]), rows(case["second"])[::-1], f"--eps={case['eps']}",
            "--resamples=10",
        )  # fmt: skip
        assert status == 0
        expected = numbers(case["expected"])
        assert len(expected) == 27
        for path, value in expected.items():
            assert abs(numbers(found)[path] - value) <= 1e-9, path


def test_rows_without_a_score_are_left_out_in_pairs_and_counted(run):
    first, second = rows(FIRST), rows(SECOND)
    first[0] |= {"valid": False}  # would be a gain of 0.2: as a 0 it would be one of 0.4
    second[1] |= {"user_welfare": None, "llm_welfare": None, "valid": False}
    first.append({"line": 9, "input": "{", "valid": False, "error": "as score writes a bad line"})
    status, found, out, _ = run(first, second)
    assert status == 0
    assert (found["pairs"], found["pairs_left_out"]) == (2, 2)
    assert (found["first"]["rows_missing"], found["second"]["rows_missing"]) == (2, 1)
    assert found["differences"]["user_welfare"]["difference"] == pytest.approx(0.1)
    assert found["basic_compare"]["common_count"] == 2
    assert "2 without a score" in out and "2 more left out" in out


def test_ids_on_one_side_are_counted_and_named(run):
    status, found, out, _ = run(rows(FIRST), [*rows(SECOND)[:2], {**rows(SECOND)[0], "id": "new"}])
    assert status == 0 and found["pairs"] == 2
    assert found["first"]["first_ids_only_here"] == ["p2", "p3"]
    assert found["second"]["ids_only_here"] == 1
    assert "2 ids only on the first side: p2, p3" in out
    assert "1 ids only on the second side: new" in out


def test_bad_lines_are_named_left_out_and_make_the_status_one(run):
    bad = [
        '{"id": "x"',
        "[1]",
        {"id": "p0", "user_welfare": 0.5},
        '{"id": "p0", "user_welfare": NaN, "llm_welfare": 0.5}',
        {"id": "p0", "user_welfare": "0.5", "llm_welfare": 0.5},
        {"id": "p0", "user_welfare": True, "llm_welfare": 0.5},
        {"id": ["p0"], "user_welfare": 0.5, "llm_welfare": 0.5},
        {"user_welfare": 0.5, "llm_welfare": 0.5},
        {"id": "p0", "sample": [1], "valid": False},
        {"id": "p0", "label": ["a"], "user_welfare": 0.5, "llm_welfare": 0.5},
    ]
    status, found, _, err = run([*rows(FIRST), *bad], rows(SECOND))
    assert status == 1 and found["pairs"] == 4 and found["first"]["bad_lines"] == 10
    assert found["ids_averaged"] == 0
    named = err.splitlines()
    assert [int(line.split(".jsonl:")[1].split(":")[0]) for line in named] == list(range(5, 15))
    for line, words in zip(
        named,
        ("not a JSON object", "not a JSON object but a list", "'llm_welfare' is missing",
         "not nan", "not '0.5'", "not True", "'id' must be", "'id' is missing", "'sample' must be",
         "'label' must be"),
        strict=True,
    ):  # fmt: skip
        assert words in line


def test_of_many_bad_lines_only_the_first_are_named(run):
    status, _, _, err = run([*rows(FIRST), *["{"] * 30], rows(SECOND))
    assert status == 1
    assert len(err.splitlines()) == 11 and "20 more bad lines" in err


def test_samples_are_matched_one_by_one_but_tested_per_prompt(run):
    first = [{**row, "sample": s} for row in rows(FIRST) for s in (0, 1)]
    second = [{**row, "sample": s} for row in rows(SECOND) for s in (1, 0, 2)]
    status, found, out, _ = run(first, second)
    assert status == 0 and found["matched_by"] == ["id", "sample"]
    assert found["pairs"] == 8 and found["samples_unmatched"] == 4
    assert found["differences"]["user_welfare"]["pairs"] == 4
    assert "matched by id and sample" in out


def test_repeated_ids_without_samples_are_averaged_and_said_so(run):
    status, found, out, _ = run(rows(FIRST) + rows([(0.6, 0.7)]), rows(SECOND))
    assert status == 0 and found["ids_averaged"] == 1
    first = found["differences"]["user_welfare"]["first"]
    assert first == pytest.approx((0.4 + 0.5 + 0.6 + 0.8) / 4)
    assert "1 ids have several rows, which were averaged" in out


def test_two_labels_of_one_file_are_compared(tmp_path, capsys):
    path, out = tmp_path / "evaluations.jsonl", tmp_path / "comparison.json"
    path.write_text(lines([*rows(FIRST, label="before", sample=0, data_source="a"),
                           *rows(SECOND, label="after GRPO", sample=0, data_source="a")]))
    flags = ["--first-label=before", "--second-label=after GRPO"]
    assert compare.main([str(path), str(path), *flags, f"--json={out}"]) == 0
    found = json.loads(out.read_text())
    assert found["first"]["label"] == "before" and found["first"]["rows"] == 4
    assert found["differences"]["user_welfare"]["difference"] == pytest.approx(0.1)
    assert "(after GRPO)" in capsys.readouterr().out
    for flags, words in (
        ([], "compared with itself"),
        (["--first-label=before", "--second-label=before"], "compared with itself"),
        (["--first-label=before"], "several labels ('before', 'after GRPO')"),
        (["--first-label=before", "--second-label=never"], "label 'never'"),
    ):
        assert compare.main([str(path), str(path), *flags]) == 2
        assert words in capsys.readouterr().err


def test_data_sources_have_their_own_tables(run):
    first, second = rows(FIRST, data_source="medium"), rows(SECOND)
    first[3]["data_source"] = "math-hard"
    status, found, out, _ = run(first, second)
    assert status == 0
    parts = found["by_source"]
    assert list(parts) == ["math-hard", "medium"]
    assert parts["math-hard"]["user_welfare"]["pairs"] == 1
    assert parts["math-hard"]["user_welfare"]["p"] is None  # one prompt tells nothing
    assert parts["medium"]["user_welfare"]["difference"] == pytest.approx(0.1)
    assert "data source medium" in out


def test_other_measures_are_tested_on_demand(run):
    first, second = rows(FIRST, reward=0.2, stopped=False), rows(SECOND, reward=0.5, stopped=True)
    status, found, _, _ = run(first, second, "--measures=reward,stopped")
    assert status == 0 and list(found["differences"]) == ["reward", "stopped"]
    assert found["differences"]["reward"]["difference"] == pytest.approx(0.3)
    assert found["differences"]["stopped"]["difference"] == 1.0
    status, _, _, err = run(first, second, "--measures=rewards")
    assert status == 2 and "measure 'rewards'" in err


def test_another_ground_truth_under_the_same_id_is_mentioned(run):
    first, second = rows(FIRST, ground_truth="a"), rows(SECOND, ground_truth="a")
    assert "warning" not in run(first, second)[2]
    second[0]["ground_truth"] = "b"
    _, found, out, _ = run(first, second)
    assert found["ids_with_other_truth"] == 1 and "warning: 1 common ids" in out


def test_the_output_of_score_is_compared(tmp_path, capsys):
    matrix = {key: {"LLM": i, "user": -i} for i, key in enumerate(KEYS)}
    good = render("t", matrix, "Best is DQ_AQ.", "It is 12.")
    outputs = []
    for name, completions in (("a", [good, "no blocks", good]), ("b", ["none", good, good])):
        source, out = tmp_path / f"{name}.jsonl", tmp_path / f"{name}_scored.jsonl"
        source.write_text(lines([
            {"id": i, "data_source": "ambig_qa", "ground_truth": "singleAnswer###12",
             "completion": text, "judge_score": 1}
            for i, text in enumerate(completions)
        ]))  # fmt: skip
        assert score.main([f"--input={source}", f"--out={out}"]) == 0
        outputs.append(str(out))
    assert compare.main([*outputs, "--eps=0"]) == 0
    out = capsys.readouterr().out
    assert "matched by id: 3 pairs" in out and "1 pairs equal, 0 incomparable" in out


@pytest.mark.parametrize(
    ("first", "second", "words"),
    [
        ([{"user_welfare": 0.1, "llm_welfare": 0.2}], rows(SECOND), "first.jsonl: no row has an"),
        (rows(FIRST), [], "second.jsonl: it has no row"),
        (rows(FIRST), [{**rows(SECOND)[0], "id": "other"}], "no id is in both"),
        (rows(FIRST), rows(SECOND, user_welfare=None), "none of the 4 matched pairs"),
        (rows(FIRST, sample=0) * 2, rows(SECOND, sample=0), "'p0', sample 0 stands twice"),
        (rows(FIRST, data_source="a"), rows(SECOND, data_source="b"), "several data sources"),
        ([{"id": "p0", "completion": "hm"}], rows(SECOND), "gtalign_jax.score"),
        (["[", '{"id": "p0",', "]"], rows(SECOND), "first.jsonl:1: not a JSON object"),
        ([*rows(FIRST, label="a"), *rows(FIRST, label="b")], rows(SECOND), "several labels"),
    ],
)
def test_what_cannot_be_compared_ends_in_one_line_and_status_two(first, second, words, run):
    status, found, out, err = run(first, second)
    assert status == 2 and found is None and out == ""
    assert words in err.splitlines()[-1] and err.splitlines()[-1].startswith("error: ")


@pytest.mark.parametrize(
    ("flag", "words"),
    [("--eps=-1", "--eps=-1.0"), ("--eps=nan", "--eps=nan"), ("--rho=nan", "--rho=nan"),
     ("--resamples=0", "--resamples=0"), ("--seed=-1", "--seed=-1")],
)  # fmt: skip
def test_bad_numbers_are_named(flag, words, run):
    status, found, _, err = run(rows(FIRST), rows(SECOND), flag)
    assert status == 2 and found is None and words in err


def test_a_missing_file_is_named_and_an_input_is_never_overwritten(tmp_path, run, capsys):
    assert compare.main([str(tmp_path / "none.jsonl"), str(tmp_path / "no.jsonl")]) == 2
    assert "none.jsonl" in capsys.readouterr().err
    first = tmp_path / "first.jsonl"
    status, _, _, err = run(rows(FIRST), rows(SECOND), f"--json={first}")
    assert status == 2 and "--json=" in err
    assert first.read_text() == lines(rows(FIRST))


def test_a_failed_comparison_leaves_the_old_figures(tmp_path, run):
    assert run(rows(FIRST), rows(SECOND))[0] == 0
    status, found, _, _ = run(rows(FIRST), [])
    assert status == 2 and found["pairs"] == 4
