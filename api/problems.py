"""Errors: RFC 9457 problem+json with a stable `code`, or the shape that another API gives them."""

import re
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field
from redis.exceptions import RedisError
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.routing import Match

from api.counters import REFUSED
from relay.connection import reason
from relay.errors import (
    BadRequest,
    Draining,
    IdempotencyConflict,
    MalformedCursor,
    QueueFull,
    RelayError,
    StreamGone,
    StreamUnknown,
)
from relay.logs import get_logger

logger = get_logger()

RETRY_SECONDS = 2
REDIS_AWAY_DETAIL = "Redis is away or takes nothing in: try again in a few seconds."

ERRORS_TOLD = 20
"""Of a request with more wrong fields the rest is not told: the reply must not outgrow it."""

_STATUS: dict[type[RelayError], int] = {
    BadRequest: 422,
    MalformedCursor: 400,
    StreamUnknown: 404,
    IdempotencyConflict: 409,
    StreamGone: 410,
    QueueFull: 503,
    Draining: 503,
}
_HTTP = {
    400: ("bad_json", "Send one JSON object as the body."),
    404: ("not_found", "See /docs for what there is."),
    405: ("method_not_allowed", "See /docs for the methods of this path."),
    413: ("body_too_large", None),
}
TITLES = {
    "bad_json": "The body is not JSON",
    "body_too_large": "The body is too large",
    "cancelled": "The stream was cancelled",
    "draining": "This process is shutting down",
    "idempotency_conflict": "The Idempotency-Key is taken",
    "internal": "Something went wrong here",
    "invalid_request": "The request is not valid",
    "malformed_cursor": "The cursor is malformed",
    "method_not_allowed": "The method is not allowed here",
    "not_json": "The body is not announced as JSON",
    "not_found": "There is nothing here",
    "queue_full": "The queue is full",
    "redis_away": "Redis is away",
    "stream_gone": "The stream is gone",
    "stream_unknown": "There is no such stream",
    "unknown_host": "This server does not go by that name",
}


Refusal = Callable[[int, str, str], Response]
"""Of status, code and one sentence."""


class Shape(NamedTuple):
    """How an API says what is wrong."""

    refuse: Refusal
    refuse_invalid: Callable[[RequestValidationError], Response]


class Problem(BaseModel):
    """The body of every error of the native API."""

    type: str = Field(examples=["urn:chat-relay:problem:stream_gone"])
    title: str = Field(examples=["The stream is gone"])
    status: int = Field(examples=[410])
    code: str = Field(description="Stable; for programs.", examples=["stream_gone"])
    detail: str = Field(description="One sentence that says what to do.")
    errors: list[dict[str, str]] | None = Field(
        None, description="Which fields of the request are wrong, and why."
    )


def problem(
    status: int, code: str, detail: str, *, errors: list[dict[str, str]] | None = None
) -> Response:
    body: dict[str, Any] = {
        "type": f"urn:chat-relay:problem:{code}",
        "title": TITLES.get(code, "The answer failed"),
        "status": status,
        "code": code,
        "detail": detail,
    }
    if errors is not None:
        body["errors"] = errors
    headers = {"retry-after": str(RETRY_SECONDS)} if status == 503 else {}
    return JSONResponse(body, status, headers, media_type="application/problem+json")


def _status_of(error: RelayError) -> int:
    return next((_STATUS[kind] for kind in type(error).__mro__ if kind in _STATUS), 500)


def answer_to(error: Exception, shape: Shape) -> Response:
    """Whatever has gone wrong, as an API says it; counted."""
    if isinstance(error, RequestValidationError):
        # Each API has finer codes for it, and they are counted as one.
        REFUSED.labels("invalid_request").inc()
        return shape.refuse_invalid(error)
    status, code, detail = _status_code_detail(error)
    REFUSED.labels(code).inc()
    response = shape.refuse(status, code, detail)
    if isinstance(error, HTTPException):
        response.headers.update(error.headers or {})
    return response


def _status_code_detail(error: Exception) -> tuple[int, str, str]:
    """Status, code and one sentence; what an operator should know of goes to the log."""
    match error:
        case RelayError():
            if isinstance(error, QueueFull):
                logger.warning("queue_full")
            return _status_of(error), error.code, error.message
        case RedisError():
            logger.warning("redis_away", error=reason(error))
            return 503, "redis_away", REDIS_AWAY_DETAIL
        case HTTPException():
            code, detail = _HTTP.get(error.status_code, ("invalid_request", None))
            return error.status_code, code, detail or str(error.detail)
    logger.error("internal_error", exc_info=error)
    return 500, "internal", "This is a fault of the server; its log says more."


class Fault(NamedTuple):
    """The first thing that is wrong with a request; without a field, the body as a whole is."""

    message: str
    field: str | None = None
    unknown: bool = False


