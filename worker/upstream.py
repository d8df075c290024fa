"""The upstream: the model service, by the openai SDK. The only module that knows it."""

import asyncio
import json
import random
import re
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator
from contextlib import aclosing
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

import httpx2
import openai
from openai import AsyncAzureOpenAI, AsyncOpenAI, AsyncStream, DefaultAsyncHttpxClient

from relay.chunks import parse
from relay.errors import ConfigurationError, Garbled, UpstreamError
from relay.events import join_text
from relay.logs import get_logger
from relay.settings import Settings, UpstreamSettings
from relay.turnstile import Turnstile
from worker.http1 import Http1
from worker.retry import delay_before
from worker.sse import Decoder

logger = get_logger("upstream")

CONNECT_SECONDS = 10.0
IDLE_SECONDS = 30.0
"""How long a connection to the upstream is kept for the next answer."""
MEDIA_TYPE = "text/event-stream"
DONE = b"[DONE]"


class Upstream:
    """Asks for one answer at a time, many at once.

    Policy: own retries until the first chunk, bounded and jittered; none after it. A silence longer
    than `stall_seconds` between chunks, or `first_chunk_seconds` before them, ends the answer.
    """

    def __init__(self, settings: Settings) -> None:
        """Raises ConfigurationError if no upstream, or half of one, is configured."""
        if settings.upstream is None:
            raise ConfigurationError(
                "No upstream is configured: set AZURE_OPENAI_ENDPOINT, AZURE_OPENAI_KEY and "
                "AZURE_OPENAI_CHATGPT_DEPLOYMENT, or OPENAI_BASE_URL, OPENAI_API_KEY and "
                "OPENAI_MODEL."
            )
        self.model = settings.upstream.model
        self._settings = settings
        self._client = _client(settings.upstream, settings)
        self._turnstile = Turnstile()

    async def close(self) -> None:
        await self._client.close()

    async def stream(self, request: dict[str, Any]) -> AsyncGenerator[list[bytes]]:
        """The chunks of the answer as the upstream sent them, to its [DONE]: each as its JSON, and
        together those that came together.

        Take them without waiting for anything else in between: how long the upstream is silent is
        counted in the task that takes. Closing the iterator closes the connection. Raises
        UpstreamError.
        """
        body = self._body(request)
        for attempt in range(1, self._settings.upstream_tries + 1):
            begun = False
            try:
                async with aclosing(self._ask(body)) as answer:
                    async for chunks in answer:
                        if not begun:
                            parse(chunks[0])  # An error in its place is asked again.
                        begun = True
                        yield chunks
                return
            except _FAILURES as cause:
                error = _translated(cause)
                if begun or not error.retryable or attempt == self._settings.upstream_tries:
                    raise error from None
                seconds = delay_before(attempt + 1, _headers(cause), random.random())  # noqa: S311
            logger.warning("upstream_retry", code=error.code, attempt=attempt, seconds=seconds)
            await asyncio.sleep(seconds)

    async def _ask(self, body: dict[str, Any]) -> AsyncGenerator[list[bytes]]:
        # Not by chat.completions.create: half of the cost of a request is that it builds a model of
        # it, and nearly all of a chunk's, that it builds one of that.
        asked = self._client.post(
            "/chat/completions",
            body=body,
            cast_to=object,
            stream=True,
            stream_cls=AsyncStream[object],
        )
        decoder, loop = Decoder(), asyncio.get_running_loop()
        await self._turnstile.passed()
        async with (
            asyncio.timeout(self._settings.first_chunk_seconds) as limit,
            await asked as stream,
        ):
            # Past [DONE], to the end of the body: so the connection can be used again.
            async for piece in _body_of(stream.response):
                if chunks := [data for data in decoder.feed(piece) if data != DONE]:
                    yield chunks
                    limit.reschedule(loop.time() + self._settings.stall_seconds)

    def _body(self, request: dict[str, Any]) -> dict[str, Any]:
        """The caller's fields, the server's defaults where it left them out, and what is asked of,
        in that order, so that no field of a request can choose that."""
        settings = self._settings
        body = _with_whole_characters(request)
        if settings.system_prompt is not None:
            system = {"role": "system", "content": settings.system_prompt}
            body["messages"] = [system, *body["messages"]]
        if settings.temperature is not None:
            body.setdefault("temperature", settings.temperature)
        if settings.max_tokens is not None and "max_completion_tokens" not in body:
            body.setdefault("max_tokens", settings.max_tokens)
        ours = {"model": self.model, "stream": True, "stream_options": {"include_usage": True}}
        return body | ours


def _with_whole_characters(request: dict[str, Any]) -> dict[str, Any]:
    """A copy in which half an emoji, which UTF-8 cannot carry, is a replacement character."""
    text = json.dumps(request, ensure_ascii=False)
    copy: dict[str, Any] = json.loads(join_text([text]))
    return copy


