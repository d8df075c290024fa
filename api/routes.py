"""The native API."""

import asyncio
from collections.abc import AsyncIterator
from functools import partial
from typing import Annotated, Any, Literal, TypedDict

from fastapi import APIRouter, Depends, Header, Path, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field
from redis.exceptions import RedisError

from api.chat_request import ChatRequest
from api.feed import Feed
from api.hub import Hub, Watching
from api.long_response import HEADERS
from api.multi_viewer import Lane, MultiViewer
from api.presence import Presence
from api.problems import problem, redis_away, responses
from api.status import StreamStatus
from api.viewer import NotNow, TextViewer, Viewer
from api.wires import multiplexed, native, text
from relay.errors import BadRequest, StreamGone, StreamUnknown
from relay.events import Cursor
from relay.ids import is_stream_id
from relay.log import Log
from relay.logs import get_logger
from relay.settings import Settings
from relay.webhooks import Webhooks

logger = get_logger("api")
router = APIRouter()

ANY_MODEL = "chat-relay"
LONGEST_KEY = 255
"""Of an Idempotency-Key."""
MOST_STREAMS = 100
"""On one connection: its cursor must fit into a header."""


class Pace(TypedDict):
    """The times of a long response, as its class takes them."""

    heartbeat_seconds: float
    write_seconds: float
    drain_seconds: float


class Parts:
    """What the routes work with; one per process, in `app.state.parts`."""

    def __init__(
        self, settings: Settings, log: Log, hub: Hub, presence: Presence, webhooks: Webhooks
    ) -> None:
        self.settings = settings
        self.webhooks = webhooks
        self.log = log
        self.hub = hub
        self.presence = presence
        self.pace: Pace = {
            "heartbeat_seconds": settings.heartbeat_seconds,
            "write_seconds": settings.write_seconds,
            "drain_seconds": settings.drain_seconds,
        }

    @property
    def model(self) -> str:
        """The public name of the one model: the upstream's, where this process knows it."""
        upstream = self.settings.upstream
        return upstream.model if upstream else ANY_MODEL


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


# Async though they wait for nothing: FastAPI runs plain functions in a thread, at the price of a
# millisecond before the first token.
async def _parts(request: Request) -> Parts:
    parts: Parts = request.app.state.parts
    return parts


async def _stream_id(
    stream_id: Annotated[str, Path(description="As POST /chat returned it.")],
) -> str:
    if not is_stream_id(stream_id):
        raise StreamUnknown("There is no stream with this id.")
    return stream_id


PartsOfApp = Annotated[Parts, Depends(_parts)]
StreamId = Annotated[str, Depends(_stream_id)]


async def _watching(parts: PartsOfApp) -> AsyncIterator[Watching]:
    """Ended when the response has been sent."""
    watching = Watching(parts.hub)
    try:
        yield watching
    finally:
        watching.end()


WhileResponding = Annotated[Watching, Depends(_watching)]


async def _webhook(
    parts: PartsOfApp,
    x_webhook_url: Annotated[
        str | None,
        Header(
            description="Is told by a POST when the answer has ended: see the webhook. Its host is "
            "one of RELAY_WEBHOOK_HOSTS."
        ),
    ] = None,
) -> str:
    """A URL that may be told, or an empty one."""
    if x_webhook_url is None:
        return ""
    try:
        parts.webhooks.target(x_webhook_url)
    except ValueError as error:
        where = ("header", "x-webhook-url")
        refused = {"type": "value_error", "loc": where, "msg": str(error), "input": None}
        raise RequestValidationError([refused]) from None
    return x_webhook_url


WebhookUrl = Annotated[str, Depends(_webhook)]

