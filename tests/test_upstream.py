import asyncio
import inspect
import json
import socket
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, MutableMapping
from contextlib import asynccontextmanager, suppress
from types import ModuleType
from typing import Any

import pytest
from openai.resources.chat.completions import AsyncCompletions

from api.chat_request import Asked
from emulator.app import Emulator, Receive, Record, Send
from emulator.serve import serve
from relay.chunks import Chunk, parse
from relay.errors import ConfigurationError, UpstreamError
from relay.events import first_choice_text
from relay.settings import Settings
from tests.conftest import asking
from tests.listening import listening, silent
from tests.receiver import Names
from tests.test_http1 import CHUNKED, Server, serving
from worker.failures import Refused
from worker.upstream import CHUNK_BYTES, Upstream

SECRET = "the secret of the vendor"


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("worker.upstream.FIRST_RETRY_SECONDS", 0.001)


@asynccontextmanager
async def azure(url: str, **changes: Any) -> AsyncIterator[Upstream]:
    target = {"azure_endpoint": url, "azure_key": "key", "azure_deployment": "demo"}
    async with opened(**{**target, **changes}) as upstream:
        yield upstream


@asynccontextmanager
async def openai(url: str, **changes: Any) -> AsyncIterator[Upstream]:
    async with opened(
        openai_base_url=f"{url}/v1", openai_key="key", openai_model="gpt", **changes
    ) as upstream:
        yield upstream


@asynccontextmanager
async def opened(
    *, on_retry: Callable[[str], None] = lambda _: None, **settings: Any
) -> AsyncIterator[Upstream]:
    upstream = Upstream(Settings(**settings), on_retry=on_retry)
    try:
        yield upstream
    finally:
        await upstream.close()


@asynccontextmanager
async def answering(response: bytes) -> AsyncIterator[tuple[str, list[bytes]]]:
    """An upstream that gives every request the same bytes; the value holds what it was asked."""
    asked: list[bytes] = []

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        [length] = [line for line in head.lower().split(b"\r\n") if line[:15] == b"content-length:"]
        asked.append(head + await reader.readexactly(int(length[15:])))
        writer.write(response)
        await writer.drain()

    async with listening(answer) as port:
        yield f"http://127.0.0.1:{port}", asked


def http(status: int, body: bytes, kind: str = "application/json") -> bytes:
    head = f"HTTP/1.1 {status} X\r\ncontent-type: {kind}\r\ncontent-length: {len(body)}\r\n"
    return f"{head}connection: close\r\n\r\n".encode() + body


def refusal(status: int, **error: Any) -> bytes:
    return http(status, json.dumps({"error": {"message": SECRET, **error}}).encode())


async def chunks_of(upstream: Upstream, **script: Any) -> list[Chunk]:
    return await asked(upstream, asking(**script))


async def asked(upstream: Upstream, request: dict[str, Any]) -> list[Chunk]:
    chunks: list[Chunk] = []
    async with asyncio.timeout(5):
        await upstream.stream(request, lambda together: chunks.extend(map(parse, together)))
    return chunks


async def failure_of(upstream: Upstream, **script: Any) -> tuple[list[Chunk], UpstreamError]:
    chunks: list[Chunk] = []
    try:
        async with asyncio.timeout(5):
            await upstream.stream(
                asking(**script), lambda together: chunks.extend(map(parse, together))
            )
    except UpstreamError as error:
        return chunks, error
    pytest.fail("it did not fail")


def text_of(chunks: list[Chunk]) -> str:
    return "".join(map(first_choice_text, chunks))


async def ended(emulator: Emulator, number: int = 0) -> Record:
    async with asyncio.timeout(1):
        record = await emulator.request(number)
        await record.over.wait()
    return record


# What comes


async def test_the_chunks_come_as_they_were_sent(emulator_url: str) -> None:
    async with azure(emulator_url) as upstream:
        chunks = await chunks_of(upstream, chunks=3, late_filter="annotations")
    assert chunks[0]["choices"] == []
    assert chunks[0]["id"] == chunks[0]["model"] == ""
    assert chunks[0]["prompt_filter_results"][0]["prompt_index"] == 0
    assert text_of(chunks) == "0 1 2 "
    assert [list(c["choices"][0]["delta"]) for c in chunks[2:5]] == [["content"]] * 3
    finish = [c["choices"][0]["finish_reason"] for c in chunks if c["choices"]].index("stop") + 1
    late = chunks[finish + 1 : -1]
    assert [chunk["choices"][0]["content_filter_offsets"]["end_offset"] for chunk in late] == [3, 6]
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"]["completion_tokens"] == 3


async def test_raw_chunks_pass_through_with_every_field_and_no_model_in_between(
    emulator_url: str,
) -> None:
    raw = [
        {"choices": [], "odd": {"deep": [1, None, "\u2028"]}},
        {"id": 7, "choices": [{"index": 0, "delta": {"content": "a\r\nb", "new": 1.5}}]},
    ]
    async with openai(emulator_url) as upstream:
        assert await chunks_of(upstream, raw=raw) == raw


async def test_half_an_emoji_survives(emulator_url: str) -> None:
    async with azure(emulator_url) as upstream:
        text = text_of(await chunks_of(upstream, surrogate=True))
    assert text == "\ud83d\ude00"


