"""What GET /streams/{id} tells: the state of a stream and its text so far."""

from typing import Any, Literal, Self

from pydantic import BaseModel, Field

from relay.events import COMPLETED, FAILED, STARTED, Event, join_text, text_of
from relay.log import State


class StreamStatus(BaseModel):
    stream_id: str
    status: Literal["queued", "running", "completed", "failed", "cancelled"]
    text: str = Field(description="The text so far, of the newest attempt that has any.")
    attempt: int = Field(description="How many times the job was taken up so far.")
    place: int | None = Field(description="Place in the queue, 1 is next; null once it is taken.")
    viewers: int = Field(description="Who watches now, over all API processes.")
    model: str | None = None
    finish_reason: str | None = None
    usage: dict[str, Any] | None = None
    error: dict[str, Any] | None = Field(None, description="As `failed` has it.")
    last_event_id: str = Field(description="The cursor of the newest event.")
    created_ms: int = Field(description="Unix time in ms, as are the others; Redis' clock.")
    first_chunk_ms: int | None = None
    ended_ms: int | None = None

    @classmethod
    def of(cls, stream_id: str, state: State, events: list[Event], viewers: int) -> Self:
        starts = [index for index, event in enumerate(events) if event.kind == STARTED]
        current = events[starts[-1] :] if starts else []
        last = events[-1]
        ending = last.value() if last.terminal else {}
        return cls(
            stream_id=stream_id,
            status=state.status,
            text=join_text([text_of(event) for event in current]),
            attempt=state.claims,
            place=state.place,
            viewers=viewers,
            model=current[0].value()["model"] if current else None,
            finish_reason=ending.get("finish_reason") if last.kind == COMPLETED else None,
            usage=ending.get("usage"),
            error=ending if last.kind == FAILED else None,
            last_event_id=str(last.cursor),
            created_ms=state.created_ms,
            first_chunk_ms=state.started_ms,
            ended_ms=state.ended_ms,
        )