def first_fault(failure: RequestValidationError) -> Fault:
    """For APIs whose errors tell of one."""
    first = failure.errors()[0]
    if first["type"] == "json_invalid" or first["loc"] == ("body",):
        return Fault("Send one JSON object as the body, with content-type: application/json.")
    field = ".".join(str(part) for part in first["loc"][1:])
    unknown = first["type"] == "extra_forbidden"
    return Fault(f"{field}: {_reason(first)}.", field, unknown)


def _reason(fault: Mapping[str, Any]) -> str:
    """pydantic's, but where that speaks of its own classes."""
    match fault["type"]:
        case "extra_forbidden":
            return "This server does not know it"
        case "model_attributes_type" | "model_type" | "dict_type":
            return "It must be a JSON object"
        case "union_tag_not_found":
            return "It must be a JSON object with a known type"
        case "union_tag_invalid":
            known = fault["ctx"]["expected_tags"]
            return f"The type {fault['ctx']['tag']!r} is not known here, but {known}"
    return str(fault["msg"])


def redis_away() -> Response:
    return problem(503, "redis_away", REDIS_AWAY_DETAIL)


def responses(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The error bodies of a route, for its OpenAPI entry."""
    content = {"application/problem+json": {"schema": Problem.model_json_schema()}}
    descriptions = {
        400: "Bad JSON or a malformed cursor",
        404: "No stream was ever created with this id",
        409: "The Idempotency-Key came with another body before, or the answer was cancelled "
        "before its first text",
        410: "Erased, expired or lost",
        413: "The body is over the limit",
        415: "The body is not announced as JSON",
        422: "A field is missing, wrong or unknown; `errors` names it",
        502: "The answer failed before its first text",
        503: "Redis is away, the queue is full or this process shuts down; see Retry-After",
    }
    return {
        status: {"description": descriptions[status], "content": content} for status in statuses
    }


def install(app: FastAPI, others: Mapping[str, Shape]) -> None:
    """Answer every error of the application as a problem; under the path of another API, which
    `others` names by its beginning, in the shape of that one."""

    async def on_error(request: Request, error: Exception) -> Response:
        content_type = request.headers.get("content-type", "")
        response = answer_to(error, shape_of(request.url.path, others, content_type))
        if "allow" in response.headers:
            # Below a mount no route knows the path; what stands there has said it itself.
            response.headers["allow"] = ", ".join(_allowed(request)) or response.headers["allow"]
        return response

    for kind in (RelayError, RedisError, RequestValidationError, HTTPException, Exception):
        app.add_exception_handler(kind, on_error)


def _allowed(request: Request) -> Iterator[str]:
    """The methods of a path. It has a route for each, of which Starlette names the first one's."""
    for method in ("DELETE", "GET", "HEAD", "PATCH", "POST", "PUT"):
        scope = {**request.scope, "method": method}
        if any(route.matches(scope)[0] is Match.FULL for route in request.app.routes):
            yield method


def tell_wait(response: Response, failure: Mapping[str, Any]) -> None:
    """When to ask again after an answer that failed: as the model service asks, never if that would
    not help, else as for any such status."""
    if "retry_after" in failure:
        response.headers["retry-after"] = str(failure["retry_after"])
    elif not failure["retryable"]:
        del response.headers["retry-after"]


def shape_of(path: str, others: Mapping[str, Shape], content_type: str = "") -> Shape:
    """That of the API whose path it is."""
    shapes = (shape for beginning, shape in others.items() if path.startswith(beginning))
    return next(shapes, None) or native(content_type)


_JSON = re.compile(r"application/(.+\+)?json\s*(;|$)", re.IGNORECASE)
"""What FastAPI parses; any other body it takes for a string."""


def native(content_type: str = "") -> Shape:
    """The shape of our own API, for a request whose body is announced so."""
    return Shape(problem, partial(_invalid, content_type))


_THERE = "OpenAI's own body goes to /v1/chat/completions"
_INSTEAD = {
    ("body", "model"): f"The server chooses it: leave it out. {_THERE}",
    ("body", "stream"): f"Leave it out: Accept: text/event-stream streams. {_THERE}",
}
"""Fields that nearly everybody tries first, since OpenAI's API has them."""


def _invalid(content_type: str, error: RequestValidationError) -> Response:
    details = error.errors()[:ERRORS_TOLD]
    if details[0]["loc"] == ("body",) and not _JSON.match(content_type):
        return problem(415, "not_json", "Send the body with content-type: application/json.")
    if any(detail["type"] == "json_invalid" for detail in details):
        return problem(400, "bad_json", "Send one JSON object as the body.")
    errors = [
        {
            "field": _field(detail["loc"]),
            "problem": _INSTEAD.get(detail["loc"]) or _reason(detail),
        }
        for detail in details
    ]
    first = errors[0]
    sentence = f"{first['field']}: {first['problem']}."
    return problem(422, "invalid_request", sentence, errors=errors)


def _field(location: tuple[int | str, ...]) -> str:
    parts = [str(part) for part in location if part != "body"]
    return ".".join(parts) or "body"
