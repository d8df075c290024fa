import asyncio
import gc
from typing import Any

from redis.asyncio import Redis

from relay import keys
from relay.connection import connect
from relay.settings import Settings
from tests.conftest import asking, until
from tests.listening import listening
from worker.counting import RetryCount
from worker.upstream import Upstream


async def counted(redis: Any) -> dict[bytes, bytes]:
    counts: dict[bytes, bytes] = await redis.hgetall(keys.RETRIES)
    return counts


async def test_no_answer_waits_for_a_redis_that_hangs(settings: Settings) -> None:
    asked = asyncio.Event()

    async def hang(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(1)
        asked.set()
        await asyncio.Event().wait()

    script = {"status": 429, "status_times": 2, "key": "k", "retry_after_ms": 1}
    chunks: list[bytes] = []
    async with (
        listening(hang) as port,
        connect(f"redis://127.0.0.1:{port}", reply_seconds=60) as redis,
        asyncio.timeout(10),
    ):
        upstream = Upstream(settings, on_retry=RetryCount(redis).add)
        await upstream.stream(asking(chunks=1, **script), chunks.extend)
        await upstream.close()
        await asked.wait()
    assert chunks


async def test_what_redis_does_not_take_is_lost_without_noise_and_the_next_is_counted(
    redis: Redis,
) -> None:
    complaints: list[dict[str, Any]] = []
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(lambda _, context: complaints.append(context))
    retries = RetryCount(redis)
    await redis.config_set("maxmemory", 1)
    try:
        retries.add("lost")
        await asyncio.sleep(0)  # It is on its way, and what is asked now is answered after it.
        assert await counted(redis) == {}
    finally:
        await redis.config_set("maxmemory", 0)
    for _ in range(3):
        retries.add("counted")

    async def all_counted() -> bool:
        return await counted(redis) == {b"counted": b"3"}

    await until(all_counted)
    del retries
    gc.collect()
    assert complaints == []
