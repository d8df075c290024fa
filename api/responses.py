"""OpenAI's Responses API: an answer that outlives its connection, as its SDKs know it.

A response is a stream, and its id that of the stream after `resp_`.
"""

import asyncio
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Path, Query, Request, Response
from pydantic import AliasChoices, BaseModel, ConfigDict, Field
from starlette.types import Send

from api import openai_errors
from api.asking import AskingOfRequest, names
from api.feed import Feed
from api.held_viewer import OneAttemptViewer, Superseded
from api.long_response import Exit
from api.openai_errors import RESPONSES, failure_of, unknown_model
from api.parts import Parts, PartsOfApp, WhileResponding
from api.responses_request import Included, ResponsesRequest
from api.viewer import Viewer, words_in_events
from api.waiting import until_begun, until_ended, when_ended
from api.wires import responses as codec
from api.wires import sse
from api.wires.chat_completions import encode_gone
from relay.errors import StreamUnknown
from relay.events import Event, to_json
from relay.ids import is_stream_id
from relay.log import BIRTH

CANCEL_SECONDS = 2.0
"""How long a cancel waits for the worker to have written the end."""


class ResponseViewer(Viewer):
    """The events of a response, all of them or those after the one that the client has.

    Unlike other viewers it begins at the birth of the stream, since the numbers of the events are
    counted from there. What is skipped is not written.
    """

    # Without last ones: the SDK takes `retry:` alone for an event, and finds no JSON in it.
    words = words_in_events(first=bytes, gone=encode_gone, last=bytes)

    def __init__(
        self,
        parts: Parts,
        feed: Feed,
        born: codec.Born,
        *,
        skip: int = 0,
        on_leave: Callable[[], Awaitable[None]] | None = None,
    ) -> None:
        super().__init__(
            parts.hub,
            feed,
            None,
            parts.pace,
            headers=names(feed.stream_id),
            on_leave=on_leave,
        )
        self.wire = self._born = born
        self._skip = skip

    def _beginning(self) -> int:
        return 0

    def _take(self, index: int) -> tuple[bytes, int]:
        body, taken = super()._take(index)
        unseen, self._skip = codec.after(body, self._skip)
        return unseen, taken

    def _may_ride(self) -> bool:
        return self._skip == 0 and super()._may_ride()


# In this order: the first leaves out what was seen, of what the second lets through.
class PlainViewer(ResponseViewer, OneAttemptViewer):
    """The events for who asked for a stream alone. Frameworks take the text of all items together,
    and would splice a new attempt to the last: it ends in a failure instead. The answer goes on,
    and is retrieved by its id."""

    async def _follow(self, send: Send, over: asyncio.Future[Exit]) -> None:
        try:
            await super()._follow(send, over)
        except Superseded as superseded:
            told = self._feed.events[: superseded.index]
            await self._write(send, codec.interrupted(self._born, told))


def _refusal(status: int, code: str, message: str) -> Response:
    """To OpenAI's SDKs what is gone is `NotFoundError`, as what never was, and 410 is nothing."""
    return openai_errors.SHAPE.refuse(404 if status == 410 else status, code, message)


SHAPE = openai_errors.SHAPE._replace(refuse=_refusal)
router = APIRouter(prefix="/v1/responses")


async def _stream_id(
    response_id: Annotated[str, Path(description="As POST /v1/responses returned it.")],
) -> str:
    stream_id = response_id.removeprefix("resp_")
    if stream_id == response_id or not is_stream_id(stream_id):
        raise StreamUnknown("There is no response with this id: check it.")
    return stream_id


StreamId = Annotated[str, Depends(_stream_id)]

_ANSWERS: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "A `response`, or with `stream` its events as server-sent events. "
        "X-Stream-Id is the stream's id on the native API. Errors have OpenAI's shape.",
        "content": {"application/json": {}, sse.MEDIA_TYPE: {}},
    },
    **RESPONSES,
    404: {**RESPONSES[404], "description": "There is no such model or response, or no more"},
}

_OF_ONE: dict[int | str, dict[str, Any]] = {
    200: _ANSWERS[200],
    **{status: _ANSWERS[status] for status in (400, 404, 500, 503)},
}


