"""The paper's experiment (GTAlign, arXiv 2510.08872) on a Cloud TPU v5e slice.

    export GTALIGN_DATA=gs://BUCKET/data                       # or a local folder; default: data
    export GTALIGN_JUDGE_URL=http://HOST:8000/v1 GTALIGN_JUDGE_MODEL=NAME
    python -m gtalign_jax.main --config=configs/tpu_v5e.py:3b,all

The words after the colon, prompts, judge and cold start are as in configs/tpu_v4.py.

Hardware: the slice that each size is laid out for; `tensor` chips share one copy of the rollout's
weights.

    size   slice     chips   tensor   peak GiB of a chip   step, s
    0.5b   v5e-4         4        1          8.9 of 15.7           65
    3b     v5e-16       16        2             not compiled
    7b     v5e-32       32        4         11.0 of 15.7           88
    32b    v5e-256     256        8             not compiled

There is no 72b: a model's weights for the rollout are cut over at most as many chips as it has k/v
heads, and an eighth of them is 18 GB, more than a v5e chip has. v5litepod-N is the same as v5e-N.

Peak memory is the TPU compiler's (python -m gtalign_jax.compile), the step a roofline's lower bound
with every completion at full length; docs/pods.md says more.

Numbers to expect: not measured yet; this has not run on a TPU.
"""

from gtalign_jax.paper import experiment


def get_config(words=""):
    """The config of `configs/tpu_v5e.py:WORDS`; raises ValueError for a word that is none."""
    return experiment("v5e", words)
