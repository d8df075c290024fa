"""The upstream: the model service, asked for one answer after the other or many at once."""

import asyncio
import json
import random
from asyncio import FIRST_COMPLETED
from collections.abc import Callable
from contextlib import aclosing
from typing import Any

from relay.chunks import parse, speaks
from relay.errors import ConfigurationError, Garbled, Incomplete
from relay.events import join_text
from relay.logs import Logger, get_logger
from relay.settings import Settings
from worker.endpoint import Endpoint
from worker.failures import FAILURES, Refused, refused, translated, word
from worker.http1 import pour
from worker.retry import delay_before
from worker.sse import Decoder

logger = get_logger()

FIRST_RETRY_SECONDS = 0.5
MOST_RETRY_SECONDS = 20.0
"""Much longer nobody waits for a first word: a longer Retry-After is cut to this."""
END_SECONDS = 1.0
"""From [DONE] to the end of the body, at most."""
CHUNK_BYTES = 100
"""What a chunk takes beside its data: in Redis half as much, in an API thrice."""
HELD_BYTES = 64 * 1024 * 1024
"""Of chunks before the first that speaks: some servers send one for each word of a thought."""
MEDIA_TYPE = "text/event-stream"
DONE = b"[DONE]"


class Upstream:
    """Each call of `stream` is one answer; many may be under way.

    Policy: own retries until the first chunk that speaks, bounded and jittered; none after it.
    Silence for `first_chunk_seconds` before it fails that try, for `stall_seconds` after it the
    answer.
    """

    def __init__(
        self, settings: Settings, *, on_retry: Callable[[str], None] = lambda _: None
    ) -> None:
        """`on_retry` hears the code of each failure after which it asks again.

        Raises ConfigurationError if no upstream, or half of one, is configured.
        """
        if settings.upstream is None:
            raise ConfigurationError(
                "No upstream is configured: set AZURE_OPENAI_ENDPOINT, AZURE_OPENAI_KEY and "
                "AZURE_OPENAI_CHATGPT_DEPLOYMENT, or OPENAI_BASE_URL, OPENAI_API_KEY and "
                "OPENAI_MODEL."
            )
        self.model = settings.upstream.model
        self._settings = settings
        self._on_retry = on_retry
        self._endpoint = Endpoint(settings.upstream, settings)

    async def close(self) -> None:
        await self._endpoint.close()

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
        # Half an emoji, which UTF-8 cannot carry, becomes a replacement character.
        body = join_text([json.dumps(self._body(request), ensure_ascii=False)]).encode()
        for number in range(1, self._settings.upstream_tries + 1):
            answer = _Answer(take)
            try:
                await self._ask(body, answer)
                return
            except FAILURES as cause:
                _forget_frames(cause)
                # In no variable: what is raised would be in a cycle with the frame that has it.
                last = number == self._settings.upstream_tries
                if answer.begun or last or not translated(cause).retryable:
                    raise translated(cause) from None
                told = {"code": translated(cause).code, "cause": translated(cause).cause}
                seconds = delay_before(
                    number + 1,
                    cause.headers if isinstance(cause, Refused) else {},
                    random.random(),  # noqa: S311
                    first_seconds=FIRST_RETRY_SECONDS,
                    most_seconds=MOST_RETRY_SECONDS,
                )
            log.warning("upstream_retry", **told, number=number, seconds=seconds)
            self._on_retry(told["code"])
            await asyncio.sleep(seconds)

    async def _ask(self, body: bytes, answer: "_Answer") -> None:
        async with asyncio.timeout(self._settings.first_chunk_seconds):
            response = await self._endpoint.ask(body)
        async with aclosing(response):
            if not response.is_success:
                raise await refused(response)
            media_type = response.headers.get("content-type", "").lower()
            if not media_type.startswith(MEDIA_TYPE):
                raise Garbled(word(response.headers, "content-type"))
            pouring = pour(response, answer.feed)
            try:
                await self._until_ended(pouring, answer)
            finally:
                pouring.cancel()
                await asyncio.gather(pouring, return_exceptions=True)
        if not answer.begun:
            raise Incomplete

    async def _until_ended(self, pouring: asyncio.Future[None], answer: "_Answer") -> None:
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
        body = dict(request)
        if settings.system_prompt is not None:
            system = {"role": "system", "content": settings.system_prompt}
            body["messages"] = [system, *body["messages"]]
        if settings.temperature is not None:
            body.setdefault("temperature", settings.temperature)
        if settings.max_tokens is not None and "max_completion_tokens" not in body:
            body.setdefault("max_tokens", settings.max_tokens)
        ours = {"model": self.model, "stream": True, "stream_options": {"include_usage": True}}
        return body | ours


class _Answer:
    """What has come of one try."""

    def __init__(self, take: Callable[[list[bytes]], None]) -> None:
        self._take = take
        self._decoder = Decoder()
        self._held: list[bytes] = []
        """Chunks before the first that speaks. As long as nobody has seen one, it can be asked
        again."""
        self._held_bytes = 0
        self._loop = asyncio.get_running_loop()
        self.begun = False
        self.heard = self._loop.time()
        """When the last chunk came; until there is one, when it was asked for."""
        self.done: asyncio.Future[None] = self._loop.create_future()
        """[DONE] came."""

    def feed(self, piece: bytes) -> None:
        said = self._decoder.feed(piece)
        if chunks := [data for data in said if data.strip() != DONE]:
            self._feed(chunks)
        if len(chunks) < len(said) and not self.done.done():
            self.done.set_result(None)

    def _feed(self, chunks: list[bytes]) -> None:
        self.heard = self._loop.time()
        if not self.begun:
            self._held += chunks
            self.begun = any(speaks(parse(chunk)) for chunk in chunks)
            if not self.begun:
                self._held_bytes += sum(len(chunk) + CHUNK_BYTES for chunk in chunks)
                if self._held_bytes > HELD_BYTES:
                    raise Garbled(f"more than {HELD_BYTES} bytes before a first word")
                return
            chunks, self._held = self._held, []
        self._take(chunks)


def _forget_frames(cause: BaseException | None) -> None:
    """They hold the task that holds the error, and with it question and answer: a cycle, which
    would stay until a collector looks at everything (relay/heap.py)."""
    while cause is not None:
        cause.__traceback__ = None
        cause = cause.__cause__ or cause.__context__
