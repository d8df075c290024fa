"""The hub: one pub/sub connection per process, one feed per watched stream."""

import asyncio
import time
from collections import Counter
from collections.abc import Coroutine
from typing import Any

from redis.asyncio import Redis
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import RedisError

from api.feed import Feed
from api.finished import Finished
from api.settle import settle
from relay import keys
from relay.connection import reason
from relay.errors import StreamGone
from relay.events import STARTED, decode_batch
from relay.listener import Listener
from relay.log import ALIVE_SECONDS, BIRTH, GONE, Log
from relay.logs import get_logger

logger = get_logger()

PATROL_SECONDS = 5.0
"""How often a watched log is read again: it may have expired, or Redis may have come back empty."""

REASON_SECONDS = 1.0
"""How often it is asked whether there is a reason for which nothing may come."""
NOTICE_SECONDS = 5.0
"""How often viewers are told that it still is so."""
NO_WORKER = b"no worker is running, the answer comes when one does"
REDIS_AWAY = b"Redis is away or takes nothing in, the answer goes on when it is back"


class Hub:
    """Guarantees: every feed that it gives out grows to be the whole log, without a gap, also
    across lost connections to Redis, or ends as gone. A further viewer costs Redis nothing.
    """

    def __init__(self, redis: Redis, log: Log, *, cache_bytes: int, retention_seconds: int) -> None:
        self._log = log
        self._retention_seconds = retention_seconds
        self._listener = Listener(
            redis,
            keys.CONTROL,
            on_message=self._heard,
            on_subscribed=self._subscribed,
            on_lost=self._lost,
        )
        self._feeds: dict[str, Feed] = {}
        self._finished = Finished(cache_bytes)
        self._watched: set[Feed] = set()
        """Those that have viewers, also when they have ended and are kept nowhere else."""
        self._beginning: dict[Feed, asyncio.Task[None]] = {}
        """Those whose log is being read for the first time."""
        self._unborn: set[Feed] = set()
        """Those whose stream is still to be created: there is nothing to read."""
        self._subscribing: dict[str, asyncio.Future[None]] = {}
        """Settled when a channel stands. Two wait for it, if a feed was erased and made anew."""
        self._reading: set[Feed] = set()
        """Those that are being brought up to date."""
        self._tasks: set[asyncio.Task[Any]] = set()
        self.draining = False

    @property
    def connected(self) -> bool:
        return self._listener.connected

    @property
    def redis_away(self) -> bool:
        """Whether Redis is known not to answer: then nobody need wait to find that out."""
        return self._listener.away

    def demand_redis(self) -> None:
        """Raises RedisError where Redis is known not to answer: one that hangs would cost whoever
        asks it a time limit."""
        if self.redis_away:
            raise RedisConnectionError("Redis is away")

    def viewers(self) -> dict[str, int]:
        """stream_id -> how many viewers it has in this process."""
        viewers: Counter[str] = Counter()
        for feed in self._watched:
            if feed.gone is None:  # Reported, it would be a trace of what was erased.
                viewers[feed.stream_id] += feed.viewers
        return viewers

    async def enter(self, stream_id: str) -> Feed:
        """The feed of a stream, once its log was read; then `leave` it.

        Raises StreamGone; RedisError if the log cannot be read now.
        """
        feed = self._finished.get(stream_id) or self._feeds.get(stream_id)
        if feed is None:
            self.demand_redis()
            feed = self._feeds[stream_id] = Feed(stream_id)
            self._beginning[feed] = self._start(self._read_first(feed))
        self._count_in(feed)
        try:
            if feed in self._beginning:
                # Shielded: a viewer that leaves must not cancel the read that others wait for.
                await asyncio.shield(self._beginning[feed])
        except BaseException:
            self.leave(feed)
            raise
        return feed

    def expect(self, stream_id: str) -> Feed:
        """The feed of a stream that is about to be born; say so when it is (`born`), then `leave`.

        It hears of everything from the birth on, so that nothing has to be read.
        """
        feed = self._feeds[stream_id] = Feed(stream_id)
        self._unborn.add(feed)
        feed.add([BIRTH])
        self._count_in(feed)
        self._listener.add(keys.channel(stream_id))
        return feed

    def born(self, feed: Feed, *, heard: bool) -> None:
        """`heard`: whether its channel had a subscriber at its birth (Created.heard). If not, it is
        read now, and once more if its channel stands only then."""
        self._unborn.discard(feed)
        if not heard or feed.stale:
            self._refresh(feed)

    def leave(self, feed: Feed) -> None:
        feed.viewers -= 1
        if feed.viewers:
            return
        self._watched.discard(feed)
        if feed not in self._beginning:
            self._let_go(feed)

    def _count_in(self, feed: Feed) -> None:
        feed.viewers += 1
        self._watched.add(feed)

    async def run(self) -> None:
        """Keep the connection and the feeds in order until cancelled."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._listener.run())
            group.create_task(self._patrol())
            group.create_task(self._tell_reasons())

    def drain(self) -> None:
        """Let viewers go, each in its own time and broken off, so that they go elsewhere."""
        self.draining = True
        logger.info("draining", viewers=sum(self.viewers().values()))
        for feed in list(self._watched):
            feed.wake()

    # Reading the log.

    async def _subscribe(self, feed: Feed) -> None:
        """Return when what is published is heard. Without a connection to Redis that is at once:
        when there is one again, every feed is read."""
        channel = keys.channel(feed.stream_id)
        self._listener.add(channel)
        if self.connected:
            stands: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            await self._subscribing.setdefault(channel, stands)

    async def _read_first(self, feed: Feed) -> None:
        """First the channel, then the log: what comes between the two is in both."""
        try:
            if feed.gone is not None:
                # Erased already, and its channel dropped: one that is asked for now would stay.
                raise feed.gone
            await self._subscribe(feed)
            feed.add(await self._log.read(feed.stream_id), read=True)
            if feed.ended:
                remaining_ms = await self._log.remaining_ms(feed.stream_id)
                self._end(feed, remaining_ms / 1000)
        except (RedisError, StreamGone):
            self._let_go(feed)
            raise
        finally:
            del self._beginning[feed]
            if not feed.viewers:
                self._let_go(feed)
            elif feed.stale:
                self._refresh(feed)

    def _is_read(self, feed: Feed) -> bool:
        """Whether its log is being read."""
        return feed in self._reading or feed in self._beginning

    def _refresh(self, feed: Feed) -> None:
        """Catch up soon. That it lacks something must be known to what is heard before that."""
        feed.stale = True
        self._start(self._catch_up(feed))

    async def _catch_up(self, feed: Feed) -> None:
        """Read what the log has after the feed's top, and again if it was asked for meanwhile."""
        feed.stale = True
        if self._is_read(feed) or feed in self._unborn:
            return
        self._reading.add(feed)
        try:
            while feed.stale and not feed.ended:
                feed.stale = False
                feed.add(await self._log.read(feed.stream_id, feed.top), read=True)
        except StreamGone as gone:
            feed.end_as_gone(gone)
        except RedisError as error:
            feed.stale = True  # The patrol comes back to it.
            # Told without its stream, as all are unreadable at once.
            logger.warning("log_unreadable", error=reason(error))
        finally:
            self._reading.discard(feed)
        if feed.ended:
            self._end(feed, self._retention_seconds)

    async def _patrol(self) -> None:
        while True:
            await asyncio.sleep(PATROL_SECONDS)
            # Nobody asks for most of them again: by that alone they would stay.
            self._finished.drop_expired()
            for feed in list(self._feeds.values()):
                if self.redis_away:
                    break  # Each would say so in the log; all are read when it is back.
                await self._catch_up(feed)

    # Telling viewers why nothing comes.

    async def _tell_reasons(self) -> None:
        """No event can say that there is nobody who would write one. So this does."""
        told: dict[Feed, float] = {}
        while True:
            await asyncio.sleep(REASON_SECONDS)
            # Who comes while that is asked may have come after it was so.
            waiting = list(self._feeds.values())
            why = await self._reason_to_wait()
            now = time.monotonic()
            # Who comes later has a turn of its own, and is told at once.
            told = {feed: at for feed, at in told.items() if why and now - at < NOTICE_SECONDS}
            for feed in waiting if why else ():
                if feed not in told:
                    told[feed] = now
                    feed.notice(why)

    async def _reason_to_wait(self) -> bytes:
        """Empty if there is none."""
        if self.redis_away:
            return REDIS_AWAY
        try:
            # Asked though nobody waits: it writes, and so finds out where the master is.
            silent = await self._log.silent_seconds() > ALIVE_SECONDS
        except RedisError:
            return REDIS_AWAY
        self._listener.follow()
        return NO_WORKER if silent else b""

    # Hearing what is published.

    def _subscribed(self, channel: str) -> None:
        """What was published before the subscription stood is only in the log."""
        if stands := self._subscribing.pop(channel, None):
            settle(stands, None)
        elif (feed := self._feed_of(channel)) and feed not in self._unborn:
            self._refresh(feed)

    def _heard(self, channel: str, message: bytes) -> None:
        if channel == keys.CONTROL:
            self._obey(*message.decode().split(" "))
        elif feed := self._feed_of(channel):
            events = decode_batch(message)
            # A new attempt may follow on any event, and would hide what is to be read before it.
            hides = events[0].kind == STARTED and (feed.stale or self._is_read(feed))
            if hides or not feed.add(events):
                self._refresh(feed)
            if feed.ended:
                self._end(feed, self._retention_seconds)

    def _lost(self) -> None:
        """What is erased from now on goes unheard here, so nothing may be kept."""
        self._finished.clear()
        for feed in self._unborn:
            feed.stale = True
        for stands in self._subscribing.values():
            settle(stands, None)
        self._subscribing.clear()

    def _feed_of(self, channel: str) -> Feed | None:
        return None if channel == keys.CONTROL else self._feeds.get(keys.stream_of(channel))

    def _obey(self, order: str, stream_id: str) -> None:
        if order == "erase":
            self.forget(stream_id)

    def forget(self, stream_id: str) -> None:
        """It was erased: nobody is shown it here any more."""
        self._finished.drop(stream_id)
        feeds = {feed for feed in self._watched if feed.stream_id == stream_id}
        if current := self._feeds.get(stream_id):
            feeds.add(current)  # It has no viewers if all have left while it is read.
        for feed in feeds:
            feed.end_as_gone(StreamGone(GONE))
            self._end(feed, 0)

    # Letting go.

    def _end(self, feed: Feed, keep_seconds: float) -> None:
        """A feed that has ended needs no channel, and stays for those who come late."""
        # One that was let go before may have been erased since, unheard.
        current = self._feeds.get(feed.stream_id) is feed
        self._let_go(feed)
        if current and feed.gone is None and self.connected:
            self._finished.keep(feed, keep_seconds)

    def _let_go(self, feed: Feed) -> None:
        self._unborn.discard(feed)
        feed.stale = False
        if self._feeds.get(feed.stream_id) is feed:
            del self._feeds[feed.stream_id]
            self._listener.drop(keys.channel(feed.stream_id))

    def _start(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task


class Watching:
    """The feeds that one response watches, until it has ended."""

    __slots__ = ("_feeds", "_hub")

    def __init__(self, hub: Hub) -> None:
        self._hub = hub
        self._feeds: list[Feed] = []

    async def feed(self, stream_id: str) -> Feed:
        """As `Hub.enter`."""
        feed = await self._hub.enter(stream_id)
        self._feeds.append(feed)
        return feed

    def expect(self, stream_id: str) -> Feed:
        """As `Hub.expect`."""
        feed = self._hub.expect(stream_id)
        self._feeds.append(feed)
        return feed

    def end(self) -> None:
        for feed in self._feeds:
            self._hub.leave(feed)
        self._feeds.clear()
