"""The AI SDK's chat API: for useChat with its default transport, unmodified."""

from collections.abc import Awaitable, Callable
from contextlib import suppress
from functools import partial
from typing import Annotated, Any

from fastapi import APIRouter, Path, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field

from api.asking import AskingOfRequest
from api.feed import Feed
from api.parts import Parts, PartsOfApp, WhileResponding
from api.problems import RETRY_SECONDS, Shape, first_fault
from api.ui_request import UIChatRequest
from api.viewer import Viewer, words_in_events
from api.wires import sse
from api.wires import ui_messages as codec
from relay.errors import StreamGone
from relay.ids import alias_of


class UIMessageViewer(Viewer):
    """The answer as one UI message. It speaks before the answer does, so a failure is told in band:
    there it is one sentence, while of an error status the client shows the body."""

    wire = staticmethod(codec.encoder)

    def __init__(
        self,
        parts: Parts,
        feed: Feed,
        message_id: str,
        on_leave: Callable[[], Awaitable[None]] | None = None,
    ) -> None:
        self.words = words_in_events(
            first=partial(codec.encode_start, message_id),
            gone=lambda gone: codec.encode_error(gone.message),
            last=bytes,
        )
        super().__init__(
            parts.hub,
            feed,
            None,
            parts.pace,
            headers={**codec.HEADERS, "x-stream-id": feed.stream_id},
            on_leave=on_leave,
        )


class Refused(BaseModel):
    """The body of every error under /api."""

    error: str = Field(description="One sentence; first the field at fault, if it is one.")
    code: str


RESPONSES: dict[int | str, dict[str, Any]] = {
    400: {"model": Refused, "description": "The body is not JSON"},
    409: {"model": Refused, "description": "The Idempotency-Key came with another body before"},
    413: {"model": Refused, "description": "The body is too large"},
    422: {"model": Refused, "description": "A field is missing, wrong or unknown"},
    503: {"model": Refused, "description": "The queue is full or Redis is away"},
}


def refusal(status: int, code: str, message: str) -> Response:
    headers = {"retry-after": str(RETRY_SECONDS)} if status == 503 else {}
    return JSONResponse({"error": message, "code": code}, status, headers)


def _invalid(failure: RequestValidationError) -> Response:
    fault = first_fault(failure)
    if fault.field is None:
        return refusal(400, "bad_json", fault.message)
    return refusal(422, "invalid_request", fault.message)


SHAPE = Shape(refusal, _invalid)
router = APIRouter(prefix="/api/chat")


ChatId = Annotated[str, Path(min_length=1, max_length=255, description="As useChat has it.")]

_STREAMED: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "A UI message stream, as server-sent events. X-Stream-Id is the stream's id "
        "on the native API.",
        "content": {sse.MEDIA_TYPE: {}},
    }
}


@router.post(
    "",
    summary="The AI SDK's chat",
    response_class=Response,
    responses={**_STREAMED, **RESPONSES},
)
async def chat(body: UIChatRequest, asking: AskingOfRequest) -> Response:
    """Queue a job and stream the answer as one UI message. Dropping the connection does not stop
    it, unless X-On-Disconnect asks for it."""
    asking.must_stay()
    feed, _ = await asking.begin(body.to_asked(), body.id, chat=body.id)
    message_id = body.continued or message_id_of(feed.stream_id)
    return UIMessageViewer(asking.parts, feed, message_id, on_leave=asking.on_leave(feed))


def message_id_of(stream_id: str) -> str:
    """The same in every replay."""
    return f"msg-{alias_of(stream_id)}"


_OF_A_CHAT: dict[int | str, dict[str, Any]] = {status: RESPONSES[status] for status in (422, 503)}


# Ids of chats are the client's own, which may have slashes in them.
@router.get(
    "/{chat_id:path}/stream",
    summary="Resume the AI SDK's chat",
    response_class=Response,
    responses={**_STREAMED, 204: {"description": "No answer is being made."}, **_OF_A_CHAT},
)
async def resume(chat_id: ChatId, parts: PartsOfApp, watching: WhileResponding) -> Response:
    """The newest answer of the chat, from its start and then live, unless it has ended."""
    stream_id = await parts.log.newest_of(chat_id)
    if stream_id is None:
        return Response(status_code=204)
    try:
        feed = await watching.feed(stream_id)
    except StreamGone:
        return Response(status_code=204)
    if feed.ended:
        return Response(status_code=204)
    # Never under the id of a message that it goes on with: a replay takes the place of the whole
    # message, and what that had before is not in it.
    return UIMessageViewer(parts, feed, message_id_of(stream_id))


@router.post(
    "/{chat_id:path}/stop",
    status_code=204,
    summary="Stop the AI SDK's chat",
    responses=_OF_A_CHAT,
)
async def stop(chat_id: ChatId, parts: PartsOfApp) -> Response:
    """End the newest answer of the chat; idempotent, and harmless when there is none."""
    stream_id = await parts.log.newest_of(chat_id)
    if stream_id is not None:
        with suppress(StreamGone):
            await parts.cancel(stream_id)
    return Response(status_code=204)
