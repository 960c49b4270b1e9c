"""A device without room ends a run in one line that says what would help."""

import jax
import jax.numpy as jnp
import pytest

from gtalign_jax import memory
from gtalign_jax.pod.ending import OutOfMemory
from gtalign_jax.pod.start import PodConfig
from gtalign_jax.pod.watch import Watch


@pytest.mark.parametrize(("phase", "named"), [
    ("update", "grpo.micro_batch_prompts"), ("rollout", "rollout.micro_batch_prompts"),
    ("evaluate", "evaluate.batch_size"), ("load", "mesh.fsdp=-1"),
])
def test_what_does_not_fit_is_told_with_phase_size_and_settings(phase, named):
    with pytest.raises(OutOfMemory) as ended, Watch(PodConfig()) as watch, \
            memory.explained(watch), watch.phase(phase, 3):
        jnp.zeros((1 << 50,), jnp.uint8).block_until_ready()
    text = str(ended.value)
    assert text.startswith(f"out of memory in {phase} of step 3 (1125899906842624")
    assert named in text and "\n" not in text
    assert ended.value.__suppress_context__


def test_another_error_of_the_device_stays_what_it_is():
    error = jax.errors.JaxRuntimeError("INTERNAL: planted")
    with pytest.raises(jax.errors.JaxRuntimeError) as ended, Watch(PodConfig()) as watch, \
            memory.explained(watch):
        raise error
    assert ended.value is error
