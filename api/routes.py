"""The native API."""

from contextlib import suppress
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Header, Path, Query, Request, Response
from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field
from redis.exceptions import RedisError

from api.asking import AskingOfRequest
from api.chat_request import ChatRequest
from api.held_viewer import HeldViewer, TextViewer
from api.hub import Watching
from api.long_response import HEADERS
from api.multi_viewer import Lane, MultiViewer
from api.parts import Parts, PartsOfApp, WhileResponding
from api.problems import answer_to, native, problem, redis_away, responses
from api.status import StreamStatus
from api.viewer import NativeViewer, NotNow, Viewer
from api.wires import multiplexed, sse, text
from relay.errors import BadRequest, StreamGone, StreamUnknown
from relay.events import Cursor, to_json
from relay.ids import is_stream_id
from relay.log import GONE, Created

router = APIRouter()

MOST_STREAMS = 100
"""On one connection: its cursor must fit into a header."""


class Accepted(BaseModel):
    """A stream stands and its job is queued."""

    stream_id: str
    status: Literal["queued", "running", "completed", "failed", "cancelled"] = Field(
        description="`queued`, unless an Idempotency-Key led to an earlier stream."
    )
    url: str = Field(examples=["/streams/ID"])
    events_url: str = Field(examples=["/streams/ID/events"])
    cancel_url: str = Field(examples=["/streams/ID/cancel"])


class Cancelled(BaseModel):
    stream_id: str
    status: Literal["cancelling", "completed", "failed", "cancelled"]


async def _stream_id(
    stream_id: Annotated[str, Path(description="As POST /chat returned it.")],
) -> str:
    if not is_stream_id(stream_id):
        raise StreamUnknown("There is no stream with this id: check it.")
    return stream_id


StreamId = Annotated[str, Depends(_stream_id)]
Accept = Annotated[str, Header(include_in_schema=False)]
LastEventId = Annotated[
    str, Header(description="The cursor: the id of the last event that you have.")
]
LastEventIdInQuery = Annotated[
    str,
    Query(
        alias="last_event_id",
        description="The same, for a first request of an EventSource; the header goes first.",
    ),
]

_STREAMED: dict[str, Any] = {
    sse.MEDIA_TYPE: {
        "schema": {
            "type": "string",
            "description": "Server-Sent Events. `id` is the cursor, `event` one of queued, started,"
            " chunk, completed, failed, cancelled; `data` is one JSON object.",
        },
        "example": 'id: 1-0\nevent: started\ndata: {"attempt":1,"model":"gpt-4o"}\n\n'
        'id: 1-2\nevent: chunk\ndata: {"text":"Hello"}\n\n'
        'id: 1-9\nevent: completed\ndata: {"finish_reason":"stop","usage":{"total_tokens":12},'
        '"chunks":8,"sha256":"…"}\n\n',
    },
    text.MEDIA_TYPE: {
        "schema": {"type": "string", "description": "The text itself, as it comes."},
        "example": "Hello! How can I help?",
    },
}


@router.post(
    "/chat",
    status_code=202,
    response_model=Accepted,
    summary="Ask for an answer",
    responses={
        200: {
            "description": "With `Accept: text/event-stream` or `text/plain`: created and watched "
            "in one request; the id is in X-Stream-Id. Dropping the connection does not stop the "
            "answer, unless X-On-Disconnect asks for it.",
            "content": _STREAMED,
        },
        **responses(400, 409, 410, 413, 415, 422, 502, 503),
    },
)
async def chat(
    body: ChatRequest,
    asking: AskingOfRequest,
    accept: Accept = "*/*",
) -> Response:
    """Queue a job and return the id of its stream at once.

    The answer is then made by a worker, whoever watches or not.
    """
    viewer = _viewer_for(accept)
    if viewer is None:
        created = await asking.create(body, body.recovery, recovery=body.recovery)
        return await _accepted(asking.parts, created)
    if issubclass(viewer, HeldViewer):
        asking.must_stay()
    feed, _ = await asking.begin(body, body.recovery, recovery=body.recovery)
    return viewer(
        asking.parts.hub,
        feed,
        None,
        asking.parts.pace,
        headers=_names(feed.stream_id),
        on_leave=asking.on_leave(feed),
    )


