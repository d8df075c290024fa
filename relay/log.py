"""The log: what a stream's viewers see, in order, kept in Redis."""

import asyncio
import json
import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, Self

from arq.jobs import serialize_job
from redis.asyncio import Redis
from redis.exceptions import ResponseError
from redis.exceptions import TimeoutError as RedisTimeoutError
from redis.typing import EncodableT

from relay import keys
from relay.connection import script
from relay.durations import Histogram, histogram
from relay.errors import (
    FAILURE_CODES,
    UPSTREAM_CODES,
    IdempotencyConflict,
    QueueFull,
    StreamGone,
    StreamLost,
)
from relay.events import (
    CANCELLED,
    COMPLETED,
    FAILED,
    QUEUED,
    TERMINAL,
    Cursor,
    Event,
    fitting,
    to_json,
)
from relay.ids import new_stream_id
from relay.settings import Settings

JOB = "generate"

Recovery = Literal["restart", "fail"]

GONE = "This stream was erased, has expired or was lost: begin a new one."

BIRTH = Event(Cursor(0, 1), QUEUED, b"{}")
"""With which every log begins."""

_PAGE = 2500
"""Entries in one reply: while Redis makes it, it does nothing else."""
_SMALL_PAGE = 100
_REPORTS = 500
"""Streams whose viewers are reported in one call, for the same reason."""
ALIVE_SECONDS = 3.0
"""After so long without a sign of life a worker counts for gone: a restart takes less."""
VIEWERS_SECONDS = 60
"""How long a report of viewers counts; a process that died stops counting after that."""


class Created(NamedTuple):
    stream_id: str
    created_ms: int
    """Unix time by Redis' clock."""
    repeated: bool
    """Whether the Idempotency-Key led to a stream that stood already."""
    heard: bool = False
    """Whether its channel had a subscriber when it was born."""


class Batch(NamedTuple):
    """What one attempt has to append, from seq `first` on. An entry of a terminal kind must be the
    last."""

    stream_id: str
    attempt: int
    owner: str
    first: int
    entries: Sequence[str | bytes]
    """One after the other, of each its kind and its data. Flat, for a tuple each would be looked at
    by the garbage collector for as long as the answer takes."""

    @property
    def length(self) -> int:
        return len(self.entries) // 2

    @property
    def size(self) -> int:
        """Bytes of data."""
        return sum(map(len, self.entries[1::2]))

    def within(self, room: int) -> "Batch":
        """Its first entries: as many as `room` bytes hold, and at least one."""
        if self.size <= room:
            return self
        return self._replace(entries=self.entries[: 2 * fitting(self.entries[1::2], room)])

    @property
    def ends(self) -> bool:
        return self.entries[-2] in TERMINAL


class Appended(NamedTuple):
    next_seq: int
    """Where the attempt's log ends now; below what was sent if Redis lost entries."""
    cancel_asked: bool


class State(NamedTuple):
    """How a stream stands. Times are Redis' clock, Unix milliseconds."""

    status: str
    claims: int
    """How often the job was taken up."""
    created_ms: int
    started_ms: int | None
    ended_ms: int | None
    place: int | None
    """1 is next; None once a worker has it."""
    viewers: dict[str, int]
    """API process -> its number of viewers, if its report still counts."""


class Load(NamedTuple):
    queued: int
    oldest_seconds: float
    """Since the oldest question in it was asked, whoever had it in between; 0 if it is empty."""
    running: int
    """Claims that stand, dead workers' among them until a sweep finds those."""
    webhooks: int
    """Ended streams of which somebody is still to be told."""
    silent_seconds: float
    """As Log.silent_seconds."""
    workers: int
    """How many have given a sign of life in the last ALIVE_SECONDS."""
    ended: dict[tuple[str, str], int]
    """Kind of terminal event and, of `failed`, its code -> how many streams have ended by it, since
    Redis began to count."""
    first_chunk: Histogram
    """Of the streams that have ended: from the question to the first chunk, where there was one; of
    several attempts, to that of the last."""
    answer: Histogram
    """Of the same: from the question to the end, whichever it was."""
    retries: dict[str, int]
    """Code of a failure -> how often a worker asked the upstream again after it."""


