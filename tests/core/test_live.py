"""The answer that is being written, case by case, and against a channel that loses, delays and repeats."""

from __future__ import annotations

from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from convener.core.live import MAX_PARTS, Live, Piece, Rest

MANY = 1 << 20


def piece(
    offset: int,
    data: str | list[Any],
    *,
    part: str = "text",
    turn: int = 5,
    attempt: int = 1,
    reply: int = 0,
    kind: str | None = None,
) -> Piece:
    chosen = kind or ("text" if isinstance(data, str) else "item")
    return Piece((turn, attempt, reply), part, chosen, offset, data, len(data))


def begun(turn: int = 5, attempt: int = 1, limit: int = 1000) -> Live:
    live = Live(limit)
    live.began(turn, attempt)
    return live


def shown(live: Live, part: str = "text", offset: int = 0) -> Any:
    rest = live.rest(part, offset, MANY)
    return None if rest is None else rest.data


def test_pieces_follow_each_other() -> None:
    live = begun()
    assert live.writing == (5, 1, 0)
    assert [live.add(piece(0, "Hel")), live.add(piece(3, "lo")), live.add(piece(5, ", you"))] == [True] * 3
    assert shown(live) == "Hello, you"
    assert shown(live, offset=4) == "o, you"
    assert shown(live, offset=5) == ", you"
    assert live.rest("text", 10, MANY) is None
    assert live.rest("other", 0, MANY) is None
    assert live.more({})
    assert live.more({"text": 9})
    assert not live.more({"text": 10})


def test_other_parts_are_lists_and_count_items() -> None:
    live = begun()
    assert live.add(piece(0, "a"))
    assert live.add(piece(0, [1, 2], part="calls"))
    assert live.add(piece(2, [[3]], part="calls"))
    assert live.parts() == ("text", "calls")
    assert live.rest("calls", 1, MANY) == Rest("calls", "item", 1, [2, [3]])


def test_what_was_seen_before_is_not_repeated() -> None:
    live = begun()
    live.add(piece(0, "Hello"))
    for again in (piece(0, "Hello"), piece(0, "He"), piece(1, "ell"), piece(3, "lo")):
        assert live.add(again)
    assert shown(live) == "Hello"
    assert live.add(piece(3, "lo, you"))
    assert shown(live) == "Hello, you"


def test_a_hole_is_told_and_nothing_is_taken() -> None:
    live = begun()
    assert not live.add(piece(1, "x"))
    assert live.parts() == ()
    live.add(piece(0, "a"))
    assert not live.add(piece(2, "c"))
    assert shown(live) == "a"


def test_only_the_turn_and_the_attempt_that_the_log_has_begun() -> None:
    live = Live(1000, 4)
    assert live.writing is None
    assert not live.add(piece(0, "x"))
    live.began(5, 2)
    assert live.writing == (5, 2, 0)
    assert live.add(piece(0, "late", attempt=1))
    assert live.add(piece(0, "later", turn=4))
    assert live.parts() == ()
    assert not live.add(piece(0, "early", attempt=3))
    assert not live.add(piece(0, "earlier", turn=6))
    assert live.add(piece(0, "now", attempt=2))
    assert shown(live) == "now"


def test_a_higher_attempt_voids_what_the_lower_one_has_written() -> None:
    live = begun()
    live.add(piece(0, "first"))
    live.began(5, 2)
    assert not live.more({})
    live.add(piece(5, " too", attempt=1))
    live.add(piece(0, "second", attempt=2))
    assert shown(live) == "second"


def test_a_turn_that_has_ended_stays_ended() -> None:
    live = begun()
    live.add(piece(0, "text"))
    live.finished(5)
    assert live.writing is None
    assert live.parts() == ()
    assert live.add(piece(0, "late"))
    live.load([piece(0, "later"), piece(0, "latest", turn=3)])
    live.began(5, 2)
    assert live.writing is None
    assert live.parts() == ()


def test_turns_end_in_order_so_a_later_end_ends_what_is_before_it() -> None:
    live = begun()
    live.add(piece(0, "text"))
    live.finished(4)
    assert shown(live) == "text"
    live.finished(7)
    assert live.writing is None
    live.finished(6)
    assert live.add(piece(0, "late", turn=7))
    assert live.parts() == ()


def test_closing_ends_whatever_is_open() -> None:
    live = begun()
    live.add(piece(0, "text"))
    live.closed()
    assert live.writing is None
    assert live.add(piece(4, "late"))
    assert live.parts() == ()


def test_a_reply_takes_the_place_of_what_was_before_it() -> None:
    live = begun()
    live.add(piece(0, "draft"))
    assert live.replied(5) is False
    assert live.writing == (5, 1, 1)
    assert live.add(piece(5, " goes on"))
    assert live.parts() == ()
    assert live.add(piece(0, "next", reply=1))
    assert shown(live) == "next"


