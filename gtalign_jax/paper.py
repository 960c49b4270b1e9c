"""The paper's experiment (GTAlign, arXiv 2510.08872) at several model sizes, on several TPUs.

    experiment("v4", "7b,math-hard")  ->  the config of configs/tpu_v4.py:7b,math-hard

The experiment is the same everywhere; `FITS` is the one place where a machine and a model's size
make a difference, and what it sets changes how fast and where a run computes, not what. The files
configs/tpu_*.py name a machine and say what to expect of it.

What differs from the paper:
  1. GRPO in place of PPO: no critic, the mean of a prompt's 8 completions is the baseline. So the
     512 completions of a step are 64 prompts x 8;
  2. the KL towards the starting policy is a term of the loss (k3), not of the reward;
  3. a completion whose judge failed is left out; it is not scored 0;
  4. a matrix with a boolean or a non-finite payoff counts as unreadable.
"""

import dataclasses
import os

from ml_collections import config_dict

from gtalign_jax.config import Config
from gtalign_jax.freeze import to_config_dict

TRAINABLE = ("math-hard", "ambig_qa", "wildguard")  # sources whose training prompts are published
SOURCES = (*TRAINABLE, "medium")
OUT_OF_DOMAIN = {  # source without training prompts -> its folder
    "minerva": "minerva_math", "abg-coqa": "abg_coqa", "advbench": "advbench",
}  # fmt: skip
WITHOUT_JUDGE = ("math-hard", "minerva")  # answers are compared by mathematics alone
GROUPS = {  # word -> (sources with training prompts, sources with held-out ones)
    **{source: ((source,), (source,)) for source in SOURCES},
    "all": (TRAINABLE, SOURCES),
    **{source: ((), (source,)) for source in OUT_OF_DOMAIN},
    "ood": ((), tuple(OUT_OF_DOMAIN)),
}
PROMPTS, SAMPLES = 64, 8  # a step's prompts, and completions of each

MODELS = {
    "0.5b": "Qwen/Qwen2.5-0.5B-Instruct",
    "3b": "Qwen/Qwen2.5-3B-Instruct",
    "7b": "Qwen/Qwen2.5-7B-Instruct",
    "32b": "Qwen/Qwen2.5-32B-Instruct",
    "72b": "Qwen/Qwen2.5-72B-Instruct",
}
DEFAULT = {"size": "3b", "source": "all"}  # the paper's


@dataclasses.dataclass(frozen=True)
class Fit:
    """How a model lies on the smallest slice that is meant to hold it.

    slice, chips: that slice's name, and how many chips (= JAX devices) it has.
    tensor: chips that share one copy of the rollout's weights; divides the model's k/v heads.
    update_prompts: prompts, 8 completions with each, of one forward and backward pass on `tensor`
      chips. rollout_prompts: those whose completions are drawn at the same time on as many.
    remat: what the backward pass computes anew (`grpo.remat`).
    """

    slice: str
    chips: int
    tensor: int
    update_prompts: int
    rollout_prompts: int
    remat: str = "full"


# Bytes per chip: 12 per weight for the master copy and both moments and 2 for the reference, over
# all chips; 4 more for gradients in the update; in the rollout 2 per weight over `tensor` chips,
# and the keys and values of the completions in flight, with room for as much again.
# v5e has no 72b: over 8 chips, as many as there are k/v heads, the rollout's weights alone are
# 18 GB of a chip's 16.
FITS = {
    "v4": {
        "0.5b": Fit("v4-8", 4, tensor=1, update_prompts=1, rollout_prompts=16),
        "3b": Fit("v4-8", 4, tensor=2, update_prompts=1, rollout_prompts=8),
        "7b": Fit("v4-16", 8, tensor=4, update_prompts=1, rollout_prompts=8),
        "32b": Fit("v4-64", 32, tensor=8, update_prompts=1, rollout_prompts=2),
        "72b": Fit("v4-256", 128, tensor=8, update_prompts=1, rollout_prompts=1),
    },
    "v5e": {
        "0.5b": Fit("v5e-4", 4, tensor=1, update_prompts=1, rollout_prompts=8),
        "3b": Fit("v5e-16", 16, tensor=2, update_prompts=1, rollout_prompts=4),
        "7b": Fit("v5e-32", 32, tensor=4, update_prompts=1, rollout_prompts=4),
        "32b": Fit("v5e-256", 256, tensor=8, update_prompts=1, rollout_prompts=2),
    },
    "v5p": {
        "0.5b": Fit("v5p-8", 4, tensor=1, update_prompts=2, rollout_prompts=16),
        "3b": Fit("v5p-8", 4, tensor=1, update_prompts=2, rollout_prompts=16),
        "7b": Fit("v5p-8", 4, tensor=2, update_prompts=2, rollout_prompts=16),
        "32b": Fit("v5p-32", 16, tensor=4, update_prompts=1, rollout_prompts=8),
        "72b": Fit("v5p-64", 32, tensor=8, update_prompts=1, rollout_prompts=8),
    },
    "v6e": {
        "0.5b": Fit("v6e-4", 4, tensor=1, update_prompts=1, rollout_prompts=16),
        "3b": Fit("v6e-4", 4, tensor=2, update_prompts=1, rollout_prompts=8),
        "7b": Fit("v6e-8", 8, tensor=4, update_prompts=1, rollout_prompts=8),
        "32b": Fit("v6e-32", 32, tensor=8, update_prompts=1, rollout_prompts=2),
        "72b": Fit("v6e-128", 128, tensor=8, update_prompts=1, rollout_prompts=1),
    },
}


