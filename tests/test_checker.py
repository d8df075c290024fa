"""The checker of the fault run: silent about every legal history, and about nothing else."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from api.feed import Feed
from api.wires import native
from chaos.anomaly import Anomaly
from chaos.checker import check
from chaos.journal import End, Logged, Received, Seen, Sent, Visit
from relay.chunks import Chunk, Compactor
from relay.events import (
    CANCELLED,
    COMPLETED,
    FAILED,
    QUEUED,
    STARTED,
    TERMINAL,
    TEXT,
    Cursor,
    Entry,
    Event,
    entry,
    to_json,
)

FAILURE = {"code": "interrupted", "message": "Ask again.", "retryable": True}
GONE = Received("", FAILED, {"code": "stream_gone", "message": "Gone.", "retryable": False})


@dataclass
class History:
    """What `check` is given, open to being spoilt."""

    sent: list[Sent]
    log: Logged
    viewers: list[Seen]

    @property
    def events(self) -> list[Event]:
        assert self.log.events is not None
        return self.log.events

    def received(self, viewer: int, visit: int = 0) -> list[Received]:
        return self.viewers[viewer].visits[visit].received

    def found(self) -> list[Anomaly]:
        return check(self.sent, [self.log], self.viewers)


@dataclass
class Story:
    """One stream, step by step: what Redis has after each, and what was published by it.

    The entries are made by the worker's own compactor, and viewers are served by the real feed.
    """

    key: str = "q"
    sent: list[Sent] = field(default_factory=list)
    stood: list[list[Event]] = field(default_factory=list)
    published: list[list[Event]] = field(default_factory=list)
    attempt: int = 0
    entries: list[Entry] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._step([Event(Cursor(0, 1), QUEUED, b"{}")])

    @property
    def redis(self) -> list[Event]:
        return self.stood[-1] if self.stood else []

    @property
    def now(self) -> int:
        return len(self.stood) - 1

    @property
    def own(self) -> int:
        """How many events of the attempt stand."""
        return sum(event.cursor.attempt == self.attempt for event in self.redis)

    def claim(self, attempt: int, *, refused: int = 0) -> None:
        """A worker begins anew, and the upstream refuses it some times before its first chunk."""
        self.attempt, self.entries = attempt, []
        self.compactor = Compactor(attempt, "gpt")
        for _ in range(refused + 1):
            self.sent.append(Sent(len(self.sent) + 1, self.key, 0, complete=False, open=False))

    def write(self, pieces: int, *, dropped: int = -1) -> None:
        """The upstream writes so many more pieces and the worker appends them, but for one."""
        before = self.sent[-1].pieces
        self.sent[-1] = replace(self.sent[-1], pieces=before + pieces)
        if not self.entries:
            self._line_up({"delta": {"role": "assistant", "content": ""}})
        for piece in range(before, before + pieces):
            if piece != dropped:
                self._line_up({"delta": {"content": f"{len(self.sent)}.{piece} "}})
        self.append()

    def complete(self) -> None:
        self.sent[-1] = replace(self.sent[-1], complete=True)
        self._line_up({"delta": {}}, "stop")
        self.end(COMPLETED, {"finish_reason": "stop", "usage": {"total_tokens": 9}})

    def end(self, kind: str, value: dict[str, Any]) -> None:
        self.entries.append(entry(kind, value | self.compactor.summary()))
        self.append()

    def end_unowned(self, attempt: int, kind: str) -> None:
        value = FAILURE if kind == FAILED else {}
        self._step([Event(Cursor(attempt, 0), *entry(kind, value))])

    def append(self) -> None:
        """Append what does not stand yet; again, if Redis has lost it."""
        start = self.own
        lacking = enumerate(self.entries[start:], start)
        self._step([Event(Cursor(self.attempt, seq), *each) for seq, each in lacking])

    def lose(self, events: int) -> None:
        """Redis comes back without its last entries, as long as the stream is left."""
        self.stood.append(self.redis[: max(1, len(self.redis) - events)])
        self.published.append([])

    def visit(self, cursor: str, came: int, left: int, end: End) -> Visit:
        """One connection to an API that begins to watch with it, from one step to another."""
        feed = Feed("s")
        feed.add(self.stood[came], read=True)
        index = None
        for step in range(came, left + 1):
            if step > came and not feed.add(self.published[step]):
                feed.add(self.stood[step], read=True)
            if index is None and (not cursor or feed.reaches(Cursor.parse(cursor))):
                index = feed.position(Cursor.parse(cursor) if cursor else None)
        received = [] if index is None else [on_the_wire(event) for event in feed.events[index:]]
        return Visit(cursor, received, "clean" if feed.ended and end == "broken" else end)

    def view(self, name: str, *times: tuple[int, int], leaves: bool = False) -> Seen:
        """A viewer that is broken off and comes back, then leaves or stays to the end."""
        visits: list[Visit] = []
        for came, left in times:
            got = [received.cursor for visit in visits for received in visit.received]
            visits.append(self.visit(got[-1] if got else "", came, left, "broken"))
            if visits[-1].end == "clean":
                break
        if leaves and visits[-1].end == "broken":
            visits[-1] = replace(visits[-1], end="left")
        return Seen(name, "s", visits, deadline_passed=False)

    def history(self, *viewers: Seen, gone: bool = False) -> History:
        return History(self.sent, Logged("s", self.key, None if gone else self.redis), [*viewers])

    def _line_up(self, choice: Chunk, finish: str | None = None) -> None:
        choice = {"index": 0, "finish_reason": finish, **choice}
        head = {"id": f"chatcmpl-{len(self.sent)}", "model": "gpt"}
        self.entries += self.compactor.entries(to_json({**head, "choices": [choice]}))

    def _step(self, events: list[Event]) -> None:
        self.stood.append(self.redis + events)
        self.published.append(events)


def on_the_wire(event: Event) -> Received:
    cursor, kind, data = native.encode(event).decode().splitlines()[:3]
    value = json.loads(data.removeprefix("data: "))
    return Received(cursor.removeprefix("id: "), kind.removeprefix("event: "), value)


def two_attempts() -> Story:
    """0-1 | 1-0 … 1-4 | 4-0 … 4-4 | 4-5 … 4-7 | 4-8, 4-9 completed; steps 0 to 4."""
    story = Story()
    story.claim(1)
    story.write(3)
    story.claim(4, refused=2)
    story.write(3)
    story.write(3)
    story.complete()
    return story


def viewed() -> History:
    """Viewer 0 saw it all, broken off at 1-4 and at 4-4; viewer 1 came late; viewer 2 left."""
    story = two_attempts()
    watching = story.view("a", (0, 1), (1, 2), (2, 4))
    return story.history(watching, story.view("b", (3, 4)), story.view("c", (0, 3), leaves=True))


def kinds(found: list[Anomaly]) -> set[str]:
    return {anomaly.kind for anomaly in found}


def test_a_stream_of_two_attempts_is_in_order_for_all_who_watched() -> None:
    history = viewed()
    assert [len(visit.received) for visit in history.viewers[0].visits] == [6, 5, 5]
    assert [str(event.cursor) for event in history.events][:7:6] == ["0-1", "4-0"]
    assert history.found() == []


def test_nothing_and_nobody_is_in_order() -> None:
    assert check([], [], []) == []


def test_each_way_of_ending_is_in_order() -> None:
    for kind in (FAILED, CANCELLED):
        story = Story()
        story.claim(1)
        story.write(2)
        story.end(kind, FAILURE)
        assert story.history(story.view("a", (0, 2)), story.view("b", (2, 2))).found() == []


@pytest.mark.parametrize("kind", [FAILED, CANCELLED])
def test_an_end_that_nobody_owned_stands_alone(kind: str) -> None:
    queued = Story()
    queued.end_unowned(3, kind)
    begun = Story()
    begun.claim(1)
    begun.write(2)
    begun.end_unowned(9, kind)
    for story in (queued, begun):
        resumed = story.view("a", (0, story.now - 1), (story.now, story.now))
        assert story.history(resumed, story.view("b", (0, story.now))).found() == []


@pytest.mark.parametrize("before", [0, 1])
def test_an_attempt_may_fail_before_its_first_chunk(before: int) -> None:
    story = Story()
    for attempt in range(1, before + 1):
        story.claim(attempt)
        story.write(2)
    story.claim(4)
    story.end(FAILED, FAILURE)
    assert story.history(story.view("a", (0, story.now))).found() == []


def test_a_viewer_that_never_came_back_and_did_not_give_up_is_at_no_fault() -> None:
    story = two_attempts()
    viewer = Seen("a", "s", [story.visit("", 0, 3, "broken")], deadline_passed=False)
    assert story.history(viewer).found() == []


def test_a_tail_that_redis_lost_and_the_worker_appended_again_is_the_same() -> None:
    story = Story()
    story.claim(1)
    story.write(4)
    story.lose(3)
    story.append()
    story.complete()
    ahead = story.view("a", (0, 1), (2, 4))
    assert [visit.cursor for visit in ahead.visits] == ["", "1-5"]
    assert story.history(ahead, story.view("b", (0, 4)), story.view("c", (2, 4))).found() == []


def test_a_viewer_may_have_what_redis_lost_and_no_worker_appended_again() -> None:
    story = Story()
    story.claim(1)
    story.write(4)
    story.lose(3)
    story.claim(7)
    story.write(2)
    story.complete()
    for times in ([(0, 4)], [(0, 1), (2, 4)], [(0, 1), (3, 4)]):
        assert story.history(story.view("a", *times)).found() == []


@pytest.mark.parametrize("lost", [3, 99])
def test_a_viewer_whose_cursor_is_lost_begins_anew_and_hears_of_the_end(lost: int) -> None:
    story = Story()
    story.claim(1)
    story.write(4)
    story.lose(lost)
    story.end_unowned(7, FAILED)
    viewer = story.view("a", (0, 1), (3, 3))
    assert viewer.visits[1].received[0].kind == (STARTED if lost == 3 else QUEUED)
    assert story.history(viewer, story.view("b", (0, 3))).found() == []


def test_a_viewer_of_a_forgotten_attempt_may_go_back_to_the_one_before() -> None:
    story = Story()
    story.claim(1)
    story.write(2)
    story.claim(4)
    story.write(2)
    story.lose(len(story.entries))
    story.end_unowned(9, FAILED)
    viewer = story.view("a", (0, 2), (4, 4))
    assert viewer.visits[1].received[0].cursor == "1-0"
    assert story.history(viewer).found() == []


def test_a_viewer_may_have_a_terminal_event_that_redis_lost() -> None:
    story = Story()
    story.claim(1)
    story.write(2)
    story.complete()
    story.lose(2)
    story.claim(5)
    story.write(2)
    story.complete()
    early = story.view("a", (0, 2))
    assert story.history(early, story.view("b", (0, 1), (4, 5))).found() == []


def test_of_a_lost_log_a_viewer_has_the_end_or_is_told_or_has_left() -> None:
    story = two_attempts()
    cut = story.view("in band", (0, 3))
    cut.visits[0].received.append(GONE)
    refused = story.view("by 410", (0, 3))
    refused.visits.extend([Visit("4-7", [], "refused"), Visit("4-7", [], "gone")])
    whole = story.view("whole", (0, 4))
    left = story.view("left", (0, 3), leaves=True)
    never = Seen("never", "s", [], deadline_passed=False)
    assert story.history(cut, refused, whole, left, never, gone=True).found() == []


def test_who_has_it_all_is_told_so_by_204() -> None:
    history = viewed()
    history.viewers[0].visits.append(Visit("4-9", [], "nothing"))
    assert history.found() == []


def test_a_viewer_may_come_with_the_cursor_of_another() -> None:
    story = two_attempts()
    for came in (3, 4):
        visit = story.visit("4-3", came, 4, "clean")
        assert visit.received[0].cursor == "4-4"
        assert story.history(Seen("a", "s", [visit], deadline_passed=False)).found() == []


def test_a_viewer_may_come_back_with_an_older_cursor_of_its_own() -> None:
    story = two_attempts()
    visits = [story.visit("", 0, 3, "broken"), story.visit("4-3", 3, 4, "clean")]
    assert story.history(Seen("a", "s", visits, deadline_passed=False)).found() == []


def test_a_request_may_be_open_while_its_stream_is_and_if_it_is_nobodys() -> None:
    history = viewed()
    history.sent[-1] = replace(history.sent[-1], open=True)
    history.sent.append(Sent(9, "another", 0, complete=False, open=True))
    del history.events[-1]
    history.viewers.clear()
    assert kinds(history.found()) == {"unterminated"}


def test_an_answer_without_text_is_in_order_if_the_upstream_had_none() -> None:
    story = Story()
    story.claim(1)
    story.write(0)
    story.complete()
    assert story.history(story.view("a", (0, 2))).found() == []


def test_a_viewer_of_an_unknown_stream_is_a_mistake_of_the_run() -> None:
    with pytest.raises(ValueError, match="unheard-of"):
        check([], [], [Seen("a", "unheard-of", [], deadline_passed=False)])


# Planting. In `viewed()` the log is 0:0-1, 1…5:1-0…1-4, 6…15:4-0…4-9.

Plant = Callable[[History], object]


def at(received: list[Received], cursor: str) -> int:
    return next(i for i, each in enumerate(received) if each.cursor == cursor)


def rewrite_everywhere(history: History, cursor: str, text: str) -> None:
    """Change a text chunk in the log and at all viewers."""
    for index, event in enumerate(history.events):
        if str(event.cursor) == cursor:
            assert event.kind == TEXT
            history.events[index] = event._replace(data=json.dumps(text).encode())
    for viewer in history.viewers:
        for visit in viewer.visits:
            for index, received in enumerate(visit.received):
                if received.cursor == cursor:
                    visit.received[index] = replace(received, data={"text": text})


def retell_everywhere(history: History, **change: Any) -> None:
    """Change what the terminal event tells, in the log and at all viewers."""
    last = history.events[-1]
    history.events[-1] = last._replace(data=json.dumps(last.value() | change).encode())
    for viewer in history.viewers:
        for visit in viewer.visits:
            if visit.received and visit.received[-1].kind in TERMINAL:
                told = visit.received[-1]
                visit.received[-1] = replace(told, data=told.data | change)


def swap(items: list[Any], index: int) -> None:
    items[index], items[index + 1] = items[index + 1], items[index]


def swap_texts(history: History) -> None:
    rewrite_everywhere(history, "4-4", "4.3 ")
    rewrite_everywhere(history, "4-5", "4.2 ")


def resend_last(history: History) -> None:
    history.received(0, 2).insert(0, history.received(0, 1)[-1])


def mix_in(history: History) -> None:
    history.received(0, 2).insert(1, history.received(0)[-1])


def miss_start(history: History) -> None:
    del history.received(0, 1)[0]


def begin_late(history: History) -> None:
    del history.received(1)[0]


def restart(history: History) -> None:
    received = history.received(1)
    received[:0] = received[:3]


def go_back(history: History) -> None:
    """The last visit goes back to attempt 1, though its cursor 4-4 stands."""
    first = [each for each in history.received(0) if each.cursor.startswith("1-")]
    history.received(0, 2)[:] = [*first, *history.received(1)]


def queue_again(history: History) -> None:
    history.received(0, 1).insert(0, history.received(0)[0])


def queue_twice(history: History) -> None:
    history.viewers.append(history.viewers[0])
    visits = [
        Visit("", history.received(0)[:1], "broken"),
        Visit("0-1", history.received(0)[:2], "left"),
    ]
    history.viewers[-1] = Seen("d", "s", visits, deadline_passed=False)


def steal_request(history: History) -> None:
    """Another question's request wrote what is in this stream."""
    history.sent[-1] = replace(history.sent[-1], key="another")


