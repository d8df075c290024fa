import asyncio
import signal
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
from redis.asyncio import Redis
from redis.exceptions import RedisError

from cli.redis_server import RedisServer
from emulator.app import Emulator, Record
from relay import keys
from relay.chunks import Compactor
from relay.claim import Claim, Claims, Released
from relay.connection import connect
from relay.errors import StreamGone
from relay.events import WHOLE, Event, text_of, to_json
from relay.log import Log, Recovery
from relay.settings import Settings
from tests.conftest import (
    append,
    asking,
    changed,
    events_of,
    make_claims,
    make_log,
    running_worker,
    until,
)
from worker.claiming import CLAIMED_AT_ONCE, HEALTH_SECONDS, ClaimingWorker
from worker.deliveries import Deliveries
from worker.health import is_healthy
from worker.main import create_worker

LONG = {"lease_seconds": 60.0}
"""No renewal within a test: what still comes to a worker comes through the control channel."""


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("worker.claiming.SWEEP_SECONDS", 0.05)
    monkeypatch.setattr("worker.claiming.REDIS_RETRY_SECONDS", 0.02)
    monkeypatch.setattr("relay.listener.RECONNECT_SECONDS", 0.02)


@pytest.fixture
def never_polling(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("worker.claiming.POLL_SECONDS", 30.0)


@asynccontextmanager
async def idle_worker(redis: Redis, settings: Settings) -> AsyncIterator[ClaimingWorker]:
    """One that waits for a token and listens."""
    async with running_worker(settings) as worker:
        await waiting(redis, 1)
        yield worker


async def command(redis: Redis, *words: str | int) -> Any:
    """As it goes over the wire; redis-py's own types are those of sync and async at once."""
    client: Any = redis
    return await client.execute_command(*words)


async def kill_connections(redis: Redis) -> None:
    for kind in ("normal", "pubsub"):
        await command(redis, "CLIENT", "KILL", "TYPE", kind)


async def waiting(redis: Redis, workers: int) -> None:
    """As many workers wait for a token and listen."""

    async def enough() -> bool:
        blocked = int((await redis.info("clients"))["blocked_clients"])
        [(_, listening)] = await redis.pubsub_numsub(keys.CONTROL)
        return min(blocked, int(listening)) >= workers

    await until(enough)


async def nobody_waiting(redis: Redis) -> None:
    async def nobody() -> bool:
        return not (await redis.info("clients"))["blocked_clients"]

    await until(nobody)


async def create(log: Log, **script: Any) -> str:
    return (await log.create(asking(**script))).stream_id


async def log_when(
    redis: Redis, log: Log, stream_id: str, enough: Callable[[Event], bool], seconds: float = 10
) -> list[Event]:
    """The log as soon as its last event is enough."""
    async with asyncio.timeout(seconds):
        while not enough((events := await log.read(stream_id))[-1]):
            await redis.xread({keys.log(stream_id): str(events[-1].cursor)}, block=1000)
    return events


async def whole(redis: Redis, log: Log, stream_id: str, seconds: float = 10) -> list[Event]:
    return await log_when(redis, log, stream_id, lambda event: event.terminal, seconds)


async def arrival(emulator: Emulator, number: int = 0, seconds: float = 5) -> Record:
    async with asyncio.timeout(seconds):
        return await emulator.request(number)


async def cut(record: Record) -> None:
    async with asyncio.timeout(1):
        await record.over.wait()
    assert record.outcome == "disconnected"


def kinds(events: list[Event]) -> list[str]:
    return [event.kind for event in events if event.kind not in {"c", "t"}]


def screen(events: list[Event]) -> str:
    """The text of a viewer that keeps the one rule."""
    text = ""
    for event in events:
        text = "" if event.kind == "started" else text + text_of(event)
    return text


def numbers(count: int) -> str:
    return "".join(f"{n} " for n in range(count))


# Taking jobs


@pytest.mark.usefixtures("never_polling")
async def test_a_queued_job_is_begun_by_the_wake_up_and_not_by_the_poll(
    redis: Redis, log: Log, settings: Settings, emulator: Emulator
) -> None:
    async with idle_worker(redis, settings):
        for number in range(5):
            await create(log, chunks=1)
            # A tenth of a poll at the most, on the busiest machine.
            await arrival(emulator, number, seconds=3)


@pytest.mark.usefixtures("never_polling")
async def test_a_job_that_came_before_the_worker_is_begun_at_its_start(
    redis: Redis, log: Log, settings: Settings
) -> None:
    ids = [await create(log, chunks=2) for _ in range(3)]
    await redis.delete(keys.WAKE)
    async with running_worker(settings):
        for stream_id in ids:
            assert kinds(await whole(redis, log, stream_id)) == ["queued", "started", "completed"]


@pytest.mark.usefixtures("never_polling")
async def test_what_one_claim_cannot_carry_is_taken_by_the_next_without_a_wake_up(
    redis: Redis, log: Log, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("relay.claim.BYTES_AT_ONCE", 1)
    ids = [await create(log, chunks=2) for _ in range(3)]
    await redis.delete(keys.WAKE)
    async with running_worker(settings):
        for stream_id in ids:
            assert (await whole(redis, log, stream_id, seconds=5))[-1].kind == "completed"


async def test_a_worker_takes_few_at_a_time_and_leaves_the_rest_to_others(
    redis: Redis,
    log: Log,
    settings: Settings,
    emulator: Emulator,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ask_redis, go_on, owners = Claims.claim, asyncio.Event(), set[str]()

    async def claim(self: Claims, want: int) -> list[Claim]:
        if owners:
            await go_on.wait()
        claims = await ask_redis(self, want)
        owners.update(claim.owner for claim in claims)
        return claims

    monkeypatch.setattr("relay.claim.Claims.claim", claim)
    for _ in range(CLAIMED_AT_ONCE + 1):
        await create(log, chunks=1, end="stall")
    async with running_worker(settings):
        await arrival(emulator, CLAIMED_AT_ONCE - 1)
        assert (await log.load()).queued == 1
        go_on.set()
        await arrival(emulator, CLAIMED_AT_ONCE)


async def test_a_lost_wake_token_is_made_good_by_the_slow_poll(
    redis: Redis, log: Log, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("worker.claiming.POLL_SECONDS", 0.1)
    stream_id = await create(log, chunks=1)
    queue = await redis.zrange(keys.QUEUE, 0, -1, withscores=True)
    await redis.delete(keys.QUEUE, keys.WAKE)
    async with idle_worker(redis, settings):
        await redis.zadd(keys.QUEUE, dict(queue))
        assert (await whole(redis, log, stream_id))[-1].kind == "completed"


async def test_the_oldest_job_comes_first(
    redis: Redis, log: Log, settings: Settings, emulator: Emulator
) -> None:
    ids = []
    for number in range(4):
        ids.append(await create(log, text=[f"job {number}"]))
        await redis.zadd(keys.QUEUE, {ids[-1]: time.time() * 1000 + number})
    async with running_worker(changed(settings, concurrency=1)):
        for stream_id in ids:
            await whole(redis, log, stream_id)
    asked = [record.body["messages"][0]["content"] for record in emulator.requests]
    assert [content.partition("job ")[2][0] for content in asked] == ["0", "1", "2", "3"]


@pytest.mark.usefixtures("never_polling")
async def test_no_more_jobs_run_than_there_are_slots_and_a_free_one_is_taken_at_once(
    redis: Redis, log: Log, settings: Settings, emulator: Emulator
) -> None:
    ids = [await create(log, chunks=4, delay_ms=15) for _ in range(9)]
    async with running_worker(changed(settings, concurrency=2)):
        for stream_id in ids:
            await whole(redis, log, stream_id)
    spans = [(record.started, record.ended or 0.0) for record in emulator.requests]
    together = [sum(start <= moment < end for start, end in spans) for moment, _ in spans]
    assert max(together) == 2
    assert len(spans) == 9


@pytest.mark.usefixtures("never_polling")
async def test_a_cancelled_job_frees_its_slot(
    redis: Redis, log: Log, settings: Settings, emulator: Emulator
) -> None:
    async with idle_worker(redis, changed(settings, concurrency=1, **LONG)):
        first = await create(log, chunks=1, end="stall")
        record = await arrival(emulator)
        second = await create(log, chunks=1)
        assert (await log.state(second)).status == "queued"
        await log.cancel(first)
        await cut(record)
        assert (await whole(redis, log, second))[-1].kind == "completed"


async def test_two_workers_share_the_jobs_and_each_job_is_generated_once(
    redis: Redis, log: Log, settings: Settings, emulator: Emulator
) -> None:
    narrow = changed(settings, concurrency=2)
    async with running_worker(narrow) as one, running_worker(narrow) as other:
        await waiting(redis, 2)
        ids = [await create(log, chunks=3, delay_ms=10) for _ in range(20)]
        for stream_id in ids:
            events = await whole(redis, log, stream_id)
            assert kinds(events) == ["queued", "started", "completed"]
            assert screen(events) == numbers(3)
    assert emulator.total == 20
    assert one.jobs_complete > 0
    assert other.jobs_complete > 0
    assert one.jobs_complete + other.jobs_complete == 20


async def test_a_job_that_cannot_be_read_costs_no_slot_for_ever(
    redis: Redis, log: Log, settings: Settings
) -> None:
    broken = await create(log, chunks=1)
    await redis.set(keys.job(broken), b"no job", keepttl=True)
    async with running_worker(changed(settings, concurrency=1)):
        sound = await create(log, chunks=1)
        assert (await whole(redis, log, sound, seconds=1))[-1].kind == "completed"


# Leases


async def dead_worker(redis: Redis, log: Log, **script: Any) -> str:
    """A stream whose worker began it and then died: its lease lapses at once."""
    stream_id = await create(log, **script)
    [claim] = await make_claims(redis, "dead", lease_ms=1).claim(1)
    compactor = Compactor(1, "demo")
    chunk = {"choices": [{"index": 0, "delta": {"content": "half"}, "finish_reason": None}]}
    await append(log, claim, 0, compactor.entries(to_json(chunk)))
    return stream_id


async def test_the_job_of_a_dead_worker_is_begun_again_by_another(
    redis: Redis, log: Log, settings: Settings
) -> None:
    stream_id = await dead_worker(redis, log, chunks=3)
    async with running_worker(settings):
        events = await whole(redis, log, stream_id)
    assert kinds(events) == ["queued", "started", "started", "completed"]
    started = [event for event in events if event.kind == "started"]
    assert [event.value()["attempt"] for event in started] == [1, 2]
    assert started[1].cursor.seq == 0
    assert screen(events) == numbers(3)


async def test_a_job_that_kills_its_workers_is_ended_as_interrupted(
    redis: Redis, log: Log, settings: Settings, emulator: Emulator
) -> None:
    stream_id = await dead_worker(redis, log, chunks=3)
    async with running_worker(changed(settings, max_attempts=1)):
        events = await whole(redis, log, stream_id)
    assert events[-1].value()["code"] == "interrupted"
    assert emulator.total == 0


async def test_what_no_worker_takes_in_time_fails(
    redis: Redis, settings: Settings, emulator: Emulator
) -> None:
    settings = changed(settings, concurrency=1, live_seconds=1, lease_seconds=0.2)
    log = Log.configured(redis, settings)
    async with running_worker(settings):
        taken = await create(log, chunks=1, end="stall")
        await arrival(emulator)
        waits = await create(log, chunks=1)
        events = await whole(redis, log, waits)
        assert (await log.state(taken)).status == "running"
    assert kinds(events) == ["queued", "failed"]
    assert events[-1].value()["code"] == "queue_timeout"
    assert emulator.total == 1


async def test_a_lease_that_is_renewed_does_not_lapse(
    redis: Redis, log: Log, settings: Settings, emulator: Emulator
) -> None:
    short = changed(settings, lease_seconds=1.0)
    async with running_worker(short), running_worker(short):
        stream_id = await create(log, chunks=20, delay_ms=100)
        events = await whole(redis, log, stream_id)
    assert kinds(events) == ["queued", "started", "completed"]
    assert emulator.total == 1


async def test_a_worker_whose_lease_was_taken_stops_asking_the_upstream(
    redis: Redis, log: Log, settings: Settings, emulator: Emulator
) -> None:
    async with running_worker(changed(settings, lease_seconds=0.3, concurrency=1)):
        stream_id = await create(log, chunks=1, end="stall")
        record = await arrival(emulator)
        # Another worker has it, though this one was alive.
        await command(redis, "HSET", keys.state(stream_id), "owner", "another")
        await cut(record)
    assert not (await log.read(stream_id))[-1].terminal


async def test_a_job_that_redis_gives_once_more_to_its_owner_runs_once(
    redis: Redis, log: Log, settings: Settings, emulator: Emulator
) -> None:
    async with idle_worker(redis, changed(settings, **LONG)):
        stream_id = await create(log, chunks=5, after=2, end="stall")
        record = await arrival(emulator)
        [*_, last] = await log_when(redis, log, stream_id, lambda event: screen([event]) == "1 ")
        # Redis forgets the claim.
        await redis.zrem(keys.LEASES, stream_id)
        await command(redis, "HDEL", keys.state(stream_id), "owner")
        await redis.zadd(keys.QUEUE, {stream_id: 1})
        await command(redis, "RPUSH", keys.WAKE, "1")
        second = await arrival(emulator, 1)
        await cut(record)
        assert second.outcome is None
        # After the last append, which would have found that it is cancelled.
        await log_when(
            redis,
            log,
            stream_id,
            lambda e: e.cursor.attempt > last.cursor.attempt and e.cursor.seq == 4,
        )
        await log.cancel(stream_id)
        await cut(second)
        events = await whole(redis, log, stream_id)
        assert kinds(events)[-1] == "cancelled"
        assert len({event.cursor.attempt for event in events}) == 3


# Orders


async def test_a_cancel_reaches_the_worker_through_the_control_channel(
    redis: Redis, log: Log, settings: Settings, emulator: Emulator
) -> None:
    async with idle_worker(redis, changed(settings, **LONG)):
        stream_id = await create(log, chunks=9, after=3, end="stall")
        await log_when(redis, log, stream_id, lambda event: screen([event]) == "2 ")
        assert await log.cancel(stream_id) == "cancelling"
        await cut(await arrival(emulator))
        events = await whole(redis, log, stream_id)
    assert kinds(events) == ["queued", "started", "cancelled"]
    assert screen(events) == numbers(3)


async def test_a_cancel_whose_message_was_lost_is_found_at_the_renewal(
    redis: Redis, log: Log, settings: Settings, emulator: Emulator
) -> None:
    async with running_worker(changed(settings, lease_seconds=0.3)):
        stream_id = await create(log, chunks=1, end="stall")
        record = await arrival(emulator)
        # After the last append, which would have found the mark too.
        await log_when(redis, log, stream_id, lambda event: screen([event]) == "0 ")
        await command(redis, "HSET", keys.state(stream_id), "cancel", 1)
        await cut(record)
        assert (await whole(redis, log, stream_id))[-1].kind == "cancelled"


async def test_an_erase_stops_the_upstream_and_leaves_nothing(
    redis: Redis, log: Log, settings: Settings, emulator: Emulator
) -> None:
    async with idle_worker(redis, changed(settings, **LONG)) as worker:
        stream_id = await create(log, chunks=1, end="stall")
        record = await arrival(emulator)
        await log.erase(stream_id)
        await cut(record)
        async with asyncio.timeout(1):
            await asyncio.gather(*worker.tasks.values())
        with pytest.raises(StreamGone):
            await log.read(stream_id)
    assert [key for key in await redis.keys() if stream_id.encode() in key] == []
    assert await redis.zcard(keys.QUEUE) == await redis.zcard(keys.LEASES) == 0


Order = Callable[[Log, str], Awaitable[Any]]


@pytest.fixture
async def overtaking(
    redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Callable[[Order], None]]:
    """Call it to have each claim held back until the worker has heard this order for its jobs."""
    # Not that of the test, on which an order would wait behind what waits for its effect.
    orders = connect(redis_server.url)

    def overtake(order: Order) -> None:
        claim, heard = Claims.claim, asyncio.Event()

        async def overtaken(claims: Claims, want: int) -> list[Claim]:
            taken = await claim(claims, want)
            for each in taken:
                await order(make_log(orders), each.stream_id)
                await orders.publish(keys.CONTROL, "erase last")
                await heard.wait()
            return taken

        def hear(_: Deliveries, stream_id: str) -> None:
            if stream_id == "last":
                heard.set()

        monkeypatch.setattr(Claims, "claim", overtaken)
        monkeypatch.setattr(Deliveries, "forget", hear)

    async with orders:
        yield overtake


async def test_a_cancel_that_overtakes_the_answer_to_the_claim_ends_the_stream(
    redis: Redis, log: Log, settings: Settings, overtaking: Callable[[Order], None]
) -> None:
    overtaking(Log.cancel)
    async with idle_worker(redis, changed(settings, **LONG)):
        stream_id = await create(log, chunks=1, end="stall")
        assert (await whole(redis, log, stream_id, seconds=1))[-1].kind == "cancelled"


async def test_an_erase_that_overtakes_the_answer_to_the_claim_asks_no_upstream(
    redis: Redis,
    log: Log,
    settings: Settings,
    emulator: Emulator,
    overtaking: Callable[[Order], None],
) -> None:
    overtaking(Log.erase)
    async with idle_worker(redis, changed(settings, **LONG)) as worker:
        await create(log, chunks=1, end="stall")

        async def is_over() -> bool:
            return worker.jobs_complete == 1

        await until(is_over)
    assert emulator.total == 0


async def test_an_order_about_another_stream_does_nothing(
    redis: Redis, log: Log, settings: Settings
) -> None:
    async with idle_worker(redis, changed(settings, **LONG)):
        stream_id = await create(log, chunks=10, delay_ms=10)
        for order in ("cancel nobody", "erase nobody", f"dance {stream_id}", stream_id, ""):
            await redis.publish(keys.CONTROL, order)
        assert (await whole(redis, log, stream_id))[-1].kind == "completed"


# Shutdown


async def test_a_shut_down_worker_hands_over_at_no_cost_of_a_try(
    redis: Redis, log: Log, settings: Settings, emulator: Emulator
) -> None:
    once = changed(settings, max_attempts=1, **LONG)
    stream_id = ""
    for number in range(3):
        async with running_worker(once):
            stream_id = stream_id or await create(log, chunks=20, delay_ms=40)
            record = await arrival(emulator, number)
        await cut(record)
        assert await tries_of(redis, stream_id) == 0
        assert await redis.zcard(keys.LEASES) == 0
        assert (await log.state(stream_id)).place == 1
    async with running_worker(once):
        events = await whole(redis, log, stream_id)
    assert kinds(events)[-1] == "completed"
    assert (await log.state(stream_id)).claims == 4
    assert screen(events) == numbers(20)


async def test_a_signal_without_grace_hands_over_every_job_at_no_cost_of_a_try(
    redis: Redis, log: Log, settings: Settings, emulator: Emulator
) -> None:
    worker = create_worker(changed(settings, **LONG), handle_signals=False)
    running = asyncio.create_task(worker.async_run())
    ids = [await create(log, chunks=1, end="stall") for _ in range(20)]
    await arrival(emulator, 19)
    worker.handle_sig(signal.SIGTERM)
    await asyncio.wait([running])
    await worker.close()
    assert [await tries_of(redis, stream_id) for stream_id in ids] == [0] * 20
    assert await redis.zcard(keys.QUEUE) == 20


async def test_a_job_that_is_begun_at_the_moment_of_a_signal_is_handed_over_too(
    redis: Redis, log: Log, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin = ClaimingWorker._begin

    def begin_last(self: ClaimingWorker, claim: Claim) -> None:
        begin(self, claim)
        self.handle_sig(signal.SIGTERM)  # Before the first step of the job.

    monkeypatch.setattr(ClaimingWorker, "_begin", begin_last)
    stream_id = await create(log, chunks=1)
    worker = create_worker(changed(settings, **LONG), handle_signals=False)
    await asyncio.wait([asyncio.create_task(worker.async_run())], timeout=5)
    await worker.close()
    assert await tries_of(redis, stream_id) == 0
    assert (await log.state(stream_id)).place == 1


async def test_a_hand_over_that_has_begun_is_not_cut_by_the_close(
    redis: Redis, log: Log, settings: Settings, emulator: Emulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, go_on = asyncio.Event(), asyncio.Event()
    ask_redis = Claims.hand_over

    async def hand_over(self: Claims, claim: Claim) -> list[Released]:
        begun.set()
        await go_on.wait()
        return await ask_redis(self, claim)

    monkeypatch.setattr("relay.claim.Claims.hand_over", hand_over)
    async with running_worker(changed(settings, **LONG)) as worker:
        stream_id = await create(log, chunks=1, end="stall")
        await arrival(emulator)
        worker.handle_sig(signal.SIGTERM)
        async with asyncio.timeout(5):
            await begun.wait()
        asyncio.get_running_loop().call_later(0.05, go_on.set)
    assert await tries_of(redis, stream_id) == 0
    assert (await log.state(stream_id)).place == 1


@pytest.mark.parametrize(("recovery", "ended"), [("restart", None), ("fail", "failed")])
async def test_the_log_says_what_became_of_a_stream_that_is_handed_over(
    redis: Redis,
    log: Log,
    settings: Settings,
    said: list[Any],
    recovery: Recovery,
    ended: str | None,
) -> None:
    async with running_worker(changed(settings, **LONG)) as worker:
        asked = asking(chunks=1, end="stall")
        stream_id = (await log.create(asked, recovery=recovery)).stream_id
        await log_when(redis, log, stream_id, lambda event: event.kind == WHOLE)
        worker.handle_sig(signal.SIGTERM)
    [told] = [each for each in said if each["event"] == "handed_over"]
    assert (told["stream"], told["ended"]) == (stream_id, ended)


async def test_all_that_a_worker_held_is_let_go_at_once_when_its_leases_have_lapsed(
    redis: Redis, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("worker.claiming.SWEEP_SECONDS", 60.0)
    log, dead = make_log(redis, queue_limit=300), make_claims(redis, "dead")
    for _ in range(250):
        await create(log)
    assert len(await dead.claim(250)) == 250
    held = await redis.zrange(keys.LEASES, 0, -1)
    await redis.zadd(keys.LEASES, dict.fromkeys(held, 0))

    async def queued() -> bool:
        return int(await redis.zcard(keys.QUEUE)) == 250

    async with running_worker(changed(settings, lease_seconds=600.0)) as worker:
        worker.allow_pick_jobs = False
        await until(queued)


async def tries_of(redis: Redis, stream_id: str) -> int:
    return int(await command(redis, "HGET", keys.state(stream_id), "tries"))


async def test_a_job_that_is_queued_during_the_shutdown_is_left_to_others(
    redis: Redis, log: Log, settings: Settings, emulator: Emulator
) -> None:
    async with running_worker(changed(settings, concurrency=2)) as worker:
        first = await create(log, chunks=10, delay_ms=20)
        await arrival(emulator)
        await waiting(redis, 1)
        worker.allow_pick_jobs = False
        second = await create(log, chunks=1)
        await whole(redis, log, first)
        assert (await log.state(second)).status == "queued"
        assert emulator.total == 1


@pytest.mark.usefixtures("never_polling")
async def test_a_worker_that_shuts_down_takes_no_wake_up_from_the_others(
    redis: Redis, log: Log, settings: Settings, emulator: Emulator
) -> None:
    async with running_worker(changed(settings, concurrency=2)) as leaving:
        first = await create(log, chunks=30, delay_ms=50)
        await arrival(emulator)
        await waiting(redis, 1)
        leaving.handle_sig_wait_for_completion(signal.SIGTERM)
        await nobody_waiting(redis)
        assert (await log.state(first)).status == "running"
        async with running_worker(settings):
            await waiting(redis, 1)
            second = await create(log, chunks=1)
            assert (await whole(redis, log, second, seconds=3))[-1].kind == "completed"
            # And what it had is finished by it.
            events = await whole(redis, log, first)
            assert kinds(events) == ["queued", "started", "completed"]


async def test_what_a_worker_claims_at_the_moment_of_its_signal_is_the_last_and_finished_by_it(
    redis: Redis, log: Log, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The answer to its claim is under way: it holds a job and does not know it."""
    on_the_wire, arrive = asyncio.Event(), asyncio.Event()
    ask_redis = Claims.claim

    async def claim(self: Claims, want: int) -> list[Claim]:
        claims = await ask_redis(self, want)
        if claims:
            on_the_wire.set()
            await arrive.wait()
        return claims

    monkeypatch.setattr("relay.claim.Claims.claim", claim)
    async with idle_worker(redis, changed(settings, **LONG)) as worker:
        stream_id = await create(log, chunks=20, delay_ms=10)
        async with asyncio.timeout(5):
            await on_the_wire.wait()
        worker.handle_sig_wait_for_completion(signal.SIGTERM)
        # Longer than arq looks whether anything is left to wait for.
        await asyncio.sleep(0.3)
        arrive.set()
        await log_when(redis, log, stream_id, lambda event: event.cursor.seq > 9)
        await create(log, chunks=1)
        assert await command(redis, "LLEN", keys.WAKE) == 1  # Left to those who go on.
        assert kinds(await whole(redis, log, stream_id)) == ["queued", "started", "completed"]


async def test_a_worker_that_is_told_twice_to_end_does_not_wait(
    redis: Redis, log: Log, settings: Settings, emulator: Emulator
) -> None:
    async with running_worker(settings) as leaving:
        stream_id = await create(log, chunks=1, end="stall")
        record = await arrival(emulator)
        for _ in range(2):
            leaving.handle_sig_wait_for_completion(signal.SIGTERM)
        await cut(record)
    assert await tries_of(redis, stream_id) == 0


async def test_without_redis_it_closes_all_the_same(
    redis: Redis, log: Log, settings: Settings, emulator: Emulator
) -> None:
    async with idle_worker(redis, settings) as worker:
        await create(log, chunks=1, end="stall")
        record = await arrival(emulator)
        # From now on every connection that it makes leads nowhere.
        pools: list[Any] = [worker.pool.connection_pool, worker._patient_redis.connection_pool]
        for pool in pools:
            pool.connection_kwargs["path"] = "/nowhere"
            for connection in [*pool._available_connections, *pool._in_use_connections]:
                connection.path = "/nowhere"
        await kill_connections(redis)
    await cut(record)
    assert await redis.exists(keys.health(socket.gethostname()))


# Redis in trouble


async def test_a_worker_outlives_the_loss_of_all_its_connections(
    redis: Redis, log: Log, settings: Settings, emulator: Emulator
) -> None:
    async with idle_worker(redis, changed(settings, **LONG)):
        running = await create(log, chunks=9, after=3, end="stall")
        await log_when(redis, log, running, lambda event: screen([event]) == "2 ")
        for _ in range(3):
            await kill_connections(redis)
            await waiting(redis, 1)
        stream_id = await create(log, chunks=3)
        assert screen(await whole(redis, log, stream_id)) == numbers(3)
        assert await log.cancel(running) == "cancelling"
        await cut(await arrival(emulator))
        assert (await whole(redis, log, running))[-1].kind == "cancelled"


async def test_a_worker_outlives_a_redis_that_has_forgotten_everything(
    redis: Redis, log: Log, settings: Settings, emulator: Emulator
) -> None:
    async with idle_worker(redis, changed(settings, lease_seconds=0.3)):
        await create(log, chunks=1, end="stall")
        record = await arrival(emulator)
        await redis.flushall()
        await redis.script_flush()
        await cut(record)
        stream_id = await create(log, chunks=3)
        assert screen(await whole(redis, log, stream_id)) == numbers(3)


async def test_a_round_that_redis_refuses_is_told_and_followed_by_the_next(
    redis: Redis, log: Log, settings: Settings, said: list[Any]
) -> None:
    # A key of the wrong type makes claim, sweep and renewal fail.
    await redis.set(keys.QUEUE, "no queue")
    await redis.set(keys.LEASES, "no leases")
    async with running_worker(changed(settings, lease_seconds=0.15)) as worker:
        await waiting_for_calls(redis, 20)
        await redis.delete(keys.QUEUE, keys.LEASES)
        stream_id = await create(log, chunks=3)
        assert (await whole(redis, log, stream_id))[-1].kind == "completed"

        async def is_counted() -> bool:
            return worker.jobs_complete == 1

        await until(is_counted)
    assert {"claim_failed", "round_failed"} <= set(events_of(said))
    assert "sweep" in {line["work"] for line in said if line["event"] == "round_failed"}


async def test_a_renewal_that_failed_is_repeated_at_once_and_not_a_whole_round_later(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    failures = [RedisError("refused"), RedisError("refused")]
    succeeded = asyncio.Event()

    async def renew(_: ClaimingWorker) -> None:
        if failures:
            raise failures.pop()
        succeeded.set()

    monkeypatch.setattr(ClaimingWorker, "_renew", renew)
    # A round would be 20 s.
    async with asyncio.timeout(5), running_worker(changed(settings, **LONG)):
        await succeeded.wait()


async def test_of_a_redis_that_is_away_the_listener_alone_tells(
    settings: Settings, said: list[Any]
) -> None:
    async def tried_again() -> bool:
        return events_of(said).count("redis_lost") >= 4

    async with running_worker(changed(settings, redis_url="unix:///nowhere")):
        await until(tried_again)
        told = events_of(said)
    assert set(told[told.index("redis_lost") + 1 :]) == {"redis_lost"}


async def waiting_for_calls(redis: Redis, calls: int) -> None:
    enough = await evalsha_calls(redis) + calls

    async def reached() -> bool:
        return await evalsha_calls(redis) >= enough

    await until(reached)


async def evalsha_calls(redis: Redis) -> int:
    stats = await redis.info("commandstats")
    return int(stats.get("cmdstat_evalsha", {}).get("calls", 0))


# Health


async def test_the_health_of_a_worker_is_known_while_it_runs(
    redis: Redis, settings: Settings
) -> None:
    assert not await is_healthy(settings)
    async with idle_worker(redis, settings):
        await until(lambda: is_healthy(settings))
        key = keys.health(socket.gethostname())
        # One round may be missed, and the host is healthy still.
        assert 2 * HEALTH_SECONDS < await redis.pttl(key) / 1000 <= 31


async def test_the_health_key_is_renewed_in_every_round(
    redis: Redis, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("worker.claiming.HEALTH_SECONDS", 0.01)
    key = keys.health(socket.gethostname())

    async def is_there() -> bool:
        return bool(await redis.exists(key))

    async with running_worker(settings) as worker:
        worker.health_check_interval = 3600  # Within it arq skips a report as too early.
        for _ in range(3):
            await redis.delete(key)
            await until(is_there)


async def test_a_worker_warns_of_a_redis_that_would_forget_answers_under_way(
    redis: Redis, settings: Settings, said: list[Any]
) -> None:
    await redis.config_set("maxmemory-policy", "volatile-lru")
    try:
        async with running_worker(settings):

            async def warned() -> bool:
                return "redis_evicts" in events_of(said)

            await until(warned)
    finally:
        await redis.config_set("maxmemory-policy", "noeviction")


async def test_it_warns_again_only_when_that_has_changed(
    settings: Settings, said: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    policies = iter(["allkeys-lru", "allkeys-lru", "noeviction", "allkeys-lru", "noeviction"])
    asked_often = asyncio.Event()

    async def info(*_: str) -> dict[str, Any]:
        if (policy := next(policies, None)) is None:
            asked_often.set()
        return {"maxmemory_policy": policy}

    monkeypatch.setattr("worker.claiming.EVICTION_SECONDS", 0.001)
    monkeypatch.setattr(Redis, "info", info)
    async with running_worker(settings):
        await asked_often.wait()
    assert events_of(said).count("redis_evicts") == 2


async def test_a_worker_works_with_a_redis_that_does_not_tell_how_it_evicts(
    redis: Redis, log: Log, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = asyncio.Event()

    async def info(*_: str) -> dict[str, Any]:
        asked.set()
        return {}

    monkeypatch.setattr(Redis, "info", info)
    async with running_worker(settings):
        await asked.wait()
        stream_id = await create(log, chunks=1)
        assert kinds(await whole(redis, log, stream_id))[-1] == "completed"


async def test_one_of_two_workers_on_a_host_may_end_and_the_host_is_still_healthy(
    redis: Redis, settings: Settings
) -> None:
    async with idle_worker(redis, settings):
        await until(lambda: is_healthy(settings))
        async with running_worker(settings):
            await waiting(redis, 2)
        assert await is_healthy(settings)


# What is written down


async def test_no_log_line_holds_a_prompt_or_an_answer(
    redis: Redis, log: Log, settings: Settings, emulator: Emulator, capfd: Any
) -> None:
    quick = changed(settings, lease_seconds=0.3, stall_seconds=0.2, upstream_tries=1)
    scripts: list[dict[str, Any]] = [
        {},
        {"status": 400},
        {"status": 500, "error_code": "what of the-marker?"},
        {"end": "reset"},
        {"end": "garbage"},
        {"end": "stall"},
    ]
    ids = [await dead_worker(redis, log, text=["the-marker"])]
    async with running_worker(quick):
        ids += [await create(log, text=["the-marker"], **script) for script in scripts]
        for stream_id in ids:
            await whole(redis, log, stream_id)
        handed = await create(log, text=["the-marker"], end="stall")
        await log_when(redis, log, handed, lambda event: "the-marker" in screen([event]))
    written = "".join(capfd.readouterr())
    assert handed in written
    assert all(stream_id in written for stream_id in ids)
    assert "the-marker" not in written


async def test_a_claim_whose_answer_is_on_its_way_is_given_back_by_a_worker_that_must_end_now(
    redis: Redis, log: Log, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = asyncio.Event()
    async with running_worker(settings) as worker:
        claim: Any = worker._claims._claim

        async def on_its_way(**call: Any) -> None:
            if await claim(**call):
                taken.set()
                await asyncio.Event().wait()

        monkeypatch.setattr(worker._claims, "_claim", on_its_way)
        stream_id = await create(log)
        async with asyncio.timeout(5):
            await taken.wait()
    assert (await log.state(stream_id)).status == "queued"
    [claimed] = await make_claims(redis, max_attempts=1).claim(1)
    assert claimed.ordinal == 2
    assert await tries_of(redis, stream_id) == 1
