"""Webhooks, from the end of a stream to a receiver on a real socket."""

import asyncio
import base64
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr
from redis.asyncio import Redis
from redis.exceptions import ConnectionError as RedisConnectionError
from standardwebhooks import Webhook

from emulator.app import Emulator
from relay import keys
from relay.log import Log
from relay.outbox import LEASE_SECONDS, Delivery, Outbox
from relay.settings import Settings
from tests.conftest import (
    asking,
    changed,
    due_in_ms,
    make_claims,
    make_due,
    running_worker,
    set_state,
    until,
    worker_env,
    worker_process,
)
from tests.receiver import Names, Receiver, Request, answer, receiving
from worker import deliveries
from worker.deliveries import Deliveries, seconds_before

SECRET = f"whsec_{base64.b64encode(b'x' * 32).decode()}"
HOSTS = "127.0.0.1,slow.test,quick.test"


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("worker.claiming.SWEEP_SECONDS", 0.05)
    monkeypatch.setattr("worker.deliveries.POLL_SECONDS", 0.05)
    monkeypatch.setattr("worker.deliveries.FIRST_RETRY_SECONDS", 0.1)


@pytest.fixture
def never_polling(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("worker.deliveries.POLL_SECONDS", 60)


@pytest.fixture
def settings(settings: Settings) -> Settings:
    return changed(
        settings, webhook_hosts=HOSTS, webhook_keys=SecretStr(SECRET), webhook_private=True
    )


@pytest.fixture
async def receiver() -> AsyncIterator[Receiver]:
    async with receiving() as receiver:
        yield receiver


@pytest.fixture
def takes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many deliveries each call wanted, where two go at a time."""
    monkeypatch.setattr("worker.deliveries.MOST", 2)
    takes: list[int] = []
    take = Outbox.take

    async def counted(self: Outbox, want: int) -> list[Delivery]:
        takes.append(want)
        return await take(self, want)

    monkeypatch.setattr("relay.outbox.Outbox.take", counted)
    return takes


async def create(log: Log, url: str, **script: Any) -> str:
    return (await log.create(asking(**script), webhook=url)).stream_id


async def ended(log: Log, url: str) -> str:
    """A stream that nobody has told of yet."""
    stream_id = await create(log, url)
    await log.cancel(stream_id)
    return stream_id


@asynccontextmanager
async def telling(settings: Settings) -> AsyncIterator[None]:
    """A worker that takes no jobs: streams end when the test says so."""
    async with running_worker(settings) as worker:
        worker.allow_pick_jobs = False
        yield


def verified(request: Request) -> dict[str, Any]:
    """What it tells, if the official library believes it."""
    told: dict[str, Any] = Webhook(SECRET).verify(request.body, request.headers)
    return told


async def a_worker_listens(redis: Redis) -> None:
    async def listening() -> bool:
        [(_, listeners)] = await redis.pubsub_numsub(keys.CONTROL)
        return int(listeners) == 1

    await until(listening)


async def settled(redis: Redis) -> None:
    async def empty() -> bool:
        return not await redis.exists(keys.WEBHOOKS)

    await until(empty)


async def tried(redis: Redis, stream_id: str) -> None:
    """One try is over, and another is to come."""

    async def postponed() -> bool:
        return 0 < await due_in_ms(redis, stream_id) < LEASE_SECONDS * 1000 - 5000

    await until(postponed)


def outcomes(said: list[Any]) -> list[Any]:
    of_ours = ("webhook_", "outbox_", "delivery_")
    return [each for each in said if each["event"].startswith(of_ours)]


# Whatever ends a stream


@pytest.mark.usefixtures("never_polling")
async def test_a_completed_answer_is_told_of_at_once_and_once(
    redis: Redis, log: Log, settings: Settings, receiver: Receiver
) -> None:
    async with running_worker(settings):
        stream_id = await create(log, receiver.url, text=["the ", "answer"])
        request = await receiver.request()
        await settled(redis)
    assert request.line == "POST /hook?secret=the-marker HTTP/1.1"
    assert request.headers["content-type"] == "application/json"
    end = (await log.read(stream_id))[-1]
    told = verified(request)
    assert told["type"] == "stream.completed"
    assert told["data"] == {"stream_id": stream_id, "url": f"/streams/{stream_id}"} | end.value()
    assert told["data"]["finish_reason"] == "stop"
    assert b"the answer" not in request.body
    assert len(receiver.requests) == 1


async def test_a_failure_is_told_of(log: Log, settings: Settings, receiver: Receiver) -> None:
    async with running_worker(settings):
        await create(log, receiver.url, status=400)
        told = verified(await receiver.request())
    assert told["type"] == "stream.failed"
    assert told["data"]["code"] == "upstream_refused"
    assert told["data"]["retryable"] is False


async def test_the_cancel_of_a_running_answer_is_told_of(
    log: Log, settings: Settings, emulator: Emulator, receiver: Receiver
) -> None:
    async with running_worker(settings):
        stream_id = await create(log, receiver.url, chunks=1, end="stall")
        await emulator.request(0)
        await log.cancel(stream_id)
        assert verified(await receiver.request())["type"] == "stream.cancelled"


async def test_the_cancel_of_a_waiting_job_is_told_of(
    log: Log, settings: Settings, emulator: Emulator, receiver: Receiver
) -> None:
    async with running_worker(changed(settings, concurrency=1)):
        await log.create(asking(chunks=1, end="stall"))
        await emulator.request(0)
        stream_id = await ended(log, receiver.url)
        told = verified(await receiver.request())
    assert told["type"] == "stream.cancelled"
    assert told["data"]["stream_id"] == stream_id


@pytest.mark.usefixtures("never_polling")
async def test_an_answer_that_a_sweep_ends_is_told_of_at_once(
    redis: Redis, log: Log, settings: Settings, receiver: Receiver
) -> None:
    await ended(log, receiver.url)
    async with telling(changed(settings, max_attempts=1)):
        await receiver.request()
        stream_id = await create(log, receiver.url)
        # Of a worker that has died since.
        await make_claims(redis, "dead", lease_ms=1).claim(1)
        told = verified(await receiver.request(1))
    assert told["data"]["stream_id"] == stream_id
    assert told["type"] == "stream.failed"
    assert told["data"]["code"] == "interrupted"


@pytest.mark.usefixtures("never_polling")
async def test_what_no_worker_took_in_time_is_told_of_at_once(
    redis: Redis, log: Log, settings: Settings, receiver: Receiver
) -> None:
    settings = changed(settings, live_seconds=1, lease_seconds=0.2)
    await ended(log, receiver.url)
    async with telling(settings):
        await receiver.request()
        stream_id = await create(Log.configured(redis, settings), receiver.url)
        told = verified(await receiver.request(1))
    assert told["data"]["stream_id"] == stream_id
    assert told["data"]["code"] == "queue_timeout"


# Tries


async def test_a_receiver_that_fails_is_told_again_until_it_says_yes(
    redis: Redis, log: Log, settings: Settings, receiver: Receiver
) -> None:
    receiver.answers += [answer(500), answer(302, f"Location: {receiver.url}"), b"", answer(200)]
    async with telling(settings):
        await ended(log, receiver.url)
        requests = [await receiver.request(number) for number in range(4)]
        await settled(redis)
    assert len(receiver.requests) == 4
    assert len({request.headers["webhook-id"] for request in requests}) == 1
    assert len({request.body for request in requests}) == 1
    for request in requests:
        verified(request)


async def test_a_receiver_believes_what_it_is_told_long_after_the_end(
    redis: Redis, log: Log, settings: Settings, receiver: Receiver
) -> None:
    """The official library takes nothing that was signed more than five minutes ago."""
    stream_id = await ended(log, receiver.url)
    await set_state(redis, stream_id, "ended_ms", 1)
    async with telling(settings):
        verified(await receiver.request())


async def test_a_receiver_that_wants_no_more_is_not_told_again(
    redis: Redis, log: Log, settings: Settings, receiver: Receiver
) -> None:
    receiver.answers += [answer(410)]
    async with telling(settings):
        await ended(log, receiver.url)
        await settled(redis)
    assert len(receiver.requests) == 1


async def test_retry_after_is_waited_out(
    redis: Redis, log: Log, settings: Settings, receiver: Receiver
) -> None:
    receiver.answers += [answer(503, "Retry-After: 20")]
    async with telling(settings):
        stream_id = await ended(log, receiver.url)
        await tried(redis, stream_id)
        assert 15_000 < await due_in_ms(redis, stream_id) < 25_000


async def test_of_the_time_before_the_first_retry_half_is_certain(
    redis: Redis,
    log: Log,
    settings: Settings,
    receiver: Receiver,
    said: list[Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(deliveries, "FIRST_RETRY_SECONDS", 20)
    receiver.answers += [answer(500)]
    async with telling(settings):
        await tried(redis, await ended(log, receiver.url))
    [failed] = outcomes(said)
    assert 10 <= failed["retry_seconds"] <= 20


async def test_one_that_could_be_told_only_of_what_is_gone_is_given_up(
    redis: Redis, settings: Settings, receiver: Receiver
) -> None:
    receiver.answers += [answer(503, "Retry-After: 61")]
    async with telling(settings):
        await ended(Log.configured(redis, changed(settings, retention_seconds=60)), receiver.url)
        await settled(redis)
    assert len(receiver.requests) == 1


async def test_nobody_is_told_of_what_is_erased(
    redis: Redis, log: Log, settings: Settings, receiver: Receiver
) -> None:
    receiver.answers += [answer(500, "Retry-After: 20")]
    async with telling(settings):
        erased = await ended(log, receiver.url)
        await tried(redis, erased)
        await log.erase(erased)
        another = await ended(log, receiver.url)
        assert verified(await receiver.request(1))["data"]["stream_id"] == another
        await settled(redis)
    assert len(receiver.requests) == 2
    assert not await redis.exists(keys.state(erased))


async def test_an_erase_that_overtakes_what_it_is_taken_with_is_not_told_of(
    redis: Redis,
    log: Log,
    settings: Settings,
    receiver: Receiver,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    take, forget, heard = Outbox.take, Deliveries.forget, asyncio.Event()

    async def overtaken(self: Outbox, want: int) -> list[Delivery]:
        taken = await take(self, want)
        if taken and not heard.is_set():
            await log.erase(taken[0].stream_id)
            await heard.wait()
        return taken

    def hear(self: Deliveries, stream_id: str) -> None:
        forget(self, stream_id)
        heard.set()

    monkeypatch.setattr(Outbox, "take", overtaken)
    monkeypatch.setattr(Deliveries, "forget", hear)
    async with telling(settings):
        await a_worker_listens(redis)
        erased = await ended(log, receiver.url)
        await heard.wait()
        another = await ended(log, receiver.url)
        assert verified(await receiver.request())["data"]["stream_id"] == another
        await settled(redis)
    assert len(receiver.requests) == 1
    assert not await redis.exists(keys.state(erased))


async def test_an_erase_stops_what_is_under_way_to_the_receiver(
    redis: Redis, log: Log, settings: Settings, receiver: Receiver
) -> None:
    receiver.answering.clear()
    async with telling(settings):
        stream_id = await ended(log, receiver.url)
        await receiver.request()
        await a_worker_listens(redis)
        await log.erase(stream_id)
        async with asyncio.timeout(5):
            await receiver.left.wait()
        assert await redis.zcard(keys.WEBHOOKS) == 0
        assert not await redis.exists(keys.state(stream_id))


@pytest.mark.usefixtures("never_polling")
async def test_what_does_not_go_at_a_time_goes_one_after_the_other_without_a_poll(
    redis: Redis, log: Log, settings: Settings, receiver: Receiver, takes: list[int]
) -> None:
    for _ in range(5):
        await ended(log, receiver.url)
    async with telling(settings):
        await receiver.request(4)
        await settled(redis)
    assert max(takes) == 2
    assert len(takes) < 10


async def test_what_is_under_way_counts_towards_what_goes_at_a_time(
    redis: Redis, log: Log, settings: Settings, receiver: Receiver, takes: list[int]
) -> None:
    receiver.answering.clear()
    for _ in range(3):
        await ended(log, receiver.url)

    async def polled() -> bool:
        return len(takes) > 3

    async with telling(settings):
        await receiver.request(1)
        await until(polled)
        assert takes[:4] == [2, 0, 0, 0]
        receiver.answering.set()
        await settled(redis)


# Receivers that are slow, or not to be reached


async def test_a_slow_receiver_holds_up_no_other(
    redis: Redis,
    log: Log,
    settings: Settings,
    receiver: Receiver,
    names: Names,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    names["slow.test"] = names["quick.test"] = ["127.0.0.1"]
    async with receiving() as slow, telling(settings):
        with monkeypatch.context() as patch:
            patch.setattr(deliveries, "SLOW_SECONDS", 0)
            await ended(log, f"http://slow.test:{slow.port}")
            await settled(redis)
        slow.answering.clear()
        for _ in range(deliveries.MOST + 1):
            await ended(log, f"http://slow.test:{slow.port}")
        await slow.request(deliveries.MOST_TO_THE_SLOW)
        await ended(log, f"http://quick.test:{receiver.port}")
        await receiver.request(seconds=3)
        assert len(slow.requests) == 1 + deliveries.MOST_TO_THE_SLOW
        slow.answering.set()
        await settled(redis)
    assert len(slow.requests) == 1 + deliveries.MOST + 1


async def test_the_hosts_of_a_wildcard_hold_up_no_other_receiver(
    redis: Redis, log: Log, settings: Settings, receiver: Receiver, names: Names
) -> None:
    names["quick.test"] = ["127.0.0.1"]
    hosts = [f"h{number}.wild.test" for number in range(deliveries.MOST + 10)]
    for host in hosts:
        names[host] = ["127.0.0.1"]
    allowing = changed(settings, webhook_hosts="*.wild.test,quick.test")
    async with receiving() as wild, telling(allowing):
        wild.answering.clear()
        for host in hosts:
            await ended(log, f"http://{host}:{wild.port}")
        await wild.request(deliveries.MOST_TO_A_WILDCARD - 1)
        await ended(log, f"http://quick.test:{receiver.port}")
        await receiver.request(seconds=3)
        assert len(wild.requests) == deliveries.MOST_TO_A_WILDCARD
        wild.answering.set()
        await settled(redis)
    assert len(wild.requests) == len(hosts)


async def test_a_quick_receiver_is_told_of_many_at_once_and_of_each_at_the_first_try(
    redis: Redis,
    log: Log,
    settings: Settings,
    receiver: Receiver,
    said: list[Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(deliveries, "SLOW_SECONDS", 60)
    receiver.answering.clear()
    for _ in range(2 * deliveries.MOST):
        await ended(log, receiver.url)
    async with telling(settings):
        await receiver.request(deliveries.MOST - 1)
        receiver.answering.set()
        await settled(redis)
    assert {each["event"] for each in outcomes(said)} == {"webhook_delivered"}


async def test_a_receiver_that_was_slow_is_as_good_as_any_once_it_is_quick(
    redis: Redis,
    log: Log,
    settings: Settings,
    receiver: Receiver,
    said: list[Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with telling(settings):
        for seconds in (0, 60):
            monkeypatch.setattr(deliveries, "SLOW_SECONDS", seconds)
            await ended(log, receiver.url)
            await settled(redis)
        receiver.answering.clear()
        for _ in range(deliveries.MOST):
            await ended(log, receiver.url)
        await receiver.request(2 + deliveries.MOST - 1)
        receiver.answering.set()
        await settled(redis)
    assert {each["event"] for each in outcomes(said)} == {"webhook_delivered"}


async def test_nothing_is_sent_to_a_private_address_unless_that_is_allowed(
    redis: Redis, log: Log, settings: Settings, receiver: Receiver, said: list[Any]
) -> None:
    async with telling(changed(settings, webhook_private=False)):
        stream_id = await ended(log, f"https://127.0.0.1:{receiver.port}/")
        await tried(redis, stream_id)
    assert receiver.connections == 0
    assert {each["answer"] for each in outcomes(said)} == {"NotPublic"}


async def test_a_worker_that_does_not_know_the_host_leaves_it_for_later(
    redis: Redis, log: Log, settings: Settings, receiver: Receiver, said: list[Any]
) -> None:
    async with telling(changed(settings, webhook_hosts="other.test")):
        stream_id = await ended(log, receiver.url)
        await tried(redis, stream_id)
    assert {each["answer"] for each in outcomes(said)} == {"NotAllowed"}
    assert receiver.connections == 0
    await make_due(redis, stream_id)
    async with telling(settings):
        await receiver.request()


async def test_a_worker_to_which_no_host_is_allowed_asks_for_nothing(
    redis: Redis, log: Log, settings: Settings, receiver: Receiver
) -> None:
    async with running_worker(changed(settings, webhook_hosts="")):
        stream_id = await create(log, receiver.url, chunks=1)

        async def over() -> bool:
            return (await log.state(stream_id)).status == "completed"

        await until(over)
        assert await due_in_ms(redis, stream_id) <= 0
    client: Any = redis
    assert not await client.hexists(keys.state(stream_id), "webhook_tries")


# Workers that end


async def test_what_a_leaving_worker_has_under_way_another_takes_at_once(
    redis: Redis, log: Log, settings: Settings, receiver: Receiver
) -> None:
    receiver.answering.clear()
    async with telling(settings):
        await ended(log, receiver.url)
        first = await receiver.request()
    receiver.answering.set()
    async with telling(settings):
        second = await receiver.request(1, seconds=3)
        await settled(redis)
    assert first.headers["webhook-id"] == second.headers["webhook-id"]


async def test_a_lease_that_lapses_does_not_make_one_worker_tell_twice_at_a_time(
    redis: Redis, log: Log, settings: Settings, receiver: Receiver
) -> None:
    receiver.answering.clear()
    async with telling(settings):
        stream_id = await ended(log, receiver.url)
        await receiver.request()
        await make_due(redis, stream_id)

        async def taken_again() -> bool:
            return await due_in_ms(redis, stream_id) > 0

        await until(taken_again)
        receiver.answering.set()
        await settled(redis)
    assert len(receiver.requests) == 1


async def test_a_worker_outlives_an_outbox_that_redis_does_not_give_out(
    redis: Redis, log: Log, settings: Settings, receiver: Receiver, said: list[Any]
) -> None:
    await redis.set(keys.WEBHOOKS, "no outbox")
    async with telling(settings):

        async def refused() -> bool:
            return [each["event"] for each in outcomes(said)] == ["outbox_unreadable"] * 2

        await until(refused)
        await redis.delete(keys.WEBHOOKS)
        await ended(log, receiver.url)
        await receiver.request()


async def test_what_cannot_be_told_takes_neither_the_worker_nor_the_others_with_it(
    redis: Redis, log: Log, settings: Settings, receiver: Receiver, said: list[Any]
) -> None:
    broken = await ended(log, receiver.url)
    await redis.xadd(keys.log(broken), {"cancelled": "no json"}, id="99-0")
    sound = await ended(log, receiver.url)
    async with telling(settings):
        assert verified(await receiver.request())["data"]["stream_id"] == sound
    died = [each["stream"] for each in outcomes(said) if each["event"] == "delivery_died"]
    assert died == [broken]


async def test_an_answer_that_cannot_be_noted_leads_to_another_try_when_the_lease_ends(
    redis: Redis,
    log: Log,
    settings: Settings,
    receiver: Receiver,
    monkeypatch: pytest.MonkeyPatch,
    said: list[Any],
) -> None:
    async def away(*_: object) -> None:
        raise RedisConnectionError

    async def unsettled(times: int) -> None:
        async def so_often() -> bool:
            events = [each["event"] for each in outcomes(said)]
            return events.count("webhook_unsettled") == times

        await until(so_often)

    receiver.answers += [answer(500), answer(200)]
    async with telling(settings):
        with monkeypatch.context() as outage:
            outage.setattr("relay.outbox.Outbox.postpone", away)
            outage.setattr("relay.outbox.Outbox.settle", away)
            stream_id = await ended(log, receiver.url)
            await unsettled(1)
            await make_due(redis, stream_id)
            await unsettled(2)
        await make_due(redis, stream_id)
        await settled(redis)
    assert len(receiver.requests) == 3


@pytest.fixture
def env(settings: Settings) -> dict[str, str]:
    return worker_env(settings) | {
        "RELAY_WEBHOOK_HOSTS": HOSTS,
        "RELAY_WEBHOOK_SECRET": SECRET,
        "RELAY_WEBHOOK_PRIVATE": "1",
    }


async def test_what_a_killed_worker_had_under_way_another_tells_when_the_lease_ends(
    redis: Redis,
    log: Log,
    settings: Settings,
    receiver: Receiver,
    env: dict[str, str],
    tmp_path: Path,
) -> None:
    receiver.answering.clear()
    stream_id = await create(log, receiver.url, chunks=1)
    async with worker_process(env, tmp_path) as process:
        first = await receiver.request(seconds=20)
        process.kill()
        await process.wait()
    receiver.answering.set()
    assert await due_in_ms(redis, stream_id) > 0
    await make_due(redis, stream_id)
    async with running_worker(settings):
        second = await receiver.request(1)
        await settled(redis)
    assert verified(first) == verified(second)


async def test_what_is_under_way_at_a_signal_is_finished_within_the_grace(
    redis: Redis, log: Log, receiver: Receiver, env: dict[str, str], tmp_path: Path
) -> None:
    receiver.answering.clear()
    async with worker_process(env, tmp_path) as process:
        await create(log, receiver.url, chunks=1)
        await receiver.request(seconds=20)
        process.send_signal(signal.SIGTERM)

        async def takes_no_more() -> bool:
            return int((await redis.info("clients"))["blocked_clients"]) == 0

        await until(takes_no_more)
        later = await ended(log, receiver.url)
        receiver.answering.set()
        async with asyncio.timeout(5):
            assert await process.wait() == 0
    assert await redis.zrange(keys.WEBHOOKS, 0, -1) == [later.encode()]
    assert len(receiver.requests) == 1


async def test_what_outlasts_the_grace_is_left_to_others_at_once(
    redis: Redis, log: Log, receiver: Receiver, env: dict[str, str], tmp_path: Path
) -> None:
    receiver.answering.clear()
    async with worker_process(env | {"RELAY_GRACE_SECONDS": "0"}, tmp_path) as process:
        stream_id = await create(log, receiver.url, chunks=1)
        await receiver.request(seconds=20)
        process.send_signal(signal.SIGTERM)
        async with asyncio.timeout(5):
            assert await process.wait() == 0
            _, written = await process.communicate()
    assert b"Traceback" not in written
    assert await due_in_ms(redis, stream_id) <= 0


# What is written down


async def test_each_outcome_is_a_line_with_stream_and_host_and_no_secret(
    redis: Redis, log: Log, settings: Settings, receiver: Receiver, said: list[Any]
) -> None:
    body = b"the-marker"
    receiver.answers += [answer(500, body=body), answer(410, body=body), answer(200, body=body)]
    async with telling(settings):
        first = await ended(log, receiver.url)
        await settled(redis)
        second = await ended(log, receiver.url)
        await settled(redis)
    assert [(each["event"], each["stream"], each["answer"]) for each in outcomes(said)] == [
        ("webhook_failed", first, 500),
        ("webhook_given_up", first, 410),
        ("webhook_delivered", second, 200),
    ]
    assert {each["host"] for each in outcomes(said)} == {"127.0.0.1"}
    assert "the-marker" not in str(said)


async def test_a_worker_that_leaves_while_redis_is_away_leaves_all_the_same(
    redis: Redis,
    log: Log,
    settings: Settings,
    receiver: Receiver,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def away(*_: object) -> None:
        raise RedisConnectionError

    receiver.answering.clear()
    await ended(log, receiver.url)
    delivering = asyncio.create_task(Deliveries(Outbox(redis), settings.webhooks).run())
    await receiver.request()
    monkeypatch.setattr("relay.outbox.Outbox.postpone", away)
    delivering.cancel()
    with pytest.raises(asyncio.CancelledError):
        await delivering


# The wait


def test_the_wait_doubles_from_five_seconds_to_ten_minutes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.undo()
    waits = [seconds_before(number, {}, 1) for number in range(2, 12)]
    assert waits == [5, 10, 20, 40, 80, 160, 320, 600, 600, 600]
    assert [seconds_before(number, {}, 0) for number in (2, 3)] == [2.5, 5]


def test_a_receiver_may_ask_for_more_time_up_to_the_most_and_never_for_less(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.undo()
    assert seconds_before(2, {"retry-after": "60"}, 0) == 60
    assert seconds_before(2, {"retry-after": "9999"}, 0) == 600
    assert seconds_before(2, {"retry-after": "0"}, 1) == 5
    assert seconds_before(2, {"retry-after": "soon"}, 1) == 5
