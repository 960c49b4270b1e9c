"""The study of prices: shares, lengths, differences and what went back, by hand."""

import csv
import io
import math

import numpy as np
import pytest

from gtalign_jax.evaluation import prices, prices_tables
from gtalign_jax.game import pricing
from gtalign_jax.game.pricing import Usage
from gtalign_jax.game.steering import SteeringConfig, solve
from gtalign_jax.report.figures_prices import prices_figure
from gtalign_jax.rollout.splice import Outcome

USAGE = Usage((10, 30, 20), (50, 100, 75))
MATRIX = np.array([[[2, 2], [3, 3], [1, 1]], [[0, 0]] * 3], float)  # VQ_CQ, unless tokens are dear
SOURCES = {"ambiguous": "builtin-ambiguity", "harmful": "builtin-safety"}


def outcome(price: float) -> Outcome:
    config = SteeringConfig(pricing.per_token(output=price, input=0), USAGE, (100.0, 400.0))
    return Outcome(True, None, solve(MATRIX, config))


def row(i: int, kind: str, response_kind: str, tokens: int, score: float, valid=True) -> dict:
    return {
        "id": str(i), "sample": 0, "data_source": SOURCES[kind], "valid": valid,
        "request_kind": kind, "response_kind": response_kind, "tokens": tokens + 40,
        "response_tokens": tokens, "format": 1.0, "answer": score, "judge_score": score,
    }


def rows(price: float, *moves: str) -> list[dict]:
    """Two ambiguous questions and two harmful requests, one of them unsteered and unjudged."""
    given = [prices.priced_row(row(i, kind, move, 10 * (i + 1), i % 2), outcome(price), 38)
             for i, (kind, move) in enumerate(zip(("ambiguous",) * 2 + ("harmful",), moves,
                                                  strict=True))]
    left = row(3, "harmful", "refuse", 5, 0, valid=False)
    return [*given, prices.priced_row(left, Outcome(False, "no matrix", None), 0)]


@pytest.fixture(scope="module")
def study():
    return prices.study({
        "cheap": rows(1, "ask", "answer_ask", "answer"),
        "dear": rows(200, "answer", "answer_ask", "constructive"),
        "dearest": rows(300, "ask", "answer", "constructive"),
    }, USAGE, swept=3)  # fmt: skip


def test_a_row_says_what_was_chosen_and_what_the_answer_did():
    cheap, dear = rows(1, "ask", "ask", "answer"), rows(200, "answer", "ask", "refuse")
    assert (cheap[0]["action"], dear[0]["action"], dear[0]["cell"]) == ("CQ", "DA", "VQ_DA")
    assert (cheap[0]["changed"], dear[0]["changed"]) == (0, 1)
    assert (dear[0]["chooses_DA"], dear[0]["chooses_CQ"]) == (1, 0)
    assert [one["asks_back"] for one in dear] == [0, 1, 0, 0]
    # Harm is asked of harmful requests alone, and of those that were judged: a score of 0 is harm.
    assert [one["harm"] for one in cheap] == [None, None, 1, None]
    unsteered = cheap[3]
    assert unsteered["valid"] and not unsteered["steered"] and unsteered["action"] is None
    assert unsteered["answer"] is None and unsteered["unsteered_because"] == "no matrix"


def test_estimates_are_the_means_of_those_rows_that_count(study):
    overall, by_kind = study.estimates["dear"]["overall"], study.estimates["dear"]
    assert overall["asks_back"].value == 1 / 4 and by_kind["ambiguous"]["asks_back"].value == 1 / 2
    assert overall["chooses_DA"].value == 1 and overall["chooses_DA"].count == 3
    assert overall["steered"].value == 3 / 4
    assert overall["response_tokens"].value == (10 + 20 + 30 + 5) / 4
    assert overall["drawn_tokens"].value == (12 + 22 + 32 + 45) / 4
    assert overall["harm"].value == 1 and overall["harm"].count == 1
    assert math.isnan(by_kind["ambiguous"]["harm"].value)
    assert study.actions["cheap"]["harmful"]["answer"] == 1
    assert study.unsteered["dear"] == {"no matrix": 1}


def test_differences_are_second_minus_first_of_the_same_prompts(study):
    assert set(study.differences) == {"dear", "dearest"}
    change = study.differences["dear"]
    assert change["asks_back"].difference == (1 - 2) / 4
    assert change["chooses_CQ"].difference == -1 and change["chooses_CQ"].pairs == 3
    adjusted = [d.p_adjusted for part in study.differences.values() for d in part.values()
                if math.isfinite(d.p)]
    assert all(a >= d.p for part in study.differences.values() for d in part.values()
               for a in [d.p_adjusted] if math.isfinite(d.p)) and max(adjusted) == 1


def test_what_goes_back_along_a_sweep_is_counted(study):
    assert study.turned_back == {
        "dear": {"choice": 0, "asks_back": 0, "of": 3},
        "dearest": {"choice": 0, "asks_back": 1, "of": 3},
    }
    back = prices.study({"dear": rows(200, *["ask"] * 3), "cheap": rows(1, *["ask"] * 3)},
                        USAGE, swept=2)
    assert back.turned_back["cheap"]["choice"] == 3
    alone = prices.study({"dear": rows(200, *["ask"] * 3)}, USAGE)
    assert alone.turned_back == {} == alone.differences


def test_tables_and_csv_hold_the_estimates(study):
    text = prices_tables.markdown(study)
    assert "| the answer asks back | 50.0%" in text and "| dearest | 0 | 1 | 3 |" in text
    lines = list(csv.DictReader(io.StringIO(prices_tables.csv_text(study))))
    one, = (line for line in lines if (line["pricing"], line["requests"], line["measure"])
            == ("dear", "overall", "asks_back"))
    assert float(one["value"]) == 0.25 and int(one["count"]) == 4


def test_the_figure_says_in_words_what_it_shows(study):
    picture = prices_figure(study)
    assert "dear: DA 100%, CQ 0%, AQ 0%, asks back 25%, 16.2 tokens of answer" in picture.alt
    assert picture.png.startswith(b"\x89PNG")


def test_a_policy_that_never_answers_has_a_figure_too():
    silent = [row | {"response_tokens": 0} for row in rows(1, "ask", "answer", "answer")]
    assert prices_figure(prices.study({"none": silent}, USAGE)).png.startswith(b"\x89PNG")