def end_elsewhere(history: History) -> None:
    """The terminal event of a later attempt, but not at its beginning."""
    for items in (history.events, history.received(0, 2), history.received(1)):
        items.pop()
    event = Event(Cursor(9, 1), *entry(FAILED, FAILURE))
    history.events.append(event)
    history.received(0, 2).append(on_the_wire(event))
    history.received(1).append(on_the_wire(event))


def end_in_the_past(history: History) -> None:
    history.received(1)[-1] = Received("2-0", FAILED, FAILURE)


def complete_alone(history: History) -> None:
    end_elsewhere(history)
    event = Event(Cursor(9, 0), *entry(COMPLETED, {"chunks": 0}))
    history.events[-1] = event
    history.received(0, 2)[-1] = history.received(1)[-1] = on_the_wire(event)


def end_twice(history: History) -> None:
    history.events.append(Event(Cursor(9, 0), *entry(FAILED, FAILURE)))


def begin_after_the_end(history: History) -> None:
    history.events.append(Event(Cursor(9, 0), *entry(STARTED, {"attempt": 9, "model": "gpt"})))


def viewer_hears_more(history: History) -> None:
    history.received(1).append(Received("9-0", FAILED, FAILURE))


def hear_after_gone(history: History) -> None:
    history.received(2)[-1:-1] = [GONE]


