"""The errors of chat-relay.

RelayError
├── ConfigurationError      the start ends with its one sentence
├── BadRequest              what was asked cannot be done as it stands
│   ├── MalformedCursor
│   └── IdempotencyConflict
├── StreamUnknown           this id was never handed out
├── StreamGone              it was; the stream is erased, expired or lost
├── QueueFull               nothing was created; try later
├── Draining                nothing was created; another process answers
├── StreamLost              this attempt may no longer write
└── UpstreamError           the model service failed; carries its own code
    ├── Garbled             it sent what is no answer
    ├── Incomplete          it ended without finishing the answer
    ├── Cut                 its connection failed, or it fell silent
    └── Refused             it answered by an error status (worker/failures.py)

Those that only a client of ours meets stand in relay/client.py.

`code` is public and stable. The message is one sentence that says what to do, and never holds
prompt, answer or vendor text.
"""

import re


class RelayError(Exception):
    """Root of the tree. `retryable`: the same request may succeed later, unchanged."""

    code = "internal"
    retryable = False

    @property
    def message(self) -> str:
        return str(self.args[0]) if self.args else self.code


class ConfigurationError(RelayError):
    """A setting is missing or wrong; the message names the variable."""

    code = "configuration"


class BadRequest(RelayError):
    code = "invalid_request"


class MalformedCursor(BadRequest):
    code = "malformed_cursor"


class IdempotencyConflict(BadRequest):
    code = "idempotency_conflict"


class StreamUnknown(RelayError):
    code = "stream_unknown"


class StreamGone(RelayError):
    code = "stream_gone"


class QueueFull(RelayError):
    code = "queue_full"
    retryable = True


class Draining(RelayError):
    code = "draining"
    retryable = True


class StreamLost(RelayError):
    """The log refused an append: another attempt owns the stream, or it is closed or erased."""

    code = "stream_lost"


UPSTREAM_CODES = frozenset(
    {
        "upstream_denied",
        "upstream_failed",
        "upstream_garbled",
        "upstream_incomplete",
        "upstream_missing",
        "upstream_rate_limited",
        "upstream_refused",
        "upstream_timeout",
        "upstream_unavailable",
        "upstream_unreachable",
    }
)
"""Of what the model service did, or did not do."""
FAILURE_CODES = UPSTREAM_CODES | {
    "answer_timeout",
    "content_filter",
    "internal",
    "interrupted",
    "queue_timeout",
}
"""What a `failed` in a log may have as its `code`."""


class UpstreamError(RelayError):
    """The answer cannot be completed. `code` says why and is what viewers see in `failed`; `cause`
    is for log lines alone, and empty where the code says it all."""

    def __init__(self, code: str, message: str, *, retryable: bool, cause: str = "") -> None:
        super().__init__(message)
        self.code = code
        self.retryable = retryable
        self.cause = cause


class Garbled(UpstreamError):
    def __init__(self, cause: str) -> None:
        message = "The model service sent what is no answer: ask again."
        super().__init__("upstream_garbled", message, retryable=True, cause=cause)


class Incomplete(UpstreamError):
    def __init__(self) -> None:
        message = "The model service ended the answer without finishing it: ask again."
        super().__init__("upstream_incomplete", message, retryable=True)


class Cut(UpstreamError):
    """Its connection failed, or it fell silent: what it said before stands."""


def identifier(text: object) -> str:
    """All that is passed on of a vendor's text; empty for any other."""
    is_one = isinstance(text, str) and re.fullmatch(r"[A-Za-z_][\w.\[\]-]{0,60}", text, re.ASCII)
    return str(text) if is_one else ""
