"""The endpoint: where the model service is asked, and as whom, as the openai SDK knows it.

The only module that knows the SDK. Its own call is not used: it builds each request anew, by
models and copies, and a model of each chunk that comes back. The first is a third of what all
processes spend on beginning an answer, the second nearly all of what a chunk costs.
"""

from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from functools import partial
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

import httpx2
from openai import AsyncAzureOpenAI, AsyncOpenAI

from relay import proxies
from relay.errors import ConfigurationError, UpstreamError
from relay.logs import get_logger
from relay.settings import Settings, UpstreamSettings
from worker.http1 import Http1

logger = get_logger()

CONNECT_SECONDS = 10.0
IDLE_SECONDS = 30.0
"""How long a connection is kept for the next request."""

Token = Callable[[], Awaitable[str]]
Send = Callable[[httpx2.Request], Awaitable[httpx2.Response]]


class Endpoint:
    """Sends requests that differ in their body alone."""

    def __init__(self, upstream: UpstreamSettings, settings: Settings) -> None:
        """Raises ConfigurationError if an extra is missing, or a proxy is none of HTTP's."""
        own = None
        if not _is_proxied(upstream.base_url):
            own = Http1(connect_seconds=CONNECT_SECONDS, idle_seconds=IDLE_SECONDS)
        self._client = _client(own, settings)
        self._extensions = {"timeout": self._client.timeout.as_dict()}
        self._opened = AsyncExitStack()
        self._opened.push_async_callback(self._client.aclose)
        self._token = _token_provider(upstream, self._opened)
        sdk = _sdk(upstream, self._token, self._client)
        known = sdk.default_headers | ({} if self._token else sdk.auth_headers)
        self._headers = httpx2.Headers({k: v for k, v in known.items() if isinstance(v, str)})
        query: Any = sdk.default_query
        self._url = sdk.base_url.join("chat/completions").copy_merge_params(query)
        self._send: Send = partial(self._client.send, stream=True)
        if own is not None and not self._url.userinfo:
            # No proxy to be found and no sign-in to be made of the URL: the client adds nothing.
            self._send = own.handle_async_request

    async def ask(self, body: bytes) -> httpx2.Response:
        """The response, whose body is yet to come and which is to be closed. `body` is JSON.

        Raises httpx2.HTTPError, and UpstreamError if there is no token to be had. A redirect is not
        followed: the key is not meant for another.
        """
        request = httpx2.Request(
            "POST", self._url, headers=self._headers, content=body, extensions=self._extensions
        )
        if self._token is not None:
            request.headers["authorization"] = f"Bearer {await _signed_in(self._token)}"
        return await self._send(request)

    async def close(self) -> None:
        await self._opened.aclose()


async def _signed_in(token: Token) -> str:
    try:
        return await token()
    except Exception as error:
        # Whatever the library finds wrong, from the network to the configuration of the identity.
        logger.warning("sign_in_failed", error=type(error).__name__, exc_info=error)
        raise UpstreamError(
            "upstream_denied",
            "This server could not sign in at the model service: ask again.",
            retryable=True,
        ) from None


def _client(own: Http1 | None, settings: Settings) -> httpx2.AsyncClient:
    limits = httpx2.Limits(max_connections=settings.concurrency, keepalive_expiry=IDLE_SECONDS)
    timeout = httpx2.Timeout(settings.stall_seconds, connect=CONNECT_SECONDS, read=None)
    with proxies.usable():
        return httpx2.AsyncClient(transport=own, timeout=timeout, limits=limits)


def _is_proxied(url: str) -> bool:
    """As the environment has it, in which httpx looks, too, and closer: it knows more exceptions
    than these."""
    parts = urlsplit(url)
    host = parts.hostname or ""
    direct = host in proxies.HERE or proxy_bypass(host)
    return not {parts.scheme, "all"}.isdisjoint(getproxies()) and not direct


def _sdk(
    upstream: UpstreamSettings, token: Token | None, client: httpx2.AsyncClient
) -> AsyncOpenAI:
    key = upstream.api_key.get_secret_value() if upstream.api_key else None
    if upstream.kind == "azure":
        return AsyncAzureOpenAI(
            azure_endpoint=upstream.base_url,
            azure_deployment=upstream.model,
            api_version=upstream.api_version,
            api_key=key,
            azure_ad_token_provider=token,
            http_client=client,
        )
    return AsyncOpenAI(base_url=upstream.base_url, api_key=token or key, http_client=client)


def _token_provider(upstream: UpstreamSettings, opened: AsyncExitStack) -> Token | None:
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
    credential = DefaultAzureCredential()
    opened.push_async_callback(credential.close)
    provider: Any = get_bearer_token_provider(credential, upstream.entra_scope)
    token: Token = provider
    return token
