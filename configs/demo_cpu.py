"""The whole method on a laptop: a small model, the built-in tasks, a few minutes.

    bash launch/demo.sh
or  python -m gtalign_jax.main --config=configs/demo_cpu.py

The model starts from random weights. A cold start teaches it the format and the facts, but each
action is as likely as the others; GRPO on mutual welfare teaches it which action to choose.
"""

from gtalign_jax.config import Config
from gtalign_jax.freeze import to_config_dict


def get_config():
    c = to_config_dict(Config())
    c.workdir = "runs/demo"
    c.stages = ("sft", "grpo", "evaluate")

    c.model.family = "qwen3"
    c.model.qkv_bias = False
    c.model.qk_norm = True
    c.model.init_scale = 0.08
    c.model.vocab_size = 1000
    c.model.d_model = 128
    c.model.d_ff = 448
    c.model.num_layers = 4
    c.model.num_heads = 4
    c.model.num_kv_heads = 4
    c.model.head_dim = 32
    c.model.max_position = 512
    c.model.compute_dtype = "float32"

    c.data.source = "builtin"
    c.data.max_prompt_tokens = 64
    c.data.test_size = 256

    c.sft.steps = 900
    c.sft.batch_size = 16
    c.sft.learning_rate = 4e-3
    c.sft.warmup_updates = 20
    c.sft.decay = "cosine"
    c.sft.final_fraction = 0.1
    c.sft.max_completion_tokens = 96
    c.sft.repriced = 0.25

    c.grpo.steps = 45
    c.grpo.prompts_per_step = 16
    c.grpo.samples_per_prompt = 8
    c.grpo.learning_rate = 6e-4
    c.grpo.warmup_updates = 3
    c.grpo.decay = "linear"
    c.grpo.final_fraction = 0.1
    c.grpo.beta = 0.001
    c.rollout.max_new_tokens = 80
    c.rollout.shrink = 0.5  # completions are about equally long: fewer sizes to compile
    c.rollout.smallest = 16

    c.mesh.fsdp = -1
    c.checkpoint.every = 20
    c.evaluate.batch_size = 128
    c.evaluate.temperature = 1.0
    c.evaluate.samples = 2
    return c
