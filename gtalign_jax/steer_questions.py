"""Questions answered at several prices: as data, and side by side on a terminal.

    {"model", "usage", "questions": [{"question", "answers": [one per price]}]}

An answer holds what `game.steering.describe` says of its matrix, and

    pricing   its name              text, response   the whole chain, its block for the user
    tokens    of the whole chain    response_tokens  of that block alone
    stopped   it ended by itself    forced           [[first, end], …] of its tokens
    steered   tokens were forced    reason           why none were, or null

Model text is shown without its control characters: a terminal would obey them.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from gtalign_jax import steered
from gtalign_jax.data import asking
from gtalign_jax.data.batches import PromptSet
from gtalign_jax.data.chat import decode, encode_completion
from gtalign_jax.data.prompt import Prompt
from gtalign_jax.game import chain
from gtalign_jax.game.chain import ACTIONS, KEYS, PLAYERS
from gtalign_jax.game.steering import SteeringConfig, describe
from gtalign_jax.rollout.player import Player
from gtalign_jax.rollout.sampler import SamplerConfig
from gtalign_jax.rollout.steering import SteeredRollout

NO_LIMIT = 1 << 30  # of prompt tokens: a question is never left out
LABEL, NARROWEST = 10, 23  # columns of a terminal: of the row labels, of one pricing
PARETO, CHOSEN, CHANGED = "*", "<", "'"  # beside a payoff; signs that any terminal has
LEGEND = (f"{PARETO} on the Pareto set   {CHOSEN} chosen   {CHANGED} changed by the price   "
          "payoffs: LLM / user")

Found = dict[str, Any]


def answer(player: Player, questions: Sequence[str], configs: Sequence[SteeringConfig],
           sampler: SamplerConfig, seed: int) -> Found:
    """Every question under each of `configs`, as the document above."""
    asked = [asking.ask([{"role": "user", "content": q}], player.instruction) for q in questions]
    prompts = PromptSet(
        [Prompt(str(i), "question", messages, "", question)
         for i, (question, messages) in enumerate(zip(questions, asked, strict=True))],
        player.tokenizer, NO_LIMIT,
    )  # fmt: skip
    played = steered.play(player, prompts, configs, sampler, seed=seed)
    return {
        "model": player.name,
        "usage": dataclasses.asdict(configs[0].usage),
        "questions": [
            {"question": question, "answers": [
                _answer(player, config, rollout, q)
                for config, rollout in zip(configs, played, strict=True)
            ]} for q, question in enumerate(questions)
        ],
    }  # fmt: skip


def _answer(player: Player, config: SteeringConfig, played: SteeredRollout, q: int) -> Found:
    length, outcome = int(played.rollout.lengths_QG[q, 0]), played.outcomes[q]
    text = decode(player.tokenizer, played.rollout.tokens_QGT[q, 0, :length])
    response = chain.parse(text).response
    about = {} if outcome.result is None else describe(outcome.result, config)
    return about | {
        "pricing": config.pricing.name,
        "text": text,
        "response": response,
        "tokens": length,
        "response_tokens": len(encode_completion(player.tokenizer, response or "")),
        "stopped": bool(played.rollout.stopped_QG[q, 0]),
        "forced": steered.spans(played.forced_QGT[q, 0, :length]),
        "steered": outcome.steered,
        "reason": outcome.reason,
    }


def show(console: Console, found: Found) -> None:
    """All questions, each with a column per price, or one price after another where it is narrow.
    """
    use = found["usage"]
    rows = [f"{action} {use['input'][a]:.0f} in, {use['output'][a]:.0f} out, "
            f"{use['requests'][a]:g} request(s)" for a, action in enumerate(ACTIONS)]
    console.print(Text(f"{found['model']}; expected use: {'; '.join(rows)}"))
    for question in found["questions"]:
        console.print()
        console.print(Text(f"Question: {clean(question['question'])}", style="bold"))
        answers = question["answers"]
        fit = max(1, (console.width - LABEL) // NARROWEST)
        # As many columns as fit, about alike in number in each table.
        tables = -(-len(answers) // max(1, fit - 1))
        each = -(-len(answers) // tables)
        for first in range(0, len(answers), each):
            console.print(_side_by_side(answers[first : first + each]))
    console.print(Text(LEGEND, style="dim"))


def _side_by_side(answers: Sequence[Found]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1), expand=False)
    table.add_column("", no_wrap=True, min_width=5)
    table.add_column("as written", overflow="fold")
    for one in answers:
        table.add_column(Text(one["pricing"]), overflow="fold")
    written = next((one for one in answers if "written" in one), None)
    if written is not None:
        for key in KEYS:
            cells = [_cell(written["written"], written["before"], key)]
            cells += [
                _cell(one["edited"], one["decision"], key, one["written"]) if "edited" in one
                else Text("–") for one in answers  # a price beyond what a matrix can hold
            ]
            table.add_row(key, *cells)
        table.add_section()
    for label, of in ROWS.items():
        first = "" if written is None or label != "choice" else written["before"]["key"]
        table.add_row(label, Text(first), *(Text(clean(of(one))) for one in answers))
    return table


def _cell(matrix: Mapping[str, Mapping[str, float]], decision: Found, key: str,
          before: Mapping[str, Mapping[str, float]] | None = None) -> Text:
    """"9'/   -4' *<": both payoffs, each with a mark where it changed, and what the cell is."""
    parts = []
    for player in PLAYERS:
        changed = before is not None and before[key][player] != matrix[key][player]
        parts.append(f"{matrix[key][player]:>6.5g}{CHANGED if changed else ' '}")
    marks = (PARETO if key in decision["pareto"] else " ") + (
        CHOSEN if key == decision["key"] else "")
    return Text(f"{parts[0]}/{parts[1]}{marks}",
                style="bold" if key == decision["key"] else "")


def _choice(one: Found) -> str:
    if "decision" not in one:
        return "–"
    before, after = one["before"]["key"], one["decision"]["key"]
    return f"{after}, as without a price" if before == after else f"{after} instead of {before}"


def _tokens(one: Found) -> str:
    told = f"{one['tokens']}, of them {one['response_tokens']} in the answer"
    return told if one["stopped"] else f"{told}; cut off at the limit"


def _forced(one: Found) -> str:
    if not one["steered"]:
        return f"nothing: {one['reason']}"
    return ", ".join(f"tokens {first} to {end - 1}" for first, end in one["forced"])


ROWS = {
    "choice": _choice,
    "because": lambda one: " ".join(one["decision"]["reasons"]) if "decision" in one else "–",
    "answer": lambda one: one["response"] if one["response"] is not None else
    f"(no response block) {one['text']}",
    "tokens": _tokens,
    "forced": _forced,
}


def clean(text: str) -> str:
    """`text` without characters that would do anything but stand there; line ends stay."""
    return "".join(c if c.isprintable() or c == "\n" else "�" for c in text)
