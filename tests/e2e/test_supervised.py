"""The supervised recipe on the real embedded engine, and on a server in another process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tinsmith.data import ChatTemplateRenderer, Message, load_tokenizer
from tinsmith.kitchen import RunFolder, SupervisedConfig, SupervisedResult, run_supervised
from tinsmith.kitchen.adapters.tinker_training import TinkerBackend, open_backend
from tinsmith.models import TINY
from tinsmith.observe import StepRow
from tinsmith.types import SamplingParams


class KilledHere(Exception):
    pass


class KillAfter:
    """A watcher that ends the run at a step, as a signal would."""

    def __init__(self, step: int) -> None:
        self.step = step

    def started(self, *, title: str, first_step: int, num_steps: int) -> None: ...

    def stepped(self, row: StepRow) -> None:
        if row.step == self.step:
            raise KilledHere

    def noted(self, text: str) -> None: ...

    def ended(self) -> None: ...


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "talk.jsonl"
    path.write_text(
        "".join(f'{{"prompt": "What is tin {n}?", "completion": "Tin number {n} {n}."}}\n' for n in range(8))
    )
    return path


def connect(config: SupervisedConfig, folder: RunFolder) -> TinkerBackend:
    return open_backend(base_url=config.base_url or "local:", model=config.model, store=folder.store)


def settings(data: Path, output: Path, **more: object) -> SupervisedConfig:
    return SupervisedConfig.model_validate(
        {"data": data, "output": output, "batch_size": 2, "epochs": 2, "learning_rate": 1e-3, "save_every": 2} | more
    )


def test_train_n_equals_train_k_kill_resume_train_the_rest(data: Path, tmp_path: Path) -> None:
    whole = run_supervised(settings(data, tmp_path / "whole"), connect)
    with pytest.raises(KilledHere):
        run_supervised(settings(data, tmp_path / "parts"), connect, observers=[KillAfter(5)])
    parts = run_supervised(settings(data, tmp_path / "parts", resume=True), connect)

    assert whole.steps == parts.steps == 8
    expected = [(row.step, row.loss, row.grad_norm) for row in RunFolder(whole.output).rows()]
    found = [(row.step, row.loss, row.grad_norm) for row in RunFolder(parts.output).rows()]
    for (step, loss, norm), (other_step, other_loss, other_norm) in zip(expected, found, strict=True):
        assert (step, loss) == (other_step, pytest.approx(other_loss, rel=1e-5))
        assert norm == pytest.approx(other_norm, rel=1e-4)
    assert [record.step for record in RunFolder(parts.output).checkpoints()] == [2, 4, 6, 8]
    assert _answer(whole) == _answer(parts)


def _answer(result: SupervisedResult) -> list[int]:
    backend = open_backend(base_url="local:", model=TINY, store=RunFolder(result.output).store)
    try:
        prompt = ChatTemplateRenderer(load_tokenizer(TINY)).generation_prompt(
            [Message(role="user", content="What is tin 3?")]
        )
        sampler = backend.open_sampler(result.checkpoint.sampler_path)
        drawn = sampler.sample(prompt, SamplingParams(max_tokens=12, temperature=0.0), num_samples=1)
        return drawn.result().sequences[0].tokens
    finally:
        backend.close()


def test_the_environment_sends_a_run_to_a_server(data: Path, tmp_path: Path, server: str) -> None:
    command = [sys.executable, "-c", "from tinsmith.cli import main; main()"]
    environ = os.environ | {"TINKER_BASE_URL": server}
    words = [f"data={data}", "output=out", "batch_size=4", "epochs=4", "learning_rate=5e-3", "test_size=1"]
    ran = subprocess.run(
        [*command, "run", "supervised", *words], cwd=tmp_path, env=environ, capture_output=True, text=True, timeout=120
    )
    assert ran.returncode == 0, ran.stderr
    rows = RunFolder(tmp_path / "out").rows()
    assert rows[-1].loss < rows[0].loss / 2
    assert not (tmp_path / "out" / "checkpoints").exists()
    assert "test loss" in ran.stdout

    asked = subprocess.run(
        [*command, "sample", "What is tin 3?", "--model", "out"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert asked.returncode == 0, asked.stderr
    assert asked.stdout.startswith("Tin number")


def test_an_unknown_model_and_a_missing_checkpoint_are_told_in_one_line(tmp_path: Path, server: str) -> None:
    for model, name in (("no/such-model", "no/such-model"), ("tinker://a:train:0/sampler_weights/b", "a:train:0")):
        asked = subprocess.run(
            [sys.executable, "-c", "from tinsmith.cli import main; main()", "sample", "Hello", "--model", model,
             "--base-url", server],
            cwd=tmp_path, capture_output=True, text=True, timeout=120,
        )  # fmt: skip
        assert asked.returncode == 1
        assert asked.stderr.startswith("error: ")
        assert name in asked.stderr
        assert "Traceback" not in asked.stderr
