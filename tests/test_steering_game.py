"""One game under prices: the edited text, the decision, what a rising price may and may not do."""

import dataclasses
import json

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from gtalign_jax.game import chain
from gtalign_jax.game.decide import RULES, decide
from gtalign_jax.game.pricing import Pricing, Usage, read, reprice
from gtalign_jax.game.steering import SteeringConfig, describe, solve, steer

# A cent per request of either side: DA costs one, CQ two, AQ one. With 100 points per dollar the
# user loses 1, 2, 1 and the LLM nothing.
USAGE = Usage(input=(0, 0, 0), output=(50, 110, 70), requests=(1, 2, 1))
CENT = read("given:user_request=-0.01")
CONFIG = SteeringConfig(CENT, USAGE, sensitivity=(100.0, 100.0))
COMPACT = (
    '{"VQ_DA":{"LLM":3,"user":2},"VQ_CQ":{"LLM":4,"user":2.5},"VQ_AQ":{"LLM":1,"user":2},'
    '"DQ_DA":{"LLM":1,"user":2},"DQ_CQ":{"LLM":0,"user":2},"DQ_AQ":{"LLM":3.0,"user":1}}'
)
EDITED = (
    '{"VQ_DA":{"LLM":3,"user":1},"VQ_CQ":{"LLM":4,"user":0.5},"VQ_AQ":{"LLM":1,"user":1},'
    '"DQ_DA":{"LLM":1,"user":1},"DQ_CQ":{"LLM":0,"user":0},"DQ_AQ":{"LLM":3.0,"user":0}}'
)


def completion(block, joint=""):
    return f"<thinking>Which one?</thinking>{joint}<payoff>{block}</payoff>"


def with_rule(rule="pareto_welfare", config=CONFIG, **changes):
    return dataclasses.replace(config, rule=rule, **changes)


def per_token(price, usage, **changes):
    how = read({"policy": "per_token", "output": price})
    return SteeringConfig(how, usage, **changes)


def test_the_edited_matrix_takes_the_place_of_the_written_one_up_to_the_answer():
    steered = steer(completion(COMPACT), dataclasses.replace(CONFIG, pricing=read("none")))
    assert steered.forced is None and steered.before.key == steered.after.key == "VQ_CQ"
    steered = steer(completion(COMPACT), CONFIG)
    # VQ_CQ: 6.5 - 2 = 4.5; VQ_DA: 5 - 1 = 4.
    assert steered.after.key == "VQ_CQ"
    tail = "</payoff><analyze>VQ_CQ is best.</analyze><response>"
    assert steered.forced == EDITED + tail
    twice = steer(completion(COMPACT), dataclasses.replace(CONFIG, sensitivity=(100.0, 200.0)))
    # VQ_CQ: 6.5 - 4 = 2.5; VQ_DA: 5 - 2 = 3.
    assert twice.before.key == "VQ_CQ" and twice.after.key == "VQ_DA"
    assert twice.forced.endswith("</payoff><analyze>VQ_DA is best.</analyze><response>")
    alone = steer(completion(COMPACT), dataclasses.replace(CONFIG, mode="matrix"))
    assert alone.forced == EDITED + "</payoff>"


@pytest.mark.parametrize("joint", ["", "\n", "\n\n", " "])
def test_the_white_space_between_the_blocks_is_the_models_own(joint):
    forced = steer(completion(f"\n{COMPACT}\n", joint), CONFIG).forced
    assert forced == (
        f"\n{EDITED}\n</payoff>{joint}<analyze>VQ_CQ is best.</analyze>{joint}<response>"
    )
    whole = completion("X", joint).partition("X")[0] + forced + "Which day?</response>"
    assert chain.parse(whole).format_ok


def test_a_page_of_white_space_is_not_repeated_nor_is_what_is_none():
    for text in (completion(COMPACT, "\n" * 5000), "\n\n" + f"<payoff>{COMPACT}</payoff>"):
        assert steer(text, CONFIG).forced.startswith(EDITED + "</payoff><analyze>")


