"""Who is next, on an engine that does one thing at a time, in virtual time: a millisecond per token."""

from __future__ import annotations

import statistics
from collections import deque
from dataclasses import dataclass, field

from hypothesis import given
from hypothesis import strategies as st

from tests.generated import examples
from tinsmith.control.scheduler import MAX_OUTSTANDING, OPERATION_TOKENS, Candidate, pick
from tinsmith.types.shares import Payer, Shares

BUDGET = 1000
STEP = 0
"""As the size of a request: an optimizer step."""


@dataclass
class Tenant:
    """A project with one or more models, each with a queue of requests and when they came."""

    weight: float
    queues: dict[str, deque[tuple[int, float]]]
    """By model: size and time of arrival."""
    waits: list[float] = field(default_factory=list)
    """From arrival until the engine begins with the batch."""
    given: int = 0


@dataclass
class Engine:
    """Has at most `MAX_OUTSTANDING` batches at a time, as the scheduler gives them."""

    tenants: dict[str, Tenant]
    shares: Shares = field(default_factory=Shares)
    now: float = 0.0
    begun: list[dict[str, int]] = field(default_factory=list)
    """Tokens by project, of every batch, in order."""
    served: list[str] = field(default_factory=list)
    """Requests in the order in which they were done: model and number of tokens."""
    _ahead: deque[tuple[float, float]] = field(default_factory=deque)
    """Begin and end of the batches that the engine has."""

    def run(self, until: float = float("inf"), batches: int = 10**6) -> None:
        """Until nothing waits, or time or batches are over."""
        for _ in range(batches):
            if self.now >= until or not self._fill():
                return
            self.now = self._ahead.popleft()[1]

    def _fill(self) -> bool:
        while len(self._ahead) < MAX_OUTSTANDING:
            candidates = [
                Candidate(model, self._sizes(queue), queue[0][0] == STEP, project, tenant.weight)
                for project, tenant in self.tenants.items()
                for model, queue in tenant.queues.items()
                if queue and queue[0][1] <= self.now
            ]
            if not candidates:
                break
            self._submit(pick(candidates, BUDGET, self.shares))
        return bool(self._ahead)

    def _sizes(self, queue: deque[tuple[int, float]]) -> tuple[int, ...]:
        sizes = []
        for size, at in queue:
            if size == STEP or at > self.now or sum(sizes) > BUDGET:
                break
            sizes.append(size)
        return tuple(sizes)

    def _submit(self, counts: dict[str, int]) -> None:
        begin = max([self.now, *(end for _, end in self._ahead)])
        tokens: dict[str, int] = {}
        for project, tenant in self.tenants.items():
            for model, queue in tenant.queues.items():
                for _ in range(counts.get(model, 0)):
                    size, at = queue.popleft()
                    tokens[project] = tokens.get(project, 0) + (size or OPERATION_TOKENS)
                    tenant.waits.append(begin - at)
                    tenant.given += size or OPERATION_TOKENS
                    self.served.append(model)
        self.begun.append(tokens)
        self._ahead.append((begin, begin + sum(tokens.values())))


def tenant(sizes: list[int], *, weight: float = 1.0, model: str, at: float = 0.0) -> Tenant:
    return Tenant(weight, {model: deque((size, at) for size in sizes)})


def test_single_requests_beside_a_thousand_batches_wait_for_less_than_two_batches() -> None:
    large = tenant([BUDGET] * 1000, model="large")
    arrivals = [1000.0 * i * 2.37 for i in range(1, 300)]
    small = Tenant(1.0, {"small": deque((10, at) for at in arrivals)})
    engine = Engine({"large": large, "small": small})
    engine.run()
    assert statistics.median(small.waits) < 2 * BUDGET
    assert max(small.waits) <= MAX_OUTSTANDING * (BUDGET + 10)
    assert large.given == 1000 * BUDGET


def test_the_first_request_of_a_project_goes_into_the_next_batch_however_many_others_wait() -> None:
    tenants = {f"old {i}": tenant([300] * 100, model=f"m{i}") for i in range(20)}
    engine = Engine(tenants)
    engine.run(batches=50)
    tenants["new"] = tenant([300], model="new", at=engine.now)
    before = len(engine.begun)
    engine.run(batches=MAX_OUTSTANDING)
    assert "new" in engine.begun[before]


def test_time_away_is_not_saved_up() -> None:
    away, busy = tenant([100] * 200, model="away", at=100_000.0), tenant([100] * 2000, model="busy")
    engine = Engine({"away": away, "busy": busy})
    engine.run(until=100_000.0)
    before = busy.given
    engine.run(until=110_000.0)
    assert away.given > 0
    assert abs(away.given - (busy.given - before)) <= 2 * BUDGET


def test_who_was_given_more_before_it_left_comes_back_with_that() -> None:
    shares = Shares()
    a, b = Payer("a", "m"), Payer("b", "n")
    shares.compete([a, b])
    shares.charge(a, 500)
    shares.compete([b])
    shares.charge(b, 100)
    shares.compete([a, b])
    assert shares.rank(a)[0] - shares.rank(b)[0] == 400