class Log:
    """Guarantees: entries stand in the order of their ids, each once; after the birth they come by
    `append`, or as an end that no worker wrote; a closed log never grows again; an erased one stays
    erased.

    Every method may raise redis.exceptions.RedisError: nothing is known then, and the call may be
    repeated; `create` only under an Idempotency-Key, or there may be two.
    """

    def __init__(self, redis: Redis, *, open_ms: int, retention_ms: int, queue_limit: int) -> None:
        """`open_ms`: so long Redis keeps an open stream after its birth or the last renewal of its
        claim; `retention_ms`: one that has ended. The difference is how long it may wait."""
        self._redis = redis
        self._open_ms = open_ms
        self._retention_ms = retention_ms
        self._queue_limit = queue_limit
        self._create = script(redis, "create")
        self._append = script(redis, "append")
        self._cancel = script(redis, "cancel")
        self._erase = script(redis, "erase")
        self._viewers = script(redis, "viewers")

    @classmethod
    def configured(cls, redis: Redis, settings: Settings) -> Self:
        return cls(
            redis,
            open_ms=settings.open_ms,
            retention_ms=settings.retention_ms,
            queue_limit=settings.queue_limit,
        )

    async def create(
        self,
        request: dict[str, Any],
        *,
        stream_id: str = "",
        recovery: Recovery = "restart",
        idempotency_key: str = "",
        digest: str = "",
        webhook: str = "",
        chat: str = "",
    ) -> Created:
        """A new stream with its job in the queue, or nothing at all; under a new id, unless one was
        made for it already.

        `recovery` says what shall become of it if its worker dies after the first chunk: `restart`
        begins the answer anew, `fail` ends the stream as interrupted. `webhook` is the URL to be
        told when it has ended; empty for none. `chat` is the id of the chat in which it is the
        newest answer now; empty for none.

        Raises QueueFull; IdempotencyConflict if the key came with another body before.
        """
        stream_id = stream_id or new_stream_id()
        job = serialize_job(JOB, (stream_id,), {}, None, 0, serializer=to_json)
        answer = await self._create(
            keys=[
                keys.log(stream_id),
                keys.state(stream_id),
                keys.channel(stream_id),
                keys.job(stream_id),
                keys.QUEUE,
                keys.WAKE,
                keys.idempotency(idempotency_key),
                keys.chat(chat),
            ],
            args=[
                stream_id,
                to_json(request),
                job,
                self._open_ms,
                self._queue_limit,
                idempotency_key,
                digest,
                keys.state("%s"),
                recovery,
                webhook,
                chat,
            ],
        )
        return _created(stream_id, answer)

    async def append(self, batches: Sequence[Batch]) -> list[Appended | StreamLost | ResponseError]:
        """Append what several attempts have, and publish it: each batch in one atom, all in one
        call. Harmless to repeat. A terminal entry closes its log.

        Returns an outcome for each: StreamLost if its owner may not write, ResponseError if Redis
        refuses it alone, of which nothing is known then.
        """
        arguments: list[EncodableT] = [
            *keys.OF_STREAM,
            keys.LEASES,
            keys.WEBHOOKS,
            keys.ENDED,
            self._retention_ms,
        ]
        for batch in batches:
            stream_id, attempt, owner, first, entries = batch
            ending = entries[-2] if batch.ends else ""
            arguments += (stream_id, attempt, owner, first, ending, batch.length)
            arguments += entries
        verdicts = await self._append(args=arguments)
        return [_outcome(*pair) for pair in zip(batches, verdicts, strict=True)]

    async def read(self, stream_id: str, after: Cursor | None = None) -> list[Event]:
        """All events strictly after a cursor. Raises StreamGone if there is no such log."""
        events: list[Event] = []
        start = "-" if after is None else f"({after}"
        count = _PAGE
        while True:
            # By a call of its own, in which one that hangs is found out before any page is asked.
            exists = await self._redis.exists(keys.log(stream_id))
            try:
                page = await self._page(stream_id, start, count)
            except RedisTimeoutError:
                if count <= _SMALL_PAGE:
                    raise
                # Entries may be large and the link slow: then it would come late each time.
                count = _SMALL_PAGE
                continue
            # An erase may come between the two.
            if not exists or (not page and start == "-"):
                raise StreamGone(GONE)
            events += [_event(entry_id, fields) for entry_id, fields in page]
            if len(page) < count:
                return events
            start = f"({events[-1].cursor}"

    async def _page(self, stream_id: str, start: str, count: int) -> list[Any]:
        """By a connection of its own: a large reply holds up all that is behind it."""
        async with self._redis.pipeline(transaction=False) as pipe:
            pipe.xrange(keys.log(stream_id), start, "+", count=count)
            [page] = await pipe.execute()
        entries: list[Any] = page
        return entries

    async def state(self, stream_id: str) -> State:
        """Raises StreamGone."""
        async with self._redis.pipeline(transaction=False) as pipe:
            # In this order: what is taken from the queue in between has its place no more.
            pipe.zrank(keys.QUEUE, stream_id)
            pipe.hmget(
                keys.state(stream_id),
                ["claims", "created_ms", "started_ms", "ended_ms", "ended", "owner"],
            )
            pipe.hgetall(keys.viewers(stream_id))
            pipe.time()
            (
                rank,
                (claims, created, started, ended_ms, ended, owner),
                reports,
                time,
            ) = await pipe.execute()
        if claims is None:
            raise StreamGone(GONE)
        status = ended.decode() if ended else "running" if owner else "queued"
        return State(
            status=status,
            claims=int(claims),
            created_ms=int(created),
            started_ms=int(started) if started else None,
            ended_ms=int(ended_ms) if ended_ms else None,
            place=rank + 1 if rank is not None and status == "queued" else None,
            viewers=_watching(reports, time),
        )

    async def load(self) -> Load:
        """How much waits and runs, over all processes."""
        # No transaction, here and elsewhere: a full Redis refuses to queue even what reads.
        async with self._redis.pipeline(transaction=False) as pipe:
            pipe.time()
            pipe.zcard(keys.QUEUE)
            pipe.zrange(keys.QUEUE, 0, 0, withscores=True)
            pipe.zcard(keys.LEASES)
            pipe.zcard(keys.WEBHOOKS)
            pipe.get(keys.SWEPT)
            pipe.zrange(keys.WORKERS, 0, -1, withscores=True)
            pipe.hgetall(keys.ENDED)
            pipe.hgetall(keys.RETRIES)
            answers = await pipe.execute()
        time, queued, first, running, webhooks, swept, signs, counts, retried = answers
        # With a 0 for each, as no rate would know of a first one without.
        ended = {(COMPLETED, ""): 0, (CANCELLED, ""): 0}
        ended |= {(FAILED, code): 0 for code in sorted(FAILURE_CODES)}
        took: dict[str, dict[str, int]] = {"first_chunk": {}, "answer": {}}
        for name, count in counts.items():
            what, _, which = name.decode().partition(" ")
            if what in took:
                took[what][which] = int(count)
            else:
                ended[what, which] = int(count)
        return Load(
            queued=queued,
            oldest_seconds=_seconds_since(first[0][1], time) if first else 0.0,
            running=running,
            webhooks=webhooks,
            silent_seconds=_seconds_since(swept, time),
            workers=sum(_seconds_since(sign, time) < ALIVE_SECONDS for _, sign in signs),
            ended=ended,
            first_chunk=histogram(took["first_chunk"]),
            answer=histogram(took["answer"]),
            retries=dict.fromkeys(sorted(UPSTREAM_CODES), 0)
            | {code.decode(): int(count) for code, count in retried.items()},
        )

    async def silent_seconds(self) -> float:
        """How long no worker has given a sign of life, which each does twice a second; infinity if
        none ever did. Raises RedisError also where Redis answers but takes nothing in."""
        time, swept, _ = await asyncio.gather(
            self._redis.time(),
            self._redis.get(keys.SWEPT),
            # A replica still answers reads: only a write finds out that it is one.
            self._redis.delete(keys.PROBE),
        )
        return _seconds_since(swept, time)

    async def remaining_ms(self, stream_id: str) -> int:
        """How long the log will still be readable, in ms; negative if it is gone."""
        return int(await self._redis.pttl(keys.log(stream_id)))

    async def newest_of(self, chat: str) -> str | None:
        """The id of the newest stream of a chat, which may have ended by now; None if it has none
        or that is gone."""
        stream_id = await self._redis.get(keys.chat(chat))
        return stream_id.decode() if stream_id else None

    async def cancel(self, stream_id: str) -> str:
        """Ask for the end of a stream; idempotent. Returns the kind of terminal event that stands
        now, or 'cancelling' while a worker still has to write it. Raises StreamGone."""
        verdict = await self._cancel(
            keys=[
                keys.log(stream_id),
                keys.state(stream_id),
                keys.channel(stream_id),
                keys.LEASES,
                keys.job(stream_id),
                keys.QUEUE,
                keys.WEBHOOKS,
                keys.ENDED,
            ],
            args=[stream_id, self._retention_ms, keys.CONTROL],
        )
        if verdict is None:
            raise StreamGone(GONE)
        return str(verdict.decode())

    async def erase(self, stream_id: str) -> None:
        """Remove every trace. Raises StreamGone if there was none."""
        there = await self._erase(
            keys=[
                keys.log(stream_id),
                keys.state(stream_id),
                keys.viewers(stream_id),
                keys.LEASES,
                keys.job(stream_id),
                keys.QUEUE,
                keys.WEBHOOKS,
            ],
            args=[stream_id, keys.CONTROL],
        )
        if not there:
            raise StreamGone(GONE)

    async def report_viewers(self, process: str, counts: dict[str, int]) -> None:
        """Note how many viewers this process has on each stream now; 0 withdraws the note."""
        streams = list(counts)
        for first in range(0, len(streams), _REPORTS):
            piece = streams[first : first + _REPORTS]
            await self._viewers(
                keys=[keys.viewers(stream_id) for stream_id in piece],
                args=[process, VIEWERS_SECONDS, *(counts[stream_id] for stream_id in piece)],
            )


