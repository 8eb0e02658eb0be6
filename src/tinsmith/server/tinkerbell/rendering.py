"""Text on the server: the tokenizer and the chat template of each base model, loaded when first needed."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import TypeVar

from tinsmith.data import ChatTemplateRenderer, ChatTokenizer, load_tokenizer
from tinsmith.types.errors import TinsmithError, Unsupported
from tinsmith.types.operations import BaseModelCard

T = TypeVar("T")


class ModelText:
    """One base model's tokenizer. It must not be used from two threads at once, so everything passes through `run`."""

    def __init__(self, tokenizer: ChatTokenizer, chat: ChatTemplateRenderer | TinsmithError) -> None:
        self._tokenizer = tokenizer
        self._chat = chat
        self._turn = asyncio.Lock()

    async def run(self, work: Callable[[], T]) -> T:
        """`work()` in a thread."""
        async with self._turn:
            return await asyncio.to_thread(work)

    @property
    def chat(self) -> ChatTemplateRenderer:
        """Raises why there is none."""
        if isinstance(self._chat, TinsmithError):
            raise self._chat
        return self._chat

    def encode(self, text: str) -> list[int]:
        """As the tokenizer does it: the text of special tokens becomes those tokens."""
        return list(self._tokenizer(text)["input_ids"])

    def decode(self, tokens: Sequence[int]) -> str:
        return self._tokenizer.decode(tokens, skip_special_tokens=True)


class ModelTexts:
    """Of all base models that are served, for all callers."""

    def __init__(self, base_models: Callable[[], Sequence[BaseModelCard]]) -> None:
        self._base_models = base_models
        self._loads: dict[str, asyncio.Task[ModelText]] = {}

    async def of(self, base_model: str) -> ModelText:
        """Raises `Unsupported` if there is no tokenizer where the base model was loaded from."""
        return await asyncio.shield(self._load(base_model))

    def warm(self, base_model: str) -> None:
        """Begin to load what will be needed soon; a failure is told to whoever needs it."""
        self._load(base_model).add_done_callback(lambda load: load.cancelled() or load.exception())

    def _load(self, base_model: str) -> asyncio.Task[ModelText]:
        load = self._loads.get(base_model)
        if load is None or (load.done() and (load.cancelled() or load.exception() is not None)):
            card = next(card for card in self._base_models() if card.name == base_model)
            load = self._loads[base_model] = asyncio.create_task(asyncio.to_thread(_load, card))
        return load


def _load(card: BaseModelCard) -> ModelText:
    try:
        tokenizer = load_tokenizer(card.source)
    except (OSError, ValueError, ImportError) as error:
        raise Unsupported(
            f"base model {card.name!r} has no tokenizer that can be loaded from {card.source!r} ({error}); text cannot "
            "be sent to it, only tokens, through the Tinker API"
        ) from error
    try:
        return ModelText(tokenizer, ChatTemplateRenderer(tokenizer))
    except TinsmithError as error:
        return ModelText(tokenizer, error)
