"""Routes of an API that is not ours: their errors have that API's shape."""

from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from redis.exceptions import RedisError

from api.problems import REDIS_AWAY_DETAIL, status_of
from relay.errors import RelayError
from relay.logs import get_logger

logger = get_logger("api")


class ShapedRoute(APIRoute):
    """Answers every error by `refuse`, and a request that is not valid by `refuse_invalid`."""

    def refuse(self, status: int, code: str, message: str) -> Response:
        raise NotImplementedError

    def refuse_invalid(self, failure: RequestValidationError) -> Response:
        raise NotImplementedError

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def handle_or_refuse(request: Request) -> Response:
            try:
                return await handle(request)
            except RelayError as failure:
                return self.refuse(status_of(failure), failure.code, failure.message)
            except RedisError as failure:
                logger.warning("redis_away", error=type(failure).__name__)
                return self.refuse(503, "redis_away", REDIS_AWAY_DETAIL)
            except RequestValidationError as failure:
                return self.refuse_invalid(failure)

        return handle_or_refuse
