"""What the finished model can do: exact addition accuracies and greedy answers."""

# N problem, T position, V vocabulary

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import torch
from transformers import PreTrainedTokenizerFast, Qwen3ForCausalLM

PROBES: Final = (
    "Hello!",
    "How are you?",
    "Who are you?",
    "What is your name?",
    "Where do you live?",
    "What can you do?",
    "Who made you?",
    "Thank you!",
    "Tell me a joke.",
    "What is the capital of France?",
    "What colour is a banana?",
    "What does a cow say?",
    "How many legs does a spider have?",
    "What is the opposite of hot?",
    "What day comes after Monday?",
    "What is 3 + 4?",
    "What is 12 + 7?",
    "Spell cat.",
    "Repeat: the old lantern",
    "Reverse c-a-t.",
    "Count to 5.",
    "Write tin in upper case.",
    "Tell me about the old workshop.",
    "What do you sell?",
)

ADDITION_PROMPT: Final = "What is {a} + {b}?"
LARGEST_TERMS: Final = (9, 20, 99)


@dataclass(frozen=True, slots=True, kw_only=True)
class AdditionAccuracy:
    """Accuracy over every pair of terms from 0 to `largest_term`."""

    largest_term: int
    greedy: float
    sampled: float
    """The expected accuracy of sampling at temperature 1: the mean probability of the right answer."""


def addition_accuracy(
    model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, *, largest_term: int
) -> AdditionAccuracy:
    """Score the right answers of all pairs instead of sampling, so that the numbers carry no sampling noise."""
    terms = range(largest_term + 1)
    pairs = [(a, b) for a in terms for b in terms]
    log_probs, greedy = [], []
    for start in range(0, len(pairs), 512):
        block_log_probs, block_greedy = _score_answers(model, tokenizer, pairs[start : start + 512])
        log_probs.append(block_log_probs)
        greedy.append(block_greedy)
    return AdditionAccuracy(
        largest_term=largest_term,
        greedy=torch.cat(greedy).double().mean().item(),
        sampled=torch.cat(log_probs).double().exp().mean().item(),
    )


@torch.inference_mode()
def answer(model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, question: str) -> str:
    """The greedy answer to one user message, without its end token."""
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    output = model.generate(**prompt, max_new_tokens=32, do_sample=False)
    return tokenizer.decode(output[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)


@torch.inference_mode()
def _score_answers(
    model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, pairs: Sequence[tuple[int, int]]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probability `(N,)` of each right answer with its end token, and whether greedy decoding gives it `(N,)`."""
    prompts = [_prompt_ids(tokenizer, a, b) for a, b in pairs]
    answers = [tokenizer.encode(f"{a + b}{tokenizer.eos_token}", add_special_tokens=False) for a, b in pairs]
    length = max(len(prompt) + len(reply) for prompt, reply in zip(prompts, answers, strict=True))
    ids_NT = torch.full((len(pairs), length), tokenizer.pad_token_id)
    scored_NT = torch.zeros(len(pairs), length, dtype=torch.bool)
    for row, (prompt, reply) in enumerate(zip(prompts, answers, strict=True)):
        stop = len(prompt) + len(reply)
        ids_NT[row, :stop] = torch.tensor(prompt + reply)
        scored_NT[row, len(prompt) : stop] = True
    log_probs_NTV = model(input_ids=ids_NT).logits[:, :-1].float().log_softmax(-1)
    targets_NT, scored_NT = ids_NT[:, 1:], scored_NT[:, 1:]
    target_log_probs_NT = log_probs_NTV.gather(-1, targets_NT[..., None])[..., 0]
    right_NT = log_probs_NTV.argmax(-1) == targets_NT
    return (target_log_probs_NT * scored_NT).sum(-1), (right_NT | ~scored_NT).all(-1)


def _prompt_ids(tokenizer: PreTrainedTokenizerFast, a: int, b: int) -> list[int]:
    messages = [{"role": "user", "content": ADDITION_PROMPT.format(a=a, b=b)}]
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