_STREAMED: dict[str, Any] = {
    native.MEDIA_TYPE: {
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
        **responses(400, 409, 413, 415, 422, 502, 503),
    },
)
async def chat(
    body: ChatRequest,
    parts: PartsOfApp,
    watching: WhileResponding,
    webhook: WebhookUrl,
    accept: Annotated[str, Header(include_in_schema=False)] = "*/*",
    idempotency_key: Annotated[
        str,
        Header(
            max_length=LONGEST_KEY, description="The same key and body lead to the same stream."
        ),
    ] = "",
    x_on_disconnect: Annotated[
        Literal["continue", "cancel"],
        Header(description="What the end of this very connection means for the answer."),
    ] = "continue",
) -> Response:
    """Queue a job and return the id of its stream at once.

    The answer is then made by a worker, whoever watches or not.
    """
    if parts.hub.redis_away:
        return redis_away()  # At once: a Redis that hangs would cost each caller a time limit.
    request, digest = body.to_stored(body.recovery, webhook=webhook)
    created = await parts.log.create(
        request,
        recovery=body.recovery,
        idempotency_key=idempotency_key,
        digest=digest,
        webhook=webhook,
    )
    stream_id = created.stream_id
    logger.info("stream_created", stream=stream_id, repeated=created.repeated)
    url = f"/streams/{stream_id}"
    headers = {"location": url, "x-stream-id": stream_id}
    viewer = _viewer_for(accept)
    if viewer is None:
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
        return JSONResponse(accepted.model_dump(), 202, headers)

    try:
        feed = await watching.feed(stream_id)
    except RedisError:
        # It stands, and may be cancelled or watched later.
        response = redis_away()
        response.headers.update(headers)
        return response
    return viewer(
        parts.hub,
        feed,
        None,
        **parts.pace,
        headers=headers,
        on_leave=partial(cancel_quietly, parts, stream_id) if x_on_disconnect == "cancel" else None,
    )


@router.get(
    "/streams/events",
    summary="Watch several streams on one connection",
    response_class=Response,
    responses={
        200: {
            "description": "The events of all, as they come. `data` begins with `stream_id`; `id` "
            "is one cursor for all. A stream that is gone is told by a `failed` of its own.",
            "content": {native.MEDIA_TYPE: _STREAMED[native.MEDIA_TYPE]},
        },
        204: {"description": "You have all of them whole."},
        **responses(400, 404, 422, 503),
    },
)
async def several(
    parts: PartsOfApp,
    watching: WhileResponding,
    ids: Annotated[str, Query(description="Ids of streams, with commas between; at most 100.")],
    accept: Annotated[str, Header(include_in_schema=False)] = "*/*",
    last_event_id: Annotated[
        str, Header(description="The cursor: the id of the last event that you have.")
    ] = "",
    last_event_id_in_query: Annotated[
        str, Query(alias="last_event_id", description="The same; the header goes first.")
    ] = "",
) -> Response:
    """For browsers, which allow six connections to a host. Otherwise as one stream's events."""
    stream_ids = list(dict.fromkeys(ids.split(",")))
    if len(stream_ids) > MOST_STREAMS:
        raise BadRequest(f"ids: at most {MOST_STREAMS} streams share a connection.")
    if not all(is_stream_id(stream_id) for stream_id in stream_ids):
        raise StreamUnknown("There is no stream with one of these ids.")
    given = last_event_id or last_event_id_in_query
    cursors = multiplexed.split(given, len(stream_ids))
    try:
        lanes = [await _lane(watching, *pair) for pair in zip(stream_ids, cursors, strict=True)]
    except RedisError:
        if _viewer_for(accept) is Viewer:
            return NotNow(headers=HEADERS)
        raise
    if given and all(lane.over or lane.feed.gone is not None for lane in lanes):
        return Response(status_code=204)
    return MultiViewer(
        parts.hub,
        lanes,
        **parts.pace,
    )


async def _lane(watching: Watching, stream_id: str, cursor: Cursor | None) -> Lane:
    try:
        return Lane(await watching.feed(stream_id), cursor)
    except StreamGone as gone:
        return Lane.of_nothing(stream_id, gone, cursor)


