"""The paper's experiment (GTAlign, arXiv 2510.08872) on a Cloud TPU v6e (Trillium) slice.

    export GTALIGN_DATA=gs://BUCKET/data                       # or a local folder; default: data
    export GTALIGN_JUDGE_URL=http://HOST:8000/v1 GTALIGN_JUDGE_MODEL=NAME
    python -m gtalign_jax.main --config=configs/tpu_v6e.py:7b,all

The words after the colon, prompts, judge and cold start are as in configs/tpu_v4.py.

Hardware: the slice that each size is laid out for; `tensor` chips share one copy of the rollout's
weights.

    size   slice     chips   tensor   peak GiB of a chip   step, s
    0.5b   v6e-4         4        1             not compiled
    3b     v6e-4         4        2             not compiled
    7b     v6e-8         8        4             not compiled
    32b    v6e-32       32        8             not compiled
    72b    v6e-128     128        8             not compiled

Peak memory is the TPU compiler's (python -m gtalign_jax.compile), the step a roofline's lower bound
with every completion at full length; docs/pods.md says more.

Numbers to expect: not measured yet; this has not run on a TPU.
"""

from gtalign_jax.paper import experiment


def get_config(words=""):
    """The config of `configs/tpu_v6e.py:WORDS`; raises ValueError for a word that is none."""
    return experiment("v6e", words)