# Where it goes


async def test_the_classic_path_names_deployment_version_and_key() -> None:
    async with (
        answering(refusal(401)) as (url, requests),
        azure(url, api_version="2031-01-01") as upstream,
    ):
        await failure_of(upstream)
    [request] = requests
    line, *lines = request.split(b"\r\n\r\n")[0].lower().split(b"\r\n")
    path = b"/openai/deployments/demo/chat/completions?api-version=2031-01-01"
    assert line == b"post " + path + b" http/1.1"
    assert b"api-key: key" in lines


@pytest.mark.parametrize("kind", ["azure v1", "openai"])
async def test_the_other_paths_carry_a_bearer_and_no_version(kind: str) -> None:
    async with answering(refusal(401)) as (url, requests):
        v1 = azure(f"{url}/openai/v1/") if kind == "azure v1" else openai(url)
        async with v1 as upstream:
            await failure_of(upstream)
    line, *lines = requests[0].split(b"\r\n\r\n")[0].lower().split(b"\r\n")
    path = b"/openai/v1" if kind == "azure v1" else b"/v1"
    assert line == b"post " + path + b"/chat/completions http/1.1"
    assert b"authorization: bearer key" in lines
    assert not [each for each in lines if each.startswith(b"api-key")]


async def test_all_three_paths_lead_to_an_answer(emulator: Emulator, emulator_url: str) -> None:
    async with (
        azure(emulator_url) as classic,
        azure(f"{emulator_url}/openai/v1/") as v1,
        openai(emulator_url) as plain,
    ):
        for upstream in (classic, v1, plain):
            assert text_of(await chunks_of(upstream, chunks=2)) == "0 1 "
    assert [(record.path, record.body["model"]) for record in emulator.requests] == [
        ("/openai/deployments/demo/chat/completions", "demo"),
        ("/openai/v1/chat/completions", "demo"),
        ("/v1/chat/completions", "gpt"),
    ]


