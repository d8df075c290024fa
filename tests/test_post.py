"""One POST over real sockets: what it takes from the other side, and what it believes."""

import asyncio
import ssl
import threading
from pathlib import Path

import pytest
import trustme

from relay.webhooks import Target
from tests.conftest import until
from tests.receiver import ENDLESS, HALF, STALLED, Names, Receiver, answer, receiving
from worker.post import Answer, NoAnswer, Post

NAME = "hooks.test"


@pytest.fixture
def post(authority: trustme.CA, names: Names) -> Post:
    """One that believes the authority, and may reach this machine."""
    names[NAME] = ["127.0.0.1"]
    return Post(private=True, most=20)


@pytest.fixture
def authority(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> trustme.CA:
    authority = trustme.CA()
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "ca.pem"))
    return authority


def tls(authority: trustme.CA, *names: str) -> tuple[ssl.SSLContext, list[str | None]]:
    """For a server with a certificate for these names, and the names that it is asked for."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert(*names).configure_cert(context)
    asked: list[str | None] = []
    context.sni_callback = lambda _, name, __: asked.append(name)
    return context, asked


def to(receiver: Receiver, scheme: str = "http", host: str = NAME) -> Target:
    return Target(scheme, host, receiver.port, "/a%20b?c=d", host)


async def send(post: Post, target: Target) -> Answer:
    return await post.send(target, {"webhook-id": "msg_1"}, b"{}")


async def test_it_sends_what_it_was_given_and_returns_the_status(post: Post) -> None:
    async with receiving(answer(503, "Retry-After: 7")) as receiver:
        said = await send(post, to(receiver))
        request = await receiver.request()
    assert (said.status, said.headers["retry-after"]) == (503, "7")
    assert request.line == "POST /a%20b?c=d HTTP/1.1"
    assert request.body == b"{}"
    assert request.headers["host"] == f"{NAME}:{receiver.port}"
    assert request.headers["webhook-id"] == "msg_1"


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
async def test_a_redirect_is_an_answer_like_any_other(post: Post, status: int) -> None:
    async with receiving() as other, receiving() as receiver:
        receiver.answers.append(answer(status, f"Location: {other.url}"))
        assert (await send(post, to(receiver))).status == status
        assert other.connections == 0


async def test_no_proxy_of_the_environment_comes_between(
    authority: trustme.CA, names: Names, monkeypatch: pytest.MonkeyPatch
) -> None:
    names[NAME] = ["127.0.0.1"]
    async with receiving() as proxy, receiving() as receiver:
        for variable in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
            monkeypatch.setenv(variable, proxy.url)
            monkeypatch.setenv(variable.lower(), proxy.url)
        post = Post(private=True, most=1)
        assert (await send(post, to(receiver))).status == 204
        assert proxy.connections == 0


async def test_a_private_address_is_not_asked(names: Names) -> None:
    names[NAME] = ["127.0.0.1"]
    post = Post(private=False, most=1)
    async with receiving() as receiver:
        with pytest.raises(NoAnswer, match=r"^NotPublic$"):
            await send(post, to(receiver))
        assert receiver.connections == 0


async def test_no_connection_is_used_twice(post: Post) -> None:
    """It was verified for the name that it was made for, and its address checked then."""
    async with receiving() as receiver:
        for _ in range(3):
            await send(post, to(receiver))
        assert receiver.connections == 3
        assert (await receiver.request()).headers["connection"] == "close"


# Receivers that are not nice


async def test_one_that_does_not_answer_is_given_up(
    post: Post, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("worker.post.ANSWER_SECONDS", 0.1)
    async with receiving() as receiver:
        receiver.answering.clear()
        with pytest.raises(NoAnswer, match=r"^TimeoutError$"):
            await send(post, to(receiver))


@pytest.mark.parametrize(
    "said", [b"", b"HTTP/1.1 2", b"nonsense\r\n\r\n", b"HTTP/1.1 99 X\r\n\r\n"]
)
async def test_one_that_speaks_no_http_has_not_answered(post: Post, said: bytes) -> None:
    async with receiving(said) as receiver:
        with pytest.raises(NoAnswer):
            await send(post, to(receiver))


async def test_one_that_is_not_there_has_not_answered(post: Post) -> None:
    async with receiving() as receiver:
        target = to(receiver)
    with pytest.raises(NoAnswer, match=r"^ConnectError$"):
        await send(post, target)


async def test_an_ordinary_body_is_let_come_to_its_end(post: Post) -> None:
    async with receiving(HALF) as receiver:
        assert (await send(post, to(receiver))).status == 200
        await receiver.over.wait()
        assert not receiver.left.is_set()


async def test_of_a_body_that_never_ends_little_is_read(
    post: Post, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("worker.post.BODY_SECONDS", 60)
    async with asyncio.timeout(5), receiving(ENDLESS) as receiver:
        assert (await send(post, to(receiver))).status == 200
        await receiver.left.wait()


async def test_a_body_that_does_not_come_costs_no_more_than_its_time(
    post: Post, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("worker.post.BODY_SECONDS", 0.1)
    async with asyncio.timeout(5), receiving(STALLED) as receiver:
        assert (await send(post, to(receiver))).status == 200
        await receiver.left.wait()


async def test_one_that_stalls_holds_up_no_other(post: Post) -> None:
    async with receiving() as stalling, receiving() as other:
        stalling.answering.clear()
        waiting = [asyncio.create_task(send(post, to(stalling))) for _ in range(19)]
        await stalling.request(18)
        assert (await send(post, to(other))).status == 204
        stalling.answering.set()
        assert {each.status for each in await asyncio.gather(*waiting)} == {204}


async def test_a_name_that_is_not_answered_holds_up_no_other(post: Post, names: Names) -> None:
    answered = threading.Event()

    def stall() -> list[str]:
        answered.wait()
        return []

    async def asked() -> bool:
        return bool(names.lookups)

    names["stalled.test"] = stall
    async with receiving() as receiver:
        waiting = [
            asyncio.create_task(send(post, to(receiver, host="stalled.test"))) for _ in range(19)
        ]
        try:
            async with asyncio.timeout(5):
                await until(asked)
                assert (await send(post, to(receiver))).status == 204
        finally:
            answered.set()
        for each in await asyncio.gather(*waiting, return_exceptions=True):
            assert isinstance(each, NoAnswer)


# TLS


async def test_the_certificate_is_asked_for_and_believed_by_the_name(
    post: Post, authority: trustme.CA
) -> None:
    context, asked = tls(authority, NAME)
    async with receiving(tls=context) as receiver:
        assert (await send(post, to(receiver, "https"))).status == 204
        request = await receiver.request()
    assert asked == [NAME]
    assert request.headers["host"] == f"{NAME}:{receiver.port}"


@pytest.mark.parametrize("certified", ["other.test", "127.0.0.1", "a.hooks.test", "*.hooks.test"])
async def test_a_certificate_for_anything_else_is_not_believed(
    post: Post, authority: trustme.CA, certified: str
) -> None:
    context, _ = tls(authority, certified)
    async with receiving(tls=context) as receiver:
        with pytest.raises(NoAnswer, match=r"^ConnectError$"):
            await send(post, to(receiver, "https"))
        assert receiver.requests == []


async def test_a_certificate_of_somebody_else_is_not_believed(post: Post, names: Names) -> None:
    context, _ = tls(trustme.CA(), NAME)
    async with receiving(tls=context) as receiver:
        with pytest.raises(NoAnswer, match=r"^ConnectError$"):
            await send(post, to(receiver, "https"))
        assert receiver.requests == []


async def test_a_connection_that_one_name_may_use_is_not_used_for_another_at_its_address(
    post: Post, authority: trustme.CA, names: Names
) -> None:
    names["other.test"] = ["127.0.0.1"]
    context, _ = tls(authority, NAME)
    async with receiving(tls=context) as receiver:
        receiver.answering.clear()
        first = asyncio.create_task(send(post, to(receiver, "https")))
        await receiver.request()
        with pytest.raises(NoAnswer, match=r"^ConnectError$"):
            await send(post, to(receiver, "https", "other.test"))
        receiver.answering.set()
        assert (await first).status == 204
        with pytest.raises(NoAnswer, match=r"^ConnectError$"):
            await send(post, to(receiver, "https", "other.test"))
        assert len(receiver.requests) == 1


async def test_one_that_stalls_in_its_handshake_is_given_up(
    post: Post, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("worker.post.CONNECT_SECONDS", 0.1)
    async with asyncio.timeout(5), receiving() as receiver:
        with pytest.raises(NoAnswer, match=r"^ConnectTimeout$"):
            await send(post, to(receiver, "https"))
        await receiver.left.wait()


async def test_the_reason_for_no_answer_is_a_name_and_repeats_nothing(post: Post) -> None:
    async with receiving(b"HTTP/1.1 the-marker\r\n\r\n") as receiver:
        with pytest.raises(NoAnswer, match=r"^\w+$") as failure:
            await send(post, to(receiver))
    assert "marker" not in str(failure.value)
