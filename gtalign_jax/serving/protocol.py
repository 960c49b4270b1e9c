"""What may be asked over the wire: OpenAI's chat completions, and the game beside them.

Types are strict: "1" is no number and 1 no boolean. Fields of OpenAI's protocol (or of other
servers') that would change the reply and that this server does not have are refused by name unless
they say what is done anyway (`UNSUPPORTED`); all other unknown fields are ignored.
"""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PlainValidator,
    WithJsonSchema,
    model_validator,
)

from gtalign_jax.game import pricing, steering
from gtalign_jax.game.decide import RULES

MAX_MESSAGES = 256
MAX_CHARS = 200_000  # of one message
MAX_STOPS, MAX_STOP_CHARS = 4, 100
MAX_CHOICES = 4

UNSUPPORTED: dict[str, tuple] = {  # field -> the values that ask for nothing
    "audio": (None,),
    "best_of": (None, 1),
    "frequency_penalty": (None, 0),
    "function_call": (None, "none", "auto"),
    "functions": (None, []),
    "guided_choice": (None,),
    "guided_grammar": (None,),
    "guided_json": (None,),
    "guided_regex": (None,),
    "ignore_eos": (None, False),
    "logit_bias": (None, {}),
    "logprobs": (None, False),
    "min_p": (None, 0),
    "min_tokens": (None, 0),
    "modalities": (None, ["text"]),
    "prediction": (None,),
    "presence_penalty": (None, 0),
    "reasoning_effort": (None,),
    "repetition_penalty": (None, 1),
    "response_format": (None, {"type": "text"}),
    "stop_token_ids": (None, []),
    "tool_choice": (None, "none", "auto"),
    "tools": (None, []),
    "top_k": (None, 0, -1),
    "top_logprobs": (None, 0),
    "verbosity": (None,),
    "web_search_options": (None,),
}
MEANT = {  # what is easily written for a field that steers, which would then not be heard
    "decision_rule": "rule", "policy": "pricing", "price": "pricing", "prices": "pricing",
    "pricing_policy": "pricing", "row": "rows", "rules": "rule", "sensitivities": "sensitivity",
}  # fmt: skip
MISNAMED: dict[str, tuple] = dict.fromkeys(MEANT, (None,))
UNSUPPORTED_OF_A_MESSAGE: dict[str, tuple] = {
    "audio": (None,), "function_call": (None,), "tool_calls": (None, []),
}  # fmt: skip


class Unsupported(ValueError):
    """A field that this server does not have, by its name `param`."""

    def __init__(self, param: str) -> None:
        other = f"did you mean {MEANT[param]}?" if param in MEANT else "leave it out"
        super().__init__(f"{param} is not supported by this server; {other}")
        self.param = param


def _refuse(data: Any, unsupported: dict[str, tuple]) -> Any:
    if isinstance(data, dict):
        for key in data.keys() & unsupported.keys():
            allowed = unsupported[key]
            if not any(data[key] == value and _alike(data[key], value) for value in allowed):
                raise Unsupported(key)
    return data


def _alike(one: Any, other: Any) -> bool:
    """False is not 0 in JSON; 1 and 1.0 are the same."""
    return isinstance(one, bool) == isinstance(other, bool)


def _shown(unsupported: dict[str, tuple]) -> dict[str, Any]:
    return {
        key: {"enum": list(values), "description": "Not supported: only what asks for nothing."}
        for key, values in sorted(unsupported.items())
    }


def _describe(schema: dict[str, Any], model: type["Strict"]) -> None:
    schema["properties"] |= _shown(model.UNSUPPORTED)


class Strict(BaseModel):
    """What all that is posted has in common; fields of its UNSUPPORTED are refused by name."""

    model_config = ConfigDict(
        strict=True, extra="ignore", allow_inf_nan=False, json_schema_extra=_describe
    )

    UNSUPPORTED: ClassVar[dict[str, tuple]] = {}

    @model_validator(mode="before")
    @classmethod
    def _refuse(cls, data: Any) -> Any:
        return _refuse(data, cls.UNSUPPORTED)


class Part(Strict):
    """A piece of a message; text is all that the model reads."""

    type: Literal["text"]
    text: Annotated[str, Field(max_length=MAX_CHARS)]


class Message(Strict):
    UNSUPPORTED = UNSUPPORTED_OF_A_MESSAGE

    role: Literal["system", "developer", "user", "assistant"]
    content: (
        Annotated[str, Field(max_length=MAX_CHARS)]
        | Annotated[list[Part], Field(min_length=1, max_length=MAX_MESSAGES)]
    )

    @property
    def text(self) -> str:
        content = self.content
        return content if isinstance(content, str) else "".join(part.text for part in content)

    def plain(self) -> dict[str, str]:
        """As the chat template takes it; a "developer" is what was once called "system"."""
        role = "system" if self.role == "developer" else self.role
        return {"role": role, "content": self.text}


