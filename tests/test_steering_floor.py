"""The floor: prices choose no cell that the model itself wrote as a loss, in either mode."""

import dataclasses

import numpy as np
import pytest
from test_steering_game import completion, with_rule

from gtalign_jax.game import chain
from gtalign_jax.game.decide import RULES
from gtalign_jax.game.steering import solve, steer


def test_prices_cannot_buy_what_the_matrix_calls_harm():
    # A refusal-like action (CQ) is long; answering (DA) is short and written as a loss of 1.
    written_UAP = np.array([[[0, 0]] * 3, [[2, -3], [3, 3], [0, -2.5]]])
    dear = with_rule(sensitivity=(100.0, 1000.0))
    assert solve(written_UAP, dear).before.key == "DQ_CQ"
    kept = solve(written_UAP, dear)
    assert kept.after.key == "DQ_CQ" and kept.after.open == ("DQ_CQ",)
    assert "Written LLM + user below the floor 0: DQ_DA (-1), DQ_AQ (-2.5)." in kept.after.reasons
    # Money alone would have it: 6 - 20 against -1 - 10 (a cell at the floor is not below it).
    assert solve(written_UAP, with_rule(config=dear, floor=-1.0)).after.key == "DQ_DA"
    assert solve(written_UAP, with_rule(config=dear, floor=-0.9)).after.key == "DQ_CQ"


def test_a_matrix_that_would_tempt_the_model_below_the_floor_is_left_as_written():
    """As above, but the model reads the edited matrix itself: what it must not choose must not
    look best. At a lower price it does not, and the matrix is edited."""
    written_UAP = np.array([[[0, 0]] * 3, [[2, -3], [3, 3], [0, -2.5]]])
    dear = dataclasses.replace(with_rule(sensitivity=(100.0, 1000.0)), mode="matrix")
    kept = solve(written_UAP, dear)
    assert kept.after.key == "DQ_CQ" and (kept.edited_UAP == written_UAP).all()
    assert "the model would choose DQ_DA: prices do not act" in kept.after.reasons[-1]
    assert steer(completion(chain.payoff_json(written_UAP)), dear).forced is None
    free = solve(written_UAP, dataclasses.replace(dear, floor=-1.0))
    assert free.after.key == "DQ_DA" and (free.edited_UAP != written_UAP).any()
    cheap = solve(written_UAP, dataclasses.replace(dear, sensitivity=(10.0, 100.0)))
    assert cheap.after.key == "DQ_CQ" and (cheap.edited_UAP != written_UAP).any()


def test_with_nothing_above_the_floor_prices_do_not_act():
    written_UAP = np.array([[[-3, -3]] * 3, [[-2, -1], [-1, -1], [-3, -1]]], float)
    for rule in RULES:
        config = with_rule(rule, sensitivity=(100.0, 1000.0))
        found = solve(written_UAP, config)
        assert found.after.key == "DQ_CQ" and (found.edited_UAP == written_UAP).all()
        assert found.after.reasons[-1] == (
            "No cell is left: prices do not act here, and DQ_CQ stands.")
        assert steer(completion(chain.payoff_json(written_UAP)), config).forced is None


LOSS = [-3, -3]


@pytest.mark.parametrize("rule, points, vague, detailed, tempting", [
    # In the row asking stays ahead (6 - 16 against -6 - 8); of all cells VQ_DA is (-0.5 - 8).
    ("pareto_welfare", 8.0, [[2, -2.5], LOSS, LOSS], [LOSS, [3, 3], LOSS], "VQ_DA"),
    # The smaller payoff is larger where it asks (-13 against -14), the sum where it answers (-9).
    ("egalitarian", 8.0, [[0, 0]] * 3, [[5, -6], [3, 3], LOSS], "DQ_DA"),
    # 6 - 13.8 is more than -1 - 6.9; written with whole numbers both are -8.
    ("pareto_welfare", 6.9, [[0, 0]] * 3, [[2, -3], [3, 3], LOSS], "DQ_DA"),
], ids=["the other row", "the rule that the model knows", "rounding"])
def test_what_tempts_is_what_the_model_reads_by_the_rule_it_knows(
    rule, points, vague, detailed, tempting
):
    written_UAP = np.array([vague, detailed], float)
    config = with_rule(rule, sensitivity=(100.0, 100.0 * points), mode="matrix")
    found = solve(written_UAP, config)
    assert f"the model would choose {tempting}:" in found.after.reasons[-1]
    assert found.after.key == "DQ_CQ" and (found.edited_UAP == written_UAP).all()
    free = solve(written_UAP, dataclasses.replace(config, floor=-9.0))
    assert (free.edited_UAP != written_UAP).any()
