"""The server's application: OpenAI's endpoints, the game's, health and the page.

    GET  /v1/models  /v1/models/ID      the one model that is served
    POST /v1/chat/completions           serving/chat: a reply, whole or streamed
    GET  /v1/game                       pricing policies, rules, and the server's own settings
    POST /v1/game/decide                a matrix under prices, without the model
    GET  /health  /openapi.json         open to all, with or without a key
    GET  /  and the page's files        the folder serving/page, read once at start

Before any of it stands the gate (serving/gate). The description in /openapi.json is exact: it names
the model, the limits and every refusal.
"""

import dataclasses
import email.message
import json
from pathlib import Path
from typing import Any

from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.openapi.utils import get_openapi
from fastapi.routing import APIRoute
from pydantic import TypeAdapter, ValidationError

from gtalign_jax.serving import catalogue, chat, errors
from gtalign_jax.serving.chat import Service
from gtalign_jax.serving.errors import ApiError
from gtalign_jax.serving.gate import Disconnected, Gate, Traffic
from gtalign_jax.serving.protocol import ChatRequest, DecideRequest
from gtalign_jax.serving.replies import (
    Completion,
    Described,
    ErrorReply,
    GameReply,
    Health,
    ModelCard,
    ModelList,
)
from gtalign_jax.serving.stream import EventStream, while_there

PAGE = Path(__file__).resolve().parent / "page"
TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript",
         ".svg": "image/svg+xml"}  # fmt: skip
LEFT = 499  # what the log says of a client that left; nobody receives it
EVENT = {
    "type": "object", "required": ["data"],
    "properties": {"data": {
        "type": "string", "description": "A chat.completion.chunk, {\"error\": …} or [DONE].",
    }},
}  # fmt: skip
REFUSALS = {
    400: "A field is missing, wrong, or asks for what this server does not do.",
    401: "The key is missing or wrong.",
    404: "There is no such thing.",
    408: "The body did not arrive in time.",
    413: "The body is too large.",
    415: "The body is not declared as application/json.",
    429: "Too many requests are waiting; Retry-After says when to try again.",
    500: "A fault of the server's.",
    503: "The server is shutting down, or its model has failed.",
    504: "The reply was not ready by the deadline.",
}


@dataclasses.dataclass(frozen=True)
class ApiConfig:
    """Limits of the HTTP side.

    Attributes:
      key: what clients must send as a bearer token; None: all are let in.
      max_body_bytes: of a request's body. body_s: within which it must have arrived.
    """

    key: str | None = dataclasses.field(default=None, repr=False)
    max_body_bytes: int = 1 << 20
    body_s: float = 30.0

    def __post_init__(self) -> None:
        for name in ("max_body_bytes", "body_s"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)}: must be > 0")
        if self.key is not None and not (self.key.isascii() and self.key.isprintable()):
            raise ValueError("the key must be printable ASCII: it travels in a header")


def create_app(service: Service, config: ApiConfig) -> FastAPI:
    """The application; `app.state.traffic` lets whoever runs it drain it."""
    app = FastAPI(
        title="gtalign_jax", version="1", docs_url=None, redoc_url=None, redirect_slashes=False,
        description="OpenAI's chat completions by a model that writes down the game it plays.",
    )  # fmt: skip
    app.state.traffic = Traffic()
    errors.install(app)
    app.add_middleware(
        Gate, traffic=app.state.traffic, key=config.key.encode() if config.key else None,
        max_body_bytes=config.max_body_bytes, body_s=config.body_s,
    )  # fmt: skip
    for router in (_models(service), _chat(service), _game(service), _open(service, app)):
        app.include_router(router)
    _add_page(app)
    app.openapi = lambda: _description(app, service, config)
    return app


class StrictRoute(APIRoute):
    """A route whose JSON is strict: no NaN, no lone surrogates, no nesting without end.

    What is posted must be called JSON: without asking first, a page of another origin can make a
    browser send forms and plain text only, so that it cannot spend this server's time.
    """

    def get_route_handler(self) -> Any:
        handle = super().get_route_handler()

        async def strictly(request: Request) -> Response:
            if request.method == "POST":
                kind = email.message.Message()
                kind["content-type"] = request.headers.get("content-type", "")
                if kind.get_content_type() != "application/json":
                    raise ApiError(415, "Content-Type must be application/json")
            return await handle(StrictRequest(request.scope, request.receive))

        return strictly


class StrictRequest(Request):
    async def json(self) -> Any:
        body = await self.body()
        try:
            # pydantic's parser knows depth, size of numbers and Unicode; the other one NaN.
            _JSON.validate_json(body)
            return json.loads(body, parse_constant=_no_constant)
        except ValidationError as error:
            said = error.errors()[0]["msg"].partition(": ")[2]
        except ValueError as error:
            said = str(error)
        raise ApiError(400, f"the body is no JSON: {said}", code="invalid_json")


