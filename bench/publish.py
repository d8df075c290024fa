"""`python -m bench.publish PORT PATH CHUNKS DELAY_MS FIRST_MS`: what bench.upstream says, sent to a
server that is only a fan-out: a POST for each chunk, on one connection, without waiting."""

import asyncio
import sys
import time

PATIENCE_SECONDS = 30


async def main(port: int, path: str, chunks: int, delay_ms: float, first_ms: float) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    answered = asyncio.create_task(_answered(reader, chunks))
    await asyncio.sleep(first_ms / 1000)
    due = time.monotonic()
    for number in range(chunks):
        data = b'{"text":"%d:%d "}' % (number, time.monotonic_ns())
        head = f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-length: {len(data)}\r\n\r\n"
        writer.write(head.encode() + data)
        await writer.drain()
        if delay_ms:
            due += delay_ms / 1000
            await asyncio.sleep(max(0.0, due - time.monotonic()))
    # Who leaves sooner takes away what the server has not read yet.
    await asyncio.wait([answered], timeout=PATIENCE_SECONDS)


async def _answered(reader: asyncio.StreamReader, count: int) -> None:
    """Return when so many answers have begun."""
    status, tail = b"HTTP/1.1 ", b""
    while count > 0 and (piece := await reader.read(65536)):
        count -= (tail + piece).count(status)
        tail = piece[1 - len(status) :]


if __name__ == "__main__":
    port, path, chunks, delay_ms, first_ms = sys.argv[1:]
    asyncio.run(main(int(port), path, int(chunks), float(delay_ms), float(first_ms)))
