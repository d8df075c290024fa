"""What an operator watches: `GET /metrics`, as Prometheus reads it.

Queue, answers and webhooks are those of all processes, and the same from each; the rest is of the
one that is asked. Numbers alone: no id, no text.
"""

from collections.abc import Iterator
from typing import NamedTuple

from fastapi import APIRouter, Response
from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Gauge,
    ProcessCollector,
    generate_latest,
)
from prometheus_client.metrics_core import CounterMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString
from redis.exceptions import RedisError

from api.counters import GIVEN_UP, REFUSED
from api.parts import Parts, PartsOfApp
from relay.durations import Histogram
from relay.log import Load

router = APIRouter()


class _Fact(NamedTuple):
    name: str
    what: str
    value: float


@router.get(
    "/metrics",
    summary="What to watch",
    response_class=Response,
    responses={200: {"content": {"text/plain": {}}, "description": "For Prometheus."}},
)
async def metrics(parts: PartsOfApp) -> Response:
    """Without Redis, what only it knows is left out."""
    registry = CollectorRegistry()
    ProcessCollector(registry=registry)
    registry.register(REFUSED)
    registry.register(GIVEN_UP)
    facts = [*_here(parts)]
    if (load := await _load(parts)) is not None:
        facts += _everywhere(load)
        registry.register(_Counts(load))
    for name, what, value in facts:
        Gauge(f"relay_{name}", what, registry=registry).set(value)
    return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)


def _here(parts: Parts) -> Iterator[_Fact]:
    yield _Fact("viewers", "Viewers of this process", sum(parts.hub.viewers().values()))
    yield _Fact("redis_up", "Whether this process has its connection", parts.hub.connected)
    yield _Fact("draining", "Whether this process lets its viewers go", parts.hub.draining)
    yield _Fact("queue_limit", "How many streams may wait", parts.settings.queue_limit)


async def _load(parts: Parts) -> Load | None:
    try:
        return await parts.log.load()
    except RedisError:
        return None


def _everywhere(load: Load) -> Iterator[_Fact]:
    yield _Fact("queued", "Streams that wait for a worker", load.queued)
    yield _Fact("oldest_queued_seconds", "Since the oldest of them was asked", load.oldest_seconds)
    yield _Fact("running", "Answers that a worker holds", load.running)
    yield _Fact("workers", "Workers that have just given a sign of life", load.workers)
    yield _Fact("webhooks", "Ended streams of which somebody is to be told", load.webhooks)
    yield _Fact("worker_silent_seconds", "Since a worker's sign of life", load.silent_seconds)


class _Counts(Collector):
    """What Redis counts; prometheus-client's own count in the process."""

    def __init__(self, load: Load) -> None:
        self._load = load

    def collect(self) -> Iterator[Metric]:
        labels = ["kind", "code"]
        ended = CounterMetricFamily("relay_ended", "Streams that have ended", labels=labels)
        for names, count in self._load.ended.items():
            ended.add_metric(names, count)
        yield ended
        what = "From the question to the first chunk, of streams that have ended"
        yield _histogram("first_chunk", what, self._load.first_chunk)
        what = "From the question to the end, of streams that have ended"
        yield _histogram("answer", what, self._load.answer)
        what = "Times that a worker asked the model service again"
        retries = CounterMetricFamily("relay_upstream_retries", what, labels=["code"])
        for code, count in self._load.retries.items():
            retries.add_metric([code], count)
        yield retries


def _histogram(name: str, what: str, took: Histogram) -> Metric:
    bounds = map(floatToGoString, took.within)
    buckets = list(zip(bounds, took.within.values(), strict=True))
    return HistogramMetricFamily(f"relay_{name}_seconds", what, buckets, took.seconds)
