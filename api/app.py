"""The API as an ASGI application."""

import asyncio
import os
import secrets
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from importlib.metadata import version
from typing import Any

from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp

from api import (
    ai_sdk,
    chat_completions,
    docs,
    metrics,
    openai_errors,
    page,
    problems,
    responses,
    webhook,
)
from api.body_limit import BodyLimit
from api.caching import CacheControl
from api.hosts import Hosts, is_loopback
from api.hub import Hub
from api.parts import ANY_MODEL, Parts
from api.presence import Presence
from api.routes import router
from api.shortcut import Shortcut
from relay.connection import connect
from relay.descriptors import warn_when_scarce
from relay.log import Log
from relay.logs import get_logger
from relay.settings import Settings, listed
from relay.webhooks import Webhooks

logger = get_logger()

VERSION = version("chat-relay")

DESCRIPTION = """\
A chat answer should outlive the connection that asked for it.

`POST /chat` queues a job and returns the id of a stream. A worker asks the model service and
appends each chunk to a log. `GET /streams/{id}/events` replays that log and follows it live, for
any number of viewers, from any cursor, over any number of reconnects.

One rule for clients: `started` means, clear what you have.

Errors are RFC 9457 problems with a stable `code`.
"""

SHAPES = {
    # Before the rest of either /v1: the first that fits counts.
    "/v1/responses": responses.SHAPE,
    "/openai/v1/responses": responses.SHAPE,
    "/v1/": openai_errors.SHAPE,
    "/openai/": openai_errors.SHAPE,
    "/api/": ai_sdk.SHAPE,
}


def _end_with_part(task: asyncio.Task[None]) -> None:
    """A process without its hub would accept viewers and show them nothing: better none."""
    if not task.cancelled() and (error := task.exception()) is not None:
        logger.critical("part_died", exc_info=error)
        os.kill(os.getpid(), signal.SIGTERM)


@asynccontextmanager
async def _running(
    app: FastAPI, settings: Settings, webhooks: Webhooks, model: str
) -> AsyncIterator[None]:
    redis = connect(settings.redis_url)
    log = Log.configured(redis, settings)
    hub = Hub(
        redis,
        log,
        cache_bytes=settings.cache_bytes,
        retention_seconds=settings.retention_seconds,
    )
    presence = Presence(hub, log, process=secrets.token_hex(8))
    app.state.redis = redis
    app.state.parts = Parts(settings, log, hub, presence, webhooks, model)
    parts = (hub.run(), presence.run(), warn_when_scarce())
    running = [asyncio.create_task(part) for part in parts]
    for task in running:
        task.add_done_callback(_end_with_part)
    try:
        yield
    finally:
        logger.info("api_stopped")
        for task in running:
            task.cancel()
        await asyncio.wait(running)
        await presence.withdraw()
        await redis.aclose()


def create_app(settings: Settings) -> FastAPI:
    """Build the application; it connects to Redis when it starts up, not here. Raises
    ConfigurationError."""
    webhooks, upstream = settings.webhooks, settings.keyless_upstream
    model = upstream.model if upstream else ANY_MODEL

    app = _Api(
        title="chat-relay",
        version=VERSION,
        description=DESCRIPTION,
        webhooks=webhook.router,
        lifespan=partial(_running, settings=settings, webhooks=webhooks, model=model),
        # They would lead to what Host says, and from https to http.
        redirect_slashes=False,
        # They would ask a CDN, and ReDoc does wherever it comes from.
        docs_url=None,
        redoc_url=None,
    )
    app.cors_origins = settings.cors_origins
    app.allowed_hosts = _allowed_hosts(settings)
    app.model = model
    problems.install(app, SHAPES)
    for native in (router, metrics.router):
        app.include_router(native, tags=["Native"])
    for openai in (chat_completions.router, chat_completions.azure, responses.router):
        app.include_router(openai, tags=["As OpenAI and Azure have it"])
    for theirs in (chat_completions.router, responses.router):
        # Where Azure has OpenAI's own paths.
        app.include_router(theirs, prefix="/openai", include_in_schema=False)
    app.include_router(ai_sdk.router, tags=["As the AI SDK has it"])
    app.router.routes.extend([*page.routes(), *docs.routes()])
    app.add_middleware(BodyLimit, limit_bytes=settings.body_bytes)
    return app


class _Api(FastAPI):
    """FastAPI's stack is a dozen coroutines deep. The shortcut stands before all of it."""

    cors_origins = ""
    allowed_hosts: frozenset[str] | None = None
    """None for any."""
    model = ANY_MODEL

    def openapi(self) -> dict[str, Any]:
        return docs.described(super().openapi(), self.model)

    def build_middleware_stack(self) -> ASGIApp:
        stack: ASGIApp = Shortcut(super().build_middleware_stack())
        if self.cors_origins:
            stack = _with_cors(stack, self.cors_origins)
        if self.allowed_hosts is not None:
            stack = Hosts(stack, self.allowed_hosts, SHAPES)
        return CacheControl(stack, "no-store")


def _allowed_hosts(settings: Settings) -> frozenset[str] | None:
    names = frozenset(listed(settings.allowed_hosts.lower()))
    if "*" in names or not (settings.allowed_hosts or is_loopback(settings.host)):
        return None
    return names


def _with_cors(app: ASGIApp, origins: str) -> ASGIApp:
    return CORSMiddleware(
        app,
        allow_origins=listed(origins),
        allow_methods=["GET", "POST", "DELETE"],
        allow_headers=["*"],
        # In a page of another origin openai's SDK must see it, too, or it tries again in vain.
        expose_headers=[
            "location",
            "x-stream-id",
            "x-request-id",
            "retry-after",
            "x-should-retry",
        ],
    )
