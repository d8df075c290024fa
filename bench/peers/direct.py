"""`python -m bench.peers.direct PORT UPSTREAM`: no queue, and done well.

One async process, the SDK's async client shared by all requests, each chunk passed on as an event
by sse-starlette as soon as it comes.
"""

import sys
from collections.abc import AsyncIterator
from typing import Any

import uvicorn
from fastapi import FastAPI
from openai import AsyncAzureOpenAI
from sse_starlette import EventSourceResponse, JSONServerSentEvent

app = FastAPI()


@app.post("/chat")
async def chat(body: dict[str, Any]) -> EventSourceResponse:
    return EventSourceResponse(_answer(body["messages"]))


async def _answer(messages: Any) -> AsyncIterator[JSONServerSentEvent]:
    client: AsyncAzureOpenAI = app.state.client
    stream = await client.chat.completions.create(
        model="demo", messages=messages, stream=True, temperature=0, max_tokens=800
    )
    async for chunk in stream:
        if chunk.choices and (text := chunk.choices[0].delta.content):
            yield JSONServerSentEvent({"text": text})


if __name__ == "__main__":
    port, upstream = sys.argv[1:]
    app.state.client = AsyncAzureOpenAI(azure_endpoint=upstream, api_key="k", api_version="1")
    uvicorn.run(app, port=int(port), log_level="warning", access_log=False)