class StreamOptions(Strict):
    include_usage: bool | None = None


def _pricing_schema() -> dict[str, Any]:
    """What `pricing.read` takes, exactly but for a key that stands twice in a text, and texts with
    three policies or more."""
    texts, objects = [], []
    for name in pricing.POLICIES:
        lowest = -pricing.MAX_DOLLARS if name == "given" else 0
        dollars = {"type": "number", "minimum": lowest, "maximum": pricing.MAX_DOLLARS}
        keys = pricing.defaults(name)
        objects.append({
            "type": "object", "title": name, "required": ["policy"], "additionalProperties": False,
            "properties": {"policy": {"const": name}}
            | {key: {**dollars, "default": value} for key, value in keys.items()},
        })  # fmt: skip
        setting = rf"({'|'.join(keys)})=[0-9]{{1,6}}(\.[0-9]{{1,6}})?"
        texts.append(rf"{name}(:{setting}(,{setting})*)?" if keys else name)
    named = rf"({'|'.join(texts)})"
    text = {"type": "string", "maxLength": 500, "pattern": rf"^{named}( \+ {named})?$"}
    one = [text, *objects]
    many = {"type": "array", "items": {"anyOf": one}, "minItems": 1, "maxItems": pricing.MAX_PARTS}
    return {
        "anyOf": [*one, many, {"type": "null"}], "default": None,
        "description": "A pricing policy (GET /v1/game lists them with their keys), or a list of "
        "them: their sum.",
        "examples": [
            "subscription", "subscription + per_request:price=0.02",
            {"policy": "per_token", "output": 30},
        ],
    }  # fmt: skip


def _triple(low: float, size: int, what: str) -> dict[str, Any]:
    number = {"type": "number", "minimum": low, "maximum": pricing.MAX_UNITS}
    return {
        "type": "array", "items": number, "minItems": size, "maxItems": size, "description": what,
    }  # fmt: skip


USE = {  # what `pricing.read_usage` takes
    "anyOf": [
        {
            "type": "object", "required": ["input", "output"], "additionalProperties": False,
            "properties": {unit: _triple(0, 3, "Of DA, CQ, AQ.") for unit in pricing.UNITS},
        },
        {"type": "null"},
    ],
    "description": "Expected use of each action until the user has the answer.",
}  # fmt: skip


def _read(reader):
    return PlainValidator(lambda value: None if value is None else reader(value))


PricingValue = Annotated[
    pricing.Pricing | None, _read(pricing.read), WithJsonSchema(_pricing_schema())
]
UsageValue = Annotated[pricing.Usage | None, _read(pricing.read_usage), WithJsonSchema(USE)]
Rule = Literal[tuple(RULES)]
Payoff = Annotated[float, Field(ge=-steering.MAX_PAYOFF, le=steering.MAX_PAYOFF)]
Sensitivity = Annotated[
    list[Annotated[float, Field(ge=0, le=steering.MAX_PAYOFF)]],
    Field(min_length=2, max_length=2, description="Payoff points per US dollar: [LLM, user]."),
]


class Steer(Strict):
    """How a request is steered; what is left out is as the server was started."""

    UNSUPPORTED = MISNAMED
    STEERING: ClassVar = ("pricing", "usage", "sensitivity", "rule", "mode", "rows", "floor")

    pricing: PricingValue = None
    usage: UsageValue = None
    sensitivity: Sensitivity | None = None
    rule: Rule | None = None
    mode: Literal[steering.MODES] | None = None
    rows: Literal[steering.ROWS] | None = None
    floor: Payoff | None = Field(None, description="Counts where it is above the server's own.")

    @property
    def asked(self) -> bool:
        """Whether it says anything at all."""
        return any(getattr(self, name) is not None for name in self.STEERING)


class ChatRequest(Steer):
    UNSUPPORTED = UNSUPPORTED | MISNAMED

    model: str
    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES)]
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: (
        Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARS)]
        | Annotated[
            list[Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARS)]],
            Field(max_length=MAX_STOPS),
        ]
        | None
    ) = Field(None, description="Ends the content (not the chain) before it.")
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: Annotated[str, Field(max_length=1000)] | None = None

    @property
    def limit(self) -> int | None:
        """The completion's largest number of tokens; the newer of the two names counts."""
        return self.max_completion_tokens or self.max_tokens

    @property
    def stops(self) -> tuple[str, ...]:
        stop = self.stop or ()
        return (stop,) if isinstance(stop, str) else tuple(stop)


class Cell(Strict):
    """What one cell of the matrix is worth."""

    model_config = ConfigDict(extra="forbid")

    LLM: Payoff
    user: Payoff


class Matrix(Strict):
    model_config = ConfigDict(extra="forbid")

    VQ_DA: Cell
    VQ_CQ: Cell
    VQ_AQ: Cell
    DQ_DA: Cell
    DQ_CQ: Cell
    DQ_AQ: Cell


class DecideRequest(Steer):
    payoff: Matrix
