"""Workers, cancels, erasures and a turning clock in any order: what must hold after each step."""

import asyncio
import math
from collections.abc import Coroutine
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, TypeVar
from unittest.mock import patch

import pytest
from fakeredis import FakeAsyncRedis
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    invariant,
    multiple,
    precondition,
    rule,
)

from relay import keys
from relay.claim import Claim
from relay.errors import StreamGone, StreamLost
from relay.events import CANCELLED, COMPLETED, FAILED, STARTED, TEXT, Entry, Event, entry
from relay.log import Recovery
from relay.outbox import Outbox
from tests.conftest import append, make_claims, make_log

T = TypeVar("T")
LEASE_MS = 5_000
MAX_ATTEMPTS = 2
RETENTION_MS = 10**9
WAIT_MS = 20_000
RECOVERIES: tuple[Recovery, ...] = ("restart", "fail")
WORKERS = ("one", "two", "three")


@dataclass
class Expected:
    """What a stream must be like, told without Redis."""

    recovery: Recovery = "restart"
    attempt: int = 0
    tries: int = 0
    claims: int = 0
    begun: bool = False
    """Whether the newest claim has written anything, so that viewers know of it."""
    holder: Claim | None = None
    touched_ms: int = 0
    """When it was born, or its claim last taken or renewed."""
    until_ms: float = 0
    """On half a millisecond, if it is the one turn more that an outage of all sweeps gives."""
    cancel_asked: bool = False
    ended: str = ""
    erased: bool = False
    expired: bool = False
    webhook: bool = False
    """Whether somebody is still to be told when it has ended."""
    kinds: list[str] = field(default_factory=lambda: ["queued"])

    @property
    def open(self) -> bool:
        return not self.ended and not self.erased

    def end(self, kind: str) -> None:
        self.ended, self.holder = kind, None

    def let_go(self) -> str:
        """What becomes of it when its claim ends; the kind of its end, or nothing."""
        self.holder = None
        if self.cancel_asked:
            kind = CANCELLED
        elif self.tries >= MAX_ATTEMPTS or (self.recovery == "fail" and self.begun):
            kind = FAILED
        else:
            return ""
        self.kinds.append(kind)
        self.end(kind)
        return kind


@dataclass(eq=False)
class Writer:
    """A worker's side of a claim, which does not know whether it still holds."""

    worker: str
    claim: Claim
    entries: list[Entry]
    sent: int = 0


def said_by(event: Event) -> str | None:
    value = event.value()
    owner: str | None = value if isinstance(value, str) else value.get("owner")
    return owner


