"""From completions to the mutual-welfare reward (paper sections 4 and 5).

    text -> Chain -> judge -> (payoff_BUAP, measurements_B)     host
         -> factors -> U, L -> welfare                          one jitted function

A completion without a readable matrix or without a response scores 0, and nobody is asked about it;
so does one without `<analyze>` where consistency counts. A completion whose judge failed is
*missing*: `valid` is False, its numbers are placeholders, and it must be left out of everything.

The jitted part runs in float64 on the host's processor: a payoff of 0.9 against 1.0 is on one side
of the 10 % mark of matrix quality in float64 and on the other in float32.
"""

import contextlib
import functools
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Literal

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from gtalign_jax.data.prompt import Prompt
from gtalign_jax.game import chain as chain_lib
from gtalign_jax.game import payoff as game
from gtalign_jax.game import welfare
from gtalign_jax.reward import factors as factors_lib
from gtalign_jax.reward import questions, tasks
from gtalign_jax.reward.factors import LLMWeights, UserWeights
from gtalign_jax.reward.judges import Judge, Judgement

_READ: dict[str, Callable[[str], chain_lib.Chain]] = {
    "tagged": chain_lib.parse, "none": chain_lib.plain,
}


@dataclass(frozen=True)
class RewardConfig:
    """How factors become the reward; the defaults are the paper's.

    Attributes:
      welfare: a key of `game.welfare.AGGREGATIONS`. rho: exponent of "ces".
      consistency: does `<analyze>` follow from the matrix? "none" (no weight), "solver" (checked
        by our solver) or "judge"; with one of the latter two `llm_consistent` replaces `llm`.
      reasoning: what a completion must be: "tagged" (the four blocks) or "none", the baseline
        without them: the bare response. Then format, matrix quality and consistency are not
        earned, nothing is waited for, and all weights stay as they are. As `data.reasoning`.
      math: for the sources measured by mathematics: "equivalence" (math-verify), "judge", or
        "fallback": the judge where math-verify does not settle it.
      tasks: import paths "module:NAME" of tasks of your own (`reward.tasks.Task`).
      user, llm, llm_consistent: weights. floor: added to both utilities.
      reading_words, verbosity_words: windows [low, high]; slope: of their edges, per word.
      latency_chars: characters before the response that cost the user a factor e.
    """

    welfare: Literal["cobb_douglas", "linear", "user", "llm", "ces"] = "cobb_douglas"
    rho: float = 0.0
    consistency: Literal["none", "solver", "judge"] = "none"
    reasoning: Literal["tagged", "none"] = "tagged"
    math: Literal["equivalence", "judge", "fallback"] = "equivalence"
    tasks: tuple[str, ...] = ()
    user: UserWeights = UserWeights()
    llm: LLMWeights = LLMWeights()
    llm_consistent: LLMWeights = LLMWeights(0.35, 0.2, 0.2, 0.05, 0.2)
    floor: float = 1e-4
    reading_words: tuple[float, float] = (20.0, 500.0)
    verbosity_words: tuple[float, float] = (500.0, 1000.0)
    slope: float = 0.005
    latency_chars: float = 500.0

    def __post_init__(self):
        """Refuses values that no formula has a meaning for, naming key, value and choices."""
        allowed = {
            "welfare": tuple(welfare.AGGREGATIONS),
            "consistency": ("none", "solver", "judge"),
            "reasoning": tuple(_READ),
            "math": ("equivalence", "judge", "fallback"),
        }
        for name, choices in allowed.items():
            if getattr(self, name) not in choices:
                raise ValueError(
                    f"reward.{name}={getattr(self, name)!r}; allowed: {', '.join(choices)}"
                )
        if self.reasoning == "none" and self.consistency != "none":
            raise ValueError(
                f"reward.consistency={self.consistency!r} with reward.reasoning='none': there is "
                "no analysis to be consistent; allowed: none"
            )
        names = [tasks.imported(path).name for path in self.tasks]
        if len(set(names)) < len(names):
            raise ValueError(f"reward.tasks={self.tasks}: two tasks of one name: {names}")
        if math.isnan(self.rho):
            raise ValueError("reward.rho is NaN; any other number is allowed, infinities too")
        if self.latency_chars <= 0:
            raise ValueError(f"reward.latency_chars={self.latency_chars} must be positive")


