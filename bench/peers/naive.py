"""`python -m bench.peers.naive PORT`: a queue the way it is first built.

arq as it comes, a list and a channel of Redis for each stream, and a connection to Redis for each
viewer. The worker is `arq bench.peers.naive.Worker`. UPSTREAM and REDIS_URL are in the environment.
"""

import os
import sys
import uuid
from collections.abc import AsyncIterator
from typing import Any, ClassVar

import uvicorn
from arq import create_pool
from arq.connections import RedisSettings
from fastapi import FastAPI
from openai import AsyncAzureOpenAI
from redis.asyncio import Redis
from sse_starlette import EventSourceResponse, JSONServerSentEvent

app = FastAPI()
END = "[END]"


@app.post("/chat")
async def chat(body: dict[str, Any]) -> dict[str, str]:
    if not hasattr(app.state, "queue"):
        app.state.queue = await create_pool(_redis_settings())
        app.state.redis = Redis.from_url(os.environ["REDIS_URL"], decode_responses=True)
    stream_id = uuid.uuid4().hex
    await app.state.queue.enqueue_job("generate", stream_id, body["messages"])
    return {"stream_id": stream_id, "events_url": f"/streams/{stream_id}"}


@app.get("/streams/{stream_id}")
async def events(stream_id: str) -> EventSourceResponse:
    return EventSourceResponse(_follow(app.state.redis, stream_id))


async def _follow(redis: Any, stream_id: str) -> AsyncIterator[JSONServerSentEvent]:
    async with redis.pubsub() as pubsub:
        await pubsub.subscribe(stream_id)
        for text in await redis.lrange(stream_id, 0, -1):
            yield JSONServerSentEvent({"text": text})
        async for message in pubsub.listen():
            if message["data"] == END:
                return
            if message["type"] == "message":
                yield JSONServerSentEvent({"text": message["data"]})


async def generate(ctx: dict[str, Any], stream_id: str, messages: Any) -> None:
    redis: Redis = ctx["redis"]
    if "client" not in ctx:
        ctx["client"] = AsyncAzureOpenAI(
            azure_endpoint=os.environ["UPSTREAM"], api_key="k", api_version="1"
        )
    stream = await ctx["client"].chat.completions.create(
        model="demo", messages=messages, stream=True, temperature=0, max_tokens=800
    )
    async for chunk in stream:
        if chunk.choices and (text := chunk.choices[0].delta.content):
            await redis.rpush(stream_id, text)  # type: ignore[misc]
            await redis.publish(stream_id, text)
    await redis.publish(stream_id, END)


def _redis_settings() -> RedisSettings:
    return RedisSettings.from_dsn(os.environ.get("REDIS_URL", "redis://localhost"))


class Worker:
    functions: ClassVar = [generate]
    redis_settings = _redis_settings()


if __name__ == "__main__":
    uvicorn.run(app, port=int(sys.argv[1]), log_level="warning", access_log=False)
