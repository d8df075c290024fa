"""A turnstile: of many that would begin at once, one passes in each turn of the event loop."""

import asyncio
from collections import deque


class Turnstile:
    """Tasks that begin together also end together, all of them late: each waits for every other's
    first step before it takes its second. One after the other, the first is done when it would be
    alone, and what comes in meanwhile waits for one of them, not for all."""

    def __init__(self) -> None:
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._turning = False

    async def passed(self) -> None:
        """In the order in which it is called; at once if nobody else is about to."""
        loop = asyncio.get_running_loop()
        if not self._turning:
            self._turning = True
            loop.call_soon(self._turn)
            return
        turn: asyncio.Future[None] = loop.create_future()
        self._waiting.append(turn)
        await turn

    def _turn(self) -> None:
        while self._waiting:
            turn = self._waiting.popleft()
            if not turn.done():  # Else its task was cancelled.
                turn.set_result(None)
                asyncio.get_running_loop().call_soon(self._turn)
                return
        self._turning = False
