"""The order of one model's requests, against a model of thirty lines."""

from __future__ import annotations

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from tests.generated import examples
from tinsmith.control.queues import ModelQueue, SeqConsumed
from tinsmith.types.errors import PayloadConflict


def taken(queue: ModelQueue[str], now: float = 0.0) -> list[str]:
    items = []
    while queue.head() is not None:
        items.append(queue.pop(now))
    return items


def test_requests_leave_in_the_order_of_their_numbers() -> None:
    queue: ModelQueue[str] = ModelQueue(first_seq=1)
    for seq in (3, 2, 5):
        queue.push(seq, f"r{seq}", 0.0)
    assert taken(queue) == []
    assert queue.missing_seq == 1
    queue.push(1, "r1", 0.0)
    assert list(queue.run()) == ["r1", "r2", "r3"]
    assert taken(queue) == ["r1", "r2", "r3"]
    assert queue.missing_seq == 4
    assert queue.free_seq == 6


def test_a_number_is_taken_once() -> None:
    queue: ModelQueue[str] = ModelQueue()
    queue.push(0, "a", 0.0)
    with pytest.raises(PayloadConflict, match="seq 0"):
        queue.push(0, "b", 0.0)
    assert taken(queue) == ["a"]
    with pytest.raises(SeqConsumed, match=r"seq 0 was already used.*the next is 1"):
        queue.push(0, "c", 0.0)


def test_a_gap_is_given_up_when_its_time_is_over_and_the_queue_goes_on_behind_it() -> None:
    queue: ModelQueue[str] = ModelQueue(first_seq=1)
    queue.push(3, "r3", 10.0)
    queue.push(5, "r5", 60.0)
    assert queue.give_up_gap(69.0, 60.0) is None
    gap = queue.give_up_gap(70.0, 60.0)
    assert gap is not None
    assert (gap.missing, gap.items, gap.waited_s) == (1, ("r3", "r5"), 60.0)
    assert queue.next_seq == 6
    with pytest.raises(SeqConsumed, match="seq 1 came too late"):
        queue.push(1, "r1", 71.0)
    queue.push(6, "r6", 72.0)
    assert taken(queue) == ["r6"]


def test_the_wait_for_a_gap_begins_when_the_gap_is_next() -> None:
    queue: ModelQueue[str] = ModelQueue(first_seq=1)
    queue.push(1, "r1", 0.0)
    queue.push(3, "r3", 0.0)
    assert queue.give_up_gap(1000.0, 60.0) is None
    queue.pop(1000.0)
    assert queue.give_up_gap(1059.0, 60.0) is None
    queue.push(2, "r2", 1059.0)
    assert queue.give_up_gap(9999.0, 60.0) is None
    assert taken(queue) == ["r2", "r3"]


class QueueMachine(RuleBasedStateMachine):
    """Push in any order, pop, let gaps time out: every number leaves once, and in order."""

    def __init__(self) -> None:
        super().__init__()
        self.queue: ModelQueue[int] = ModelQueue()
        self.waiting: set[int] = set()
        self.next = 0
        self.left: list[int] = []
        self.now = 0.0

    @rule(offset=st.integers(-2, 6))
    def push(self, offset: int) -> None:
        seq = max(0, self.next + offset)
        if seq < self.next:
            with pytest.raises(SeqConsumed):
                self.queue.push(seq, seq, self.now)
        elif seq in self.waiting:
            with pytest.raises(PayloadConflict):
                self.queue.push(seq, seq, self.now)
        else:
            self.queue.push(seq, seq, self.now)
            self.waiting.add(seq)

    @precondition(lambda self: self.next in self.waiting)
    @rule()
    def pop(self) -> None:
        self.left.append(self.queue.pop(self.now))
        self.waiting.remove(self.next)
        self.next += 1

    @rule(seconds=st.floats(0, 100))
    def wait(self, seconds: float) -> None:
        self.now += seconds
        gap = self.queue.give_up_gap(self.now, 60.0)
        if gap is not None:
            assert gap.missing == self.next
            assert self.next not in self.waiting
            assert list(gap.items) == sorted(self.waiting)
            self.next = max(self.waiting) + 1
            self.waiting.clear()

    @invariant()
    def agrees(self) -> None:
        assert self.queue.next_seq == self.next
        assert len(self.queue) == len(self.waiting)
        assert (self.queue.head() is not None) == (self.next in self.waiting)
        assert self.left == sorted(set(self.left))
        assert (self.queue.missing_seq is not None) == (bool(self.waiting) and self.next not in self.waiting)


TestQueueMachine = QueueMachine.TestCase
TestQueueMachine.settings = examples(60, stateful_step_count=30)