async def _accepted(parts: Parts, created: Created) -> Response:
    stream_id, url = created.stream_id, f"/streams/{created.stream_id}"
    status = (await parts.log.state(stream_id)).status if created.repeated else "queued"
    accepted = Accepted.model_validate(
        {
            "stream_id": stream_id,
            "status": status,
            "url": url,
            "events_url": f"{url}/events",
            "cancel_url": f"{url}/cancel",
        }
    )
    return JSONResponse(accepted.model_dump(), 202, _names(stream_id))


def _names(stream_id: str) -> dict[str, str]:
    return {"location": f"/streams/{stream_id}", "x-stream-id": stream_id}


@router.get(
    "/streams/events",
    summary="Watch several streams on one connection",
    response_class=Response,
    responses={
        200: {
            "description": "The events of all, as they come. `data` begins with `stream_id`; `id` "
            "is one cursor for all. A stream that is gone is told by a `failed` of its own, once.",
            "content": {sse.MEDIA_TYPE: _STREAMED[sse.MEDIA_TYPE]},
        },
        204: {"description": "You have each of them whole, or were told that it is gone."},
        **responses(400, 404, 410, 422, 503),
    },
)
async def several(
    parts: PartsOfApp,
    watching: WhileResponding,
    ids: Annotated[str, Query(description="Ids of streams, with commas between; at most 100.")],
    accept: Accept = "*/*",
    last_event_id: LastEventId = "",
    last_event_id_in_query: LastEventIdInQuery = "",
) -> Response:
    """For browsers, which allow six connections to a host. Otherwise as one stream's events."""
    stream_ids = list(dict.fromkeys(ids.split(",")))
    if len(stream_ids) > MOST_STREAMS:
        raise BadRequest(f"ids: at most {MOST_STREAMS} streams share a connection.")
    if not all(is_stream_id(stream_id) for stream_id in stream_ids):
        raise StreamUnknown("There is no stream with one of these ids: check them.")
    given = last_event_id or last_event_id_in_query
    places = multiplexed.split(given, len(stream_ids))
    try:
        lanes = [await _lane(watching, *pair) for pair in zip(stream_ids, places, strict=True)]
    except RedisError as error:
        return _not_now(error, _viewer_for(accept))
    if all(lane.over for lane in lanes):
        return Response(status_code=204)
    if not any(places) and all(lane.feed.gone is not None for lane in lanes):
        raise StreamGone(GONE)
    return MultiViewer(parts.hub, lanes, parts.pace)


async def _lane(watching: Watching, stream_id: str, place: multiplexed.Place) -> Lane:
    if place == multiplexed.TOLD_GONE:
        return Lane.of_nothing(stream_id, StreamGone(GONE), told=True)
    try:
        return Lane(await watching.feed(stream_id), place)
    except StreamGone as gone:
        return Lane.of_nothing(stream_id, gone, told=False)


@router.get(
    "/streams/{stream_id}/events",
    summary="Watch a stream",
    response_class=Response,
    responses={
        200: {"description": "The events after the cursor, then live.", "content": _STREAMED},
        204: {"description": "The cursor is at the terminal event: you have it all."},
        **responses(400, 404, 409, 410, 502, 503),
    },
)
async def events(
    stream_id: StreamId,
    parts: PartsOfApp,
    watching: WhileResponding,
    accept: Accept = "*/*",
    last_event_id: LastEventId = "",
    last_event_id_in_query: LastEventIdInQuery = "",
) -> Response:
    """Server-Sent Events from the newest `started`, or strictly after the cursor.

    `started` means: clear what you have. Each attempt that has begun begins with it, and with the
    newest a replay.
    """
    given = last_event_id or last_event_id_in_query
    cursor = Cursor.parse(given) if given else None
    viewer = _viewer_for(accept)
    try:
        feed = await watching.feed(stream_id)
    except RedisError as error:
        return _not_now(error, viewer)
    if feed.ended and cursor is not None and cursor == feed.top:
        return Response(status_code=204)
    viewer = viewer or NativeViewer
    return viewer(
        parts.hub,
        feed,
        cursor,
        parts.pace,
        headers={"x-stream-id": stream_id},
    )


