"""OpenAI's chat completions API, and Azure's: for every client that speaks it, unmodified."""

import asyncio
from typing import Annotated, Any

from fastapi import APIRouter, Path, Request, Response
from starlette.types import Send

from api.asking import Asking, AskingOfRequest, names
from api.chat_request import ChatCompletionRequest, Completion, DeploymentRequest
from api.feed import Feed
from api.held_viewer import HeldViewer, Superseded
from api.long_response import Exit
from api.openai_errors import (
    RESPONSES,
    failed,
    failure_of,
    refusal,
    unknown_model,
)
from api.parts import PartsOfApp
from api.viewer import words_in_events
from api.waiting import when_ended
from api.wires import chat_completions as codec
from api.wires import sse
from relay.events import CANCELLED, to_json

router = APIRouter(prefix="/v1")
azure = APIRouter(prefix="/openai/deployments")


class ChatCompletionViewer(HeldViewer):
    """The stream of a chat completion. A new attempt cannot be told in it, so then it ends in an
    error; the answer goes on, under its X-Stream-Id."""

    wire = staticmethod(codec.encoder)
    words = words_in_events(first=bytes, gone=codec.encode_gone, last=bytes)

    async def _follow(self, send: Send, over: asyncio.Future[Exit]) -> None:
        try:
            await super()._follow(send, over)
        except Superseded:
            await self._write(send, codec.encode_error(codec.INTERRUPTED))

    def _failed(self) -> Response:
        return failed(self._feed)

    def _refusal(self, status: int, code: str, detail: str) -> Response:
        return refusal(codec.STATUSES.get(code, status), code, detail)


class WithUsage(ChatCompletionViewer):
    wire = staticmethod(codec.encoder_with_usage)


@router.get("/models", summary="List the model")
async def models(parts: PartsOfApp) -> dict[str, Any]:
    """The one that this server answers with."""
    return {"object": "list", "data": [_model(parts.model)]}


@router.get("/models/{name:path}", summary="Is this the model?", responses={404: RESPONSES[404]})
async def model(name: str, parts: PartsOfApp) -> Any:
    return _model(name) if name == parts.model else unknown_model(name, parts.model)


def _model(name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": 0, "owned_by": "chat-relay"}


_ANSWERS: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "A `chat.completion`, or with `stream` its chunks as server-sent "
        "events. X-Stream-Id is the stream's id on the native API: to watch it, resume it or "
        "cancel it. Errors have OpenAI's shape.",
        "content": {"application/json": {}, sse.MEDIA_TYPE: {}},
    },
    **RESPONSES,
    410: {**RESPONSES[404], "description": "The answer was erased, has expired or was lost"},
}


@router.post(
    "/chat/completions",
    summary="OpenAI's chat completions",
    response_class=Response,
    responses=_ANSWERS,
)
async def create(
    request: Request, body: ChatCompletionRequest, asking: AskingOfRequest
) -> Response:
    """Queue a job and answer with what the model says. Dropping the connection does not stop the
    answer, unless X-On-Disconnect asks for it."""
    return await _answer(request, body, asking, body.model)


@azure.post(
    "/{deployment:path}/chat/completions",
    summary="Azure's chat completions",
    response_class=Response,
    responses=_ANSWERS,
)
async def create_by_deployment(
    request: Request,
    body: DeploymentRequest,
    asking: AskingOfRequest,
    deployment: Annotated[str, Path(description="One of GET /v1/models.")],
) -> Response:
    """The same, where Azure's clients ask for it; `api-version` may be any."""
    return await _answer(request, body, asking, deployment)


async def _answer(request: Request, body: Completion, asking: Asking, model: str) -> Response:
    parts = asking.parts
    if model != parts.model:
        return unknown_model(model, parts.model)
    asking.must_stay()
    feed, _ = await asking.begin(body)
    if not body.stream:
        return await when_ended(request, asking, feed, _whole)
    usage = body.stream_options is not None and body.stream_options.include_usage
    viewer = WithUsage if usage else ChatCompletionViewer
    return viewer(
        parts.hub,
        feed,
        None,
        parts.pace,
        headers=names(feed.stream_id),
        on_leave=asking.on_leave(feed),
    )


def _whole(feed: Feed) -> Response:
    """The answer as one object, however many attempts it took."""
    if failure := failure_of(feed):
        return failure
    if feed.events[-1].kind == CANCELLED:
        return refusal(codec.status_of(CANCELLED), CANCELLED, codec.CANCELLED_MESSAGE)
    return Response(to_json(codec.fold(feed.events)), media_type="application/json")