@dataclass(frozen=True)
class Scores:
    """Rewards of B completions and all that went into them; numpy arrays on the host.

    Attributes:
      reward_B, user_welfare_B, llm_welfare_B: float64; 0 where a chain is unusable or not valid.
      valid_B: False where a judge failed: leave the row out, its 0 means nothing.
      parsed_B: the payoff matrix was readable. payoff_BUAP: it, 0 where not.
      factors: by name (`factors.NAMES`), [B]; all 0 on rows scored 0. `consistency` is the
        solver's where it has no weight.
      game: solver's metrics of the matrices [B]: dilemma, nash_count, price_of_anarchy and
        recommended (index into `chain.KEYS`); NaN where unreadable or undefined: use nanmean.
      chains: the parsed texts. pareto: their Pareto sets, as keys (empty where unreadable).
      judgements, consistency_judgements: what the judge said, None where it was not asked.
      components: parts of the raw score that tasks declare, by name, [B]; NaN where there is none.
    """

    reward_B: np.ndarray
    user_welfare_B: np.ndarray
    llm_welfare_B: np.ndarray
    valid_B: np.ndarray
    parsed_B: np.ndarray
    payoff_BUAP: np.ndarray
    factors: dict[str, np.ndarray]
    game: dict[str, np.ndarray]
    chains: list[chain_lib.Chain]
    pareto: list[tuple[str, ...]]
    judgements: list[Judgement | None]
    consistency_judgements: list[Judgement | None] = field(default_factory=list)
    components: dict[str, np.ndarray] = field(default_factory=dict)


@flax.struct.dataclass
class _Measured:
    """What the host has counted and judged, [B] each."""

    payoff_BUAP: np.ndarray
    scorable: np.ndarray  # bool: the chain is usable and every judge answered
    q_user: np.ndarray
    q_llm: np.ndarray
    answer: np.ndarray
    consistency: np.ndarray
    format: np.ndarray
    response_words: np.ndarray
    prefix_chars: np.ndarray
    words: np.ndarray


def score(
    prompts: Sequence[Prompt],
    texts: Sequence[str],
    judge: Judge,
    cfg: RewardConfig,
    given: Sequence[Mapping[str, float]] | None = None,
) -> Scores:
    """Scores completion `texts[i]` of `prompts[i]`.

    Args:
      judge: asked once, with all requests of the batch.
      given: for each row raw scores that are already known, by kind of request ("quality",
        "consistency"); these are not asked for.

    Raises ValueError for lengths that differ or an unknown data source.
    """
    given = given or [{}] * len(texts)
    if not len(prompts) == len(texts) == len(given):
        raise ValueError(f"{len(prompts)} prompts, {len(texts)} texts, {len(given)} given scores")
    all_tasks = [tasks.task_of(prompt.data_source, cfg.tasks) for prompt in prompts]
    chains = [_READ[cfg.reasoning](text) for text in texts]
    parsed_B = np.array([chain.payoff is not None for chain in chains], bool)
    payoff_BUAP, solution, pareto = _play(chains)
    usable_B = np.array([_is_usable(chain, cfg) for chain in chains], bool)
    kinds = questions.KINDS if cfg.consistency == "judge" else ("quality",)
    asked = questions.ask(prompts, all_tasks, chains, pareto, usable_B, kinds)
    found = questions.answer(asked, given, judge, cfg.math)
    quality, consistency = found["quality"], found["consistency"]
    qualities = questions.qualities(all_tasks, prompts, chains, quality)
    valid_B = np.array([not questions.failed(q) and not questions.failed(c)
                        for q, c in zip(quality, consistency, strict=True)], bool)
    measured = _measure(texts, chains, pareto, qualities, consistency, payoff_BUAP,
                        usable_B & valid_B)
    user_B, llm_B, reward_B, factors = _on_host(functools.partial(_reward, cfg), measured)
    return Scores(
        reward_B=reward_B,
        user_welfare_B=user_B,
        llm_welfare_B=llm_B,
        valid_B=valid_B,
        parsed_B=parsed_B,
        payoff_BUAP=payoff_BUAP,
        factors=factors,
        game=_game_metrics(solution, parsed_B),
        chains=chains,
        pareto=pareto,
        judgements=quality,
        consistency_judgements=consistency,
        components=_components(cfg, quality),
    )


def _play(
    chains: Sequence[chain_lib.Chain],
) -> tuple[np.ndarray, game.Solution, list[tuple[str, ...]]]:
    """(payoff_BUAP with 0 for unreadable ones, its solution, Pareto sets as keys)."""
    payoff_BUAP = np.zeros((len(chains), 2, 3, 2))
    for row, chain in enumerate(chains):
        if chain.payoff_UAP is not None:
            payoff_BUAP[row] = chain.payoff_UAP
    solution = _on_host(_solve, payoff_BUAP)
    pareto = [
        tuple(itertools.compress(chain_lib.KEYS, mask_UA.reshape(-1))) if chain.payoff else ()
        for mask_UA, chain in zip(solution.pareto_UA, chains, strict=True)
    ]
    return payoff_BUAP, solution, pareto


def _is_usable(chain: chain_lib.Chain, cfg: RewardConfig) -> bool:
    return chain.error is None and (cfg.consistency == "none" or chain.analyze is not None)