def _created(stream_id: str, answer: list[Any]) -> Created:
    """Raises QueueFull, IdempotencyConflict."""
    match answer:
        case [b"created", _, created_ms, subscribers]:
            return Created(stream_id, created_ms, repeated=False, heard=subscribers > 0)
        case [b"repeated", known, created_ms]:
            return Created(known.decode(), int(created_ms), repeated=True)
        case [b"conflict"]:
            raise IdempotencyConflict(
                "This Idempotency-Key came with another body before: use a new key."
            )
        case _:
            raise QueueFull("The queue is full: try again in a few seconds.")


_REASONS = {
    b"fenced": "another attempt owns the stream",
    b"closed": "the stream has ended",
    b"erased": "the stream is erased, has expired or was evicted",
}


def _outcome(batch: Batch, answer: list[Any]) -> Appended | StreamLost | ResponseError:
    verdict, next_seq, cancel = answer
    # Closed by this very owner, in a call whose answer was lost; what is repeated may be less.
    stands = verdict == b"closed" and next_seq >= batch.first + batch.length
    if verdict == b"ok" or stands:
        return Appended(next_seq, bool(cancel))
    if verdict in _REASONS:
        return StreamLost(_REASONS[verdict])
    return ResponseError(verdict.decode())


def _event(entry_id: bytes, fields: dict[bytes, bytes]) -> Event:
    attempt, _, seq = entry_id.partition(b"-")
    [(kind, data)] = fields.items()
    return Event(Cursor(int(attempt), int(seq)), kind.decode(), data)


def _seconds_since(moment_ms: bytes | float | None, time: tuple[int, int]) -> float:
    """Until a time as Redis tells it, in seconds and microseconds."""
    if moment_ms is None:
        return math.inf
    seconds, micros = time
    return max(0.0, seconds + micros / 1e6 - float(moment_ms) / 1000)


def _watching(reports: dict[bytes, bytes], time: tuple[int, int]) -> dict[str, int]:
    """Those of the reports that still count, at a time as Redis tells it."""
    read = {process.decode(): json.loads(report) for process, report in reports.items()}
    oldest = time[0] - VIEWERS_SECONDS
    return {process: count for process, (count, seconds) in read.items() if seconds > oldest}
