"""Compare two policies on the same prompts, from files of scored completions:

    python -m gtalign_jax.compare FIRST.jsonl SECOND.jsonl [--eps=0.05] [--rho=R] [--json=FILE]
        [--first-label=NAME] [--second-label=NAME] [--measures=a,b] [--seed=0] [--resamples=2000]

A row is an object with `id`, `user_welfare` and `llm_welfare`, as `gtalign_jax.score` and
evaluations write them; with `label`, one label of a file is compared (FIRST and SECOND may then be
one file). Rows are matched by (id, sample) where all have a sample, else by id, and several rows of
an id are averaged. `valid` false or a null welfare means missing: such pairs are left out and
counted. Every difference is second - first. Differences treat an id as one observation, the Pareto
measures each matched pair. `social_welfare` is sqrt(U L), added to every row; rewards are compared
only on demand (--measures=reward): two runs' rewards may be different formulas.

The exit status is 0, 1 if some lines were bad (named, left out), 2 if nothing was compared.
"""

import argparse
import dataclasses
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

from gtalign_jax.evaluation import paired, pareto
from gtalign_jax.evaluation.paired import Difference
from gtalign_jax.evaluation.scored import WELFARES, Scored, read
from gtalign_jax.training.files import write_whole

MEASURES = (*WELFARES, "social_welfare")
RHO = -1.0  # exponent of CES welfare
SHOWN = 10  # bad lines that are named one by one


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit status: 0, 1 if some lines were bad, 2 if nothing was done."""
    args = _arguments(argv)
    try:
        _check(args)
        first = read(args.first, args.first_label)
        second = read(args.second, args.second_label)
        bad = tuple(dict.fromkeys(first.bad + second.bad))  # one file may be both
        for line in bad[:SHOWN]:
            print(f"error: {line}", file=sys.stderr)
        if len(bad) > SHOWN:
            print(f"error: … and {len(bad) - SHOWN} more bad lines", file=sys.stderr)
        found = compare(first, second, args)
        console = Console(highlight=False)
        show(console, found, first, second)
        if args.json is not None:
            save(args.json, found)
            console.print(f"figures in {args.json}", markup=False, soft_wrap=True)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 1 if bad else 0


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m gtalign_jax.compare", description=__doc__.partition(":")[0],
        allow_abbrev=False,
    )  # fmt: skip
    add = parser.add_argument
    add("first", type=Path, metavar="FIRST.jsonl")
    add("second", type=Path, metavar="SECOND.jsonl")
    add("--eps", type=float, default=pareto.EPS,
        help="slack of dominance and coverage (%(default)s)")
    add("--rho", type=float, default=RHO, help="exponent of CES welfare; 0, inf, -inf allowed")
    add("--json", type=Path, help="write all figures to this file")
    add("--first-label", help="compare only FIRST's rows with this `label`")
    add("--second-label", help="compare only SECOND's rows with this `label`")
    add("--measures", default=",".join(MEASURES), help="fields to test (%(default)s)")
    add("--seed", type=int, default=0)
    add("--resamples", type=int, default=paired.RESAMPLES, help="of bootstrap and permutations")
    return parser.parse_args(argv)


def _check(args: argparse.Namespace) -> None:
    """Before anything is read: a mistake in a flag should not cost a minute."""
    if args.json is not None:
        taken = {args.first.resolve(), args.second.resolve()}
        if args.json.is_dir() or args.json.resolve() in taken:
            raise ValueError(f"--json={args.json} must be a new file, not a folder or an input")
    if not (math.isfinite(args.eps) and args.eps >= 0):
        raise ValueError(f"--eps={args.eps}: must be a finite number >= 0")
    if math.isnan(args.rho):
        raise ValueError("--rho=nan: must be a number, inf or -inf")
    if args.resamples < 1 or args.seed < 0:
        key = "resamples" if args.resamples < 1 else "seed"
        raise ValueError(f"--{key}={getattr(args, key)}: must be >= {int(key == 'resamples')}")
    same_file = args.first.resolve() == args.second.resolve()
    if same_file and args.first_label == args.second_label:
        raise ValueError(
            f"{args.first} would be compared with itself: choose two of its labels with "
            "--first-label=NAME and --second-label=NAME"
        )


def compare(first: Scored, second: Scored, args: argparse.Namespace) -> dict[str, Any]:
    """All figures, as the JSON file has them but for NaN; the Pareto measures at top level.

    Raises ValueError where nothing can be compared.
    """
    measures = tuple(dict.fromkeys(name.strip() for name in args.measures.split(",")))
    both = tuple(dict.fromkeys((*WELFARES, *measures)))
    matching = paired.match(first.rows, second.rows, both)
    complete_B = matching.complete_B(WELFARES)
    if not complete_B.any():
        raise ValueError(
            f"none of the {len(complete_B)} matched pairs has a score on both sides: "
            f"{first.missing} rows of {first.name} and {second.missing} of {second.name} have none"
        )
    clouds = (x[:2, complete_B].T for x in (matching.first_MB, matching.second_MB))
    tested = matching.select(measures)
    return {
        "first": _side_json(first, matching.only_first),
        "second": _side_json(second, matching.only_second),
        "matched_by": list(matching.by),
        "pairs": int(complete_B.sum()),
        "pairs_left_out": int((~complete_B).sum()),
        "ids_averaged": matching.averaged,
        "samples_unmatched": matching.samples_unmatched,
        "ids_with_other_truth": _other_truth(first, second),
        "differences": paired.assess(tested, args.seed, args.resamples),
        "by_source": paired.assess_by_source(tested, args.seed, args.resamples),
        "seed": args.seed,
        "resamples": args.resamples,
        "level": paired.LEVEL,
        **pareto.compare(*clouds, args.eps, args.rho),
    }


def _side_json(side: Scored, only_here: Sequence[str]) -> dict[str, Any]:
    return {
        "file": str(side.path), "label": side.label, "rows": len(side.rows),
        "rows_missing": side.missing, "bad_lines": len(side.bad),
        "ids_only_here": len(only_here), "first_ids_only_here": list(only_here[:SHOWN]),
    }  # fmt: skip


def _other_truth(first: Scored, second: Scored) -> int:
    """How many common ids have another ground truth: then they are hardly the same prompts."""
    truths = [
        {str(row["id"]): row["ground_truth"] for row in side.rows if "ground_truth" in row}
        for side in (first, second)
    ]
    return sum(truths[0][name] != truths[1][name] for name in truths[0].keys() & truths[1].keys())


def show(console: Console, found: dict[str, Any], first: Scored, second: Scored) -> None:
    """The figures for people: what was matched, the differences, the Pareto measures."""
    for line in _preamble(found, first, second):
        console.print(line, markup=False, soft_wrap=True)
    tables = [_differences(f"second - first, {found['level']:.0%} intervals",
                           found["differences"])]
    for source, part in found["by_source"].items():
        tables.append(_differences(f"data source {source or '(none)'}", part))
    tables.append(_pareto(found))
    for table in tables:
        wide = console.options.update(max_width=1000)  # nothing of it is ever cut off
        console.width = max(console.width, Measurement.get(console, wide, table).maximum)
        console.print(table)
    console.print(
        "* adjusted p < 0.05. Intervals: bootstrap over prompts within each data source; "
        "p: paired permutation test; adjusted (Holm) over all rows of a table"
        + (", those by source over all sources" if found["by_source"] else ""),
        markup=False, soft_wrap=True,
    )  # fmt: skip


def _preamble(found: dict[str, Any], first: Scored, second: Scored) -> list[str]:
    lines = []
    for name, side in (("first", first), ("second", second)):
        one = found[name]
        lines.append(f"{name + ':':8}{side.name}: {one['rows']:,} rows, "
                     f"{one['rows_missing']:,} without a score, {one['bad_lines']:,} bad lines")
    by = " and ".join(found["matched_by"])
    lines.append(f"matched by {by}: {found['pairs']:,} pairs, {found['pairs_left_out']:,} more "
                 "left out because a side has no score")
    if found["ids_averaged"]:
        lines.append(f"{found['ids_averaged']:,} ids have several rows, which were averaged")
    if found["samples_unmatched"]:
        lines.append(f"{found['samples_unmatched']:,} samples of common ids are on one side only")
    for name in ("first", "second"):
        one = found[name]
        if one["ids_only_here"]:
            shown = ", ".join(one["first_ids_only_here"])
            more = ", …" if one["ids_only_here"] > SHOWN else ""
            lines.append(f"{one['ids_only_here']:,} ids only on the {name} side: {shown}{more}")
    if found["ids_with_other_truth"]:
        lines.append(f"warning: {found['ids_with_other_truth']:,} common ids have another "
                     "ground_truth on the other side: are they the same prompts?")
    return lines


def _table(title: str, columns: Sequence[str]) -> Table:
    out = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0),
                pad_edge=False)
    for n, name in enumerate(columns):
        out.add_column(name, justify="right" if n else "left", no_wrap=True)
    return out


def _differences(title: str, differences: dict[str, Difference]) -> Table:
    out = _table(title, ("measure", "first", "second", "difference", "p", "adjusted p", "prompts"))
    for name, d in differences.items():
        clear = d.p_adjusted < paired.SIGNIFICANT
        out.add_row(
            name, f"{d.first:.4f} {_interval(d.first_low, d.first_high)}",
            f"{d.second:.4f} {_interval(d.second_low, d.second_high)}",
            f"{d.difference:+.4f} {_interval(d.low, d.high, '+')}", _p(d.p),
            _p(d.p_adjusted) + (" *" if clear else "  "), f"{d.pairs:,}",
            style="bold" if clear else None,
        )  # fmt: skip
    return out


def _interval(low: float, high: float, sign: str = "") -> str:
    return "[–]" if math.isnan(low) else f"[{low:{sign}.4f}, {high:{sign}.4f}]"


def _p(p: float) -> str:
    return "–" if math.isnan(p) else "< 0.001" if p < 0.001 else f"{p:.3f}"


def _pareto(found: dict[str, Any]) -> Table:
    eps, counts, pairs = found["epsilon"], found["basic_compare"], found["pairs"]
    out = _table(
        f"Pareto measures; {counts['equal']:,} pairs equal, {counts['incomparable']:,} "
        "incomparable",
        ("measure", "first", "second", "better"),
    )
    wins = [counts["file1_dominates_file2"], counts["file2_dominates_file1"]]
    out.add_row(f"pairs dominated, eps {eps:g}", *(f"{n:,} ({n / pairs:.1%})" for n in wins),
                "more")
    for name, key, better in (
        ("on the joint frontier", "on_joint_frontier", "more"),
        (f"coverage of the frontier, eps {eps:g}", "epsilon_coverage", "more"),
        ("regret to the frontier (L-infinity)", "avg_regret_Linf", "less"),
        ("hypervolume", "hypervolume_exact", "more"),
        ("Nash welfare (geometric mean)", "NSW_avg", "more"),
        (f"CES welfare, rho {found['CES_rho']:g}", "CES_avg", "more"),
    ):
        out.add_row(name, *(f"{found[key][side]:.4f}" for side in pareto.SIDES), better)
    for name, key in (("user welfare", "u_cov"), ("LLM welfare", "l_cov")):
        values = (found["coverage_spread"][side][key] for side in pareto.SIDES)
        out.add_row(f"spread of {name}", *(f"{x:.4f}" for x in values), "")
    return out


def save(path: Path, found: dict[str, Any]) -> None:
    """A file that was there stays whole until the new one is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(_plain(found), indent=2, allow_nan=False, ensure_ascii=False)
    write_whole(path, text + "\n")


def _plain(value: Any) -> Any:
    """JSON has no NaN, which becomes null, and no infinities (of rho): they become words."""
    if isinstance(value, Difference):
        return _plain(dataclasses.asdict(value))
    if isinstance(value, dict):
        return {name: _plain(x) for name, x in value.items()}
    if isinstance(value, list):
        return [_plain(x) for x in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else str(value)
    return value


if __name__ == "__main__":
    sys.exit(main())
