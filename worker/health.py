"""Whether a worker on this host is alive, for a container's health check. Quick to import."""

import socket

from redis.exceptions import RedisError

from relay import keys
from relay.connection import connect, reason
from relay.logs import get_logger
from relay.settings import Settings

logger = get_logger()


def health_key() -> str:
    return keys.health(socket.gethostname())


async def is_healthy(settings: Settings) -> bool:
    """Whether a worker on this host has reported within half a minute; False without Redis."""
    try:
        async with connect(settings.redis_url, connections=1) as redis:
            healthy = bool(await redis.exists(health_key()))
    except RedisError as error:
        logger.warning("redis_away", error=reason(error))
        return False
    if not healthy:
        logger.warning("worker_silent", host=socket.gethostname())
    return healthy
