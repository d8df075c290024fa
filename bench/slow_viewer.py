"""What a viewer that never reads costs the others, and the API's memory.

Streams of 25 chunks a second and 6 KB each, one after the other: with 99 viewers, and with 99 and
one more that takes nothing at all. A chunk says when it was made; its delay ends where it is read.
"""

import argparse
import asyncio
import os
import socket
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import httpx2

from bench.stack import running
from emulator.script import prompt

VIEWERS = 99
CHUNKS = 150
DELAY_MS = 40
PAD = 6000
TEXT = b'data: {"text":"'


async def main(rounds: int) -> None:
    delays: dict[bool, list[float]] = {False: [], True: []}
    grown: list[int] = []
    async with running() as (_, relay), httpx2.AsyncClient(base_url=relay, trust_env=False) as http:
        api = _api_process()
        for number in range(2 * rounds + 1):
            stuck = bool(number % 2)
            before = _rss_kib(api)
            values = await _round(http, relay, stuck=stuck)
            if number:  # The first is to warm up.
                delays[stuck] += values
            if stuck:
                grown.append(_rss_kib(api) - before)
    _print(delays, grown)


async def _round(http: httpx2.AsyncClient, relay: str, *, stuck: bool) -> list[float]:
    script = prompt(chunks=CHUNKS, delay_ms=DELAY_MS, stamp=True, pad=PAD)
    body = {"messages": [{"role": "user", "content": script}]}
    url = (await http.post("/chat", json=body)).json()["events_url"]
    with _never_reading(relay, url, count=int(stuck)):
        viewers = [_watch(relay, url) for _ in range(VIEWERS)]
        return [delay for viewer in await asyncio.gather(*viewers) for delay in viewer]


async def _watch(relay: str, path: str) -> list[float]:
    """The delays of the live chunks, in ms. By a bare socket: a hundred of these share a core."""
    host, port = urlsplit(relay).hostname, urlsplit(relay).port
    reader, writer = await asyncio.open_connection(host, port)
    writer.write(f"GET {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n".encode())
    delays, joined = [], time.monotonic_ns()
    async for line in reader:
        if line.startswith(TEXT):
            _, _, made = line[len(TEXT) : 80].partition(b" ")[0].partition(b":")
            if made and int(made) > joined:
                delays.append((time.monotonic_ns() - int(made)) / 1e6)
    writer.close()
    return delays


@contextmanager
def _never_reading(relay: str, path: str, count: int) -> Iterator[None]:
    """Connections that ask and then take nothing, with next to no room in the kernel."""
    peers = []
    for _ in range(count):
        peer = socket.socket()
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
        peer.connect((urlsplit(relay).hostname, urlsplit(relay).port))
        peer.sendall(f"GET {path} HTTP/1.1\r\nhost: x\r\n\r\n".encode())
        peers.append(peer)
    try:
        yield
    finally:
        for peer in peers:
            peer.close()


def _api_process() -> int:
    """The API's process id: `relay up` has it as a grandchild of ours."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            words = (entry / "cmdline").read_bytes().split(b"\0")
            if words[-3:-1] == [b"-m", b"api"]:
                return int(entry.name)
    raise LookupError("there is no API process")


def _rss_kib(process: int) -> int:
    for line in Path(f"/proc/{process}/status").read_text().splitlines():
        if line.startswith("VmRSS"):
            return int(line.split()[1])
    raise LookupError("its memory is not told")


def _print(delays: dict[bool, list[float]], grown: list[int]) -> None:
    print(f"delay of a chunk, ms; {os.cpu_count()} cores, Python {sys.version.split()[0]}")
    print(f"{'':28}{'p50':>8}{'p99':>8}")
    p99 = {}
    for stuck, values in delays.items():
        name = f"{VIEWERS} viewers" + (", one never reads" if stuck else "")
        p99[stuck] = statistics.quantiles(values, n=100)[98]
        print(f"{name:28}{statistics.median(values):8.2f}{p99[stuck]:8.2f}")
    print(f"p99 with one that never reads: {p99[True] / p99[False]:.2f} of that without")
    print(f"the API grew by {max(grown)} KiB at most in a round with one")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m bench.slow_viewer", description=__doc__)
    parser.add_argument("--rounds", type=int, default=4)
    asyncio.run(main(parser.parse_args().rounds))
