"""The upstream: the model service, by the openai SDK. The only module that knows it."""

import asyncio
import json
import random
import re
from asyncio import FIRST_COMPLETED
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

import httpx2
import openai
from openai import AsyncAzureOpenAI, AsyncOpenAI, AsyncStream, DefaultAsyncHttpxClient

from relay.chunks import parse
from relay.errors import ConfigurationError, Garbled, Incomplete, UpstreamError
from relay.events import join_text
from relay.logs import Logger, get_logger
from relay.settings import Settings, UpstreamSettings
from relay.turnstile import Turnstile
from worker.http1 import Http1, pour
from worker.retry import delay_before
from worker.sse import Decoder

logger = get_logger("upstream")

CONNECT_SECONDS = 10.0
IDLE_SECONDS = 30.0
"""How long a connection to the upstream is kept for the next answer."""
END_SECONDS = 1.0
"""From [DONE] to the end of the body, at most."""
MEDIA_TYPE = "text/event-stream"
DONE = b"[DONE]"


class Upstream:
    """Each call of `stream` is one answer; many may be under way.

    Policy: own retries until the first chunk, bounded and jittered; none after it. Silence for
    `first_chunk_seconds` before it fails that try, for `stall_seconds` after it the answer.
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

    async def stream(
        self,
        request: dict[str, Any],
        take: Callable[[list[bytes]], None],
        log: Logger = logger,
    ) -> None:
        """Give `take` the chunks of the answer as the upstream sent them, to its [DONE]: each as
        its JSON, and together those that came together, in the very step in which they came. `log`
        says whose answer it is.

        Cancelling it closes the connection. Raises UpstreamError, and what `take` raises.
        """
        body = self._body(request)
        for number in range(1, self._settings.upstream_tries + 1):
            answer = _Answer(take)
            try:
                await self._ask(body, answer)
                return
            except _FAILURES as cause:
                _forget_frames(cause)
                # In no variable: what is raised would be in a cycle with the frame that has it.
                last = number == self._settings.upstream_tries
                if answer.begun or last or not _translated(cause).retryable:
                    raise _translated(cause) from None
                code = _translated(cause).code
                seconds = delay_before(number + 1, _headers(cause), random.random())  # noqa: S311
            log.warning("upstream_retry", code=code, number=number, seconds=seconds)
            await asyncio.sleep(seconds)

    async def _ask(self, body: dict[str, Any], answer: "_Answer") -> None:
        await self._turnstile.passed()
        async with asyncio.timeout(self._settings.first_chunk_seconds):
            # Not by chat.completions.create: half of the cost of a request is that it builds a
            # model of it, and nearly all of a chunk's, that it builds one of that.
            stream = await self._client.post(
                "/chat/completions",
                body=body,
                cast_to=object,
                stream=True,
                stream_cls=_Response,
            )
        async with stream:
            media_type = stream.response.headers.get("content-type", "").lower()
            if not media_type.startswith(MEDIA_TYPE):
                raise Garbled
            pouring = asyncio.create_task(pour(stream.response, answer.feed))
            try:
                await self._until_ended(pouring, answer)
            finally:
                pouring.cancel()
                await asyncio.gather(pouring, return_exceptions=True)
        if not answer.begun:
            raise Incomplete

    async def _until_ended(self, pouring: asyncio.Task[None], answer: "_Answer") -> None:
        """Return at the end of the answer; raises TimeoutError if it has fallen silent. To look
        when that could be costs less than to set a timer with each chunk."""
        loop, stall = asyncio.get_running_loop(), self._settings.stall_seconds
        while not (pouring.done() or answer.done.done()):
            patience = stall if answer.begun else self._settings.first_chunk_seconds
            left = answer.heard + patience - loop.time()
            if left <= 0:
                raise TimeoutError
            # No longer than a stall, for the first chunk may come in between.
            await asyncio.wait(
                {pouring, answer.done}, timeout=min(left, stall), return_when=FIRST_COMPLETED
            )
        if answer.done.done():
            # All is said. With the end of the body the connection can be used again.
            await asyncio.wait({pouring}, timeout=END_SECONDS)
        else:
            pouring.result()

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


class _Response(AsyncStream[object]):
    """The response alone. The SDK's own stream has a generator that has the stream: a cycle, which
    would keep the request until a collector came."""

    def __init__(self, *, response: httpx2.Response, **_: Any) -> None:
        self.response = response


class _Answer:
    """What has come of one try."""

    def __init__(self, take: Callable[[list[bytes]], None]) -> None:
        self._take = take
        self._decoder = Decoder()
        self._loop = asyncio.get_running_loop()
        self.begun = False
        self.heard = self._loop.time()
        """When the last chunk came; until there is one, when it was asked for."""
        self.done: asyncio.Future[None] = self._loop.create_future()
        """[DONE] came."""

    def feed(self, piece: bytes) -> None:
        said = self._decoder.feed(piece)
        if chunks := [data for data in said if data != DONE]:
            self._feed(chunks)
        if len(chunks) < len(said) and not self.done.done():
            self.done.set_result(None)

    def _feed(self, chunks: list[bytes]) -> None:
        if not self.begun:
            parse(chunks[0])  # An error in its place is asked again.
            self.begun = True
        self.heard = self._loop.time()
        self._take(chunks)


def _with_whole_characters(request: dict[str, Any]) -> dict[str, Any]:
    """A copy in which half an emoji, which UTF-8 cannot carry, is a replacement character."""
    text = json.dumps(request, ensure_ascii=False)
    if (whole := join_text([text])) == text:
        return dict(request)
    copy: dict[str, Any] = json.loads(whole)
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
            "AZURE_OPENAI_ENTRA needs the extra: .venv/bin/pip install -e '.[entra]'."
        ) from None
    return get_bearer_token_provider(DefaultAzureCredential(), upstream.entra_scope)


_FAILURES = (
    openai.APIError,
    httpx2.HTTPError,
    TimeoutError,
    UpstreamError,
)


def _forget_frames(cause: BaseException | None) -> None:
    """They hold the task that holds the error, and with it question and answer: a cycle, which
    would stay until a collector looks at everything (relay/heap.py)."""
    while cause is not None:
        cause.__traceback__ = None
        cause = cause.__cause__ or cause.__context__


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
