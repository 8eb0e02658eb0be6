"""The engine's only use of a tokenizer: turning drawn tokens into text to look for stop strings."""

from __future__ import annotations

from transformers import AutoTokenizer

from tinsmith.engine.stopping import Decoder
from tinsmith.types.engine_options import ModelSource
from tinsmith.types.errors import Unsupported


class _TextDecoder:
    def __init__(self, tokenizer: object) -> None:
        self._tokenizer = tokenizer

    def decode(self, token_ids: list[int]) -> str:
        text = self._tokenizer.decode(  # type: ignore[attr-defined]
            token_ids, skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        assert isinstance(text, str)
        return text


class _NoDecoder:
    """For models without tokenizer files: everything works but stop strings."""

    def decode(self, token_ids: list[int]) -> str:
        raise Unsupported("this base model has no tokenizer; use stop token ids instead of stop strings")


def load_decoder(source: ModelSource) -> Decoder:
    try:
        return _TextDecoder(AutoTokenizer.from_pretrained(source.load_from))
    except (OSError, ValueError):
        return _NoDecoder()
