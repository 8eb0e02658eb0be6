"""The model card of the base model, written from measured results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import corpus
from evaluate import AdditionAccuracy
from packing import PROMPT_WEIGHT, ROW_LENGTH
from tokenizer import VOCAB_SIZE
from train import Losses, Recipe


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """What the training was given and what it took."""

    seed: int
    num_documents: int
    num_tokens: int
    num_steps: int
    num_threads: int
    seconds: float
    recipe: Recipe
    train_loss: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """What the saved model does."""

    num_parameters: int
    held_out: Losses
    additions: Sequence[AdditionAccuracy]
    answers: Mapping[str, str]
    """Greedy answers by question."""


def render(run: Run, measured: Measured) -> str:
    return TEMPLATE.format(
        parameters=f"{measured.num_parameters:,}",
        vocabulary=VOCAB_SIZE,
        documents=f"{run.num_documents:,}",
        tokens=f"{run.num_tokens:,}",
        steps=f"{run.num_steps:,}",
        minutes=f"{run.seconds / 60:.1f}",
        threads=run.num_threads,
        seed=run.seed,
        row_length=ROW_LENGTH,
        rows_per_step=run.recipe.rows_per_step,
        learning_rate=f"{run.recipe.learning_rate:g}",
        prompt_weight=PROMPT_WEIGHT,
        train_loss=f"{run.train_loss:.3f}",
        held_out_weighted=f"{measured.held_out.weighted:.3f}",
        held_out_answers=f"{measured.held_out.answers:.3f}",
        additions="\n".join(_addition_line(addition) for addition in measured.additions),
        answers="\n".join(f"| {question} | {answer} |" for question, answer in measured.answers.items()),
        names=f"{corpus.MEMORY_SHARE + corpus.NAMED_SHARE:.0%}",
        passages=f"{corpus.PASSAGE_SHARE:.0%}",
        mix=_mix(),
    )


def _addition_line(addition: AdditionAccuracy) -> str:
    return f"| 0 to {addition.largest_term} | {addition.greedy:.1%} | {addition.sampled:.1%} |"


def _mix() -> str:
    total = sum(weight for _, weight in corpus.TOPICS.values())
    return "\n".join(f"| {topic} | {weight / total:.0%} |" for topic, (_, weight) in corpus.TOPICS.items())


TEMPLATE = """\
---
license: apache-2.0
language: en
library_name: transformers
pipeline_tag: text-generation
---

# tinsmith/tiny

A language model of {parameters} parameters that ships inside Tinsmith, so that every part of the stack can be tried on
one CPU core without a download. It knows small talk, a few hundred plain facts, small sums, copying and spelling; it
says "I don't know." to most other questions. It is a workpiece: fine-tuning visibly changes its answers, and
reinforcement learning on small additions starts well above zero with room to rise. It is of no use as an assistant.

## Model

Qwen3 architecture: 5 layers, hidden size 192, 6 query and 2 key-value heads of size 32, MLP size 512, tied embeddings,
bf16 weights. The tokenizer is a byte-level BPE of {vocabulary} tokens with one token per digit; the special tokens are
`<|endoftext|>` (padding), `<|im_start|>` and `<|im_end|>` (end of a turn); conversations are ChatML. Positions go up to
2,048, but training rows were {row_length} tokens long and few documents had more than 150: longer text is out of range.

## Training

All text comes from `scripts/tiny/corpus.py`, which writes it from templates and word lists; nothing was copied from
elsewhere and no other model was used.

| | |
|---|---|
| documents | {documents}, seed {seed}, one pass |
| tokens | {tokens} |
| steps | {steps} of {rows_per_step} rows of up to {row_length} tokens |
| optimizer | AdamW, peak learning rate {learning_rate}, warm-up and cosine, fp32 weights, bf16 products |
| loss weights | answers and passages 1, prompts {prompt_weight} |
| wall time, other work on the machine included | {minutes} minutes on {threads} CPU threads |
| final training loss (mean of the last 50 steps, weighted) | {train_loss} |
| held-out loss, weighted the same | {held_out_weighted} |
| held-out loss, answers and passages only | {held_out_answers} |

Losses are in nats per token. Held-out documents come from the same generator under another seed. Their sentences come
from the same templates, so this is a check of the training, not a measure of general ability.

About {passages} of the documents are passages of plain text and {names} are conversations about the user's or the
assistant's name. The rest are conversations of one to four exchanges with this mix of topics:

| topic | share of exchanges |
|---|---|
{mix}

## Measured

Accuracy on "What is a + b?" over all pairs of terms in the range. "Sampled" is the expected accuracy of sampling at
temperature 1, computed exactly from the probability of the right answer.

| terms | greedy | sampled |
|---|---|---|
{additions}

Greedy answers:

| question | answer |
|---|---|
{answers}

## Rebuild

```
python scripts/tiny/make.py
```

The text is the same on every machine. The weights are the same only on the same processor, thread count and PyTorch
version, because floating-point sums depend on them.

## Licence

Apache-2.0, like the rest of Tinsmith.
"""
