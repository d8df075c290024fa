"""The native wire for several streams on one connection.

`id:` is one cursor for all of them: their cursors in the order in which the streams were asked for,
with dots between, nothing where a stream has none yet: `1-57..3-2`. `data:` names the stream first.
"""

from collections.abc import Sequence

from api.wires import native
from relay.errors import MalformedCursor, RelayError
from relay.events import Cursor, Event


def encode(event: Event, stream_id: str, cursors: Sequence[Cursor | None]) -> bytes:
    """`cursors` are those that a viewer has once it has this event."""
    return _named(native.encode(event), stream_id, join(cursors))


def encode_gone(error: RelayError, stream_id: str) -> bytes:
    return _named(native.encode_gone(error), stream_id, None)


def join(cursors: Sequence[Cursor | None]) -> str:
    return ".".join(str(cursor) if cursor else "" for cursor in cursors)


def split(text: str, count: int) -> list[Cursor | None]:
    """Raises MalformedCursor for what is no cursor of `count` streams."""
    parts = text.split(".") if text else [""] * count
    if len(parts) != count:
        raise MalformedCursor(f"A cursor of {count} streams has {count} parts, such as 1-57..3-2.")
    return [Cursor.parse(part) if part else None for part in parts]


def _named(frame: bytes, stream_id: str, cursor: str | None) -> bytes:
    lines = [line for line in frame.split(b"\n") if not line.startswith(b"id:")]
    head = [b"id: " + cursor.encode()] if cursor is not None else []
    return b"\n".join(head + [_with_name(line, stream_id) for line in lines])


def _with_name(line: bytes, stream_id: str) -> bytes:
    if not line.startswith(b"data: {"):
        return line
    rest = line.removeprefix(b"data: {")
    comma = b"" if rest == b"}" else b","
    return b'data: {"stream_id":"%b"%b%b' % (stream_id.encode(), comma, rest)
