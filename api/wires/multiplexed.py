"""The native wire for several streams on one connection.

`id:` is one cursor for all of them: their cursors in the order in which the streams were asked for,
with dots between, nothing where a stream has none yet: `1-57..3-2`, and `x` where it was told that
the stream is gone: `1-57.x.3-2`. `data:` names the stream first.
"""

from collections.abc import Iterable
from typing import Final, Literal

from api.wires import native
from relay.errors import MalformedCursor, RelayError
from relay.events import Cursor, Event

TOLD_GONE: Final = "x"
Place = Cursor | Literal["x"] | None
"""Where a viewer is in one of its streams."""


def encode(event: Event, stream_id: str, places: Iterable[str]) -> bytes:
    """`places` are those that a viewer has once it has this event, each as its text."""
    return _named(native.encode(event), stream_id, join(places))


def encode_gone(error: RelayError, stream_id: str, places: Iterable[str]) -> bytes:
    """It has an id, unlike on the native wire: whoever comes back for others is not told again."""
    return _named(native.encode_gone(error), stream_id, join(places))


def text_of(place: Place) -> str:
    return str(place) if place else ""


def join(places: Iterable[str]) -> str:
    return ".".join(places)


def split(text: str, count: int) -> list[Place]:
    """Raises MalformedCursor for what is no cursor of `count` streams."""
    parts = text.split(".") if text else [""] * count
    if len(parts) != count:
        raise MalformedCursor(f"A cursor of {count} streams has {count} parts, such as 1-57..3-2.")
    return [_parse(part) for part in parts]


def _parse(part: str) -> Place:
    if part == TOLD_GONE:
        return TOLD_GONE
    return Cursor.parse(part) if part else None


def _named(frame: bytes, stream_id: str, cursor: str) -> bytes:
    lines = [line for line in frame.split(b"\n") if not line.startswith(b"id:")]
    named = [_with_name(line, stream_id) for line in lines]
    return b"\n".join([b"id: " + cursor.encode(), *named])


def _with_name(line: bytes, stream_id: str) -> bytes:
    if not line.startswith(b"data: {"):
        return line
    rest = line.removeprefix(b"data: {")
    comma = b"" if rest == b"}" else b","
    return b'data: {"stream_id":"%b"%b%b' % (stream_id.encode(), comma, rest)
