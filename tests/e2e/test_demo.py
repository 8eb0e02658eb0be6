"""The promise of the first five minutes: `tinsmith demo` on the real embedded engine."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tinsmith.cli.demo import PROBES
from tinsmith.data import DEMO_CONVERSATIONS, read_conversations
from tinsmith.kitchen import RunFolder

DEMO_S_MAX = 240


@dataclass(frozen=True, slots=True, kw_only=True)
class Demo:
    output: Path
    summary: dict[str, Any]
    stdout: str
    stderr: str


def tinsmith(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command: Sequence[str] = [sys.executable, "-c", "from tinsmith.cli import main; main()", *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=DEMO_S_MAX, check=True)


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Demo:
    folder = tmp_path_factory.mktemp("demo")
    ran = tinsmith("demo", "--json", cwd=folder)
    return Demo(
        output=folder / "tinsmith-demo",
        summary=json.loads(ran.stdout.splitlines()[-1]),
        stdout=ran.stdout,
        stderr=ran.stderr,
    )


def taught(question: str) -> str:
    """What the shipped conversations answer to a first question."""
    conversations = read_conversations(DEMO_CONVERSATIONS).conversations
    [answer] = {c.messages[1].content for c in conversations if c.messages[0].content == question}
    return answer


def test_the_last_line_is_the_json_that_scripts_read(demo: Demo) -> None:
    assert demo.summary.keys() == {"loss_first", "loss_last", "tokens_per_s", "seconds", "samples"}
    assert all(isinstance(demo.summary[key], float) for key in ("loss_first", "loss_last", "tokens_per_s", "seconds"))
    assert [sample.keys() for sample in demo.summary["samples"]] == [{"prompt", "before", "after"}] * 3
    assert demo.stdout.count("\n") == 1


def test_the_loss_falls_by_more_than_half_in_under_a_minute(demo: Demo) -> None:
    assert demo.summary["loss_last"] < demo.summary["loss_first"] / 2
    assert demo.summary["seconds"] < 60
    assert demo.summary["tokens_per_s"] > 200


def test_the_answers_change_to_the_taught_ones(demo: Demo) -> None:
    assert [sample["prompt"] for sample in demo.summary["samples"]] == list(PROBES)
    for sample in demo.summary["samples"]:
        assert sample["after"] == taught(sample["prompt"])
        assert sample["before"] != sample["after"]


def test_a_person_sees_progress_answers_and_what_to_try_next(demo: Demo) -> None:
    for text in ("tokens/s", "before", "after", "Who are you?", "Loss plot: tinsmith-demo/loss.png", "Try next"):
        assert text in demo.stderr


def test_the_run_folder_is_complete(demo: Demo) -> None:
    folder = RunFolder(demo.output)
    assert folder.plot_file.read_bytes().startswith(b"\x89PNG")
    assert folder.rows()[-1].loss == demo.summary["loss_last"]
    assert all(row.grad_norm is not None and row.grad_norm > 0 for row in folder.rows())
    assert json.loads((demo.output / "samples.json").read_text()) == demo.summary["samples"]
    [record] = folder.checkpoints()
    assert list(folder.store.rglob(f"sampler_weights/{record.name}/**/adapter_model.safetensors"))


def test_the_trained_model_answers_from_its_folder(demo: Demo) -> None:
    question = "How do I clean a copper pan?"
    answered = tinsmith("sample", question, "--model", "tinsmith-demo", cwd=demo.output.parent)
    assert answered.stdout.strip() == taught(question)
    drawn = tinsmith(
        "sample", "Who are you?", "--model", "tinsmith-demo", "-n", "2", "--temperature", "1", "--seed", "1",
        "--max-tokens", "5", "--json", cwd=demo.output.parent,
    )  # fmt: skip
    samples = json.loads(drawn.stdout)["samples"]
    assert len(samples) == 2
    assert all(len(sample["tokens"]) == len(sample["logprobs"]) <= 5 for sample in samples)
