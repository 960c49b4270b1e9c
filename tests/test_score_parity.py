"""The score command: every reference row, bad input, and what it promises about its output."""

import json
import math

import pytest

from gtalign_jax import score
from gtalign_jax.game.chain import KEYS, render

AGGREGATIONS = ("cobb_douglas", "linear", "user", "llm")
REFUSED_ON_PURPOSE = ("nan", "inf", "bool_value")  # payoffs that the reference accepted
NO_ANALYZE = ("minerva", "advbench")  # scored 0 by the reference, like every other source by us
FACTORS = (
    "q_user", "q_llm", "answer", "reading", "latency", "format", "matrix_quality", "verbosity",
    "consistency",
)  # fmt: skip
MATRIX = {key: {"LLM": i, "user": -i} for i, key in enumerate(KEYS)}
CHAIN = render("t", MATRIX, "Best is DQ_AQ.", "It is 12.")


def run(tmp_path, text, *flags):
    """(exit status, output rows, path of the input) of the command on a file with this text."""
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_bytes(text if isinstance(text, bytes) else text.encode())
    status = score.main([f"--input={source}", f"--out={out}", *flags])
    return status, [json.loads(line) for line in out.read_text().splitlines()], source


def jsonl(*rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def row(**fields):
    return {
        "data_source": "ambig_qa", "ground_truth": "singleAnswer###12", "completion": CHAIN,
        "judge_score": 1, **fields,
    }  # fmt: skip


@pytest.fixture(scope="module")
def cases(shared_dir):
    lines = (shared_dir / "reward_cases.jsonl").read_text().splitlines()
    assert len(lines) == 280
    return [json.loads(line) for line in lines]


def expected_numbers(case, welfare, consistency):
    """(user welfare, llm welfare, score) that the reference and the documented differences want."""
    if case["kind"] in REFUSED_ON_PURPOSE:
        return 0.0, 0.0, 0.0
    expected = case["expected_with_pareto"] if consistency else case["expected"]
    user, llm = expected["user_welfare"], expected["llm_welfare"]
    if not consistency:
        return user, llm, expected["score"][welfare]
    by_hand = {
        "cobb_douglas": math.sqrt(user * llm), "linear": (user + llm) / 2, "user": user, "llm": llm
    }  # fmt: skip
    assert abs(by_hand["cobb_douglas"] - expected["score"]) < 1e-9
    return user, llm, by_hand[welfare]


@pytest.mark.parametrize("consistency", [False, True])
@pytest.mark.parametrize("welfare", AGGREGATIONS)
def test_every_reference_row_is_reproduced(welfare, consistency, cases, tmp_path):
    flags = [f"--welfare={welfare}", *(["--consistency=judge"] if consistency else [])]
    status, rows, _ = run(tmp_path, jsonl(*cases), *flags)
    assert status == 0 and len(rows) == len(cases)
    compared = 0
    for case, got in zip(cases, rows, strict=True):
        assert got["id"] == case["id"] and got["valid"]
        if case["kind"] == "no_analyze" and case["data_source"] in NO_ANALYZE:
            continue
        if consistency and "expected_with_pareto" not in case:
            continue
        numbers = got["user_welfare"], got["llm_welfare"], got["score"]
        wanted = expected_numbers(case, welfare, consistency)
        assert numbers == pytest.approx(wanted, abs=1e-6), case["id"]
        compared += 1
    # 160 rows carry the consistency variant; of all rows one is a no_analyze of NO_ANALYZE.
    assert compared == (160 if consistency else 279)


def test_matrices_pareto_sets_formats_and_answers_equal_the_reference(cases, tmp_path):
    _, rows, _ = run(tmp_path, jsonl(*cases))
    for case, got in zip(cases, rows, strict=True):
        if case["kind"] in REFUSED_ON_PURPOSE:
            assert got["payoff"] is None and got["pareto_set"] is None
            assert "is not finite" in got["payoff_error"] or "is a bool" in got["payoff_error"]
            continue
        assert got["payoff"] == case["payoff"], case["id"]
        assert (got["payoff_error"] is None) == (case["payoff"] is not None)
        assert got["pareto_set"] == case["pareto_frontier"], case["id"]
        if got["score"] > 0 and case["kind"] != "no_analyze":
            assert got["format"] == case["expected"]["format"]
            assert got["answer"] == pytest.approx(case["expected"]["answer"], abs=1e-9)
        if case.get("char_bleu") is not None and got["score"] > 0:
            assert got["q_user"] == pytest.approx(case["char_bleu"], abs=1e-9)


def test_no_analyze_of_the_documented_sources_is_scored_like_the_others(cases, tmp_path):
    picked = [
        c for c in cases if c["kind"] == "no_analyze" and c["data_source"] in NO_ANALYZE
    ]
    _, rows, _ = run(tmp_path, jsonl(*picked))
    assert len(rows) == 1
    for got in rows:
        assert got["format"] == 0 and got["score"] > 0.1
        by_hand = 1e-4 + 0.5 * got["q_user"] + 0.2 * got["reading"] + 0.3 * got["latency"]
        assert got["user_welfare"] == pytest.approx(by_hand, abs=1e-12)


def test_ces_runs_from_the_command_line(tmp_path):
    for rho, kind in (("0", "cobb_douglas"), ("1", "linear")):
        _, (ces,), _ = run(tmp_path, jsonl(row()), "--welfare=ces", f"--rho={rho}")
        _, (named,), _ = run(tmp_path, jsonl(row()), f"--welfare={kind}")
        assert ces["score"] == pytest.approx(named["score"], abs=1e-12)


def test_rows_keep_their_fields_and_get_every_result(tmp_path):
    status, (got,), _ = run(tmp_path, jsonl(row(id=7, note={"a": [1, None]}, extra="é")))
    assert status == 0
    assert (got["id"], got["note"], got["extra"]) == (7, {"a": [1, None]}, "é")
    for name in FACTORS:
        assert 0 <= got[name] <= 1
    assert got["payoff"] == MATRIX and got["pareto_set"] == sorted(KEYS)
    assert got["valid"] is True and got["error"] is None


def test_a_missing_score_is_null_and_never_zero(tmp_path):
    rows = jsonl(row(judge_score=None), row(), row(completion="no chain", judge_score=None))
    for flags in (["--judge=none"], ["--judge=rule"]):  # no rule knows ambig_qa
        status, (missing, scored, broken), _ = run(tmp_path, rows, *flags)
        assert status == 0
        assert missing["valid"] is False and "judge.kind" in missing["error"]
        assert missing["score"] is missing["user_welfare"] is missing["q_user"] is None
        assert missing["payoff"] == MATRIX  # what is known stays known
        assert scored["score"] > 0
        # No payoff, no reward: nobody needs to be asked for that.
        assert broken["valid"] is True and broken["score"] == 0.0


def test_rules_judge_rows_of_the_builtin_tasks(tmp_path):
    arithmetic = {"data_source": "builtin-arithmetic", "completion": CHAIN}
    right, wrong = arithmetic | {"ground_truth": "12"}, arithmetic | {"ground_truth": "13"}
    _, (got, other), _ = run(tmp_path, jsonl(right, wrong))
    assert (got["q_user"], other["q_user"]) == (1.0, 0.0)
    assert got["score"] > other["score"] > 0


def test_bad_lines_are_reported_with_file_and_line_and_lose_nothing(tmp_path, capsys):
    lines = [
        json.dumps(row(id="first")).encode(),
        b"{not json",
        b"[1]",
        json.dumps({"data_source": "ambig_qa", "completion": "x"}).encode(),
        b"",
        json.dumps(row(data_source="ambigqa")).encode(),
        json.dumps(row(judge_score="high")).encode(),
        json.dumps(row(judge_score=True)).encode(),
        json.dumps(row(judge_score=0)).replace('"judge_score": 0', '"judge_score": NaN').encode(),
        json.dumps(row(completion=None)).encode(),
        b"\xff\xfe",
        b"[" * 100_000,
        json.dumps(row(judge_score=10**400)).encode(),
        json.dumps(row(id="last")).encode(),
    ]
    status, rows, source = run(tmp_path, b"\n".join(lines))
    assert status == 1
    assert (rows[0]["id"], rows[-1]["id"]) == ("first", "last")
    assert rows[0]["score"] == rows[-1]["score"] > 0
    bad = {got["line"]: got for got in rows[1:-1]}
    assert sorted(bad) == [2, 3, 4, 6, 7, 8, 9, 10, 11, 12, 13]
    wanted = {
        2: "not a JSON object", 3: "but a list", 4: "field 'ground_truth' is missing",
        6: "'ambigqa' is unknown; known: math-hard", 7: "finite number", 8: "finite number",
        9: "finite number", 10: "'completion' must be a string", 11: "not a JSON object",
        12: "not a JSON object", 13: "finite number",
    }  # fmt: skip
    shown = capsys.readouterr().err
    for number, reason in wanted.items():
        assert reason in bad[number]["error"] and bad[number]["valid"] is False
        assert f"{source}:{number}: " in shown
    assert bad[2]["input"] == "{not json"


def test_what_cannot_start_is_said_and_leaves_the_output_alone(tmp_path, capsys):
    out = tmp_path / "out.jsonl"
    out.write_text("precious")
    good = tmp_path / "in.jsonl"
    good.write_text(jsonl(row()))
    for flags, reason in (
        ([f"--input={tmp_path / 'absent.jsonl'}"], "absent.jsonl"),
        ([f"--input={good}", "--judge=http"], "judge.base_url is empty"),
        ([f"--input={good}", "--rho=nan"], "reward.rho"),
        ([f"--input={good}", f"--out={good}"], "must be a new file"),
    ):
        assert score.main([f"--out={out}", *flags]) == 2
        assert reason in capsys.readouterr().err
        assert out.read_text() == "precious" and good.read_text() == jsonl(row())
    with pytest.raises(SystemExit):
        score.main([f"--input={good}", f"--out={out}", "--welfare=nash"])


def test_the_prompt_of_a_row_is_its_question_or_its_last_user_turn():
    chat = [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"},
            {"role": "user", "content": "three"}]  # fmt: skip
    assert score.question_of({"question": "q", "prompt": chat}) == "q"
    assert score.question_of({"prompt": chat}) == "three"
    assert score.question_of({"prompt": "text"}) == "text"
    assert score.question_of({}) == ""
