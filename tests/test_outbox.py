"""The outbox on a real Redis: what is to be told, from when on, and for how long."""

from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from redis.asyncio import Redis

from relay import keys
from relay.claim import INTERRUPTED
from relay.events import CANCELLED, COMPLETED, FAILED, STARTED, entry, to_json
from relay.log import Log
from relay.outbox import LEASE_SECONDS, Delivery, Outbox
from tests.conftest import append, claim_one, due_in_ms, make_claims, make_due, until

URL = "https://hooks.test/the-path"
END = [entry(STARTED, {"attempt": 1}), entry(COMPLETED, {"chunks": 1})]


@pytest.fixture
def outbox(redis: Redis) -> Outbox:
    return Outbox(redis)


async def create(log: Log, **options: Any) -> str:
    return (await log.create({}, webhook=URL, **options)).stream_id


async def ended(redis: Redis, log: Log) -> str:
    """A stream that its worker has completed."""
    stream_id = await create(log)
    claim = await claim_one(redis)
    await append(log, claim, 0, END)
    return stream_id


async def waiting(redis: Redis) -> set[str]:
    return {stream_id.decode() for stream_id in await redis.zrange(keys.WEBHOOKS, 0, -1)}


async def by_its_worker(redis: Redis, log: Log, _: str) -> None:
    claim = await claim_one(redis)
    await append(log, claim, 0, END[:1])
    assert await waiting(redis) == set()
    await append(log, claim, 1, END[1:])


async def by_a_cancel(redis: Redis, log: Log, stream_id: str) -> None:
    await log.cancel(stream_id)


async def by_a_sweep(redis: Redis, log: Log, stream_id: str) -> None:
    await claim_one(redis)
    await redis.zadd(keys.LEASES, {stream_id: 0})
    await make_claims(redis, max_attempts=1).sweep()


async def by_a_hand_over(redis: Redis, log: Log, _: str) -> None:
    claim = await claim_one(redis)
    await append(log, claim, 0, END[:1])
    await make_claims(redis).hand_over(claim)


@pytest.mark.parametrize(
    ("end", "kind", "data"),
    [
        (by_its_worker, COMPLETED, {"chunks": 1}),
        (by_a_cancel, CANCELLED, {}),
        (by_a_sweep, FAILED, INTERRUPTED),
        (by_a_hand_over, FAILED, INTERRUPTED),
    ],
)
async def test_whoever_ends_a_stream_puts_it_into_the_outbox_and_not_before(
    redis: Redis,
    log: Log,
    outbox: Outbox,
    end: Callable[[Redis, Log, str], Awaitable[None]],
    kind: str,
    data: dict[str, Any],
) -> None:
    stream_id = await create(log, recovery="fail")
    assert await waiting(redis) == set()
    await end(redis, log, stream_id)
    state = await log.state(stream_id)
    assert state.ended_ms is not None
    [delivery] = await outbox.take(9)
    assert 59_000 < delivery.left_ms <= 60_000
    expected = Delivery(stream_id, URL, 1, delivery.left_ms, state.ended_ms, kind, to_json(data))
    assert delivery == expected


async def test_a_stream_without_a_webhook_never_comes_into_it(redis: Redis, log: Log) -> None:
    stream_id = (await log.create({})).stream_id
    await log.cancel(stream_id)
    assert await waiting(redis) == set()


async def test_what_is_taken_is_left_to_another_when_the_lease_ends(
    redis: Redis, log: Log, outbox: Outbox
) -> None:
    stream_id = await ended(redis, log)
    assert [delivery.number for delivery in await outbox.take(9)] == [1]
    assert await outbox.take(9) == []
    assert 0 < LEASE_SECONDS * 1000 - await due_in_ms(redis, stream_id) < 5000
    await make_due(redis, stream_id)
    assert [delivery.number for delivery in await outbox.take(9)] == [2]


