"""arq's worker, with its way of taking jobs replaced by the claim.

arq keeps what it does well: the format of jobs, the registry of functions, signals and the wait for
what runs, the health key. Why the rest had to go is in ARCHITECTURE.md.
"""

import asyncio
import json
import math
from collections.abc import Callable, Coroutine
from contextlib import suppress
from dataclasses import dataclass
from signal import Signals
from typing import Any

from arq import Worker
from arq.connections import ArqRedis
from arq.jobs import deserialize_job
from arq.typing import StartupShutdown
from arq.worker import Function
from redis.asyncio import Redis
from redis.exceptions import RedisError

from relay import keys
from relay.claim import Claim, Claims, emptied
from relay.connection import REPLY_SECONDS, connect, reason
from relay.descriptors import warn_when_scarce
from relay.listener import Listener
from relay.logs import get_logger
from relay.settings import Settings
from worker.deliveries import Deliveries
from worker.health import health_key

logger = get_logger()

CLAIMED_AT_ONCE = 4
"""What is begun together also answers together, all of it late: each waits for every other's first
step. And what is not claimed yet another worker can take."""
POLL_SECONDS = 1.0
"""The slow poll behind the wake-up: a token can be lost with the worker that took it."""
SWEEP_SECONDS = 0.5
REDIS_RETRY_SECONDS = 0.2
HEALTH_SECONDS = 10
EVICTION_SECONDS = 60
"""The next Redis behind the same address may have another policy."""


@dataclass(slots=True)
class Job:
    """A claimed job as its function sees it, in `ctx["job"]`; the function says how to stop it."""

    claim: Claim
    on_cancel: Callable[[], None] = lambda: None
    on_lost: Callable[[], None] = lambda: None

    def obey(self, order: str) -> None:
        if order == "cancel":
            self.on_cancel()
        elif order == "erase":
            self.on_lost()


