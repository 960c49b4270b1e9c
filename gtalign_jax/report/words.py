"""The summary of a report in sentences, each made from the numbers it names.

A difference is called real only where the paired test says so after Holm's adjustment; what got
worse and what is missing are said as plainly as what got better. Plain text: whoever puts it into
a page escapes it.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from gtalign_jax.evaluation.measures import BY_NAME, MEASURES, OVERALL, Measure
from gtalign_jax.evaluation.paired import SIGNIFICANT

WELFARES = {
    "cobb_douglas": "the geometric mean of both sides' welfare, √(U·L)",
    "ces": "a CES mean of both sides' welfare",
    "linear": "the arithmetic mean of both sides' welfare",
    "user": "the user's welfare alone",
    "llm": "the model's welfare alone",
}
Numbers = Mapping[str, Any]


def summary(numbers: Numbers, config: Mapping[str, Any] | None) -> list[tuple[str, str]]:
    """(what it is about, text) of each paragraph, in the order of the page."""
    parts = [
        ("What was done", [*_trained(numbers, config), *_evaluated(numbers)]),
        ("Is it better", _verdict(numbers)),
        ("For whom", _for_whom(numbers)),
        ("What got worse", _worse(numbers)),
        ("What is missing", _missing(numbers)),
        ("What it took", _cost(numbers)),
    ]
    return [(title, " ".join(said)) for title, said in parts if said]


def named(measure: Measure) -> str:
    """The measure's label where it stands alone, not below the one that it is a part of."""
    return f"tokens {measure.label.strip()}" if measure.label.startswith(" ") else measure.label


def change(measure: Measure, value: float) -> str:
    """A difference of this measure as text, with its sign; shares in percentage points."""
    text = measure.form.replace("{:", "{:+").format(value * measure.scale)
    return text.replace("%", " pt").replace("-", "−")


def direction(measure: Measure, found: Mapping[str, Any]) -> str:
    """"better", "worse", "changed" or "" of a paired difference: "" where chance may explain it."""
    p, difference = found["p_adjusted"], found["difference"]
    if p is None or p >= SIGNIFICANT or difference == 0:
        return ""
    if not measure.better:
        return "changed"
    return "better" if (difference > 0) == (measure.better == "higher") else "worse"


def p_text(p: float | None) -> str:
    if p is None:
        return "no test possible"
    return "p < 0.001" if p < 0.001 else f"p = {p:.3f}" if p < 0.1 else f"p = {p:.2f}"


def count(n: int, one: str, many: str = "") -> str:
    """"1 prompt", "1,200 prompts"."""
    return f"{n:,} {one if n == 1 else many or one + 's'}"


def listed(parts: Sequence[str]) -> str:
    """"a", "a and b", "a, b and c"."""
    return " and ".join([", ".join(parts[:-1]), parts[-1]]) if len(parts) > 1 else "".join(parts)


def _trained(numbers: Numbers, config: Mapping[str, Any] | None) -> list[str]:
    said, progress = [], numbers["progress"]
    if progress and config is not None and "model" in config:
        model = config["model"]
        start = f"the model at {model['path']}" if model.get("path") else (
            f"a {model['family']} model with random weights ({model['num_layers']} layers of "
            f"{model['d_model']})"
        )
        said.append(f"The starting point is {start}.")
    for stage, name in (("sft", "cold start"), ("grpo", "GRPO")):
        if stage not in progress:
            continue
        done, of = progress[stage]["done"], progress[stage]["of"]
        steps = count(done, "step")
        if of is not None and done < of:
            steps = f"{done:,} of {of:,} steps so far (the run is not finished)"
        if stage == "grpo" and config is not None and "grpo" in config:
            grpo, welfare = config["grpo"], config["reward"]["welfare"]
            steps += (
                f", each {grpo['prompts_per_step']} prompts × {grpo['samples_per_prompt']} "
                f"completions, rewarded with {WELFARES.get(welfare, welfare)}"
            )
        said.append(f"{name[0].upper()}{name[1:]}: {steps}.")
    return said


