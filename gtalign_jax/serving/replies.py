"""What is answered over the wire: OpenAI's replies, and the game that stands behind them."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorReply(BaseModel):
    error: ErrorDetail


class ModelCard(BaseModel):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "gtalign_jax"


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[ModelCard]


class Described(BaseModel):
    """A game before and after its prices (`game.steering.describe`)."""

    model_config = ConfigDict(extra="allow")

    written: dict[str, Any]
    edited: dict[str, Any]
    pricing: dict[str, Any]
    rule: str
    before: dict[str, Any]
    decision: dict[str, Any]
    changed: bool
    money: dict[str, Any]
    usage: dict[str, Any]


class Game(BaseModel):
    """What stands behind a reply's content: the whole chain, and the game if it can be read."""

    model_config = ConfigDict(extra="allow")

    chain: str
    error: str | None = Field(description="Why matrix or response is missing.")
    steered: bool
    reason: str | None = Field(description="Why a steered request went on unsteered.")
    forced: list[tuple[int, int]] = Field(
        description="Ranges of the completion's tokens that were put there, not drawn."
    )
    seed: int = Field(description="With it, the same request gives the same reply.")


class Reply(BaseModel):
    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None
    gtalign: Game


class Choice(BaseModel):
    index: int
    message: Reply
    finish_reason: Literal["stop", "length"]
    logprobs: None = None


class TokenCount(BaseModel):
    prompt_tokens: int
    completion_tokens: int = Field(description="Forced tokens among them.")
    total_tokens: int


class Completion(BaseModel):
    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[Choice]
    usage: TokenCount


class Parameter(BaseModel):
    default: float
    help: str


class PolicyCard(BaseModel):
    help: str
    parameters: dict[str, Parameter]


class GameReply(BaseModel):
    """What pricing policies and rules there are, and what holds where a request says nothing."""

    model: str
    actions: list[str]
    user_actions: list[str]
    keys: list[str]
    policies: dict[str, PolicyCard]
    rules: dict[str, str]
    modes: dict[str, str]
    rows: dict[str, str]
    usage: dict[str, list[float]] | None = Field(description="null: not known for this model.")
    sensitivity: list[float]
    pricing: str
    rule: str
    mode: str
    floor: float
    steered_by_default: bool


class Health(BaseModel):
    model_config = ConfigDict(extra="allow")

    status: Literal["ok", "closing", "failed"]
    model: str