def styled(payoff_UAP):
    """The same matrix in the notations that `chain.parse` reads."""
    matrix = chain.payoff_dict(payoff_UAP)
    turned = {key: {"user": cell["user"], "LLM": cell["LLM"]} for key, cell in matrix.items()}
    return {
        "spaced": json.dumps(matrix),
        "compact": json.dumps(matrix, separators=(",", ":")),
        "pages": json.dumps(dict(reversed(turned.items())), indent=2),
        "python": repr(turned).replace("}}", ",},}"),
        "curly": json.dumps(matrix).replace('{"', "{“").replace('":', "”:"),
        "decimals": json.dumps({k: dict(zip(c, map(float, c.values()), strict=True))
                                for k, c in matrix.items()}),
    }


def test_the_notation_of_the_written_matrix_is_kept():
    payoff_UAP = np.arange(12.0).reshape(2, 3, 2)
    edited_UAP = payoff_UAP.copy()
    edited_UAP[0, 0, 1], edited_UAP[1, 2, 0] = -2.5, 7.25
    for style, block in styled(payoff_UAP).items():
        straight = block.translate({ord("“"): '"', ord("”"): '"'})
        point = ".0" if style == "decimals" else ""
        one, ten = (
            straight.index(f"{number}{point}", straight.index(key))
            for key, number in (("VQ_DA", "1"), ("DQ_AQ", "10"))
        )
        short = {one: ("1" + point, "-2.5"), ten: ("10" + point, "7.25")}
        expected = straight
        for start in sorted(short, reverse=True):
            old, new = short[start]
            expected = expected[:start] + new + expected[start + len(old) :]
        assert chain.rewrite(block, edited_UAP) == expected, style


def test_a_notation_that_cannot_be_followed_is_written_anew():
    escaped = COMPACT.replace("VQ_DA", "VQ\\u005fDA")
    written_UAP = chain.parse(completion(escaped)).payoff_UAP
    assert chain.rewrite(escaped, written_UAP + 0.5) == (
        chain.payoff_json(written_UAP + 0.5).replace(" ", "")
    )
    spaced = escaped.replace(":", ": ")
    assert chain.rewrite(spaced, written_UAP + 0.5) == chain.payoff_json(written_UAP + 0.5)
    # Of a key that stands twice the last one counts, and both are written.
    double = COMPACT.replace('"VQ_DA"', '"VQ_DA":{"LLM":9,"user":9},"VQ_DA"', 1)
    rewritten = chain.rewrite(double, written_UAP + 0.5)
    assert (chain.parse(completion(rewritten)).payoff_UAP == written_UAP + 0.5).all()


MATRICES = st.lists(
    st.integers(-3, 9) | st.integers(-50, 50).map(lambda n: n / 10) | st.floats(-5, 5),
    min_size=12, max_size=12,
).map(lambda values: np.array(values, np.float64).reshape(2, 3, 2))
USAGES = st.builds(Usage, *[st.tuples(*[st.integers(0, 900)] * 3)] * 2)


@settings(max_examples=150)
@given(
    MATRICES, USAGES, st.sampled_from(sorted(RULES)), st.floats(0, 500),
    st.sampled_from(["played", "all"]), st.integers(0, 3),
    st.sampled_from(["spaced", "compact", "pages", "python", "curly", "decimals"]),
)
def test_what_is_written_is_what_was_decided_on(g, usage, rule, price, rows, decimals, style):
    config = per_token(price, usage, rule=rule, rows=rows, decimals=decimals)
    steered = steer(completion(styled(g)[style]), config)
    np.testing.assert_array_equal(steered.written_UAP, g)
    if steered.forced is None:
        np.testing.assert_array_equal(steered.edited_UAP, g)
        assert steered.after.cell == steered.before.cell
        return
    again = chain.parse(f"<payoff>{steered.forced}x</response>")
    np.testing.assert_array_equal(again.payoff_UAP, steered.edited_UAP)
    allowed_UA = np.array([key in steered.after.open for key in chain.KEYS]).reshape(2, 3)
    exact_UAP = reprice(
        g, usage.array_AX, config.pricing.rates_XP, np.array(config.sensitivity)
    )
    for payoff_UAP in (again.payoff_UAP, exact_UAP):
        assert decide(payoff_UAP, rule, allowed_UA).cell == steered.after.cell
    assert np.abs(exact_UAP - steered.edited_UAP).max() <= 0.5001 * 10.0**-decimals
    assert f"<analyze>{steered.after.key} is best.</analyze>" in steered.forced