class Streams(RuleBasedStateMachine):
    streams: Bundle[str] = Bundle("streams")
    writers: Bundle[Writer] = Bundle("writers")

    def __init__(self) -> None:
        super().__init__()
        self.now_ms = 1_800_000_000_000
        # Redis' own clock, in scripts and out of them, as fakeredis tells it.
        self.clock = patch("time.time", lambda: self.now_ms / 1000)
        self.clock.start()
        self.runner = asyncio.Runner()
        self.redis = FakeAsyncRedis()
        self.log = make_log(self.redis, open_ms=RETENTION_MS + WAIT_MS, retention_ms=RETENTION_MS)
        self.outbox = Outbox(self.redis)
        self.claims = {
            worker: make_claims(
                self.redis,
                worker,
                lease_ms=LEASE_MS,
                open_ms=RETENTION_MS + WAIT_MS,
                retention_ms=RETENTION_MS,
                max_attempts=MAX_ATTEMPTS,
            )
            for worker in WORKERS
        }
        self.swept_ms: int | None = None
        self.expected: dict[str, Expected] = {}

    def teardown(self) -> None:
        self.run(self.redis.aclose())
        self.runner.close()
        self.clock.stop()

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        return self.runner.run(work)

    async def _keys(self) -> str:
        return repr([key async for key in self.redis.scan_iter()])

    async def _places(self) -> list[set[bytes]]:
        places = (keys.QUEUE, keys.LEASES, keys.WEBHOOKS)
        return [set(await self.redis.zrange(key, 0, -1)) for key in places]

    @rule(target=streams, recovery=st.sampled_from(RECOVERIES), webhook=st.booleans())
    def create(self, recovery: Recovery, webhook: bool) -> str:
        self.now_ms += 1  # Within one millisecond the order of the queue is that of the random ids.
        creating = self.log.create({}, recovery=recovery, webhook="https://x" if webhook else "")
        stream_id = self.run(creating).stream_id
        self.expected[stream_id] = Expected(recovery, webhook=webhook, touched_ms=self.now_ms)
        return stream_id

    @rule(target=writers, worker=st.sampled_from(WORKERS), want=st.integers(1, 2))
    def claim(self, worker: str, want: int) -> Any:
        waiting = [e for e in self.expected.values() if e.open and not e.holder]
        claims = self.run(self.claims[worker].claim(want))
        assert len(claims) == min(want, len(waiting))
        return multiple(*(self._claimed(worker, claim) for claim in claims))

    def _claimed(self, worker: str, claim: Claim) -> Writer:
        stream = self.expected[claim.stream_id]
        assert stream.open
        assert stream.holder is None
        stream.tries += 1
        stream.claims += 1
        assert claim.attempt > stream.attempt
        stream.attempt, stream.begun = claim.attempt, False
        assert not stream.cancel_asked
        stream.holder, stream.touched_ms = claim, self.now_ms
        stream.until_ms = self.now_ms + LEASE_MS
        return Writer(worker, claim, [entry(STARTED, {"owner": claim.owner})])

    @rule(writer=writers, repeat=st.booleans(), more=st.integers(0, 2))
    def append(self, writer: Writer, repeat: bool, more: int) -> None:
        if writer.entries[-1].kind not in (COMPLETED, FAILED, CANCELLED):
            writer.entries += [entry(TEXT, writer.claim.owner)] * more
        self._send(writer, 0 if repeat else writer.sent)

    @rule(writer=writers, kind=st.sampled_from([COMPLETED, FAILED, CANCELLED]))
    def finish(self, writer: Writer, kind: str) -> None:
        if writer.entries[-1].kind not in (COMPLETED, FAILED, CANCELLED):
            writer.entries.append(entry(kind, {"owner": writer.claim.owner}))
        self._send(writer, writer.sent)

    def _send(self, writer: Writer, first: int) -> None:
        """Only the one who holds the stream gets anything in; repeating its own end is harmless."""
        claim, stream = writer.claim, self.expected[writer.claim.stream_id]
        batch = writer.entries[first:] or writer.entries[-1:]
        first = len(writer.entries) - len(batch)
        sending = append(self.log, claim, first, batch)
        repeats_its_end = not stream.erased and writer.sent == len(writer.entries)
        repeats_its_end = repeats_its_end and batch[-1].kind == stream.ended
        if stream.holder is not claim and not repeats_its_end:
            with pytest.raises(StreamLost):
                self.run(sending)
            return
        appended = self.run(sending)
        assert appended.next_seq == len(writer.entries)
        if stream.holder is claim:
            assert appended.cancel_asked == stream.cancel_asked
            stream.begun = True
            stream.kinds += [kind for kind, _ in writer.entries[writer.sent :]]
            writer.sent = len(writer.entries)
            if batch[-1].kind in (COMPLETED, FAILED, CANCELLED):
                stream.end(batch[-1].kind)

    @rule(writer=writers)
    def renew(self, writer: Writer) -> None:
        stream = self.expected[writer.claim.stream_id]
        verdict = "lost"
        if stream.holder is writer.claim:
            verdict = "cancel" if stream.cancel_asked else "held"
            stream.until_ms, stream.touched_ms = self.now_ms + LEASE_MS, self.now_ms
        assert self.run(self.claims[writer.worker].renew([writer.claim])) == [verdict]

    @rule(writer=writers)
    def hand_over(self, writer: Writer) -> None:
        stream = self.expected[writer.claim.stream_id]
        released = self.run(self.claims[writer.worker].hand_over(writer.claim))
        assert bool(released) == (stream.holder is writer.claim)
        if released:
            stream.tries -= 1
            claim = writer.claim
            assert released == [(claim.stream_id, stream.let_go(), claim.owner)]

    @rule(stream_id=streams)
    def forget_the_claim(self, stream_id: str) -> None:
        """Redis comes back without what came after the job was queued."""
        stream = self.expected[stream_id]
        if not stream.holder or len(stream.kinds) > 1:
            return
        self.run(self._forget(stream_id))
        stream.holder, stream.cancel_asked, stream.begun = None, False, False
        stream.tries -= 1
        # It takes longer to come back than a hundredth of a second for each claim there was.
        self.now_ms += 10 * stream.claims

    async def _remove(self, *names: str) -> None:
        await self.redis.delete(*names)

    async def _forget(self, stream_id: str) -> None:
        redis: Any = self.redis
        state = keys.state(stream_id)
        born_ms = float(await redis.hget(state, "created_ms"))
        await redis.hset(state, mapping={"attempt": 0, "next": 2})
        await redis.hincrby(state, "tries", -1)
        await redis.hdel(state, "owner", "cancel")
        await redis.zrem(keys.LEASES, stream_id)
        await redis.zadd(keys.QUEUE, {stream_id: born_ms})

    @rule(seconds=st.integers(1, 6))
    def turn_the_clock(self, seconds: int) -> None:
        self.now_ms += seconds * 1000

    @rule(worker=st.sampled_from(WORKERS))
    def wait_beyond_the_lease(self, worker: str) -> None:
        """While sweeps go on, as they do as long as one worker lives."""
        for _ in range(3):
            self.now_ms += 2_000
            self.sweep(worker)

    @rule(worker=st.sampled_from(WORKERS))
    def sweep(self, worker: str) -> None:
        held = {id_: each for id_, each in self.expected.items() if each.holder}
        if self.swept_ms is not None and self.now_ms - self.swept_ms > LEASE_MS / 2:
            for stream in held.values():  # Perhaps nobody could renew.
                if stream.until_ms % 1 == 0:
                    stream.until_ms = self.now_ms + LEASE_MS + 0.5
        self.swept_ms = self.now_ms
        lapsed = {id_: each for id_, each in held.items() if each.until_ms <= self.now_ms}
        owners = {id_: each.holder.owner for id_, each in lapsed.items() if each.holder}
        swept = self.run(self.claims[worker].sweep())
        assert set(swept) == {(id_, each.let_go(), owners[id_]) for id_, each in lapsed.items()}

    @rule(worker=st.sampled_from(WORKERS))
    def end_overdue(self, worker: str) -> None:
        overdue = {
            id_: each
            for id_, each in self.expected.items()
            if each.open and not each.holder and self.now_ms - each.touched_ms >= WAIT_MS
        }
        assert set(self.run(self.claims[worker].end_overdue())) == set(overdue)
        for stream in overdue.values():
            stream.kinds.append(FAILED)
            stream.end(FAILED)

    @rule(stream_id=streams)
    def cancel(self, stream_id: str) -> None:
        stream = self.expected[stream_id]
        if stream.erased:
            with pytest.raises(StreamGone):
                self.run(self.log.cancel(stream_id))
            return
        status = self.run(self.log.cancel(stream_id))
        if stream.holder:
            assert status == "cancelling"
            stream.cancel_asked = True
        elif stream.open:
            stream.kinds.append(CANCELLED)
            stream.end(CANCELLED)
        assert status == (stream.ended or "cancelling")

    @rule()
    def tell(self) -> None:
        """Of whatever is due somebody is told, and then no more."""
        for delivery in self.run(self.outbox.take(9)):
            stream = self.expected[delivery.stream_id]
            assert stream.webhook
            assert not stream.erased
            assert delivery.kind == stream.ended == stream.kinds[-1]
            self.run(self.outbox.settle(delivery.stream_id))
            stream.webhook = False

    @precondition(lambda self: len(self.expected) > 2)  # Else little more could happen.
    @rule(stream_id=streams)
    def erase(self, stream_id: str) -> None:
        stream = self.expected[stream_id]
        if not stream.erased:
            self.run(self.log.erase(stream_id))
        stream.erased, stream.holder = True, None

    @precondition(lambda self: len(self.expected) > 2)
    @rule(stream_id=streams)
    def expire(self, stream_id: str) -> None:
        """Its ids stay behind in the queue or the leases, where nothing expires."""
        self.run(self._remove(keys.log(stream_id), keys.state(stream_id), keys.job(stream_id)))
        stream = self.expected[stream_id]
        stream.expired = stream.expired or not stream.erased
        stream.erased, stream.holder = True, None

    @invariant()
    def each_log_is_dense_and_has_one_writer_an_attempt_and_at_most_one_end(self) -> None:
        for stream_id, stream in self.expected.items():
            if stream.erased:
                continue
            events = self.run(self.log.read(stream_id))
            assert [event.kind for event in events] == stream.kinds
            for event, following in pairwise(events):
                new_start = following.kind == STARTED or following.terminal
                assert event.cursor.leads_to(following.cursor, new_start=new_start)
                assert not event.terminal
            assert events[-1].terminal == bool(stream.ended)
            writers = {
                (event.cursor.attempt, owner) for event in events if (owner := said_by(event))
            }
            assert len(writers) == len(dict(writers))

    @invariant()
    def nothing_is_left_of_what_was_erased(self) -> None:
        left = self.run(self._keys())
        assert not [id_ for id_, each in self.expected.items() if each.erased and id_ in left]

    @invariant()
    def each_open_stream_is_in_the_queue_or_in_the_leases(self) -> None:
        queue, leases, _ = self.run(self._places())
        streams = {stream_id.encode(): stream for stream_id, stream in self.expected.items()}
        expired = {id_ for id_, each in streams.items() if each.expired}
        waiting = {id_ for id_, each in streams.items() if each.open and not each.holder}
        assert queue - expired == waiting
        assert leases - expired == {id_ for id_, each in streams.items() if each.open} - waiting

    @invariant()
    def each_ended_stream_is_in_the_outbox_until_somebody_was_told(self) -> None:
        _, _, outbox = self.run(self._places())
        streams = {stream_id.encode(): stream for stream_id, stream in self.expected.items()}
        expired = {id_ for id_, each in streams.items() if each.expired}
        ended = {id_ for id_, each in streams.items() if each.ended and not each.erased}
        assert outbox - expired == {id_ for id_ in ended if streams[id_].webhook}

    @invariant()
    def each_end_is_counted_once_with_the_time_it_took(self) -> None:
        load = self.run(self.log.load())
        ended = [each for each in self.expected.values() if each.ended]
        assert sum(load.ended.values()) == load.answer.within[math.inf] == len(ended)
        begun = [each for each in ended if STARTED in each.kinds]
        assert load.first_chunk.within[math.inf] == len(begun)


Streams.TestCase.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)
test_any_order_of_events_keeps_the_promises = Streams.TestCase