@router.get(
    "/streams/{stream_id}",
    response_model=StreamStatus,
    summary="Look at a stream",
    responses=responses(404, 410, 503),
)
async def status(stream_id: StreamId, parts: PartsOfApp) -> Response:
    """State, text so far, usage, times, attempt, viewers, place in the queue."""
    log = await parts.log.read(stream_id)
    state = await parts.log.state(stream_id)
    if state.ended_ms is not None and not log[-1].terminal:
        # It has ended since the log was read, and the end would be told without its reason.
        log += await parts.log.read(stream_id, log[-1].cursor)
    status = StreamStatus.of(stream_id, state, log, parts.presence.total(stream_id, state))
    # Not by FastAPI: it can write neither half an emoji nor what is nested deeply, and a model
    # service may send either.
    return Response(to_json(dict(status)), media_type="application/json")


@router.post(
    "/streams/{stream_id}/cancel",
    response_model=Cancelled,
    summary="Cancel a stream",
    responses=responses(404, 410, 503),
)
async def cancel(stream_id: StreamId, parts: PartsOfApp) -> Cancelled:
    """End the answer here: the upstream connection is closed and the partial text kept.

    Idempotent. `cancelling` means that a worker is being told; `cancelled` comes to every viewer.
    """
    verdict = await parts.cancel(stream_id)
    return Cancelled.model_validate({"stream_id": stream_id, "status": verdict})


@router.delete(
    "/streams/{stream_id}",
    status_code=204,
    summary="Erase a stream",
    responses=responses(404, 410, 503),
)
async def erase(stream_id: StreamId, parts: PartsOfApp) -> Response:
    """Prompt, answer and every trace go; if it is still running, it is stopped. Then 410."""
    await parts.erase(stream_id)
    return Response(status_code=204)


@router.head("/healthz", include_in_schema=False)
@router.get("/healthz", summary="Is the process alive?")
async def healthz() -> dict[str, str]:
    return {"status": "ok"}


@router.head("/readyz", include_in_schema=False)
@router.get("/readyz", summary="Can it serve?", responses=responses(503))
async def readyz(parts: PartsOfApp, request: Request) -> Response:
    """503 while Redis does not answer and from the moment that this process shuts down."""
    if parts.hub.draining:
        return problem(503, "draining", "Ask another process.")
    if parts.hub.redis_away:
        return redis_away()
    await request.app.state.redis.ping()
    return JSONResponse({"status": "ok"}) if parts.hub.connected else redis_away()


_VIEWERS = {"application/json": None, sse.MEDIA_TYPE: NativeViewer, text.MEDIA_TYPE: TextViewer}


def _not_now(error: RedisError, viewer: type[Viewer] | None) -> Response:
    """Counted and logged like any refusal, also where it is none for the client's sake."""
    refusal = answer_to(error, native())
    return NotNow(headers=HEADERS) if viewer is NativeViewer else refusal


def _viewer_for(accept: str) -> type[Viewer] | None:
    """The kind of viewer that an Accept header asks for by name; None if for none, or rather for
    JSON, as HTTP clients for JSON do that name text, too."""
    viewer, most = None, 0.0
    for part in accept.lower().split(","):
        media_type, *parameters = (each.strip() for each in part.split(";"))
        if media_type in _VIEWERS and (weight := _weight(parameters)) > most:
            viewer, most = _VIEWERS[media_type], weight
    return viewer


def _weight(parameters: list[str]) -> float:
    for parameter in parameters:
        name, _, value = parameter.partition("=")
        if name.strip() == "q":
            with suppress(ValueError):
                return float(value)
    return 1.0