class ClaimingWorker(Worker):
    """Takes a job within milliseconds of its enqueueing, holds it by a lease, and loses it to
    another worker when the lease lapses. Survives every outage of Redis."""

    def __init__(
        self,
        functions: list[Function],
        settings: Settings,
        *,
        redis: Redis,
        claims: Claims,
        deliveries: Deliveries,
        ctx: dict[str, Any],
        on_shutdown: StartupShutdown,
        handle_signals: bool = True,
    ) -> None:
        super().__init__(
            functions,
            queue_name=keys.QUEUE,
            redis_pool=ArqRedis(connection_pool=redis.connection_pool),
            max_jobs=settings.concurrency,
            job_completion_wait=math.ceil(settings.grace_seconds),
            health_check_interval=3 * HEALTH_SECONDS,
            health_check_key=health_key(),
            on_shutdown=on_shutdown,
            keep_result=0,
            ctx=ctx,
            handle_signals=handle_signals,
        )
        self._claims = claims
        self._redis = redis
        self._patient_redis = connect(
            settings.redis_url, connections=1, reply_seconds=POLL_SECONDS + REPLY_SECONDS
        )
        """For the one call that waits for a token, longer than any other may."""
        self._lease_seconds = settings.lease_seconds
        self._deliveries = deliveries
        self._delivering: asyncio.Task[None] | None = None
        self._held: dict[str, Job] = {}
        self._early: dict[str, str] = {}
        """Stream id -> the order that came while a claim was on the wire, perhaps for its job."""
        self._slot_free = asyncio.Event()
        self._intake: asyncio.Task[None] | None = None
        self._waiting = False
        self._policy: str | None = None
        """By which Redis evicts, as it was told last."""
        self._listener = Listener(redis, keys.CONTROL, on_message=self._obey)

    async def main(self) -> None:
        logger.info("worker_ready", worker=self._claims.worker, concurrency=self.max_jobs)
        async with asyncio.TaskGroup() as group:
            group.create_task(self._listener.run())
            self._intake = group.create_task(self._take_jobs())
            group.create_task(self._every(self._lease_seconds / 3, self._renew))
            sweep_seconds = min(SWEEP_SECONDS, self._lease_seconds / 10)
            group.create_task(self._every(sweep_seconds, self._sweep))
            group.create_task(self._every(HEALTH_SECONDS, self._report_health))
            group.create_task(self._every(EVICTION_SECONDS, self._warn_of_eviction))
            group.create_task(warn_when_scarce())
            self._delivering = group.create_task(self._deliveries.run())

    def handle_sig_wait_for_completion(self, signum: Signals) -> None:
        """Take nothing more from this moment on, and let what runs end within the grace."""
        if not self.allow_pick_jobs:
            self.handle_sig(signum)  # Whoever asks twice does not want to wait.
            return
        self._finish_deliveries()
        super().handle_sig_wait_for_completion(signum)
        if self._waiting and self._intake is not None:
            # It would go on waiting for a token, and take it from those who go on.
            self._intake.cancel()

    async def close(self) -> None:
        """Hand over what still runs and let go of everything. Call it when `main` has ended."""
        tasks = list(self.tasks.values())
        for task in tasks:
            # One that arq has cancelled already is handing over: a second cancel would cut that.
            if not task.cancelling():
                task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for job in list(self._held.values()):  # One cancelled before its first step did not.
            await self._hand_over(job.claim)
        with suppress(RedisError):  # Then their leases lapse.
            await self._claims.give_back_unheard()
        if self.on_shutdown:
            await self.on_shutdown(self.ctx)
        await self._redis.aclose(close_connection_pool=True)
        await self._patient_redis.aclose(close_connection_pool=True)

    def _finish_deliveries(self) -> None:
        """What is under way goes among arq's tasks, for which arq waits."""
        self._deliveries.stop()
        if self._delivering is not None and not self._delivering.done():
            self.tasks["deliveries"] = self._delivering
            self._delivering.add_done_callback(lambda _: self.tasks.pop("deliveries"))

    async def _take_jobs(self) -> None:
        while self.allow_pick_jobs:
            want = min(CLAIMED_AT_ONCE, self.max_jobs - len(self._held))
            if want == 0:
                self._slot_free.clear()
                await self._slot_free.wait()
                continue
            try:
                nothing_left = await self._claim(want)
                if nothing_left and self.allow_pick_jobs:
                    self._waiting = True
                    await self._claims.wait_for_job(self._patient_redis, POLL_SECONDS)
            except RedisError as error:
                self._tell("claim_failed", error)
                await asyncio.sleep(REDIS_RETRY_SECONDS)
            finally:
                self._waiting = False

    async def _claim(self, want: int) -> bool:
        """Begin up to `want` jobs; return whether none is left. At SIGTERM arq waits for its tasks,
        and so for a claim that is on the wire: without an owner that knows of it, its jobs would be
        lost."""
        claiming = self.tasks["claim"] = self.loop.create_task(self._claims.claim(want))
        try:
            claims = await claiming
            for claim in claims:
                self._begin(claim)
            return emptied(claims, want)
        finally:
            del self.tasks["claim"]
            self._early.clear()

    def _begin(self, claim: Claim) -> None:
        logger.info("claimed", stream=claim.stream_id, attempt=claim.attempt, times=claim.ordinal)
        if earlier := self._held.get(claim.stream_id):
            # Redis forgot that it was ours and gave it to us once more.
            earlier.on_lost()
        job = self._held[claim.stream_id] = Job(claim)
        task = self.loop.create_task(self._run(job))
        self.tasks[claim.owner + claim.stream_id] = task
        if order := self._early.get(claim.stream_id):
            self._pass_on(order, job)

    async def _run(self, job: Job) -> None:
        claim = job.claim
        try:
            call = deserialize_job(claim.job, deserializer=json.loads)
            function: Any = self.functions[call.function].coroutine
            await function({**self.ctx, "job": job}, *call.args, **call.kwargs)
            self.jobs_complete += 1
        except asyncio.CancelledError:
            await self._hand_over(claim)
        except Exception as error:  # The job is another's, once the lease lapses.
            self.jobs_failed += 1
            logger.error("job_died", stream=claim.stream_id, exc_info=error)
        finally:
            if self._held.get(claim.stream_id) is job:
                del self._held[claim.stream_id]
            del self.tasks[claim.owner + claim.stream_id]
            self._slot_free.set()
            self._deliveries.wake()

    async def _hand_over(self, claim: Claim) -> None:
        try:
            for stream_id, ended, _ in await self._claims.hand_over(claim):
                told = {"stream": stream_id, "attempt": claim.attempt, "ended": ended or None}
                logger.info("handed_over", **told)
        except RedisError as error:
            # Its lease lapses, and a sweep finds it.
            logger.warning("hand_over_failed", stream=claim.stream_id, error=reason(error))

    async def _renew(self) -> None:
        jobs = list(self._held.values())
        if not jobs:
            return
        for job, verdict in zip(
            jobs, await self._claims.renew([job.claim for job in jobs]), strict=True
        ):
            if verdict == "lost":
                job.on_lost()
            elif verdict == "cancel":
                job.on_cancel()

    async def _report_health(self) -> None:
        # arq skips a report that comes early, even one that makes up for a failed one.
        self._last_health_check = 0
        await self.record_health()

    async def _warn_of_eviction(self) -> None:
        """For want of memory Redis would forget answers under way, instead of refusing new ones."""
        with suppress(RedisError):
            # Not every service that speaks as Redis tells it.
            policy = (await self._redis.info("memory")).get("maxmemory_policy")
            if policy not in {None, "noeviction", self._policy}:
                logger.warning("redis_evicts", policy=policy)
            self._policy = policy

    async def _sweep(self) -> None:
        # Each call finds a hundred at most: with a pause after each, those of a worker that had
        # many would be silent for longer than viewers are to wait.
        while released := await self._claims.sweep():
            for stream_id, ended, owner in released:
                logger.warning("lease_lapsed", stream=stream_id, owner=owner, ended=ended or None)
            self._deliveries.wake()
        self._listener.follow()
        while overdue := await self._claims.end_overdue():
            for stream_id in overdue:
                logger.warning("queue_timeout", stream=stream_id)
            self._deliveries.wake()

    def _obey(self, _: str, message: bytes) -> None:
        order, _, stream_id = message.decode().partition(" ")
        if order == "erase":
            self._deliveries.forget(stream_id)
        if "claim" in self.tasks:
            self._early[stream_id] = order
        if job := self._held.get(stream_id):
            self._pass_on(order, job)

    def _pass_on(self, order: str, job: Job) -> None:
        # Not at once: one that was begun just now says in its first step how to stop it.
        self.loop.call_soon(job.obey, order)

    async def _every(self, seconds: float, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
        while True:
            pause = seconds
            try:
                await work()
            except RedisError as error:
                self._tell("round_failed", error, work=work.__name__.lstrip("_"))
                # A lease that was not renewed runs on: there is no time to wait out the round.
                pause = min(seconds, REDIS_RETRY_SECONDS)
            await asyncio.sleep(pause)

    def _tell(self, event: str, error: RedisError, **more: str) -> None:
        """But of a Redis that is away the listener tells, once for all."""
        if not self._listener.away:
            logger.warning(event, **more, error=reason(error))
