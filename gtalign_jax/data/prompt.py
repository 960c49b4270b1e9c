"""The one type that every source of prompts returns."""

import dataclasses
from collections.abc import Mapping
from typing import Any


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A prompt with all that is needed to judge an answer to it.

    Attributes:
      id: stable and unique in its split.
      data_source: the task, a key of `reward.tasks.TASKS`.
      messages: chat messages ({"role", "content"}) as they go into the chat template.
      ground_truth: what the task compares an answer with.
      question: the user's bare question, without format instructions; for judges and logs.
      extra: whatever else the source knows, such as {"kind": "ambiguous"}.
    """

    id: str
    data_source: str
    messages: tuple[Mapping[str, str], ...]
    ground_truth: str
    question: str
    extra: Mapping[str, Any] = dataclasses.field(default_factory=dict)
