"""Decision rules against a slow oracle in exact integers, and the words that give the reasons."""

import functools
import itertools
import re

import jax
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from gtalign_jax.game import payoff as game
from gtalign_jax.game.chain import ACTIONS, KEYS
from gtalign_jax.game.decide import RULES, choose, decide

LLM, USER = 0, 1
# Games in tenths, so that the oracle can count in integers and knows no rounding.
TENTHS = st.lists(st.integers(-2, 2) | st.integers(-50, 50), min_size=12, max_size=12)
ALLOWED = st.lists(st.booleans(), min_size=6, max_size=6).filter(any)


def oracle(tenths, rule, allowed):
    """The cell by definition: `tenths` 12 integers, `allowed` 6 truth values."""
    cells = [tuple(tenths[2 * i : 2 * i + 2]) for i in range(6)]
    left = [i for i in range(6) if allowed[i]]

    def welfare(i):
        return (sum(cells[i]), cells[i][USER], cells[i][LLM])

    if rule == "pareto_welfare":
        left = [
            i for i in left
            if not any(
                cells[j] != cells[i] and all(cells[j][p] >= cells[i][p] for p in (LLM, USER))
                for j in left
            )
        ]
        value = welfare
    elif rule == "utilitarian":
        value = welfare
    elif rule == "nash_product":
        worst = [min(cells[i][p] for i in left) for p in (LLM, USER)]

        def value(i):
            return ((cells[i][LLM] - worst[LLM]) * (cells[i][USER] - worst[USER]), *welfare(i))
    elif rule == "egalitarian":
        def value(i):
            return (min(cells[i]), *welfare(i))
    else:
        replies = []
        for action in range(3):  # the user's best ways of asking for what the LLM committed to
            asked = [i for i in left if i % 3 == action]
            replies += [i for i in asked if cells[i][USER] == max(cells[j][USER] for j in asked)]
        left = sorted(replies)

        def value(i):
            return (cells[i][LLM], cells[i][USER])
    return max(left, key=lambda i: (value(i), -i))


def as_game(tenths):
    return np.array(tenths).reshape(2, 3, 2) / 10


@functools.cache
def jitted(rule):
    return jax.jit(functools.partial(choose, rule=rule))


@pytest.mark.parametrize("rule", RULES)
@settings(max_examples=200)
@given(TENTHS, ALLOWED)
def test_each_rule_equals_the_oracle_in_float32_and_float64(rule, tenths, allowed):
    payoff_UAP, allowed_UA = as_game(tenths), np.array(allowed).reshape(2, 3)
    expected = oracle(tenths, rule, allowed)
    assert decide(payoff_UAP, rule, allowed_UA).cell == expected
    assert jitted(rule)(np.float32(payoff_UAP), allowed_UA=allowed_UA) == expected


@settings(max_examples=200)
@given(TENTHS)
def test_with_all_cells_open_the_default_is_the_recommended_cell(tenths):
    payoff_UAP = as_game(tenths)
    with jax.enable_x64(True):
        expected = int(game.recommended(payoff_UAP))
    found = decide(payoff_UAP)
    assert found.cell == expected == decide(payoff_UAP, "utilitarian").cell
    assert found.rule == "pareto_welfare" and found.key in found.pareto


@pytest.mark.parametrize("rule", RULES)
@settings(max_examples=60)
@given(TENTHS, TENTHS, ALLOWED)
def test_what_stands_in_a_closed_cell_changes_nothing(rule, tenths, others, allowed):
    allowed_UA = np.array(allowed).reshape(2, 3)
    mixed_UAP = np.where(allowed_UA[:, :, None], as_game(tenths), 1000 * as_game(others))
    assert decide(mixed_UAP, rule, allowed_UA).cell == oracle(tenths, rule, allowed)


@pytest.mark.parametrize("rule", RULES)
@settings(max_examples=60)
@given(TENTHS, st.permutations(range(3)))
def test_the_order_of_the_actions_decides_nothing_but_full_ties(rule, tenths, order):
    payoff_UAP = as_game(tenths)
    assume(len({tuple(cell) for cell in payoff_UAP.reshape(6, 2).tolist()}) == 6)
    turned = payoff_UAP[:, list(order)]
    chosen, again = decide(payoff_UAP, rule).cell, decide(turned, rule).cell
    assert payoff_UAP.reshape(6, 2)[chosen].tolist() == turned.reshape(6, 2)[again].tolist()


