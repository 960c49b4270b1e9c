"""The paper's experiment (GTAlign, arXiv 2510.08872) on a Cloud TPU v4 slice.

    export GTALIGN_DATA=gs://BUCKET/data                       # or a local folder; default: data
    export GTALIGN_JUDGE_URL=http://HOST:8000/v1 GTALIGN_JUDGE_MODEL=NAME
    python -m gtalign_jax.main --config=configs/tpu_v4.py:all

The word after the colon chooses the prompts: one source (math-hard, medium, ambig_qa, wildguard)
or `all`, which is also what no word means. They are read from the folder as the paper's code lays
it out, GTALIGN_DATA/SOURCE/{train,test}.parquet; other places are named as in
    --config.data.train="('my/train.parquet',)" --config.data.test="('my/test.parquet',)"
The published data hold no medium/train.parquet. `:medium` wants one of your own at that place;
`:all` trains on the other three sources and evaluates on all four.

math-hard is scored by mathematical equivalence and asks no judge. The others ask any server that
speaks the OpenAI chat protocol (vLLM, SGLang, a vendor's): its address and the model's name come
from the two variables above, its key from OPENAI_API_KEY.

The run: each policy is evaluated on the held-out prompts before and after 150 GRPO steps, curves
and tables go to `workdir`, a Hugging Face directory to `workdir`/hf. The same command continues a
run that was interrupted. A cold start on chains of your own, JSONL of {"messages", "completion"},
goes before it with
    --config.stages="('sft','grpo','evaluate','export')" --config.sft.examples=chains.jsonl

Hardware: as it stands for up to 16 chips, over which each micro-batch of 16 prompts is cut; on
more, raise --config.grpo.micro_batch_prompts (a divisor of 64). Weights, moments, gradients and
reference in float32 are 62 GB over all chips; each chip also holds the rollout's weights (6 GB,
bfloat16) and 0.15 GB of keys and values for each completion in flight at full length: 19 GB on the
4 chips of a v4-8, 5 GB on the 16 of a v4-32.
One process drives all chips so far; the hosts of a larger slice do not yet find each other.
The update's attention holds whole score matrices. The TPU compiler's word for 16 chips, one prompt
x 8 completions on each: 61 GiB of temporaries a chip at 4,096 completion tokens, where a chip has
31; with --config.mesh.tensor=2 33 GiB in all, still too much. Until attention is computed in
blocks, shorten the completions: 18 GiB in all (without the rollout's weights) at
    --config.mesh.tensor=2 --config.rollout.max_new_tokens=2048 \\
    --config.grpo.micro_batch_prompts=8

Numbers to expect: not measured yet; this has not run on a TPU. Watch `welfare/user` and
`welfare/llm` rise together and `rollout/truncated` stay near 0.

What differs from the paper:
  1. GRPO in place of PPO: no critic, the mean of a prompt's 8 completions is the baseline. So the
     512 completions of a step are 64 prompts x 8;
  2. the KL towards the starting policy is a term of the loss (k3), not of the reward;
  3. a completion whose judge failed is left out; it is not scored 0;
  4. a matrix with a boolean or a non-finite payoff counts as unreadable.
"""

import os

from gtalign_jax.config import Config
from gtalign_jax.freeze import to_config_dict

TRAINABLE = ("math-hard", "ambig_qa", "wildguard")  # sources whose training prompts are published
SOURCES = (*TRAINABLE, "medium")
ARGUMENTS = (*SOURCES, "all")


def get_config(source="all"):
    """The config of `configs/tpu_v4.py:SOURCE`; raises ValueError for another word."""
    if source not in ARGUMENTS:
        raise ValueError(f"unknown source {source!r}; allowed: {', '.join(ARGUMENTS)}")
    folder = os.environ.get("GTALIGN_DATA", "data").rstrip("/")
    train, test = (TRAINABLE, SOURCES) if source == "all" else ((source,), (source,))

    c = to_config_dict(Config())
    c.workdir = f"runs/tpu_v4-{source}"
    c.stages = ("grpo", "evaluate", "export")
    c.model.path = "Qwen/Qwen2.5-3B-Instruct"  # or a local or gs:// directory
    c.model.compute_dtype = "bfloat16"

    c.data.source = "parquet"
    c.data.train = tuple(f"{folder}/{name}/train.parquet" for name in train)
    c.data.test = tuple(f"{folder}/{name}/test.parquet" for name in test)
    c.data.max_prompt_tokens = 2048

    c.grpo.steps = 150
    c.grpo.prompts_per_step = 64
    c.grpo.samples_per_prompt = 8
    c.grpo.micro_batch_prompts = 16  # a multiple of the chips that share a batch
    c.grpo.learning_rate = 1e-6
    c.grpo.beta = 0.001
    c.grpo.remat = True
    c.rollout.max_new_tokens = 4096
    c.rollout.temperature = 1.0

    c.sft.learning_rate = 1e-5  # of the optional cold start
    c.sft.batch_size = 64
    c.sft.micro_batch_size = 16
    c.sft.max_completion_tokens = 2048
    c.sft.remat = True

    c.judge.kind = "none" if source == "math-hard" else "http"
    c.judge.base_url = os.environ.get("GTALIGN_JUDGE_URL", "http://localhost:8000/v1")
    c.judge.model = os.environ.get("GTALIGN_JUDGE_MODEL", "Qwen/Qwen2.5-32B-Instruct")
    c.judge.concurrency = 128

    c.mesh.fsdp = -1
    c.checkpoint.every = 10
    c.evaluate.batch_size = 64
    return c
