"""The supervised recipes: fine-tune a LoRA adapter on conversations."""

from __future__ import annotations

from pathlib import Path
from typing import Self

from pydantic import Field, model_validator

from tinsmith.data import DEMO_CONVERSATIONS, TooLong, TrainOn
from tinsmith.kitchen.recipe import Recipe
from tinsmith.kitchen.training_config import TrainingConfig
from tinsmith.kitchen.workflows.supervised import supervised


class SupervisedConfig(TrainingConfig):
    data: Path
    """JSONL file of {"messages": [{"role", "content"}]} (or prompt/completion, instruction/response, input/output)."""
    epochs: int = Field(default=1, ge=1)
    """Passes over the data; each is shuffled anew."""
    batch_size: int = Field(default=128, ge=1)
    """Conversations per optimizer step."""
    train_on: TrainOn = "last_assistant_message"
    """Which turns of a conversation are learned; customized reads "train" of each message."""
    max_length: int | None = Field(default=None, ge=2)
    """Tokens a conversation may have; none leaves it to the model's context."""
    too_long: TooLong = "error"
    """What becomes of conversations longer than max_length; truncated and skipped ones are counted."""
    test_size: int = Field(default=0, ge=0)
    """Conversations held out of training to measure the loss on."""
    eval_every: int = Field(default=0, ge=0)
    """Steps between evaluations on the test set; 0 evaluates at the end only."""

    @model_validator(mode="after")
    def _check_together(self) -> Self:
        if self.eval_every and not self.test_size:
            raise ValueError(f"eval_every={self.eval_every} needs test_size: there is no test set to evaluate on")
        if self.too_long != "error" and self.max_length is None:
            raise ValueError(f"too_long={self.too_long!r} needs max_length: nothing is too long without it")
        return self


class Supervised(Recipe):
    name = "supervised"
    description = "Fine-tune a LoRA adapter on conversations."
    workflow = supervised
    config_type = SupervisedConfig


class SlBasic(Recipe):
    name = "sl_basic"
    description = "The supervised recipe on the conversations that ship: runs offline in seconds."
    workflow = supervised
    config_type = SupervisedConfig
    defaults = {"data": DEMO_CONVERSATIONS, "epochs": 5, "batch_size": 8, "learning_rate": 3e-3, "test_size": 8}


class ChatSl(Recipe):
    name = "chat_sl"
    description = "Fine-tune on every answer of conversations with several turns."
    workflow = supervised
    config_type = SupervisedConfig
    defaults = {
        "data": DEMO_CONVERSATIONS,
        "epochs": 4,
        "batch_size": 8,
        "learning_rate": 3e-3,
        "lr_schedule": "cosine",
        "train_on": "all_assistant_messages",
    }
