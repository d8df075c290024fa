"""What the routes of every API work with."""

from collections.abc import AsyncIterator
from typing import Annotated

from fastapi import Depends, Request

from api.hub import Hub, Watching
from api.long_response import Pace
from api.presence import Presence
from relay.log import Log
from relay.logs import get_logger
from relay.settings import Settings
from relay.webhooks import Webhooks

logger = get_logger()

ANY_MODEL = "chat-relay"
"""The public name of the one model where this process does not know the upstream's."""


class Parts:
    """One per process, in `app.state.parts`."""

    def __init__(
        self,
        settings: Settings,
        log: Log,
        hub: Hub,
        presence: Presence,
        webhooks: Webhooks,
        model: str,
    ) -> None:
        self.settings = settings
        self.webhooks = webhooks
        self._log = log
        self.hub = hub
        self.presence = presence
        self.model = model
        self.pace = Pace.configured(settings)

    @property
    def log(self) -> Log:
        """Raises as Hub.demand_redis does."""
        self.hub.demand_redis()
        return self._log

    async def cancel(self, stream_id: str) -> str:
        """As `Log.cancel`, and the operator's log says that it was asked for."""
        verdict = await self.log.cancel(stream_id)
        logger.info("cancel_asked", stream=stream_id, verdict=verdict)
        return verdict

    async def erase(self, stream_id: str) -> None:
        """As `Log.erase`, and the operator's log says that it was asked for."""
        await self.log.erase(stream_id)
        # All others hear of it. Here nobody may see it when this has returned.
        self.hub.forget(stream_id)
        logger.info("stream_erased", stream=stream_id)


# Async though it waits for nothing: FastAPI runs plain functions in a thread, at the price of a
# millisecond.
async def _parts(request: Request) -> Parts:
    parts: Parts = request.app.state.parts
    return parts


PartsOfApp = Annotated[Parts, Depends(_parts)]


async def _watching(parts: PartsOfApp) -> AsyncIterator[Watching]:
    """Ended when the response has been sent."""
    watching = Watching(parts.hub)
    try:
        yield watching
    finally:
        watching.end()


WhileResponding = Annotated[Watching, Depends(_watching)]
