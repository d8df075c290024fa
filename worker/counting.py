"""What a worker counts in Redis, for an operator: no answer waits for that, or fails by it."""

import asyncio
from collections import Counter
from typing import Any

from redis.asyncio import Redis
from redis.exceptions import RedisError

from relay import keys


class RetryCount:
    """How often the upstream was asked again. What Redis does not take is lost."""

    def __init__(self, redis: Redis) -> None:
        self._redis = redis
        self._waiting: Counter[str] = Counter()
        self._writing: asyncio.Task[None] | None = None

    def add(self, code: str) -> None:
        self._waiting[code] += 1
        # One at a time: while Redis hangs there would be ever more of them.
        if self._writing is None or self._writing.done():
            self._writing = asyncio.create_task(self._write())

    async def _write(self) -> None:
        try:
            while self._waiting:
                code, count = self._waiting.popitem()
                adding: Any = self._redis.hincrby(keys.RETRIES, code, count)
                await adding
        except RedisError:
            self._waiting.clear()
