"""The load: streams of all kinds, each with viewers that come, drop and come back, and a journal of
what everybody saw."""

import asyncio
import json
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import dataclass, field
from random import Random
from typing import Any, NamedTuple

import httpx2
from redis.exceptions import RedisError

from chaos.anomaly import Anomaly
from chaos.faults import Wait
from chaos.journal import Logged, Received, Seen, Visit
from emulator.script import prompt
from relay.errors import StreamGone
from relay.events import COMPLETED, FAILED, TERMINAL, Event
from relay.log import Log

IN_FLIGHT = 12
VIEWERS = 3
JOIN_SECONDS = 2.0
PATIENCE_SECONDS = (0.3, 3.0)
AWAY_SECONDS = (0.2, 0.5)
DEADLINE_SECONDS = 60.0
"""Without a word, after which a viewer gives up; and to get a stream at all."""
READ_SECONDS = 20.0
"""Beyond the heartbeat: a connection that is silent for longer is dead."""


@dataclass(frozen=True)
class Question:
    """One stream to be: what the upstream will do and what its user will."""

    key: str
    script: dict[str, Any]
    act: str
    """`cancel`, `erase` or nothing, `act_seconds` after it was asked."""
    act_seconds: float
    only_once: bool
    """Ask that the answer is not begun anew."""

    @property
    def paced(self) -> bool:
        """No silence in it is the script's own."""
        return not {"first_ms", "status"} & self.script.keys()

    def body(self) -> dict[str, Any]:
        body: dict[str, Any] = {"messages": [{"role": "user", "content": prompt(**self.script)}]}
        return {**body, "recovery": "fail"} if self.only_once else body


class Life(NamedTuple):
    """From when to when a stream was under way; time.monotonic()."""

    begun: float
    settled: float


class Frame(NamedTuple):
    """One server-sent event; a comment that says something has kind and data empty."""

    cursor: str
    kind: str
    data: str


@dataclass
class Load:
    """Keeps IN_FLIGHT streams under way until `enough` is set, and all that was seen."""

    urls: list[str]
    http: httpx2.AsyncClient
    log: Log
    random: Random
    enough: asyncio.Event = field(default_factory=asyncio.Event)
    logs: list[Logged] = field(default_factory=list)
    viewers: list[Seen] = field(default_factory=list)
    waits: list[Wait] = field(default_factory=list)
    lives: dict[str, Life] = field(default_factory=dict)
    anomalies: list[Anomaly] = field(default_factory=list)
    asked: int = 0

    async def run(self) -> None:
        """Return when `enough` is set and every stream has settled: its log has ended or is gone
        and no viewer waits. Cancelling it closes the journals as they stand."""
        async with asyncio.TaskGroup() as group:
            for _ in range(IN_FLIGHT):
                group.create_task(self._ask_on())

    def url(self) -> str:
        return self.random.choice(self.urls)

    async def _ask_on(self) -> None:
        while not self.enough.is_set():
            question = self._question()
            begun = time.monotonic()
            stream_id = await self._ask(question)
            if stream_id is None:
                continue
            try:
                await _Stream(self, question, stream_id).run()
            finally:
                self.lives[stream_id] = Life(begun, time.monotonic())

    def _question(self) -> Question:
        random = self.random
        self.asked += 1
        key = f"q{self.asked}"
        script: dict[str, Any] = {
            "label": True,
            "key": key,
            "chunks": random.randint(40, 200),
            "delay_ms": random.randint(20, 60),
        }
        kind = random.random()
        if kind < 0.10:
            script |= {"status": 503, "status_times": 1, "retry_after_ms": 200}
        elif kind < 0.20:
            script["first_ms"] = random.randint(1000, 4000)
        elif kind < 0.28:
            script["end"] = "eof"
        act = random.choices(["", "cancel", "erase"], [0.86, 0.08, 0.06])[0]
        only_once = random.random() < 0.2
        return Question(key, script, act, random.uniform(0.1, 4), only_once)

    async def _ask(self, question: Question) -> str | None:
        """As a client would: again and again under one Idempotency-Key, until it stands."""
        headers = {"idempotency-key": question.key}
        begun, last = time.monotonic(), "no answer"
        while time.monotonic() - begun < DEADLINE_SECONDS:
            try:
                url = f"{self.url()}/chat"
                response = await self.http.post(url, json=question.body(), headers=headers)
            except httpx2.TransportError as error:
                last = type(error).__name__
            else:
                if response.status_code == 202:
                    return str(response.json()["stream_id"])
                last = f"{response.status_code} {response.text}"
                if response.status_code != 503:
                    break
            await asyncio.sleep(0.3)
        what = f"POST /chat led to no stream: {last}"
        self.anomalies.append(Anomaly("refused", "", question.key, what))
        return None


