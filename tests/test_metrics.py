"""What an operator watches, on real processes' parts and a real Redis."""

import math
from collections import Counter
from itertools import pairwise
from typing import Any

import httpx2
import pytest
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families
from redis.asyncio import Redis
from redis.exceptions import ConnectionError as RedisConnectionError

from relay import keys
from relay.errors import FAILURE_CODES, UPSTREAM_CODES
from relay.ids import new_stream_id
from relay.log import ALIVE_SECONDS
from relay.settings import Settings
from tests.conftest import ask, changed, make_claims, running_api, running_worker, until, watch

SHARED = {
    "relay_queued",
    "relay_oldest_queued_seconds",
    "relay_running",
    "relay_webhooks",
    "relay_worker_silent_seconds",
    "relay_workers",
    "relay_ended_total",
    "relay_first_chunk_seconds_count",
    "relay_answer_seconds_count",
    "relay_upstream_retries_total",
}


async def families(api: httpx2.AsyncClient) -> list[Metric]:
    response = await api.get("/metrics")
    response.raise_for_status()
    return list(text_string_to_metric_families(response.text))


async def told(api: httpx2.AsyncClient) -> dict[str, float]:
    samples = [sample for family in await families(api) for sample in family.samples]
    return {sample.name: sample.value for sample in samples}


async def ends(api: httpx2.AsyncClient) -> dict[tuple[str, str], float]:
    """Kind of terminal event and code -> how many streams ended so, without those of which none."""
    [family] = [family for family in await families(api) if family.name == "relay_ended"]
    assert family.type == "counter"
    named = {(sample.labels["kind"], sample.labels["code"]) for sample in family.samples}
    # Also before the first: no rate knows of one that begins at 1.
    failures = {("failed", code) for code in FAILURE_CODES}
    assert named == {("completed", ""), ("cancelled", "")} | failures
    return {
        (sample.labels["kind"], sample.labels["code"]): sample.value
        for sample in family.samples
        if sample.value
    }


async def test_what_waits_and_what_runs_is_told_by_every_process(
    settings: Settings, redis: Redis
) -> None:
    async with running_api(changed(settings, queue_limit=7)) as one, running_api(settings) as two:
        for _ in range(3):
            await ask(one)
        [claim] = await make_claims(redis).claim(1)
        await redis.zadd(keys.WEBHOOKS, {"somebody": 1})
        [(first, score)] = await redis.zrange(keys.QUEUE, 0, 0, withscores=True)
        await redis.zadd(keys.QUEUE, {first: score - 60_000})
        for api in (one, two):
            seen = await told(api)
            assert (seen["relay_queued"], seen["relay_running"]) == (2, 1)
            assert seen["relay_oldest_queued_seconds"] >= 60
            assert seen["relay_webhooks"] == 1
        assert (await told(one))["relay_queue_limit"] == 7
        await make_claims(redis).hand_over(claim)


async def test_an_empty_queue_has_no_oldest(settings: Settings) -> None:
    async with running_api(settings) as api:
        seen = await told(api)
    assert (seen["relay_queued"], seen["relay_oldest_queued_seconds"]) == (0, 0)
    assert (seen["relay_redis_up"], seen["relay_draining"]) == (1, 0)


async def test_the_ends_of_all_streams_are_counted_by_their_codes_whoever_writes_them(
    settings: Settings, redis: Redis
) -> None:
    async with running_api(settings) as api, running_worker(settings) as worker:
        assert await ends(api) == {}
        scripts: list[dict[str, Any]] = [
            {"chunks": 1},
            {"chunks": 1},
            {"status": 400},
            {"status": 401},
        ]
        for script in scripts:
            await watch(api, await ask(api, **script))
        worker.allow_pick_jobs = False
        waiting = await ask(api)
        for _ in range(2):
            await api.post(f"/streams/{waiting}/cancel")
        assert await ends(api) == {
            ("completed", ""): 2,
            ("failed", "upstream_refused"): 1,
            ("failed", "upstream_denied"): 1,
            ("cancelled", ""): 1,
        }


async def test_an_answer_that_was_tried_too_often_counts_as_failed(
    settings: Settings, redis: Redis
) -> None:
    async with running_api(settings) as api:
        await ask(api)
        claims = make_claims(redis, lease_ms=1, max_attempts=1)
        await claims.claim(1)

        async def swept() -> bool:
            return bool(await claims.sweep())

        await until(swept)
        assert await ends(api) == {("failed", "interrupted"): 1}


async def took(api: httpx2.AsyncClient, name: str) -> tuple[dict[str, float], float]:
    """Bound -> how many streams took no longer; the seconds of all together."""
    [family] = [family for family in await families(api) if family.name == f"relay_{name}_seconds"]
    assert family.type == "histogram"
    within = {each.labels["le"]: each.value for each in family.samples if each.labels}
    rest = {each.name.removeprefix(family.name): each.value for each in family.samples}
    assert rest["_count"] == within["+Inf"]
    return within, rest["_sum"]


