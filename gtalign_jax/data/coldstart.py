"""Cold-start chains: examples that teach how to play, but not which move to make.

For a built-in prompt `render_chain` writes a reasoning chain in which

1. the thinking block says whether the request is clear, vague or harmful (always right);
2. the payoff matrix is random, and its best cell lies in the row that this perception selects
   (VQ if vague, else DQ) and in a column drawn uniformly from DA, CQ, AQ;
3. the analysis names that cell, and the response carries the action out, correctly.

So a model trained on them reads requests, fills in matrices, follows its own analysis and knows
the answers, while each action stays as likely as the others: what to choose is left to GRPO.
On a harmful request the three actions are to comply (DA), to refuse (CQ) and to refuse and offer
something harmless with the same object (AQ).

`render_repriced` writes chains as steering by price leaves them, with an edited matrix.
Users bring their own chains as JSONL: `load_examples`.
"""

import logging
import math
import random
from collections.abc import Iterable

import numpy as np

from gtalign_jax.data import builtin
from gtalign_jax.data.prompt import Prompt
from gtalign_jax.data.sources import MalformedRow, Row, read_jsonl, read_messages
from gtalign_jax.game import chain
from gtalign_jax.game.pricing import POLICIES, Usage
from gtalign_jax.game.steering import SteeringConfig, solve

log = logging.getLogger(__name__)

PERCEPTION = {"definite": "clear", "harmless": "clear", "ambiguous": "vague", "harmful": "harmful"}
# (LLM, user) of the recommended cell and of the other five, by what the request is taken for. Few
# values and never equal ones: a matrix costs few tokens and has full quality. Every best sum is
# above every other sum, so the recommended cell is the whole Pareto set's argmax whatever the tie
# rules. The stakes differ by perception, for every action alike: so a model must look at the
# request in each cell it writes, and GRPO can move the actions of harmful requests apart from
# those of clear ones.
BEST_CELLS = {
    "clear": ((8, 9), (9, 8)), "vague": ((7, 8), (8, 7)), "harmful": ((6, 7), (7, 6)),
}
OTHER_CELLS = {
    "clear": ((1, 2), (2, 1), (3, 2)), "vague": ((3, 4), (4, 3)), "harmful": ((1, 3), (3, 1)),
}
# For repriced chains: about what built-in actions take; points per dollar for (LLM, user), ten
# times the usual, as built-in turns are ten times shorter than real ones; the range of the price.
USAGE = Usage((38, 125, 80), (52, 104, 80), (1, 2, 1.5))
SENSITIVITY = (1000.0, 4000.0)
PRICES = (2.0, 120.0)  # dollars per million output tokens; input tokens cost a quarter
REFUSAL = "I cannot help with that"
ALTERNATIVES = ("clean", "repair", "polish")

Example = tuple[Prompt, str]


def render_chain(prompt: Prompt, rng: random.Random, action: str | None = None) -> str:
    """Writes a valid reasoning chain for a built-in prompt.

    Args:
      prompt: from `builtin.generate`.
      rng: draws the action, the payoffs and the alternative offered.
      action: "DA", "CQ" or "AQ" instead of a drawn one.

    Raises:
      ValueError: the prompt is not a built-in one, or the action is unknown.
    """
    if prompt.data_source not in DIRECT:
        raise ValueError(f"{prompt.id}: no cold-start chains for source {prompt.data_source!r}")
    drawn = rng.choice(chain.ACTIONS)  # drawn in any case, so that a forced action changes no dice
    action = action or drawn
    if action not in chain.ACTIONS:
        raise ValueError(f"action is {action!r}; allowed: {', '.join(chain.ACTIONS)}")
    payoff_UAP = _payoff(_row(prompt), action, PERCEPTION[prompt.extra["kind"]], rng)
    return _written(prompt, payoff_UAP, action, rng)


def render_repriced(prompt: Prompt, rng: random.Random) -> tuple[str, str, str]:
    """A chain whose matrix was edited by a random price: (text before it, the matrix, the rest).

    It is what steering leaves behind (`game.steering`): perception, an edited matrix, and the
    action that then is best, which may be another. A model that has seen some acts on matrices with
    other numbers than its own. The matrix is given to it, not written by it: no loss belongs there.
    """
    chosen = rng.choice(chain.ACTIONS)
    payoff_UAP = _payoff(_row(prompt), chosen, PERCEPTION[prompt.extra["kind"]], rng)
    policy, key = rng.choice((("per_token", ""), ("per_token", ""), ("subscription", "cost_")))
    dollars = math.exp(rng.uniform(*map(math.log, PRICES)))
    config = SteeringConfig(
        pricing=POLICIES[policy](**{f"{key}output": dollars, f"{key}input": dollars / 4}),
        usage=USAGE, sensitivity=SENSITIVITY, decimals=0,
    )
    steered = solve(payoff_UAP.astype(np.float64), config)
    text = _written(prompt, steered.edited_UAP, steered.after.action, rng)
    before, rest = text.split("<payoff>")
    matrix, after = rest.split("</payoff>")
    return f"{before}<payoff>", matrix, f"</payoff>{after}"


def _row(prompt: Prompt) -> str:
    return "VQ" if prompt.extra["kind"] == "ambiguous" else "DQ"


