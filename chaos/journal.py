"""The journals of a fault run: what the upstream sent, what Redis held, what viewers saw. Pure.

Piece n (from 0) of upstream request r is a chunk of its own with the text `f"{r}.{n} "`: so every
chunk, wherever it turns up, says which upstream request it comes from.
"""

from dataclasses import dataclass
from typing import Any, Literal

from relay.events import Event

End = Literal["clean", "broken", "left", "nothing", "gone", "refused"]
"""How a visit ended:

clean    the server ended the response properly
broken   it was broken off, by either side or by nobody
left     the viewer dropped it on purpose
nothing  204: you have it all
gone     410 or 404
refused  503 and the like: try again
"""


@dataclass(frozen=True, slots=True)
class Sent:
    """One upstream request, as the emulated upstream recorded it."""

    request: int
    """Its number, from 1."""
    key: str
    """Which question; equal for all attempts of one stream."""
    pieces: int
    """How many labelled chunks it wrote; of an incomplete one, at least as many as arrived."""
    complete: bool
    """Whether it ended properly, with finish_reason and [DONE]."""
    open: bool
    """Whether it was still being written when the run was over and everything had settled."""


@dataclass(frozen=True, slots=True)
class Logged:
    """One stream; exactly one for every stream of the run."""

    stream_id: str
    key: str
    events: list[Event] | None
    """As read from Redis; None if the log is gone, erased or lost."""


@dataclass(frozen=True, slots=True)
class Received:
    """One event of the native wire."""

    cursor: str
    """Empty for the one that is in no log: the server says in band that the stream is gone."""
    kind: str
    data: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Visit:
    """One connection of a viewer."""

    cursor: str
    """The Last-Event-ID that it sent; empty if it sent none and so began anew."""
    received: list[Received]
    end: End


@dataclass(frozen=True, slots=True)
class Seen:
    """One viewer of one stream."""

    name: str
    stream_id: str
    visits: list[Visit]
    deadline_passed: bool
    """Whether it gave up waiting for a terminal event."""