def rename_model(history: History) -> None:
    start = history.received(1)[0]
    history.received(1)[0] = replace(start, data=start.data | {"model": "other"})


def end_otherwise(history: History) -> None:
    last = history.received(1)[-1]
    history.received(1)[-1] = Received(last.cursor, CANCELLED, last.data)


def lose_log(history: History) -> None:
    history.log = replace(history.log, events=None)


def end_visits(end: End, *, keep: int = -1, deadline: bool = False) -> Plant:
    """Viewer 1 lacks its terminal event, and its visit ended so."""

    def plant(history: History) -> None:
        visit = Visit("", history.received(1)[:keep], end)
        history.viewers[1] = Seen("b", "s", [visit], deadline_passed=deadline)

    return plant


def and_no_log(plant: Plant) -> Plant:
    def both(history: History) -> None:
        plant(history)
        lose_log(history)

    return both


def leave_open(request: int) -> Plant:
    def plant(history: History) -> None:
        history.sent[request - 1] = replace(history.sent[request - 1], open=True)

    return plant


def resent(**change: Any) -> Plant:
    def plant(history: History) -> None:
        history.sent[-1] = replace(history.sent[-1], **change)

    return plant


PLANTS: list[tuple[str, str, Plant]] = [
    ("lost", "log", resent(pieces=7)),
    ("lost", "viewer b", and_no_log(resent(pieces=7))),
    ("lost", "log", resent(complete=False)),
    ("lost", "log", complete_alone),
    ("lost", "log", lambda h: rewrite_everywhere(h, "4-4", "garbled")),
    ("lost", "viewer c", lambda h: rewrite_everywhere(h, "1-4", "1.2")),
    ("lost", "log", lambda h: retell_everywhere(h, chunks=3)),
    ("lost", "log", lambda h: retell_everywhere(h, chunks=None)),
    ("lost", "viewer a", lambda h: retell_everywhere(h, sha256="0" * 64)),
    ("lost", "viewer a", lambda h: retell_everywhere(h, sha256=None)),
    ("duplicated", "log", lambda h: h.events.insert(9, h.events[8])),
    ("duplicated", "log", lambda h: h.events.insert(6, h.events[6])),
    ("duplicated", "viewer b", lambda h: h.received(1).insert(5, h.received(1)[4])),
    ("duplicated", "viewer b", lambda h: h.received(1).append(h.received(1)[-1])),
    ("duplicated", "viewer a", resend_last),
    ("duplicated", "viewer b", restart),
    ("duplicated", "viewer d", queue_twice),
    ("duplicated", "viewer d", and_no_log(queue_twice)),
    ("duplicated", "log", lambda h: rewrite_everywhere(h, "4-5", "4.2 ")),
    ("reordered", "log", lambda h: swap(h.events, 7)),
    ("reordered", "viewer b", lambda h: swap(h.received(1), 1)),
    ("reordered", "viewer a", go_back),
    ("reordered", "viewer a", queue_again),
    ("reordered", "log", swap_texts),
    ("skipped", "log", lambda h: h.events.pop(9)),
    ("skipped", "log", lambda h: h.events.pop(0)),
    ("skipped", "viewer b", lambda h: h.received(1).pop(4)),
    ("skipped", "viewer a", lambda h: h.received(0, 2).pop(0)),
    ("skipped", "viewer b", begin_late),
    ("spliced", "log", lambda h: h.events.insert(9, h.events[4])),
    ("spliced", "log", lambda h: h.events.pop(6)),
    ("spliced", "viewer a", mix_in),
    ("spliced", "viewer a", miss_start),
    ("spliced", "log", lambda h: rewrite_everywhere(h, "4-4", "1.2 ")),
    ("spliced", "log", lambda h: rewrite_everywhere(h, "4-7", "4.9 ")),
    ("spliced", "log", lambda h: rewrite_everywhere(h, "4-4", "8.2 ")),
    ("spliced", "viewer b", steal_request),
    ("spliced", "log", end_elsewhere),
    ("spliced", "viewer b", end_in_the_past),
    ("divergent", "viewer b", rename_model),
    ("divergent", "viewer b", and_no_log(rename_model)),
    ("divergent", "viewer b", end_otherwise),
    ("unterminated", "log", lambda h: h.events.pop()),
    ("unterminated", "log", lambda h: h.events.clear()),
    ("unterminated", "log", end_twice),
    ("unterminated", "log", begin_after_the_end),
    ("unterminated", "viewer b", viewer_hears_more),
    ("unterminated", "viewer c", hear_after_gone),
    ("unterminated", "viewer b", end_visits("broken", deadline=True)),
    ("unterminated", "viewer b", end_visits("refused", keep=0, deadline=True)),
    ("unterminated", "viewer b", end_visits("clean")),
    ("unterminated", "viewer b", end_visits("clean", keep=0)),
    ("unterminated", "viewer b", end_visits("nothing")),
    ("unterminated", "viewer b", and_no_log(end_visits("broken"))),
    ("unterminated", "viewer b", and_no_log(end_visits("refused", keep=0))),
    ("leaked", "upstream request 1", leave_open(1)),
    ("leaked", "upstream request 4", and_no_log(leave_open(4))),
]


