"""The examples run as they stand, and show what they promise."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(autouse=True)
def _own_data_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TINSMITH_DATA_DIR", str(tmp_path / "data"))
    monkeypatch.delenv("TINKER_BASE_URL", raising=False)


def run(name: str, *arguments: str) -> str:
    ran = subprocess.run(
        [sys.executable, "-W", "error", EXAMPLES / name, *arguments], capture_output=True, text=True, timeout=240
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stderr == ""
    return ran.stdout


def test_train_and_sample_teaches_its_three_answers() -> None:
    out = run("01_train_and_sample.py")
    for answer in ("Ask Tilly the tinsmith.", "In the shop by the river.", "Snips, a hammer and solder."):
        assert f"after:  {answer}" in out


def test_training_on_a_server_leaves_a_checkpoint_for_another_client(server: str) -> None:
    assert run("02_against_a_server.py", server).endswith("What is the password? Copper kettle.\n")


def test_rewards_rise() -> None:
    shares = [float(share) for share in re.findall(r"last five steps\s+([\d.]+)%", run("03_rl_addition.py", "20"))]
    assert len(shares) == 20
    assert shares[-1] > shares[0] + 5


def test_adapters_of_three_ranks_learn_three_answers() -> None:
    out = run("04_many_adapters.py")
    for rank, answer in ((4, "I sell kettles and pans."), (16, "I sell warm bread."), (64, "I sell old books.")):
        assert re.search(rf"rank {rank} +{re.escape(answer)}", out)


def test_the_supervised_loop_in_one_file_lowers_its_test_loss() -> None:
    out = run("sl_loop.py", "2")
    losses = [float(loss) for loss in re.findall(r"test loss ([\d.]+)", out)]
    assert len(losses) == 3
    assert losses[-1] < losses[0] / 1.5
    assert "to sample:   tinker://" in out


def test_the_rewards_of_the_loop_that_samples_ahead_rise() -> None:
    out = run("rl_loop.py", "10")
    shares = [float(share) for share in re.findall(r"right answers\s+([\d.]+)%", out)]
    assert len(shares) == 10
    assert sum(shares[-3:]) / 3 > sum(shares[:2]) / 2 + 8


def test_ck_18_a_cookbook_of_few_lines_adds_an_adapter_a_stage_and_a_recipe() -> None:
    assert len((EXAMPLES / "cookbook_glossary.py").read_text().splitlines()) < 200
    assert "right: 100%" in run("cookbook_glossary.py")


@pytest.mark.parametrize("name", ["sl_loop.py", "rl_loop.py"])
def test_the_flat_loops_are_short_and_know_no_kitchen(name: str) -> None:
    source = (EXAMPLES / name).read_text()
    assert len(source.splitlines()) < 100
    assert "kitchen" not in source
