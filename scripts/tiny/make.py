"""Make the base model that ships with Tinsmith: `python scripts/tiny/make.py`.

Generates the text, trains the tokenizer and the model, measures the result and writes the folder
`src/tinsmith/models/tiny` with its model card. Needs the packages of the `server` extra and no network.
"""

from __future__ import annotations

import argparse
import os
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final

import card
import corpus
import evaluate
import packing
import tokenizer as tiny_tokenizer
import torch
import train
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

FOLDER: Final = Path(__file__).parents[2] / "src" / "tinsmith" / "models" / "tiny"


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """The seeds and amounts that make the shipped model."""

    seed: int = 20
    held_out_seed: int = 21
    num_documents: int = 110_000
    num_held_out_documents: int = 1_000
    num_tokenizer_documents: int = 20_000
    num_threads: int = 2
    recipe: train.Recipe = field(default_factory=train.Recipe)


def main() -> None:
    plan = Plan()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder to write (default: the package's own)")
    parser.add_argument("--documents", type=int, default=plan.num_documents, help="how many documents to train on")
    parser.add_argument("--threads", type=int, default=plan.num_threads, help="how many CPU threads to use")
    arguments = parser.parse_args()
    make(replace(plan, num_documents=arguments.documents, num_threads=arguments.threads), arguments.out)


def make(plan: Plan, folder: Path) -> None:
    """Train by `plan` and write the model, its tokenizer and its card into `folder`, over what is there."""
    torch.set_num_threads(plan.num_threads)
    tokenizer = _trained_tokenizer(plan)
    end_ids = [tokenizer.eos_token_id, tokenizer.pad_token_id]
    model = train.new_model(plan.seed, end_ids=end_ids, pad_id=tokenizer.pad_token_id)
    rows = _rows(plan.seed, plan.num_documents, tokenizer)

    print(f"{rows.num_tokens:,} tokens in {len(rows):,} rows, {model.num_parameters():,} parameters", flush=True)
    started = time.monotonic()
    train_loss = train.train(model, rows, plan.recipe, report=_print_now)
    run = card.Run(
        seed=plan.seed,
        num_documents=plan.num_documents,
        num_tokens=rows.num_tokens,
        num_steps=len(rows) // plan.recipe.rows_per_step,
        num_threads=plan.num_threads,
        seconds=time.monotonic() - started,
        recipe=plan.recipe,
        train_loss=train_loss,
    )

    model.to(torch.bfloat16).save_pretrained(folder)
    tiny_tokenizer.save(tokenizer, folder, length_max=train.POSITIONS_MAX)
    text = card.render(run, _measured(plan, folder))
    (folder / "README.md").write_text(text, encoding="utf-8")
    print(text)


def _trained_tokenizer(plan: Plan) -> PreTrainedTokenizerFast:
    documents = corpus.documents(plan.seed, plan.num_tokenizer_documents)
    return tiny_tokenizer.train(tiny_tokenizer.plain_texts(documents))


def _rows(seed: int, num_documents: int, tokenizer: PreTrainedTokenizerFast) -> packing.Rows:
    return packing.pack(packing.encode(document, tokenizer) for document in corpus.documents(seed, num_documents))


def _measured(plan: Plan, folder: Path) -> card.Measured:
    """Measure what was saved: the bf16 weights and the tokenizer as a user loads them."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    held_out_rows = _rows(plan.held_out_seed, plan.num_held_out_documents, tokenizer)
    return card.Measured(
        num_parameters=model.num_parameters(),
        held_out=train.held_out_losses(model, held_out_rows),
        additions=[evaluate.addition_accuracy(model, tokenizer, largest_term=n) for n in evaluate.LARGEST_TERMS],
        answers={probe: evaluate.answer(model, tokenizer, probe) for probe in evaluate.PROBES},
    )


def _print_now(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    main()