def test_a_piece_after_a_reply_that_is_still_to_come_waits_for_it() -> None:
    live = begun()
    live.add(piece(0, "draft"))
    assert live.add(piece(0, "next", reply=1))
    assert shown(live) == "draft"
    assert live.replied(4) is False
    assert shown(live) == "draft"
    assert live.replied(5) is True
    live.load([piece(0, "draft"), piece(0, "next", reply=1)])
    assert shown(live) == "next"
    assert live.replied(5) is False


def test_replies_of_an_earlier_attempt_count() -> None:
    live = begun()
    live.replied(5)
    live.began(5, 2)
    assert live.writing == (5, 2, 1)
    live.add(piece(0, "again what the reply has", attempt=2))
    assert live.parts() == ()
    live.add(piece(0, "next", attempt=2, reply=1))
    assert shown(live) == "next"
    live.began(6, 1)
    assert live.writing == (6, 1, 0)


def test_nothing_can_be_judged_until_the_turn_is_known_from_its_beginning() -> None:
    live = Live(1000, 4, known=False)
    assert not live.known
    assert not live.add(piece(0, "x"))
    assert live.add(piece(0, "old", turn=4))
    live.began(5, 2)
    assert live.writing is None
    assert not live.add(piece(0, "x", attempt=2))
    live.load([piece(0, "x", attempt=2)])
    assert live.parts() == ()
    live.began(5, 1)
    assert live.known
    assert live.add(piece(0, "x"))


def test_after_an_end_everything_is_known() -> None:
    live = Live(1000, 4, known=False)
    live.finished(5)
    assert live.known
    live.began(6, 1)
    assert live.add(piece(0, "x", turn=6))


def test_what_is_missing_in_what_was_read_is_lost() -> None:
    live = begun()
    live.load([piece(0, "ab"), piece(3, "d"), piece(4, "e"), piece(1, "x", part="other"), piece(0, [1], part="list")])
    assert shown(live) == "ab"
    assert shown(live, "list") == [1]
    assert shown(live, "other") is None
    # Nothing of it is asked for again and again.
    assert live.add(piece(5, "f"))
    assert live.add(piece(2, "c"))
    assert shown(live) == "ab"
    live.began(5, 2)
    assert live.add(piece(0, "anew", attempt=2))
    assert shown(live) == "anew"


def test_a_part_has_one_type() -> None:
    live = begun()
    live.add(piece(0, "a"))
    assert live.add(piece(1, "b", kind="other"))
    assert live.add(piece(1, ["b"]))
    assert shown(live) == "a"


def test_there_is_a_limit_for_all_parts_together() -> None:
    live = begun(limit=10)
    assert live.add(piece(0, "123456"))
    assert live.add(piece(0, "7890", part="more"))
    assert live.add(piece(6, "x"))
    assert live.add(piece(7, "y"))
    assert live.add(piece(4, "z", part="more"))
    assert (shown(live), shown(live, "more")) == ("123456", "7890")
    live.began(5, 2)
    assert live.add(piece(0, "0123456789", attempt=2))
    assert shown(live) == "0123456789"


def test_there_is_a_limit_for_the_number_of_parts() -> None:
    live = begun()
    for number in range(MAX_PARTS + 1):
        assert live.add(piece(0, "x", part=f"p{number}"))
    assert len(live.parts()) == MAX_PARTS
    assert live.add(piece(7, "x", part="one more"))
    assert live.add(piece(1, "y", part="p0"))
    assert shown(live, "p0") == "xy"


def test_much_is_given_in_several_goes() -> None:
    live = begun()
    for offset in range(0, 100, 10):
        live.add(piece(offset, "0123456789"))
    rest = live.rest("text", 5, 35)
    assert rest == Rest("text", "text", 5, "56789" + "0123456789" * 2)
    # A chunk is never cut, or nothing might ever be given.
    assert live.rest("text", 30, 1) == Rest("text", "text", 30, "0123456789")
    text, offset = "", 0
    while (rest := live.rest("text", offset, 25)) is not None:
        assert rest.offset == offset
        assert isinstance(rest.data, str)
        text, offset = text + rest.data, offset + len(rest.data)
    assert text == "0123456789" * 10


