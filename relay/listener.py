"""A listener: one pub/sub connection that is kept up."""

import asyncio
from collections.abc import Callable

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
        self._added: set[str] = set()
        self._dropped: set[str] = set()
        self._changed = asyncio.Event()
        self._heard = 0
        self.away = False
        """Whether Redis fell silent or refuses new connections; a cut alone does not say so."""

    @property
    def connected(self) -> bool:
        return self._pubsub is not None

    def add(self, channel: str) -> None:
        """Subscribe, together with whatever else is added now; `on_subscribed` tells when it
        stands, also for a channel that is subscribed already."""
        self._channels.add(channel)
        self._dropped.discard(channel)
        self._added.add(channel)
        self._changed.set()

    def drop(self, channel: str) -> None:
        self._channels.discard(channel)
        self._added.discard(channel)
        self._dropped.add(channel)
        self._changed.set()

    async def run(self) -> None:
        """Listen until cancelled, across every loss of the connection."""
        while True:
            try:
                async with self._redis.pubsub() as pubsub:
                    try:
                        await self._subscribe(pubsub)
                        await self._hear(pubsub)
                    finally:
                        self._pubsub = None
            except (RedisError, OSError) as error:
                logger.warning("channel_lost", error=type(error).__name__)
            finally:
                self._on_lost()
            await asyncio.sleep(RECONNECT_SECONDS)

    async def _subscribe(self, pubsub: PubSub) -> None:
        self._added.clear()
        self._dropped.clear()
        try:
            await pubsub.subscribe(*self._channels)
        except (RedisError, OSError):
            self.away = True
            raise
        self._pubsub = pubsub
        self.away = False

    async def _hear(self, pubsub: PubSub) -> None:
        """Raises RedisError or OSError when the connection breaks or Redis falls silent."""
        parts = {
            asyncio.create_task(part(pubsub))
            for part in (self._read, self._follow_changes, self._await_silence)
        }
        try:
            ended, _ = await asyncio.wait(parts, return_when=asyncio.FIRST_COMPLETED)
            for part in ended:
                part.result()
        finally:
            for part in parts:
                part.cancel()
            # Until they have ended they may write on a connection that goes back to the pool, and
            # a late subscription would go with it to whoever takes it next.
            await asyncio.wait(parts)

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

    async def _follow_changes(self, pubsub: PubSub) -> None:
        while True:
            await self._changed.wait()
            self._changed.clear()
            added, self._added = self._added, set()
            dropped, self._dropped = self._dropped, set()
            if added:
                await pubsub.subscribe(*added)
            if dropped:
                await pubsub.unsubscribe(*dropped)

    async def _await_silence(self, pubsub: PubSub) -> None:
        silent = False
        while True:
            heard = self._heard
            await asyncio.sleep(SILENCE_SECONDS)
            # Counted, not timed: a loop that was busy for long has only not looked.
            if self._heard != heard:
                silent = False
            elif not silent:
                silent = True
                await pubsub.ping()
            else:
                self.away = True
                raise ConnectionError("Redis has fallen silent")
