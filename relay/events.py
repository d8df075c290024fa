"""Events: the entries of a log, and the cursors that name them. Pure."""

import json
import math
import re
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from typing import Any, Final, NamedTuple, Self

import pydantic_core

from relay.errors import MalformedCursor

QUEUED: Final = "queued"
STARTED: Final = "started"
COMPLETED: Final = "completed"
FAILED: Final = "failed"
CANCELLED: Final = "cancelled"
TERMINAL: Final = frozenset({COMPLETED, FAILED, CANCELLED})
CUT_SHORT: Final = TERMINAL - {COMPLETED}
"""After these the text is not the whole answer."""

# The two kinds of chunk are stored by one letter: an entry costs bytes in proportion to its text.
TEXT: Final = "t"
WHOLE: Final = "c"
CHUNK: Final = "chunk"
"""What either is to who watches."""

_CURSOR = re.compile(r"(0|[1-9][0-9]{0,11})-(0|[1-9][0-9]{0,8})", re.ASCII)


class Cursor(NamedTuple):
    """The id of an entry, `<attempt>-<seq>`; ordered as the log is."""

    attempt: int
    seq: int

    @classmethod
    def parse(cls, text: str) -> Self:
        """Raises MalformedCursor for what can be the id of no event."""
        match = _CURSOR.fullmatch(text)
        if match is None:
            raise MalformedCursor("A cursor is the id of an event, such as 1-57.")
        return cls(int(match[1]), int(match[2]))

    def __str__(self) -> str:
        return f"{self.attempt}-{self.seq}"

    def leads_to(self, following: "Cursor", *, new_start: bool) -> bool:
        """Whether an entry needs nothing between it and this one: it is the next of the attempt, or
        a later attempt's `started`, at which viewers clear what they have."""
        if following.attempt == self.attempt:
            return following.seq == self.seq + 1
        return new_start and following.attempt > self.attempt and following.seq == 0


class Entry(NamedTuple):
    """What is appended: a kind and one JSON value, as UTF-8 without line breaks."""

    kind: str
    data: bytes


class Event(NamedTuple):
    """An entry that has its place in the log."""

    cursor: Cursor
    kind: str
    data: bytes

    @property
    def terminal(self) -> bool:
        return self.kind in TERMINAL

    def value(self) -> Any:
        return json.loads(self.data)


def entry(kind: str, value: Any) -> Entry:
    return Entry(kind, to_json(value))


def to_json(value: Any) -> bytes:
    """Compact JSON on one line. A lone surrogate, half of an emoji split over two chunks, stays
    an escape, so that a client which joins the halves has the emoji."""
    try:
        return pydantic_core.to_json(value)
    except pydantic_core.PydanticSerializationError:
        return _ASCII.encode(value).encode()


_ASCII = json.JSONEncoder(separators=(",", ":"))
"""Three times as slow, and it takes surrogates, and what is nested deeper."""


def from_json(text: str) -> Any:
    """Raises ValueError also for NaN and its like, which Python takes for JSON and no client could
    read, for numbers that Python would make into such, and RecursionError for what is too deep."""
    return _STRICT.decode(text)


def _refuse(constant: str) -> None:
    raise ValueError(constant)


def _finite(number: str) -> float:
    value = float(number)
    if math.isinf(value):
        _refuse(number)
    return value


_STRICT = json.JSONDecoder(parse_constant=_refuse, parse_float=_finite)


def text_of(event: Event) -> str:
    """The text that an event adds to the answer (the first choice's), often empty."""
    if event.kind == TEXT:
        return str(event.value())
    if event.kind == WHOLE:
        return first_choice_text(event.value()["chunk"])
    return ""


def first_choice_text(chunk: dict[str, Any]) -> str:
    for choice in chunk.get("choices") or ():
        if choice.get("index", 0) == 0:
            return text_in(choice.get("delta") or {}, "content")
    return ""


def text_in(delta: dict[str, Any], name: str) -> str:
    """Of a part of the answer; empty where there is none, or another thing than text. Mistral sends
    lists of parts: what else those have, only the wires that tell whole chunks can pass on."""
    text = delta.get(name)
    if isinstance(text, str):
        return text
    return "".join(text_in(part, "text") for part in parts_of(text, "text"))


def parts_of(content: Any, kind: str) -> list[dict[str, Any]]:
    """Those of one type, of a content that is a list of parts."""
    parts = content if isinstance(content, list) else []
    return [part for part in parts if isinstance(part, dict) and part.get("type") == kind]


def fitting(pieces: Sequence[str | bytes], room: int) -> int:
    """How many of the first ones are not longer than `room` together; at least one."""
    return max(1, bisect_right(list(accumulate(map(len, pieces))), room))


def join_text(parts: list[str]) -> str:
    """Join chunk texts, healing characters that were split between two of them."""
    text = "".join(parts)
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return text


class Halves:
    """Pieces of a text as UTF-8 can carry them: half an emoji waits for its other half."""

    def __init__(self) -> None:
        self._half = ""

    def whole(self, piece: str, *, last: bool) -> str:
        text = self._half + piece
        self._half = text[-1:] if "\ud800" <= text[-1:] <= "\udbff" and not last else ""
        return join_text([text.removesuffix(self._half)])


def decode_batch(message: bytes) -> list[Event]:
    """What the channel carries for one append (lua/append.lua): the first id, then a line for each
    entry, its kind and its data."""
    head, *lines = message.split(b"\n")
    attempt, seq = (int(part) for part in head.split(b"-"))
    events = []
    for offset, line in enumerate(lines):
        kind, _, data = line.partition(b" ")
        events.append(Event(Cursor(attempt, seq + offset), kind.decode(), data))
    return events