def ladder(written_UAP, usage, prices, **changes):
    """The chosen action's output tokens at each price."""
    chosen = [solve(written_UAP, per_token(price, usage, **changes)).after for price in prices]
    return [usage.output[chain.ACTIONS.index(decision.action)] for decision in chosen]


@settings(max_examples=120)
@given(
    MATRICES, USAGES, st.sampled_from(["played", "all"]), st.sampled_from([-1e6, 0.0, 3.0]),
    st.floats(0, 300), st.floats(0, 300),
)
def test_a_rising_price_only_ever_hands_over_to_what_uses_less(g, usage, rows, floor, llm, more):
    prices = (0, 0.1, 1, 3, 7, 12, 20, 45, 100, 400, 5000)
    found = ladder(g, usage, prices, rows=rows, floor=floor, sensitivity=(llm, llm + more))
    assert found == sorted(found, reverse=True)


def test_prices_of_zero_to_very_dear_lead_to_the_shortest_action():
    found = ladder(np.array([[[4, 4], [5, 5], [4, 3]], [[0, 0]] * 3]), USAGE, (0, 30, 1000))
    assert found[0] == 110 and found[-1] == 50


def test_a_decision_on_rounded_payoffs_would_swing_back():
    """Why the decision is taken on exact values: this game goes back and forth otherwise."""
    written_UAP = np.array(
        [[[0.4, 0.7], [0.9, -0.2], [0.3, -0.3]], [[-0.4, 0.5], [-0.5, 0.5], [0.7, -0.3]]]
    )
    usage, prices = Usage(input=(207, 124, 269), output=(273, 177, 172)), (0, 1, 2, 5, 7, 10, 14)
    rounded = []
    for price in prices:
        config = per_token(price, usage)
        exact_UAP = reprice(
            written_UAP, usage.array_AX, config.pricing.rates_XP, np.array(config.sensitivity)
        )
        cell = decide(np.round(exact_UAP, 1), allowed_UA=np.array([[1, 1, 1], [0, 0, 0]])).cell
        rounded.append(usage.output[cell % 3])
    assert rounded != sorted(rounded, reverse=True)
    found = ladder(written_UAP, usage, prices)
    assert found == sorted(found, reverse=True)


def test_more_decimals_are_written_only_where_one_would_show_another_winner():
    # LLM + user: 5 against 5 as written; CQ then loses 0.02 and DA 0.01, which one decimal hides.
    written_UAP = np.array([[[2, 3], [2, 3], [0, 0]], [[0, 0]] * 3], float)
    small = dataclasses.replace(CONFIG, sensitivity=(1.0, 1.0))
    kept = solve(written_UAP, small)
    assert kept.after.key == kept.before.key == "VQ_DA"
    assert (kept.edited_UAP == written_UAP).all()  # the first wins the tie anyway: one decimal
    turned = solve(written_UAP[:, [1, 0, 2]], dataclasses.replace(
        small, usage=Usage((0, 0, 0), (9, 9, 9), requests=(2, 1, 1))
    ))
    assert turned.before.key == "VQ_DA" and turned.after.key == "VQ_CQ"
    assert turned.edited_UAP[0, :2, 1].tolist() == [2.98, 2.99]


def test_what_the_model_wrote_keeps_its_own_decimals():
    written_UAP = np.full((2, 3, 2), 1.2345678)
    edited_UAP = solve(written_UAP, CONFIG).edited_UAP
    assert edited_UAP[0].tolist() == [[1.2345678, 0.2345678], [1.2345678, -0.7654322],
                                      [1.2345678, 0.2345678]]
    # In binary 2.3 - 1 is 1.2999999999999998: what is written is 1.3.
    assert solve(np.full((2, 3, 2), 2.3), CONFIG).edited_UAP[0, 0].tolist() == [2.3, 1.3]
    third_UAP = np.full((2, 3, 2), 1 / 3)  # sixteen digits, and no money: none of them is touched
    assert (solve(third_UAP, with_rule(pricing=read("none"))).edited_UAP == third_UAP).all()


