"""Tokenizers as this package needs them: a small Protocol, and one way to load them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, cast


class ChatTokenizer(Protocol):
    """The part of a transformers fast tokenizer that rendering uses."""

    @property
    def is_fast(self) -> bool: ...

    @property
    def chat_template(self) -> Any: ...

    @property
    def added_tokens_decoder(self) -> Mapping[int, Any]: ...

    def __call__(self, text: str, **options: Any) -> Mapping[str, Any]: ...

    def apply_chat_template(self, conversation: Sequence[Mapping[str, Any]], **options: Any) -> Any: ...

    def decode(self, token_ids: Sequence[int], **options: Any) -> str: ...


def load_tokenizer(source: str) -> ChatTokenizer:
    """Load the tokenizer of `tinsmith/tiny`, of a local folder, or of a Hugging Face id.

    Raises `OSError` if there is none.
    """
    from transformers import AutoTokenizer

    from tinsmith.models import TINY, tiny_folder

    return cast(ChatTokenizer, AutoTokenizer.from_pretrained(tiny_folder() if source == TINY else source))
