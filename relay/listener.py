"""A listener: one pub/sub connection that is kept up."""

import asyncio
import time
from collections.abc import Callable
from typing import Any

from redis.asyncio import Redis
from redis.exceptions import RedisError

from relay.connection import open_connection, reason, was_refused
from relay.logs import get_logger
from relay.pipe import Opened, Replies

logger = get_logger()

SILENCE_SECONDS = 1.0
"""After this long without a word from Redis it is asked for one; after twice that the connection
is given up: half-open would mean for ever."""
RECONNECT_SECONDS = 0.2


class _Ear(Replies):
    """A connection that hears channels."""

    def __init__(
        self,
        connection: Opened,
        on_message: Callable[[str, bytes], None],
        on_subscribed: Callable[[str], None],
    ) -> None:
        self.heard = 0
        self._on_message = on_message
        self._on_subscribed = on_subscribed
        super().__init__(connection)

    def take(self, reply: Any) -> None:
        self.heard += 1
        if isinstance(reply, RedisError):
            logger.warning("channel_refused", error=reason(reply))
            self.close()
        elif reply[0] == b"message":
            self._on_message(reply[1].decode(), reply[2])
        elif reply[0] == b"subscribe":
            self._on_subscribed(reply[1].decode())


class Listener:
    """Pub/sub delivers at most once, and nothing while the connection is down. So whoever needs
    everything reads the log after each `on_subscribed`: from then on, until `on_lost`, every
    publication on that channel comes to `on_message`.
    """

    def __init__(
        self,
        redis: Redis,
        *channels: str,
        on_message: Callable[[str, bytes], None],
        on_subscribed: Callable[[str], None] = lambda _: None,
        on_lost: Callable[[], None] = lambda: None,
    ) -> None:
        self._redis = redis
        self._channels = set(channels)
        self._on_message = on_message
        self._on_subscribed = on_subscribed
        self._on_lost = on_lost
        self._ear: _Ear | None = None
        self._lost_since: float | None = None
        self.away = False
        """Whether Redis fell silent or refuses new connections; a cut alone does not say so."""

    @property
    def connected(self) -> bool:
        return self._ear is not None

    def add(self, channel: str) -> None:
        """Subscribe. What is asked of Redis next goes by another connection and may be there first:
        it stands when `on_subscribed` says so, also for a channel that is subscribed already."""
        self._channels.add(channel)
        if self._ear is not None:
            self._ear.send("SUBSCRIBE", channel)

    def drop(self, channel: str) -> None:
        self._channels.discard(channel)
        if self._ear is not None:
            self._ear.send("UNSUBSCRIBE", channel)

    def follow(self) -> None:
        """To be called when Redis has taken a write. If a replica had refused one before, the
        master is another now, and what is published there the replica may never say."""
        if self._ear is not None and was_refused(self._redis):
            self._ear.close()

    async def run(self) -> None:
        """Listen until cancelled, across every loss of the connection."""
        while True:
            try:
                await self._hear(await self._connect())
            except (RedisError, OSError) as error:
                logger.warning("redis_lost", error=str(error))
                self._lost_since = self._lost_since or time.monotonic()
            finally:
                self._on_lost()
            await asyncio.sleep(RECONNECT_SECONDS)

    async def _connect(self) -> _Ear:
        try:
            connection = await open_connection(self._redis)
        except RedisError:
            self.away = True
            raise
        self.away = False
        if self._lost_since is not None:
            seconds = round(time.monotonic() - self._lost_since, 1)
            logger.info("redis_back", seconds=seconds)
            self._lost_since = None
        return _Ear(connection, self._on_message, self._on_subscribed)

    async def _hear(self, ear: _Ear) -> None:
        """Raises OSError when the connection breaks or Redis falls silent."""
        self._ear = ear
        try:
            ear.send("SUBSCRIBE", *self._channels)
            await self._until_silent(ear)
        finally:
            self._ear = None
            ear.close()

    async def _until_silent(self, ear: _Ear) -> None:
        silent = False
        while not ear.lost.done():
            heard = ear.heard
            await asyncio.wait({ear.lost}, timeout=SILENCE_SECONDS)
            # Counted, not timed: a loop that was busy for long has only not looked.
            if ear.heard != heard:
                silent = False
            elif not silent:
                silent = True
                ear.send("PING")
            else:
                self.away = True
                raise ConnectionError("Redis has fallen silent")
        raise ConnectionError("the connection broke")