@pytest.mark.parametrize("value", [None, "", " "])
async def test_a_base_url_that_is_set_to_nothing_leads_to_openai_like_one_that_is_not_set(
    value: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if value is not None:
        monkeypatch.setenv("OPENAI_BASE_URL", value)
    async with opened(openai_key="key", openai_model="gpt") as upstream:
        assert upstream._endpoint._url == "https://api.openai.com/v1/chat/completions"


async def test_a_stored_request_cannot_choose_where_the_call_goes(
    emulator: Emulator, emulator_url: str
) -> None:
    aims = {"model": "dearer", "stream": False, "stream_options": {"include_usage": False}}
    async with openai(emulator_url) as upstream:
        chunks = await asked(upstream, {**asking(chunks=2), **aims})
    [record] = emulator.requests
    assert record.body["model"] == "gpt"
    assert record.body["stream"] is True
    assert record.body["stream_options"] == {"include_usage": True}
    assert chunks[-1]["usage"]["completion_tokens"] == 2


@pytest.mark.parametrize(
    "option",
    [
        {"extra_body": {"model": "dearer"}},
        {"extra_headers": {"authorization": "theirs"}},
        {"extra_query": {"theirs": "1"}},
    ],
)
async def test_an_option_of_the_sdk_in_a_request_cannot_choose_it_either(
    option: dict[str, Any],
) -> None:
    async with answering(refusal(401)) as (url, requests), openai(url) as upstream:
        with suppress(UpstreamError):
            await asked(upstream, {**asking(), **option})
    [request] = requests
    head, _, body = request.partition(b"\r\n\r\n")
    assert b"theirs" not in head
    assert json.loads(body)["model"] == "gpt"


def test_the_sdk_knows_every_field_that_the_api_accepts() -> None:
    known = inspect.signature(AsyncCompletions.create).parameters
    assert set(Asked.model_fields) <= set(known)


# What is added


@pytest.mark.parametrize(
    ("settings", "request_", "sent"),
    [
        ({}, {}, {}),
        ({"temperature": 0.0}, {}, {"temperature": 0.0}),
        ({"temperature": 0.3}, {"temperature": 1.1}, {"temperature": 1.1}),
        ({}, {"temperature": 1.1}, {"temperature": 1.1}),
        ({"max_tokens": 9}, {}, {"max_tokens": 9}),
        ({"max_tokens": 9}, {"max_tokens": 5}, {"max_tokens": 5}),
        ({"max_tokens": 9}, {"max_completion_tokens": 5}, {"max_completion_tokens": 5}),
    ],
)
async def test_defaults_are_sent_when_set_and_never_override_the_request(
    settings: dict[str, Any],
    request_: dict[str, Any],
    sent: dict[str, Any],
    emulator: Emulator,
    emulator_url: str,
) -> None:
    async with azure(emulator_url, **settings) as upstream:
        await asked(upstream, {**asking(chunks=1), **request_})
    [record] = emulator.requests
    assert set(record.body) == {"messages", "model", "stream", "stream_options", *sent}
    assert {name: record.body[name] for name in sent} == sent
    assert record.body["messages"] == asking(chunks=1)["messages"]


async def test_null_does_not_switch_off_a_default(emulator: Emulator, emulator_url: str) -> None:
    nulls = {"temperature": None, "max_tokens": None, "max_completion_tokens": None}
    request, _ = Asked.model_validate(asking(chunks=1) | nulls).to_stored()
    async with azure(emulator_url, temperature=0.2, max_tokens=50) as upstream:
        await asked(upstream, request)
    [record] = emulator.requests
    sent = {name: record.body[name] for name in nulls if name in record.body}
    assert sent == {"temperature": 0.2, "max_tokens": 50}


async def test_the_system_prompt_stands_before_the_callers_messages(
    emulator: Emulator, emulator_url: str
) -> None:
    request = asking(chunks=1)
    request["messages"].insert(0, {"role": "system", "content": "theirs"})
    async with azure(emulator_url, system_prompt="ours") as upstream:
        await asked(upstream, request)
        await asked(upstream, request)
    ours, theirs = {"role": "system", "content": "ours"}, asking(chunks=1)["messages"]
    for record in emulator.requests:
        assert record.body["messages"] == [ours, {"role": "system", "content": "theirs"}, *theirs]
    assert len(request["messages"]) == 2


# Asking again


@pytest.mark.parametrize("status", [408, 409, 429, 500, 503])
async def test_after_a_passing_failure_it_asks_again_and_gives_one_answer(
    status: int, emulator: Emulator, emulator_url: str
) -> None:
    async with azure(emulator_url, upstream_tries=3) as upstream:
        chunks = await chunks_of(upstream, chunks=3, status=status, status_times=2, key="k")
    assert text_of(chunks) == "0 1 2 "
    assert emulator.total == 3


async def test_it_waits_as_long_as_a_429_asks(emulator: Emulator, emulator_url: str) -> None:
    async with azure(emulator_url, upstream_tries=2) as upstream:
        script = {"status": 429, "status_times": 1, "retry_after_ms": 120, "retry_after": 9}
        assert text_of(await chunks_of(upstream, chunks=1, **script)) == "0 "
    refused, answered = emulator.requests
    assert refused.ended is not None
    # The upper bound is generous for a busy machine, and far below the nine seconds.
    assert 0.12 <= answered.started - refused.ended < 2


@pytest.mark.parametrize("tries", [1, 3])
@pytest.mark.parametrize("status", [429, 503])
async def test_the_tries_are_bounded(
    status: int, tries: int, emulator: Emulator, emulator_url: str
) -> None:
    async with azure(emulator_url, upstream_tries=tries) as upstream:
        _, error = await failure_of(upstream, status=status)
    assert error.retryable
    assert emulator.total == tries


async def test_a_quota_that_is_used_up_is_asked_for_once() -> None:
    used_up = refusal(429, code="insufficient_quota")
    async with answering(used_up) as (url, asked), azure(url, upstream_tries=3) as upstream:
        _, error = await failure_of(upstream)
    assert (error.code, error.retryable) == ("upstream_rate_limited", False)
    assert len(asked) == 1


@pytest.mark.parametrize(
    ("script", "codes"),
    [
        ({"status": 429, "status_times": 2, "key": "k"}, ["upstream_rate_limited"] * 2),
        ({"status": 503}, ["upstream_unavailable"] * 2),
        ({"end": "reset", "after": 0}, ["upstream_unreachable"] * 2),
        ({"status": 400}, []),
        ({"end": "reset", "after": 1}, []),
    ],
)
async def test_each_time_it_asks_again_it_tells_why(
    script: dict[str, Any], codes: list[str], emulator: Emulator, emulator_url: str
) -> None:
    told: list[str] = []
    async with azure(emulator_url, upstream_tries=3, on_retry=told.append) as upstream:
        with suppress(UpstreamError):
            await chunks_of(upstream, chunks=2, **script)
    assert told == codes
    assert emulator.total == 1 + len(codes)


@pytest.mark.parametrize("end", ["reset", "error", "garbage", "stall"])
async def test_after_the_first_chunk_it_never_asks_again(
    end: str, emulator: Emulator, emulator_url: str
) -> None:
    async with azure(emulator_url, upstream_tries=4, stall_seconds=0.1) as upstream:
        chunks, error = await failure_of(upstream, chunks=20, after=3, end=end)
    assert text_of(chunks) == "0 1 2 "
    assert error.retryable
    assert emulator.total == 1


OF_VLLM = b'data: {"object": "error", "message": "%b", "code": 400}\n\n' % SECRET.encode()
NAMED_ERROR = b'event: error\ndata: {"message": "%b"}\n\n' % SECRET.encode()


async def test_an_error_in_place_of_the_first_chunk_is_asked_again() -> None:
    body = b'data: {"error": {"message": "%s"}}\n\ndata: [DONE]\n\n' % SECRET.encode()
    async with (
        answering(http(200, body, "text/event-stream")) as (url, requests),
        azure(url, upstream_tries=3) as upstream,
    ):
        _, error = await failure_of(upstream)
    assert error.code == "upstream_failed"
    assert len(requests) == 3


# How it fails


@pytest.mark.parametrize(
    ("response", "code", "retryable"),
    [
        (refusal(400, code="content_filter", param="prompt"), "content_filter", False),
        (refusal(401, code="401"), "upstream_denied", False),
        (refusal(403), "upstream_denied", False),
        (refusal(404, code="DeploymentNotFound"), "upstream_missing", False),
        (refusal(400), "upstream_refused", False),
        (refusal(422, code=SECRET, param=SECRET), "upstream_refused", False),
        (refusal(413, code=413), "upstream_refused", False),
        (refusal(400, code={"a": SECRET}), "upstream_refused", False),
        (refusal(429, code="429"), "upstream_rate_limited", True),
        (refusal(500), "upstream_unavailable", True),
        (http(502, SECRET.encode(), "text/html"), "upstream_unavailable", True),
        (http(307, b"", "text/html"), "upstream_missing", False),
        (http(400, b'{"error": "a string"}'), "upstream_refused", False),
        (http(400, b"[" * 100_000), "upstream_refused", False),
        (http(200, SECRET.encode(), "text/html"), "upstream_garbled", True),
        (http(200, b"data: nonsense\n\n", "text/event-stream"), "upstream_garbled", True),
        (http(200, b"data: [1]\n\n", "text/event-stream"), "upstream_garbled", True),
        (http(200, b'data: {"error": "x"}\n\n', "text/event-stream"), "upstream_failed", True),
        (http(200, OF_VLLM, "text/event-stream"), "upstream_failed", True),
        (http(200, NAMED_ERROR, "text/event-stream"), "upstream_failed", True),
        (b"", "upstream_unreachable", True),
        (b"nonsense\r\n\r\n", "upstream_unreachable", True),
    ],
)
async def test_each_failure_has_its_code_and_never_the_vendors_text(
    response: bytes, code: str, retryable: bool
) -> None:
    async with answering(response) as (url, _), azure(url, upstream_tries=2) as upstream:
        chunks, error = await failure_of(upstream)
    assert (chunks, error.code, error.retryable) == ([], code, retryable)
    assert SECRET not in error.message
    assert error.__cause__ is None


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        ({"code": "context_length_exceeded"}, " (context_length_exceeded)"),
        ({"param": "messages[0].content"}, " (messages[0].content)"),
        ({"code": "invalid_value", "param": "top_p"}, " (invalid_value, top_p)"),
        ({"code": f"no identifier: {SECRET}", "param": "top_p"}, " (top_p)"),
        ({"code": "a" * 62}, ""),
        ({"param": "1\n2"}, ""),
        *(({"param": odd}, "") for odd in (7, ["messages", 0], {"is": SECRET})),
    ],
)
async def test_a_refusal_names_identifiers_only(error: dict[str, Any], reason: str) -> None:
    async with answering(refusal(400, **error)) as (url, _), azure(url) as upstream:
        _, failure = await failure_of(upstream)
    assert failure.code == "upstream_refused"
    assert failure.message == f"The model service refused the request{reason}: change it."


