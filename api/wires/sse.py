"""Server-Sent Events: what all wires that are made of them have alike. Pure."""

from typing import Any

from relay.events import to_json

MEDIA_TYPE = "text/event-stream"
HEARTBEAT = b":\n\n"


def frame(value: Any) -> bytes:
    """Of one JSON value, without a name or an id."""
    return b"data: %b\n\n" % to_json(value)


def comment(text: bytes) -> bytes:
    """What is no event; an EventSource passes over it."""
    return b": %s\n\n" % text


def retry(milliseconds: int) -> bytes:
    """How long an EventSource is to wait before it comes back."""
    return b"retry: %d\n\n" % milliseconds
