"""`python -m bench.peers.tutorial PORT UPSTREAM`: the tutorial that this project grew out of.

A synchronous generator of the synchronous SDK, which uvicorn runs in a pool of forty threads.
"""

import sys
from collections.abc import Iterator
from typing import Any

import uvicorn
from fastapi import FastAPI
from fastapi.responses import StreamingResponse
from openai import AzureOpenAI

app = FastAPI()


@app.post("/chat")
def chat(body: dict[str, Any]) -> StreamingResponse:
    return StreamingResponse(_answer(body["messages"]), media_type="text/event-stream")


def _answer(messages: Any) -> Iterator[str]:
    client: AzureOpenAI = app.state.client
    collected = []
    for chunk in client.chat.completions.create(
        model="demo", messages=messages, stream=True, temperature=0, max_tokens=800
    ):
        if chunk.choices and (text := chunk.choices[0].delta.content):
            collected.append(text)
            print("".join(collected))
            yield text


if __name__ == "__main__":
    port, upstream = sys.argv[1:]
    app.state.client = AzureOpenAI(azure_endpoint=upstream, api_key="k", api_version="1")
    uvicorn.run(app, port=int(port), log_level="warning", access_log=False)