class Watching(RuleBasedStateMachine):
    """A turn after the other is written: begun, cut off and begun again, with replies in between, to its end.

    Everything is published, in order, and may be lost on the way; a viewer is told (`gap`) or finds a hole. It then
    reads the tail, and after that the log. While it reads, the writer goes on.
    """

    @initialize()
    def begin(self) -> None:
        self.log: list[tuple[str, int, int]] = []
        self.tail: list[Piece] = []
        self.turn, self.attempt, self.replies, self.is_open = 0, 0, 0, False
        self.held = 0
        self.written = ""
        self.letters = 0
        self.channel: list[tuple[str, Any]] = []
        self.live = Live(1 << 20)
        self.place = 0
        self.gap = False
        self.snapshot: list[Piece] | None = None
        self.heard: list[Piece] = []
        self.client: tuple[Any, str] = (None, "")

    # -- the writer ----------------------------------------------------------------------------------------------------

    def _append(self, kind: str) -> None:
        self.log.append((kind, self.turn, self.attempt))
        self.channel.append(("log", len(self.log)))

    @precondition(lambda self: not self.is_open)
    @rule(skipped=st.integers(1, 2))
    def next_turn(self, skipped: int) -> None:
        self.turn, self.attempt, self.replies, self.held = self.turn + skipped, 0, 0, 0
        self._start()

    def _start(self) -> None:
        self.attempt, self.is_open, self.written, self.tail = self.attempt + 1, True, "", []
        # Replies that are in the log are given again by the code, and left out.
        self.code_replies = self.replies
        self.held = 0
        self._append("turn_started")

    @precondition(lambda self: self.is_open)
    @rule()
    def start_again(self) -> None:
        self._start()

    @precondition(lambda self: self.is_open)
    @rule(count=st.integers(1, 3), twice=st.booleans())
    def stream(self, count: int, twice: bool) -> None:
        text = "".join(chr(97 + (self.letters + i) % 26) for i in range(count))
        self.letters += count
        new = piece(len(self.written), text, turn=self.turn, attempt=self.attempt, reply=self.code_replies + self.held)
        self.written += text
        for _ in range(2 if twice else 1):
            self.tail.append(new)
            self.channel.append(("piece", new))

    @precondition(lambda self: self.is_open)
    @rule()
    def hold_a_reply(self) -> None:
        self.held += 1
        self.written = ""

    @precondition(lambda self: self.is_open and self.held)
    @rule()
    def write_what_is_held(self) -> None:
        for _ in range(self.held):
            self._append("reply")
        self.replies += self.held
        self.code_replies, self.held = self.replies, 0

    @precondition(lambda self: self.is_open)
    @rule()
    def end(self) -> None:
        self.tail, self.is_open = [], False
        self._append("turn_done")

    # -- the viewer ----------------------------------------------------------------------------------------------------

    def _show(self, number: int, *, read: bool) -> None:
        kind, turn, attempt = self.log[number - 1]
        self.place = number
        if kind == "turn_started":
            self.live.began(turn, attempt)
            self.gap = self.gap or read
        elif kind == "reply":
            self.gap = self.live.replied(turn) or self.gap
        else:
            self.live.finished(turn)

    @precondition(lambda self: self.channel)
    @rule()
    def hear(self) -> None:
        kind, said = self.channel.pop(0)
        if kind == "piece":
            if self.snapshot is not None:
                self.heard.append(said)
            elif not self.live.add(said):
                self.gap = True
        elif said == self.place + 1 and self.snapshot is None:
            self._show(said, read=False)
        elif said > self.place:
            self.gap = True

    @precondition(lambda self: self.channel)
    @rule(count=st.integers(1, 4))
    def lose(self, count: int) -> None:
        del self.channel[:count]
        self.gap = True

    @precondition(lambda self: self.gap and self.snapshot is None)
    @rule()
    def read_the_tail(self) -> None:
        self.gap, self.snapshot = False, list(self.tail)

    @precondition(lambda self: self.snapshot is not None)
    @rule()
    def read_the_log(self) -> None:
        read, self.snapshot = self.snapshot or [], None
        while self.place < len(self.log):
            self._show(self.place + 1, read=False)
        self.live.load(read)
        heard, self.heard = self.heard, []
        for each in heard:
            self.gap = not self.live.add(each) or self.gap

    @rule()
    def client_looks(self) -> None:
        """A client keeps what it got, and gets the rest."""
        if self.live.writing != self.client[0]:
            self.client = (self.live.writing, "")
        rest = self.live.rest("text", len(self.client[1]), 1)
        if rest is not None:
            assert isinstance(rest.data, str)
            self.client = (self.client[0], self.client[1] + rest.data)

    # -- what must hold ------------------------------------------------------------------------------------------------

    @invariant()
    def what_is_shown_is_what_was_written(self) -> None:
        """Of the turn, attempt and reply that the viewer's place in the log has, and from its beginning."""
        state: tuple[int, int, int] | None = None
        replies: dict[int, int] = {}
        for kind, turn, attempt in self.log[: self.place]:
            if kind == "turn_started":
                state = (turn, attempt, replies.get(turn, 0))
            elif kind == "reply" and state is not None:
                replies[turn] = state[2] + 1
                state = (state[0], state[1], replies[turn])
            else:
                state = None
        assert self.live.writing == state
        text = shown(self.live) or ""
        if state == (self.turn, self.attempt, self.code_replies + self.held if self.turn else 0) and self.is_open:
            assert self.written.startswith(text)
            if self.client[0] == state:
                assert self.written.startswith(self.client[1])
        if state is None:
            assert text == ""

    def teardown(self) -> None:
        """Whatever was lost: once everything is heard and read, everything is shown."""
        if not hasattr(self, "log"):
            return
        rounds = 0
        while self.channel or self.gap or self.snapshot is not None:
            rounds += 1
            assert rounds < 1000, "it reads for ever"
            if self.snapshot is not None:
                self.read_the_log()
            elif self.channel:
                self.hear()
            else:
                self.read_the_tail()
        if self.is_open and not self.held:
            assert (shown(self.live) or "") == self.written


TestWatching = Watching.TestCase
TestWatching.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
