"""Serving the emulator in the running event loop.

uvicorn's protocol without uvicorn's Server: that one takes over the process's signals, polls every
100 ms and waits for open streams, and sse-starlette looks for it in the process. A test that runs
the real API beside the emulator must have one Server only.
"""

import asyncio
import socket
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.server import ServerState

from emulator.app import RESET, Emulator

_NO_LINGER = struct.pack("ii", 1, 0)


class _Connection(HttpToolsProtocol):
    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        # Not by uvicorn's setting, which would silence the access log of the whole process.
        self.access_log = False

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self.scope["extensions"] = {RESET: {"reset": self._reset}}

    def _reset(self) -> None:
        """What was written goes out, then the peer gets RST instead of an orderly end."""
        peer = self.transport.get_extra_info("socket")
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _NO_LINGER)
        self.transport.close()


@asynccontextmanager
async def serve(app: Emulator, host: str = "127.0.0.1", port: int = 0) -> AsyncIterator[str]:
    """Listen while the block runs; its value is the base URL. Port 0 takes a free one.

    On the way out open streams are cut at once. Raises OSError if the address cannot be had.
    """
    config = uvicorn.Config(
        app,
        interface="asgi3",
        log_config=None,
        proxy_headers=False,
        timeout_keep_alive=60,
        ws="none",
    )
    config.load()
    state = ServerState()
    loop = asyncio.get_running_loop()
    listener = await loop.create_server(
        lambda: _Connection(config=config, server_state=state, app_state={}), host, port
    )
    try:
        bound = listener.sockets[0].getsockname()[1]
        yield f"http://[{host}]:{bound}" if ":" in host else f"http://{host}:{bound}"
    finally:
        listener.close()
        while state.connections or state.tasks:
            for connection in state.connections:
                connection.transport.abort()
            await asyncio.sleep(0)
        await listener.wait_closed()