@pytest.mark.parametrize(("kind", "where", "plant"), PLANTS)
def test_what_is_planted_is_found_and_nothing_else(kind: str, where: str, plant: Plant) -> None:
    history = viewed()
    plant(history)
    found = history.found()
    assert kinds(found) == {kind}
    assert where in {anomaly.where for anomaly in found}
    assert {anomaly.stream_id for anomaly in found} == {"s"}
    assert all(anomaly.what for anomaly in found)


def test_a_piece_that_the_worker_never_appended_is_lost() -> None:
    for end in (COMPLETED, FAILED):
        story = Story()
        story.claim(1)
        story.write(6, dropped=3)
        story.complete() if end == COMPLETED else story.end(FAILED, FAILURE)
        found = story.history(story.view("a", (0, 2))).found()
        assert kinds(found) == {"lost"}
        assert "piece 3 of upstream request 1 is missing" in found[0].what


def test_an_answer_without_text_is_lost_if_the_upstream_had_some() -> None:
    story = Story()
    story.claim(1)
    story.write(0)
    story.complete()
    story.sent[0] = replace(story.sent[0], pieces=2)
    assert kinds(story.history().found()) == {"lost"}


def test_what_stands_before_an_end_that_nobody_owned_is_lost_if_a_viewer_lacks_it() -> None:
    story = Story()
    story.claim(1)
    story.write(3)
    story.write(3)
    story.end_unowned(5, FAILED)
    viewer = story.view("a", (0, 1), (3, 3))
    del viewer.visits[1].received[:-1]
    assert viewer.visits[1].received[0].cursor == "5-0"
    assert kinds(story.history(viewer).found()) == {"lost"}


