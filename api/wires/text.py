"""The text wire: the answer's text as it comes, for a terminal and the simplest client."""

from collections.abc import Callable

from relay.events import Event, text_of

MEDIA_TYPE = "text/plain"


def encoder() -> Callable[[Event], bytes]:
    return encode


def encode(event: Event) -> bytes:
    """Half a character, split over two chunks, becomes a question mark: UTF-8 cannot carry it."""
    return text_of(event).encode("utf-8", "replace")
