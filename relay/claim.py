"""The claim: who may write a stream, and for how long.

A claim is an attempt number and a lease, handed out in one atom. The attempt number is in every
entry id, so it is the fencing token: what an earlier attempt still sends is refused. The lease is
kept by Redis' clock alone; whoever stops renewing it loses the job to the queue.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from redis.asyncio import Redis

from relay import keys
from relay.connection import script

Verdict = Literal["held", "cancel", "lost"]


@dataclass(frozen=True, slots=True)
class Claim:
    stream_id: str
    attempt: int
    """The fencing token: above that of every earlier claim on this stream."""
    owner: str
    """Names this one claim. Attempt numbers repeat if Redis forgets its last second; owners do
    not, so two writers can never both pass for the same attempt."""
    tries: int
    """How often the job was begun, this time included; a hand-over is no try."""
    cancel_asked: bool
    request: dict[str, Any]
    job: bytes
    """arq's serialized job."""


class Claims:
    """Guarantees: a job is with one owner at most, in the queue, or ended, and never in none of
    the three. Every method may raise redis.exceptions.RedisError and may then be repeated."""

    def __init__(
        self, redis: Redis, worker: str, *, lease_ms: int, live_ms: int, queue_limit: int
    ) -> None:
        self._redis = redis
        self._worker = worker
        self._lease_ms = lease_ms
        self._live_ms = live_ms
        self._queue_limit = queue_limit
        self._calls = 0
        self._claim = script(redis, "claim")
        self._renew = script(redis, "renew")
        self._requeue = script(redis, "requeue")

    async def claim(self, want: int) -> list[Claim]:
        """Up to `want` jobs from the queue, oldest first."""
        self._calls += 1
        owner = f"{self._worker}/{self._calls}"
        rows = await self._claim(
            keys=[keys.QUEUE, keys.LEASES],
            args=[owner, want, self._lease_ms, keys.state("%s"), keys.job("%s")],
        )
        return [
            Claim(row[0].decode(), row[1], owner, row[2], bool(row[3]), json.loads(row[4]), row[5])
            for row in rows
        ]

    async def renew(self, claims: Sequence[Claim]) -> list[Verdict]:
        """Extend the leases that are still held. `cancel`: held, and a cancel is asked for."""
        pairs = [part for claim in claims for part in (claim.stream_id, claim.owner)]
        verdicts = await self._renew(
            keys=[keys.LEASES],
            args=[
                self._lease_ms,
                self._live_ms,
                keys.log("%s"),
                keys.state("%s"),
                keys.job("%s"),
                *pairs,
            ],
        )
        return [verdict.decode() for verdict in verdicts]

    async def hand_over(self, claim: Claim) -> None:
        """Back into the queue, at its old place, at no cost of a try."""
        await self._put_back(claim.stream_id, claim.owner)

    async def sweep(self) -> list[str]:
        """Put every job whose lease has lapsed back into the queue; returns their ids."""
        return [stream_id.decode() for stream_id in await self._put_back()]

    async def wake(self, redis: Redis, seconds: float) -> None:
        """Return when a job was queued, or after `seconds`. `redis` must allow a call that long."""
        await redis.execute_command("BLPOP", keys.WAKE, seconds)  # type: ignore[no-untyped-call]

    async def _put_back(self, *of: str) -> list[bytes]:
        back: list[bytes] = await self._requeue(
            keys=[keys.QUEUE, keys.LEASES, keys.WAKE],
            args=[keys.state("%s"), self._queue_limit, *of],
        )
        return back
