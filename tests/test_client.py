"""The client, against a server of which every byte is written here."""

import hashlib
import json
import random
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import httpx2
import pytest
from typer.testing import CliRunner

from cli.main import app
from relay.client import (
    FIRST_WAIT_SECONDS,
    LONGEST_ASKED_SECONDS,
    LONGEST_WAIT_SECONDS,
    Client,
    Corrupt,
    Refused,
    Unreachable,
    Update,
)
from relay.errors import ConfigurationError
from tests.listening import silent

ID = "aaaqeayeaudaocajbifqydiob62qkqho"
STREAM = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\nconnection: close\r\n"
RETRY = b"retry: 1000\n\n"
HEARTBEAT = b":\n\n"
AWAY = b"HTTP/1.1 503 Away\r\nconnection: close\r\ncontent-length: 0\r\n\r\n"
BROKEN = b""


class Request(NamedTuple):
    line: str
    headers: dict[str, str]
    body: Any


class Server:
    """Answers each connection with the next reply and closes it; when there is none, it is gone."""

    def __init__(self, replies: tuple[bytes, ...]) -> None:
        self.requests: list[Request] = []
        self._replies = replies
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def close(self) -> None:
        while self._thread.is_alive():  # Nobody asked for the rest of the replies.
            try:
                socket.create_connection(self._socket.getsockname()).close()
            except OSError:
                break
        self._thread.join()

    def _serve(self) -> None:
        with self._socket:
            for reply in self._replies:
                connection, _ = self._socket.accept()
                with connection, connection.makefile("rb") as file:
                    line = file.readline().decode().strip()
                    if not line:
                        continue
                    headers = dict(iter(lambda: _header(file.readline()), ("", "")))
                    body = file.read(int(headers.get("content-length", 0)))
                    self.requests.append(Request(line, headers, json.loads(body or "null")))
                    connection.sendall(reply)


def _header(line: bytes) -> tuple[str, str]:
    name, _, value = line.decode().strip().partition(": ")
    return name.lower(), value


@contextmanager
def serving(*replies: bytes) -> Iterator[Server]:
    server = Server(replies)
    try:
        yield server
    finally:
        server.close()


def client(server: Server, sleep: Callable[[float], object] = lambda _: None) -> Client:
    return Client(server.url, tries=3, sleep=sleep)


def event(cursor: str, kind: str, **data: Any) -> bytes:
    name = f"id: {cursor}\n" if cursor else ""
    return f"{name}event: {kind}\ndata: {json.dumps(data)}\n\n".encode()


STARTED = event("1-0", "started", attempt=1, model="m")
HEL, LO = event("1-1", "chunk", text="Hel"), event("1-2", "chunk", text="lo")


def completed(cursor: str, text: str, **more: object) -> bytes:
    digest = hashlib.sha256(text.encode()).hexdigest()
    return event(cursor, "completed", sha256=digest, finish_reason="stop", **more)


def stream(*parts: bytes) -> bytes:
    """A whole response that ends in order, by the close of the connection."""
    return STREAM + b"\r\n" + b"".join(parts)


def cut(*parts: bytes) -> bytes:
    """A response that breaks off: more was promised than comes."""
    return STREAM + b"content-length: 100000\r\n\r\n" + b"".join(parts)


def reply(status: int, body: Any) -> bytes:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    head = f"HTTP/1.1 {status} X\r\ncontent-type: application/json\r\nconnection: close\r\n"
    return f"{head}content-length: {len(data)}\r\n\r\n".encode() + data


def problem(status: int, code: str) -> bytes:
    return reply(status, {"code": code, "detail": "What to do."})


def shown(updates: list[Update]) -> str:
    """What stands on the screen of one who keeps the one rule."""
    text = ""
    for update in updates:
        text = "" if update.kind == "started" else text + update.text
    return text


def watched(*replies: bytes) -> tuple[list[Update], list[Request]]:
    with serving(*replies) as server, client(server) as relay:
        return list(relay.watch(ID)), server.requests


# Watching.


def test_a_watch_tells_each_event_to_the_terminal_one() -> None:
    updates, [request] = watched(
        stream(event("0-1", "queued"), STARTED, HEL, LO, completed("1-3", "Hello"))
    )
    kinds = ["queued", "started", "chunk", "chunk", "completed"]
    assert [update.kind for update in updates] == kinds
    assert [update.text for update in updates] == ["", "", "Hel", "lo", ""]
    assert updates[1].data == {"attempt": 1, "model": "m"}
    assert request.line == f"GET /streams/{ID}/events HTTP/1.1"
    assert "last-event-id" not in request.headers