def _client(upstream: UpstreamSettings, settings: Settings) -> AsyncOpenAI:
    key = upstream.api_key.get_secret_value() if upstream.api_key else None
    timeout = httpx2.Timeout(settings.stall_seconds, connect=CONNECT_SECONDS, read=None)
    limits = httpx2.Limits(max_connections=settings.concurrency, keepalive_expiry=IDLE_SECONDS)
    proxied = _is_proxied(upstream.base_url or "https://")
    transport = (
        None if proxied else Http1(connect_seconds=CONNECT_SECONDS, idle_seconds=IDLE_SECONDS)
    )
    options: dict[str, Any] = {
        # Retries are ours: the SDK's would sleep through a Retry-After of two minutes.
        "max_retries": 0,
        "timeout": timeout,
        "http_client": DefaultAsyncHttpxClient(transport=transport, timeout=timeout, limits=limits),
    }
    if upstream.kind == "azure":
        return AsyncAzureOpenAI(
            azure_endpoint=upstream.base_url or "",
            azure_deployment=upstream.model,
            api_version=upstream.api_version,
            api_key=key,
            azure_ad_token_provider=_token_provider(upstream),
            **options,
        )
    provider = _token_provider(upstream)
    return AsyncOpenAI(base_url=upstream.base_url, api_key=provider or key, **options)


def _is_proxied(url: str) -> bool:
    """As the environment has it, in which httpx looks, too."""
    parts, proxies = urlsplit(url), getproxies()
    return not {parts.scheme, "all"}.isdisjoint(proxies) and not proxy_bypass(parts.hostname or "")


def _token_provider(upstream: UpstreamSettings) -> Any:
    if upstream.entra_scope is None:
        return None
    try:
        from azure.identity.aio import (  # type: ignore[import-not-found,unused-ignore]  # noqa: PLC0415
            DefaultAzureCredential,
            get_bearer_token_provider,
        )
    except ImportError:
        raise ConfigurationError(
            "AZURE_OPENAI_ENTRA needs the extra: pip install 'chat-relay[entra]'."
        ) from None
    return get_bearer_token_provider(DefaultAzureCredential(), upstream.entra_scope)


def _body_of(response: httpx2.Response) -> AsyncIterator[bytes]:
    if not response.headers.get("content-type", "").startswith(MEDIA_TYPE):
        raise Garbled
    if "content-encoding" in response.headers:
        return response.aiter_bytes()
    # The same without two generators between, through which each chunk would have to go.
    stream = response.stream
    assert isinstance(stream, AsyncIterable)  # noqa: S101
    return aiter(stream)


_FAILURES = (
    openai.APIError,
    httpx2.HTTPError,
    TimeoutError,
    UpstreamError,
)


def _translated(cause: Exception) -> UpstreamError:
    """The vendor's error as ours. Of its text nothing passes but identifiers."""
    match cause:
        case UpstreamError():
            return cause
        case openai.APIStatusError():
            return _translated_status(cause)
        case _ if _timed_out(cause):
            return UpstreamError(
                "upstream_timeout", "The model service fell silent: ask again.", retryable=True
            )
        case _:
            return UpstreamError(
                "upstream_unreachable",
                "The connection to the model service failed: ask again.",
                retryable=True,
            )


def _timed_out(cause: BaseException | None) -> bool:
    """By what is at the bottom of it: the SDK calls it a connection error."""
    while cause is not None:
        if isinstance(cause, TimeoutError):
            return True
        cause = cause.__cause__
    return False


def _translated_status(cause: openai.APIStatusError) -> UpstreamError:
    status = cause.status_code
    if _identifier(cause.code) == "content_filter":
        return UpstreamError(
            "content_filter", "The model service's filter refused the prompt.", retryable=False
        )
    if status == 429:
        return UpstreamError(
            "upstream_rate_limited",
            "The model service is at its limit: wait, then ask again.",
            retryable=True,
        )
    if status in {401, 403}:
        return UpstreamError(
            "upstream_denied", "The model service refused this server's key.", retryable=False
        )
    if status == 404:
        return UpstreamError(
            "upstream_missing",
            "The model service does not know this server's deployment or model.",
            retryable=False,
        )
    if status in {408, 409} or status >= 500:
        return UpstreamError(
            "upstream_unavailable", "The model service is not available: ask again.", retryable=True
        )
    reason = ", ".join(filter(None, (_identifier(cause.code), _identifier(cause.param))))
    return UpstreamError(
        "upstream_refused",
        f"The model service refused the request{f' ({reason})' if reason else ''}.",
        retryable=False,
    )


def _identifier(text: object) -> str | None:
    return (
        text if isinstance(text, str) and re.fullmatch(r"[A-Za-z_][\w.\[\]-]{0,60}", text) else None
    )


def _headers(cause: Exception) -> dict[str, str]:
    return dict(cause.response.headers) if isinstance(cause, openai.APIStatusError) else {}
