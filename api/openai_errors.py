"""Errors under /v1, in OpenAI's shape, so that its SDKs raise what their users catch."""

from typing import Any

from fastapi import Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel

from api.problems import RETRY_SECONDS
from api.shaped_route import ShapedRoute
from api.wires.chat_completions import error
from relay.logs import get_logger

logger = get_logger("api")

STATUSES = {
    "answer_timeout": 504,
    "cancelled": 400,
    "content_filter": 400,
    "internal": 500,
    "interrupted": 503,
    "upstream_rate_limited": 429,
    "upstream_refused": 400,
    "upstream_timeout": 504,
    "upstream_unavailable": 503,
}
"""Of an answer that failed before its first chunk; any other code is 502."""


class Detail(BaseModel):
    message: str
    type: str
    param: str | None
    code: str


class OpenAIError(BaseModel):
    """The body of every error under /v1."""

    error: Detail


RESPONSES: dict[int | str, dict[str, Any]] = {
    400: {"model": OpenAIError, "description": "The request, or the prompt, is refused"},
    404: {"model": OpenAIError, "description": "There is no such model"},
    429: {"model": OpenAIError, "description": "The model service is at its limit"},
    502: {"model": OpenAIError, "description": "The answer failed before its first chunk"},
    503: {"model": OpenAIError, "description": "The queue is full or Redis is away"},
}


def refusal(status: int, code: str, message: str, *, param: str | None = None) -> Response:
    body = {"error": error(code, message, param=param, status=status)}
    headers = {"retry-after": str(RETRY_SECONDS)} if status in {429, 503} else {}
    return JSONResponse(body, status, headers)


class OpenAIRoute(ShapedRoute):
    """A route whose every error has OpenAI's shape."""

    def refuse(self, status: int, code: str, message: str) -> Response:
        return refusal(status, code, message)

    def refuse_invalid(self, failure: RequestValidationError) -> Response:
        return _invalid(failure)


def _invalid(failure: RequestValidationError) -> Response:
    first = failure.errors()[0]
    if first["type"] == "json_invalid" or first["loc"] == ("body",):
        message = "Send one JSON object as the body, with content-type: application/json."
        return refusal(400, "invalid_json", message)
    names = [str(part) for part in first["loc"] if part not in {"body", "header", "query"}]
    param = ".".join(names)
    unknown = first["type"] == "extra_forbidden"
    code = "unknown_parameter" if unknown else "invalid_value"
    message = "This server does not know it." if unknown else f"{first['msg']}."
    return refusal(400, code, f"{param}: {message}", param=param)
