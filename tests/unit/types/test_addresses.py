"""Addresses of checkpoints: what they mean, and which are refused."""

from __future__ import annotations

import pytest

from tinsmith.types.checkpoint import CheckpointAddress, InvalidTinkerPath, check_checkpoint_name
from tinsmith.types.errors import InvalidInput


def parse(last: str) -> CheckpointAddress:
    return CheckpointAddress.parse(f"tinker://s:train:0/weights/{last}")


def test_every_form_is_read() -> None:
    assert (parse("a").name, parse("a").version, parse("a").is_chosen) == ("a", None, False)
    assert (parse("a.b=1~12").name, parse("a.b=1~12").version) == ("a.b=1", 12)
    assert parse("~latest").is_chosen
    assert (parse("~best(loss)").metric, parse("~best(loss)").goal) == ("loss", "min")
    assert (parse("~best(eval_accuracy)").goal, parse("~best(my.figure,max)").goal) == ("max", "max")
    assert parse("~best(loss:sum,max)").goal == "max"


@pytest.mark.parametrize(
    ("last", "message"),
    [
        ("~newest", "known are NAME, NAME~VERSION"),
        ("a~0", "no address"),
        ("a~latest", "no address"),
        ("~best()", "no address"),
        ("~best(loss", "no address"),
        ("~best(loss,lowest)", "give min or max"),
        ("~best(figure)", r"ask for ~best\(figure,min\) or ~best\(figure,max\)"),
        ("~best(reward_loss)", "its name does not say"),
    ],
)
def test_other_forms_are_refused_with_what_would_do(last: str, message: str) -> None:
    with pytest.raises(InvalidTinkerPath, match=message):
        parse(last)


@pytest.mark.parametrize("name", ["~latest", "a~1", "~best(loss)", "best~(x)"])
def test_no_name_can_be_taken_for_an_address(name: str) -> None:
    with pytest.raises(InvalidInput, match="letters, digits"):
        check_checkpoint_name(name)
