"""A listener: one pub/sub connection that is kept up."""

import asyncio
from collections.abc import Callable
from contextlib import suppress

from redis.asyncio import Redis
from redis.asyncio.client import PubSub
from redis.exceptions import RedisError

from relay.connection import Lean
from relay.logs import get_logger

logger = get_logger("listener")

SILENCE_SECONDS = 1.0
"""After this long without a word from Redis it is asked for one; after twice that the connection
is given up. redis-py sends PING but never misses the answer: half-open would mean for ever."""
RECONNECT_SECONDS = 0.2


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
        self._pubsub: PubSub | None = None
        self._changing = asyncio.Lock()
        self._heard = 0
        self.away = False
        """Whether Redis fell silent or refuses new connections; a cut alone does not say so."""

    @property
    def connected(self) -> bool:
        return self._pubsub is not None

    async def add(self, channel: str) -> None:
        self._channels.add(channel)
        async with self._changing:
            if self._pubsub is not None:
                with suppress(RedisError, OSError):  # `run` meets it too and subscribes anew.
                    await self._pubsub.subscribe(channel)

    async def drop(self, channel: str) -> None:
        self._channels.discard(channel)
        async with self._changing:
            if self._pubsub is not None and channel not in self._channels:
                with suppress(RedisError, OSError):
                    await self._pubsub.unsubscribe(channel)

    async def run(self) -> None:
        """Listen until cancelled, across every loss of the connection."""
        while True:
            try:
                async with self._redis.pubsub() as pubsub:
                    try:
                        async with self._changing:
                            await self._subscribe(pubsub)
                        await self._hear(pubsub)
                    finally:
                        # Before the connection goes back to the pool, or a late subscription
                        # would go with it to whoever takes it next.
                        async with self._changing:
                            self._pubsub = None
            except (RedisError, OSError) as error:
                logger.warning("channel_lost", error=type(error).__name__)
            finally:
                self._on_lost()
            await asyncio.sleep(RECONNECT_SECONDS)

    async def _subscribe(self, pubsub: PubSub) -> None:
        try:
            await pubsub.subscribe(*self._channels)
        except (RedisError, OSError):
            self.away = True
            raise
        self._pubsub = pubsub
        self.away = False

    async def _hear(self, pubsub: PubSub) -> None:
        reading = asyncio.create_task(self._read(pubsub))
        silent = False
        try:
            while True:
                heard = self._heard
                done, _ = await asyncio.wait({reading}, timeout=SILENCE_SECONDS)
                if done:
                    reading.result()
                # Counted, not timed: a loop that was busy for long has only not looked.
                if self._heard != heard:
                    silent = False
                elif not silent:
                    silent = True
                    await pubsub.ping()
                else:
                    self.away = True
                    raise ConnectionError("Redis has fallen silent")
        finally:
            reading.cancel()
            await asyncio.wait([reading])

    async def _read(self, pubsub: PubSub) -> None:
        connection = pubsub.connection
        assert isinstance(connection, Lean)  # noqa: S101
        while True:
            # PubSub.get_message would give each a time limit and a dictionary, at four times the
            # cost of reading it.
            message = await connection.read_message()
            self._heard += 1
            if message[0] == b"message":
                self._on_message(message[1].decode(), message[2])
            elif (told := await pubsub.handle_message(message))["type"] == "subscribe":
                self._on_subscribed(told["channel"].decode())
