"""The outbox: which ended streams somebody is still to be told of, kept in Redis.

A stream comes into it in the very atom of its terminal event, whoever writes that, and leaves it
when it was told of, is erased or has expired. What a worker takes it holds by a lease alone: one
that dies leaves it to another. So whoever is told is told at least once.
"""

from typing import NamedTuple

from redis.asyncio import Redis

from relay import keys
from relay.connection import script

LEASE_SECONDS = 30
"""For one try; longer than that it never takes."""


class Delivery(NamedTuple):
    """One try to tell of one stream's end."""

    stream_id: str
    url: str
    number: int
    """Which try it is, counted from 1."""
    left_ms: int
    """How long the stream will still be there to be told of."""
    ended_ms: int
    """Redis' clock, Unix time."""
    kind: str
    """Of the terminal event, as is `data`."""
    data: bytes


class Outbox:
    """Every method may raise redis.exceptions.RedisError and may then be repeated."""

    def __init__(self, redis: Redis) -> None:
        self._redis = redis
        self._take = script(redis, "take")

    async def take(self, want: int) -> list[Delivery]:
        """Up to `want` that are due, the longest waiting first. Each is due again after its lease,
        unless it is settled or postponed."""
        rows = await self._take(
            keys=[keys.WEBHOOKS],
            args=[want, LEASE_SECONDS * 1000, keys.log("%s"), keys.state("%s")],
        )
        return [
            Delivery(
                stream_id.decode(), url.decode(), number, left, int(ended), kind.decode(), data
            )
            for stream_id, url, number, left, ended, kind, data in rows
        ]

    async def settle(self, stream_id: str) -> None:
        """Nobody is to be told any more; the URL is forgotten."""
        # No transaction: a full Redis refuses even to queue what frees.
        async with self._redis.pipeline(transaction=False) as pipe:
            pipe.zrem(keys.WEBHOOKS, stream_id)
            pipe.hdel(keys.state(stream_id), "webhook")
            await pipe.execute()

    async def postpone(self, stream_id: str, seconds: float) -> None:
        """Let it be due again in `seconds`. One that is settled or erased stays so."""
        now_s, micros = await self._redis.time()
        due_ms = (now_s + seconds) * 1000 + micros // 1000
        await self._redis.zadd(keys.WEBHOOKS, {stream_id: due_ms}, xx=True)
