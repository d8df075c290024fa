"""What is measured: the emulated upstream and `relay up`, as processes of their own."""

import asyncio
import os
import sys
import tempfile
from asyncio.subprocess import PIPE
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from cli.up import answers_at, free_port


@asynccontextmanager
async def running() -> AsyncIterator[tuple[str, str]]:
    """The emulated upstream and the relay in front of it: their URLs."""
    port = free_port("127.0.0.1", 0)
    emulator = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "emulator", "--port", "0", stdout=PIPE
    )
    assert emulator.stdout is not None
    upstream = (await emulator.stdout.readline()).decode().split()[-1]
    with tempfile.TemporaryDirectory() as data:
        relay = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "cli", "up", "--port", str(port), "--data", data),
            env={
                **os.environ,
                "AZURE_OPENAI_ENDPOINT": upstream,
                "AZURE_OPENAI_KEY": "k",
                "AZURE_OPENAI_CHATGPT_DEPLOYMENT": "demo",
            },
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.DEVNULL,
        )
        try:
            url = f"http://127.0.0.1:{port}"
            await answers_at(f"{url}/readyz")(relay)
            yield upstream, url
        finally:
            for process in (relay, emulator):
                process.terminate()
                await process.wait()
