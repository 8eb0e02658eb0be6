"""The tokenizer: byte-level BPE with one token per digit, ChatML special tokens and the chat template."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Final

from corpus import Conversation, Document
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

END_OF_TEXT: Final = "<|endoftext|>"
TURN_START: Final = "<|im_start|>"
TURN_END: Final = "<|im_end|>"
VOCAB_SIZE: Final = 1536

CHAT_TEMPLATE: Final = (
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}"
    "{{- '<|im_start|>assistant\\n' }}"
    "{%- endif %}"
)


def train(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """Learn `VOCAB_SIZE` tokens, the specials first; every byte is a token, so any text round-trips."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[END_OF_TEXT, TURN_START, TURN_END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(texts, trainer)
    if core.get_vocab_size() != VOCAB_SIZE:
        raise ValueError(f"the text gave {core.get_vocab_size()} tokens, not {VOCAB_SIZE}; train on more of it")
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token=END_OF_TEXT,
        eos_token=TURN_END,
        additional_special_tokens=[TURN_START],
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )


def save(tokenizer: PreTrainedTokenizerFast, folder: Path, *, length_max: int) -> None:
    """Write the tokenizer's files; their settings use only words that every release of transformers reads."""
    tokenizer.model_max_length = length_max
    tokenizer.save_pretrained(folder)
    settings = {
        "additional_special_tokens": [TURN_START],
        "clean_up_tokenization_spaces": False,
        "eos_token": TURN_END,
        "model_max_length": length_max,
        "pad_token": END_OF_TEXT,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def plain_texts(documents: Iterable[Document]) -> Iterable[str]:
    """What the tokenizer is trained on: the words of every document without its markup."""
    for document in documents:
        if isinstance(document, Conversation):
            yield from (message.content for message in document.messages)
        else:
            yield document.text
