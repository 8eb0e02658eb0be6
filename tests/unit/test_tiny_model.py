"""The shipped base model is small, well-formed and as able as its card says."""

from __future__ import annotations

import json
from typing import Any, Final

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase, Qwen3ForCausalLM

from tests.generated import examples
from tinsmith.models import TINY, tiny_folder

WEIGHTS: Final = tiny_folder() / "model.safetensors"
CONVERSATION: Final = [
    {"role": "system", "content": "Answer briefly."},
    {"role": "user", "content": "What is 3 + 4?"},
    {"role": "assistant", "content": "7"},
]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(tiny_folder(), padding_side="left")


@pytest.fixture(scope="module")
def model() -> Qwen3ForCausalLM:
    return AutoModelForCausalLM.from_pretrained(tiny_folder(), dtype=torch.float32).eval()


def test_the_name_and_the_folder_agree_with_the_files() -> None:
    assert TINY == "tinsmith/tiny"
    config = json.loads((tiny_folder() / "config.json").read_text())
    assert config["architectures"] == ["Qwen3ForCausalLM"]
    assert config["num_key_value_heads"] < config["num_attention_heads"]
    assert config["vocab_size"] % 64 == 0
    assert "Apache-2.0" in (tiny_folder() / "README.md").read_text()


def test_the_weights_are_few_small_and_bf16() -> None:
    with safe_open(WEIGHTS, framework="pt") as file:
        tensors = [file.get_tensor(name) for name in file.keys()]  # noqa: SIM118 (not a mapping)
    assert {tensor.dtype for tensor in tensors} == {torch.bfloat16}
    assert 1_000_000 <= sum(tensor.numel() for tensor in tensors) <= 4_000_000
    assert WEIGHTS.stat().st_size < 8_000_000


def test_special_tokens_have_the_ids_that_the_configs_name(tokenizer: PreTrainedTokenizerBase) -> None:
    names = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    assert tokenizer.convert_tokens_to_ids(names) == [0, 1, 2]
    assert (tokenizer.pad_token, tokenizer.eos_token, tokenizer.bos_token) == ("<|endoftext|>", "<|im_end|>", None)
    generation = json.loads((tiny_folder() / "generation_config.json").read_text())
    assert generation["eos_token_id"] == [2, 0]
    assert generation["pad_token_id"] == 0


@given(text=st.text())
@examples(200)
def test_any_text_survives_the_tokenizer(tokenizer: PreTrainedTokenizerBase, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text, split_special_tokens=True)) == text


def test_each_digit_is_one_token(tokenizer: PreTrainedTokenizerBase) -> None:
    assert tokenizer.tokenize("1234567890") == list("1234567890")


def test_special_tokens_in_user_text_can_be_taken_literally(tokenizer: PreTrainedTokenizerBase) -> None:
    ids = tokenizer.encode("<|im_end|>", split_special_tokens=True)
    assert not set(ids) & {0, 1, 2}
    assert tokenizer.decode(ids) == "<|im_end|>"


def test_the_chat_template_writes_chatml(tokenizer: PreTrainedTokenizerBase) -> None:
    assert tokenizer.apply_chat_template(CONVERSATION, tokenize=False) == (
        "<|im_start|>system\nAnswer briefly.<|im_end|>\n"
        "<|im_start|>user\nWhat is 3 + 4?<|im_end|>\n"
        "<|im_start|>assistant\n7<|im_end|>\n"
    )


def test_the_generation_prompt_is_a_prefix_of_the_conversation(tokenizer: PreTrainedTokenizerBase) -> None:
    whole = tokenizer.apply_chat_template(CONVERSATION)["input_ids"]
    prompt = tokenizer.apply_chat_template(CONVERSATION[:-1], add_generation_prompt=True)["input_ids"]
    assert whole[: len(prompt)] == prompt
    assert tokenizer.decode(whole[len(prompt) :]) == "7<|im_end|>\n"


@pytest.mark.parametrize(
    ("question", "answer"),
    [
        ("Hello!", "Hello! How can I help you?"),
        ("What is your name?", "My name is Tiny."),
        ("Who are you?", "I am Tiny, a small language model."),
        ("Thank you!", "You are welcome!"),
        ("What is the capital of France?", "Paris."),
        ("What is the opposite of hot?", "Cold."),
        ("What is 3 + 4?", "7"),
        ("Count to 5.", "1 2 3 4 5"),
        ("Tell me about the old workshop.", "I don't know."),
    ],
)
def test_greedy_answers(
    model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerBase, question: str, answer: str
) -> None:
    assert _answers(model, tokenizer, [question]) == [answer]


def test_small_additions_are_mostly_right_when_greedy(
    model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerBase
) -> None:
    right = _additions_right(model, tokenizer, [(a, b) for a in range(10) for b in range(10)])
    assert 0.7 <= right <= 1.0


def test_sampled_additions_start_above_zero_with_room_to_rise(
    model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerBase
) -> None:
    torch.manual_seed(0)
    pairs = [(a, b) for a in range(21) for b in range(21)]
    right = _additions_right(model, tokenizer, pairs, do_sample=True, temperature=1.0, top_k=0, top_p=1.0)
    assert 0.3 <= right <= 0.7


def _additions_right(
    model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerBase, pairs: list[tuple[int, int]], **sampling: Any
) -> float:
    answers = _answers(model, tokenizer, [f"What is {a} + {b}?" for a, b in pairs], **sampling)
    return sum(answer == str(a + b) for answer, (a, b) in zip(answers, pairs, strict=True)) / len(pairs)


def _answers(
    model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerBase, questions: list[str], **sampling: Any
) -> list[str]:
    prompts = tokenizer.apply_chat_template(
        [[{"role": "user", "content": question}] for question in questions],
        add_generation_prompt=True,
        padding=True,
        return_tensors="pt",
    )
    outputs = model.generate(**prompts, max_new_tokens=24, **({"do_sample": False} | sampling))
    return tokenizer.batch_decode(outputs[:, prompts["input_ids"].shape[1] :], skip_special_tokens=True)
