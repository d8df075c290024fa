"""What a viewer that never reads costs the others, and the API's memory: streams of 25 chunks a
second and 6 KB each, with 99 viewers, and with 99 and one more that takes nothing at all."""

import socket
import statistics
from collections.abc import Iterator
from contextlib import contextmanager

from bench import systems
from bench.load import Load, get, run
from bench.machine import percentile
from bench.report import Report, Target
from bench.systems import System
from bench.upstream import question
from bench.viewers import ask

VIEWERS = 99
CHUNKS = 150
DELAY_MS = 40
PAD = 6000
ROUNDS = 2


def report(quick: bool) -> Report:
    delays: dict[bool, list[float]] = {False: [], True: []}
    grown = 0
    with systems.relay_in_two() as system:
        _round(system, stuck=False)  # To warm up.
        for stuck in (False, True) * ROUNDS:
            before = system.front.rss_kib()
            delays[stuck] += _round(system, stuck=stuck)
            grown = max(grown, system.front.rss_kib() - before)
    p99 = {stuck: percentile(values, 99) for stuck, values in delays.items()}
    return Report(
        f"{VIEWERS} viewers of chunks of {PAD / 1000:.0f} KB; delay of a chunk",
        ["p50, ms", "p99, ms", "API grows, KiB"],
        {
            "alone": [f"{statistics.median(delays[False]):.2f}", f"{p99[False]:.2f}", ""],
            "and one that never reads": [
                f"{statistics.median(delays[True]):.2f}",
                f"{p99[True]:.2f}",
                str(grown),
            ],
        },
        [Target("delay p99 with one that never reads, by that without", p99[True] / p99[False], 2)],
        {"with": delays[True], "without": delays[False], "grown_kib": grown},
    )


def _round(system: System, *, stuck: bool) -> list[float]:
    path = ask(system, question(CHUNKS, DELAY_MS, first_ms=500, pad=PAD))
    load = Load(port=system.port, count=VIEWERS, request=get(path).decode(), chunks=CHUNKS)
    with _never_reading(system.port, path, count=int(stuck)):
        return run(load).delays


@contextmanager
def _never_reading(port: int, path: str, count: int) -> Iterator[None]:
    """Connections that ask and then take nothing, with next to no room in the kernel."""
    peers = []
    for _ in range(count):
        peer = socket.socket()
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
        peer.connect(("127.0.0.1", port))
        peer.sendall(get(path))
        peers.append(peer)
    try:
        yield
    finally:
        for peer in peers:
            peer.close()
