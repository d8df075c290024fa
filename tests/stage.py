"""A loop for simulations: time passes only when it is told to, and it says when all rests."""

import asyncio
import selectors
from collections.abc import Callable
from typing import Any


class Stage(asyncio.SelectorEventLoop):
    def __init__(self) -> None:
        self.now = 0.0
        """In seconds."""
        self._resting: asyncio.Future[None] | None = None
        super().__init__(_Selector(self._rests))

    def time(self) -> float:
        return self.now

    async def rest(self) -> None:
        """Return when nothing is left to do at this time."""
        self._resting = self.create_future()
        await self._resting

    def _rests(self) -> None:
        if self._resting is not None and not self._resting.done():
            self._resting.set_result(None)


class _Selector(selectors.DefaultSelector):
    def __init__(self, on_rest: Callable[[], None]) -> None:
        super().__init__()
        self._on_rest = on_rest

    def select(self, timeout: float | None = None) -> list[Any]:
        """A loop that would wait has nothing else to do; and by its clock it would for ever."""
        if timeout != 0:
            self._on_rest()
        return super().select(0)
