"""A turnstile: of many that would begin at once, one passes in each turn of the event loop."""

import asyncio
from collections import deque

REST_SECONDS = 0.001


class Turnstile:
    """Tasks that begin together also end together, all of them late: each waits for every other's
    first step before it takes its second. One after the other, the first is done when it would be
    alone, and what comes in meanwhile waits for one of them, not for all."""

    def __init__(self, *, rest_after: int | None = None) -> None:
        """`rest_after` so many nobody passes for a millisecond: what begins in one go keeps step
        for as long as it lasts, and comes in bursts."""
        self._rest_after = rest_after
        self._in_a_row = 0
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._turning = False

    async def passed(self) -> None:
        """In the order in which it is called; at once if nobody else is about to."""
        if not self._turning:
            self._turning = True
            self._in_a_row = 0
            self._next()
            return
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append(turn)
        await turn

    def _turn(self) -> None:
        while self._waiting:
            turn = self._waiting.popleft()
            if not turn.done():  # Else its task was cancelled.
                turn.set_result(None)
                self._next()
                return
        self._turning = False

    def _next(self) -> None:
        loop = asyncio.get_running_loop()
        self._in_a_row += 1
        if self._in_a_row == self._rest_after:
            self._in_a_row = 0
            loop.call_later(REST_SECONDS, self._turn)
        else:
            loop.call_soon(self._turn)
