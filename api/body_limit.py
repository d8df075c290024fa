"""The bound on the size of a request's body."""

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send


class BodyLimit:
    """Pure ASGI: refuses a body over `limit_bytes` with 413 as soon as it is known to be, by its
    announced length or by what has come."""

    def __init__(self, app: ASGIApp, limit_bytes: int) -> None:
        self._app = app
        self._limit_bytes = limit_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        announced = headers.get(b"content-length", b"")
        too_long = announced.isdigit() and int(announced) > self._limit_bytes
        received = 0

        async def counted() -> Message:
            nonlocal received
            # Asked to receive, the server tells a client that waits for that to send it all.
            if not too_long:
                message = await receive()
                received += len(message.get("body", b""))
                if received <= self._limit_bytes:
                    return message
            # Who was to be told to send it does not: what comes next would be taken for it.
            end = {"connection": "close"} if too_long and b"expect" in headers else None
            raise HTTPException(413, f"Send at most {self._limit_bytes} bytes.", end)

        await self._app(scope, counted, send)
