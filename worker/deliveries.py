"""Deliveries: whoever asked for it is told that a stream has ended, at least once."""

import asyncio
import random
import time
from collections.abc import Mapping
from contextlib import suppress

from redis.exceptions import RedisError

from relay.connection import reason
from relay.logs import Logger, get_logger
from relay.outbox import Delivery, Outbox
from relay.webhooks import Target, Webhooks, payload
from worker.post import Answer, NoAnswer, Post
from worker.retry import delay_before

logger = get_logger()

MOST = 50
MOST_TO_THE_SLOW = 20
"""At a time, by one worker: a receiver that is slow must leave room for the others."""
MOST_TO_A_WILDCARD = 40
"""At a time, by one worker: whoever asks chooses among its hosts, and none may be known as slow."""
SLOW_SECONDS = 1.0
SLOW_FOR_SECONDS = 600.0
"""A receiver is taken for slow if its last try took longer than the first, and until the second."""
POLL_SECONDS = 1.0
"""For what has to be tried again, and for streams that were not ended by this worker."""
FIRST_RETRY_SECONDS = 5.0
MOST_RETRY_SECONDS = 600.0
UNWANTED = 410
"""By this status a receiver says that it wants to hear no more."""


class Deliveries:
    """Takes from the outbox what is due. A receiver that does not answer by 2xx is told again, ever
    more seldom, for as long as the stream is there."""

    def __init__(self, outbox: Outbox, webhooks: Webhooks) -> None:
        self._outbox = outbox
        self._webhooks = webhooks
        self._post = Post(private=webhooks.private, most=MOST)
        self._under_way: dict[str, asyncio.Task[None]] = {}
        self._targets: list[Target] = []
        """Of those that are under way."""
        self._early: set[str] | None = None
        """What was erased while a call to the outbox is on the wire, which may have taken it."""
        self._slow: dict[str, float] = {}
        """Hosts, and until when they are taken for slow."""
        self._stopped = False
        self._woken = asyncio.Event()

    async def run(self) -> None:
        """Return when `stop` was called and what was under way is settled, or at once if no host is
        allowed. Cancelled, leave what is under way to others."""
        if not self._webhooks.allowed:
            return
        async with asyncio.TaskGroup() as group:
            while not self._stopped:
                self._woken.clear()
                for delivery in await self._take():
                    self._begin(group, delivery)
                with suppress(TimeoutError):
                    async with asyncio.timeout(POLL_SECONDS):
                        await self._woken.wait()

    def wake(self) -> None:
        """There may be something to take."""
        self._woken.set()

    def stop(self) -> None:
        self._stopped = True
        self.wake()

    def forget(self, stream_id: str) -> None:
        """It is erased: who has not been told yet is not told any more."""
        if self._early is not None:
            self._early.add(stream_id)
        if task := self._under_way.get(stream_id):
            task.cancel()

    async def _take(self) -> list[Delivery]:
        early = self._early = set()
        try:
            taken = await self._outbox.take(MOST - len(self._under_way))
        except RedisError as error:
            logger.warning("outbox_unreadable", error=reason(error))
            return []
        finally:
            self._early = None
        return [delivery for delivery in taken if delivery.stream_id not in early]

    def _begin(self, group: asyncio.TaskGroup, delivery: Delivery) -> None:
        if delivery.stream_id in self._under_way:
            return  # This process was frozen for longer than the lease.
        task = group.create_task(self._deliver(delivery))
        self._under_way[delivery.stream_id] = task
        task.add_done_callback(lambda _: self._ended(delivery.stream_id))

    def _ended(self, stream_id: str) -> None:
        del self._under_way[stream_id]
        self.wake()

    async def _deliver(self, delivery: Delivery) -> None:
        log = logger.bind(stream=delivery.stream_id, number=delivery.number)
        try:
            await self._tell(delivery, log)
        except asyncio.CancelledError:
            await self._give_back(delivery, log)
            raise
        except RedisError as error:
            # Its lease ends, and it comes again.
            log.warning("webhook_unsettled", error=reason(error))
        except Exception as error:  # So does this one.
            log.error("delivery_died", exc_info=error)

    async def _tell(self, delivery: Delivery, log: Logger) -> None:
        answer = Answer(0, {})
        try:
            target = self._target(delivery.url)
            log = log.bind(host=target.host)
            answer = await self._send(delivery, target)
            log = log.bind(answer=answer.status)
        except NoAnswer as failure:
            log = log.bind(answer=str(failure))
        seconds = seconds_before(delivery.number + 1, answer.headers, random.random())  # noqa: S311
        if 200 <= answer.status < 300:
            log.info("webhook_delivered")
        elif answer.status == UNWANTED or seconds * 1000 > delivery.left_ms:
            log.warning("webhook_given_up")
        else:
            log.warning("webhook_failed", retry_seconds=round(seconds, 1))
            await self._outbox.postpone(delivery.stream_id, seconds)
            return
        await self._outbox.settle(delivery.stream_id)

    def _target(self, url: str) -> Target:
        try:
            return self._webhooks.target(url)
        except ValueError:
            # An API that was started later than this worker may allow more than it does.
            raise NoAnswer("NotAllowed") from None

    async def _send(self, delivery: Delivery, target: Target) -> Answer:
        begun = asyncio.get_running_loop().time()
        if self._too_many(target, begun):
            raise NoAnswer("TooManyUnderWay")
        body = payload(delivery.stream_id, delivery.kind, delivery.ended_ms, delivery.data)
        headers = self._webhooks.headers(delivery.stream_id, body, int(time.time()))
        self._targets.append(target)
        try:
            return await self._post.send(target, headers, body)
        finally:
            self._targets.remove(target)
            self._note_pace(target.host, begun)

    def _too_many(self, target: Target, now: float) -> bool:
        to_host = sum(each.host == target.host for each in self._targets)
        if self._slow.get(target.host, 0) > now and to_host >= MOST_TO_THE_SLOW:
            return True
        to_wildcard = sum(each.allowed_by == target.allowed_by for each in self._targets)
        return target.allowed_by != target.host and to_wildcard >= MOST_TO_A_WILDCARD

    def _note_pace(self, host: str, begun: float) -> None:
        now = asyncio.get_running_loop().time()
        self._slow = {each: until for each, until in self._slow.items() if until > now}
        if now - begun > SLOW_SECONDS:
            self._slow[host] = now + SLOW_FOR_SECONDS
        else:
            self._slow.pop(host, None)

    async def _give_back(self, delivery: Delivery, log: Logger) -> None:
        """Due at once for another worker; what was erased stays so."""
        try:
            await self._outbox.postpone(delivery.stream_id, 0)
        except RedisError as error:
            log.warning("webhook_unsettled", error=reason(error))


def seconds_before(number: int, headers: Mapping[str, str], chance: float) -> float:
    """Before try `number`. A receiver may ask for more time by Retry-After, not for less: it might
    ask for none, for ever."""
    return max(
        delay_before(
            number,
            said,
            chance,
            first_seconds=FIRST_RETRY_SECONDS,
            most_seconds=MOST_RETRY_SECONDS,
        )
        for said in ({}, headers)
    )
