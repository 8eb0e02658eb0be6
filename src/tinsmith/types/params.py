"""What a user sets: adapter shape, optimizer, sampling."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Field

from tinsmith.types.datum import StrictModel

LossFnType: TypeAlias = Literal[
    "cross_entropy", "importance_sampling", "ppo", "cispo", "dro", "gspo", "stable_reinforce", "custom"
]
SamplingClientKind: TypeAlias = Literal["snapshot", "inflight"]

DEFAULT_LORA_ALPHA = 32.0
"""LoRA alpha when none is given; the adapter's output is scaled by alpha / rank."""


class LoraConfig(StrictModel):
    """Shape of a LoRA adapter. At least one `train_*` flag must be true."""

    rank: int
    seed: int | None = None
    """Fixes the initial weights; with none the server draws one."""
    train_unembed: bool = True
    train_mlp: bool = True
    train_attn: bool = True


class AdamParams(StrictModel):
    """Hyper-parameters of one AdamW step (Loshchilov & Hutter, arXiv 1711.05101; torch.optim.AdamW)."""

    learning_rate: float = 0.0001
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-12
    weight_decay: float = 0.0
    """Decoupled: parameters shrink by learning_rate * weight_decay."""
    grad_clip_norm: float = 0.0
    """Upper bound of the global gradient norm; 0 turns clipping off."""


class OptimizerConfig(BaseModel):
    """The optimizer family of a model; only `adamw` is implemented."""

    model_config = ConfigDict(extra="allow", frozen=True)

    type: str = "adamw"


class AdamOptimizerConfig(StrictModel):
    type: Literal["adamw"] = "adamw"


class DimuonOptimizerConfig(StrictModel):
    type: Literal["dimuon"] = "dimuon"
    version: Literal[1] = 1


class DimuonParams(StrictModel):
    type: Literal["dimuon"] = "dimuon"
    learning_rate: float = Field(ge=0)
    grad_clip_norm: float = 0.0
    beta1: float = Field(default=0.9, ge=0, lt=1)


OptimParams: TypeAlias = AdamParams | DimuonParams


class SamplingParams(BaseModel):
    """How to draw tokens. Unknown attributes are ignored here, as in the Tinker SDK."""

    model_config = ConfigDict(frozen=True)

    max_tokens: int | None = None
    """At most this many tokens; `None` means up to the end of the context."""
    seed: int | None = None
    stop: str | Sequence[str] | Sequence[int] | None = None
    """Strings or token ids that end a sequence. `None`: end-of-sequence tokens. `[]`: nothing stops it."""
    temperature: float = 1.0
    """0 takes the most likely token."""
    top_k: int = -1
    """Keep this many most likely tokens; -1 keeps all."""
    top_p: float = 1.0
    """Keep the smallest set of most likely tokens with at least this probability."""
