"""The shortcut past FastAPI's stack, for the two requests that nearly everybody makes.

In that stack a viewer holds a dozen coroutines for as long as it watches, and a question costs a
millisecond before anything is done about it. What is not plainly right goes FastAPI's way, which
says what is wrong with it. The routes are the same.
"""

from collections.abc import Awaitable, Callable, Mapping
from urllib.parse import parse_qs

from fastapi import Response
from pydantic import ValidationError
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from api import routes
from api.asking import LONGEST_KEY, Asking
from api.chat_request import ChatRequest
from api.hub import Watching
from api.parts import Parts
from api.problems import answer_to, native
from api.turnstile import Turnstile
from relay.ids import is_stream_id
from relay.logs import get_logger

logger = get_logger()

_BEFORE, _AFTER = "/streams/", "/events"
_OF_THE_PROCESS = {"/healthz", "/readyz", "/metrics"}

Headers = Mapping[str, str]
Route = Callable[[Parts, Watching], Awaitable[Response]]


class Shortcut:
    """Pure ASGI: serves `POST /chat` and `GET /streams/{id}/events`; the rest is for `app`."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._turnstile = Turnstile()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        route = None
        match scope.get("method"), scope.get("path", ""):
            case "GET", path if path.startswith(_BEFORE) and path.endswith(_AFTER):
                route = _watch(path[len(_BEFORE) : -len(_AFTER)], scope)
            case "POST", "/chat":
                await self._turnstile.passed()
                received = await _body(scope, receive)
                route = _ask(received, scope)
                if route is None:
                    receive = _again(received, receive)
                del received
            case _, path if path not in _OF_THE_PROCESS:  # Whether it lives must be told in time.
                await self._turnstile.passed()
        if route is None:
            await self._app(scope, receive, send)
            return
        responding = _respond(route, scope, receive, send)
        del route
        await responding


async def _respond(route: Route, scope: Scope, receive: Receive, send: Send) -> None:
    watching = Watching(_parts(scope).hub)
    try:
        response = await _answer(route, scope, watching)
        # `route` holds the question, which must not stay for as long as a viewer does; whoever
        # called has let go of it, too.
        del route
        await response(scope, receive, send)
    except Exception as error:
        logger.error("internal_error", exc_info=error)
        raise
    finally:
        watching.end()


async def _answer(route: Route, scope: Scope, watching: Watching) -> Response:
    try:
        return await route(_parts(scope), watching)
    except Exception as error:  # noqa: BLE001 - as FastAPI's stack does, last of all
        return answer_to(error, native())


def _watch(stream_id: str, scope: Scope) -> Route | None:
    if not is_stream_id(stream_id):
        return None
    headers, query = _headers(scope), parse_qs(scope["query_string"].decode("latin-1"))
    accept, cursor = headers.get("accept", "*/*"), headers.get("last-event-id", "")
    in_query = query.get("last_event_id", [""])[-1]

    async def watch(parts: Parts, watching: Watching) -> Response:
        return await routes.events(stream_id, parts, watching, accept, cursor, in_query)

    return watch


def _ask(received: list[Message], scope: Scope) -> Route | None:
    if not received or received[-1]["type"] != "http.request":
        return None  # What came of a body that was broken off may be JSON, and asks nothing.
    headers = _headers(scope)
    accept, key = headers.get("accept", "*/*"), headers.get("idempotency-key", "")
    on_disconnect = headers.get("x-on-disconnect", "continue")
    if on_disconnect not in {"continue", "cancel"} or len(key) > LONGEST_KEY:
        return None
    if "x-webhook-url" in headers:
        return None
    try:
        body = ChatRequest.model_validate_json(b"".join(each.get("body", b"") for each in received))
    except ValidationError:
        return None

    async def ask(parts: Parts, watching: Watching) -> Response:
        asking = Asking(parts, watching, key, on_disconnect == "cancel")
        return await routes.chat(body, asking, accept)

    return ask


def _parts(scope: Scope) -> Parts:
    parts: Parts = scope["app"].state.parts
    return parts


def _headers(scope: Scope) -> Headers:
    """Of one that comes twice the first counts, as everywhere."""
    pairs = reversed(scope["headers"])
    return {name.decode("latin-1"): value.decode("latin-1") for name, value in pairs}


async def _body(scope: Scope, receive: Receive) -> list[Message]:
    """All of a body of JSON whose length is announced and allowed; nothing of any other."""
    headers = _headers(scope)
    length = headers.get("content-length", "")
    limit = _parts(scope).settings.body_bytes
    if headers.get("content-type") != "application/json" or not length.isdigit():
        return []
    if int(length) > limit:
        return []
    received = [await receive()]
    while received[-1].get("more_body"):
        received.append(await receive())
    return received


def _again(received: list[Message], receive: Receive) -> Receive:
    """Whoever receives is given what was received already, then what follows."""

    async def replay() -> Message:
        return received.pop(0) if received else await receive()

    return replay
