"""A feed: one process' copy of one log, shared by all its viewers."""

import asyncio
from bisect import bisect_right
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from api.line import Line
from api.riders import Riders
from api.settle import settle
from relay.errors import StreamGone
from relay.events import STARTED, Cursor, Event, fitting

Encode = Callable[[Event], bytes]
Wire = Callable[[], Encode]
"""Makes an encoder for one feed, which is given all its events in order: what a frame
leaves out may have been said by an earlier one. Wires that encode alike must be equal, for by them
viewers share frames: one made anew for each viewer would have frames of its own."""

FRAMES_AT_ONCE = 256
BYTES_AT_ONCE = 64 * 1024
"""What a viewer takes for one write, by either bound: all the memory that a slow one holds."""

EVENT_BYTES = 250
FRAME_BYTES = 50
"""What Python takes for one beside its data."""


class Feed:
    """An append-only list of events, and of their frames per wire. A viewer is an index into it.

    Guarantees: the events stand as in the log, dense and each once, whatever is added how often.
    """

    def __init__(self, stream_id: str) -> None:
        self.stream_id = stream_id
        self.events: list[Event] = []
        self.gone: StreamGone | None = None
        self.stale = False
        """Whether it is to be read once more, since the log may have what was not heard."""
        self.viewers = 0
        self.notices: list[bytes] = []
        """What was told beside the log, to those who were there."""
        self.bytes = 0
        """About what the events and their frames take."""
        self.on_growth: Callable[[int], None] | None = None
        """Is told how many bytes new frames add."""
        self._latest_start = 0
        self._frames: dict[Wire, tuple[Encode, list[bytes]]] = {}
        self._waiters: set[asyncio.Future[bool]] = set()
        self._riders: dict[tuple[Wire, frozenset[str]], Riders] = {}
        """With the kinds of events that they stay on for: at any other each has something to do."""
        self._to_carry: int | None = None
        """The index from which on riders have still to be written to."""

    @property
    def top(self) -> Cursor | None:
        return self.events[-1].cursor if self.events else None

    @property
    def begun(self) -> bool:
        """Whether any attempt has `started`."""
        return self._latest_start > 0

    @property
    def closed(self) -> bool:
        """Whether a terminal event stands."""
        return bool(self.events) and self.events[-1].terminal

    @property
    def ended(self) -> bool:
        """Whether nothing more will come: it is closed, or the log is gone."""
        return self.gone is not None or self.closed

    def add(self, events: list[Event], *, read: bool = False) -> bool:
        """Take in what follows the top and pass over what stands. `read` says that the events were
        read from the log after the top, so that none is missing before them.

        Returns False at a gap: the events from there on are not taken, the log has to be read.
        """
        dense = True
        before = len(self.events)
        for event in events:
            top = self.top or Cursor(0, 0)
            if event.cursor <= top or self.ended:
                continue
            if not (read or top.leads_to(event.cursor, new_start=event.kind == STARTED)):
                dense = False
                break
            if event.kind == STARTED:
                self._latest_start = len(self.events)
            self.events.append(event)
            self.bytes += len(event.data) + EVENT_BYTES
        if len(self.events) > before:
            self._carry_soon(before)
            self._wake_waiters()
        return dense

    def end_as_gone(self, error: StreamGone) -> None:
        self.gone = error
        self.wake()

    def reaches(self, cursor: Cursor | None) -> bool:
        """Whether it is known how the log goes on after `cursor`. Above the top it is not: Redis
        may have lost a tail that the worker is about to append again."""
        return cursor is None or self.ended or (self.top is not None and self.top >= cursor)

    def position(self, cursor: Cursor | None) -> int:
        """The index from which a viewer goes on that has everything up to `cursor`.

        Without a cursor, and with one that the log does not continue, that is the newest
        `started`, and the viewer begins anew.
        """
        if cursor is None or cursor < self.events[self._latest_start].cursor:
            return self._latest_start
        index = bisect_right(self.events, cursor, key=lambda event: event.cursor)
        return index if self.events[index - 1].cursor == cursor else self._latest_start

    def frames(self, wire: Wire, start: int) -> list[bytes]:
        """The next frames from an index on, at least one if there is any, and no more than the
        bounds of one write; each event is encoded once a wire."""
        if wire not in self._frames:
            self._frames[wire] = wire(), []
        encode, frames = self._frames[wire]
        if len(frames) < len(self.events):
            new = [encode(event) for event in self.events[len(frames) :]]
            frames += new
            size = sum(map(len, new)) + FRAME_BYTES * len(new)
            self.bytes += size
            if self.on_growth is not None:
                self.on_growth(size)
        piece = frames[start : start + FRAMES_AT_ONCE]
        return piece[: fitting(piece, BYTES_AT_ONCE)]

    def notice(self, text: bytes) -> None:
        """Tell all viewers that are here now something that is no event: one line, no LF."""
        self.notices.append(text)
        self.wake()

    def wake(self) -> None:
        self._let_off()
        self._wake_waiters()

    def _wake_waiters(self) -> None:
        waiters, self._waiters = self._waiters, set()
        for waiter in waiters:
            settle(waiter, True)

    def _carry_soon(self, start: int) -> None:
        """What has come together is written together: so a process that falls behind catches up."""
        if self._to_carry is None and any(self._riders.values()):
            self._to_carry = start
            asyncio.get_running_loop().call_soon(self._carry)

    def _carry(self) -> None:
        """Write what is new to those who ride along: each frame is encoded once, and all that they
        cost is the writing. What is not of their kinds, or more than one write, they deal with
        themselves."""
        start, self._to_carry = self._to_carry, None
        if start is None:
            return
        fresh = {event.kind for event in self.events[start:]}
        for (wire, kinds), riders in self._riders.items():
            if riders:
                frames = self._frames_to_carry(wire, start) if fresh <= kinds else []
                if start + len(frames) == len(self.events):
                    riders.carry(b"".join(frames), len(self.events))
                else:
                    riders.all_get_off()

    def _frames_to_carry(self, wire: Wire, start: int) -> list[bytes]:
        try:
            return self.frames(wire, start)
        except Exception:  # noqa: BLE001 - theirs alone: each meets it in its own response
            return []

    def _let_off(self) -> None:
        for riders in self._riders.values():
            riders.all_get_off()

    async def ride(
        self,
        wire: Wire,
        line: Line,
        heartbeat: bytes,
        seconds: float,
        kinds: frozenset[str],
        *,
        unless: asyncio.Future[Any],
    ) -> int:
        """Write each event of these kinds, as it comes, to a viewer that has all before it, and
        `heartbeat` after so many seconds of none; until there is something for the viewer itself to
        do, its line is full, or `unless` is done. Returns the index from which it goes on."""
        riders = self._riders.get((wire, kinds))
        if riders is None:
            riders = self._riders[wire, kinds] = Riders(heartbeat, seconds)
        self._carry()  # Else it would be written to this one, too, who has it.
        waiter = riders.get_on(line, len(self.events))
        get_off = partial(riders.get_off, waiter)
        unless.add_done_callback(get_off)
        try:
            return await waiter
        finally:
            unless.remove_done_callback(get_off)
            riders.get_off(waiter)

    async def changed(self, seconds: float, *, unless: asyncio.Future[Any]) -> bool:
        """Wait for news here or for `unless` to be done; False after `seconds` of neither."""
        return await any_changed([self], seconds, unless=unless)

    def when_changed(self, waiter: asyncio.Future[bool]) -> None:
        """Settle this at the next news."""
        self._waiters.add(waiter)

    def forget(self, waiter: asyncio.Future[bool]) -> None:
        self._waiters.discard(waiter)


async def any_changed(
    feeds: Sequence[Feed], seconds: float, *, unless: asyncio.Future[Any]
) -> bool:
    """Wait for news in any of them or for `unless` to be done; False after `seconds` of neither."""
    loop = asyncio.get_running_loop()
    waiter: asyncio.Future[bool] = loop.create_future()
    for feed in feeds:
        feed.when_changed(waiter)
    timer = loop.call_later(seconds, settle, waiter, False)

    end = partial(_settle_true, waiter)
    unless.add_done_callback(end)
    try:
        return await waiter
    finally:
        timer.cancel()
        unless.remove_done_callback(end)
        for feed in feeds:
            feed.forget(waiter)


def _settle_true(waiter: asyncio.Future[bool], _: asyncio.Future[Any]) -> None:
    settle(waiter, True)
