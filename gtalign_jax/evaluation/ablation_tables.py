"""An ablation's findings as tables and in words: ablation.md, ablation.csv, ablation.json.

    Comparison -> Findings -> files

The tables are the paper's 3 (Pareto measures), 5 (quality, lengths) and 6 (behaviour) in small. A
claim in words is made by the rule of `ablation` alone; what does not meet it is called not shown.
"""

import csv
import dataclasses
import io
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gtalign_jax.evaluation.ablation import Comparison, Contrast, Outcome
from gtalign_jax.evaluation.measures import Measure
from gtalign_jax.evaluation.paired import SIGNIFICANT
from gtalign_jax.evaluation.pareto import EPS
from gtalign_jax.evaluation.tables import markdown_table
from gtalign_jax.training.files import write_whole
from gtalign_jax.training.metrics import jsonable

COLD_START, UNTAGGED, UNTAGGED_COLD = "cold_start", "untagged", "untagged_cold_start"
REFERENCE = "cobb_douglas"
LABELS = {
    COLD_START: "cold start", REFERENCE: "Cobb-Douglas √(U·L)", "linear": "linear (U + L)/2",
    "user": "user only U", "llm": "LLM only L", "rawls": "Rawls min(U, L)",
    UNTAGGED_COLD: "without blocks: cold start", UNTAGGED: "without blocks: √(U·L)",
}
OUTCOME = (
    "social_welfare", "user_welfare", "llm_welfare", "answer", "format", "right_action",
    "reasoning_tokens", "response_tokens", "answer_per_1000_tokens",
)  # fmt: skip
BEHAVIOUR = (
    "asks_when_ambiguous", "asks_when_definite", "constructive", "plain_refusal", "harm",
    "over_refusal",
)  # fmt: skip
# What the paper claims, and what it leaves open: (question, other policy, measure).
QUESTIONS = (
    ("What training adds to the cold start", COLD_START, "social_welfare"),
    ("What training does to the choice of the action", COLD_START, "right_action"),
    ("Product or mean of both welfares", "linear", "social_welfare"),
    ("Product or smaller of both welfares", "rawls", "social_welfare"),
    ("What a user-only reward does to the format", "user", "format"),
    ("What a user-only reward does to the LLM's side", "user", "llm_welfare"),
    ("What a user-only reward does for the user", "user", "user_welfare"),
    ("What a user-only reward does on harmful requests", "user", "harm"),
    ("What an LLM-only reward does to users", "llm", "user_welfare"),
    ("What an LLM-only reward does for the LLM's side", "llm", "llm_welfare"),
    ("What an LLM-only reward does on harmful requests", "llm", "harm"),
    ("What the blocks do for both sides together", UNTAGGED, "bare_social_welfare"),
    ("What the blocks do for the user", UNTAGGED, "user_welfare"),
    ("What the blocks do for the answers", UNTAGGED, "answer"),
    ("What the blocks do for the choice of the action", UNTAGGED, "right_action"),
)
BEFORE_REFERENCE = (COLD_START, UNTAGGED, UNTAGGED_COLD)
BARE = ("bare_social_welfare", "user_welfare", "answer", "right_action", "tokens")


@dataclasses.dataclass(frozen=True)
class Findings:
    """All numbers of an ablation; policies by name.

    Attributes:
      contrasts, pareto: of the reference (first) with each other policy (second).
      prompts, completions: of one evaluation. left_out: prompts that not all runs answered.
      failed: {run: why it has no numbers}.
    """

    reference: str
    seeds: tuple[int, ...]
    prompts: int
    completions: int
    left_out: int
    measures: dict[str, Measure]
    outcomes: dict[str, dict[str, Outcome]]
    contrasts: dict[str, dict[str, Contrast]]
    pareto: dict[str, dict[str, Any]]
    failed: dict[str, str]


def find(comparison: Comparison, failed: Mapping[str, str]) -> Findings:
    """Everything there is to say. Raises ValueError where no trained policy has rows."""
    names = list(comparison.policies)
    trained = [name for name in names if name not in (COLD_START, UNTAGGED_COLD)]
    if not trained:
        raise ValueError("no run of the ablation has been evaluated")
    reference = REFERENCE if REFERENCE in trained else trained[0]
    contrasts = comparison.contrasts(reference, [n for n in names if n != reference])
    rows = next(iter(comparison.policies[reference].values()))
    return Findings(
        reference=reference,
        seeds=tuple(sorted({s for by_seed in comparison.policies.values() for s in by_seed})),
        prompts=len({row["id"] for row in rows}),
        completions=len(rows),
        left_out=comparison.left_out,
        measures=comparison.measures,
        outcomes={name: comparison.outcomes(name) for name in names},
        contrasts=contrasts,
        pareto={
            name: measured for name in contrasts
            if (measured := comparison.pareto(reference, name)) is not None
        },
        failed=dict(failed),
    )