def _written(prompt: Prompt, payoff_UAP: np.ndarray, action: str, rng: random.Random) -> str:
    text = chain.render(
        f"This is {PERCEPTION[prompt.extra['kind']]}.",
        payoff_UAP,
        f"{_row(prompt)}_{action} is best.",
        _respond(prompt, action, rng),
    )
    spaced = chain.payoff_json(payoff_UAP)  # spaces are characters before <response>: latency
    return text.replace(spaced, spaced.replace(" ", ""))


def _payoff(row: str, action: str, perception: str, rng: random.Random) -> np.ndarray:
    cells = [rng.choice(OTHER_CELLS[perception]) for _ in range(6)]
    cells[chain.KEYS.index(f"{row}_{action}")] = rng.choice(BEST_CELLS[perception])
    return np.array(cells).reshape(2, 3, 2)


def _respond(prompt: Prompt, action: str, rng: random.Random) -> str:
    """The response in which an action is carried out."""
    slots = prompt.extra
    if slots["kind"] == "harmful":
        if action == "DA":
            return f"To {slots['verb']} the {slots['object']}, {builtin.HARM_TIP}."
        if action == "CQ":
            return f"{REFUSAL}. What do you really need?"
        safe = rng.choice(ALTERNATIVES)
        return f"{REFUSAL}, but I can help you {safe} the {slots['object']}. Shall we?"
    answer, question = DIRECT[prompt.data_source](slots, rng), QUESTION[prompt.data_source](slots)
    return {"DA": answer, "CQ": question, "AQ": f"{answer} {question}"}[action]


def _capitalise(text: str) -> str:
    return text[0].upper() + text[1:]


def _fact(slots, rng: random.Random) -> str:
    topic = builtin.TOPICS[slots["topic"]]
    subject = slots["subject"]
    if slots["kind"] == "ambiguous":
        subject = rng.choice(tuple(topic.facts))
    return _capitalise(topic.statement.format(subject, topic.facts[subject]))


def _note(slots, rng: random.Random) -> str:
    return builtin.OCCASIONS[slots["occasion"]].note.format(n=slots["name"], o=slots["object"])


DIRECT = {
    "builtin-arithmetic": lambda s, rng: f"That is {s['sum']} = {s['answer']} {s['object']}.",
    "builtin-ambiguity": _fact,
    "builtin-safety": lambda s, rng: (
        f"To {s['verb']} the {s['object']}, {builtin.CARE[s['verb']]}."
    ),
    "builtin-writing": _note,
}
QUESTION = {
    "builtin-arithmetic": lambda s: f"Which {s['object']} do you mean?",
    "builtin-ambiguity": lambda s: f"Which {builtin.TOPICS[s['topic']].noun} do you mean?",
    "builtin-safety": lambda s: f"Which {s['object']} do you mean?",
    "builtin-writing": lambda s: f"Which {s['object']} do you mean?",
}


def cold_start_examples(prompts: Iterable[Prompt], seed: int,
                        reasoning: str = "tagged") -> list[Example]:
    """One chain for each built-in prompt; the same prompts and seed give the same chains.

    With reasoning "none" (of `chain.REASONING`) the completion is the chain's response alone: the
    same action, in the same words.
    """
    chains = [(p, render_chain(p, random.Random(f"coldstart/{seed}/{p.id}"))) for p in prompts]
    if reasoning == "tagged":
        return chains
    return [(prompt, chain.parse(text).response) for prompt, text in chains]


def load_examples(path: str, reasoning: str = "tagged") -> list[Example]:
    """A user's own chains: JSONL rows with `messages` (or `prompt`) and `completion`.

    With reasoning "none" (of `chain.REASONING`) any completion with words in it will do; of a
    reasoning chain the response is taken.

    `data_source`, `ground_truth` and `question` are optional. Malformed rows are reported with
    their number, skipped and counted.

    Raises:
      ValueError: no row is usable.
      TypeError: a prompt that is a plain string.
    """
    rows, examples = read_jsonl(path), []
    for number, row in enumerate(rows):
        try:
            examples.append(_read_example(row, f"chains:{number}", reasoning))
        except MalformedRow as error:
            log.warning("%s row %d skipped: %s", path, number, error)
        except TypeError as error:
            raise TypeError(f"{path} row {number}: {error}") from None
    if len(examples) < len(rows):
        log.warning("%s: skipped %d of %d rows", path, len(rows) - len(examples), len(rows))
    if not examples:
        raise ValueError(f"{path}: none of its {len(rows)} rows is usable")
    return examples


def _read_example(row: Row | MalformedRow, row_id: str, reasoning: str) -> Example:
    if isinstance(row, MalformedRow):
        raise row
    messages = read_messages(row.get("messages", row.get("prompt")))
    completion = row.get("completion")
    if not isinstance(completion, str):
        raise MalformedRow(f"completion is {completion!r:.40}, not text")
    parsed = chain.parse(completion)
    if reasoning == "none":
        if not completion.strip():
            raise MalformedRow("completion is empty")
        if parsed.format_ok:  # chains of a tagged cold start: what they say to the user
            completion = parsed.response
    elif not parsed.format_ok:
        raise MalformedRow(f"completion is no reasoning chain: {parsed.error or 'blocks astray'}")
    prompt = Prompt(
        id=row_id,
        data_source=str(row.get("data_source", "")),
        messages=messages,
        ground_truth=str(row.get("ground_truth", "")),
        question=str(row.get("question", messages[-1]["content"])),
    )
    return prompt, completion
