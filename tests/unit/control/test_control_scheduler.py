"""Whose turn it is."""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from tests.generated import examples
from tinsmith.control.scheduler import Candidate, pick


def test_another_operation_goes_alone() -> None:
    assert pick([Candidate("a"), Candidate("b", (1,))], 100) == {"a": 1}
    assert pick([], 100) == {}


def test_models_share_a_batch_round_by_round_within_the_budget() -> None:
    candidates = [Candidate("a", (10, 10, 10)), Candidate("b", (10, 10)), Candidate("c"), Candidate("d", (30,))]
    assert pick(candidates, 40) == {"a": 2, "b": 2}
    assert pick(candidates, 60) == {"a": 2, "b": 1, "d": 1}
    assert pick(candidates, 1000) == {"a": 3, "b": 2, "d": 1}


def test_a_request_larger_than_the_budget_goes_alone() -> None:
    assert pick([Candidate("a", (500, 1)), Candidate("b", (1,))], 100) == {"a": 1}


def test_a_request_that_does_not_fit_is_not_overtaken_by_a_later_one_of_its_model() -> None:
    assert pick([Candidate("a", (50,)), Candidate("b", (80, 1))], 100) == {"a": 1}


@examples(100)
@given(st.lists(st.lists(st.integers(1, 50), min_size=1, max_size=20), min_size=1, max_size=6), st.integers(1, 100))
def test_everything_is_served_and_a_waiting_model_within_one_round(queues: list[list[int]], budget: int) -> None:
    waiting = {str(i): list(sizes) for i, sizes in enumerate(queues)}
    order = list(waiting)
    last_served = Counter(dict.fromkeys(order, 0))
    turn = 0
    while order:
        turn += 1
        counts = pick([Candidate(name, tuple(waiting[name])) for name in order], budget)
        assert counts
        assert sum(sum(waiting[n][:c]) for n, c in counts.items()) <= max(budget, waiting[order[0]][0])
        for name, count in counts.items():
            assert turn - last_served[name] <= len(queues)
            last_served[name] = turn
            del waiting[name][:count]
            order.remove(name)
            if waiting[name]:
                order.append(name)
    assert not any(waiting.values())