def test_prices_do_not_change_how_the_question_was_asked():
    # As written VQ_CQ (9) is best. Two points less for CQ and one for DA: it falls to 7, VQ_DA to
    # 6, DQ_DA to 7.5.
    written_UAP = np.array([[[4, 3], [4, 5], [0, 0]], [[4, 4.5], [0, 0], [0, 0]]], float)
    played = solve(written_UAP, CONFIG)
    assert played.before.key == "VQ_CQ" and played.after.key == "VQ_CQ"
    assert played.after.open == ("VQ_DA", "VQ_CQ", "VQ_AQ")
    assert played.after.reasons[0] == "The question was read as VQ; prices do not change that."
    free = solve(written_UAP, with_rule(rows="all"))
    assert free.after.key == "DQ_DA" and free.after.open == chain.KEYS


@pytest.mark.parametrize("written, edited", [(3, 2), (3.5, 2.2), (3.25, 1.95)])
def test_the_edited_matrix_has_the_decimals_of_the_model_s_own_numbers(written, edited):
    written_UAP = np.full((2, 3, 2), float(written))
    even = dataclasses.replace(
        CONFIG, usage=Usage((0,) * 3, (1,) * 3, (1,) * 3), sensitivity=(0.0, 1.0),
        pricing=read({"policy": "per_request", "price": 1.3}),
    )
    found = solve(written_UAP, even).edited_UAP
    assert (found[..., 1] == edited).all() and (found[..., 0] == written).all()


def test_another_rule_alone_forces_its_choice_on_the_unchanged_matrix():
    # Egalitarian: VQ_DA (4, 4) instead of VQ_CQ (9, 3).
    block = COMPACT.replace('{"LLM":3,"user":2}', '{"LLM":4,"user":4}').replace(
        '{"LLM":4,"user":2.5}', '{"LLM":9,"user":3}')
    config = with_rule("egalitarian", pricing=read("none"))
    steered = steer(completion(block), config)
    assert steered.forced == f"{block}</payoff><analyze>VQ_DA is best.</analyze><response>"
    assert steer(completion(block), dataclasses.replace(config, mode="matrix")).forced is None


def test_the_analysis_may_name_what_was_solved():
    text = "Pareto: {pareto}. {key} = {user_action} + {action}: {llm} and {user} by {rule}."
    forced = steer(completion(COMPACT), dataclasses.replace(CONFIG, analysis=text)).forced
    assert "Pareto: VQ_DA, VQ_CQ. VQ_CQ = VQ + CQ: 4 and 0.5 by pareto_welfare.<" in (
        forced.replace("</analyze>", "<")
    )


