"""The text wire: the answer's text as it comes, for a terminal and the simplest client."""

from collections.abc import Callable

from relay.events import STARTED, Event, Halves, text_of

MEDIA_TYPE = "text/plain"


def encoder() -> Callable[[Event], bytes]:
    return _Encoder()


class _Encoder:
    def __init__(self) -> None:
        self._halves = Halves()

    def __call__(self, event: Event) -> bytes:
        if event.kind == STARTED:
            self._halves = Halves()
        return self._halves.whole(text_of(event), last=event.terminal).encode()
