"""`python -m emulator --host 127.0.0.1 --port 8081`"""

import argparse
import asyncio
import signal
import sys

from emulator.app import Emulator
from emulator.serve import serve


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m emulator", description=__doc__)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8081, help="0 takes a free one")
    parser.add_argument(
        "--journal", type=int, default=1000, help="how many requests /emulator/requests tells of"
    )
    arguments = parser.parse_args()
    try:
        import uvloop as fast  # noqa: PLC0415 - it is not there on every platform
    except ImportError:
        loop_factory = None
    else:
        loop_factory = fast.new_event_loop
    with asyncio.Runner(loop_factory=loop_factory) as runner:
        runner.run(_run(Emulator(arguments.journal), arguments.host, arguments.port))


async def _run(emulator: Emulator, host: str, port: int) -> None:
    loop, stop = asyncio.get_running_loop(), asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: loop.call_soon_threadsafe(stop.set))
    try:
        async with serve(emulator, host, port) as url:
            sys.stdout.write(f"emulator ready on {url}\n")
            sys.stdout.flush()
            await stop.wait()
    except OSError as error:
        sys.exit(f"emulator: cannot listen on {host}:{port}: {error.strerror}")


if __name__ == "__main__":
    main()
