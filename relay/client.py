"""A client for scripts and the command line: asks, watches, and comes back by itself."""

import hashlib
import random
import re
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import httpx2

from relay import proxies
from relay.errors import ConfigurationError, RelayError
from relay.events import CHUNK, COMPLETED, STARTED, TERMINAL, Halves

SILENCE_SECONDS = 45.0
"""Three heartbeats: a connection that is silent for longer is dead."""
FIRST_WAIT_SECONDS = 0.5
LONGEST_WAIT_SECONDS = 10.0
FIRST_TRIES = 2
"""Where nobody ever was, the URL is wrong or nothing runs there, and waiting helps neither."""
NOT_NOW = {408, 429, 502, 503, 504}
"""Also what a proxy answers while the servers behind it are being replaced."""
LONGEST_ASKED_SECONDS = 60.0
"""Of what such an answer may ask to wait."""


class Refused(RelayError):
    """The server answered with a problem, which coming back would not mend."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


class Unreachable(RelayError):
    """The server could not be reached often enough in a row."""

    code = "unreachable"
    retryable = True


class Corrupt(RelayError):
    """The answer has not the hash or the number of chunks that its end tells: it is not whole."""

    code = "corrupt"


class _NotNow(Exception):
    """The answer means: come back."""

    def __init__(self, response: httpx2.Response) -> None:
        self.status = response.status_code
        self.detail = str(_json(response).get("detail") or "Try again later.")
        asked = response.headers.get("retry-after", "")
        self.seconds = min(float(asked), LONGEST_ASKED_SECONDS) if asked.isdecimal() else 0.0


@dataclass(frozen=True, slots=True)
class Update:
    """One event as a watcher needs it. `started` means: clear what you have. `text` can be printed:
    half an emoji comes with its other half."""

    kind: str
    text: str
    data: dict[str, Any]


class Client:
    """Talks to one chat-relay. Every request is repeated over lost connections and NOT_NOW, at most
    `tries` times in a row, and FIRST_TRIES times if there never was a connection; a stream is
    resumed strictly after the last event that was seen. The first failure since something came is
    told to `report`."""

    def __init__(
        self,
        url: str,
        *,
        headers: Mapping[str, str] | None = None,
        tries: int = 8,
        sleep: Callable[[float], object] = time.sleep,
        report: Callable[[str], object] = lambda _: None,
    ) -> None:
        """`headers` go with every request, for what may stand before the server. Raises
        ConfigurationError for what is no URL of a server, leads through no proxy, or is no header.
        """
        self._http = _http(url, headers)
        self._url = _without_password(url)
        self._tries = tries
        self._reached = False
        """Whether there ever was a connection."""
        self._told = False
        """To `report`, since something came."""
        self._sleep = sleep
        self._report = report

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._http.close()

    def ask(self, messages: list[dict[str, Any]], **options: Any) -> str:
        """Create a stream, once even if the reply was lost; returns its id. Raises Refused or
        Unreachable, as does every call."""
        key = {"idempotency-key": str(uuid.uuid4())}
        body = {"messages": messages, **options}
        return str(self._call("POST", "/chat", json=body, headers=key)["stream_id"])

    def status(self, stream_id: str) -> dict[str, Any]:
        return self._call("GET", f"/streams/{stream_id}")

    def cancel(self, stream_id: str) -> str:
        """Idempotent; returns the status: cancelling, cancelled, completed or failed."""
        return str(self._call("POST", f"/streams/{stream_id}/cancel")["status"])

    def watch(self, stream_id: str) -> Iterator[Update]:
        """The events of a stream, live, to the terminal one, however often the connection drops.

        Raises Refused (unknown, gone), Unreachable, or Corrupt.
        """
        cursor, taken, failures, least_seconds = "", _Taken(), 0, 0.0
        while True:
            lost: httpx2.TransportError | _NotNow | None = None
            try:
                for event in self._events(stream_id, cursor):
                    failures = 0
                    if event.retry is not None:
                        least_seconds = event.retry / 1000
                    if not event.data:
                        continue
                    self._told = False
                    cursor = event.id or cursor
                    update = taken.update(event)
                    yield update
                    if update.kind in TERMINAL:
                        return
            except (httpx2.TransportError, _NotNow) as error:
                lost = error
            # Without an error the server let go before the terminal event: it is being replaced.
            failures = self._wait_or_give_up(failures, lost, least_seconds)

    def _events(self, stream_id: str, cursor: str) -> Iterator[httpx2.ServerSentEvent]:
        """The first has no data, as a `retry:` has none: it says that the server answers."""
        headers = {"last-event-id": cursor} if cursor else {}
        url = f"/streams/{stream_id}/events"
        # Unbounded here: the relay bounds them, and one too long would be asked for again for ever.
        with self._http.sse(url, headers=headers, max_event_size=None) as source:
            self._reached = True
            if source.response.status_code != 200:
                source.response.read()
                raise _no(source.response)
            if source.response.headers.get("content-type", "").startswith("text/event-stream"):
                yield httpx2.ServerSentEvent()
            yield from source

    def _call(self, method: str, path: str, **options: Any) -> dict[str, Any]:
        failures = 0
        while True:
            try:
                response = self._http.request(method, path, **options)
                body = _json(response)
                if response.is_error or "stream_id" not in body:
                    raise _no(response)
            except (httpx2.TransportError, _NotNow) as error:
                failures = self._wait_or_give_up(failures, error)
                continue
            self._reached = True
            self._told = False
            return body

    def _wait_or_give_up(
        self,
        failures: int,
        lost: httpx2.TransportError | _NotNow | None,
        least_seconds: float = 0.0,
    ) -> int:
        if not isinstance(lost, httpx2.ConnectError | httpx2.ConnectTimeout):
            self._reached = True
        says, hint = f"{self._url} does not answer", "is `relay up` running?"
        if isinstance(lost, _NotNow):
            says, hint = f"{self._url} answers {lost.status}", lost.detail
            least_seconds = max(least_seconds, lost.seconds)
        if failures + 1 >= (self._tries if self._reached else min(FIRST_TRIES, self._tries)):
            raise Unreachable(f"{says}: {hint}") from lost
        if not self._told:
            self._told = True
            self._report(f"{says}, trying again")
        ceiling = min(FIRST_WAIT_SECONDS * 2**failures, LONGEST_WAIT_SECONDS)
        self._sleep(max(ceiling * random.uniform(0.5, 1), least_seconds))  # noqa: S311 - no secret
        return failures + 1


def _http(url: str, headers: Mapping[str, str] | None) -> httpx2.Client:
    """Raises ConfigurationError as Client does."""
    try:
        host = httpx2.URL(url).host
        host.encode("idna")  # As it will be looked up.
    except (httpx2.InvalidURL, UnicodeError):
        host = ""
    if not (host and re.match(r"https?://", url)):
        raise ConfigurationError(f"{url} is no URL such as http://127.0.0.1:8000.")
    if not all(re.fullmatch(r"[\t -~]*", value) for value in (headers or {}).values()):
        raise ConfigurationError("A header has what no request can carry: check your sign-in.")
    timeout = httpx2.Timeout(10, read=SILENCE_SECONDS)
    with proxies.usable():
        trust_env = host not in proxies.HERE
        return httpx2.Client(base_url=url, headers=headers, timeout=timeout, trust_env=trust_env)


def _without_password(url: httpx2.URL | str) -> str:
    return str(httpx2.URL(url).copy_with(userinfo=b""))


class _Taken:
    """What came since the newest `started`, to be held against what the end says of it."""

    def __init__(self) -> None:
        self._begin()

    def _begin(self) -> None:
        self._chunks = 0
        self._hash = hashlib.sha256()
        self._halves = Halves()

    def update(self, event: httpx2.ServerSentEvent) -> Update:
        """Raises Corrupt with the end of an answer that is not what was sent."""
        kind = event.event
        data: Any = event.json()
        if kind == STARTED:
            self._begin()
        piece = str(data.get("text") or "") if kind == CHUNK else ""
        text = self._halves.whole(piece, last=kind in TERMINAL)
        self._chunks += kind == CHUNK
        self._hash.update(text.encode())
        if kind == COMPLETED:
            taken = (self._chunks, self._hash.hexdigest())
            if (data.get("chunks", taken[0]), data.get("sha256", taken[1])) != taken:
                raise Corrupt("The answer arrived damaged: watch it again from its beginning.")
        return Update(kind, text, data)


def _no(response: httpx2.Response) -> Refused | _NotNow:
    if response.status_code in NOT_NOW:
        return _NotNow(response)
    match _json(response):
        case {"code": str(code), "detail": str(detail)}:
            return Refused(code, detail)
    answer = f"{_without_password(response.url)} answered {response.status_code}"
    if response.status_code in {401, 403}:
        how = "by RELAY_AUTHORIZATION, or the client's headers"
        return Refused("denied", f"{answer}: send the sign-in that it asks for, {how}.")
    return Refused("unexpected", f"{answer}, and not as chat-relay does: check the URL.")


def _json(response: httpx2.Response) -> dict[str, Any]:
    """Empty if it is no object."""
    try:
        body = response.json()
    except ValueError:
        return {}
    return body if isinstance(body, dict) else {}
