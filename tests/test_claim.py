import asyncio
import json
import os
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
from redis.asyncio import Redis
from redis.exceptions import RedisError
from redis.exceptions import TimeoutError as RedisTimeoutError

from cli.redis_server import RedisServer
from relay import keys
from relay.claim import BYTES_AT_ONCE, Claim, Claims, Released, emptied
from relay.connection import connect
from relay.errors import StreamLost
from relay.events import COMPLETED, FAILED, STARTED, TEXT, entry
from relay.log import JOB, Log, Recovery
from tests.conftest import append, ends, make_claims, make_log, set_state, until

REQUEST = {"messages": [{"role": "user", "content": "hi"}]}
BEGIN = [entry(STARTED, {"attempt": 1}), entry(TEXT, "a")]
END = [entry(COMPLETED, {})]


async def create(log: Log, count: int = 1) -> list[str]:
    return [(await log.create(REQUEST)).stream_id for _ in range(count)]


async def create_at(redis: Redis, log: Log, *times: int) -> list[str]:
    """Streams that came at these times, in ms."""
    ids = await create(log, len(times))
    for stream_id, time in zip(ids, times, strict=True):
        await set_state(redis, stream_id, "created_ms", time)
        await redis.zadd(keys.QUEUE, {stream_id: time})
    return ids


async def tries(redis: Any, stream_id: str) -> int:
    return int(await redis.hget(keys.state(stream_id), "tries"))


async def lapse(redis: Redis, claim: Claim) -> None:
    """As if the worker had not renewed for longer than its lease."""
    await redis.zadd(keys.LEASES, {claim.stream_id: 0}, xx=True)


async def write(log: Log, claim: Claim) -> None:
    await append(log, claim, 0, BEGIN)


async def places(redis: Redis) -> tuple[list[str], list[str]]:
    """Who stands in the queue, and who in the leases."""
    queue = await redis.zrange(keys.QUEUE, 0, -1)
    leases = await redis.zrange(keys.LEASES, 0, -1)
    return [each.decode() for each in queue], [each.decode() for each in leases]


async def test_the_leases_of_thousands_are_renewed_each_with_its_verdict(redis: Redis) -> None:
    log, claims = make_log(redis, queue_limit=10_000), make_claims(redis, queue_limit=10_000)
    for _ in range(4500):
        await log.create({"messages": []})
    held = await claims.claim(4500)
    await log.cancel(held[3000].stream_id)
    await redis.config_resetstat()
    verdicts = await claims.renew(held)
    calls = (await redis.info("commandstats"))["cmdstat_evalsha"]["calls"]
    assert calls > 4500 / 250, "while a long one runs, Redis does nothing else"
    assert verdicts.index("cancel") == 3000
    assert verdicts.count("held") == len(verdicts) - 1 == 4499


async def test_a_claim_carries_the_request_and_arqs_job(log: Log, claims: Claims) -> None:
    [stream_id] = await create(log)
    [claim] = await claims.claim(5)
    assert (claim.stream_id, claim.ordinal) == (stream_id, 1)
    assert json.loads(claim.request) == REQUEST
    job = json.loads(claim.job)
    assert (job["f"], job["a"], job["k"]) == (JOB, [stream_id], {})


async def test_jobs_are_claimed_oldest_first(redis: Redis, log: Log, claims: Claims) -> None:
    third, first, second = await create_at(redis, log, 30, 10, 20)
    taken = [claim.stream_id for want in (2, 2) for claim in await claims.claim(want)]
    assert taken == [first, second, third]


@pytest.mark.parametrize(("waiting", "want", "given"), [(0, 1, 0), (3, 0, 0), (3, 2, 2), (2, 3, 2)])
async def test_no_more_is_claimed_than_wanted(
    log: Log, claims: Claims, waiting: int, want: int, given: int
) -> None:
    await create(log, waiting)
    assert len(await claims.claim(want)) == given


