"""Which tokenizer belongs to a model, and loading it."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from tinsmith.models import TINY, tiny_folder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    Tokenizer: TypeAlias = PreTrainedTokenizerBase
else:
    Tokenizer: TypeAlias = Any

_LLAMA_3 = "thinkingmachineslabinc/meta-llama-3-instruct-tokenizer"
"""An ungated copy, which Tinker names for all Llama 3 models."""


def tokenizer_source(tokenizer_id: str | None, base_model: str | None) -> str:
    """Where `from_pretrained` finds the tokenizer: a folder as it is, the shipped model's folder, or a hub id.

    A hub id is cut at the first colon, which names a variant of the model. Raises `ValueError` if nothing is known.
    """
    name = tokenizer_id or base_model
    if not name:
        raise ValueError("the server names neither a tokenizer nor a base model for this client")
    if name == TINY:
        return str(tiny_folder())
    if Path(name).is_dir():
        return name
    name = name.partition(":")[0]
    if tokenizer_id is None and name.startswith("meta-llama/Llama-3"):
        return _LLAMA_3
    return name


def load_tokenizer(tokenizer_id: str | None, base_model: str | None) -> Tokenizer:
    """Imports transformers. A tokenizer is loaded once per process and then shared."""
    return _load(tokenizer_source(tokenizer_id, base_model))


@functools.lru_cache(maxsize=8)
def _load(source: str) -> Tokenizer:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(source)