@pytest.mark.parametrize(
    ("begins", "kind"),
    [(2, "reordered"), (3, "duplicated"), (5, "skipped"), (9, "skipped")],
)
def test_a_viewer_with_the_cursor_of_another_goes_on_strictly_after_it(
    begins: int, kind: str
) -> None:
    story = two_attempts()
    whole = story.visit("", 3, 4, "clean").received
    assert whole[begins].cursor == f"4-{begins}"
    visit = Visit("4-3", whole[begins:], "clean")
    found = story.history(Seen("a", "s", [visit], deadline_passed=False)).found()
    assert kind in kinds(found)


def test_two_attempts_of_one_upstream_request_are_spliced() -> None:
    story = Story()
    story.claim(1)
    story.write(2)
    one = story.sent.copy()
    story.claim(4)
    story.sent = [replace(one[0], pieces=0)]
    story.write(2)
    story.complete()
    assert kinds(story.history().found()) == {"spliced"}


def test_a_second_end_in_a_visit_of_its_own_is_one_too_many() -> None:
    history = viewed()
    history.viewers[1].visits.append(Visit("4-9", [Received("9-0", FAILED, FAILURE)], "clean"))
    assert kinds(history.found()) == {"unterminated"}


# Any history.


@st.composite
def stories(draw: st.DrawFn) -> Story:
    """Attempts that die, whose tail Redis loses, that append it again; and some end."""
    story = Story()
    for number in range(draw(st.integers(0, 3))):
        story.claim(story.attempt + draw(st.integers(1, 3)), refused=draw(st.integers(0, 1)))
        for _ in range(draw(st.integers(1, 3))):
            story.write(draw(st.integers(0, 4)))
            if draw(st.booleans()):
                # Never what another attempt wrote: the worker of this one could not go on.
                story.lose(draw(st.integers(1, story.own)))
                if draw(st.booleans()) or number < 2:
                    story.append()
    own = story.own > 0 and story.attempt > 0
    end = draw(st.sampled_from(["complete", FAILED, CANCELLED] if own else [FAILED, CANCELLED]))
    if end == "complete":
        story.complete()
    elif own and draw(st.booleans()):
        story.end(end, FAILURE)
    else:
        story.end_unowned(story.attempt + draw(st.integers(1, 9)), end)
    return story


