"""Places among the sequences that are drawn follow shares; counted in passes of the engine and in tokens."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tests.numerics.driver import VOCAB, Driver, sample_operation
from tinsmith.types.operations import Sample
from tinsmith.types.shares import Payer

BATCH = 8
LARGE, SMALL = Payer("large", "l"), Payer("small", "s")


def crowded(folder: Path, **options: Any) -> Driver:
    return Driver(folder, max_decode_batch=BATCH, **options)


def long_samples(count: int, payer: Payer, **fields: Any) -> list[Sample]:
    fields = {"max_tokens": 60, "stop_token_ids": (), **fields}
    return [sample_operation([2 + n % 100, 3, 4], seed=n, payer=payer, **fields) for n in range(count)]


class Run:
    """Passes of one engine, and the tokens that each project was drawn in them."""

    def __init__(self, driver: Driver) -> None:
        self.engine = driver.engine
        self.outcomes: dict[int, Any] = {}
        self.drawn: Counter[str] = Counter()
        self.num_passes = 0
        self._tickets = 0

    def add(self, operations: list[Sample]) -> list[int]:
        tickets = list(range(self._tickets, self._tickets + len(operations)))
        self._tickets += len(operations)
        for ticket, operation in zip(tickets, operations, strict=True):
            self.engine.accept(ticket, operation)
        return tickets

    def passes(self, count: int) -> None:
        for _ in range(count):
            self.outcomes.update(self.engine.work())
            self.num_passes += 1
            for sequence in self.engine._sampler._batch.sequences:
                if sequence is not None:
                    self.drawn[sequence.request.operation.payer.project] += 1

    def until(self, ticket: int, most: int) -> int:
        """How many passes it takes until it is answered."""
        for count in range(1, most + 1):
            self.passes(1)
            if ticket in self.outcomes:
                return count
        raise AssertionError(f"not answered in {most} passes")

    def finish(self) -> None:
        while self.engine.has_work:
            self.passes(1)


def test_a_sample_beside_thousands_of_another_begins_with_the_next_pass(qwen_folder: Path) -> None:
    run = Run(crowded(qwen_folder))
    run.add(long_samples(2000, LARGE))
    run.passes(10)
    for _ in range(3):
        (ticket,) = run.add([sample_operation([9, 9], max_tokens=5, payer=SMALL)])
        assert run.until(ticket, 20) <= 5 + 1
        run.passes(7)


def test_samplers_of_one_project_do_not_wait_for_each_others_queues(qwen_folder: Path) -> None:
    run = Run(crowded(qwen_folder))
    run.add(long_samples(500, Payer("p", "one")))
    run.passes(10)
    (ticket,) = run.add([sample_operation([9, 9], max_tokens=5, payer=Payer("p", "two"))])
    assert run.until(ticket, 20) <= 5 + 1


def test_who_makes_room_draws_the_same_tokens_later(qwen_folder: Path) -> None:
    operations = long_samples(10, LARGE)
    alone = [response.sequences[0].tokens for response in crowded(qwen_folder).all(operations)]
    driver = crowded(qwen_folder)
    free = driver.engine._sampler._pool.num_free
    run = Run(driver)
    tickets = run.add(operations)
    for n in range(6):
        run.passes(5)
        run.add([sample_operation([9, n], max_tokens=9, num_samples=3, payer=SMALL)])
    run.finish()
    assert [run.outcomes[ticket].sequences[0].tokens for ticket in tickets] == alone
    assert driver.engine._sampler._pool.num_free == free
    assert not driver.engine._sampler._places._taken


def test_a_prompt_that_needs_no_computing_takes_the_place_that_is_made_for_it(qwen_folder: Path) -> None:
    """In one and the same pass a sequence leaves its slot and another, ready to draw, has it."""
    driver = crowded(qwen_folder)
    known = sample_operation([9] * 20, max_tokens=4, num_samples=3, payer=SMALL)
    expected = [sequence.tokens for sequence in driver(known).sequences]
    operations = long_samples(10, LARGE)
    alone = [response.sequences[0].tokens for response in driver.all(operations)]
    pool = driver.engine._sampler._pool
    free = pool.num_free
    run = Run(driver)
    tickets = run.add(operations)
    repeated = []
    for n in range(60):
        run.passes(1)
        if n % 3 == 0:
            repeated += run.add([known])
    run.finish()
    assert [run.outcomes[ticket].sequences[0].tokens for ticket in tickets] == alone
    for ticket in repeated:
        assert [sequence.tokens for sequence in run.outcomes[ticket].sequences] == expected
    assert pool.num_free == free
    assert not driver.engine._sampler._places._taken


def test_two_who_each_want_every_place_both_get_on(qwen_folder: Path) -> None:
    """Neither may take the other's places back in the pass that gave them away: that would never end."""
    operations = [
        sample_operation([n, 3, 4], num_samples=2 * BATCH, max_tokens=20, seed=n, payer=payer)
        for n, payer in enumerate((LARGE, SMALL))
    ]
    alone = [[s.tokens for s in crowded(qwen_folder)(operation).sequences] for operation in operations]
    driver = crowded(qwen_folder)
    rounds = iter(range(1000))
    counted = driver.engine._sampler._num_that_fit

    def bounded(*args: Any) -> int:
        next(rounds)
        return counted(*args)

    driver.engine._sampler._num_that_fit = bounded  # type: ignore[method-assign]
    assert [[s.tokens for s in response.sequences] for response in driver.all(operations)] == alone