def choose(machine: str, words: str) -> tuple[str, str]:
    """(size, source) of a config file's argument, at most one word of each, in any order.

    Raises ValueError for another word, naming the allowed ones.
    """
    allowed = {"size": tuple(FITS[machine]), "source": tuple(GROUPS)}
    chosen: dict[str, str] = {}
    for word in filter(None, words.split(",")):
        kind = next((kind for kind, names in allowed.items() if word in names), None)
        if kind is None:
            raise ValueError(
                f"unknown word {word!r}; allowed on {machine}: a size ("
                f"{', '.join(allowed['size'])}) and a source ({', '.join(allowed['source'])})"
            )
        if kind in chosen:
            raise ValueError(f"two words for the {kind}: {chosen[kind]!r} and {word!r}")
        chosen[kind] = word
    return tuple((DEFAULT | chosen).values())


def experiment(machine: str, words: str = "") -> config_dict.ConfigDict:
    """The paper's experiment on a machine of `FITS`; `words` as in `choose`."""
    size, source = choose(machine, words)
    c = to_config_dict(Config())
    c.workdir = f"runs/tpu_{machine}-{source if size == DEFAULT['size'] else f'{size}-{source}'}"
    trains = bool(GROUPS[source][0])
    c.stages = ("grpo", "evaluate", "export") if trains else ("evaluate",)
    c.model.path = MODELS[size]  # or a local or gs:// directory
    c.model.compute_dtype = "bfloat16"

    c.grpo.steps = 150
    c.grpo.prompts_per_step = PROMPTS
    c.grpo.samples_per_prompt = SAMPLES
    c.grpo.learning_rate = 1e-6
    c.grpo.beta = 0.001
    c.rollout.max_new_tokens = 4096
    c.rollout.temperature = 1.0

    c.sft.learning_rate = 1e-5  # of the optional cold start
    c.sft.batch_size = 64
    c.sft.max_completion_tokens = 2048

    c.checkpoint.every = 10
    c.evaluate.batch_size = 64
    _set_prompts(c, source)
    _set_layout(c, FITS[machine][size])
    return c


def _set_prompts(c: config_dict.ConfigDict, source: str) -> None:
    """Where prompts and judge are: GTALIGN_DATA, GTALIGN_JUDGE_URL, GTALIGN_JUDGE_MODEL."""
    folder = os.environ.get("GTALIGN_DATA", "data").rstrip("/")
    train, test = GROUPS[source]
    c.data.source = "parquet"
    c.data.train = tuple(f"{folder}/{name}/train.parquet" for name in train)
    c.data.test = tuple(
        f"{folder}/{OUT_OF_DOMAIN.get(name, name)}/test.parquet" for name in test
    )
    c.data.max_prompt_tokens = 2048

    c.judge.kind = "none" if source in WITHOUT_JUDGE else "http"
    c.judge.base_url = os.environ.get("GTALIGN_JUDGE_URL", "http://localhost:8000/v1")
    c.judge.model = os.environ.get("GTALIGN_JUDGE_MODEL", "Qwen/Qwen2.5-32B-Instruct")
    c.judge.concurrency = 128


def _set_layout(c: config_dict.ConfigDict, fit: Fit) -> None:
    """The mesh, and pieces of the batch that are the same on each chip of the slice."""
    c.mesh.fsdp = -1
    c.mesh.tensor = fit.tensor
    c.grpo.micro_batch_prompts = fit.update_prompts
    c.rollout.micro_batch_prompts = fit.rollout_prompts
    c.rollout.smallest = 8  # fewer rows take a chip as long
    # A row of the cold start is as long as a prompt with one of its 8 completions, or shorter.
    c.sft.micro_batch_size = fit.update_prompts * SAMPLES
    c.grpo.remat = c.sft.remat = fit.remat
