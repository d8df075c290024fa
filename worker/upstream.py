"""The upstream: the model service, by the openai SDK. The only module that knows it."""

import asyncio
import json
import random
import re
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from typing import Any

import httpx2
import openai
from openai import AsyncAzureOpenAI, AsyncOpenAI

from relay.chunks import Chunk
from relay.errors import ConfigurationError, UpstreamError
from relay.events import join_text
from relay.logs import get_logger
from relay.settings import Settings, UpstreamSettings
from worker.retry import delay_before

logger = get_logger("upstream")

CONNECT_SECONDS = 10.0
DONE = "[DONE]"


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
        self._client = _client(settings.upstream, settings.stall_seconds)

    async def close(self) -> None:
        await self._client.close()

    async def stream(self, request: dict[str, Any]) -> AsyncGenerator[Chunk]:
        """The chunks of the answer, as the upstream sent them, to its [DONE].

        Closing the iterator closes the connection. Raises UpstreamError.
        """
        parameters = self._parameters(request)
        for attempt in range(1, self._settings.upstream_tries + 1):
            begun = False
            try:
                async with aclosing(self._ask(parameters)) as chunks:
                    async for chunk in self._timed(chunks):
                        begun = True
                        yield chunk
                return
            except (openai.APIError, httpx2.HTTPError, TimeoutError, UpstreamError) as cause:
                error = _translated(cause)
                if begun or not error.retryable or attempt == self._settings.upstream_tries:
                    raise error from None
                seconds = delay_before(attempt + 1, _headers(cause), random.random())  # noqa: S311
            logger.warning("upstream_retry", code=error.code, attempt=attempt, seconds=seconds)
            await asyncio.sleep(seconds)

    async def _ask(self, parameters: dict[str, Any]) -> AsyncGenerator[Chunk]:
        ask = self._client.chat.completions.with_streaming_response.create
        async with ask(**parameters) as response:
            # The SDK would build a model object of each chunk, most of the cost of a worker.
            async for event in httpx2.EventSource(response.http_response):
                # Past [DONE], to the end of the body: so the connection can be used again.
                if event.data and event.data != DONE:
                    yield _chunk(event.data)

    async def _timed(self, chunks: AsyncIterator[Chunk]) -> AsyncIterator[Chunk]:
        seconds = self._settings.first_chunk_seconds
        while True:
            async with asyncio.timeout(seconds):
                chunk = await anext(chunks, None)
            if chunk is None:
                return
            yield chunk
            seconds = self._settings.stall_seconds

    def _parameters(self, request: dict[str, Any]) -> dict[str, Any]:
        """The call: the caller's fields, the server's defaults where it left them out, and where
        it goes, in that order, so that no field of a request can choose that."""
        settings = self._settings
        parameters = _with_whole_characters(request)
        if settings.system_prompt is not None:
            system = {"role": "system", "content": settings.system_prompt}
            parameters["messages"] = [system, *parameters["messages"]]
        if settings.temperature is not None:
            parameters.setdefault("temperature", settings.temperature)
        if settings.max_tokens is not None and "max_completion_tokens" not in parameters:
            parameters.setdefault("max_tokens", settings.max_tokens)
        ours = {"model": self.model, "stream": True, "stream_options": {"include_usage": True}}
        messages = parameters.pop("messages")
        # Not as arguments: among those are options of the SDK, headers and timeouts.
        return {"messages": messages, **ours, "extra_body": parameters | ours}


def _with_whole_characters(request: dict[str, Any]) -> dict[str, Any]:
    """A copy in which half an emoji, which UTF-8 cannot carry, is a replacement character."""
    text = json.dumps(request, ensure_ascii=False)
    copy: dict[str, Any] = json.loads(join_text([text]))
    return copy


def _client(upstream: UpstreamSettings, stall_seconds: float) -> AsyncOpenAI:
    key = upstream.api_key.get_secret_value() if upstream.api_key else None
    options: dict[str, Any] = {
        # Retries are ours: the SDK's would sleep through a Retry-After of two minutes.
        "max_retries": 0,
        "timeout": httpx2.Timeout(stall_seconds, connect=CONNECT_SECONDS, read=None),
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


def _chunk(data: str) -> Chunk:
    try:
        chunk = json.loads(data)
    except ValueError:
        chunk = None
    if not isinstance(chunk, dict) or not _well_formed(chunk):
        raise UpstreamError(
            "upstream_garbled", "The model service sent what is no answer.", retryable=True
        )
    if chunk.get("error"):
        raise UpstreamError(
            "upstream_failed", "The model service broke the answer off.", retryable=True
        )
    return chunk


def _well_formed(chunk: Chunk) -> bool:
    choices = chunk.get("choices") or []
    return isinstance(choices, list) and all(
        isinstance(choice, dict)
        and isinstance(choice.get("index", 0), int)
        and isinstance(choice.get("delta") or {}, dict)
        for choice in choices
    )


def _translated(cause: Exception) -> UpstreamError:
    """The vendor's error as ours. Of its text nothing passes but identifiers."""
    match cause:
        case UpstreamError():
            return cause
        case openai.APIStatusError():
            return _translated_status(cause)
        case openai.APITimeoutError() | TimeoutError() | httpx2.TimeoutException():
            return UpstreamError(
                "upstream_timeout", "The model service fell silent: ask again.", retryable=True
            )
        case _:
            return UpstreamError(
                "upstream_unreachable",
                "The connection to the model service failed: ask again.",
                retryable=True,
            )


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