@pytest.mark.parametrize("rule", RULES)
def test_a_batch_of_games_is_a_vmap_traced_once(rule):
    rng, traces = np.random.default_rng(3), []

    @jax.jit
    def batched(payoff_BUAP, allowed_BUA):
        traces.append(None)
        return jax.vmap(lambda game, allowed: choose(game, rule, allowed))(payoff_BUAP, allowed_BUA)

    for _ in range(2):
        tenths_BI, allowed_BI = rng.integers(-9, 10, (32, 12)), rng.random((32, 6)) < 0.7
        allowed_BI[:, 4] = True
        found = batched(as_games(tenths_BI), allowed_BI.reshape(32, 2, 3))
        assert found.dtype == np.int32
        rows = zip(tenths_BI.tolist(), allowed_BI.tolist(), strict=True)
        assert found.tolist() == [oracle(tenths, rule, allowed) for tenths, allowed in rows]
    assert len(traces) == 1


def as_games(tenths_BI):
    return tenths_BI.reshape(-1, 2, 3, 2) / 10


def test_the_rules_disagree_where_their_ideas_do():
    # (LLM, user):    VQ_DA     VQ_CQ     VQ_AQ      DQ_DA     DQ_CQ     DQ_AQ
    cells = np.array([[8, 1.5], [3, 3.5], [7, 2.25], [0, 0.5], [1, 3.0], [9, 0.0]])
    payoff_UAP = cells.reshape(2, 3, 2)
    # Sums: 9.5, 6.5, 9.25, 0.5, 4, 9. Products of gains over (0, 0): 12, 10.5, 15.75, 0, 3, 0.
    # Smaller ones: 1.5, 3, 2.25, 0, 1, 0. The user answers DA, CQ and AQ in the VQ row: 8, 3, 7.
    assert {rule: decide(payoff_UAP, rule).key for rule in RULES} == {
        "pareto_welfare": "VQ_DA", "utilitarian": "VQ_DA", "nash_product": "VQ_AQ",
        "egalitarian": "VQ_CQ", "stackelberg": "VQ_DA",
    }


def test_a_product_of_two_losses_is_no_gain():
    # Taken as they are, (-4) * (-5) = 20 would beat 3 * 4.
    payoff_UAP = np.array([[[-4, -5], [3, 4], [1, 1]], [[0, 0], [1, 0], [0, 1]]], float)
    assert decide(payoff_UAP, "nash_product").key == "VQ_CQ"


def test_equal_products_tie_although_decimals_round():
    # 0.3 * 0.3 = 0.1 * 0.9; in float32 the first comes out larger. The second has the larger sum.
    payoff_UAP = np.zeros((2, 3, 2))
    payoff_UAP[0, 1], payoff_UAP[1, 0] = [0.3, 0.3], [0.1, 0.9]
    first, second = np.float32(payoff_UAP[0, 1]).prod(), np.float32(payoff_UAP[1, 0]).prod()
    assert first > second + np.float32(game.TOLERANCE)
    assert jitted("nash_product")(np.float32(payoff_UAP)) == 3
    assert decide(payoff_UAP, "nash_product").key == "DQ_DA"


def test_the_leader_gives_up_what_its_follower_would_not_play():
    # DQ_AQ pays the LLM 9, but to AQ the user answers VQ, which pays it 1: DA is worth 4.
    payoff_UAP = np.array([[[4, 2], [3, 2], [1, 5]], [[0, 0], [3, 2], [9, 4]]], float)
    found = decide(payoff_UAP, "stackelberg")
    assert found.key == "VQ_DA"
    assert found.reasons == (
        "Pareto set: VQ_AQ, DQ_AQ.",
        "Among them the user's best replies: VQ_DA, VQ_CQ, VQ_AQ, DQ_CQ.",
        "VQ_DA has the largest LLM, 4, before VQ_CQ with 3.",
    )