@router.post("", summary="OpenAI's responses", response_class=Response, responses=_ANSWERS)
async def create(request: Request, body: ResponsesRequest, asking: AskingOfRequest) -> Response:
    """Queue a job and answer at once (`background`), with events (`stream`), or when it has ended.
    Without `background`, what fails before it began is an error by its status, also with `stream`,
    and a stream ends as failed (`interrupted`) if the answer is begun anew after its first words.
    Dropping the connection does not stop the answer, unless X-On-Disconnect asks for it."""
    parts = asking.parts
    if body.model != parts.model:
        return unknown_model(body.model, parts.model)
    asked = body.to_asked()
    if body.background and not body.stream:
        created = await asking.create(asked, "responses")
        if created.repeated:
            return await _now(parts, created.stream_id, body.format_type)
        return _told(_born(parts, created.stream_id, created.created_ms, body.format_type), [BIRTH])
    asking.must_stay()
    feed, created = await asking.begin(asked, "responses")
    born = _born(parts, created.stream_id, created.created_ms, body.format_type)
    if not body.stream:
        return await when_ended(request, asking, feed, partial(_ended, born))
    if not body.background:
        # Some clients know what to do by a status, and take `response.failed` for an empty answer.
        left = await until_begun(request, parts, feed) is Exit.LEFT
        # The viewer does what is to be done when its client has left.
        if not (feed.begun or left) and (failure := failure_of(feed, _refusal)):
            failure.headers.update(names(feed.stream_id))
            return failure
    viewer = ResponseViewer if body.background else PlainViewer
    return viewer(parts, feed, born, on_leave=asking.on_leave(feed))


class Retrieval(BaseModel):
    """The query of a retrieval."""

    model_config = ConfigDict(extra="forbid")

    stream: bool = False
    starting_after: int = Field(
        -1, ge=-1, description="The `sequence_number` of the last event that you have."
    )
    include_obfuscation: Literal["false"] | None = Field(
        None, description="As in `stream_options`: there is none."
    )
    # With brackets as the SDK spells a list; the OpenAPI document has the first name alone, since
    # generators make one name of both, and refuse that.
    include: Included = Field(
        [],
        validation_alias=AliasChoices("include", "include[]"),
        description="As POST /v1/responses takes it.",
    )


@router.get(
    "/{response_id}", summary="Look at a response", response_class=Response, responses=_OF_ONE
)
async def retrieve(
    stream_id: StreamId,
    parts: PartsOfApp,
    watching: WhileResponding,
    how: Annotated[Retrieval, Query()],
) -> Response:
    """The response as it is now; with `stream` its events from the first one on, or strictly after
    `starting_after`, then live."""
    if not how.stream:
        return await _now(parts, stream_id)
    feed = await watching.feed(stream_id)
    born = await _known(parts, stream_id)
    return ResponseViewer(parts, feed, born, skip=how.starting_after + 1)


@router.post(
    "/{response_id}/cancel",
    summary="Cancel a response",
    response_class=Response,
    responses=_OF_ONE,
)
async def cancel(
    request: Request, stream_id: StreamId, parts: PartsOfApp, watching: WhileResponding
) -> Response:
    """End the answer here and keep what is there; idempotent. Returns the response: `cancelled`,
    unless it ended otherwise before, or its worker takes longer than two seconds to end it."""
    await parts.cancel(stream_id)
    feed = await watching.feed(stream_id)
    try:
        async with asyncio.timeout(CANCEL_SECONDS):
            await until_ended(request, parts, feed)
    except TimeoutError:
        pass
    return await _now(parts, stream_id)


@router.delete(
    "/{response_id}",
    summary="Erase a response",
    responses={404: _ANSWERS[404], 503: RESPONSES[503]},
)
async def erase(stream_id: StreamId, parts: PartsOfApp) -> dict[str, Any]:
    """Prompt, answer and every trace go; if it is still running, it is stopped. Then 404."""
    await parts.erase(stream_id)
    return {"id": f"resp_{stream_id}", "object": "response.deleted", "deleted": True}


def _ended(born: codec.Born, feed: Feed) -> Response:
    """The response when it has ended; one that failed is an error by its status."""
    return failure_of(feed, _refusal) or _told(born, feed.events)


async def _now(parts: Parts, stream_id: str, text_format: str | None = None) -> Response:
    """The response as far as its log goes."""
    events = await parts.log.read(stream_id)
    return _told(await _known(parts, stream_id, text_format), events)


def _told(born: codec.Born, events: list[Event]) -> Response:
    body = to_json(codec.fold(born, events))
    return Response(body, media_type="application/json", headers=names(born.stream_id))


async def _known(parts: Parts, stream_id: str, text_format: str | None = None) -> codec.Born:
    """Raises StreamGone. The log does not tell when it was born, the state does, for as long."""
    state = await parts.log.state(stream_id)
    return _born(parts, stream_id, state.created_ms, text_format)


def _born(
    parts: Parts, stream_id: str, created_ms: int, text_format: str | None = None
) -> codec.Born:
    return codec.Born(stream_id, created_ms // 1000, parts.model, text_format)