def save(directory: Path, found: Findings) -> None:
    """Writes ablation.md, ablation.csv and ablation.json."""
    write_whole(directory / "ablation.md", markdown(found))
    write_whole(directory / "ablation.csv", csv_text(found))
    write_whole(directory / "ablation.json", json.dumps(as_json(found), indent=2) + "\n")


def label(name: str) -> str:
    return LABELS.get(name, name)


def markdown(found: Findings) -> str:
    """The whole report."""
    many, seeds = len(found.seeds), ", ".join(map(str, found.seeds))
    about = (
        f"Each run was evaluated on the same {found.prompts} held-out prompts, "
        f"{found.completions} completions, with {many} training seed{'s' * (many > 1)} ({seeds}). "
        "Brackets are 95 % intervals by a bootstrap over seeds and prompts at once. "
    )
    if found.left_out:
        about += f"{found.left_out} prompts that not all runs answered are left out. "
    about += (
        "With one seed they say nothing about what another training run would give. "
        if many == 1 else
        f"{many} seeds are few: such intervals are narrow by about a factor "
        f"{math.sqrt((many - 1) / many):.2f} in what the seeds add, and each seed's value stands "
        "below. "
    )
    about += (
        "A difference is called shown where its interval excludes 0, a permutation test "
        f"over the prompts gives p < {SIGNIFICANT} after Holm's adjustment over all comparisons, "
        "and all seeds agree on its sign."
    )
    parts = ["# Ablation of the reward", about, "## In words", *(f"- {s}" for s in words(found))]
    text = "\n\n".join(parts[:3]) + "\n\n" + "\n".join(parts[3:])
    rest = [
        "## Welfare, quality, length", markdown_table(_outcome_cells(found, OUTCOME)),
        "Each seed's value:", markdown_table(_seed_cells(found, OUTCOME)),
        f"## Against {label(found.reference)}",
        "Differences, other minus reference; ✓ where shown.",
        markdown_table(_contrast_cells(found, OUTCOME[:6] + ("tokens",))),
        f"Pareto measures over completions of the same prompt, seed and sample (slack {EPS}):",
        markdown_table(_pareto_cells(found)),
        "## Behaviour", markdown_table(_outcome_cells(found, BEHAVIOUR)),
        markdown_table(_contrast_cells(found, BEHAVIOUR)),
    ]
    if UNTAGGED in found.outcomes:
        rest += [
            "## Without reasoning blocks",
            "The reward √(U·L), but the completion is the bare response: nothing precedes it, and "
            "it cannot earn what format and matrix are worth (0.4 of L with the paper's weights). "
            "So social welfare is given without these two terms as well, for all rewards: L₀ is "
            "what is left of L, rescaled.",
            markdown_table(_outcome_cells(found, BARE)), markdown_table(_seed_cells(found, BARE)),
            markdown_table(_contrast_cells(found, BARE)),
        ]
    if found.failed:
        rest += ["## Runs without numbers",
                 markdown_table([["run", "reason"], *map(list, found.failed.items())])]
    return "\n\n".join([text, *rest]) + "\n"


def words(found: Findings) -> list[str]:
    """What the numbers say about the paper's claims, one sentence each."""
    said = []
    rewards = [n for n in found.outcomes if n not in (COLD_START, UNTAGGED, UNTAGGED_COLD)]
    rewards = [n for n in rewards if math.isfinite(found.outcomes[n]["social_welfare"].value)]
    ranked = sorted(rewards, key=lambda n: -found.outcomes[n]["social_welfare"].value)
    if len(ranked) > 1:
        best = ranked[0]
        # The reference against the best of the others: whichever of both is ahead.
        rival = ranked[1] if best == found.reference else best
        said.append(f"The highest social welfare came out for {label(best)}; against the "
                    f"{'next' if rival == ranked[1] else 'reference'}, "
                    + _claim(found, "social_welfare", rival))
    # The questions are about √(U·L): where that was not trained, only numbers are given.
    for question, other, measure in QUESTIONS if found.reference == REFERENCE else ():
        if other in found.contrasts and math.isfinite(found.contrasts[other][measure].difference):
            said.append(f"{question}: {_claim(found, measure, other)}")
    return said + [f"{name} has no numbers: {reason}" for name, reason in found.failed.items()]


def _claim(found: Findings, measure: str, other: str) -> str:
    """One difference in words, with its verdict."""
    if other not in found.contrasts:
        return f"{label(other)} has no seed in common with {label(found.reference)}."
    c, m = found.contrasts[other][measure], found.measures[measure]
    names = [found.reference, other]
    if other in BEFORE_REFERENCE:  # what the reference adds to it is the question
        c, names = _turned(c), names[::-1]
    seeds = ", ".join(_signed(m, d) for d in c.by_seed.values())
    way = "higher" if c.difference > 0 else "lower"
    verdict = f"**shown: {way}**" if c.shown else "**a difference is not shown**"
    return (
        f"{m.label.strip()} is {m.shown(c.second)} for {label(names[1])} and {m.shown(c.first)} "
        f"for {label(names[0])}, a difference of {_signed(m, c.difference)} "
        f"[{_signed(m, c.low)}, {_signed(m, c.high)}], p {_p(c.p)}, by seed {seeds}: {verdict}."
    )