def _evaluated(numbers: Numbers) -> list[str]:
    after, before = numbers["labels"]["after"], numbers["labels"]["before"]
    if after is None:
        return ["Nothing was evaluated on held-out prompts: all numbers here are of training."]
    prompts, sources = numbers["prompts"][after], numbers["sources"]
    rows = numbers["rows"]["evaluations"][after]
    text = (
        f"“{after}” was evaluated with {count(rows, 'completion')} of {count(prompts, 'prompt')} "
        f"from {count(len(sources), 'source')}"
    )
    if before is None:
        return [f"{text}." if numbers["against"] else
                f"{text}; there is no other evaluation to compare it with."]
    return [f"{text}, and is compared with “{before}”."]


def _verdict(numbers: Numbers) -> list[str]:
    after, before = numbers["labels"]["after"], numbers["labels"]["before"]
    if after is None:
        return []
    measure = BY_NAME["social_welfare"]
    now = numbers["measures"][after].get(OVERALL, {}).get(measure.name, {})
    if now.get("value") is None:
        return [f"No completion of “{after}” has a score, so nothing can be said."]
    if before is None:
        return [f"Social welfare √(U·L) is {_with_interval(measure, now)}.", *_against(numbers)]
    found = _difference(numbers, measure.name)
    if found is None:
        return [f"Social welfare √(U·L) is {_with_interval(measure, now)}; no prompt was judged on "
                "both sides, so that the two cannot be compared."]
    kind = direction(measure, found)
    head = {"better": "Yes", "worse": "No, it is worse"}.get(kind, "That cannot be said")
    verb = "rose" if found["difference"] > 0 else "fell" if found["difference"] < 0 else "stayed"
    luck = ("more than chance would explain" if kind else "which chance alone may explain")
    return [
        f"{head}: social welfare √(U·L) {verb} from {measure.shown(found['first'])} to "
        f"{measure.shown(found['second'])}, by {_change_with_interval(measure, found)} on the same "
        f"{count(found['pairs'], 'prompt')}, {luck} ({p_text(found['p_adjusted'])} after "
        "Holm's adjustment)."
    ]


def _against(numbers: Numbers) -> list[str]:
    """What a baseline of a file of its own is worse or better at."""
    if numbers["against"] is None:
        return []
    name, found = numbers["against"]["name"], numbers["against"]["differences"][OVERALL]
    said = [
        f"{named(measure)} {_change_with_interval(measure, d)} "
        f"({direction(measure, d) or 'may be chance'}, {p_text(d['p_adjusted'])})"
        for key, d in found.items() if (measure := BY_NAME.get(key)) is not None
        and (key.endswith("welfare") or direction(measure, d))
    ]
    return [f"Against “{name}”: {'; '.join(said)}."] if said else []


def _for_whom(numbers: Numbers) -> list[str]:
    pair = numbers["paired"]
    said = []
    for name, who in (("user_welfare", "users"), ("llm_welfare", "the model")):
        found = _difference(numbers, name)
        if found is None:
            continue
        verb = {"better": "gained", "worse": "lost"}.get(direction(BY_NAME[name], found))
        amount = _change_with_interval(BY_NAME[name], found)
        said.append(f"{who} {verb} {amount}" if verb else
                    f"{who} neither gained nor lost for sure ({amount})")
    if not said:
        return []
    text = "; ".join(said)
    out = [f"{text[0].upper()}{text[1:]}."]
    by_source = {
        source: found["social_welfare"]["difference"]
        for source, found in pair["differences"].items()
        if source != OVERALL and "social_welfare" in found
    }
    if len(by_source) > 1:
        rose = [source for source, value in by_source.items() if value > 0]
        best, worst = max(by_source, key=by_source.get), min(by_source, key=by_source.get)
        measure = BY_NAME["social_welfare"]
        out.append(
            f"Social welfare rose in {len(rose)} of {len(by_source)} sources: most in {best} "
            f"({change(measure, by_source[best])}), least in {worst} "
            f"({change(measure, by_source[worst])})."
        )
    return out


