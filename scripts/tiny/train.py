"""The model and its training: Qwen3, AdamW with a warm-up and a cosine, bf16 matrix products, fp32 weights."""

# B row, T position in a row, V vocabulary

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import torch
from packing import Rows
from tokenizer import VOCAB_SIZE
from torch import Tensor
from torch.nn import functional
from transformers import GenerationConfig, Qwen3Config, Qwen3ForCausalLM

POSITIONS_MAX: Final = 2048


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """Everything the training depends on besides its rows."""

    rows_per_step: int = 12
    learning_rate: float = 4e-3
    warmup_steps: int = 60
    weight_decay: float = 0.05
    betas: tuple[float, float] = (0.9, 0.98)
    grad_norm_max: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Losses:
    """Mean negative log-likelihood in nats per token."""

    weighted: float
    """Under the training weights: answers and passages count fully, prompts a tenth."""
    answers: float
    """Over the tokens of answers and passages alone."""


def new_model(seed: int, *, end_ids: list[int], pad_id: int) -> Qwen3ForCausalLM:
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=VOCAB_SIZE,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=5,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=POSITIONS_MAX,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        rms_norm_eps=1e-6,
        tie_word_embeddings=True,
        use_cache=True,
        bos_token_id=None,
        eos_token_id=end_ids[0],
        pad_token_id=pad_id,
        attn_implementation="sdpa",
    )
    model = Qwen3ForCausalLM(config)
    model.generation_config = GenerationConfig(eos_token_id=end_ids, pad_token_id=pad_id)
    return model


def train(model: Qwen3ForCausalLM, rows: Rows, recipe: Recipe, *, report: Callable[[str], None]) -> float:
    """Pass once over `rows` in order; return the mean weighted loss of the last 50 steps."""
    optimizer = torch.optim.AdamW(_parameter_groups(model, recipe), lr=recipe.learning_rate, betas=recipe.betas)
    num_steps = len(rows) // recipe.rows_per_step
    losses: list[float] = []
    started = time.monotonic()
    model.train()
    for step in range(num_steps):
        for group in optimizer.param_groups:
            group["lr"] = recipe.learning_rate * _schedule(step, num_steps, recipe.warmup_steps)
        batch = rows.slice(step * recipe.rows_per_step, (step + 1) * recipe.rows_per_step)
        loss = _mean(_nll(model, batch), batch.weights_BT[:, 1:])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.grad_norm_max)
        optimizer.step()
        losses.append(loss.item())
        if step % 100 == 99:
            recent = sum(losses[-100:]) / 100
            report(f"step {step + 1}/{num_steps}  loss {recent:.4f}  {time.monotonic() - started:.0f} s")
    last = losses[-50:]
    return sum(last) / len(last)


@torch.inference_mode()
def held_out_losses(model: Qwen3ForCausalLM, rows: Rows, *, rows_per_step: int = 16) -> Losses:
    model.eval()
    sums = torch.zeros(2)
    weights = torch.zeros(2)
    for start in range(0, len(rows), rows_per_step):
        batch = rows.slice(start, start + rows_per_step)
        nll_BT, weights_BT = _nll(model, batch), batch.weights_BT[:, 1:]
        for place, chosen_BT in enumerate((weights_BT, (weights_BT == 1.0).float())):
            sums[place] += (nll_BT * chosen_BT).sum()
            weights[place] += chosen_BT.sum()
    weighted, answers = (sums / weights).tolist()
    return Losses(weighted=weighted, answers=answers)


def _nll(model: Qwen3ForCausalLM, rows: Rows) -> Tensor:
    """Negative log-likelihood `(B, T - 1)` of every token but the first of each row."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits_BTV = model(
            input_ids=rows.ids_BT, attention_mask=_visible_pairs(rows), position_ids=rows.positions_BT, use_cache=False
        ).logits
    nll_N = functional.cross_entropy(
        logits_BTV[:, :-1].flatten(0, 1).float(), rows.ids_BT[:, 1:].flatten(), reduction="none"
    )
    return nll_N.view(len(rows), -1)


def _visible_pairs(rows: Rows) -> Tensor:
    """True `(B, 1, T, T)` where a position may look: at itself and at what precedes it in its own document."""
    document_BT = rows.document_BT
    same_BTT = document_BT[:, :, None] == document_BT[:, None, :]
    causal_TT = torch.ones(document_BT.shape[1], document_BT.shape[1], dtype=torch.bool).tril()
    return (same_BTT & causal_TT)[:, None]


def _mean(values: Tensor, weights: Tensor) -> Tensor:
    return (values * weights).sum() / weights.sum()


def _schedule(step: int, num_steps: int, warmup_steps: int) -> float:
    """The share of the learning rate: a linear rise, then a cosine to 2 %."""
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, num_steps - warmup_steps)
    return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress))


def _parameter_groups(model: Qwen3ForCausalLM, recipe: Recipe) -> list[dict[str, object]]:
    matrices = [parameter for parameter in model.parameters() if parameter.ndim >= 2]
    vectors = [parameter for parameter in model.parameters() if parameter.ndim < 2]
    return [{"params": matrices, "weight_decay": recipe.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
