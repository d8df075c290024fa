"""The checker of a fault run: reads the journals of all parties and names every anomaly. Pure.

A log and a viewer are read the same way, as runs: what one party has since one `started` (or since
`queued`). What holds for a run holds in a log and at a viewer alike. Legal, and no anomaly:

- A viewer has more than the log, or a terminal event that the log has not: Redis lost its tail.
- A visit begins with `started`, of whatever attempt, where its cursor is not in the log any more.
- A terminal event stands alone at `<later attempt>-0`: nobody owned the stream.
- A viewer left, or was told that the stream is gone; nobody knows what stands in a lost log.

Linear in the number of events, but for resuming at a cursor older than the newest, which costs a
copy of the run.
"""

import hashlib
import json
import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain, pairwise
from typing import Any, NamedTuple, Self

from api.wires import native
from chaos.anomaly import Anomaly, Kind
from chaos.journal import Logged, Received, Seen, Sent
from relay.events import CHUNK, COMPLETED, QUEUED, STARTED, TERMINAL, Cursor, Event, join_text

Evidence = Iterator[str]
"""What a rule finds in one run, a sentence each; none if all is well."""
Finding = tuple[Kind, str, str]
"""Kind, where and what: an anomaly of the one stream that is looked at."""

_LABEL = re.compile(r"([0-9]+)\.([0-9]+) ")
_BIRTH = Cursor(0, 1)


class Label(NamedTuple):
    """The text of one chunk: which upstream request wrote it as its how-manieth piece."""

    request: int
    piece: int

    def __str__(self) -> str:
        return f"{self.request}.{self.piece}"


class Item(NamedTuple):
    """An event as it is on the native wire, from a log or at a viewer."""

    cursor: Cursor
    kind: str
    data: dict[str, Any]

    @classmethod
    def received(cls, received: Received) -> Self:
        return cls(Cursor.parse(received.cursor), received.kind, received.data)

    @classmethod
    def logged(cls, event: Event) -> Self:
        lines = native.encode(event).decode().split("\n")
        fields = dict(line.split(": ", 1) for line in lines if line)
        return cls(event.cursor, fields["event"], json.loads(fields["data"]))

    @property
    def begins(self) -> bool:
        """Whether it means, clear what you have. `queued` comes where nothing has started."""
        return self.kind in {STARTED, QUEUED}

    @property
    def terminal(self) -> bool:
        return self.kind in TERMINAL

    @property
    def text(self) -> str:
        return str(self.data.get("text", "")) if self.kind == CHUNK else ""


@dataclass
class Run:
    """What one party has since one beginning, in the order in which it came."""

    items: list[Item] = field(default_factory=list)
    base: Cursor | None = None
    """The cursor that a viewer came with and had not received itself."""
    prior: "Run | None" = None
    """The run that this one has to be above; None where it may begin anywhere."""

    @property
    def attempt(self) -> int:
        return self.base.attempt if self.base else self.items[0].cursor.attempt

    @property
    def top(self) -> Cursor:
        return self.items[-1].cursor if self.items else self.base or _BIRTH

    @property
    def whole(self) -> bool:
        return self.base is None and self.items[0].begins

    @cached_property
    def once(self) -> list[Item]:
        """The items without those whose cursor came before."""
        return list({item.cursor: item for item in reversed(self.items)}.values())[::-1]

    @cached_property
    def cursors(self) -> set[Cursor]:
        return {item.cursor for item in self.items} | ({self.base} if self.base else set())

    @cached_property
    def own(self) -> list[Item]:
        return [item for item in self.once if item.cursor.attempt == self.attempt]

    @cached_property
    def labels(self) -> list[tuple[Item, Label | None]]:
        """The chunks with text; None for a text that no upstream request writes."""
        return [(item, _label(item.text)) for item in self.own if item.text]

    @cached_property
    def request(self) -> int | None:
        """The upstream request that this run is of."""
        return next((label.request for _, label in self.labels if label), None)

    @cached_property
    def pieces(self) -> list[int]:
        labels = [label for _, label in self.labels if label]
        return [label.piece for label in labels if label.request == self.request]


@dataclass
class Reading:
    """All that one party has of one stream."""

    where: str
    runs: list[Run]


@dataclass
class Stream:
    """What the rules need to know of the stream beside the run that they look at."""

    key: str
    sent: dict[int, Sent]
    """Of all streams, by request: a chunk may have strayed in from another stream."""
    asked: list[Sent]
    """Of this stream."""
    log: Reading | None

    @cached_property
    def standing(self) -> set[Cursor]:
        return set().union(*(run.cursors for run in self.log.runs)) if self.log else set()

    @cached_property
    def newest(self) -> Run | None:
        return self.log.runs[-1] if self.log and self.log.runs else None


