"""A server of a test's own, on a real socket in the test's loop."""

import asyncio
import socket
import ssl
from asyncio import StreamReader, StreamWriter, Task
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress

Talk = Callable[[StreamReader, StreamWriter], Coroutine[None, None, None]]


@asynccontextmanager
async def listening(
    talk: Talk, host: str = "127.0.0.1", port: int = 0, tls: ssl.SSLContext | None = None
) -> AsyncIterator[int]:
    """Its port. `talk` has each connection, which is closed after it. When the context ends, so do
    all of them, and what went wrong in a talk is raised: except that the other side has left."""
    talks: dict[Task[None], StreamWriter] = {}

    def begin(reader: StreamReader, writer: StreamWriter) -> None:
        task = asyncio.create_task(talk(reader, writer))
        talks[task] = writer
        # Not in the task: one that is cancelled before its first step would close nothing.
        task.add_done_callback(lambda _: writer.close())

    server = await asyncio.start_server(begin, host, port, ssl=tls)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        await _accept_no_more(server)
        for task in talks:
            task.cancel()
        ends = await asyncio.gather(*talks, return_exceptions=True)
        for writer in talks.values():
            writer.transport.abort()
            with suppress(OSError):
                await writer.wait_closed()
    for end in ends:
        if end is not None and not isinstance(
            end, asyncio.CancelledError | OSError | asyncio.IncompleteReadError
        ):
            raise end


@contextmanager
def silent(host: str = "127.0.0.1", port: int = 0) -> Iterator[int]:
    """The port of one that takes no connection and refuses none: one waits for it already, and it
    has no room for another."""
    with socket.socket() as listener, socket.socket() as waiting:
        listener.bind((host, port))
        listener.listen(0)
        waiting.connect(listener.getsockname())
        yield listener.getsockname()[1]


async def _accept_no_more(server: asyncio.Server) -> None:
    """What is accepted already comes to its talk first."""
    for listener in server.sockets:
        asyncio.get_running_loop().remove_reader(listener)
    # The loop takes two rounds from accepting a connection to telling of it, and no event says that
    # none is on this way. Up to Python 3.11 a server that is closed meanwhile forgets it, open.
    for _ in range(2):
        await asyncio.sleep(0)
    server.close()
