"""The claim: who may write a stream, and for how long.

A claim is an attempt number and a lease, handed out in one atom. The attempt number is in every
entry id, so it is the fencing token: what an earlier attempt still sends is refused. The lease is
kept by Redis' clock alone; whoever stops renewing it loses the job to the queue, or, when nobody
shall try again, the stream is ended.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, Self

from redis.asyncio import Redis

from relay import keys
from relay.connection import script
from relay.events import to_json
from relay.settings import Settings

Verdict = Literal["held", "cancel", "lost"]

BYTES_AT_ONCE = 256 * 1024
"""Of requests in one claim, and then no further job: a reply that takes longer than a client waits
for it would be lost again each time. One request may be more."""

_RENEWED_AT_ONCE = 200
"""Leases: while a script runs, Redis does nothing else."""

INTERRUPTED = {
    "code": "interrupted",
    "message": "The answer was interrupted: ask again.",
    "retryable": True,
}

OVERDUE = {
    "code": "queue_timeout",
    "message": "No worker took the question in time: ask again.",
    "retryable": True,
}


@dataclass(frozen=True, slots=True)
class Claim:
    stream_id: str
    attempt: int
    """The fencing token: above that of every earlier claim on this stream, also of one that Redis
    has forgotten. Dense it is not."""
    owner: str
    """Names the call that took it, and so this claim among all of its stream."""
    ordinal: int
    """Which claim on this stream it is, counted from 1; for people."""
    request: bytes
    """As it was stored, JSON."""
    job: bytes
    """arq's serialized job."""


class Released(NamedTuple):
    """A stream whose claim was let go."""

    stream_id: str
    ended: str
    """The kind of its terminal event; empty if its job is in the queue again."""
    owner: str
    """As Claim.owner, of whoever had it."""


class Claims:
    """Guarantees: a job is always in exactly one place, with one owner, in the queue, or ended.
    Every method may raise redis.exceptions.RedisError and may then be repeated."""

    def __init__(
        self,
        redis: Redis,
        worker: str,
        *,
        lease_ms: int,
        open_ms: int,
        retention_ms: int,
        queue_limit: int,
        max_attempts: int,
    ) -> None:
        """`max_attempts`: so many may fail, then the stream ends; a hand-over is no failure.
        `open_ms`: as Log has it."""
        self._redis = redis
        self.worker = worker
        self._lease_ms = lease_ms
        self._open_ms = open_ms
        self._retention_ms = retention_ms
        self._queue_limit = queue_limit
        self._max_attempts = max_attempts
        self._calls = 0
        self._unheard: set[str] = set()
        """The owners of claims whose answer did not come."""
        self._claim = script(redis, "claim")
        self._renew = script(redis, "renew")
        self._release = script(redis, "release")
        self._overdue = script(redis, "overdue")

    @classmethod
    def configured(cls, redis: Redis, worker: str, settings: Settings) -> Self:
        return cls(
            redis,
            worker,
            lease_ms=settings.lease_ms,
            open_ms=settings.open_ms,
            retention_ms=settings.retention_ms,
            queue_limit=settings.queue_limit,
            max_attempts=settings.max_attempts,
        )

    async def claim(self, want: int) -> list[Claim]:
        """Up to `want` jobs from the queue, oldest first, and fewer where their requests are large:
        `emptied` tells whether it has more. What Redis may have given to an earlier call that did
        not hear of it goes back before, at no cost of a try."""
        await self.give_back_unheard()
        self._calls += 1
        owner = f"{self.worker}/{self._calls}"
        try:
            rows = await self._claim(
                keys=[keys.QUEUE, keys.LEASES, keys.WAKE],
                args=[
                    owner,
                    want,
                    BYTES_AT_ONCE,
                    self._lease_ms,
                    self._open_ms,
                    *(name("%s") for name in (keys.log, keys.state, keys.job)),
                ],
            )
        except BaseException:  # A cancel, too, comes when Redis has it already.
            self._unheard.add(owner)
            raise
        return [Claim(row[0].decode(), row[1], owner, *row[2:]) for row in rows]

    async def give_back_unheard(self) -> None:
        """Hand over what Redis may have given to calls that did not hear of it."""
        for unheard in tuple(self._unheard):
            await self._let_go(unheard, "")
            self._unheard.discard(unheard)

    async def renew(self, claims: Sequence[Claim]) -> list[Verdict]:
        """Extend the leases that are still held. `cancel`: held, and a cancel is asked for."""
        verdicts: list[Verdict] = []
        for first in range(0, len(claims), _RENEWED_AT_ONCE):
            piece = claims[first : first + _RENEWED_AT_ONCE]
            pairs = [part for claim in piece for part in (claim.stream_id, claim.owner)]
            renewed = await self._renew(
                keys=[keys.LEASES],
                args=[
                    self._lease_ms,
                    self._open_ms,
                    keys.log("%s"),
                    keys.state("%s"),
                    keys.job("%s"),
                    *pairs,
                ],
            )
            verdicts += [verdict.decode() for verdict in renewed]
        return verdicts

    async def hand_over(self, claim: Claim) -> list[Released]:
        """Back into the queue, at its old place, at no cost of a try. A stream that asked not to be
        begun anew ends as interrupted, if it had begun. Nothing is let go that was lost."""
        return await self._let_go(claim.owner, claim.stream_id)

    async def sweep(self) -> list[Released]:
        """Let go of claims whose lease has lapsed, of a hundred at most: there may be more until it
        finds none. Also this worker's sign of life.

        The job goes back into the queue; the stream ends as cancelled, if that was asked for, or as
        interrupted, if it was tried often enough or asked not to be begun anew.
        """
        return await self._let_go()

    async def end_overdue(self) -> list[str]:
        """End as failed what waits in the queue for too long, a hundred at most: there may be more
        until it finds none. Returns the ids of those streams."""
        ids = await self._overdue(
            keys=[keys.QUEUE, keys.LEASES, keys.WEBHOOKS, keys.ENDED],
            args=[
                *keys.OF_STREAM,
                self._open_ms,
                self._retention_ms,
                to_json(OVERDUE),
            ],
        )
        return [stream_id.decode() for stream_id in ids]

    async def wait_for_job(self, redis: Redis, seconds: float) -> None:
        """Return when a job was queued, or after `seconds`. `redis` must allow a call that long."""
        await redis.execute_command("BLPOP", keys.WAKE, seconds)  # type: ignore[no-untyped-call]

    async def _let_go(self, *of: str) -> list[Released]:
        rows = await self._release(
            keys=[
                keys.QUEUE,
                keys.LEASES,
                keys.WAKE,
                keys.SWEPT,
                keys.WEBHOOKS,
                keys.ENDED,
                keys.WORKERS,
            ],
            args=[
                *keys.OF_STREAM,
                self._queue_limit,
                self._retention_ms,
                self._lease_ms,
                self._max_attempts,
                to_json(INTERRUPTED),
                self.worker,
                *of,
            ],
        )
        return [Released(*(part.decode() for part in row)) for row in rows]


def emptied(claims: Sequence[Claim], want: int) -> bool:
    """Whether a claim of so many left nothing in the queue: otherwise more may wait there."""
    return len(claims) < want and sum(len(claim.request) for claim in claims) < BYTES_AT_ONCE