def test_models_of_a_project_share_what_the_project_has() -> None:
    many = Tenant(1.0, {f"m{i}": deque([(100, 0.0)] * 1000) for i in range(9)})
    one = tenant([100] * 1000, model="one")
    engine = Engine({"many": many, "one": one})
    engine.run(until=50_000.0)
    assert abs(many.given - one.given) <= 2 * BUDGET
    counts = [engine.served.count(f"m{i}") for i in range(9)]
    assert max(counts) - min(counts) <= 2


def test_optimizer_steps_of_all_go_together_and_are_charged() -> None:
    shares = Shares()
    candidates = [Candidate("a", is_step=True, project="p"), Candidate("b", (5,)), Candidate("c", is_step=True)]
    assert pick(candidates, 100, shares) == {"a": 1, "c": 1}
    assert pick(candidates, 100, shares) == {"b": 1}


def test_steps_without_end_do_not_keep_others_from_training() -> None:
    steps, training = tenant([STEP] * 5000, model="steps"), tenant([100] * 500, model="trains")
    engine = Engine({"steps": steps, "training": training})
    engine.run(until=40_000.0)
    assert abs(steps.given - training.given) <= 2 * BUDGET


def test_one_request_goes_at_a_time_where_that_is_asked() -> None:
    assert pick([Candidate("a", (1, 1)), Candidate("b", (1,))], 100, alone=True) == {"a": 1}
    assert pick([Candidate("a", is_step=True), Candidate("b", is_step=True)], 100, alone=True) == {"a": 1}


sizes = st.lists(st.sampled_from([STEP, 1, 30, 200, 700, 1000, 2500]), min_size=1, max_size=30)


@examples(30)
@given(st.lists(st.tuples(sizes, st.floats(0.25, 4.0), st.floats(0, 5000)), min_size=1, max_size=6))
def test_everything_is_done_in_the_order_of_its_model_and_nobody_idles(
    asked: list[tuple[list[int], float, float]],
) -> None:
    tenants = {f"p{i}": tenant(s, weight=w, model=f"m{i}", at=at) for i, (s, w, at) in enumerate(asked)}
    engine = Engine(tenants)
    for start in sorted({at for _, _, at in asked}):
        engine.now = max(engine.now, start)
        engine.run()
    for name, (sent, _, _) in zip(tenants, asked, strict=True):
        assert tenants[name].given == sum(size or OPERATION_TOKENS for size in sent)
        assert engine.served.count(f"m{name[1:]}") == len(sent)
    for batch in engine.begun:
        assert sum(batch.values()) > 0


@examples(30)
@given(
    st.lists(
        st.tuples(st.lists(st.integers(20, 1500), min_size=5, max_size=40), st.sampled_from([1.0, 1.5, 2.0])),
        min_size=2,
        max_size=3,
    ),
    st.integers(150_000, 200_000),
)
def test_shares_follow_weights_within_a_tenth_while_all_have_work(
    asked: list[tuple[list[int], float]], until: int
) -> None:
    tenants = {
        f"p{i}": tenant(sent * (1 + 2 * until // sum(sent)), weight=weight, model=f"m{i}")
        for i, (sent, weight) in enumerate(asked)
    }
    engine = Engine(tenants)
    engine.run(until=float(until))
    assert all(one.queues[f"m{i}"] for i, one in enumerate(tenants.values())), "not saturated"
    total, weights = sum(one.given for one in tenants.values()), sum(one.weight for one in tenants.values())
    for one in tenants.values():
        assert abs(one.given / total / (one.weight / weights) - 1) < 0.1


@examples(30)
@given(
    st.lists(
        st.tuples(st.lists(st.integers(100, 1500), min_size=20, max_size=40), st.sampled_from([0.5, 1.0, 3.0])),
        min_size=2,
        max_size=5,
    )
)
def test_who_always_waits_is_served_again_within_the_stated_bound(asked: list[tuple[list[int], float]]) -> None:
    tenants = {f"p{i}": tenant(sent * 60, weight=weight, model=f"m{i}") for i, (sent, weight) in enumerate(asked)}
    engine = Engine(tenants)
    engine.run(batches=60)
    turn = 1500  # the largest that any batch can be
    for name, one in tenants.items():
        others = {other: t.weight for other, t in tenants.items() if other != name}
        largest, between = 0, 0
        for batch in engine.begun:
            if name in batch:
                largest, between = max(largest, batch[name]), 0
                continue
            between += sum(batch.values())
            if largest:
                assert between <= sum(others.values()) / one.weight * largest + 2 * len(others) * turn


def test_what_others_leave_over_is_not_held_against_who_takes_it() -> None:
    """A project with a little work all the time, one that fills what is left, and one that comes later."""
    little = Tenant(1.0, {"l": deque((10, 900.0 * i) for i in range(400))})
    filling, later = tenant([500] * 1000, model="f"), tenant([500] * 1000, model="late", at=200_000.0)
    engine = Engine({"little": little, "filling": filling, "later": later})
    engine.run(until=200_000.0)
    before = filling.given
    assert before > 190_000
    engine.run(until=220_000.0)
    assert abs(later.given - (filling.given - before)) <= 4 * BUDGET


def test_a_batch_is_filled_with_whatever_fits() -> None:
    little = Tenant(1.0, {"l": deque((10, 0.0) for i in range(20))})
    filling = tenant([100] * 100, model="f")
    engine = Engine({"little": little, "filling": filling})
    engine.run()
    assert all(sum(batch.values()) > 0.9 * BUDGET for batch in engine.begun[:-1])
