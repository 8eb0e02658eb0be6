"""Who leaves the memory that adapters share."""

from __future__ import annotations

import random
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from tests.generated import examples
from tinsmith.control.memory import Occupant, Patience, choose_evictions

NO_PATIENCE = Patience(0.0, 0.0)


def one(name: str, **fields: Any) -> Occupant:
    return Occupant(**{"name": name, "num_bytes": 10, "used_at": 0.0, "entered_at": 0.0, **fields})


def chosen(occupants: list[Occupant], needed: int = 10, now: float = 100.0, patience: Patience = NO_PATIENCE) -> Any:
    return choose_evictions(occupants, needed=needed, budget=30, now=now, patience=patience)


def test_nobody_leaves_where_there_is_room() -> None:
    assert chosen([one("a"), one("b")]).names == ()


def test_the_longest_unused_goes_before_the_others_and_the_idle_before_the_busy() -> None:
    occupants = [one("new", used_at=9.0), one("old", used_at=1.0), one("busy", is_busy=True)]
    assert chosen(occupants).names == ("old",)
    assert chosen(occupants, needed=20).names == ("old", "new")
    assert chosen(occupants, needed=30).names == ("old", "new", "busy")


def test_of_busy_ones_the_first_to_come_in_goes_first() -> None:
    occupants = [one(name, is_busy=True, entered_at=at) for name, at in (("b", 2.0), ("a", 1.0), ("c", 3.0))]
    assert chosen(occupants).names == ("a",)


def test_those_that_are_leaving_are_reckoned_with() -> None:
    assert chosen([one("a", is_leaving=True), one("b"), one("c")]).names == ()
    assert chosen([one("a", is_leaving=True), one("b", used_at=2), one("c", used_at=1)], needed=20).names == ("c",)


def test_one_used_a_moment_ago_is_spared_and_it_is_known_until_when() -> None:
    patience = Patience.of(0.5)
    occupants = [one("a", used_at=99.8), one("b", used_at=99.9), one("c", is_busy=True, entered_at=97.0)]
    spared = chosen(occupants, patience=patience)
    assert (spared.names, spared.is_hopeless) == ((), False)
    assert spared.look_again_at == 99.8 + 0.5
    assert chosen(occupants, now=100.3, patience=patience).names == ("a",)


def test_a_busy_one_stays_ten_times_what_a_page_costs() -> None:
    occupants = [one(name, is_busy=True, entered_at=95.0) for name in "abc"]
    assert chosen(occupants, now=99.9, patience=Patience.of(0.5)).names == ()
    assert chosen(occupants, now=100.0, patience=Patience.of(0.5)).names == ("a",)
    assert chosen(occupants, now=105.0, patience=Patience.of(60.0)).names == ("a",)  # and never longer than ten seconds


def test_it_is_hopeless_only_if_nobody_can_leave_now_or_later() -> None:
    assert chosen([one(name, is_stuck=True) for name in "abc"]).is_hopeless
    for change in ({"is_pinned": True}, {"is_leaving": True}, {}):
        assert not chosen([one("a", is_stuck=True), one("b", is_stuck=True), one("c", **change)], needed=20).is_hopeless


@examples(300)
@given(rng=st.randoms(use_true_random=False))
def test_what_is_chosen_is_enough_or_all_there_is_and_nobody_is_chosen_in_vain(rng: random.Random) -> None:
    occupants = [
        one(
            str(n),
            num_bytes=rng.randint(1, 12),
            used_at=rng.uniform(90, 100),
            entered_at=rng.uniform(80, 100),
            is_busy=rng.random() < 0.4,
            is_leaving=rng.random() < 0.2,
            is_pinned=rng.random() < 0.2,
        )
        for n in range(rng.randint(0, 8))
    ]
    needed, patience = rng.randint(0, 30), Patience.of(rng.choice([0.0, 0.3, 2.0]))
    found = chosen(occupants, needed=needed, patience=patience)
    by_name = {o.name: o for o in occupants}
    leaving = [by_name[name] for name in found.names]
    staying = sum(o.num_bytes for o in occupants if not o.is_leaving) - sum(o.num_bytes for o in leaving)
    ripe = {o.name for o in occupants if not (o.is_leaving or o.is_pinned) and patience.spared_until(o) <= 100}
    assert set(found.names) <= ripe
    assert not leaving or staying + leaving[-1].num_bytes + needed > 30
    assert staying + needed <= 30 or set(found.names) == ripe