async def test_how_long_streams_took_is_told_by_every_process(
    settings: Settings, redis: Redis
) -> None:
    async with running_api(settings) as one, running_api(settings) as two:
        for name in ("first_chunk", "answer"):
            within, seconds = await took(one, name)
            assert set(within.values()) == {seconds} == {0}
        async with running_worker(settings):
            for _ in range(2):
                await watch(one, await ask(one, chunks=1))
        waits = await ask(one)
        await one.post(f"/streams/{waits}/cancel")
        for name, count in {"first_chunk": 2, "answer": 3}.items():
            within, seconds = await took(one, name)
            assert (within, seconds) == await took(two, name)
            assert within["+Inf"] == count
            assert seconds > 0
            assert list(within)[:3] == ["0.25", "0.5", "1.0"]
            assert all(fewer <= more for fewer, more in pairwise(within.values()))


async def retries(api: httpx2.AsyncClient) -> dict[str, float]:
    """Code -> how often a worker asked the upstream again, without those of which never."""
    [family] = [each for each in await families(api) if each.name == "relay_upstream_retries"]
    assert family.type == "counter"
    assert {sample.labels["code"] for sample in family.samples} == UPSTREAM_CODES
    return {sample.labels["code"]: sample.value for sample in family.samples if sample.value}


async def test_how_often_workers_asked_the_upstream_again_is_told_by_every_process(
    settings: Settings,
) -> None:
    async with running_api(settings) as one, running_api(settings) as two:
        assert await retries(one) == {}
        async with running_worker(settings):
            for status, times in {429: 2, 503: 1}.items():
                script = {"status": status, "status_times": times, "key": str(status)}
                await watch(one, await ask(one, chunks=1, retry_after_ms=1, **script))
            for api in (one, two):

                async def told_all(api: httpx2.AsyncClient = api) -> bool:
                    counts = {"upstream_rate_limited": 2, "upstream_unavailable": 1}
                    return await retries(api) == counts

                await until(told_all)


async def test_it_is_told_how_long_no_worker_has_given_a_sign_of_life(
    settings: Settings, redis: Redis
) -> None:
    async with running_api(settings) as api:
        assert (await told(api))["relay_worker_silent_seconds"] == math.inf
        await make_claims(redis).sweep()
        assert (await told(api))["relay_worker_silent_seconds"] < 60
        swept = await redis.get(keys.SWEPT)
        assert swept is not None
        await redis.set(keys.SWEPT, int(swept) - 60_000)
        assert (await told(api))["relay_worker_silent_seconds"] >= 60


async def test_workers_are_counted_until_they_fall_silent(settings: Settings, redis: Redis) -> None:
    async with running_api(settings) as api:
        assert (await told(api))["relay_workers"] == 0
        for name in ("one", "two", "two", "three"):
            await make_claims(redis, name).sweep()
        assert (await told(api))["relay_workers"] == 3
        for name, seconds in {"one": ALIVE_SECONDS, "two": 61}.items():
            sign = await redis.zscore(keys.WORKERS, name) or 0
            await redis.zadd(keys.WORKERS, {name: sign - 1000 * seconds})
        assert (await told(api))["relay_workers"] == 1
        await make_claims(redis, "three").sweep()
        assert await redis.zrange(keys.WORKERS, 0, -1) == [b"one", b"three"]


async def refused(api: httpx2.AsyncClient) -> Counter[str]:
    """Code -> how many requests of this process."""
    [family] = [family for family in await families(api) if family.name == "relay_refused"]
    return Counter({sample.labels["code"]: int(sample.value) for sample in family.samples})


async def test_requests_that_are_refused_are_counted_by_their_codes_on_every_api(
    settings: Settings, redis: Redis
) -> None:
    async with running_api(changed(settings, queue_limit=1)) as api:
        before = await refused(api)
        assert {"queue_full", "redis_away", "draining", "internal"} <= before.keys()
        await ask(api)
        await api.post("/chat", json={"messages": [{"role": "user", "content": "?"}]})
        await api.post("/v1/chat/completions", json={"model": "?"})
        await api.get(f"/streams/{new_stream_id()}")
        await api.get("/nowhere")
        assert await refused(api) - before == Counter(
            queue_full=1, invalid_request=1, stream_gone=1, not_found=1
        )


async def test_the_viewers_are_those_of_the_process_that_is_asked(settings: Settings) -> None:
    async with running_api(settings) as one, running_api(settings) as two:
        stream_id = await ask(one)
        async with one.sse(f"/streams/{stream_id}/events") as source:
            events = aiter(source)  # Let go of, it would close the connection.
            await anext(events)
            assert (await told(one))["relay_viewers"] == 1
            assert (await told(two))["relay_viewers"] == 0

        async def nobody() -> bool:
            return (await told(one))["relay_viewers"] == 0

        await until(nobody)


async def test_without_redis_the_rest_is_told(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def away(*_: object) -> Any:
        raise RedisConnectionError

    monkeypatch.setattr("relay.log.Log.load", away)
    async with running_api(settings) as api:
        seen = await told(api)
    assert not SHARED & seen.keys()
    assert seen["relay_viewers"] == 0
    assert seen["process_resident_memory_bytes"] > 0