def test_the_reasons_name_the_set_the_winner_and_the_runner_up():
    payoff_UAP = np.array([[[2, 2], [3, 4], [1, 1]], [[6.5, 2], [1, 0], [0, 1]]])
    found = decide(payoff_UAP)
    assert (found.cell, found.key, found.action) == (3, "DQ_DA", "DA")
    assert found.pareto == ("VQ_CQ", "DQ_DA") and found.open == KEYS
    assert found.reasons == (
        "Pareto set: VQ_CQ, DQ_DA.",
        "DQ_DA has the largest LLM + user, 8.5, before VQ_CQ with 7.",
    )
    only = decide(payoff_UAP, allowed_UA=np.array([[1, 1, 1], [0, 0, 0]]))
    assert only.reasons == (
        "Pareto set: VQ_CQ, DQ_DA.", "Open cells: VQ_DA, VQ_CQ, VQ_AQ.",
        "Among them the Pareto set: VQ_CQ.", "VQ_CQ is the only candidate.",
    )
    assert only.open == KEYS[:3]


def test_the_reasons_of_a_tie_go_on_to_what_breaks_it():
    payoff_UAP = np.zeros((2, 3, 2))
    payoff_UAP[0, 1], payoff_UAP[1, 0] = [5, 3], [4, 4]
    assert decide(payoff_UAP).reasons[1:] == (
        "VQ_CQ, DQ_DA tie at LLM + user 8.",
        "DQ_DA has the largest user, 4, before VQ_CQ with 3.",
    )
    level = decide(np.full((2, 3, 2), -1.5))
    assert level.key == "VQ_DA"
    assert level.reasons[-1] == "Both sides get the same from them: VQ_DA is the first."


@pytest.mark.parametrize("rule", RULES)
@settings(max_examples=60)
@given(TENTHS, ALLOWED)
def test_the_reasons_say_nothing_that_is_not_so(rule, tenths, allowed):
    """The numbers of the last comparison, read back from the text, hold for the cells named."""
    payoff_UAP, allowed_UA = as_game(tenths), np.array(allowed).reshape(2, 3)
    found = decide(payoff_UAP, rule, allowed_UA)
    assert found.key == KEYS[found.cell] and found.action == ACTIONS[found.cell % 3]
    cells = dict(zip(KEYS, payoff_UAP.reshape(6, 2), strict=True))
    worst = payoff_UAP[allowed_UA].min(0)
    measure = {
        "LLM + user": lambda key: cells[key].sum(),
        "LLM": lambda key: cells[key][LLM],
        "user": lambda key: cells[key][USER],
        "smaller payoff": lambda key: cells[key].min(),
        "product of gains": lambda key: (cells[key] - worst).prod(),
    }
    pattern = r"(\w+) has the largest ([\w+ ]+), (\S+), before (\w+) with (\S+)\."
    for reason in found.reasons:
        compared = re.fullmatch(pattern, reason)
        if compared:
            winner, label, high, other, low = compared.groups()
            assert winner == found.key and other in found.open
            assert abs(measure[label](winner) - float(high)) < 1e-9
            assert abs(measure[label](other) - float(low)) < 1e-9 and float(low) < float(high)
    assert found.key in found.reasons[-1]


def test_what_is_no_game_is_refused():
    square = np.zeros((2, 3, 2))
    for arguments, said in (
        ((square, "maximin"), "rule is 'maximin'; allowed are pareto_welfare, utilitarian"),
        ((np.zeros((3, 2, 2)),), "2 x 3 x 2"),
        ((np.full((2, 3, 2), np.nan),), "finite"),
        ((square, "egalitarian", np.zeros((2, 3), bool)), "at least one of them true"),
        ((square, "egalitarian", np.ones(6, bool)), "2 x 3 truth values"),
    ):
        with pytest.raises(ValueError, match=re.escape(said)):
            decide(*arguments)


def test_every_rule_takes_a_cell_on_the_pareto_set_but_the_leaders():
    rng = np.random.default_rng(4)
    for rule, tenths in itertools.product(RULES, rng.integers(-30, 31, (40, 12))):
        found = decide(as_game(tenths.tolist()), rule)
        assert rule == "stackelberg" or found.key in found.pareto
