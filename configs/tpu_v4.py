"""The paper's experiment (GTAlign, arXiv 2510.08872) on a Cloud TPU v4 slice.

    export GTALIGN_DATA=gs://BUCKET/data                       # or a local folder; default: data
    export GTALIGN_JUDGE_URL=http://HOST:8000/v1 GTALIGN_JUDGE_MODEL=NAME
    python -m gtalign_jax.main --config=configs/tpu_v4.py:3b,all

The words after the colon choose the model and the prompts, in any order; without one, 3b and all:
a size of Qwen2.5-Instruct (0.5b, 3b, 7b, 32b, 72b), and one source (math-hard, medium, ambig_qa,
wildguard) or `all`. They are read from the folder as the paper's code lays it out,
GTALIGN_DATA/SOURCE/{train,test}.parquet; other places are named as in
    --config.data.train="('my/train.parquet',)" --config.data.test="('my/test.parquet',)"
The published data hold no medium/train.parquet. `:medium` wants one of your own at that place;
`:all` trains on the other three sources and evaluates on all four. Another model of these families
is --config.model.path=NAME-OR-DIRECTORY beside the word of the size that comes nearest.

minerva, abg-coqa and advbench, or `ood` for the three, are out of domain: held-out prompts without
training ones (GTALIGN_DATA/{minerva_math,abg_coqa,advbench}/test.parquet), to evaluate what was
trained on the others:
    python -m gtalign_jax.evaluate --config=configs/tpu_v4.py:ood --checkpoint=runs/tpu_v4-all \\
        --baseline=given

math-hard is scored by mathematical equivalence and asks no judge. The others ask any server that
speaks the OpenAI chat protocol (vLLM, SGLang, a vendor's): its address and the model's name come
from the two variables above, its key from OPENAI_API_KEY.

The run: each policy is evaluated on the held-out prompts before and after 150 GRPO steps, curves
and tables go to `workdir`, a Hugging Face directory to `workdir`/hf. The same command continues a
run that was interrupted. A cold start on chains of your own, JSONL of {"messages", "completion"},
goes before it with
    --config.stages="('sft','grpo','evaluate','export')" --config.sft.examples=chains.jsonl

Hardware: the slice that each size is laid out for; `tensor` chips share one copy of the rollout's
weights.

    size   slice     chips   tensor   peak GiB of a chip   step, s
    0.5b   v4-8          4        1         15.2 of 30.7           42
    3b     v4-8          4        2         20.5 of 30.7          206
    7b     v4-16         8        4         25.0 of 30.7          204
    32b    v4-64        32        8             not compiled
    72b    v4-256      128        8             not compiled

On a larger slice the batch is cut over more chips; micro-batches are counted per batch shard, so
the same settings hold up to 64 shards, and beyond with a larger --config.grpo.prompts_per_step.

Peak memory is the TPU compiler's (python -m gtalign_jax.compile), the step a roofline's lower bound
with every completion at full length; docs/pods.md says more.

Numbers to expect: not measured yet; this has not run on a TPU. Watch `welfare/user` and
`welfare/llm` rise together and `rollout/truncated` stay near 0. What differs from the paper stands
in gtalign_jax/paper.py.
"""

from gtalign_jax.paper import experiment


def get_config(words=""):
    """The config of `configs/tpu_v4.py:WORDS`; raises ValueError for a word that is none."""
    return experiment("v4", words)
