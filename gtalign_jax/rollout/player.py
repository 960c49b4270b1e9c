"""A policy that is ready to play: its weights on the devices, and what it takes to talk to it."""

import dataclasses

from transformers import PreTrainedTokenizerBase

from gtalign_jax.game.pricing import Usage
from gtalign_jax.model.sharding import Layout
from gtalign_jax.model.spec import ModelConfig, Params


@dataclasses.dataclass(frozen=True)
class Player:
    """One policy at inference.

    Attributes:
      name: what users call it. model: its sizes.
      params: in the dtype to compute in, laid out for rollout.
      stop_ids: token ids that end a completion.
      layout: how arrays lie on the mesh; None on one device.
      instruction: how it was taught to be asked (`data.asking`).
      usage: expected use per action, where it was measured.
    """

    name: str
    model: ModelConfig
    params: Params
    tokenizer: PreTrainedTokenizerBase
    stop_ids: tuple[int, ...]
    layout: Layout | None
    instruction: str
    usage: Usage | None
