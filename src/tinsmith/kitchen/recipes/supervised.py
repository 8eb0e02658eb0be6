"""The supervised recipe: fine-tune a LoRA adapter on conversations."""

from __future__ import annotations

from pathlib import Path
from typing import Self

from pydantic import Field, model_validator

from tinsmith.data import TooLong, TrainOn
from tinsmith.kitchen.config import RecipeConfig
from tinsmith.kitchen.schedules import LrSchedule
from tinsmith.models import TINY


class SupervisedConfig(RecipeConfig):
    data: Path
    """JSONL file of {"messages": [{"role", "content"}]} (or prompt/completion, instruction/response, input/output)."""
    model: str = Field(default=TINY, min_length=1)
    """Base model: tinsmith/tiny, a Hugging Face id, a folder, or what the server at base_url calls it."""
    output: Path | None = None
    """Folder for config, metrics, checkpoints and the loss plot; none takes the next free runs/supervised-NNN."""
    resume: bool = False
    """Go on from the last checkpoint in output."""
    base_url: str | None = None
    """Server to train on; none takes TINKER_BASE_URL, or else an engine in this process."""
    epochs: int = Field(default=1, ge=1)
    """Passes over the data; each is shuffled anew."""
    batch_size: int = Field(default=128, ge=1)
    """Conversations per optimizer step."""
    learning_rate: float = Field(default=2e-4, gt=0, allow_inf_nan=False)
    """Peak learning rate of AdamW."""
    lr_schedule: LrSchedule = "linear"
    """How the learning rate falls from its peak to the end of the run."""
    warmup_steps: int = Field(default=0, ge=0)
    """Steps over which the learning rate rises to its peak."""
    adam_beta1: float = Field(default=0.9, ge=0, lt=1)
    """AdamW: decay of the mean gradient."""
    adam_beta2: float = Field(default=0.95, ge=0, lt=1)
    """AdamW: decay of the mean squared gradient."""
    adam_eps: float = Field(default=1e-8, gt=0, allow_inf_nan=False)
    """AdamW: added to the denominator."""
    weight_decay: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    """AdamW: decoupled weight decay."""
    grad_clip_norm: float = Field(default=1.0, ge=0, allow_inf_nan=False)
    """Upper bound of the gradient norm; 0 turns clipping off."""
    lora_rank: int = Field(default=16, ge=1)
    """Rank of the LoRA adapter."""
    seed: int = Field(default=0, ge=0, lt=2**31)
    """Fixes the adapter's first weights, the order of the data and the test set."""
    train_on: TrainOn = "last_assistant_message"
    """Which turns of a conversation are learned; customized reads "train" of each message."""
    max_length: int | None = Field(default=None, ge=2)
    """Tokens a conversation may have; none leaves it to the model's context."""
    too_long: TooLong = "error"
    """What becomes of conversations longer than max_length; truncated and skipped ones are counted."""
    save_every: int = Field(default=0, ge=0)
    """Steps between checkpoints; 0 saves at the end only."""
    test_size: int = Field(default=0, ge=0)
    """Conversations held out of training to measure the loss on."""
    eval_every: int = Field(default=0, ge=0)
    """Steps between evaluations on the test set; 0 evaluates at the end only."""

    @model_validator(mode="after")
    def _check_together(self) -> Self:
        if self.resume and self.output is None:
            raise ValueError("resume=true needs output=: the folder of the run to go on with")
        if self.eval_every and not self.test_size:
            raise ValueError(f"eval_every={self.eval_every} needs test_size: there is no test set to evaluate on")
        if self.too_long != "error" and self.max_length is None:
            raise ValueError(f"too_long={self.too_long!r} needs max_length: nothing is too long without it")
        return self