def _measure(
    texts, chains, pareto, qualities, consistency, payoff_BUAP, scorable_B
) -> _Measured:
    rows = np.flatnonzero(scorable_B)
    counted = []
    for row in rows.tolist():
        chain = chains[row]
        if consistency[row] is not None:
            consistent = min(max(consistency[row].score, 0.0), 1.0)
        else:
            consistent = factors_lib.consistency_by_solver(chain.analyze or "", pareto[row])
        words = len(chain.response.split())
        # A long response is not taken apart twice: a word stands for it in the whole text.
        rest = texts[row].replace(chain.response, "x", 1) if words else texts[row]
        counted.append((*qualities[row], consistent, chain.format_ok, words, len(chain.prefix),
                        len(rest.split()) + max(words - 1, 0)))
    counts = np.zeros((len(texts), 8))
    counts[rows] = np.array(counted, np.float64).reshape(-1, 8)
    q_user, q_llm, answer, consistent, is_format, response_words, prefix_chars, words = counts.T
    return _Measured(
        payoff_BUAP=payoff_BUAP, scorable=scorable_B, q_user=q_user, q_llm=q_llm, answer=answer,
        consistency=consistent, format=is_format, response_words=response_words,
        prefix_chars=prefix_chars, words=words,
    )  # fmt: skip


def _components(cfg: RewardConfig, quality: Sequence[Judgement | None]) -> dict[str, np.ndarray]:
    """Of all tasks in the config: the names must not depend on the rows of a batch."""
    nan = float("nan")
    return {
        name: np.array([nan if q is None else q.components.get(name, nan) for q in quality])
        for name in tasks.component_names(cfg.tasks)
    }


@jax.jit
def _solve(payoff_BUAP: jax.Array) -> game.Solution:
    return jax.vmap(game.solve)(payoff_BUAP)


@functools.partial(jax.jit, static_argnums=0)
def _reward(
    cfg: RewardConfig, m: _Measured
) -> tuple[jax.Array, jax.Array, jax.Array, dict[str, jax.Array]]:
    """(U_B, L_B, reward_B, every factor), 0 on rows that cannot be scored."""
    factors = {
        "q_user": m.q_user,
        "q_llm": m.q_llm,
        "answer": m.answer,
        "reading": factors_lib.length_window(m.response_words, *cfg.reading_words, cfg.slope),
        "latency": factors_lib.latency(m.prefix_chars, cfg.latency_chars),
        "format": m.format,
        "matrix_quality": jax.vmap(factors_lib.matrix_quality)(m.payoff_BUAP),
        "verbosity": factors_lib.length_window(m.words, *cfg.verbosity_words, cfg.slope),
        "consistency": m.consistency,
    }
    factors = {name: jnp.where(m.scorable, value, 0.0) for name, value in factors.items()}
    llm_weights = cfg.llm if cfg.consistency == "none" else cfg.llm_consistent
    user_B, llm_B = factors_lib.utilities(factors, cfg.user, llm_weights, cfg.floor)
    user_B = jnp.where(m.scorable, user_B, 0.0)
    llm_B = jnp.where(m.scorable, llm_B, 0.0)
    reward_B = welfare.aggregate(user_B, llm_B, cfg.welfare, cfg.rho)
    return user_B, llm_B, jnp.where(m.scorable, reward_B, 0.0), factors


def _game_metrics(solution: game.Solution, parsed_B: np.ndarray) -> dict[str, np.ndarray]:
    metrics = {
        "dilemma": solution.dilemma,
        "nash_count": solution.nash_count,
        "price_of_anarchy": solution.price_of_anarchy,
        "recommended": solution.recommended,
    }
    return {
        name: np.where(parsed_B, value_B.astype(np.float64), np.nan)
        for name, value_B in metrics.items()
    }


def _on_host(function: Callable, rows):
    """`function` of arrays with B rows, in float64 on the host, as numpy with B rows.

    B is padded to a power of two: a batch of another size must not mean another compilation.
    """
    count = jax.tree.leaves(rows)[0].shape[0]
    size = _padded_size(count)
    padded = jax.tree.map(
        lambda x: np.pad(x, [(0, size - count)] + [(0, 0)] * (x.ndim - 1)), rows
    )
    with jax.enable_x64(True), _host_device():
        out = jax.device_get(function(padded))
    return jax.tree.map(lambda x: np.asarray(x)[:count], out)


def _padded_size(count: int) -> int:
    return 1 << max(count - 1, 0).bit_length()


def lower(cfg: RewardConfig, count: int) -> dict[str, jax.stages.Lowered]:
    """The jitted functions that `score` calls for `count` completions, lowered for the host."""
    B = _padded_size(count)
    with jax.enable_x64(True), _host_device():
        number_B = jax.ShapeDtypeStruct((B,), jnp.float64)
        payoff_BUAP = jax.ShapeDtypeStruct((B, 2, 3, 2), jnp.float64)
        rows = {entry.name: number_B for entry in fields(_Measured)}
        rows |= {"payoff_BUAP": payoff_BUAP, "scorable": jax.ShapeDtypeStruct((B,), jnp.bool_)}
        return {
            "games": _solve.lower(payoff_BUAP),
            "reward": _reward.lower(cfg, _Measured(**rows)),
        }


@contextlib.contextmanager
def _host_device() -> Iterator[None]:
    try:
        device = jax.local_devices(backend="cpu")[0]
    except RuntimeError:  # JAX_PLATFORMS names the accelerator alone; it emulates float64
        yield
        return
    with jax.default_device(device):
        yield
