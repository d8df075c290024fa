"""Errors under /v1, in OpenAI's shape, so that its SDKs raise what their users catch."""

from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute
from pydantic import BaseModel
from redis.exceptions import RedisError
from starlette.exceptions import HTTPException

from api.problems import REDIS_AWAY_DETAIL, RETRY_SECONDS, status_of
from api.wires.chat_completions import error
from relay.errors import RelayError
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


class OpenAIRoute(APIRoute):
    """A route whose every error has OpenAI's shape."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def handle_or_refuse(request: Request) -> Response:
            try:
                return await handle(request)
            except RelayError as failure:
                return refusal(status_of(failure), failure.code, failure.message)
            except RedisError as failure:
                logger.warning("redis_away", error=type(failure).__name__)
                return refusal(503, "redis_away", REDIS_AWAY_DETAIL)
            except RequestValidationError as failure:
                return _invalid(failure)
            except HTTPException as failure:
                return refusal(failure.status_code, "invalid_request", str(failure.detail))

        return handle_or_refuse


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