async def test_a_claim_takes_jobs_of_so_many_bytes_and_one_at_least(
    log: Log, claims: Claims
) -> None:
    sizes = [BYTES_AT_ONCE * 2, 10, BYTES_AT_ONCE // 2, BYTES_AT_ONCE // 2, 10]
    ids = [(await log.create({"text": "x" * size})).stream_id for size in sizes]
    taken, none_left = [], False
    while not none_left:
        got = await claims.claim(9)
        taken.append([claim.stream_id for claim in got])
        none_left = emptied(got, 9)
    assert taken == [ids[:1], ids[1:4], ids[4:]]


async def test_two_workers_never_hold_the_same_job(redis: Redis, log: Log) -> None:
    ids = await create(log, 40)
    workers = [make_claims(redis, f"w{number}") for number in range(4)]
    taken = await asyncio.gather(*(worker.claim(3) for worker in workers * 5))
    held = [claim.stream_id for claims in taken for claim in claims]
    assert sorted(held) == sorted(ids)
    queue, leases = await places(redis)
    assert (queue, sorted(leases)) == ([], sorted(held))


async def test_no_two_claims_have_one_owner_and_stream(
    redis: Redis, log: Log, claims: Claims
) -> None:
    await create(log)
    owners = set()
    for _ in range(3):
        [claim] = await claims.claim(1)
        owners.add(claim.owner)
        await claims.hand_over(claim)
    assert len(owners) == 3


async def test_attempt_numbers_rise_and_claims_are_counted(
    redis: Redis, log: Log, claims: Claims
) -> None:
    await create(log)
    seen = []
    for _ in range(3):
        [claim] = await claims.claim(1)
        seen.append((claim.attempt, claim.ordinal))
        await claims.hand_over(claim)
    attempts, ordinals = zip(*seen, strict=True)
    assert ordinals == (1, 2, 3)
    assert sorted(set(attempts)) == list(attempts)


@pytest.mark.parametrize("count", [1, 3])
async def test_an_attempt_number_is_not_handed_out_again_though_redis_forgot_it(
    redis: Redis, log: Log, claims: Claims, count: int
) -> None:
    [stream_id] = await create(log)
    [last] = await claims.claim(1)
    for _ in range(count - 1):
        await claims.hand_over(last)
        [last] = await claims.claim(1)
    await redis.zrem(keys.LEASES, stream_id)
    await set_state(redis, stream_id, "attempt", 0)
    await redis.zadd(keys.QUEUE, {stream_id: 1})
    # Redis comes back from such a loss after a hundredth of a second for each claim, or later.
    born = int((await log.state(stream_id)).created_ms)
    await set_state(redis, stream_id, "created_ms", born - 10 * count)
    [anew] = await claims.claim(1)
    assert anew.attempt > last.attempt


async def test_a_lease_ends_when_its_time_is_up_by_redis_clock(redis: Redis, log: Log) -> None:
    await create(log)
    await make_claims(redis, lease_ms=5_000).claim(1)
    [(_, until)] = await redis.zrange(keys.LEASES, 0, -1, withscores=True)
    seconds, micros = await redis.time()
    assert 4_000 < until - (seconds * 1000 + micros / 1000) <= 5_000


# Renew.


async def test_a_lease_that_is_renewed_does_not_lapse(redis: Redis, log: Log) -> None:
    claims = make_claims(redis)
    [stream_id] = await create(log)
    [claim] = await claims.claim(1)
    await lapse(redis, claim)
    assert await claims.renew([claim]) == ["held"]
    assert await claims.sweep() == []
    assert await places(redis) == ([], [stream_id])


@pytest.fixture
async def expiring(redis: Redis, log: Log) -> list[str]:
    """The keys of a stream that waits, all of which expire soon."""
    [stream_id] = await create(log)
    names = [keys.log(stream_id), keys.state(stream_id), keys.job(stream_id)]
    for key in names:
        await redis.pexpire(key, 10_000)
    return names


async def test_a_claim_keeps_the_stream_from_expiring(redis: Redis, expiring: list[str]) -> None:
    await make_claims(redis, open_ms=60_000).claim(1)
    for key in expiring:
        assert await redis.pttl(key) > 50_000


async def test_a_renewal_keeps_the_stream_from_expiring(redis: Redis, expiring: list[str]) -> None:
    [claim] = await make_claims(redis, open_ms=10_000).claim(1)
    await make_claims(redis, open_ms=60_000).renew([claim])
    for key in expiring:
        assert await redis.pttl(key) > 50_000


async def test_each_renewal_has_its_own_verdict(redis: Redis, log: Log) -> None:
    claims, other = make_claims(redis, "w"), make_claims(redis, "other")
    await create(log, 6)
    held, cancel, ended, erased, handed, taken = await claims.claim(6)
    await log.cancel(cancel.stream_id)
    await append(log, ended, 0, BEGIN + END)
    await log.erase(erased.stream_id)
    await claims.hand_over(taken)
    [again] = await other.claim(1)
    await claims.hand_over(handed)
    verdicts = await claims.renew([held, cancel, ended, erased, handed, taken])
    assert verdicts == ["held", "cancel", "lost", "lost", "lost", "lost"]
    assert await other.renew([again]) == ["held"]
    queue, leases = await places(redis)
    assert queue == [handed.stream_id]
    assert set(leases) == {held.stream_id, cancel.stream_id, taken.stream_id}


async def test_to_renew_nothing_is_allowed(claims: Claims) -> None:
    assert await claims.renew([]) == []


async def test_who_lost_a_job_can_neither_renew_nor_write_nor_hand_over(
    redis: Redis, log: Log
) -> None:
    one, two = make_claims(redis, "one"), make_claims(redis, "two")
    [stream_id] = await create(log)
    [lost] = await one.claim(1)
    await lapse(redis, lost)
    assert await two.sweep() == [(stream_id, "", lost.owner)]
    assert await one.renew([lost]) == ["lost"]
    [held] = await two.claim(1)
    until = await redis.zscore(keys.LEASES, stream_id)

    assert await one.renew([lost]) == ["lost"]
    with pytest.raises(StreamLost):
        await write(log, lost)
    await one.hand_over(lost)

    assert await redis.zscore(keys.LEASES, stream_id) == until
    assert await two.renew([held]) == ["held"]
    await write(log, held)


# Back into the queue.


async def test_a_lapsed_lease_is_swept_back_to_its_old_place(
    redis: Redis, log: Log, claims: Claims
) -> None:
    first, second = await create_at(redis, log, 10, 20)
    [claim] = await claims.claim(1)
    assert await claims.sweep() == []
    await lapse(redis, claim)
    assert ends(await claims.sweep()) == [(first, "")]
    assert await places(redis) == ([first, second], [])
    assert await claims.sweep() == []


async def test_all_that_lapsed_is_swept_in_time(redis: Redis, log: Log) -> None:
    log, claims = make_log(redis, queue_limit=300), make_claims(redis, queue_limit=300)
    ids = await create(log, 250)
    for claim in await claims.claim(300):
        await lapse(redis, claim)
    swept = [each.stream_id for _ in range(3) for each in await claims.sweep()]
    assert sorted(swept) == sorted(ids)


async def test_a_hand_over_costs_no_try_and_keeps_the_place(
    redis: Redis, log: Log, claims: Claims
) -> None:
    first, second = await create_at(redis, log, 10, 20)
    [claim] = await claims.claim(1)
    await claims.hand_over(claim)
    assert await places(redis) == ([first, second], [])
    [again] = await claims.claim(1)
    assert (again.stream_id, again.ordinal) == (first, 2)
    assert await tries(redis, first) == 1


async def test_a_claim_whose_answer_did_not_come_in_time_costs_its_jobs_no_try(
    redis: Redis, log: Log, redis_server: RedisServer
) -> None:
    first, second, third = await create_at(redis, log, 10, 20, 30)
    hasty = connect(redis_server.url, reply_seconds=0.1)
    claims, others = make_claims(hasty), make_claims(redis, "other")
    [kept] = await claims.claim(1)
    [elsewhere] = await others.claim(1)
    process = (await redis.info("server"))["process_id"]
    os.kill(process, signal.SIGSTOP)
    try:
        with pytest.raises(RedisTimeoutError):
            await claims.claim(1)
    finally:
        os.kill(process, signal.SIGCONT)

    async def taken() -> bool:
        return (await places(redis))[0] == []

    await until(taken)
    [again] = await claims.claim(5)
    assert (again.stream_id, await tries(redis, third)) == (third, 1)
    held = {claim.stream_id for claim in (kept, elsewhere)}
    assert held == {first, second}
    assert await claims.renew([kept]) == await others.renew([elsewhere]) == ["held"]
    await hasty.aclose()


async def test_to_hand_over_twice_changes_nothing(redis: Redis, log: Log, claims: Claims) -> None:
    [stream_id] = await create(log)
    [claim] = await claims.claim(1)
    await claims.hand_over(claim)
    await claims.hand_over(claim)
    assert await places(redis) == ([stream_id], [])
    await claims.claim(1)
    assert await tries(redis, stream_id) == 1


async def test_what_has_ended_is_neither_handed_over_nor_swept(
    redis: Redis, log: Log, claims: Claims
) -> None:
    await create(log)
    [claim] = await claims.claim(1)
    await append(log, claim, 0, BEGIN + END)
    await claims.hand_over(claim)
    await redis.zadd(keys.LEASES, {claim.stream_id: 0})
    assert await claims.sweep() == []
    assert await places(redis) == ([], [])


async def test_what_expired_under_its_lease_is_swept_away(
    redis: Redis, log: Log, claims: Claims
) -> None:
    await create(log)
    [claim] = await claims.claim(1)
    await redis.delete(keys.state(claim.stream_id))
    await lapse(redis, claim)
    assert await claims.sweep() == []
    assert await places(redis) == ([], [])


@pytest.mark.parametrize("gone", ["expired", "job expired", "job left", "erased", "ended"])
async def test_what_nobody_waits_for_is_not_claimed(
    redis: Redis, log: Log, claims: Claims, gone: str
) -> None:
    [stream_id] = await create(log)
    match gone:
        case "expired":
            await redis.delete(keys.log(stream_id), keys.state(stream_id), keys.job(stream_id))
        case "job expired":
            await redis.delete(keys.job(stream_id))
        case "job left":
            await redis.delete(keys.log(stream_id), keys.state(stream_id))
        case "erased":
            await log.erase(stream_id)
        case "ended":
            await log.cancel(stream_id)
    await redis.zadd(keys.QUEUE, {stream_id: 1})
    [alive] = await create(log)
    assert [claim.stream_id for claim in await claims.claim(1)] == [alive]
    assert await places(redis) == ([], [alive])


async def test_what_writes_long_can_still_be_taken_over(redis: Redis) -> None:
    """Its job must not expire before its log does: nobody could then end the stream."""
    log, claims = make_log(redis, open_ms=60_000), make_claims(redis, open_ms=60_000)
    [stream_id] = await create(log)
    [claim] = await claims.claim(1)
    for key in (keys.log(stream_id), keys.state(stream_id), keys.job(stream_id)):
        await redis.pexpire(key, 10_000)
    await write(log, claim)
    assert await redis.pttl(keys.job(stream_id)) >= await redis.pttl(keys.state(stream_id)) - 1_000


# What nobody takes in time.


def impatient(redis: Redis) -> tuple[Log, Claims]:
    """A stream of theirs may wait for 20 seconds."""
    log = make_log(redis, open_ms=80_000, retention_ms=60_000)
    return log, make_claims(redis, open_ms=80_000, retention_ms=60_000)


async def waits_since(redis: Redis, stream_id: str, waited_ms: int) -> None:
    """As if it had come then, or had been let go by its last owner."""
    await redis.zadd(keys.QUEUE, {stream_id: 1})
    for key in (keys.log(stream_id), keys.state(stream_id), keys.job(stream_id)):
        await redis.pexpire(key, 80_000 - waited_ms)


async def test_what_waits_for_too_long_ends_as_failed_and_is_kept(redis: Redis) -> None:
    log, claims = impatient(redis)
    stream_id = (await log.create(REQUEST, webhook="https://x")).stream_id
    await waits_since(redis, stream_id, 20_000)
    assert await claims.end_overdue() == [stream_id]
    assert await claims.end_overdue() == []
    end = (await log.read(stream_id))[-1]
    assert (end.kind, end.value()["code"]) == (FAILED, "queue_timeout")
    assert await places(redis) == ([], [])
    assert await claims.claim(1) == []
    assert 59_000 < await log.remaining_ms(stream_id) <= 60_000
    assert await redis.zrange(keys.WEBHOOKS, 0, -1) == [stream_id.encode()]
    assert (await log.load()).ended[FAILED, "queue_timeout"] == 1


async def test_what_may_still_wait_stays_in_the_queue_however_long_ago_it_came(
    redis: Redis,
) -> None:
    log, claims = impatient(redis)
    [stream_id] = await create(log)
    await waits_since(redis, stream_id, 19_000)
    assert await claims.end_overdue() == []
    assert await places(redis) == ([stream_id], [])


async def test_many_that_may_still_wait_hide_none_that_has_waited_too_long(redis: Redis) -> None:
    _, claims = impatient(redis)
    log = make_log(redis, open_ms=80_000, retention_ms=60_000, queue_limit=200)
    *handed_over, last = await create(log, 150)
    for stream_id in handed_over:
        await waits_since(redis, stream_id, 1_000)
    await waits_since(redis, last, 21_000)
    await redis.zadd(keys.QUEUE, {last: 2})
    assert await claims.end_overdue() == [last]


async def test_all_that_has_waited_too_long_is_ended_in_time(redis: Redis) -> None:
    _, claims = impatient(redis)
    log = make_log(redis, open_ms=80_000, retention_ms=60_000, queue_limit=200)
    ids = await create(log, 150)
    for stream_id in ids:
        await waits_since(redis, stream_id, 21_000)
    ended = [await claims.end_overdue() for _ in range(3)]
    assert [len(each) for each in ended] == [100, 50, 0]
    assert {each for part in ended for each in part} == set(ids)


@pytest.mark.parametrize("gone", ["expired", "ended"])
async def test_what_nobody_waits_for_any_more_leaves_the_queue_in_silence(
    redis: Redis, gone: str
) -> None:
    log, claims = impatient(redis)
    [stream_id] = await create(log)
    if gone == "expired":
        await redis.delete(keys.log(stream_id), keys.state(stream_id), keys.job(stream_id))
    else:
        await log.cancel(stream_id)
    await redis.zadd(keys.QUEUE, {stream_id: 1})
    assert await claims.end_overdue() == []
    assert await places(redis) == ([], [])


async def begun(log: Log, claims: Claims, recovery: Recovery) -> Claim:
    """A claim that has written, so that viewers know of it."""
    await log.create(REQUEST, recovery=recovery)
    [claim] = await claims.claim(1)
    await write(log, claim)
    return claim


async def test_what_must_not_begin_anew_ends_as_interrupted_when_its_worker_dies(
    redis: Redis, log: Log, claims: Claims
) -> None:
    claim = await begun(log, claims, "fail")
    await lapse(redis, claim)
    assert ends(await claims.sweep()) == [(claim.stream_id, FAILED)]
    end = (await log.read(claim.stream_id))[-1]
    assert (end.kind, end.value()["code"]) == (FAILED, "interrupted")
    assert await places(redis) == ([], [])


async def test_what_must_not_begin_anew_ends_as_interrupted_when_it_is_handed_over(
    redis: Redis, log: Log, claims: Claims
) -> None:
    claim = await begun(log, claims, "fail")
    await claims.hand_over(claim)
    assert (await log.read(claim.stream_id))[-1].value()["code"] == "interrupted"
    assert await places(redis) == ([], [])


async def test_what_has_not_begun_is_begun_by_another_whatever_was_asked(
    redis: Redis, log: Log, claims: Claims
) -> None:
    """Nobody has seen anything of it yet."""
    await log.create(REQUEST, recovery="fail")
    [claim] = await claims.claim(1)
    await lapse(redis, claim)
    assert ends(await claims.sweep()) == [(claim.stream_id, "")]


async def test_what_was_tried_often_enough_ends_as_interrupted(redis: Redis, log: Log) -> None:
    claims = make_claims(redis, max_attempts=2)
    [stream_id] = await create(log)
    for end in ("", FAILED):
        [claim] = await claims.claim(1)
        await lapse(redis, claim)
        assert ends(await claims.sweep()) == [(stream_id, end)]
        with pytest.raises(StreamLost):
            await write(log, claim)
    assert await log.cancel(stream_id) == FAILED


async def test_an_outage_of_redis_costs_nobody_a_lease(
    redis: Redis, log: Log, claims: Claims
) -> None:
    """In it nobody could renew, so nobody is swept before there was time to."""
    await create(log)
    [claim] = await claims.claim(1)
    assert await claims.sweep() == []
    await lapse(redis, claim)
    await swept_ago(redis, 2_600)
    assert await claims.sweep() == []
    assert await claims.renew([claim]) == ["held"]


async def test_who_died_in_an_outage_of_redis_is_swept_a_lease_after_it(
    redis: Redis, log: Log
) -> None:
    claims = make_claims(redis, lease_ms=100)
    [stream_id] = await create(log)
    [claim] = await claims.claim(1)
    await lapse(redis, claim)
    await swept_ago(redis, 60)
    swept: list[Released] = []

    async def found() -> bool:
        swept.extend(await claims.sweep())
        return bool(swept)

    await until(found)
    assert ends(swept) == [(stream_id, "")]


async def test_late_sweeps_do_not_keep_a_dead_workers_lease_for_ever(
    redis: Redis, log: Log, claims: Claims
) -> None:
    [stream_id] = await create(log)
    await claims.claim(1)
    await claims.sweep()
    swept: list[Released] = []
    for _ in range(4):
        await pass_without_a_sweep(redis, 3_000)
        swept += await claims.sweep()
    assert ends(swept) == [(stream_id, "")]


async def test_a_clock_that_is_set_back_keeps_no_dead_workers_lease(
    redis: Redis, log: Log, claims: Claims
) -> None:
    [stream_id] = await create(log)
    await claims.claim(1)
    await claims.sweep()
    await pass_without_a_sweep(redis, -3_600_000)
    swept = await claims.sweep()
    await pass_without_a_sweep(redis, 2_000)
    swept += await claims.sweep()
    await pass_without_a_sweep(redis, 3_100)
    swept += await claims.sweep()
    assert ends(swept) == [(stream_id, "")]


async def pass_without_a_sweep(redis: Redis, milliseconds: int) -> None:
    """Redis' clock cannot be turned, so what it is compared with is."""
    mark = int(await redis.get(keys.SWEPT) or 0)
    await redis.set(keys.SWEPT, mark - milliseconds)
    for stream_id, end_ms in await redis.zrange(keys.LEASES, 0, -1, withscores=True):
        await redis.zadd(keys.LEASES, {stream_id: end_ms - milliseconds})


async def swept_ago(redis: Redis, milliseconds: int) -> None:
    seconds, micros = await redis.time()
    await redis.set(keys.SWEPT, seconds * 1000 + micros // 1000 - milliseconds)


# A full memory.


@pytest.fixture
async def full(redis: Redis) -> AsyncIterator[Callable[[], Awaitable[Any]]]:
    """Call it to fill Redis' memory; it is empty again after the test."""

    async def fill() -> None:
        await redis.config_set("maxmemory", 1)

    yield fill
    await redis.config_set("maxmemory", 0)


async def test_with_its_memory_full_redis_still_renews_leases(
    redis: Redis, log: Log, claims: Claims, full: Callable[[], Awaitable[Any]]
) -> None:
    await create(log)
    [claim] = await claims.claim(1)
    await lapse(redis, claim)
    await full()
    assert await claims.renew([claim]) == ["held"]
    [(_, until)] = await redis.zrange(keys.LEASES, 0, -1, withscores=True)
    assert until > 1


async def test_with_its_memory_full_redis_still_sweeps(
    redis: Redis, log: Log, claims: Claims, full: Callable[[], Awaitable[Any]]
) -> None:
    [stream_id] = await create(log)
    [claim] = await claims.claim(1)
    await lapse(redis, claim)
    await full()
    assert ends(await claims.sweep()) == [(stream_id, "")]


async def test_with_its_memory_full_redis_takes_no_new_stream_and_all_that_stand_to_their_end(
    redis: Redis, log: Log, claims: Claims, full: Callable[[], Awaitable[Any]]
) -> None:
    ids = await create(log, 2)
    [first] = await claims.claim(1)
    await full()
    with pytest.raises(RedisError, match="maxmemory"):
        await create(log)
    [second] = await claims.claim(1)
    for claim in first, second:
        await write(log, claim)
        await append(log, claim, len(BEGIN), [entry(COMPLETED, {})])
        assert (await log.state(claim.stream_id)).status == "completed"
    assert [first.stream_id, second.stream_id] == ids
    assert (await log.load()).running == 0
    assert await log.silent_seconds() > 0


async def test_with_its_memory_full_redis_loses_no_job_that_is_let_go(
    redis: Redis, log: Log, claims: Claims, full: Callable[[], Awaitable[Any]]
) -> None:
    ids = await create(log, 2)
    first, second = await claims.claim(2)
    await full()
    await claims.hand_over(first)
    assert await log.cancel(first.stream_id) == "cancelled"
    assert await log.cancel(second.stream_id) == "cancelling"
    assert await places(redis) == ([], [second.stream_id])
    assert set(ids) == {first.stream_id, second.stream_id}


# Waking.


async def until_blocked(redis: Redis) -> None:
    while not (await redis.info("clients"))["blocked_clients"]:
        pass


@asynccontextmanager
async def waiting(claims: Claims, redis: Redis, url: str) -> AsyncIterator[None]:
    """Leaves when the worker that waits for a job inside has woken."""
    async with connect(url, reply_seconds=30) as patient, asyncio.timeout(5):
        wake = asyncio.create_task(claims.wait_for_job(patient, 20))
        await until_blocked(redis)
        yield
        await wake


async def test_a_worker_wakes_when_a_job_comes(
    redis: Redis, redis_server: RedisServer, log: Log, claims: Claims
) -> None:
    async with waiting(claims, redis, redis_server.url):
        await create(log)


@pytest.mark.parametrize("back", ["handed over", "swept"])
async def test_a_worker_wakes_when_a_job_comes_back(
    redis: Redis, redis_server: RedisServer, log: Log, claims: Claims, back: str
) -> None:
    await create(log)
    [claim] = await claims.claim(1)
    await redis.delete(keys.WAKE)
    async with waiting(claims, redis, redis_server.url):
        if back == "handed over":
            await claims.hand_over(claim)
        else:
            await lapse(redis, claim)
            await claims.sweep()


async def wakes(claims: Claims, url: str) -> None:
    """Returns when a worker that waits for a job from now on has woken."""
    async with connect(url, reply_seconds=30) as patient, asyncio.timeout(5):
        await claims.wait_for_job(patient, 20)


async def test_a_job_that_came_before_the_wait_wakes_too(
    redis_server: RedisServer, log: Log, claims: Claims
) -> None:
    await create(log)
    await wakes(claims, redis_server.url)


async def test_jobs_that_were_all_taken_wake_nobody(
    redis: Redis, redis_server: RedisServer, log: Log, claims: Claims
) -> None:
    await create(log, 3)
    assert len(await claims.claim(9)) == 3
    async with waiting(claims, redis, redis_server.url):
        await create(log)


@pytest.mark.parametrize(("most_bytes", "given"), [(BYTES_AT_ONCE, 2), (1, 1)])
async def test_jobs_that_were_left_wake_the_next(
    redis_server: RedisServer,
    log: Log,
    claims: Claims,
    monkeypatch: pytest.MonkeyPatch,
    most_bytes: int,
    given: int,
) -> None:
    monkeypatch.setattr("relay.claim.BYTES_AT_ONCE", most_bytes)
    await create(log, 3)
    assert len(await claims.claim(2)) == given
    await wakes(claims, redis_server.url)


async def test_a_wait_for_jobs_ends_by_itself(redis: Redis, claims: Claims) -> None:
    async with asyncio.timeout(5):
        await claims.wait_for_job(redis, 0.02)


async def test_a_redis_that_forgot_its_scripts_is_taught_again(
    redis: Redis, log: Log, claims: Claims
) -> None:
    await create(log)
    [claim] = await claims.claim(1)
    await redis.script_flush()
    assert await claims.renew([claim]) == ["held"]
    await write(log, claim)
