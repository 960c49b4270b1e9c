"""Every refusal in the form that OpenAI's clients read: {"error": {message, type, param, code}}.

Whatever goes wrong on the way of a request ends here: what the application raises, what the
framework raises before it is reached (unknown paths, bodies that do not fit), and what nobody
foresaw, of which a client learns nothing but that it happened.
"""

import logging
from typing import Any

from fastapi import FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse

from gtalign_jax.serving.protocol import Unsupported

log = logging.getLogger(__name__)

TYPES = {  # status -> `type`; other 4xx are mistakes in the request
    401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error",
    500: "server_error", 503: "server_error", 504: "timeout_error",
}  # fmt: skip
CODES = {  # status -> `code` where the raiser knows no better one
    401: "invalid_api_key", 404: "not_found", 405: "method_not_allowed", 408: "request_timeout",
    413: "body_too_large", 415: "unsupported_media_type", 429: "overloaded",
    500: "internal_error", 503: "unavailable", 504: "deadline_exceeded",
}  # fmt: skip
MAX_MESSAGE = 500  # characters of a message: it may quote the request


class ApiError(HTTPException):
    """A refusal: HTTP status, what to say, and which field of the request it is about."""

    def __init__(
        self, status: int, message: str, param: str | None = None, code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:  # fmt: skip
        super().__init__(status, message, headers)
        self.message, self.param = message, param
        self.code = code or CODES.get(status, "invalid_value")

    @property
    def body(self) -> dict[str, Any]:
        kind = TYPES.get(self.status_code, "invalid_request_error")
        message = self.message
        if len(message) > MAX_MESSAGE:
            message = message[: MAX_MESSAGE - 1] + "…"
        # A message may quote what cannot be sent: half a surrogate pair.
        message = message.encode("utf-8", "replace").decode("utf-8")
        return {
            "error": {"message": message, "type": kind, "param": self.param, "code": self.code}
        }

    def response(self) -> JSONResponse:
        return JSONResponse(self.body, self.status_code, headers=self.headers)


def unforeseen(error: BaseException, where: str) -> ApiError:
    """What a client is told of a fault of ours; the log has all of it."""
    log.error("%s failed", where, exc_info=error)
    return ApiError(500, "the server failed on this request; its log says why")


def install(app: FastAPI) -> None:
    """Gives `app` its handlers. A handler of a status serves Starlette's own exceptions too."""
    app.add_exception_handler(RequestValidationError, _of_validation)
    app.add_exception_handler(ApiError, _of_http)
    for status in range(400, 500):
        app.add_exception_handler(status, _of_http)
    app.add_exception_handler(Exception, _of_anything)


async def _of_validation(request: Request, error: RequestValidationError) -> JSONResponse:
    # Of a value that may be one of several kinds, the kind that it came nearest to tells most.
    first = min(error.errors(), key=lambda one: one["type"].endswith("_type"))
    where = ".".join(str(part) for part in first["loc"] if part != "body")
    message = first["msg"].removeprefix("Value error, ")
    param = next((part for part in first["loc"][1:] if isinstance(part, str)), None)
    cause = (first.get("ctx") or {}).get("error")
    if isinstance(cause, Unsupported):
        param = cause.param
    return ApiError(400, f"{where}: {message}" if where else message, param).response()


async def _of_http(request: Request, error: HTTPException) -> JSONResponse:
    if isinstance(error, ApiError):
        return error.response()
    message = f"{request.method} {request.url.path}: {error.detail}"
    return ApiError(error.status_code, message, headers=dict(error.headers or {})).response()


async def _of_anything(request: Request, error: Exception) -> JSONResponse:
    return unforeseen(error, f"{request.method} {request.url.path}").response()
