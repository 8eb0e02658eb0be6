"""Small random models on disk."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from tests.numerics.driver import VOCAB, Driver


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def qwen_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Grouped-query attention, query and key norms, tied embeddings."""
    config = Qwen3Config(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        tie_word_embeddings=True,
        max_position_embeddings=256,
        eos_token_id=1,
    )
    return _save(Qwen3ForCausalLM, config, tmp_path_factory.mktemp("qwen"))


@pytest.fixture(scope="session")
def llama_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Multi-head attention, untied unembedding."""
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        tie_word_embeddings=False,
        max_position_embeddings=256,
        eos_token_id=1,
    )
    return _save(LlamaForCausalLM, config, tmp_path_factory.mktemp("llama"))


def _save(model_class: Any, config: Any, folder: Path) -> Path:
    torch.manual_seed(0)
    model = model_class(config)
    for parameter in model.parameters():
        # the default initialization is so small that every token is equally likely
        parameter.data.mul_(4 if parameter.ndim == 2 else 1)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(params=["qwen", "llama"])
def any_folder(request: pytest.FixtureRequest, qwen_folder: Path, llama_folder: Path) -> Path:
    return qwen_folder if request.param == "qwen" else llama_folder


@pytest.fixture
def driver(qwen_folder: Path) -> Driver:
    return Driver(qwen_folder)