def _worse(numbers: Numbers) -> list[str]:
    found = {m: _difference(numbers, m.name) for m in MEASURES if m.better}
    found = {m: d for m, d in found.items() if d is not None}
    if not found:
        return []
    lost = [(m, d) for m, d in found.items() if direction(m, d) == "worse"]
    unsure = [
        m for m, d in found.items()
        if not direction(m, d) and d["difference"] != 0
        and (d["difference"] > 0) != (m.better == "higher")
    ]
    out = [
        f"{named(m)[0].upper()}{named(m)[1:]}: from {m.shown(d['first'])} to "
        f"{m.shown(d['second'])}, {_change_with_interval(m, d)} ({p_text(d['p_adjusted'])})."
        for m, d in lost
    ] or ["Nothing that has a good and a bad direction got worse beyond chance."]
    if unsure:
        out.append("Worse, but within what chance may do: "
                   f"{listed([named(m) for m in unsure])}.")
    return out


def _missing(numbers: Numbers) -> list[str]:
    lost = {place: found for place, found in numbers["missing"].items() if found["missing"]}
    total = sum(found["of"] for found in numbers["missing"].values())
    said = []
    if lost:
        parts = [
            f"{found['missing']:,} of {found['of']:,} completions "
            f"{'of training' if place == 'training' else f'of “{place}”'} "
            f"({found['missing'] / found['of']:.1%})" for place, found in lost.items()
        ]
        said.append(f"No judgement for {listed(parts)}: they are in no mean.")
    elif total:
        said.append("Every completion was judged.")
    pair = numbers["paired"]
    alone = pair["only_before"] + pair["only_after"] if pair else 0
    if alone:
        said.append(f"{count(alone, 'prompt')} of only one side took no part in the comparison.")
    if numbers["labels"]["before"] and pair is None:
        said.append("The two evaluations have no prompt in common.")
    return said


def _cost(numbers: Numbers) -> list[str]:
    cost = numbers["cost"]
    said = []
    if cost["seconds_total"]:
        devices = cost["devices"]
        where = f" on {count(devices['count'], devices['kind'] + ' device')}" if devices else ""
        hours = f" = {cost['chip_hours']:.3g} chip-hours" if devices else ""
        said.append(f"The training steps took {duration(cost['seconds_total'])}{where}{hours}.")
    sampled = cost["tokens"]["training, sampled"] + cost["tokens"]["evaluations, sampled"]
    if sampled:
        said.append(f"{sampled:,} tokens were sampled.")
    calls = [n for n in cost["judge_calls"].values() if n is not None]
    if calls:
        said.append(f"A judge's server gave {sum(calls):,} judgements." if sum(calls) else
                    "No judge's server was asked.")
    return said


def duration(seconds: float) -> str:
    """"45 s", "3:51 min", "2:03 h"."""
    if seconds < 60:
        return f"{seconds:.3g} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes}:{rest:02} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours:,}:{minutes:02} h"


def _difference(numbers: Numbers, name: str) -> Mapping[str, Any] | None:
    pair = numbers["paired"]
    return None if pair is None else pair["differences"][OVERALL].get(name)


def _with_interval(measure: Measure, found: Mapping[str, Any]) -> str:
    text = measure.shown(found["value"])
    if found["low"] is None:
        return text
    return f"{text} [{measure.shown(found['low'])}, {measure.shown(found['high'])}]"


def _change_with_interval(measure: Measure, found: Mapping[str, Any]) -> str:
    text = change(measure, found["difference"])
    if found["low"] is None:
        return text
    return f"{text} [{change(measure, found['low'])}, {change(measure, found['high'])}]"
