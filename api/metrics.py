"""What an operator watches: `GET /metrics`, as Prometheus reads it.

Queue, answers and webhooks are those of all processes, and the same from each; the rest is of the
one that is asked. Numbers alone: no id, no text.
"""

from collections.abc import Iterator, Mapping
from typing import NamedTuple

from fastapi import APIRouter, Response
from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Gauge,
    ProcessCollector,
    generate_latest,
)
from prometheus_client.metrics_core import CounterMetricFamily, Metric
from prometheus_client.registry import Collector
from redis.exceptions import RedisError

from api.counters import GIVEN_UP, REFUSED
from api.parts import Parts, PartsOfApp
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
        registry.register(_Endings(load.ended))
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


class _Endings(Collector):
    """A counter that Redis keeps; prometheus-client's own count in the process."""

    def __init__(self, counts: Mapping[tuple[str, str], int]) -> None:
        self._counts = counts

    def collect(self) -> Iterator[Metric]:
        labels = ["kind", "code"]
        ended = CounterMetricFamily("relay_ended", "Streams that have ended", labels=labels)
        for names, count in self._counts.items():
            ended.add_metric(names, count)
        yield ended