_JSON = TypeAdapter(Any)


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no number of JSON's")


def _refusals(*statuses: int) -> dict[int | str, dict[str, Any]]:
    return {
        status: {"model": ErrorReply, "description": REFUSALS[status]} for status in statuses
    }


def _models(service: Service) -> APIRouter:
    router = APIRouter(route_class=StrictRoute, tags=["models"])
    card = ModelCard(id=service.name, created=service.created)

    @router.get("/v1/models", responses=_refusals(401, 503))
    async def list_models() -> ModelList:
        return ModelList(data=[card])

    @router.get("/v1/models/{model:path}", responses=_refusals(401, 404, 503))
    async def retrieve_model(model: str) -> ModelCard:
        if model != service.name:
            raise ApiError(
                404, f"the model {model!r} does not exist; this server has {service.name!r}",
                "model", "model_not_found",
            )  # fmt: skip
        return card

    return router


def _chat(service: Service) -> APIRouter:
    router = APIRouter(route_class=StrictRoute, tags=["chat"])
    stream = {"text/event-stream": {"schema": EVENT}}

    @router.post(
        "/v1/chat/completions",
        response_model=Completion,
        responses={
            200: {"description": "The reply; events where `stream` is true.", "content": stream},
            **_refusals(400, 401, 404, 408, 413, 415, 429, 500, 503, 504),
        },
    )
    async def create_chat_completion(body: ChatRequest, request: Request) -> Any:
        turn = await chat.begin(service, body)
        if body.stream:
            return EventStream(turn.events(), turn.cancel)
        try:
            return await while_there(request.receive, turn.whole())
        except Disconnected:
            return Response(status_code=LEFT)
        finally:
            turn.cancel()

    return router


def _game(service: Service) -> APIRouter:
    router = APIRouter(route_class=StrictRoute, tags=["game"])

    @router.get("/v1/game", responses=_refusals(401, 503))
    async def describe_game() -> GameReply:
        return catalogue.game(service)

    @router.post(
        "/v1/game/decide", responses=_refusals(400, 401, 408, 413, 415, 500, 503)
    )
    def decide(body: DecideRequest) -> Described:  # in a thread: the solver may compile
        return catalogue.decide(service, body)

    return router


def _open(service: Service, app: FastAPI) -> APIRouter:
    router = APIRouter(tags=["server"])

    @router.get("/health", responses={503: {"model": Health, "description": "Not serving."}})
    async def health(response: Response) -> Health:
        state = service.engine.state()
        state.pop("error", None)  # the log's, not the world's
        status = "ok"
        if app.state.traffic.closing:
            status = "closing"
        elif state["phase"] != "running":
            status = "failed"
        response.status_code = 200 if status == "ok" else 503
        return Health(status=status, model=service.name, engine=state)

    return router


def _add_page(app: FastAPI) -> None:
    """One route for each file of the page: no path of a client's ever opens a file."""
    for file in sorted(PAGE.iterdir()):
        if file.suffix in TYPES:
            path = "/" if file.name == "index.html" else f"/{file.name}"
            app.add_api_route(path, _page(file), include_in_schema=False)


def _page(file: Path) -> Any:
    content, media_type = file.read_bytes(), TYPES[file.suffix]

    async def page() -> Response:
        return Response(content, media_type=media_type, headers={"cache-control": "no-cache"})

    return page


def _description(app: FastAPI, service: Service, config: ApiConfig) -> dict[str, Any]:
    """The OpenAPI description with what only this server knows: its model, limits and key."""
    if app.openapi_schema is None:
        found = get_openapi(
            title=app.title, version=app.version, description=app.description, routes=app.routes
        )
        chat_schema = found["components"]["schemas"]["ChatRequest"]
        chat_fields = chat_schema["properties"]
        chat_fields["model"]["enum"] = [service.name]
        question = [{"role": "user", "content": "How tall is the tower?"}]
        chat_schema["examples"] = [
            {"model": service.name, "messages": question},
            {"model": service.name, "messages": question, "pricing": "none", "stream": True},
        ]
        limits = service.engine.config
        for name in ("max_tokens", "max_completion_tokens"):
            chat_fields[name]["anyOf"][0]["maximum"] = limits.new_tokens
        guarded = [path for path in found["paths"] if path.startswith("/v1/")]
        for path in guarded:
            for operation in found["paths"][path].values():
                if config.key is not None:
                    operation["security"] = [{"key": []}]
                if "429" in operation["responses"]:
                    operation["responses"]["429"]["headers"] = {
                        "Retry-After": {
                            "description": "Seconds.", "required": True,
                            "schema": {"type": "integer", "minimum": 1},
                        }
                    }  # fmt: skip
        if config.key is not None:
            found["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        app.openapi_schema = found
    return app.openapi_schema
