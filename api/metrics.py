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
from redis.exceptions import RedisError

from api.parts import Parts, PartsOfApp

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
    """Gauges. Without Redis, those that only it knows are left out."""
    registry = CollectorRegistry()
    ProcessCollector(registry=registry)
    for name, what, value in [*_here(parts), *await _everywhere(parts)]:
        Gauge(f"relay_{name}", what, registry=registry).set(value)
    return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)


def _here(parts: Parts) -> Iterator[_Fact]:
    yield _Fact("viewers", "Viewers of this process", sum(parts.hub.viewers().values()))
    yield _Fact("redis_up", "Whether this process has its connection", parts.hub.connected)
    yield _Fact("draining", "Whether this process lets its viewers go", parts.hub.draining)
    yield _Fact("queue_limit", "How many streams may wait", parts.settings.queue_limit)


async def _everywhere(parts: Parts) -> list[_Fact]:
    if parts.hub.redis_away:
        return []  # Without waiting to find out again.
    try:
        load = await parts.log.load()
    except RedisError:
        return []
    return [
        _Fact("queued", "Streams that wait for a worker", load.queued),
        _Fact("oldest_queued_seconds", "How long the first has waited", load.oldest_seconds),
        _Fact("running", "Answers that a worker holds", load.running),
        _Fact("webhooks", "Ended streams of which somebody is to be told", load.webhooks),
        _Fact("worker_silent_seconds", "Since a worker's last sign of life", load.silent_seconds),
    ]
