"""The text wire: the answer's text as it comes, for a terminal and the simplest client."""

from collections.abc import Callable

from relay.events import STARTED, Event, join_text, text_of

MEDIA_TYPE = "text/plain"


def encoder() -> Callable[[Event], bytes]:
    return _Encoder()


class _Encoder:
    """UTF-8 cannot carry half an emoji: that of one chunk waits for that of the next."""

    def __init__(self) -> None:
        self._half = ""

    def __call__(self, event: Event) -> bytes:
        text = "" if event.kind == STARTED else self._half + text_of(event)
        self._half = text[-1:] if "\ud800" <= text[-1:] <= "\udbff" and not event.terminal else ""
        return join_text([text.removesuffix(self._half)]).encode()