def _turned(c: Contrast) -> Contrast:
    """The same difference, first - second."""
    return dataclasses.replace(
        c, first=c.second, second=c.first, difference=-c.difference, low=-c.high, high=-c.low,
        by_seed={seed: -d for seed, d in c.by_seed.items()},
    )


def _outcome_cells(found: Findings, names: Sequence[str]) -> list[list[str]]:
    measures = [found.measures[name] for name in names]
    cells = [["reward", *(m.label for m in measures)]]
    for policy, outcomes in found.outcomes.items():
        row = [label(policy)]
        for m in measures:
            o = outcomes[m.name]
            between = f" [{m.shown(o.low)}, {m.shown(o.high)}]" if math.isfinite(o.low) else ""
            row.append(m.shown(o.value) + between)
        cells.append(row)
    return cells


def _seed_cells(found: Findings, names: Sequence[str]) -> list[list[str]]:
    measures = [found.measures[name] for name in names]
    cells = [["reward", *(m.label for m in measures)]]
    for policy, outcomes in found.outcomes.items():
        by_seed = (outcomes[m.name].by_seed for m in measures)
        cells.append([label(policy), *(
            " / ".join(m.shown(values[s]) if s in values else "–" for s in found.seeds)
            for m, values in zip(measures, by_seed, strict=True)
        )])
    return cells


def _contrast_cells(found: Findings, names: Sequence[str]) -> list[list[str]]:
    measures = [found.measures[name] for name in names]
    cells = [["reward", *(m.label for m in measures)]]
    for policy, contrasts in found.contrasts.items():
        row = [label(policy)]
        for m in measures:
            c = contrasts[m.name]
            text = f"{_signed(m, c.difference)} [{_signed(m, c.low)}, {_signed(m, c.high)}]"
            text += f" p {_p(c.p)}" if math.isfinite(c.p) else ""
            row.append((text + " ✓" * c.shown) if math.isfinite(c.difference) else "–")
        cells.append(row)
    return cells


def _pareto_cells(found: Findings) -> list[list[str]]:
    """Both sides' numbers, the reference's first."""
    cells = [[
        "reward", "pairs", "reference dominates", "dominated", "neither", "equal",
        f"{EPS}-coverage", "regret L∞", "hypervolume", "mean √(U·L)",
    ]]
    for policy, p in found.pareto.items():
        counts = p["basic_compare"]
        total = counts["common_count"]
        shares = (counts[key] / total for key in (
            "file1_dominates_file2", "file2_dominates_file1", "incomparable", "equal"))
        both = (p[key] for key in (
            "epsilon_coverage", "avg_regret_Linf", "hypervolume_exact", "NSW_avg"))
        cells.append([label(policy), str(total), *(f"{share:.1%}" for share in shares),
                      *(f"{x['file1']:.3f} / {x['file2']:.3f}" for x in both)])
    return cells


def _signed(measure: Measure, value: float) -> str:
    """A difference in the measure's form, in points for percentages."""
    if not math.isfinite(value):
        return "–"
    text = measure.form.replace("{:", "{:+").format(value * measure.scale)
    return text.replace("%", " pt")


def _p(value: float) -> str:
    return "–" if math.isnan(value) else "< 0.001" if value < 0.001 else f"= {value:.3f}"


def csv_text(found: Findings) -> str:
    """Values and differences, one a line; `seed` "all" has the intervals."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["policy", "against", "measure", "seed", "value", "low", "high", "p", "shown"])
    tables = [("", found.outcomes), (found.reference, found.contrasts)]
    for against, table in tables:
        for policy, measures in table.items():
            for name, x in measures.items():
                is_difference = isinstance(x, Contrast)
                value = x.difference if is_difference else x.value
                tail = (_number(x.p), int(x.shown)) if is_difference else ("", "")
                numbers = map(_number, (value, x.low, x.high))
                writer.writerow([policy, against, name, "all", *numbers, *tail])
                for seed, part in x.by_seed.items():
                    writer.writerow([policy, against, name, seed, _number(part), "", "", "", ""])
    return out.getvalue()


def _number(value: float) -> float | str:
    return value if math.isfinite(value) else ""


def as_json(found: Findings) -> dict[str, Any]:
    """All of it as JSON would hold it, null for NaN; measures by label."""
    whole = {
        field.name: getattr(found, field.name)
        for field in dataclasses.fields(found) if field.name != "measures"
    }
    labels = {name: m.label.strip() for name, m in found.measures.items()}
    return jsonable({**whole, "measures": labels, "words": words(found)})