def check(sent: list[Sent], logs: list[Logged], viewers: list[Seen]) -> list[Anomaly]:
    """Every anomaly, the first of its kind at each place. `lost` is told only of a place where
    nothing else is wrong: a text that does not add up follows from each of the other kinds.

    Raises ValueError for a viewer of a stream that is not in `logs`.
    """
    by_request = {request.request: request for request in sent}
    by_key, by_stream = defaultdict(list), defaultdict(list)
    for request in sent:
        by_key[request.key].append(request)
    for viewer in viewers:
        by_stream[viewer.stream_id].append(viewer)
    if unknown := by_stream.keys() - {log.stream_id for log in logs}:
        raise ValueError(f"viewers of streams without a log: {sorted(unknown)}")
    found: list[Anomaly] = []
    for log in logs:
        stream = Stream(log.key, by_request, by_key[log.key], _read_log(log))
        found += _check_stream(stream, log, by_stream[log.stream_id])
    return [*found, *_leaked(sent, logs)]


def _check_stream(stream: Stream, log: Logged, viewers: list[Seen]) -> list[Anomaly]:
    seen = [_read_viewer(viewer, stream.standing) for viewer in viewers]
    readings = [stream.log, *seen] if stream.log else seen
    found: dict[tuple[Kind, str], str] = {}
    ends = chain(_log_findings(log), *(_viewer_findings(viewer, log) for viewer in viewers))
    for kind, where, what in chain(
        ends, _run_findings(readings, stream), _divergent(readings), _shared(readings)
    ):
        found.setdefault((kind, where), what)
    blamed = {where for _, where in found}
    for reading in readings:
        if reading.where not in blamed:
            for what in chain.from_iterable(_lost(run, stream) for run in reading.runs):
                found.setdefault(("lost", reading.where), what)
    return [Anomaly(kind, log.stream_id, where, what) for (kind, where), what in found.items()]


def _run_findings(readings: list[Reading], stream: Stream) -> Iterator[Finding]:
    for reading in readings:
        for run in reading.runs:
            for kind, rule in _RULES.items():
                for what in rule(run, stream):
                    yield kind, reading.where, what


# From journals to runs.


def _read_log(log: Logged) -> Reading | None:
    if log.events is None:
        return None
    runs: list[Run] = []
    _take(runs, "", [Item.logged(event) for event in log.events], set())
    return Reading("log", runs)


def _read_viewer(viewer: Seen, standing: set[Cursor]) -> Reading:
    runs: list[Run] = []
    for visit in viewer.visits:
        items = [Item.received(received) for received in visit.received if received.cursor]
        _take(runs, visit.cursor, items, standing)
    return Reading(_where(viewer), runs)


def _where(viewer: Seen) -> str:
    return f"viewer {viewer.name}"


def _label(text: str) -> Label | None:
    match = _LABEL.fullmatch(text)
    return Label(int(match[1]), int(match[2])) if match else None


def _take(runs: list[Run], cursor: str, items: list[Item], standing: set[Cursor]) -> None:
    """Add what one connection brought that came with `cursor`."""
    for index, item in enumerate(items):
        if index == 0:
            _open(runs, Cursor.parse(cursor) if cursor else None, item, standing)
        elif item.begins:
            runs.append(Run(prior=runs[-1]))
        runs[-1].items.append(item)


def _open(runs: list[Run], cursor: Cursor | None, first: Item, standing: set[Cursor]) -> None:
    """Make the last run the one that a connection with `cursor` goes on with."""
    if cursor is None:
        runs.append(Run())
    elif first.begins:
        # Back behind a cursor that the log still has: nobody had a reason to clear.
        behind = first.kind == QUEUED or first.cursor.attempt < cursor.attempt
        known = cursor in standing or cursor == first.cursor
        prior = runs[-1] if runs else Run(base=cursor)
        runs.append(Run(prior=prior if behind and known else None))
    elif not runs:
        runs.append(Run(base=cursor))
    elif cursor != runs[-1].top:
        run = runs[-1]
        upto = [index for index, item in enumerate(run.items) if item.cursor == cursor]
        if upto:
            runs.append(Run(run.items[: upto[-1] + 1], run.base, run.prior))


# The rules of a run.


