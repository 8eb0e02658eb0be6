from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from tinsmith.kitchen import RunFolderError, SupervisedResult
from tinsmith.kitchen.comparison import compare
from tinsmith.kitchen.report import curve, render
from tinsmith.observe import StepRow

Train = Callable[..., SupervisedResult]


def test_a_report_shows_curves_and_loads_nothing(train: Train) -> None:
    page = (train(test_size=1).output / "report.html").read_text()
    assert page.count("<svg") == 2
    assert "supervised on tinsmith/tiny" in page
    assert "test loss" in page
    assert not re.search(r"(src|href)=|url\(", page)


@pytest.mark.parametrize(("value", "low", "high"), [(0.002, "0.001", "0.003"), (0.0, "-0.5", "0.5")])
def test_a_value_that_stays_is_drawn_on_an_axis_of_its_size(value: float, low: str, high: str) -> None:
    labels = re.findall(r">([^<]+)</text>", curve([1.0, 2.0], [value, value]))
    assert labels[:2] == [high, low]


def test_what_a_model_wrote_stays_text() -> None:
    row = StepRow(
        step=1, epoch=1, loss=1.0, loss_sum=1.0, tokens=1, tokens_per_s=1.0, learning_rate=0.1, grad_norm=None,
        seconds=1.0, metrics={"reward": 0.5},
    )  # fmt: skip
    rollout = {"step": 1, "prompt": "<b>", "answer": "<script>alert(1)</script>", "reward": 1.0}
    page = render(manifest={}, config={}, rows=[row], evaluations=[], rollouts=[rollout])
    assert "<script>" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page


def test_compared_runs_show_what_differs_and_what_it_came_to(train: Train, tmp_path: Path) -> None:
    train(output=tmp_path / "a")
    train(output=tmp_path / "b", learning_rate=1e-3, test_size=2)
    rows = dict(compare([tmp_path / "a", tmp_path / "b"]))
    assert rows["learning_rate"] == ["0.0002", "0.001"]
    assert rows["test_size"] == ["0", "2"]
    assert "batch_size" not in rows
    assert rows["test_loss"][0] == ""
    assert rows["steps"] == ["6", "4"]
    with pytest.raises(RunFolderError, match="holds no run"):
        list(compare([tmp_path / "c"]))