async def test_no_more_are_taken_than_wanted_and_the_longest_waiting_first(
    redis: Redis, log: Log, outbox: Outbox
) -> None:
    ids = [await ended(redis, log) for _ in range(3)]
    for number, stream_id in enumerate(ids):
        await redis.zadd(keys.WEBHOOKS, {stream_id: 3 - number})
    assert [delivery.stream_id for delivery in await outbox.take(2)] == [ids[2], ids[1]]
    assert [delivery.stream_id for delivery in await outbox.take(2)] == [ids[0]]


async def test_what_is_settled_is_not_told_again_and_its_url_is_forgotten(
    redis: Redis, log: Log, outbox: Outbox
) -> None:
    stream_id = await ended(redis, log)
    await outbox.take(9)
    for _ in range(2):
        await outbox.settle(stream_id)
        await outbox.postpone(stream_id, 0)
        assert await waiting(redis) == set()
    assert b"webhook" not in await hash_of(redis, keys.state(stream_id))
    assert (await log.state(stream_id)).status == COMPLETED


async def test_an_end_that_is_written_once_more_is_not_told_once_more(
    redis: Redis, log: Log, outbox: Outbox
) -> None:
    stream_id = await create(log)
    claim = await claim_one(redis)
    await append(log, claim, 0, END)
    await outbox.settle(stream_id)
    await append(log, claim, 0, END)
    await log.cancel(stream_id)
    assert await waiting(redis) == set()


async def test_what_is_postponed_is_due_in_so_many_seconds(
    redis: Redis, log: Log, outbox: Outbox
) -> None:
    stream_id = await ended(redis, log)
    await outbox.take(9)
    await outbox.postpone(stream_id, 7.5)
    assert 0 <= 7500 - await due_in_ms(redis, stream_id) < 5000
    assert await outbox.take(9) == []
    await outbox.postpone(stream_id, 0)
    assert [delivery.stream_id for delivery in await outbox.take(9)] == [stream_id]


@pytest.mark.parametrize("taken", [False, True])
async def test_nobody_is_told_of_what_is_erased(
    redis: Redis, log: Log, outbox: Outbox, taken: bool
) -> None:
    stream_id = await ended(redis, log)
    if taken:
        await outbox.take(9)
    await log.erase(stream_id)
    assert await waiting(redis) == set()
    await outbox.postpone(stream_id, 0)
    assert await outbox.take(9) == []
    await outbox.settle(stream_id)
    assert set(await redis.keys()) <= {keys.WAKE.encode(), keys.ENDED.encode()}


@pytest.mark.parametrize("parts", [("log", "state"), ("log",), ("state",)])
async def test_what_has_expired_leaves_the_outbox_and_does_not_come_back(
    redis: Redis, log: Log, outbox: Outbox, parts: tuple[str, ...]
) -> None:
    stream_id = await ended(redis, log)
    gone = [getattr(keys, part)(stream_id) for part in parts]
    await redis.delete(*gone)
    assert await outbox.take(9) == []
    assert await waiting(redis) == set()
    assert not await redis.exists(*gone)


async def test_what_has_expired_leaves_the_outbox_though_nobody_takes_from_it(
    redis: Redis, log: Log
) -> None:
    expired = [await ended(redis, log) for _ in range(25)]
    there = await ended(redis, log)
    await redis.delete(*(keys.state(stream_id) for stream_id in expired))
    claims = make_claims(redis)

    async def all_have_left() -> bool:
        await claims.sweep()
        return await waiting(redis) == {there}

    await until(all_have_left)


async def test_a_full_memory_does_not_stop_it(redis: Redis, log: Log, outbox: Outbox) -> None:
    stream_id = await ended(redis, log)
    await redis.config_set("maxmemory", 1)
    try:
        assert [delivery.stream_id for delivery in await outbox.take(9)] == [stream_id]
        await outbox.settle(stream_id)
    finally:
        await redis.config_set("maxmemory", 0)
    assert await waiting(redis) == set()


async def hash_of(redis: Any, key: str) -> dict[bytes, bytes]:
    found: dict[bytes, bytes] = await redis.hgetall(key)
    return found
