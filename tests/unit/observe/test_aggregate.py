"""Counters and distributions of a client's events."""

from __future__ import annotations

import random
import threading

import numpy as np
import pytest

from tinsmith.observe import MetricsAggregate
from tinsmith.observe.aggregate import Histogram
from tinsmith.types.events import Event


def finished(operation: str, **fields: float) -> Event:
    return Event(name="operation.finished", time=1.0, fields={"operation": operation, **fields})


def test_operations_are_counted_their_tokens_added_and_their_times_measured() -> None:
    figures = MetricsAggregate()
    for seconds in (1.0, 2.0, 3.0):
        figures.write(finished("forward_backward", tokens=100, wall_s=seconds, loss=-seconds, seq_id=7))
    figures.write(Event(name="operation.failed", time=1.0, fields={"operation": "save_weights", "error_type": "Gone"}))
    seen = figures.snapshot()
    assert seen.counters == {
        "operation.finished": 3,
        "forward_backward.count": 3,
        "forward_backward.tokens": 300,
        "operation.failed": 1,
        "save_weights.errors": 1,
        "error.Gone": 1,
    }
    assert set(seen.histograms) == {"forward_backward.wall_s", "forward_backward.loss"}
    wall = seen.histograms["forward_backward.wall_s"]
    assert (wall.count, wall.sum, wall.min, wall.max, wall.mean) == (3, 6.0, 1.0, 3.0, 2.0)
    assert wall.p50 == pytest.approx(2.0, rel=0.01)
    assert seen.histograms["forward_backward.loss"].p50 == pytest.approx(-2.0, rel=0.01)


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e9])
def test_percentiles_are_right_within_one_percent_whatever_the_scale(scale: float) -> None:
    drawn = random.Random(3)
    values = [scale * drawn.lognormvariate(0, 2) * drawn.choice([1, 1, 1, -1]) for _ in range(20_000)]
    histogram = Histogram()
    for value in values:
        histogram.add(value)
    for share in (0.0, 0.1, 0.5, 0.95, 0.99, 1.0):
        exact = float(np.quantile(values, share, method="lower"))
        assert histogram.percentile(share) == pytest.approx(exact, rel=0.011)
    assert len(histogram._steps) < 3000, "memory does not grow with the number of values"


def test_zero_has_a_place_of_its_own_between_negative_and_positive() -> None:
    histogram = Histogram()
    for value in (-1.0, 0.0, 0.0, 0.0, 1.0):
        histogram.add(value)
    assert [histogram.percentile(share) for share in (0.0, 0.5, 1.0)] == [-1.0, 0.0, 1.0]


def test_what_is_not_finite_is_refused() -> None:
    with pytest.raises(ValueError, match="nan"):
        MetricsAggregate().observe("loss", float("nan"))


def test_reset_hands_out_what_there_was_and_begins_anew() -> None:
    figures = MetricsAggregate()
    figures.increment("rounds", 2)
    assert figures.reset().counters == {"rounds": 2}
    assert figures.snapshot().counters == {}


def test_threads_lose_no_count() -> None:
    figures = MetricsAggregate()

    def work() -> None:
        for _ in range(500):
            figures.increment("n")
            figures.observe("s", 1.0)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert figures.snapshot().counters["n"] == 4000
    assert figures.snapshot().histograms["s"].count == 4000


class Contended:
    """A lock that somebody else takes to count something as soon as it is free."""

    def __init__(self, figures: MetricsAggregate) -> None:
        self._figures = figures
        self._others_turn = True

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        if self._others_turn:
            self._others_turn = False
            self._figures.increment("x")


def test_what_is_counted_while_beginning_anew_is_counted_once() -> None:
    figures = MetricsAggregate()
    figures._lock = Contended(figures)  # type: ignore[assignment]
    last = figures.reset()
    assert last.counters.get("x", 0) + figures.snapshot().counters.get("x", 0) == 1