@router.get(
    "/streams/{stream_id}/events",
    summary="Watch a stream",
    response_class=Response,
    responses={
        200: {"description": "The events after the cursor, then live.", "content": _STREAMED},
        204: {"description": "The cursor is at the terminal event: you have it all."},
        **responses(400, 404, 410, 502, 503),
    },
)
async def events(
    stream_id: StreamId,
    parts: PartsOfApp,
    watching: WhileResponding,
    accept: Annotated[str, Header(include_in_schema=False)] = "*/*",
    last_event_id: Annotated[
        str, Header(description="The cursor: the id of the last event that you have.")
    ] = "",
    last_event_id_in_query: Annotated[
        str,
        Query(
            alias="last_event_id",
            description="The same, for a first request of an EventSource; the header goes first.",
        ),
    ] = "",
) -> Response:
    """Server-Sent Events from the newest `started`, or strictly after the cursor.

    `started` means: clear what you have. It begins every replay and every new attempt.
    """
    given = last_event_id or last_event_id_in_query
    cursor = Cursor.parse(given) if given else None
    viewer = _viewer_for(accept)
    try:
        feed = await watching.feed(stream_id)
    except RedisError:
        if viewer is Viewer:
            return NotNow(headers=HEADERS)
        raise
    if feed.ended and cursor is not None and cursor == feed.top:
        return Response(status_code=204)
    viewer = viewer or Viewer
    return viewer(
        parts.hub,
        feed,
        cursor,
        **parts.pace,
        headers={"x-stream-id": stream_id},
    )


@router.get(
    "/streams/{stream_id}",
    response_model=StreamStatus,
    summary="Look at a stream",
    responses=responses(404, 410, 503),
)
async def status(stream_id: StreamId, parts: PartsOfApp) -> StreamStatus:
    """State, text so far, usage, times, attempt, viewers, place in the queue."""
    state = await parts.log.state(stream_id)
    log = await parts.log.read(stream_id)
    return StreamStatus.of(stream_id, state, log, parts.presence.total(stream_id, state))


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
    verdict = await parts.log.cancel(stream_id)
    logger.info("cancel_asked", stream=stream_id, verdict=verdict)
    return Cancelled.model_validate({"stream_id": stream_id, "status": verdict})


@router.delete(
    "/streams/{stream_id}",
    status_code=204,
    summary="Erase a stream",
    responses=responses(404, 410, 503),
)
async def erase(stream_id: StreamId, parts: PartsOfApp) -> Response:
    """Prompt, answer and every trace go; if it is still running, it is stopped. Then 410."""
    await parts.log.erase(stream_id)
    logger.info("stream_erased", stream=stream_id)
    return Response(status_code=204)


@router.get("/healthz", summary="Is the process alive?")
async def healthz() -> dict[str, str]:
    return {"status": "ok"}


@router.get("/readyz", summary="Can it serve?", responses=responses(503))
async def readyz(parts: PartsOfApp, request: Request) -> Response:
    """503 while Redis does not answer and from the moment that this process shuts down."""
    if parts.hub.draining:
        return problem(503, "draining", "Ask another process.")
    if parts.hub.redis_away:
        return redis_away()
    await request.app.state.redis.ping()
    return JSONResponse({"status": "ok"}) if parts.hub.connected else redis_away()


async def cancel_quietly(parts: Parts, stream_id: str) -> None:
    """For a client that left and asked for it: nobody is there to hear of an error."""
    try:
        await parts.log.cancel(stream_id)
    except (RedisError, StreamGone) as error:
        logger.warning("cancel_failed", stream=stream_id, error=type(error).__name__)


async def until_ended(request: Request, parts: Parts, feed: Feed) -> None:
    """Return when the answer has ended, the client has left, or this process drains."""
    left = asyncio.ensure_future(_left(request))
    try:
        while not (feed.ended or left.done() or parts.hub.draining):
            await feed.changed(parts.settings.heartbeat_seconds, unless=left)
    finally:
        left.cancel()


async def _left(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _viewer_for(accept: str) -> type[Viewer] | None:
    """The kind of viewer that an Accept header asks for by name."""
    wanted = [part.split(";")[0].strip().lower() for part in accept.split(",")]
    for media_type in wanted:
        if media_type == native.MEDIA_TYPE:
            return Viewer
        if media_type == text.MEDIA_TYPE:
            return TextViewer
    return None