def test_what_carries_no_event_is_passed_over() -> None:
    updates, _ = watched(
        stream(RETRY, HEARTBEAT, STARTED, HEARTBEAT, HEL, RETRY, completed("1-2", "Hel"))
    )
    assert [update.kind for update in updates] == ["started", "chunk", "completed"]


@pytest.mark.parametrize("ends", [stream, cut])
def test_a_watch_comes_back_strictly_after_the_last_event(ends: Callable[..., bytes]) -> None:
    half_an_event = LO[:-1]
    updates, requests = watched(
        ends(STARTED, HEL, half_an_event),
        ends(),
        stream(LO, completed("1-3", "Hello")),
    )
    assert [update.text for update in updates] == ["", "Hel", "lo", ""]
    cursors = [request.headers.get("last-event-id") for request in requests]
    assert cursors == [None, "1-1", "1-1"]


def test_an_event_without_an_id_leaves_the_cursor_where_it_was() -> None:
    note = event("", "note")
    _, requests = watched(stream(STARTED, HEL, note), stream(note), stream(completed("1-3", "Hel")))
    cursors = [request.headers.get("last-event-id") for request in requests]
    assert cursors == [None, "1-1", "1-1"]


def test_started_clears_what_was_seen() -> None:
    updates, _ = watched(
        stream(STARTED, event("1-1", "chunk", text="lost")),
        stream(event("2-0", "started"), HEL, LO, completed("2-3", "Hello")),
    )
    assert shown(updates) == "Hello"


def test_only_chunks_have_text_of_the_answer() -> None:
    note = event("1-3", "note", text="By the way.")
    with (
        serving(stream(STARTED, HEL, LO, note, completed("1-4", "Hello"))) as server,
        client(server) as relay,
    ):
        assert shown(list(relay.watch(ID))) == "Hello"


def test_an_event_may_be_as_large_as_the_relay_lets_it_be() -> None:
    text = "x" * 4 * 1024 * 1024
    updates, _ = watched(stream(STARTED, event("1-1", "chunk", text=text), completed("1-2", text)))
    assert shown(updates) == text


def test_a_split_emoji_is_no_damage() -> None:
    halves = [event(f"1-{n}", "chunk", text=half) for n, half in enumerate("\ud83d\ude00", 1)]
    updates, _ = watched(stream(STARTED, *halves, completed("1-3", "😀")))
    assert updates[-1].kind == "completed"
    assert [update.text for update in updates] == ["", "", "😀", ""]


@pytest.mark.parametrize("kind", ["failed", "cancelled"])
def test_after_a_failure_or_a_cancel_nobody_comes_back(kind: str) -> None:
    updates, requests = watched(stream(STARTED, HEL, event("1-2", kind, code="x")))
    assert (updates[-1].kind, updates[-1].data) == (kind, {"code": "x"})
    assert len(requests) == 1


@pytest.mark.parametrize(
    "end", [completed("1-3", "Hello"), completed("1-3", "Hel", chunks=2)], ids=["hash", "number"]
)
def test_an_answer_that_is_not_what_was_said_is_never_shown_as_whole(end: bytes) -> None:
    """Its text may be whole by chance where a tool call is missing: so chunks are counted, too."""
    reply = stream(STARTED, HEL, end)
    with serving(reply) as server, client(server) as relay:
        watching = relay.watch(ID)
        assert [next(watching).kind for _ in range(2)] == ["started", "chunk"]
        with pytest.raises(Corrupt):
            next(watching)


def test_without_a_hash_there_is_nothing_to_verify() -> None:
    updates, _ = watched(stream(STARTED, HEL, event("1-2", "completed")))
    assert updates[-1].kind == "completed"


def test_a_watch_waits_while_the_server_is_away() -> None:
    updates, requests = watched(BROKEN, AWAY, stream(STARTED, HEL, completed("1-2", "Hel")))
    assert shown(updates) == "Hel"
    assert len(requests) == 3


@pytest.mark.parametrize("status", [408, 429, 502, 503, 504])
def test_what_a_proxy_answers_while_servers_are_replaced_ends_nothing(status: int) -> None:
    page = reply(status, b"<html>")
    parts = (page, stream(STARTED, HEL), page, stream(LO, completed("1-3", "Hello")))
    assert shown(watched(*parts)[0]) == "Hello"
    with serving(page, reply(202, {"stream_id": ID})) as server, client(server) as relay:
        assert relay.ask([]) == ID


