"""Asking: how a stream is created, whichever API asks for it."""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Literal

from fastapi import Depends, Header
from fastapi.exceptions import RequestValidationError
from redis.exceptions import RedisError

from api.chat_request import Asked
from api.feed import Feed
from api.hub import Watching
from api.parts import Parts, PartsOfApp, WhileResponding
from relay.connection import reason
from relay.errors import Draining, StreamGone
from relay.ids import new_stream_id
from relay.log import Created, Recovery
from relay.logs import get_logger

logger = get_logger()

LONGEST_KEY = 255
CANCEL_AGAIN_SECONDS = 1.0
"""No event says when Redis takes it: it may be there and full, or read-only."""


def names(stream_id: str) -> dict[str, str]:
    """The headers by which an answer names its stream under the APIs of OpenAI, whose SDKs have the
    second as `_request_id`: so it stands in what their users log already."""
    return {"x-stream-id": stream_id, "x-request-id": stream_id}


@dataclass(frozen=True, slots=True)
class Asking:
    """What a request says of its stream beside its body, by the same headers on every API."""

    parts: Parts
    watching: Watching
    idempotency_key: str = ""
    cancels: bool = False
    """Whether the end of this very connection is to end the answer."""
    webhook: str = ""

    def must_stay(self) -> None:
        """For a client that could only be sent away, before anything is created: it asks again, and
        each time would have one more answer made. Raises Draining."""
        if self.parts.hub.draining:
            raise Draining("Ask again: another process answers.")

    async def create(
        self,
        asked: Asked,
        *also: object,
        recovery: Recovery = "restart",
        stream_id: str = "",
        chat: str = "",
    ) -> Created:
        """A stream with its job in the queue. `also`: what else makes two requests differ under the
        same Idempotency-Key. Raises as Log.create does, and BadRequest."""
        request, digest = asked.to_stored(*also, webhook=self.webhook)
        created = await self.parts.log.create(
            request,
            stream_id=stream_id,
            recovery=recovery,
            idempotency_key=self.idempotency_key,
            digest=digest,
            webhook=self.webhook,
            chat=chat,
        )
        logger.info("stream_created", stream=created.stream_id, repeated=created.repeated)
        return created

    async def begin(
        self, asked: Asked, *also: object, recovery: Recovery = "restart", chat: str = ""
    ) -> tuple[Feed, Created]:
        """As `create`, and watch it, from its birth on."""
        feed = self.watching.expect(new_stream_id())
        created = await self.create(
            asked, *also, recovery=recovery, stream_id=feed.stream_id, chat=chat
        )
        if created.repeated:
            self.watching.end()
            return await self.watching.feed(created.stream_id), created
        self.parts.hub.born(feed, heard=created.heard)
        return feed, created

    def on_leave(self, feed: Feed) -> Callable[[], Awaitable[None]] | None:
        """What is to be done when the client leaves before the end."""
        return partial(self._cancel, feed) if self.cancels else None

    async def _cancel(self, feed: Feed) -> None:
        """Without Redis it is tried again until the answer has ended: nobody is there who would."""
        told = False
        while not feed.ended:
            try:
                await self.parts.cancel(feed.stream_id)
                return
            except (RedisError, StreamGone) as error:
                if not told:
                    logger.warning("cancel_failed", stream=feed.stream_id, error=reason(error))
                told = True
                if isinstance(error, StreamGone) or self.parts.hub.draining:
                    return
            await asyncio.sleep(CANCEL_AGAIN_SECONDS)


async def _asking(
    parts: PartsOfApp,
    watching: WhileResponding,
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
    x_webhook_url: Annotated[
        str | None,
        Header(
            description="Is told by a POST when the answer has ended: see the webhook. Its host is "
            "one of RELAY_WEBHOOK_HOSTS."
        ),
    ] = None,
) -> Asking:
    if x_webhook_url is not None:
        try:
            parts.webhooks.target(x_webhook_url)
        except ValueError as error:
            where = ("header", "x-webhook-url")
            refused = {"type": "value_error", "loc": where, "msg": str(error), "input": None}
            raise RequestValidationError([refused]) from None
    return Asking(
        parts, watching, idempotency_key, x_on_disconnect == "cancel", x_webhook_url or ""
    )


AskingOfRequest = Annotated[Asking, Depends(_asking)]
