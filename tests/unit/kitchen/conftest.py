from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tinsmith.data import ChatTokenizer, load_tokenizer
from tinsmith.kitchen import SupervisedConfig, SupervisedResult, run_supervised
from tinsmith.kitchen.adapters.noop_training import NoopBackend
from tinsmith.models import TINY

NUM_CONVERSATIONS = 10


@pytest.fixture(scope="session")
def tiny_tokenizer() -> ChatTokenizer:
    return load_tokenizer(TINY)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "talk.jsonl"
    lines = [
        {"messages": [{"role": "user", "content": f"What is {n}?"}, {"role": "assistant", "content": "tin " * (n + 1)}]}
        for n in range(NUM_CONVERSATIONS)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture
def new_backend(tiny_tokenizer: ChatTokenizer) -> Callable[..., NoopBackend]:
    return lambda **options: NoopBackend(chat_tokenizer=tiny_tokenizer, **options)


@pytest.fixture
def backend(new_backend: Callable[..., NoopBackend]) -> NoopBackend:
    return new_backend()


RunRecipe = Callable[..., SupervisedResult]


@pytest.fixture
def train(data: Path, tmp_path: Path, backend: NoopBackend) -> RunRecipe:
    """Run the supervised recipe on the noop backend: 4 conversations per step, 3 steps per epoch, 2 epochs."""

    def run(use: NoopBackend | None = None, **settings: Any) -> SupervisedResult:
        config = SupervisedConfig(
            **({"data": data, "output": tmp_path / "run", "batch_size": 4, "epochs": 2} | settings)
        )
        return run_supervised(config, lambda _config, _folder: use or backend)

    return run
