"""The native wire: Server-Sent Events, for EventSource, curl and anything else."""

from collections.abc import Callable

from sse_starlette import ServerSentEvent

from relay.errors import RelayError
from relay.events import CHUNK, FAILED, STARTED, TEXT, WHOLE, Event, first_choice_text, to_json


def encoder() -> Callable[[Event], bytes]:
    return encode


def encode(event: Event) -> bytes:
    """`id:` is the cursor, `event:` the kind, `data:` one JSON object."""
    if event.kind == TEXT:
        # The stored value is a JSON string already: it goes out as it came, on one line.
        return b'id: %d-%d\nevent: chunk\ndata: {"text":%b}\n\n' % (*event.cursor, event.data)
    if event.kind == WHOLE:
        return _frame(_whole(event), CHUNK, str(event.cursor))
    if event.kind == STARTED:
        value = event.value()
        data = to_json({"attempt": value["attempt"], "model": value["model"]})
        return _frame(data, event.kind, str(event.cursor))
    return _frame(event.data, event.kind, str(event.cursor))


def encode_gone(error: RelayError) -> bytes:
    """What a viewer is told whose stream goes away under it. It has no id: it is in no log."""
    value = {"code": error.code, "message": error.message, "retryable": error.retryable}
    return _frame(to_json(value), FAILED, None)


def _whole(event: Event) -> bytes:
    chunk = event.value()["chunk"]
    # These names are ours: what an upstream says by them would pass for it.
    for name in ("text", "stream_id"):
        chunk.pop(name, None)
    text = first_choice_text(chunk)
    return to_json({"text": text, **chunk} if text else chunk)


def _frame(data: bytes, kind: str, cursor: str | None) -> bytes:
    return ServerSentEvent(data=data.decode(), event=kind, id=cursor, sep="\n").encode()
