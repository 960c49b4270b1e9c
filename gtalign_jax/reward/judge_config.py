"""What a user says about the judge: the section `judge` of a config."""

import dataclasses
import json
import math
import urllib.parse
from dataclasses import dataclass
from typing import Any, Literal

KINDS = ("rule", "http", "jax", "none")
MODES = ("live", "replay")
THINKING = ("default", "on", "off")


@dataclass(frozen=True)
class JudgeConfig:
    """Which judge, how it is reached, and what becomes of its failures.

    Attributes:
      kind: "rule" (built-in tasks, and tasks that bring a rule), "http" (any server that speaks the
        OpenAI chat protocol), "jax" (a model on the run's own devices) or "none".
      rules: what has a rule is judged by it, also where `kind` is "http" or "jax".
      base_url: of the server, such as http://localhost:8000/v1; several, separated by commas, share
        the work and stand in for each other.
      model: the name that the servers know; for "jax" a directory or hub name.
      api_key_env: environment variable that holds the key; unset is fine for local servers.
      concurrency: requests in flight. requests_per_minute, tokens_per_minute (of prompt and reply
        together): never exceeded within any 60 s; 0: no limit. All three hold for the whole run:
        the processes of a pod share them evenly.
      timeout_s: seconds of one attempt, waiting in our own queues not counted.
      retries: attempts after the first, for failures that may pass.
      deadline_s: seconds for what is judged at once, waiting included: a piece of a step, or an
        evaluation; what is late is missing.
      max_missing: the largest share of a step's judgements that may fail before the run stops.
      mode: "replay" answers from the store alone, without a network.
      store: directory of the judgements; empty: WORKDIR/judgements; "none": nothing is kept.
      preflight: ask for the models and for one golden sample per task before the run begins.
      max_tokens, temperature, top_p: of the judge's reply.
      thinking: "on" or "off" switches reasoning through the chat template (enable_thinking);
        reasoning_effort: low, medium or high, for servers that know it; empty: not sent.
      extra_body: a JSON object of more fields of each request.
      prompt_tokens: for "jax", the longest prompt of the judge; a longer one is missing.
      batch_size: for "jax", judgements at a time.
    """

    kind: Literal["rule", "http", "jax", "none"] = "rule"
    rules: bool = True
    base_url: str = ""
    model: str = ""
    api_key_env: str = "OPENAI_API_KEY"
    concurrency: int = 32
    requests_per_minute: int = 0
    tokens_per_minute: int = 0
    timeout_s: float = 120.0
    retries: int = 4
    deadline_s: float = 1800.0
    max_missing: float = 0.5
    mode: Literal["live", "replay"] = "live"
    store: str = ""
    preflight: bool = True
    max_tokens: int = 1024
    temperature: float = 0.0
    top_p: float = 1.0
    thinking: Literal["default", "on", "off"] = "default"
    reasoning_effort: str = ""
    extra_body: str = ""
    prompt_tokens: int = 4096
    batch_size: int = 64

    def __post_init__(self):
        """Refuses what could never work, before anything is compiled or sent."""
        for name, choices in (("kind", KINDS), ("mode", MODES), ("thinking", THINKING)):
            if getattr(self, name) not in choices:
                allowed = ", ".join(choices)
                raise ValueError(f"judge.{name}={getattr(self, name)!r}; allowed: {allowed}")
        needed = {"http": ("base_url", "model"), "jax": ("model",)}
        for name in needed.get(self.kind, ()):
            if not getattr(self, name).strip(" ,"):
                raise ValueError(f"judge.{name} is empty; judge.kind={self.kind!r} needs it")
        parts = [urllib.parse.urlsplit(url) for url in self.urls]
        if any(part.scheme not in ("http", "https") or not part.hostname for part in parts):
            # Not repeated: it may hold a password.
            raise ValueError("judge.base_url must be http://HOST/PATH or https://HOST/PATH, or "
                             "several separated by commas")
        if any("?" in url for url in self.urls):  # it would be logged, and may hold a key
            raise ValueError("judge.base_url has a query (?…); allowed: scheme, host and path; a "
                             "key comes from the environment (judge.api_key_env)")
        for name in ("concurrency", "max_tokens", "prompt_tokens", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"judge.{name}={getattr(self, name)} must be >= 1")
        for name in ("retries", "requests_per_minute", "tokens_per_minute", "temperature"):
            if not 0 <= getattr(self, name) < math.inf:  # nor NaN
                raise ValueError(f"judge.{name}={getattr(self, name)} must be >= 0")
        for name in ("timeout_s", "deadline_s"):
            if not getattr(self, name) > 0:
                raise ValueError(f"judge.{name}={getattr(self, name)} must be > 0")
        for name in ("max_missing", "top_p"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"judge.{name}={getattr(self, name)} must lie between 0 and 1")
        if self.kind == "rule" and not self.rules:
            raise ValueError("judge.rules=False with judge.kind='rule': nobody would judge")
        if 0 < self.tokens_per_minute < self.max_tokens:
            raise ValueError(
                f"judge.tokens_per_minute={self.tokens_per_minute} is less than judge.max_tokens="
                f"{self.max_tokens}: no reply would ever fit"
            )
        if "://" in self.store:
            raise ValueError(f"judge.store={self.store!r}: allowed is a local directory, or 'none'")
        if self.mode == "replay" and self.store == "none":
            raise ValueError("judge.mode='replay' with judge.store='none': nothing to replay")
        self.more_fields()

    @property
    def urls(self) -> tuple[str, ...]:
        """The servers, in the order given."""
        return tuple(url.strip() for url in self.base_url.split(",") if url.strip())

    def more_fields(self) -> dict[str, Any]:
        """What a request holds besides the usual; ValueError where `extra_body` is no object."""
        try:
            more = json.loads(self.extra_body or "{}")
        except (ValueError, RecursionError):
            more = None
        if not isinstance(more, dict):
            raise ValueError(f"judge.extra_body={self.extra_body!r} is no JSON object")
        template = more.get("chat_template_kwargs", {})
        if not isinstance(template, dict):
            raise ValueError(f"judge.extra_body={self.extra_body!r}: chat_template_kwargs must be "
                             "an object")
        if self.thinking != "default":
            more["chat_template_kwargs"] = template | {"enable_thinking": self.thinking == "on"}
        if self.reasoning_effort:
            more["reasoning_effort"] = self.reasoning_effort
        return more

    def share(self, processes: int) -> "JudgeConfig":
        """Limits of one of `processes` that ask at the same time.

        Raises ValueError for a limit that leaves a process without any request.
        """
        if processes == 1:
            return self
        names = ("concurrency", "requests_per_minute", "tokens_per_minute")
        parts = {name: getattr(self, name) // processes for name in names}
        for name, part in parts.items():
            if getattr(self, name) and not part:
                raise ValueError(
                    f"judge.{name}={getattr(self, name)} cannot be shared by {processes} "
                    f"processes; it must be >= {processes}"
                )
        if 0 < parts["tokens_per_minute"] < self.max_tokens:
            raise ValueError(
                f"judge.tokens_per_minute={self.tokens_per_minute}: each of {processes} processes "
                f"would have less than judge.max_tokens={self.max_tokens}"
            )
        return dataclasses.replace(self, **parts)

    def identity(self) -> dict[str, Any]:
        """What a judgement depends on besides its prompt."""
        return {
            "model": self.model, "max_tokens": self.max_tokens, "temperature": self.temperature,
            "top_p": self.top_p, "more": self.more_fields(),
        }
