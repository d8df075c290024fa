"""The webhook of the OpenAPI document. Nobody calls it here: workers POST it to receivers."""

from datetime import datetime
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Header
from pydantic import BaseModel, Field

router = APIRouter()


class Ending(BaseModel):
    """Which stream has ended, and what its terminal event says of that, no more."""

    stream_id: str
    url: str = Field(description="Of the stream, from the root of this API.")
    finish_reason: str | None = None
    usage: dict[str, Any] | None = None
    chunks: int | None = None
    sha256: str | None = Field(None, description="Of the text, as UTF-8.")
    code: str | None = Field(None, description="Why it failed; stable, for programs.")
    message: str | None = None
    retryable: bool | None = None
    retry_after: int | None = Field(None, description="As the model service asks, in seconds.")
    upstream: dict[str, str] | None = Field(
        None, description="`code` and `param` by which the model service refused the request."
    )


class StreamEnded(BaseModel):
    type: Literal["stream.completed", "stream.failed", "stream.cancelled"]
    timestamp: datetime = Field(description="Of the end.", examples=["2027-01-15T08:00:00.007Z"])
    data: Ending


@router.post("stream-ended", status_code=204, summary="An answer has ended")
async def stream_ended(
    body: StreamEnded,
    webhook_id: Annotated[str, Header(description="The same whenever this end is told again.")],
    webhook_timestamp: Annotated[int, Header(description="Unix time of this very try.")],
    webhook_signature: Annotated[
        str, Header(description="`v1,` and the HMAC-SHA256 in base64; one for each secret.")
    ],
) -> None:
    """Sent to the X-Webhook-URL of the request, signed as Standard Webhooks has it, at least once.

    Any answer but 2xx, and none within ten seconds, is followed by another try, ever later, for as
    long as the stream can be read; 410 by none. What is erased is not told of.
    """
