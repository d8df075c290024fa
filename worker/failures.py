"""What goes wrong with the upstream, in our words. Of a vendor's text nothing passes but
identifiers."""

import asyncio
import json
import math
import re
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import httpx2

from relay.errors import Cut, UpstreamError, identifier
from worker.retry import seconds_asked

FAILURES = (httpx2.HTTPError, TimeoutError, UpstreamError)
"""What asking it may raise."""
MOST_BYTES = 64 * 1024
"""Of what it says with an error status."""
WORDS_SECONDS = 2.0
"""How long that is waited for. Status and headers tell enough without it."""
MOST_RETRY_AFTER = 86400
"""Seconds, and the most that clients are told to wait."""
REQUEST_IDS = ("x-request-id", "apim-request-id")
"""Headers by which a vendor's support finds a request."""
NAMED = {"upstream_rate_limited", "upstream_refused"}
"""What the vendor calls any other refusal is about this server, such as its key."""


class Refused(UpstreamError):
    """It answered by an error status."""

    def __init__(self, response: httpx2.Response, error: dict[str, Any]) -> None:
        names = {key: identifier(error.get(key)) for key in ("code", "param")}
        code, message, retryable = _classified(response.status_code, **names)
        ids = {name: word(response.headers, name) for name in REQUEST_IDS}
        causes = [f"HTTP {response.status_code}", names["code"]]
        causes += [f"{name}={value}" for name, value in ids.items() if value]
        super().__init__(code, message, retryable=retryable, cause=" ".join(filter(None, causes)))
        self.headers: Mapping[str, str] = response.headers
        self.names = {key: name for key, name in names.items() if name and code in NAMED}
        """The vendor's own code and param, where they are about the request."""
        asked = seconds_asked(response.headers)
        self.retry_after = math.ceil(min(asked, MOST_RETRY_AFTER)) if asked else None
        """Whole seconds, if the vendor asks for any."""


async def refused(response: httpx2.Response) -> Refused:
    """Reads what it says, as far as it comes."""
    body = bytearray()
    with suppress(TimeoutError, httpx2.HTTPError):
        async with asyncio.timeout(WORDS_SECONDS):
            async for piece in response.aiter_bytes():
                body += piece
                if len(body) > MOST_BYTES:
                    break
    return Refused(response, _error_in(bytes(body)))


def translated(cause: Exception) -> UpstreamError:
    match cause:
        case UpstreamError():
            return cause
        case TimeoutError() | httpx2.TimeoutException():
            return Cut(
                "upstream_timeout",
                "The model service fell silent: ask again.",
                retryable=True,
                cause=_named(cause),
            )
        case _:
            return Cut(
                "upstream_unreachable",
                "The connection to the model service failed: ask again.",
                retryable=True,
                cause=_named(cause),
            )


def word(headers: Mapping[str, str], name: str) -> str:
    """What a header says before its parameters; empty unless it is one plain word."""
    text = headers.get(name, "").partition(";")[0].strip()
    return text if re.fullmatch(r"[\w./+-]{1,64}", text, re.ASCII) else ""


def _named(error: Exception) -> str:
    """With the words of the system, where it refused: any other's may quote the upstream."""
    within = error.__cause__
    name = type(error).__name__
    return f"{name}: {within!r}" if isinstance(within, OSError) else name


def _error_in(body: bytes) -> dict[str, Any]:
    try:
        said = json.loads(body)
    except (ValueError, RecursionError):
        return {}
    error = said.get("error", said) if isinstance(said, dict) else None
    return error if isinstance(error, dict) else {}


def _classified(status: int, code: str, param: str) -> tuple[str, str, bool]:
    """Code, message, and whether the same may succeed later; of a status and the vendor's names."""
    if code == "content_filter":
        message = "The model service's filter refused the prompt: change it."
        return "content_filter", message, False
    if status == 429:
        used_up = code == "insufficient_quota"  # No waiting helps.
        message = "The model service is at its limit: wait, then ask again."
        if used_up:
            message = "The model service's quota is used up: tell this server's operator."
        return "upstream_rate_limited", message, not used_up
    if status in {401, 403}:
        check = "the operator must check its key, endpoint and role"
        return "upstream_denied", f"The model service does not let this server in: {check}.", False
    if status == 404 or 300 <= status < 400:
        check = "the operator must check its name, the endpoint and the API version"
        message = f"The model service does not know this server's deployment: {check}."
        return "upstream_missing", message, False
    if status in {408, 409} or status >= 500:
        return "upstream_unavailable", "The model service is not available: ask again.", True
    names = ", ".join(filter(None, (code, param)))
    reason = f" ({names})" if names else ""
    message = f"The model service refused the request{reason}: change it."
    return "upstream_refused", message, False
