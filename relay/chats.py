"""Which stream answers a chat: for clients that know the id of their chat alone."""

from typing import Self

from redis.asyncio import Redis

from relay import keys
from relay.settings import Settings


class Chats:
    """Every method may raise redis.exceptions.RedisError."""

    def __init__(self, redis: Redis, *, ttl_ms: int) -> None:
        self._redis = redis
        self._ttl_ms = ttl_ms

    @classmethod
    def configured(cls, redis: Redis, settings: Settings) -> Self:
        """They are forgotten when the stream is."""
        return cls(redis, ttl_ms=settings.live_ms + settings.retention_ms)

    async def note(self, chat_id: str, stream_id: str) -> None:
        await self._redis.set(keys.chat(chat_id), stream_id, px=self._ttl_ms)

    async def newest(self, chat_id: str) -> str | None:
        """The id of the newest stream in a chat; it may have ended by now, or be gone."""
        stream_id = await self._redis.get(keys.chat(chat_id))
        return stream_id.decode() if stream_id else None