def _duplicated(run: Run, _: Stream) -> Evidence:
    head = run.items[0].cursor
    if run.prior and head in run.prior.cursors:
        yield f"{run.items[0].kind} {head} comes again"
    seen = {run.base}
    for item in run.items:
        if item.cursor in seen:
            yield f"{item.cursor} comes twice after one start"
        seen.add(item.cursor)
    texts: dict[Label, Cursor] = {}
    for item, label in run.labels:
        if label in texts:
            yield f"the text {label} of {texts[label]} comes again as {item.cursor}"
        if label:
            texts[label] = item.cursor


def _reordered(run: Run, _: Stream) -> Evidence:
    head = run.items[0].cursor
    if run.prior and head not in run.prior.cursors and head < run.prior.top:
        yield f"{run.items[0].kind} {head} comes after {run.prior.top}"
    cursors = [run.base] if run.base else []
    for before, after in pairwise(cursors + [item.cursor for item in run.own]):
        if after < before:
            yield f"{after} comes after {before}"
    pieces = list(dict.fromkeys(run.pieces))
    for earlier, later in pairwise(pieces):
        if later < earlier:
            yield f"piece {later} of upstream request {run.request} comes after piece {earlier}"


def _skipped(run: Run, _: Stream) -> Evidence:
    first = run.items[0]
    if run.base is None and not first.begins:
        yield f"it begins with {first.kind} {first.cursor}, without a start"
    seqs = {cursor.seq for cursor in run.cursors if cursor.attempt == run.attempt}
    lowest = {STARTED: 0, QUEUED: _BIRTH.seq}.get(first.kind, min(seqs))
    for seq in range(lowest, max(seqs)):
        if seq not in seqs:
            yield f"{run.attempt}-{seq} is missing below {run.attempt}-{max(seqs)}"
            # A cursor out of all bounds would make a sentence for each number below it.
            return


def _spliced(run: Run, stream: Stream) -> Evidence:
    for item in run.once:
        alone = item.terminal and item.cursor.seq == 0 and item.cursor.attempt > run.attempt
        if item.cursor.attempt != run.attempt and not alone:
            yield f"{item.kind} {item.cursor} comes in attempt {run.attempt} without a start"
    for item, label in run.labels:
        if label is None:
            continue
        sent = stream.sent.get(label.request)
        if label.request != run.request:
            yield f"{item.cursor} has the text {label} among those of request {run.request}"
        if sent is None or label.piece >= sent.pieces:
            yield f"{item.cursor} has the text {label}, which the upstream never wrote"
        elif sent.key != stream.key:
            yield f"{item.cursor} has the text {label} of another question, {sent.key}"


def _run_unterminated(run: Run, _: Stream) -> Evidence:
    if run.prior and run.prior.items and run.prior.items[-1].terminal:
        yield f"{run.items[0].kind} {run.items[0].cursor} comes after the terminal event"
    for item, after in pairwise(run.once):
        if item.terminal:
            yield f"{after.kind} {after.cursor} comes after {item.kind} {item.cursor}"


_RULES: dict[Kind, Callable[[Run, Stream], Evidence]] = {
    "duplicated": _duplicated,
    "reordered": _reordered,
    "skipped": _skipped,
    "spliced": _spliced,
    "unterminated": _run_unterminated,
}


def _lost(run: Run, stream: Stream) -> Evidence:
    """Whether the text of a run adds up: in itself, by what its terminal event tells, against the
    newest run of the log, and against what the upstream wrote."""
    for item, label in run.labels:
        if label is None:
            yield f"{item.cursor} has the text {item.text!r}, which no upstream request writes"
    lowest = 0 if run.whole else min(run.pieces, default=0)
    for expected, piece in enumerate(run.pieces, lowest):
        if piece != expected:
            yield f"piece {expected} of upstream request {run.request} is missing"
    last = run.once[-1]
    if last.terminal:
        yield from _missing_from(run, last, stream)
        if run.whole:
            yield from _miscounted(run, last)
            if last.kind == COMPLETED:
                yield from _incomplete(run, last, stream)


def _missing_from(run: Run, last: Item, stream: Stream) -> Evidence:
    """A run of a later attempt than the log's newest is one that Redis forgot."""
    newest = stream.newest
    if newest is None or last.cursor != newest.top or run.attempt > newest.attempt:
        return
    for item in newest.own:
        if item.cursor not in run.cursors and (run.base is None or item.cursor > run.base):
            yield f"{item.kind} {item.cursor} of the log is missing before {last.kind}"


