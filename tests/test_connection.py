import asyncio
import socket
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
import trustme
import uvloop
from redis.asyncio import Redis
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import ReadOnlyError, RedisError, ResponseError
from redis.exceptions import TimeoutError as RedisTimeoutError

from cli.redis_server import RedisServer, find_redis_server
from relay import keys
from relay.connection import (
    CONNECT_SECONDS,
    REPLY_SECONDS,
    WAIT_SECONDS,
    Lean,
    Piped,
    connect,
    open_connection,
    reason,
    script,
)
from relay.errors import StreamGone
from relay.events import COMPLETED, STARTED, entry
from relay.pipe import Pipe, Replies
from tests.conftest import append, make_claims, make_log, redis_user, until
from tests.listening import listening, silent
from tests.redis_process import running_redis
from tests.test_post import tls

SCRIPTS = [
    file.name.removesuffix(".lua")
    for file in (resources.files("relay") / "lua").iterdir()
    if not file.name.startswith("_")
]


@pytest.mark.parametrize("name", SCRIPTS)
async def test_redis_understands_each_script(redis: Redis, name: str) -> None:
    known = script(redis, name)
    assert await redis.script_load(known.script) == known.sha


async def test_a_redis_that_does_not_answer_is_not_waited_for() -> None:
    async def say_nothing(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()

    async with (
        listening(say_nothing) as port,
        connect(f"redis://127.0.0.1:{port}", reply_seconds=0.05) as redis,
        asyncio.timeout(2),
    ):
        with pytest.raises(RedisTimeoutError):
            await redis.ping()


LONG = b"x" * 2**25
"""More than the sockets between us and Redis hold."""


@asynccontextmanager
async def stalling() -> AsyncIterator[tuple[str, asyncio.Event]]:
    """The URL of a Redis that hangs once it has greeted, so that what is sent to it stays on its
    way; and whether any has come."""
    begun = asyncio.Event()

    async def greet(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(1)
        writer.write(b"+PONG\r\n")
        begun.set()
        await asyncio.Event().wait()

    async with asyncio.timeout(5), listening(greet) as port:
        yield f"redis://127.0.0.1:{port}", begun


@pytest.mark.skipif(
    sys.platform != "linux", reason="elsewhere the pauses are the system's own, and long"
)
async def test_the_network_does_not_forget_a_connection_to_redis_that_nobody_uses() -> None:
    async with stalling() as (url, _), connect(url) as redis:
        connection = await open_connection(redis)
        peer = connection.hand_over(asyncio.Protocol()).get_extra_info("socket")
        assert peer.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
        # Azure's load balancer forgets after four minutes.
        assert peer.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) <= 60
        connection.let_go()


async def test_a_redis_that_takes_nothing_in_is_not_waited_for_either() -> None:
    async with stalling() as (url, _), connect(url, reply_seconds=0.1) as redis:
        with pytest.raises(RedisTimeoutError):
            await redis.set("a", LONG)
        with pytest.raises(RedisTimeoutError, match="takes nothing in"):
            await written(redis, LONG)
        assert not any(each.is_connected for each in idle(redis))


async def test_a_transaction_that_is_cancelled_leaves_no_half_of_a_command_to_the_next() -> None:
    async with stalling() as (url, begun), connect(url) as redis:
        writing = asyncio.create_task(written(redis, LONG))
        await begun.wait()
        writing.cancel()
        await asyncio.wait([writing])
        assert not any(each.is_connected for each in idle(redis))


async def test_a_connection_that_breaks_under_a_transaction_is_a_redis_error(redis: Redis) -> None:
    connection: Any = await redis.connection_pool.get_connection()
    connection._writer.transport.abort()
    with pytest.raises(RedisConnectionError):
        await connection.send_command("PING")
    assert not connection.is_connected
    await redis.connection_pool.release(connection)


async def test_where_one_connection_was_cut_none_that_lies_idle_is_trusted(redis: Redis) -> None:
    pool = redis.connection_pool
    one, two, three = [await pool.get_connection() for _ in range(3)]
    for each in (one, two):
        await pool.release(each)
    assert all(each.is_connected for each in (one, two))
    await three.disconnect()
    await pool.release(three)
    assert not any(each.is_connected for each in idle(redis))


async def test_a_transaction_does_not_wait_for_a_free_connection_for_ever(
    redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("relay.connection.WAIT_SECONDS", 0.05)
    async with connect(redis_server.url, connections=1) as redis, asyncio.timeout(2):
        taken = await redis.connection_pool.get_connection()
        with pytest.raises(RedisConnectionError, match="No connection available"):
            await transaction(redis)
        await redis.connection_pool.release(taken)
        assert await transaction(redis) == [True]


async def transaction(redis: Redis) -> list[Any]:
    async with redis.pipeline() as pipe:
        pipe.ping()
        answers: list[Any] = await pipe.execute()
        return answers


async def test_of_many_calls_at_once_each_has_its_own_answer(
    redis_server: RedisServer,
) -> None:
    async with connect(redis_server.url) as redis:
        texts = [str(number) for number in range(500)]
        answers = await asyncio.gather(*(redis.echo(text) for text in texts))
        assert [answer.decode() for answer in answers] == texts


async def test_what_callers_count_on_holds_whatever_the_url_says(
    redis_server: RedisServer,
) -> None:
    options = "socket_timeout=30&max_connections=1000&timeout=30&protocol=3&decode_responses=yes"
    options += "&socket_connect_timeout=30"
    async with connect(f"{redis_server.url}&{options}", connections=2) as redis:
        assert await redis.zadd("z", {"a": 1}) == 1
        async with redis.pipeline() as pipe:
            pipe.zrange("z", 0, -1, withscores=True)
            assert await pipe.execute() == [[(b"a", 1.0)]]
        pool: Any = redis.connection_pool
        assert (pool.max_connections, pool.timeout) == (2, WAIT_SECONDS)
        [each] = idle(redis)
        limits = (each.socket_timeout, each.socket_connect_timeout)
        assert limits == (REPLY_SECONDS, CONNECT_SECONDS)
        await redis.delete("z")


async def test_a_redis_that_is_the_master_no_more_is_looked_for_anew(
    redis_server: RedisServer, tmp_path: Path
) -> None:
    async with (
        running_redis(redis_server.argv[0], tmp_path) as server,
        connect(server.url) as redis,
    ):
        await redis.set("a", 1)
        before = redis._pipe  # type: ignore[attr-defined]
        await redis.replicaof("127.0.0.1", 1)
        with pytest.raises(ReadOnlyError):
            await redis.set("a", 2)
        assert before.closed
        with pytest.raises(RedisError):
            await written(redis)
        assert not any(each.is_connected for each in idle(redis))
        await redis.replicaof("NO", "ONE")
        await redis.set("a", 3)
        assert await written(redis) == [True]


@pytest.mark.parametrize("binary", ["whichever runs", "the one that packages carry"])
async def test_a_script_finds_out_as_well_that_its_redis_is_the_master_no_more(
    redis_server: RedisServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, binary: str
) -> None:
    """Redis 6 words that otherwise than Redis 7."""
    if binary == "whichever runs":
        path = redis_server.argv[0]
    else:
        monkeypatch.setenv("PATH", "")
        path = find_redis_server()
    async with running_redis(path, tmp_path) as server, connect(server.url) as redis:
        claims = make_claims(redis)
        await claims.sweep()
        before = redis._pipe  # type: ignore[attr-defined]
        await redis.replicaof("127.0.0.1", 1)
        with pytest.raises(ReadOnlyError):
            await claims.sweep()
        assert before.closed


async def written(redis: Redis, value: bytes = b"2") -> list[Any]:
    async with redis.pipeline() as pipe:
        pipe.set("a", value)
        answers: list[Any] = await pipe.execute()
        return answers


def idle(redis: Redis) -> list[Any]:
    pool: Any = redis.connection_pool
    return [each for each in pool._available_connections if each is not None]


async def test_a_caller_that_is_cancelled_disturbs_no_other(redis: Redis) -> None:
    await redis.ping()
    pipe = redis._pipe  # type: ignore[attr-defined]
    calls = [asyncio.ensure_future(redis.echo(str(number))) for number in range(100)]
    await asyncio.sleep(0)
    for call in calls[::2]:
        call.cancel()
    await asyncio.wait(calls)
    assert [call.result() for call in calls[1::2]] == [b"%d" % n for n in range(1, 100, 2)]
    assert redis._pipe is pipe  # type: ignore[attr-defined]


async def test_who_waits_for_a_token_no_longer_leaves_it_to_others(
    redis: Redis, redis_server: RedisServer
) -> None:
    claims = make_claims(redis)
    async with connect(redis_server.url, reply_seconds=60) as hasty:
        waiting = asyncio.create_task(claims.wait_for_job(hasty, 60))
        await until(lambda: is_blocked(redis))
        waiting.cancel()
        await asyncio.wait([waiting])
        # Redis may read what comes on another connection before it sees that this one is closed.
        await until(lambda: nobody_is_blocked(redis))
        await redis.execute_command("RPUSH", keys.WAKE, "1")  # type: ignore[no-untyped-call]
        assert await redis.type(keys.WAKE) == b"list"


async def nobody_is_blocked(redis: Redis) -> bool:
    return not await is_blocked(redis)


async def is_blocked(redis: Redis) -> bool:
    return bool((await redis.info("clients"))["blocked_clients"])


async def test_an_error_is_that_of_its_call_alone(redis: Redis) -> None:
    await redis.set("text", "x")
    wrong, right = await asyncio.gather(
        redis.incr("text"), redis.get("text"), return_exceptions=True
    )
    assert isinstance(wrong, ResponseError)
    assert right == b"x"


async def test_a_connection_that_breaks_is_told_to_all_who_wait_and_made_anew(
    redis: Redis, redis_server: RedisServer
) -> None:
    async with connect(redis_server.url) as ours:
        number = await ours.client_id()
        async with writes_waiting(redis, 1000):
            left, *calls = [asyncio.ensure_future(ours.incr("n")) for _ in range(10)]
            await until(lambda: is_blocked(redis))
            left.cancel()
            await redis.client_kill_filter(_id=str(number))
            await asyncio.wait(calls)
            assert {type(call.exception()) for call in calls} == {RedisConnectionError}
        assert await ours.client_id() != number


@asynccontextmanager
async def writes_waiting(redis: Redis, ms: int = 5000) -> AsyncIterator[None]:
    """What writes has to wait, for so long at most; what comes after this test has not."""
    await redis.client_pause(ms, all=False)
    try:
        yield
    finally:
        await redis.client_unpause()


class Silent(Replies):
    def take(self, reply: Any) -> None:
        pass


def test_what_is_sent_on_a_connection_that_broke_harms_nobody(
    redis_server: RedisServer, caplog: pytest.LogCaptureFixture
) -> None:
    """By uvloop, which raises where asyncio's own loop says nothing."""

    async def send() -> None:
        async with connect(redis_server.url) as redis, asyncio.timeout(5):
            ear = Silent(await open_connection(redis))
            ear.close()
            await asyncio.wait([ear.lost])
            ear.send("PING")
            for turns in range(2):  # In the second it is no more to be told.
                connection = await broken(redis)
                for _ in range(turns):
                    await asyncio.sleep(0)
                late = Silent(connection)
                await asyncio.wait([late.lost])
                late.send("PING")

    uvloop.run(send())
    assert not caplog.records


async def broken(redis: Redis) -> Lean:
    """One that nobody was told of yet."""
    connection = await open_connection(redis)
    assert connection._writer is not None
    connection._writer.transport.abort()
    return connection


async def test_a_call_on_a_connection_that_broke_as_it_was_opened_is_told_so_at_once(
    redis: Redis,
) -> None:
    pipe = Pipe(await broken(redis), reply_seconds=60)
    async with asyncio.timeout(5):
        for _ in range(2):
            with pytest.raises(RedisConnectionError):
                await pipe.call("PING")
            await asyncio.wait([pipe.lost])


async def test_callers_that_come_together_open_one_connection(
    redis: Redis, redis_server: RedisServer
) -> None:
    async with connect(redis_server.url) as ours:
        numbers = await asyncio.gather(*(ours.client_id() for _ in range(20)))
    assert len(set(numbers)) == 1


async def test_who_goes_while_a_connection_is_opened_takes_it_from_nobody(
    redis_server: RedisServer,
) -> None:
    async with connect(redis_server.url) as ours:
        first, second = [asyncio.ensure_future(ours.ping()) for _ in range(2)]
        await asyncio.sleep(0)  # Both wait for it now.
        first.cancel()
        assert await second
        assert first.cancelled()


async def test_a_client_that_is_closed_while_it_connects_waits_for_nothing_and_leaves_nothing(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("relay.connection.CONNECT_SECONDS", 60)
    before = asyncio.all_tasks()
    with silent() as port:
        async with asyncio.timeout(5), connect(f"redis://127.0.0.1:{port}") as redis:
            call = asyncio.ensure_future(redis.ping())
            for _ in range(3):  # The call begins, has a connection opened, and that connects.
                await asyncio.sleep(0)
        assert asyncio.all_tasks() - before <= {call}
    await asyncio.wait([call])
    assert not caplog.records


async def test_an_answer_that_takes_too_long_ends_the_connection(
    redis: Redis, redis_server: RedisServer
) -> None:
    async with connect(redis_server.url, reply_seconds=0.05) as ours:
        number = await ours.client_id()
        assert isinstance(ours, Piped)
        pipe = ours._pipe
        assert pipe is not None
        await redis.client_pause(200)
        with pytest.raises(RedisTimeoutError):
            await ours.ping()
        assert pipe.closed
        await redis.client_unpause()
        assert await ours.client_id() != number


def test_a_loop_that_was_busy_does_not_take_its_own_delay_for_that_of_redis(
    redis_server: RedisServer,
) -> None:
    """By uvloop, which after what it reads looks at its timers before it reads again."""

    async def ask_in_a_busy_loop() -> Any:
        loop = asyncio.get_running_loop()
        answers: list[asyncio.Future[Any]] = []
        async with connect(redis_server.url, reply_seconds=0.05) as ours:
            await ours.ping()
            assert isinstance(ours, Piped)
            assert ours._pipe is not None
            pipe, asked = ours._pipe, asyncio.Event()

            def ask_and_be_busy() -> None:
                loop.remove_reader(here)
                answers.append(pipe.call("GET", "nothing"))
                time.sleep(0.1)  # What the loop does for longer than a reply may take.
                asked.set()

            here, there = socket.socketpair()
            with here, there:
                loop.add_reader(here, ask_and_be_busy)
                there.send(b"x")
                await asked.wait()
                return await answers[0]

    assert uvloop.run(ask_in_a_busy_loop()) is None


async def test_each_call_is_given_its_time_from_when_it_was_made(
    redis: Redis, redis_server: RedisServer
) -> None:
    async with connect(redis_server.url, reply_seconds=0.5) as ours, asyncio.timeout(5):
        await ours.ping()
        for _ in range(3):
            await redis.client_pause(300)
            assert await ours.ping()


async def test_a_call_that_came_while_another_had_its_time_is_not_waited_for_either(
    redis: Redis, redis_server: RedisServer
) -> None:
    async with connect(redis_server.url, reply_seconds=0.4) as ours, asyncio.timeout(3):
        await ours.ping()
        async with writes_waiting(redis, 200):
            await ours.incr("n")
        async with writes_waiting(redis):
            with pytest.raises(RedisTimeoutError):
                await ours.incr("n")


async def test_a_redis_that_hangs_is_given_up_however_many_calls_still_come(
    redis: Redis, redis_server: RedisServer
) -> None:
    async with connect(redis_server.url, reply_seconds=0.2) as ours, asyncio.timeout(5):
        await ours.ping()
        async with writes_waiting(redis):
            calls = [asyncio.ensure_future(ours.incr("n"))]
            while not calls[0].done():
                calls.append(asyncio.ensure_future(ours.incr("n")))
                await asyncio.wait(calls[:1], timeout=0.05)
            await asyncio.wait(calls)
            assert {type(call.exception()) for call in calls} == {RedisTimeoutError}


async def test_a_connection_on_which_nobody_waits_is_kept_and_still_found_out_when_it_hangs(
    redis: Redis, redis_server: RedisServer, caplog: pytest.LogCaptureFixture
) -> None:
    async with connect(redis_server.url, reply_seconds=0.2) as ours, asyncio.timeout(5):
        number = await ours.client_id()
        assert isinstance(ours, Piped)
        pipe = ours._pipe
        assert pipe is not None

        async def looked_after() -> bool:
            return pipe._timer is None

        await until(looked_after)
        assert await ours.client_id() == number
        assert not caplog.records
        async with writes_waiting(redis):
            with pytest.raises(RedisTimeoutError):
                await ours.incr("n")


async def test_a_redis_that_is_away_is_a_redis_error(caplog: pytest.LogCaptureFixture) -> None:
    async with connect("unix:///nowhere/redis.sock") as redis:
        with pytest.raises(RedisError):
            await redis.ping()
    assert not caplog.records


async def test_a_call_that_is_cancelled_ends_at_whatever_step(redis: Redis) -> None:
    """A cancel that goes lost in a call makes a shutdown wait for ever."""

    async def call_for_ever() -> None:
        while True:
            await redis.ping()

    lost = []
    for steps in range(20):
        task = asyncio.create_task(call_for_ever())
        for _ in range(steps):
            await asyncio.sleep(0)
        task.cancel()
        done, _ = await asyncio.wait([task], timeout=0.05)
        if not done:
            lost.append(steps)
        while not task.done():
            task.cancel()
            await asyncio.wait([task], timeout=0.01)
    assert lost == []


@pytest.mark.parametrize(
    ("name", "options", "taken"),
    [
        ("127.0.0.1", "", True),
        ("elsewhere.test", "", False),
        ("elsewhere.test", "&ssl_check_hostname=false", True),
        ("elsewhere.test", "&ssl_cert_reqs=none", True),
    ],
)
async def test_a_certificate_is_taken_from_none_but_the_host_that_it_names(
    redis_server: RedisServer, tmp_path: Path, name: str, options: str, taken: bool
) -> None:
    async with (
        behind_tls(redis_server, tmp_path / "ca.pem", name) as port,
        connect(f"{over_tls(port, tmp_path)}{options}") as redis,
        asyncio.timeout(5),
    ):
        if taken:
            assert await redis.ping()
            return
        with pytest.raises(RedisConnectionError, match="certificate"):
            await redis.ping()


async def test_to_close_a_client_needs_no_goodbye_of_a_redis_that_hangs(
    redis_server: RedisServer, tmp_path: Path
) -> None:
    hanging = asyncio.Event()

    async def hang(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        passing = asyncio.create_task(
            _pass_on(reader, writer, await asyncio.open_connection("127.0.0.1", behind))
        )
        await hanging.wait()
        passing.cancel()
        await asyncio.Event().wait()

    async with (
        behind_tls(redis_server, tmp_path / "ca.pem", "127.0.0.1") as behind,
        listening(hang) as port,
        connect(over_tls(port, tmp_path)) as redis,
    ):
        await written(redis)
        assert any(each.is_connected for each in idle(redis))
        hanging.set()


def over_tls(port: int, folder: Path) -> str:
    return f"rediss://127.0.0.1:{port}?ssl_ca_certs={folder}/ca.pem"


@asynccontextmanager
async def behind_tls(server: RedisServer, authority_file: Path, name: str) -> AsyncIterator[int]:
    """The port of one that speaks TLS, with a certificate for this name, before a Redis."""
    authority = trustme.CA()
    authority.cert_pem.write_to_path(str(authority_file))

    async def pass_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await _pass_on(reader, writer, await asyncio.open_unix_connection(server.socket))

    async with listening(pass_on, tls=tls(authority, name)[0]) as port:
        yield port


async def _pass_on(
    reader: asyncio.StreamReader,
    writer: asyncio.StreamWriter,
    other: tuple[asyncio.StreamReader, asyncio.StreamWriter],
) -> None:
    try:
        await asyncio.gather(_pump(reader, other[1]), _pump(other[0], writer))
    finally:
        other[1].close()


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(65536):
        writer.write(data)
    writer.close()


ALL_RIGHTS = ("~*", "&*", "+@all")


@pytest.mark.parametrize("right", ["resetchannels", "-publish", "-pubsub"])
async def test_who_may_not_publish_leaves_nothing_half_done(
    redis: Redis, redis_server: RedisServer, right: str
) -> None:
    async with (
        redis_user(redis, redis_server, *ALL_RIGHTS, right) as url,
        connect(url) as client,
    ):
        log, claims = make_log(client), make_claims(client)
        ended, waiting = [(await log.create({})).stream_id for _ in range(2)]
        [claim] = await claims.claim(1)
        assert await log.cancel(claim.stream_id) == "cancelling"
        await append(log, claim, 0, [entry(STARTED, {}), entry(COMPLETED, {})])
        assert (await log.state(ended)).status == "completed"
        assert await log.cancel(waiting) == "cancelled"
        await log.erase(waiting)
        with pytest.raises(StreamGone):
            await log.read(waiting)


async def test_a_connection_that_is_not_let_in_is_closed(
    redis: Redis, redis_server: RedisServer
) -> None:
    async with (
        redis_user(redis, redis_server, *ALL_RIGHTS, "-ping") as url,
        connect(url) as client,
    ):
        with pytest.raises(ResponseError):
            await open_connection(client)

        async def closed() -> bool:
            return len(await redis.client_list()) == 1

        await until(closed)


async def test_what_redis_refuses_is_told_in_its_own_words(
    redis: Redis, redis_server: RedisServer
) -> None:
    async with (
        redis_user(redis, redis_server, *ALL_RIGHTS, "-evalsha") as url,
        connect(url) as client,
    ):
        with pytest.raises(ResponseError) as refused:
            await make_log(client).create({})
    told = reason(refused.value)
    assert told.startswith("NoPermissionError: ")
    assert "evalsha" in told
    assert reason(ResponseError("one\ntwo")) == "ResponseError: one"
    assert len(reason(ResponseError("long" * 999))) == 200