async def test_a_refusal_without_an_end_is_a_refusal_all_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("worker.failures.MOST_BYTES", 1000)
    monkeypatch.setattr("worker.failures.WORDS_SECONDS", 60)
    head = b"HTTP/1.1 401 X\r\ntransfer-encoding: chunked\r\n\r\n"
    async with asyncio.timeout(5), saying([head, body(b"x" * 2000)]) as (_, upstream):
        _, error = await failure_of(upstream)
    assert error.code == "upstream_denied"


@pytest.mark.parametrize("words", [b"", b"1\r\n{\r\n", b"broken\r\n"])
async def test_a_refusal_is_told_by_its_status_when_its_words_do_not_come(
    words: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("worker.failures.WORDS_SECONDS", 0.01)
    head = b"HTTP/1.1 429 X\r\nretry-after-ms: 1\r\ntransfer-encoding: chunked\r\n\r\n"
    async with saying([head, words], [head, words]) as (_, upstream):
        _, error = await failure_of(upstream)
    assert error.code == "upstream_rate_limited"
    assert isinstance(error, Refused)
    assert error.headers["retry-after-ms"] == "1"


NAMED = b"x-request-id: 7-a\r\napim-request-id: a b\r\nconnection: close\r\n"


@pytest.mark.parametrize(
    ("response", "cause"),
    [
        (refusal(400, code="invalid_value"), "HTTP 400 invalid_value"),
        (refusal(401, code=SECRET), "HTTP 401"),
        (refusal(403).replace(b"connection: close\r\n", NAMED), "HTTP 403 x-request-id=7-a"),
        (http(502, SECRET.encode(), "text/html"), "HTTP 502"),
        (http(200, b"", "Text/HTML; charset=utf-8"), "Text/HTML"),
        (http(200, b"", SECRET), ""),
        (http(200, b'data: {"error": {"code": "x"}}\n\n', "text/event-stream"), "x"),
        (
            http(200, b'data: {"choices": [{"index": "0"}]}\n\n', "text/event-stream"),
            "choices.0.index",
        ),
        (http(200, b"data: []\n\n", "text/event-stream"), "no object"),
        (http(200, b"data: %b\n\n" % SECRET.encode(), "text/event-stream"), "no JSON"),
        (http(200, b'data: {"error": "%b"}\n\n' % SECRET.encode(), "text/event-stream"), ""),
        (b"", "RemoteProtocolError"),
        (SECRET.encode() + b"\r\n\r\n", "RemoteProtocolError"),
    ],
)
async def test_an_operator_is_told_the_cause_and_never_the_vendors_text(
    response: bytes, cause: str
) -> None:
    async with answering(response) as (url, _), azure(url, upstream_tries=1) as upstream:
        _, error = await failure_of(upstream)
    assert error.cause == cause


async def test_an_operator_is_told_why_there_was_no_connection(names: Names) -> None:
    async def answer(_: Server, __: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 400 No TLS\r\n\r\n")

    def unknown() -> list[str]:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    names["model.test"] = unknown
    async with serving(answer) as server:
        assert "SSLError(" in await cause_of(f"https://127.0.0.1:{server.port}")
    assert "ConnectionRefusedError(" in await cause_of(f"http://127.0.0.1:{server.port}")
    assert "gaierror(" in await cause_of("http://model.test")


async def cause_of(url: str) -> str:
    async with azure(url, upstream_tries=1) as upstream:
        _, error = await failure_of(upstream)
    return error.cause


async def test_a_blocked_prompt_is_told_from_a_bad_request(emulator_url: str) -> None:
    async with azure(emulator_url) as upstream:
        _, error = await failure_of(upstream, prompt_filter=True)
    assert error.code == "content_filter"
    assert "policy" not in error.message


async def test_one_that_takes_no_connection_in_time_is_silent(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("worker.endpoint.CONNECT_SECONDS", 0.05)
    with silent() as port:
        async with azure(f"http://127.0.0.1:{port}", upstream_tries=1) as upstream:
            _, error = await failure_of(upstream)
    assert (error.code, error.retryable) == ("upstream_timeout", True)


async def test_nobody_listening_is_unreachable() -> None:
    async with answering(b"") as (url, _):
        pass
    async with azure(url, upstream_tries=2) as upstream:
        _, error = await failure_of(upstream)
    assert (error.code, error.retryable) == ("upstream_unreachable", True)


SAID = b'data: {"choices":[{"index":0,"delta":{"content":"a"},"finish_reason":"stop"}]}\n\n'
HEAD = CHUNKED.replace(b"\r\n\r\n", b"\r\ncontent-type: Text/Event-Stream\r\n\r\n")


def body(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


@asynccontextmanager
async def saying(*answers: list[bytes]) -> AsyncIterator[tuple[Server, Upstream]]:
    """An upstream that gives one answer after the other, in these pieces, and then says nothing."""
    rest = list(answers)

    async def answer(
        server: Server, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        while True:
            await server.request(reader)
            for piece in rest.pop(0):
                writer.write(piece)

    async with (
        serving(answer) as server,
        azure(f"http://127.0.0.1:{server.port}", upstream_tries=2) as upstream,
    ):
        yield server, upstream


async def test_an_answer_is_over_with_its_done_though_its_body_does_not_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("worker.upstream.END_SECONDS", 0.01)
    async with saying([HEAD, body(SAID), body(b"data: [DONE]\n\n")]) as (_, upstream):
        assert text_of(await asked(upstream, asking())) == "a"


async def test_an_answer_without_any_chunk_is_asked_for_again() -> None:
    end = b"0\r\n\r\n"
    async with saying([HEAD, end], [HEAD, body(SAID), end]) as (server, upstream):
        assert text_of(await asked(upstream, asking())) == "a"
        assert len(server.asked) == 2


ANNOUNCED = (
    b'data: {"choices":[],"prompt_filter_results":[]}\n\n'
    b'data: {"choices":[{"index":0,"delta":{"role":"assistant","content":""}}]}\n\n'
)


@pytest.mark.parametrize("end", [b"", b'data: {"error": {"code": "x"}}\n\n', b"data: [DONE]\n\n"])
async def test_an_answer_that_was_only_announced_is_asked_for_again(end: bytes) -> None:
    last = b"0\r\n\r\n"
    first, second = [HEAD, body(ANNOUNCED + end), last], [HEAD, body(ANNOUNCED + SAID), last]
    async with saying(first, second) as (server, upstream):
        chunks = await asked(upstream, asking())
        assert len(server.asked) == 2
    assert [bool(chunk["choices"]) for chunk in chunks] == [False, True, True]


async def test_what_comes_before_the_first_word_is_not_kept_without_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("worker.upstream.HELD_BYTES", 2 * (len(ANNOUNCED) + 2 * CHUNK_BYTES))
    answers = [[HEAD, *[body(ANNOUNCED)] * 3] for _ in range(2)]
    async with saying(*answers) as (server, upstream):
        chunks, error = await failure_of(upstream)
        assert len(server.asked) == 2
    assert (chunks, error.code) == ([], "upstream_garbled")
    assert "before a first word" in error.cause


def thinking(end: bytes = b"") -> Callable[..., Awaitable[None]]:
    """Announces an answer, and says something of it after longer than a stall of 0.05 s."""

    async def answer(
        server: Server, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        await server.request(reader)
        writer.write(HEAD + body(ANNOUNCED))
        await asyncio.sleep(0.2)
        writer.write(body(SAID) + end)
        await server.request(reader)

    return answer


async def test_a_model_that_thinks_after_the_announcement_is_not_stalled() -> None:
    limits = {"stall_seconds": 0.05, "first_chunk_seconds": 5}
    async with (
        serving(thinking(end=b"0\r\n\r\n")) as server,
        azure(f"http://127.0.0.1:{server.port}", upstream_tries=1, **limits) as upstream,
    ):
        assert text_of(await asked(upstream, asking())) == "a"


async def test_silence_before_the_first_chunk_fails_the_try(
    emulator: Emulator, emulator_url: str
) -> None:
    async with azure(emulator_url, first_chunk_seconds=0.05, upstream_tries=2) as upstream:
        chunks, error = await failure_of(upstream, end="hang")
    assert (chunks, error.code, error.retryable) == ([], "upstream_timeout", True)
    assert [(await ended(emulator, n)).outcome for n in (0, 1)] == ["disconnected"] * 2


async def test_a_stall_between_chunks_ends_the_answer(
    emulator: Emulator, emulator_url: str
) -> None:
    async with azure(emulator_url, stall_seconds=0.05, first_chunk_seconds=60) as upstream:
        chunks, error = await failure_of(upstream, chunks=9, after=2, end="stall")
    assert (text_of(chunks), error.code) == ("0 1 ", "upstream_timeout")
    assert (await ended(emulator)).outcome == "disconnected"


async def test_a_stall_after_a_late_first_chunk_is_not_given_the_time_of_the_first() -> None:
    limits = {"stall_seconds": 0.05, "first_chunk_seconds": 60}
    async with (
        asyncio.timeout(5),
        serving(thinking()) as server,
        azure(f"http://127.0.0.1:{server.port}", upstream_tries=1, **limits) as upstream,
    ):
        chunks, error = await failure_of(upstream)
    assert (text_of(chunks), error.code) == ("a", "upstream_timeout")


async def test_an_answer_may_take_longer_than_a_stall(emulator_url: str) -> None:
    async with azure(emulator_url, stall_seconds=0.4) as upstream:
        chunks = await chunks_of(upstream, chunks=9, delay_ms=60)
    assert text_of(chunks) == "".join(f"{n} " for n in range(9))


async def test_a_slow_first_chunk_is_no_stall(emulator_url: str) -> None:
    async with azure(emulator_url, stall_seconds=0.05, first_chunk_seconds=5) as upstream:
        assert text_of(await chunks_of(upstream, chunks=2, first_ms=200)) == "0 1 "


@pytest.mark.parametrize(
    ("end", "code"),
    [
        ("reset", "upstream_unreachable"),
        ("error", "upstream_failed"),
        ("garbage", "upstream_garbled"),
    ],
)
async def test_each_break_in_the_middle_has_its_code(
    end: str, code: str, emulator_url: str
) -> None:
    async with azure(emulator_url) as upstream:
        chunks, error = await failure_of(upstream, chunks=9, after=2, end=end)
    assert (text_of(chunks), error.code) == ("0 1 ", code)
    assert "Sorry" not in error.message


async def test_an_end_without_done_is_the_end_of_the_chunks(emulator_url: str) -> None:
    async with azure(emulator_url) as upstream:
        assert text_of(await chunks_of(upstream, chunks=2, end="no_done")) == "0 1 "
        cut = await chunks_of(upstream, chunks=9, after=2, end="eof")
    assert text_of(cut) == "0 1 "
    assert all(c["choices"][0]["finish_reason"] is None for c in cut if c["choices"])


async def test_done_is_told_from_a_chunk_also_with_space_around_it() -> None:
    said = http(200, SAID + b"data:  [DONE] \n\n", "text/event-stream")
    async with answering(said) as (url, _), azure(url) as upstream:
        assert len(await chunks_of(upstream)) == 1


@pytest.mark.parametrize(
    "beat",
    [
        b": ping\n\n",
        b"event: ping\n\n",
        b"retry: 1000\n\n",
    ],
)
async def test_an_event_without_data_is_no_chunk(beat: bytes) -> None:
    said = http(200, beat + SAID + beat + b"data: [DONE]\n\n", "text/event-stream")
    async with answering(said) as (url, _), azure(url) as upstream:
        assert len(await chunks_of(upstream)) == 1


async def test_half_an_emoji_in_a_prompt_is_no_crash(emulator_url: str) -> None:
    request = asking(chunks=1)
    request["messages"].insert(0, {"role": "user", "content": "cut \ud83d"})
    async with azure(emulator_url) as upstream:
        assert text_of(await asked(upstream, request)) == "0 "


# The connection


async def test_cancelling_an_answer_within_its_chunks_closes_the_socket(
    emulator: Emulator, emulator_url: str
) -> None:
    taken: asyncio.Queue[list[bytes]] = asyncio.Queue()
    async with azure(emulator_url) as upstream, asyncio.timeout(5):
        request = asking(chunks=9, after=2, end="stall")
        answer = asyncio.create_task(upstream.stream(request, taken.put_nowait))
        while b'"1 "' not in (await taken.get())[-1]:
            pass
        answer.cancel()
        await asyncio.wait([answer])
        assert (await ended(emulator)).outcome == "disconnected"


async def test_what_goes_wrong_with_a_chunk_ends_the_answer_by_that_error(
    emulator: Emulator, emulator_url: str
) -> None:
    def take(_: list[bytes]) -> None:
        raise LookupError("no room for it")

    async with azure(emulator_url) as upstream, asyncio.timeout(5):
        with pytest.raises(LookupError, match="no room for it"):
            await upstream.stream(asking(chunks=9, after=2, end="stall"), take)
        assert (await ended(emulator)).outcome == "disconnected"


async def test_cancelling_whoever_reads_closes_the_socket(
    emulator: Emulator, emulator_url: str
) -> None:
    async with azure(emulator_url) as upstream:
        reading = asyncio.create_task(chunks_of(upstream, end="hang"))
        await emulator.request(0)
        reading.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reading
        assert (await ended(emulator)).outcome == "disconnected"


@pytest.mark.parametrize("scheme", ["http://", ""], ids=["with its scheme", "without"])
async def test_where_the_environment_names_a_proxy_it_is_asked_through_that(
    monkeypatch: pytest.MonkeyPatch, scheme: str
) -> None:
    said = http(200, SAID + b"data: [DONE]\n\n", "text/event-stream")
    async with answering(said) as (proxy, requests):
        monkeypatch.setenv("HTTP_PROXY", scheme + proxy.removeprefix("http://"))
        async with azure("http://model.invalid") as upstream:
            assert text_of(await asked(upstream, asking())) == "a"
    [request] = requests
    assert request.startswith(b"POST http://model.invalid/openai/deployments/demo/")


@pytest.mark.parametrize("excepted", ["127.0.0.2", "127.0.0.0/8", "localhost,*"])
async def test_a_host_that_the_environment_excepts_is_asked_without_its_proxy(
    monkeypatch: pytest.MonkeyPatch, excepted: str
) -> None:
    monkeypatch.setenv("ALL_PROXY", "http://model.invalid:1")
    monkeypatch.setenv("NO_PROXY", excepted)
    async with serve(Emulator(), "127.0.0.2") as url, azure(url) as upstream:
        assert text_of(await asked(upstream, asking(chunks=1))) == "0 "


@pytest.mark.parametrize("proxy", ["http://model.invalid:1", "socks5://model.invalid:1"])
@pytest.mark.parametrize("here", ["127.0.0.1", "localhost"])
async def test_no_proxy_comes_between_two_processes_of_one_machine(
    monkeypatch: pytest.MonkeyPatch, emulator_url: str, here: str, proxy: str
) -> None:
    monkeypatch.setenv("ALL_PROXY", proxy)
    async with azure(emulator_url.replace("127.0.0.1", here)) as upstream:
        assert text_of(await asked(upstream, asking(chunks=1))) == "0 "


async def test_who_signs_in_by_the_url_goes_past_the_same_proxies(
    monkeypatch: pytest.MonkeyPatch, emulator_url: str
) -> None:
    monkeypatch.setenv("ALL_PROXY", "http://model.invalid:1")
    async with azure(emulator_url.replace("http://", "http://who:secret@")) as upstream:
        assert text_of(await asked(upstream, asking(chunks=1))) == "0 "


async def test_who_stands_in_the_url_signs_in_beside_the_key() -> None:
    said = http(200, SAID + b"data: [DONE]\n\n", "text/event-stream")
    async with (
        answering(said) as (url, requests),
        azure(url.replace("http://", "http://who:secret@")) as upstream,
    ):
        assert text_of(await asked(upstream, asking())) == "a"
    [request] = requests
    assert b"\r\nauthorization: basic d2hvonnly3jlda==\r\n" in request.lower()
    assert b"\r\napi-key: " in request.lower()


async def test_behind_a_proxy_too_the_first_chunk_may_take_longer_than_a_stall(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stall_seconds = 0.1

    async def late(
        proxy: Server, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        await proxy.request(reader)
        # The promise is about time itself: no event tells that a stall would have been over.
        await asyncio.sleep(3 * stall_seconds)
        writer.write(http(200, SAID + b"data: [DONE]\n\n", "text/event-stream"))
        await writer.drain()

    async with serving(late) as proxy:
        monkeypatch.setenv("HTTP_PROXY", f"http://127.0.0.1:{proxy.port}")
        impatient = {"stall_seconds": stall_seconds, "upstream_tries": 1}
        async with azure("http://model.invalid", **impatient) as upstream:
            assert text_of(await asked(upstream, asking())) == "a"


async def test_behind_a_proxy_too_as_many_answers_come_at_once_as_a_worker_takes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    concurrency = 20
    all_asked = asyncio.Event()

    async def answer(
        proxy: Server, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        await proxy.request(reader)
        if len(proxy.asked) == concurrency:
            all_asked.set()
        await all_asked.wait()
        writer.write(http(200, SAID + b"data: [DONE]\n\n", "text/event-stream"))
        await writer.drain()

    async with serving(answer) as proxy:
        monkeypatch.setenv("HTTP_PROXY", f"http://127.0.0.1:{proxy.port}")
        async with azure("http://model.invalid", concurrency=concurrency) as upstream:
            answers = await asyncio.gather(*(chunks_of(upstream) for _ in range(concurrency)))
    assert list(map(text_of, answers)) == ["a"] * concurrency


@pytest.mark.parametrize("proxy", ["socks5://127.0.0.1:1", "ftp://127.0.0.1:1"])
def test_a_proxy_that_cannot_be_gone_through_is_told_at_the_start(
    proxy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ALL_PROXY", proxy)
    with pytest.raises(ConfigurationError, match="ALL_PROXY"):
        Upstream(Settings(openai_key="k", openai_model="m"))


class NotingEmulator(Emulator):
    """Notes the port that each request comes from: one per connection."""

    def __init__(self) -> None:
        super().__init__()
        self.ports: list[int] = []

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        self.ports.append(scope["client"][1])
        await super().__call__(scope, receive, send)


async def test_answers_in_sequence_share_a_connection() -> None:
    emulator = NotingEmulator()
    async with serve(emulator) as url, azure(url) as upstream:
        for _ in range(3):
            await chunks_of(upstream, chunks=5)
    assert len(emulator.ports) == 3
    assert len(set(emulator.ports)) == 1


async def test_a_connection_is_kept_whose_body_ends_only_after_all_is_said() -> None:
    taken = asyncio.Event()

    async def answer_twice(
        server: Server, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        for _ in range(2):
            await server.request(reader)
            writer.write(HEAD + body(SAID + b"data: [DONE]\n\n"))
            await taken.wait()
            taken.clear()
            writer.write(b"0\r\n\r\n")

    async with (
        asyncio.timeout(5),
        serving(answer_twice) as server,
        azure(f"http://127.0.0.1:{server.port}") as upstream,
    ):
        for _ in range(2):
            await upstream.stream(asking(), lambda _: taken.set())
    assert server.connections == 1


async def test_many_answers_come_at_once_and_are_not_mixed(emulator_url: str) -> None:
    async with azure(emulator_url) as upstream:
        answers = await asyncio.gather(
            *(chunks_of(upstream, text=[f"{n}.{k} " for k in range(9)]) for n in range(20))
        )
    for n, chunks in enumerate(answers):
        assert text_of(chunks) == "".join(f"{n}.{k} " for k in range(9))


# The configuration


def test_without_an_upstream_it_says_what_to_set() -> None:
    with pytest.raises(ConfigurationError, match=r"AZURE_OPENAI_ENDPOINT.*OPENAI_MODEL"):
        Upstream(Settings())


def test_half_an_upstream_is_named() -> None:
    with pytest.raises(ConfigurationError, match="AZURE_OPENAI_CHATGPT_DEPLOYMENT"):
        Upstream(Settings(azure_endpoint="http://127.0.0.1", azure_key="key"))


def test_entra_without_the_extra_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "azure.identity.aio", None)
    with pytest.raises(ConfigurationError, match=r"AZURE_OPENAI_ENTRA.*\.\[entra\]"):
        Upstream(
            Settings(azure_endpoint="http://127.0.0.1", azure_deployment="demo", azure_entra=True)
        )


Provide = Callable[[object, str], Callable[[], Awaitable[str]]]


class Credential:
    closed = 0

    async def close(self) -> None:
        Credential.closed += 1


@pytest.fixture
def provide(monkeypatch: pytest.MonkeyPatch) -> Callable[[Provide], None]:
    """Puts a library for Entra ID in place, which gives tokens by this function."""

    def put(provider: Provide) -> None:
        identity: Any = ModuleType("azure.identity.aio")
        identity.DefaultAzureCredential = Credential
        identity.get_bearer_token_provider = provider
        for name in ("azure", "azure.identity"):
            monkeypatch.setitem(sys.modules, name, ModuleType(name))
        monkeypatch.setitem(sys.modules, "azure.identity.aio", identity)

    return put


ENTRA = {"azure_key": None, "azure_entra": True, "azure_scope": "ours"}


@pytest.mark.parametrize("path", ["", "/openai/v1"])
async def test_entra_sends_a_token_of_its_scope_and_no_key(
    path: str, provide: Callable[[Provide], None], emulator: Emulator, emulator_url: str
) -> None:
    given = 0

    def provider(_: object, scope: str) -> Callable[[], Awaitable[str]]:
        async def token() -> str:
            nonlocal given
            given += 1
            return f"token-{given}-for-{scope}"

        return token

    provide(provider)
    closed = Credential.closed
    async with azure(emulator_url + path, **ENTRA) as upstream:
        assert text_of(await chunks_of(upstream, chunks=1)) == "0 "
        assert text_of(await chunks_of(upstream, chunks=1)) == "0 "
    assert Credential.closed == closed + 1
    sent = [record.headers["authorization"] for record in emulator.requests]
    assert sent == ["Bearer token-1-for-ours", "Bearer token-2-for-ours"]
    assert not any("api-key" in record.headers for record in emulator.requests)


async def test_who_cannot_sign_in_tries_again_and_says_so(
    provide: Callable[[Provide], None], emulator: Emulator, emulator_url: str
) -> None:
    fails = 0

    def provider(_: object, __: str) -> Callable[[], Awaitable[str]]:
        async def token() -> str:
            nonlocal fails
            fails -= 1
            if fails >= 0:
                raise ConnectionError("no way to the identity")
            return "token"

        return token

    provide(provider)
    async with azure(emulator_url, upstream_tries=2, **ENTRA) as upstream:
        fails = 1
        assert text_of(await chunks_of(upstream, chunks=1)) == "0 "
        fails = 2
        _, error = await failure_of(upstream)
    assert (error.code, error.retryable) == ("upstream_denied", True)