def test_all_of_it_is_described_in_json():
    config = dataclasses.replace(CONFIG, sensitivity=(100.0, 200.0))
    steered = steer(completion(COMPACT), config)
    found = json.loads(json.dumps(describe(steered, config), allow_nan=False))
    assert found["written"] == json.loads(COMPACT)
    assert found["edited"]["VQ_CQ"] == {"LLM": 4, "user": -1.5}
    assert found["pricing"]["name"] == "given(user_request=-0.01)"
    assert found["pricing"]["rates"]["user"] == {"input": 0, "output": 0, "requests": -0.01}
    assert found["money"]["CQ"] == {"LLM": 0, "user": -0.02}
    assert found["usage"]["output"] == [50, 110, 70]
    assert (found["rule"], found["before"]["key"], found["changed"]) == (
        "pareto_welfare", "VQ_CQ", True)
    assert found["decision"]["key"] == "VQ_DA" and found["decision"]["action"] == "DA"
    assert found["decision"]["pareto"] == list(steered.after.pareto)
    assert found["decision"]["reasons"][-1].startswith("VQ_DA has the largest LLM + user, 3,")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"rule": "maximin"}, "rule is 'maximin'; allowed are pareto_welfare"),
        ({"mode": "text"}, "mode is 'text'; allowed are action, matrix"),
        ({"rows": ["all"]}, "rows is \"['all']\"; allowed are played, all"),
        ({"sensitivity": (1.0,)}, "sensitivity must hold two numbers"),
        ({"sensitivity": 3}, "sensitivity must hold two numbers"),
        ({"sensitivity": "ab"}, "sensitivity of LLM is 'a'; allowed are numbers from 0 to 1e+06"),
        ({"sensitivity": [True, 1]}, "sensitivity of LLM is True"),
        ({"floor": "0"}, "floor is '0'"),
        ({"decimals": "1"}, "decimals is 1"),
        ({"sensitivity": (1.0, -1.0)}, "sensitivity of user is -1.0"),
        ({"sensitivity": (float("nan"), 1.0)}, "sensitivity of LLM is nan"),
        ({"floor": float("nan")}, "floor is nan"),
        ({"decimals": 10}, "decimals is 10"),
        ({"analysis": "</analyze>"}, "analysis is '</analyze>'"),
        ({"analysis": "{key.__class__}"}, "fields key, action"),
        ({"analysis": "{key!r}"}, "fields key, action"),
        ({"analysis": "{0}"}, "fields key, action"),
        ({"analysis": "{key:{user}}"}, "fields key, action"),
        ({"analysis": "{key"}, "fields key, action"),
        ({"analysis": "x" * 501}, "500 characters"),
    ],
)
def test_a_config_that_means_nothing_is_refused(changes, said):
    with pytest.raises(ValueError) as caught:
        dataclasses.replace(CONFIG, **changes)
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "no <payoff> block"),
        (completion(COMPACT).removesuffix("</payoff>"), "no <payoff> block"),
        (completion("{" * 100_000), "longer than 20000 characters"),
        (completion("[" * 10_000), "brackets"),
        ("<payoff>" * 100_000, "no <payoff> block"),
        (completion(COMPACT.replace("2.5", "NaN")), "not finite"),
        (completion(COMPACT.replace("2.5", "1e7")), "a written payoff is beyond 1e6"),
        (completion(COMPACT.replace("2.5", "1e308")), "a written payoff is beyond 1e6"),
        (completion(COMPACT.replace("2.5", "9" * 5000)), "neither JSON nor"),
    ],
)
def test_what_cannot_be_steered_is_a_value_error_in_one_line(text, said):
    with pytest.raises(ValueError) as caught:
        steer(text, CONFIG)
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_money_beyond_all_measure_is_a_value_error():
    wild = Pricing("wild", ((0.0, 0.0), (0.0, 0.0), (3e7, -3e7)))
    with pytest.raises(ValueError, match="a repriced payoff is beyond 1e6"):
        steer(completion(COMPACT), dataclasses.replace(CONFIG, pricing=wild))


@st.composite
def damaged(draw):
    """A written matrix with pieces cut out, doubled or put in."""
    text = completion(draw(st.sampled_from([COMPACT, COMPACT.replace('"', "'"), "{}"])))
    for _ in range(draw(st.integers(0, 4))):
        start = draw(st.integers(0, len(text)))
        end = draw(st.integers(start, min(len(text), start + 12)))
        piece = draw(st.sampled_from(
            ["", "{", "}", '"', "“", "-", "1e999", "9" * 4400, "# ", "\\u0041", "<payoff>",
             "</payoff>", " ", "\n", "[7]", "٣", "\ud800", text[start:end] * 2]) | st.text())
        text = text[:start] + piece + text[end:]
    return text


@settings(max_examples=300)
@given(damaged() | st.text())
@example(completion(COMPACT.replace('"LLM":3,', '"LLM":[{"LLM":{"x":1}}],"LLM":3,')))
@example(completion(" " * 30_000 + COMPACT))
def test_any_text_is_steered_or_a_value_error(text):
    try:
        steered = steer(text, CONFIG)
    except ValueError as error:
        assert "\n" not in str(error)
    else:
        again = chain.parse(f"<payoff>{steered.forced}").payoff_UAP
        np.testing.assert_array_equal(again, steered.edited_UAP)