@pytest.mark.parametrize(("asked", "least"), [(b"7", 7), (b"3600", LONGEST_ASKED_SECONDS)])
def test_who_is_asked_to_come_later_does_so_and_says_why_when_it_gives_up(
    asked: bytes, least: float
) -> None:
    full = problem(503, "queue_full").replace(b"\r\n", b"\r\nretry-after: " + asked + b"\r\n", 1)
    waits: list[float] = []
    with (
        serving(*[full] * 3) as server,
        client(server, waits.append) as relay,
        pytest.raises(Unreachable, match=f"^{server.url} answers 503: What to do.$"),
    ):
        relay.ask([])
    assert waits == [least, least]


def test_each_answer_gives_new_patience_though_there_is_no_event_in_it() -> None:
    """Something on the way may cut what is idle, for as long as a stream waits in the queue."""
    silent = [stream(), stream(RETRY), cut(HEARTBEAT), cut()]
    updates, _ = watched(*silent, BROKEN, *silent, stream(STARTED, HEL, completed("1-2", "Hel")))
    assert shown(updates) == "Hel"


def test_each_event_gives_new_patience() -> None:
    updates, _ = watched(
        *(BROKEN, AWAY, stream(STARTED), BROKEN, stream(HEL), AWAY),
        stream(completed("1-2", "Hel")),
    )
    assert shown(updates) == "Hel"


@pytest.mark.parametrize(
    "replies",
    [
        (BROKEN,) * 3,
        (AWAY,) * 3,
        (stream(),),
        (reply(200, {"not": "a stream"}),) * 3,
    ],
    ids=["broken", "away", "then refused", "no stream"],
)
def test_a_watch_gives_up_after_so_many_failures_in_a_row(replies: tuple[bytes, ...]) -> None:
    waits: list[float] = []
    with serving(*replies) as server, client(server, waits.append) as relay:
        with pytest.raises(Unreachable) as unreachable:
            list(relay.watch(ID))
        assert unreachable.value.retryable
        assert len(waits) == 2
        assert server.url in unreachable.value.message


REFUSALS = [
    (problem(410, "stream_gone"), "stream_gone", "What to do."),
    (problem(404, "stream_unknown"), "stream_unknown", "What to do."),
    (reply(401, None), "denied", "answered 401: send the sign-in"),
    (reply(403, b"<html>"), "denied", "answered 403: send the sign-in"),
    (reply(500, b"<html>"), "unexpected", "answered 500, and not as"),
    (reply(500, b"\xff"), "unexpected", "answered 500, and not as"),
    (reply(500, {"detail": "no code"}), "unexpected", "answered 500, and not as"),
    (reply(500, ["no", "object"]), "unexpected", "answered 500, and not as"),
    (reply(500, "text"), "unexpected", "answered 500, and not as"),
    (reply(500, None), "unexpected", "answered 500, and not as"),
]
CALLS: list[Callable[[Client], object]] = [
    lambda relay: list(relay.watch(ID)),
    lambda relay: relay.ask([]),
    lambda relay: relay.status(ID),
    lambda relay: relay.cancel(ID),
]


@pytest.mark.parametrize("call", CALLS, ids=["watch", "ask", "status", "cancel"])
@pytest.mark.parametrize(
    ("answer", "code", "message"),
    REFUSALS,
    ids=lambda it: it if isinstance(it, str) else "",
)
def test_a_problem_is_a_refusal_and_not_asked_again(
    call: Callable[[Client], object], answer: bytes, code: str, message: str
) -> None:
    with serving(answer) as server, client(server) as relay:
        with pytest.raises(Refused) as refused:
            call(relay)
        assert refused.value.code == code
        assert message in refused.value.message
        assert len(server.requests) == 1


@pytest.mark.parametrize("call", CALLS[1:], ids=["ask", "status", "cancel"])
@pytest.mark.parametrize("body", [b"<html>", {"not": "ours"}, []], ids=["html", "other", "list"])
def test_another_server_that_answers_well_is_no_relay_all_the_same(
    call: Callable[[Client], object], body: Any
) -> None:
    with serving(reply(200, body)) as server, client(server) as relay:
        sentence = f"^{server.url}/.* answered 200, .*: check the URL.$"
        with pytest.raises(Refused, match=sentence):
            call(relay)


# Asking.


RUNNING = {"stream_id": ID, "status": "running"}
HALF_A_REPLY = b"HTTP/1.1 202 Accepted\r\ncontent-length: 99\r\n\r\n{"