@st.composite
def histories(draw: st.DrawFn) -> History:
    story = draw(stories())
    viewers = []
    for name in "abc"[: draw(st.integers(1, 3))]:
        moments = sorted(draw(st.lists(st.integers(0, story.now), min_size=1, max_size=5)))
        leaves = draw(st.booleans())
        times = list(pairwise(moments if leaves else [*moments, story.now]))
        viewers.append(story.view(name, *times or [(0, story.now)], leaves=leaves))
    return story.history(*viewers, gone=draw(st.integers(0, 4)) == 0)


SLOW = settings(deadline=None, suppress_health_check=list(HealthCheck), max_examples=150)


@given(histories())
@SLOW
def test_no_legal_history_raises_a_false_alarm(history: History) -> None:
    assert history.found() == []


@given(histories(), st.data())
@SLOW
def test_any_single_damage_to_a_legal_history_is_found(
    history: History, data: st.DataObject
) -> None:
    parties: list[list[Any]] = [v.received for viewer in history.viewers for v in viewer.visits]
    if history.log.events:
        parties.append(history.events)
    party = data.draw(st.sampled_from([items for items in parties if items] or [[]]))
    assume(party)
    damage = data.draw(st.sampled_from([dropped, repeated, swapped, garbled, mixed]))
    chunks = [each for items in parties for each in items if each.kind in {TEXT, "chunk"}]
    assume(damage(party, data.draw(st.integers(0, len(party) - 1)), chunks))
    assert history.found() != []