def _miscounted(run: Run, last: Item) -> Evidence:
    """A terminal event that stands alone tells of an attempt that has no events here."""
    if last.cursor.attempt != run.attempt:
        return
    chunks = [item for item in run.own if item.kind == CHUNK]
    told = last.data.get("chunks")
    if told != len(chunks) and (told is not None or last.kind == COMPLETED):
        yield f"{last.kind} {last.cursor} tells of {told} chunks, there are {len(chunks)}"
    text = join_text([item.text for item in chunks])
    digest = hashlib.sha256(text.encode()).hexdigest()
    told = last.data.get("sha256")
    if told != digest and (told is not None or last.kind == COMPLETED):
        yield f"{last.kind} {last.cursor} tells of another text than the one that is there"


def _incomplete(run: Run, last: Item, stream: Stream) -> Evidence:
    if last.cursor.attempt != run.attempt or run.attempt == 0:
        yield f"completed {last.cursor} stands alone, without an answer"
    elif run.request is None:
        if not any(sent.complete and sent.pieces == 0 for sent in stream.asked):
            yield f"completed {last.cursor} has no text, and no upstream request ended so"
    elif sent := stream.sent.get(run.request):
        if not sent.complete:
            yield f"completed {last.cursor}, but upstream request {sent.request} broke off"
        if len(run.pieces) < sent.pieces:
            yield f"completed with {len(run.pieces)} of {sent.pieces} pieces of {sent.request}"


# The rules of a whole log, of a viewer, between parties, and of the upstream.


def _log_findings(log: Logged) -> Iterator[Finding]:
    if log.events is not None and not any(event.terminal for event in log.events):
        yield "unterminated", "log", f"no terminal event among {len(log.events)}"
    if log.events and log.events[0].cursor != _BIRTH:
        yield "skipped", "log", f"it begins with {log.events[0].cursor} instead of {_BIRTH}"


def _viewer_findings(viewer: Seen, log: Logged) -> Iterator[Finding]:
    where = _where(viewer)
    for visit in viewer.visits:
        for word, after in pairwise(visit.received):
            if not word.cursor:
                yield "unterminated", where, f"{after.kind} comes after it was told gone"
    received = [received for visit in viewer.visits for received in visit.received]
    gone = [visit for visit in viewer.visits if visit.end == "gone"]
    gone_in_band = [each for each in received if not each.cursor]
    if gone or gone_in_band or (received and received[-1].kind in TERMINAL):
        return
    since = f"after {received[-1].cursor}" if received else "with nothing"
    end = viewer.visits[-1].end if viewer.visits else "left"
    if viewer.deadline_passed:
        yield "unterminated", where, f"it gave up waiting, {since}"
    elif end in {"clean", "nothing"}:
        yield "unterminated", where, f"its last visit ended as {end}, {since}"
    elif log.events is None and end != "left":
        yield "unterminated", where, f"the log is gone and it was not told so, {since}"


def _divergent(readings: list[Reading]) -> Iterator[Finding]:
    """One cursor is one event, whoever has it."""
    known: dict[Cursor, tuple[Item, str]] = {}
    for reading in readings:
        for run in reading.runs:
            for item in run.items:
                other, where = known.setdefault(item.cursor, (item, reading.where))
                if other != item:
                    told = f"{item.kind} {item.data} here, {other.kind} {other.data} in {where}"
                    yield "divergent", reading.where, f"{item.cursor} is {told}"


def _shared(readings: list[Reading]) -> Iterator[Finding]:
    """Each attempt asks the upstream itself, so no two have chunks of the same request."""
    attempts: dict[int, int] = {}
    for reading in readings:
        for run in reading.runs:
            if run.request is not None:
                first = attempts.setdefault(run.request, run.attempt)
                if first != run.attempt:
                    both = f"attempts {first} and {run.attempt}"
                    yield "spliced", reading.where, f"request {run.request} stands in {both}"


def _leaked(sent: list[Sent], logs: list[Logged]) -> list[Anomaly]:
    """A stream without a terminal event is `unterminated`, and its request may be at work."""
    stream_of = {log.key: log.stream_id for log in logs}
    at_work = {
        log.key
        for log in logs
        if log.events is not None and not any(event.terminal for event in log.events)
    }
    return [
        Anomaly(
            "leaked",
            stream_of[request.key],
            f"upstream request {request.request}",
            f"still open after {request.pieces} pieces, though its stream has ended",
        )
        for request in sent
        if request.open and request.key in stream_of and request.key not in at_work
    ]