@pytest.mark.parametrize("lost", [BROKEN, AWAY, HALF_A_REPLY], ids=["broken", "away", "half"])
def test_to_ask_makes_one_stream_though_the_reply_was_lost(lost: bytes) -> None:
    messages = [{"role": "user", "content": "hi"}]
    with serving(lost, reply(202, {"stream_id": ID})) as server, client(server) as relay:
        assert relay.ask(messages, temperature=1) == ID
    first, second = server.requests
    assert first.line == "POST /chat HTTP/1.1"
    assert first.body == {"messages": messages, "temperature": 1}
    assert second.body == first.body
    assert second.headers["idempotency-key"] == first.headers["idempotency-key"]


def test_two_questions_are_two_streams() -> None:
    with serving(*[reply(202, {"stream_id": ID})] * 2) as server, client(server) as relay:
        relay.ask([])
        relay.ask([])
    assert len({request.headers["idempotency-key"] for request in server.requests}) == 2


def test_status_and_cancel_tell_what_the_server_says() -> None:
    with (
        serving(reply(200, RUNNING), reply(202, RUNNING | {"status": "cancelling"})) as server,
        client(server) as relay,
    ):
        assert relay.status(ID) == RUNNING
        assert relay.cancel(ID) == "cancelling"
    lines = [request.line for request in server.requests]
    assert lines == [f"GET /streams/{ID} HTTP/1.1", f"POST /streams/{ID}/cancel HTTP/1.1"]


@pytest.mark.parametrize("replies", [(BROKEN,) * 3, (AWAY,) * 3], ids=["broken", "away"])
def test_a_call_gives_up_after_so_many_failures_in_a_row(replies: tuple[bytes, ...]) -> None:
    with serving(*replies) as server, client(server) as relay:
        with pytest.raises(Unreachable):
            relay.status(ID)
        assert len(server.requests) == len(replies)


@pytest.mark.parametrize("call", CALLS, ids=["watch", "ask", "status", "cancel"])
def test_where_nobody_ever_was_a_client_soon_gives_up(call: Callable[[Client], object]) -> None:
    waits: list[float] = []
    with serving() as server, client(server, waits.append) as relay:
        server.close()
        with pytest.raises(Unreachable, match=server.url):
            call(relay)
        assert len(waits) == 1


def test_where_nobody_takes_a_connection_a_client_soon_gives_up() -> None:
    waits: list[float] = []
    with silent() as port, Client(f"http://127.0.0.1:{port}", sleep=waits.append) as relay:
        relay._http.timeout = httpx2.Timeout(0.05)
        with pytest.raises(Unreachable):
            relay.status(ID)
    assert len(waits) == 1


