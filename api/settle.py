"""Futures that more than one may settle: the first says the outcome."""

import asyncio
from typing import TypeVar

T = TypeVar("T")


def settle(waiter: asyncio.Future[T], outcome: T) -> None:
    if not waiter.done():
        waiter.set_result(outcome)