@pytest.mark.parametrize("weight", [1.0, 3.0])
def test_tokens_follow_weights(weight: float, qwen_folder: Path) -> None:
    run = Run(crowded(qwen_folder))
    run.add(long_samples(300, LARGE))
    run.passes(30)
    run.drawn.clear()
    run.add(long_samples(300, Payer("heavy", "h", weight), max_tokens=25))
    run.passes(300)
    share = run.drawn["heavy"] / run.drawn.total()
    assert abs(share / (weight / (1 + weight)) - 1) < 0.1


def test_who_is_alone_has_every_place(qwen_folder: Path) -> None:
    run = Run(crowded(qwen_folder))
    run.add(long_samples(100, LARGE))
    run.passes(5)
    run.drawn.clear()
    run.passes(100)
    assert run.drawn["large"] > 0.95 * 100 * BATCH


def test_a_long_prompt_does_not_hold_up_a_short_one(qwen_folder: Path) -> None:
    run = Run(crowded(qwen_folder, max_prefill_tokens=32))
    prompts = [[(7 * n + i) % (VOCAB - 2) + 2 for i in range(200)] for n in range(50)]
    run.add([sample_operation(prompt, max_tokens=2, payer=LARGE) for prompt in prompts])
    run.passes(3)
    (ticket,) = run.add([sample_operation([9, 9], max_tokens=5, payer=SMALL)])
    assert run.until(ticket, 20) <= 5 + 1


def test_scoring_and_drawing_share_by_tokens(qwen_folder: Path) -> None:
    """Places that draw all the time take no more than `BATCH` tokens of a pass; the rest is for those that score."""
    run = Run(crowded(qwen_folder, max_prefill_tokens=64))
    prompts = [[(11 * n + i * n) % (VOCAB - 2) + 2 for i in range(100)] for n in range(400)]
    scores = Payer("scores", "s")
    scored = run.add([sample_operation(p, max_tokens=1, prompt_logprobs=True, payer=scores) for p in prompts])
    run.add(long_samples(400, Payer("draws", "d")))
    run.passes(200)
    assert scored[-1] not in run.outcomes, "not saturated"
    assert run.drawn["draws"] > 0.7 * 200 * (BATCH - 1)
    assert 101 * sum(ticket in run.outcomes for ticket in scored) > 0.7 * run.drawn["draws"]
