from __future__ import annotations

import io
import math
from pathlib import Path

import pytest
from rich.console import Console

from tinsmith.observe import JsonlSink, ProgressLine, StepRow, keep_rows, plot_loss, read_jsonl, sparkline


def row(step: int, loss: float = 1.0) -> StepRow:
    return StepRow(
        step=step, epoch=1, loss=loss, loss_sum=loss * 3, tokens=30, tokens_per_s=1234.5, learning_rate=1e-3,
        grad_norm=None, seconds=step / 2,
    )  # fmt: skip


def test_every_row_is_readable_as_soon_as_it_is_written(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with JsonlSink(path) as sink:
        sink.write(row(1).as_dict())
        assert read_jsonl(path) == [row(1).as_dict()]
        sink.write({"é": "\u2028"})
    with JsonlSink(path, durable=True) as sink:
        sink.write({"step": 3})
    assert [len(found) for found in read_jsonl(path)] == [9, 1, 1]


def test_a_number_that_json_lacks_is_refused(tmp_path: Path) -> None:
    with JsonlSink(tmp_path / "m.jsonl") as sink, pytest.raises(ValueError, match="not JSON compliant"):
        sink.write({"loss": math.nan})


def test_only_a_last_line_may_be_torn(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    path.write_text('{"step": 1}\n{"st')
    assert read_jsonl(path) == [{"step": 1}]
    path.write_text('{"st\n{"step": 1}\n')
    with pytest.raises(ValueError, match=r"m.jsonl:1 is no JSON: '\{\"st'"):
        read_jsonl(path)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ('{"step": 1}\n{"st', '{"step": 1}\n{"step": 2}\n'),
        ('{"step": 1}', '{"step": 1}\n{"step": 2}\n'),
        ('{"st', '{"step": 2}\n'),
        ("", '{"step": 2}\n'),
    ],
)
def test_a_row_after_a_torn_line_begins_a_line_of_its_own(tmp_path: Path, before: str, after: str) -> None:
    path = tmp_path / "m.jsonl"
    path.write_text(before)
    with JsonlSink(path) as sink:
        sink.write({"step": 2})
    assert path.read_text() == after


def test_rows_can_be_dropped(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"st')
    keep_rows(path, lambda found: found["step"] < 2)
    assert path.read_text() == '{"step": 1}\n'
    assert list(tmp_path.iterdir()) == [path]


def test_without_a_terminal_progress_is_plain_lines_now_and_then() -> None:
    out, now = io.StringIO(), [0.0]
    line = ProgressLine(Console(file=out, width=100), clock=lambda: now[0])
    line.started(title="training", first_step=1, num_steps=4)
    for step in range(1, 5):
        now[0] += 2.0
        line.stepped(row(step, loss=4.0 - step))
    line.noted("saved [bold] as it is")
    line.ended()
    assert out.getvalue().splitlines() == [
        "step 1/4  loss 3.0000  1,234 tokens/s  0:06 left",
        "step 4/4  loss 0.0000  1,234 tokens/s  0:00 left",
        "saved [bold] as it is",
    ]


def test_on_a_terminal_progress_is_one_live_line() -> None:
    out = io.StringIO()
    line = ProgressLine(Console(file=out, width=120, force_terminal=True, color_system=None), clock=lambda: 0.0)
    line.started(title="training x", first_step=1, num_steps=2)
    line.stepped(row(1, 3.0))
    line.stepped(row(2, 0.5))
    line.ended()
    last = out.getvalue().split("\r")[-1]
    assert "training x" in last
    assert "2/2" in last
    assert "loss 0.5000" in last
    assert "█▁" in last
    assert "1,234 tokens/s" in last


@pytest.mark.parametrize(
    ("values", "width", "curve"),
    [([], 8, ""), ([2.0], 8, "▁"), ([0, 7], 8, "▁█"), ([7, 5, 3, 0], 4, "█▆▄▁"), ([0, 2, 6, 8], 2, "▁█")],
)
def test_a_sparkline_shows_means_between_the_smallest_and_the_largest(
    values: list[float], width: int, curve: str
) -> None:
    assert sparkline(values, width=width) == curve


def test_the_loss_plot_is_a_picture(tmp_path: Path) -> None:
    plot_loss([row(step, 3 / step) for step in range(1, 40)], tmp_path / "loss.png")
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="no training step to plot"):
        plot_loss([], tmp_path / "none.png")
