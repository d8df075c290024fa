"""Server-sent events, as the upstream sends them: their data, and which are errors. Pure."""

from codecs import BOM_UTF8

from relay.errors import Garbled

MOST_BYTES = 2 * 1024 * 1024
"""Of one event. It goes to Redis in one call, and one that takes longer than a call may would be
sent again for ever, and the worker's other streams with it. This much even 10 Mbit/s carry."""
ERROR = b'{"object":"error"}'
"""In the place of the data of an event named `error`, which need not say itself that it is one."""


class Decoder:
    """From the next bytes, however they are cut, to the data of the events that they complete. What
    has no blank line behind it never was an event."""

    def __init__(self) -> None:
        self._rest = bytearray()
        self._after_cr = False

    def feed(self, piece: bytes) -> list[bytes]:
        """Raises Garbled for an event that is too long."""
        if not piece:
            return []
        if b"\r" in piece or self._after_cr:
            piece = self._with_lf(piece)
        if self._rest:
            self._rest += piece
            if b"\n\n" not in self._rest[-len(piece) - 1 :] and len(self._rest) <= MOST_BYTES:
                return []  # All of one long event is not looked through again with each piece.
            piece = bytes(self._rest)
        *events, rest = parts = piece.split(b"\n\n")
        if max(map(len, parts)) > MOST_BYTES:
            raise _too_long()
        self._rest = bytearray(rest)
        return [data for event in events if (data := _data(event))]

    def _with_lf(self, piece: bytes) -> bytes:
        """A CR ends its line at once; the LF that may belong to it can come much later."""
        if self._after_cr:
            piece = piece.removeprefix(b"\n")
        self._after_cr = piece.endswith(b"\r")
        return piece.replace(b"\r\n", b"\n").replace(b"\r", b"\n")


def _too_long() -> Garbled:
    return Garbled(f"an event of more than {MOST_BYTES} bytes")


def _data(event: bytes) -> bytes:
    if event.startswith(b"data: ") and b"\n" not in event:
        return event[6:]
    # With the first event a byte order mark may come.
    lines = [line.partition(b":") for line in event.removeprefix(BOM_UTF8).split(b"\n")]
    fields = [(name, value.removeprefix(b" ")) for name, _, value in lines]
    data = b"\n".join(value for name, value in fields if name == b"data")
    return ERROR if data and (b"event", b"error") in fields else data
