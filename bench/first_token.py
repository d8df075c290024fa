"""What the relay adds to the time to first token, against asking the upstream directly.

Everything runs as processes of its own on this machine: the emulated upstream, which answers at
once, and `relay up` in front of it. One request at a time, the ways in turn, so that a drift of the
machine's speed meets all of them. The direct way is the openai SDK, as the tutorial has it.
"""

import argparse
import asyncio
import os
import statistics
import sys
import time
from collections.abc import Awaitable, Callable

import httpx2
from openai import AsyncAzureOpenAI
from openai.types.chat import ChatCompletionUserMessageParam

from bench.stack import running
from emulator.script import prompt

MESSAGE: ChatCompletionUserMessageParam = {"role": "user", "content": prompt(chunks=20, delay_ms=2)}
BODY = {"messages": [MESSAGE]}


async def main(rounds: int) -> None:
    async with running() as (upstream, relay):
        sdk = AsyncAzureOpenAI(
            azure_endpoint=upstream, api_key="k", api_version="2024-10-21", max_retries=0
        )
        async with sdk, httpx2.AsyncClient(base_url=relay, trust_env=False) as http:
            ways: dict[str, Callable[[], Awaitable[float]]] = {
                "direct": lambda: _direct(sdk),
                "relay, one request": lambda: _one_request(http),
                "relay, POST then GET": lambda: _two_requests(http),
            }
            taken: dict[str, list[float]] = {name: [] for name in ways}
            for number in range(rounds + 10):
                for name, way in ways.items():
                    milliseconds = await way() * 1000
                    if number >= 10:
                        taken[name].append(milliseconds)
    _print(taken)


def _print(taken: dict[str, list[float]]) -> None:
    direct = statistics.median(taken["direct"])
    print(f"time to first token, ms; {os.cpu_count()} cores, Python {sys.version.split()[0]}")
    print(f"{'':24}{'p50':>8}{'p99':>8}{'added, p50':>12}")
    for name, values in taken.items():
        p50, p99 = statistics.median(values), statistics.quantiles(values, n=100)[98]
        print(f"{name:24}{p50:8.2f}{p99:8.2f}{p50 - direct:12.2f}")


async def _direct(sdk: AsyncAzureOpenAI) -> float:
    begun, first = time.perf_counter(), 0.0
    async with await sdk.chat.completions.create(
        model="demo", messages=[MESSAGE], stream=True
    ) as stream:
        async for chunk in stream:
            if not first and chunk.choices and chunk.choices[0].delta.content:
                first = time.perf_counter() - begun
    return first


async def _one_request(http: httpx2.AsyncClient) -> float:
    begun = time.perf_counter()
    async with http.sse("/chat", method="POST", json=BODY) as source:
        return await _first_text(source, begun)


async def _two_requests(http: httpx2.AsyncClient) -> float:
    begun = time.perf_counter()
    events_url = (await http.post("/chat", json=BODY)).json()["events_url"]
    async with http.sse(events_url) as source:
        return await _first_text(source, begun)


async def _first_text(source: httpx2.EventSource, begun: float) -> float:
    first = 0.0
    async for event in source:
        if not first and event.event == "chunk" and '"text"' in event.data:
            first = time.perf_counter() - begun
    return first


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=200)
    asyncio.run(main(parser.parse_args().rounds))