@pytest.mark.parametrize("call", CALLS, ids=["watch", "ask", "status", "cancel"])
def test_a_connection_that_is_silent_for_too_long_is_dead(
    call: Callable[[Client], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("relay.client.SILENCE_SECONDS", 0.05)
    waits: list[float] = []
    with socket.create_server(("127.0.0.1", 0)) as mute:
        url = f"http://127.0.0.1:{mute.getsockname()[1]}"
        with Client(url, tries=3, sleep=waits.append) as relay, pytest.raises(Unreachable):
            call(relay)
    assert len(waits) == 2


def test_where_somebody_was_a_client_waits_for_who_comes_next() -> None:
    waits: list[float] = []
    with serving(reply(200, RUNNING)) as server, client(server, waits.append) as relay:
        relay.status(ID)
        with pytest.raises(Unreachable):
            relay.status(ID)
        assert len(waits) == 2


def test_the_first_loss_in_a_row_is_told_at_once() -> None:
    told: list[str] = []
    with serving(AWAY, BROKEN, reply(202, {"stream_id": ID})) as server:
        with Client(server.url, sleep=lambda _: None, report=told.append) as client:
            client.ask([])
        assert told == [f"{server.url} answers 503, trying again"]


def test_where_answers_bring_nothing_a_client_is_quiet_and_waits_as_it_is_asked_to() -> None:
    """As a process does that has lost Redis, or is being replaced."""
    told: list[str] = []
    waits: list[float] = []
    nothing = stream(b"retry: 1500\n\n")
    replies = [nothing] * 3 + [stream(STARTED, HEL), nothing, stream(completed("1-2", "Hel"))]
    with serving(*replies) as server:
        with Client(server.url, sleep=waits.append, report=told.append) as client:
            assert shown(list(client.watch(ID))) == "Hel"
        assert len(waits) == 5
        assert all(1.5 <= wait <= LONGEST_WAIT_SECONDS for wait in waits)
        assert len(told) == 2, "once before something came, and once after"


def test_headers_for_what_stands_before_the_server_go_with_every_request() -> None:
    replies = (reply(202, {"stream_id": ID}), stream(STARTED, HEL), stream(completed("1-2", "Hel")))
    headers = {"authorization": "Bearer me"}
    with (
        serving(*replies) as server,
        Client(server.url, headers=headers, sleep=lambda _: None) as client,
    ):
        list(client.watch(client.ask([])))
    assert [request.headers["authorization"] for request in server.requests] == ["Bearer me"] * 3


def test_the_command_line_sends_the_sign_in_that_its_environment_has() -> None:
    with serving(reply(202, RUNNING)) as server:
        variables = {"RELAY_URL": server.url, "RELAY_AUTHORIZATION": "Bearer me\n"}
        assert CliRunner().invoke(app, ["cancel", ID], env=variables).exit_code == 0
        assert server.requests[0].headers["authorization"] == "Bearer me"


@pytest.mark.parametrize("answers", [(), (reply(500, None),)], ids=["away", "refused"])
def test_a_password_in_the_url_stands_in_no_error(answers: tuple[bytes, ...]) -> None:
    with serving(*answers) as server:
        url = server.url.replace("http://", "http://me:secret@")
        told = pytest.raises((Unreachable, Refused), match=server.url)
        with Client(url, tries=1, sleep=lambda _: None) as client, told as error:
            client.status(ID)
    assert "secret" not in error.value.message


@pytest.mark.parametrize(
    "url",
    [
        "",
        "nonsense",
        "localhost:8000",
        "ftp://host",
        "http://",
        "http:///path",
        "http://host:port",
        "http://[::1",
        "http://ex..ample",
        "http://" + 64 * "a",
    ],
)
def test_what_is_no_url_is_refused_before_anything_is_asked(url: str) -> None:
    with pytest.raises(ConfigurationError, match="no URL"):
        Client(url)


@pytest.mark.parametrize("value", ["Bearer \N{SNOWMAN}", "Bearer a\nb", "Bearer a\r", "Bearer \0"])
def test_what_no_header_can_carry_is_refused_before_anything_is_asked(value: str) -> None:
    with pytest.raises(ConfigurationError, match="sign-in"):
        Client("http://127.0.0.1:8000", headers={"authorization": value})


@pytest.mark.parametrize("proxy", ["http://proxy.invalid:1", "socks5://proxy.invalid:1"])
def test_no_proxy_comes_between_it_and_a_relay_on_this_machine(
    monkeypatch: pytest.MonkeyPatch, proxy: str
) -> None:
    monkeypatch.setenv("ALL_PROXY", proxy)
    with serving(reply(202, {"stream_id": ID})) as server, client(server) as relay:
        assert relay.ask([]) == ID
    with (
        serving(reply(202, {"stream_id": ID})) as server,
        Client(server.url.replace("127.0.0.1", "localhost")) as relay,
    ):
        assert relay.ask([]) == ID


@pytest.mark.parametrize(
    ("variable", "value", "sentence"),
    [
        ("ALL_PROXY", "socks5://proxy.invalid:1", "unset ALL_PROXY"),
        ("HTTP_PROXY", "http://127.0.0.1:abc", "set HTTP_PROXY"),
        ("ALL_PROXY", "http://[::", "unset ALL_PROXY"),
        ("SSL_CERT_FILE", "/nowhere/ca.pem", "SSL_CERT_FILE .* leads to no certificates"),
        ("SSL_CERT_FILE", __file__, "SSL_CERT_FILE .* leads to no certificates"),
    ],
)
def test_an_environment_that_leads_nowhere_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch, variable: str, value: str, sentence: str
) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(ConfigurationError, match=sentence):
        Client("http://relay.invalid")


def test_waits_grow_to_a_bound_and_are_spread(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    for share in (0.5, 1.0):
        monkeypatch.setattr(random, "uniform", lambda _low, _high, share=share: share)
        with (
            serving(AWAY) as server,
            Client(server.url, tries=8, sleep=waits.append) as relay,
            pytest.raises(Unreachable),
        ):
            relay.status(ID)
    assert waits[7:9] == [FIRST_WAIT_SECONDS, 2 * FIRST_WAIT_SECONDS]
    assert waits[13] == LONGEST_WAIT_SECONDS
    assert waits[:7] == [wait / 2 for wait in waits[7:]]
