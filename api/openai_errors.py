"""Errors under /v1, in OpenAI's shape, so that its SDKs raise what their users catch."""

from typing import Any

from fastapi import Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel

from api.feed import Feed
from api.problems import RETRY_SECONDS, Refusal, Shape, first_fault, tell_wait
from api.wires.chat_completions import error, status_of
from relay.events import FAILED


class Detail(BaseModel):
    message: str
    type: str
    param: str | None
    code: str


class OpenAIError(BaseModel):
    """The body of every error under /v1."""

    error: Detail


RESPONSES: dict[int | str, dict[str, Any]] = {
    400: {
        "model": OpenAIError,
        "description": "The request, or the prompt, is refused, or the answer was cancelled before "
        "its first text",
    },
    404: {"model": OpenAIError, "description": "There is no such model"},
    409: {"model": OpenAIError, "description": "The Idempotency-Key came with another body before"},
    413: {"model": OpenAIError, "description": "The body is too large"},
    429: {"model": OpenAIError, "description": "The model service is at its limit"},
    500: {"model": OpenAIError, "description": "Something went wrong here"},
    502: {"model": OpenAIError, "description": "The answer failed, if streamed before it began"},
    503: {"model": OpenAIError, "description": "The queue is full or Redis is away"},
    504: {"model": OpenAIError, "description": "The model service fell silent, or took too long"},
}


def refusal(status: int, code: str, message: str, *, param: str | None = None) -> Response:
    body = {"error": error(code, message, param=param, status=status)}
    headers = {"retry-after": str(RETRY_SECONDS)} if status in {429, 503} else {}
    if status == 409:
        # SDKs take it for a lock that goes away.
        headers["x-should-retry"] = "false"
    return JSONResponse(body, status, headers)


def unknown_model(name: str, ours: str) -> Response:
    message = f"There is no model {name!r} here: use {ours!r}."
    return refusal(404, "model_not_found", message, param="model")


def failed(feed: Feed) -> Response:
    """Of an answer that has failed. The model service's own code goes before ours: programs match
    on it, as on `context_length_exceeded`."""
    value = feed.events[-1].value()
    status, theirs = status_of(value["code"]), value.get("upstream", {})
    code = theirs.get("code", value["code"])
    response = refusal(status, code, value["message"], param=theirs.get("param"))
    tell_wait(response, value)
    if not (feed.begun and value["retryable"]):
        # The worker has tried as often as it may: an SDK would multiply that by its own tries.
        response.headers["x-should-retry"] = "false"
    return response


def failure_of(feed: Feed, refuse: Refusal = refusal) -> Response | None:
    """What is answered instead of an answer that is gone, has failed or has not ended."""
    if feed.gone is not None:
        return refuse(410, feed.gone.code, feed.gone.message)
    last = feed.events[-1]
    if last.kind == FAILED:
        return failed(feed)
    if not last.terminal:
        return refuse(503, "draining", "Ask again, or watch the answer by its X-Stream-Id.")
    return None


def _invalid(failure: RequestValidationError) -> Response:
    fault = first_fault(failure)
    if fault.field is None:
        return refusal(400, "invalid_json", fault.message)
    code = "unknown_parameter" if fault.unknown else "invalid_value"
    return refusal(400, code, fault.message, param=fault.field)


def _refuse(status: int, code: str, message: str) -> Response:
    """A body that is no JSON, or goes no further as such, is one thing to a client, whoever notices
    it; and of 422 the SDKs make another exception than of any other body that is wrong."""
    if status in {400, 422}:
        return refusal(400, "invalid_json", message)
    return refusal(status, code, message)


SHAPE = Shape(_refuse, _invalid)