def cursor_of(item: Event | Received) -> Cursor:
    return item.cursor if isinstance(item, Event) else Cursor.parse(item.cursor)


def attempt_of(item: Event | Received) -> int:
    return cursor_of(item).attempt


def dropped(party: list[Any], index: int, _: list[Any]) -> bool:
    """The last of an attempt that went on nowhere could as well have been lost by Redis."""
    item, rest = party.pop(index), party[index:]
    return item.kind in TERMINAL or (rest != [] and attempt_of(rest[0]) == attempt_of(item))


def repeated(party: list[Any], index: int, _: list[Any]) -> bool:
    party.insert(index, party[index])
    return True


def swapped(party: list[Any], index: int, _: list[Any]) -> bool:
    if index + 1 < len(party):
        swap(party, index)
    return index + 1 < len(party)


def garbled(party: list[Any], index: int, _: list[Any]) -> bool:
    item = party[index]
    if isinstance(item, Event) and item.kind == TEXT:
        party[index] = item._replace(data=b'"x"')
    elif isinstance(item, Received) and item.kind == "chunk":
        party[index] = replace(item, data={"text": "x"})
    return party[index] is not item


def mixed(party: list[Any], index: int, chunks: list[Any]) -> bool:
    """A chunk of one attempt behind an event of another."""
    others = [
        each
        for each in chunks
        if type(each) is type(party[index]) and attempt_of(each) != attempt_of(party[index])
    ]
    if others:
        party.insert(index + 1, others[0])
    return bool(others)