class _Stream:
    """One stream, its viewers and its user."""

    def __init__(self, load: Load, question: Question, stream_id: str) -> None:
        self.load = load
        self.question = question
        self.stream_id = stream_id
        self.ended = asyncio.Event()
        """A viewer has seen the end."""

    async def run(self) -> None:
        async with asyncio.TaskGroup() as group:
            viewers = [
                group.create_task(_Viewer(self, f"{self.question.key}/{number}").watch())
                for number in range(VIEWERS)
            ]
            group.create_task(self._read_log())
            if self.question.act:
                group.create_task(self._act())
            await asyncio.wait(viewers)
            self.ended.set()

    async def _act(self) -> None:
        await asyncio.sleep(self.question.act_seconds)
        url = f"/streams/{self.stream_id}"
        method, path = (
            ("DELETE", url) if self.question.act == "erase" else ("POST", f"{url}/cancel")
        )
        begun = time.monotonic()
        while time.monotonic() - begun < DEADLINE_SECONDS:
            with suppress(httpx2.TransportError):
                response = await self.load.http.request(method, self.load.url() + path)
                if response.status_code < 500:
                    return
                if response.status_code != 503:
                    what = f"{method} {path} answered {response.status_code} {response.text}"
                    where = self.question.key
                    self.load.anomalies.append(Anomaly("erred", self.stream_id, where, what))
                    return
            await asyncio.sleep(0.3)

    async def _read_log(self) -> None:
        """Once it has ended, and at once then: Redis may lose it."""
        events: list[Event] | None = []
        try:
            await self.ended.wait()
            while events is not None and not (events and events[-1].terminal):
                await asyncio.sleep(0.3 if events else 0)
                with suppress(RedisError, OSError):
                    events = await self._read()
        finally:
            self.load.logs.append(Logged(self.stream_id, self.question.key, events))
        if events and self.question.script.get("end") == "eof" and events[-1].kind == COMPLETED:
            what = "the upstream broke off, and the log says completed"
            self.load.anomalies.append(Anomaly("pretended", self.stream_id, "log", what))

    async def _read(self) -> list[Event] | None:
        try:
            return await self.load.log.read(self.stream_id)
        except StreamGone:
            return None


class _Viewer:
    """Watches until the end, over as many visits as it takes. Some leave for good."""

    def __init__(self, stream: _Stream, name: str) -> None:
        self.stream = stream
        self.load = stream.load
        self.name = name
        self.visits: list[Visit] = []
        self.cursor = ""
        self.over = False
        self.wait = Wait(time.monotonic())
        self.last_word = time.monotonic()

    async def watch(self) -> None:
        random = self.load.random
        await asyncio.sleep(random.uniform(0, JOIN_SECONDS))
        self.wait.begun = self.last_word = time.monotonic()
        if self.stream.question.paced:
            self.load.waits.append(self.wait)
        deadline_passed = False
        try:
            while not self.over and not deadline_passed:
                visit = await self._visit()
                self.visits.append(visit)
                if visit.end == "left" and random.random() < 0.1:
                    return
                if not self.over:
                    await asyncio.sleep(random.uniform(*AWAY_SECONDS))
                if random.random() < 0.05:
                    self.cursor = ""
                deadline_passed = time.monotonic() - self.last_word > DEADLINE_SECONDS
        finally:
            stream_id = self.stream.stream_id
            self.load.viewers.append(Seen(self.name, stream_id, self.visits, deadline_passed))

    async def _visit(self) -> Visit:
        patience = None
        if self.load.random.random() < 0.4:
            patience = self.load.random.uniform(*PATIENCE_SECONDS)
        cursor, received = self.cursor, list[Received]()
        try:
            async with asyncio.timeout(patience):
                end = await self._read(received)
        except TimeoutError:
            end = "left"
        except (httpx2.ConnectError, httpx2.ConnectTimeout):
            end = "refused"
        except httpx2.TransportError:
            end = "broken"
        if end in {"nothing", "gone"}:
            self._hear(over=True)
        return Visit(cursor, received, end)

    async def _read(self, received: list[Received]) -> Any:
        headers = {"accept": "text/event-stream"}
        if self.cursor:
            headers["last-event-id"] = self.cursor
        url = f"{self.load.url()}/streams/{self.stream.stream_id}/events"
        async with self.load.http.stream("GET", url, headers=headers) as response:
            if response.status_code != 200:
                return await self._refused(response)
            async for frame in _frames(response):
                if frame.kind:
                    data = json.loads(frame.data)
                    received.append(Received(frame.cursor, frame.kind, data))
                    self.cursor = frame.cursor or self.cursor
                self._hear(over=frame.kind in TERMINAL)
        return "clean"

    async def _refused(self, response: httpx2.Response) -> str:
        status = response.status_code
        if status not in {204, 404, 410, 503}:
            await response.aread()
            what = f"GET events with cursor {self.cursor!r} answered {status} {response.text}"
            self.load.anomalies.append(Anomaly("erred", self.stream.stream_id, self.name, what))
        return {204: "nothing", 404: "gone", 410: "gone"}.get(status, "refused")

    def _hear(self, *, over: bool) -> None:
        self.last_word = time.monotonic()
        self.wait.words.append(self.last_word)
        if over:
            self.over = True
            self.stream.ended.set()


async def _frames(response: httpx2.Response) -> AsyncIterator[Frame]:
    cursor = kind = ""
    data: list[str] = []
    async for line in response.aiter_lines():
        name, _, value = line.partition(":")
        value = value.removeprefix(" ")
        if not line:
            if kind and data:
                yield Frame(cursor, kind, "\n".join(data))
            cursor, kind, data = "", "", []
        elif not name and value:
            yield Frame("", "", "")
        elif name == "id":
            cursor = value
        elif name == "event":
            kind = value
        elif name == "data":
            data.append(value)


def outcomes(logs: list[Logged]) -> Counter[str]:
    """How the streams ended: the kind, for `failed` with its code, or `gone`."""
    counts: Counter[str] = Counter()
    for log in logs:
        if log.events is None:
            counts["gone"] += 1
        elif not log.events or not log.events[-1].terminal:
            counts["unended"] += 1
        elif (last := log.events[-1]).kind == FAILED:
            counts[f"failed {last.value()['code']}"] += 1
        else:
            counts[last.kind] += 1
    return counts
