"""What to do where a device has no room: an error of XLA's in words of the config.

compile.py tells beforehand what fits; this is for who did not ask it.
"""

import contextlib
import re
from collections.abc import Iterator

import jax

from gtalign_jax.pod.ending import OutOfMemory
from gtalign_jax.pod.watch import Watch

CURES = {  # by phase, the cheapest first
    "rollout": "a smaller rollout.micro_batch_prompts (0: all) or rollout.max_new_tokens",
    "reward": "a smaller judge.batch_size, if the judge lies on these devices",
    "update": "a smaller grpo.micro_batch_prompts (sft.micro_batch_size in the cold start; 0: all) "
              "or logit_chunk, grpo.remat='full' (sft.remat), or a shorter rollout.max_new_tokens",
    "evaluate": "a smaller evaluate.batch_size or rollout.max_new_tokens",
}
OTHERWISE = "weights and optimizer cut over more devices: mesh.data=1, mesh.fsdp=-1, or more chips"


@contextlib.contextmanager
def explained(watch: Watch) -> Iterator[None]:
    """Raises OutOfMemory in place of XLA's RESOURCE_EXHAUSTED."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        where = watch.raised_in(error)
        asked = re.search(r"allocat\w* (?:of )?([\d.]+ ?\w*)", str(error))
        size = f" ({asked[1]} were asked for)" if asked else ""
        cure = "; ".join(filter(None, (CURES.get(where.split()[0]), OTHERWISE)))
        raise OutOfMemory(f"out of memory in {where}{size}. What helps: {cure}. python -m "
                          "gtalign_jax.compile says what would fit.") from None
